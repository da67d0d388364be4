"""Rewards and advantages: from finished trajectories to the numbers that multiply log-probs.

    reward              format first, then correctness      (Kimi-Researcher)
    penalised           what a format failure costs         (Kimi-Researcher; the size is ours)
    turn_rewards        r * gamma**(T - i) if it is correct (Kimi-Researcher)
    advantages          minus the mean of the other tries   (ours: the blog names no baseline)
    control_negatives   which negatives are left out        (Kimi-Researcher; the rule is ours)

In: finished trajectories. Out: plain floats. All functions are pure. To try an idea, write
`def my_reward(trajectory): return 0.3` into a file and pass `--reward file.py:my_reward`.
"""

import math
import statistics
from dataclasses import dataclass, field

from context import Trajectory
from support.answers import correct

# The policy's own mistakes. `tool_fault` is not one of them: there the environment failed, and the
# trainer leaves the trajectory out.
FORMAT_FAILURES = ("format_error", "over_context", "over_turns")


@dataclass
class Reward:
    """What a reward function says of one trajectory.

    total: the number that training sees.
    correct: 1.0 if the answer is right, else 0.0. Only correct trajectories are decayed.
    format_ok: False makes `penalised` replace the total.
    parts: name -> number; they reach metrics.jsonl, the curves and trajectories.jsonl.
    """

    total: float
    correct: float
    format_ok: bool = True
    parts: dict[str, float] = field(default_factory=dict)


# HACK HERE: this is the default of --reward. Another one takes a finished trajectory, too.
def reward(trajectory: Trajectory) -> Reward:
    """Kimi-Researcher's rule: 1 for the right answer, else 0; a format failure is only flagged."""
    if trajectory.status in FORMAT_FAILURES:
        return Reward(0.0, 0.0, format_ok=False)
    task, answered = trajectory.task, trajectory.status == "answered"
    hit = correct(trajectory.answer, task.answer, task.answer_type) if answered else 0.0
    return Reward(hit, hit, parts={"correct": hit})


def penalised(outcome: Reward, format_penalty: float) -> Reward:
    """The outcome with the trainer's penalty: a format failure's total becomes -format_penalty.

    The trainer applies this to every outcome, whatever reward function is plugged in. That there is
    a penalty is Kimi-Researcher's rule; its size is ours, since none was published.
    """
    if outcome.format_ok:
        return outcome
    return Reward(-format_penalty, 0.0, False, outcome.parts | {"format": -format_penalty})


# --------------------------------------------------------------------------- credit to turns


def gamma_decay(r: float, T: int, gamma: float) -> list[float]:
    """r * gamma**(T - i) for i = 1..T: a shorter trajectory gives its early turns more.

    Args:
        r: the outcome's reward.
        T: turns of the policy in the whole trajectory, across its segments and parked pieces. Turns
            of notes and turns of older weights count.
        gamma: decay a turn; 1 turns it off.
    """
    return [r * gamma ** (T - i) for i in range(1, T + 1)]


def turn_rewards(outcome: Reward, T: int, gamma: float) -> list[float]:
    """The reward of each of T turns. Only a positive one of a correct trajectory is decayed."""
    return gamma_decay(outcome.total, T, gamma if min(outcome.correct, outcome.total) > 0 else 1.0)


# HACK HERE: the baseline is ours. GRPO divides by the group's standard deviation besides.
def advantages(group: list[list[float]], baseline: str = "leave-one-out") -> list[list[float]]:
    """Ours: turn rewards minus their leave-one-out mean over the other trajectories of the task.

    Turn i is compared with turn min(i, T_k) of each other trajectory k, so the baseline decays as
    the reward does: equal trajectories get zero, and a long correct trajectory among shorter ones
    gets negative early turns. A trajectory that is alone in its group gets zero.

    Args:
        group: turn rewards of each trajectory of one task.
        baseline: "none" subtracts nothing.

    Returns:
        Advantages in the same shape.
    """
    if baseline == "none":
        return group
    if len(group) < 2:
        return [[0.0] * len(turns) for turns in group]
    result = []
    for k, turns in enumerate(group):
        others = group[:k] + group[k + 1 :]
        result.append([])
        for i, turn in enumerate(turns):
            gaps = [turn - other[min(i, len(other) - 1)] for other in others]
            result[k].append(sum(gaps) / len(gaps))
    return result


def is_negative(outcome: Reward, group: list[Reward]) -> bool:
    """Ours: a trajectory is a negative sample if its reward lies below its group's mean. So its
    reward may be above zero, and some of its turns may have positive advantages.
    """
    return outcome.total < statistics.mean(other.total for other in group)


def control_negatives(rewards: list[Reward], ratio: float) -> list[bool]:
    """Which trajectories of a group stay in the loss: all but the negatives beyond
    max(1, ratio * number of rewards above zero).

    Pushing down many wrong trajectories for each right one spreads probability over everything
    else, until entropy runs away or collapses. Kimi-Researcher discards some negatives for this
    reason; which ones is ours. Format failures are kept first, because their cause stands in the
    trajectory itself; the rest is kept in sampling order, which is random. A wrong answer among
    format failures is not negative, so a group without a correct answer still teaches the format.
    What is dropped still informs the baseline (train.main gives `advantages` the whole group), and
    the loss's denominator is constant.

    Args:
        rewards: outcomes of the trajectories of one task, penalties included.
        ratio: negatives that are kept for each reward above zero; infinity keeps all.
    """
    negatives = [k for k, outcome in enumerate(rewards) if is_negative(outcome, rewards)]
    negatives.sort(key=lambda k: rewards[k].format_ok)
    positives = sum(outcome.total > 0 for outcome in rewards)
    allowed = ratio if ratio == math.inf else max(1, ratio * positives)  # inf * 0 is no number
    dropped = {k for rank, k in enumerate(negatives) if rank >= allowed}
    return [k not in dropped for k in range(len(rewards))]
