"""Rewards and advantages: everything between a finished trajectory and the number that multiplies its log-probs.

    reward        format first, then correctness              (Kimi-Researcher: format reward, correctness reward)
    gamma_decay   r * gamma**(T - i) for step i of T          (Kimi-Researcher; correct trajectories only)
    advantages    minus the leave-one-out mean of the group   (ours: the blog names no baseline)
    control_negatives   which negative samples are discarded  (Kimi-Researcher discards some; the rule is ours)

In: trajectories with `.status`, `.answer`, `.task`, `.turns`. Out: plain floats. Pure functions, no state.
To try an idea, write `def my_reward(trajectory): return 0.3` in a file and pass `--reward file.py:my_reward`.
"""

import importlib.util
import math
from dataclasses import dataclass, field
from pathlib import Path

from support.answers import correct

FORMAT_FAILURES = ("format_error", "over_context", "over_turns")


@dataclass
class Reward:
    """total: what training sees. correct: 0 or 1. format_ok: no format failure. parts: anything worth logging."""

    total: float
    correct: float
    format_ok: bool
    parts: dict = field(default_factory=dict)


# -------------------------------------------------------------------------------------------------------------- reward


# HACK HERE: a function from a finished trajectory to a Reward or a float.
def reward(trajectory, format_penalty: float = 0.5) -> Reward:
    """Kimi-Researcher's rule: a format failure is penalised and correctness is not looked at; otherwise 1 or 0.

    Args:
        trajectory: finished; its `status`, `answer` and `task` are read.
        format_penalty: what a format failure costs. The size is ours: not published.
    """
    if trajectory.status in FORMAT_FAILURES:
        return Reward(-format_penalty, 0.0, False, {"format": -format_penalty})
    if trajectory.status != "answered":
        return Reward(0.0, 0.0, True, {"excluded": 1.0})
    hit = correct(trajectory.answer, trajectory.task.answer, trajectory.task.answer_type)
    return Reward(hit, hit, True, {"correct": hit})


def load_reward(spec: str):
    """The function named by "file.py:function", wrapped so that it may return a float; "" gives `reward` itself.

    Raises:
        ValueError: no such file or function; one line that says which.
    """
    if not spec:
        return reward
    path, _, name = spec.rpartition(":")
    if not path or not Path(path).is_file():
        raise ValueError(
            f"--reward {spec}: give file.py:function; there is no file {path or spec!r}"
        )
    module_spec = importlib.util.spec_from_file_location("user_reward", path)
    module = importlib.util.module_from_spec(module_spec)
    try:
        module_spec.loader.exec_module(module)
    except Exception as error:
        raise ValueError(
            f"--reward {spec}: {path} does not run ({type(error).__name__}: {error})"
        ) from None
    function = getattr(module, name, None)
    if not callable(function):
        raise ValueError(f"--reward {spec}: no function {name!r} in {path}")

    def wrapped(trajectory) -> Reward:
        value = function(trajectory)
        total = value.total if isinstance(value, Reward) else value
        if not isinstance(total, (int, float)) or not math.isfinite(total):
            raise ValueError(
                f"--reward {spec} gave {total!r} for task {trajectory.task.id}: a finite number or a Reward is needed"
            )
        if isinstance(value, Reward):
            return value
        ok = trajectory.status not in FORMAT_FAILURES
        hit = (
            correct(trajectory.answer, trajectory.task.answer, trajectory.task.answer_type)
            if trajectory.status == "answered"
            else 0.0
        )
        return Reward(float(value), hit, ok, {"custom": float(value)})

    return wrapped


# ---------------------------------------------------------------------------------------------------- credit to steps


def gamma_decay(r: float, T: int, gamma: float) -> list[float]:
    """r * gamma**(T - i) for i = 1..T: of two correct trajectories the shorter one gives its early steps more.

    Args:
        r: the outcome's reward.
        T: model steps (turns) of the whole trajectory, however many segments or pieces it was made in.
        gamma: decay a step; 1 turns it off.
    """
    return [r * gamma ** (T - i) for i in range(1, T + 1)]


def step_rewards(outcome: Reward, T: int, gamma: float) -> list[float]:
    """Reward of each of T steps: decayed if the trajectory is correct, else the same for all."""
    return gamma_decay(outcome.total, T, gamma if outcome.correct > 0 else 1.0)


def advantages(group: list[list[float]]) -> list[list[float]]:
    """Step rewards minus the leave-one-out mean over the other trajectories of the same task, step by step.

    Step i is compared with step min(i, T_k) of each other trajectory k, so the decay of the baseline matches the decay of
    the reward: equal trajectories get zero, and a long correct trajectory among shorter ones gets negative early steps.
    There is no division by a standard deviation. A trajectory alone in its group gets zero: nothing to compare with.

    Args:
        group: step rewards of each trajectory of one task.

    Returns:
        The same shape.
    """
    if len(group) < 2:
        return [[0.0] * len(steps) for steps in group]
    result = []
    for k, steps in enumerate(group):
        others = [other for j, other in enumerate(group) if j != k]
        result.append(
            [
                value - sum(other[min(i, len(other) - 1)] for other in others) / len(others)
                for i, value in enumerate(steps)
            ]
        )
    return result


def control_negatives(group: list[Reward], ratio: float) -> list[bool]:
    """Which trajectories of a group stay in the loss: all at or above the group's mean reward, and at most
    max(1, ratio * number of positive ones) of those below it.

    Pushing down many wrong trajectories for each right one spreads probability over everything else until entropy runs
    away or collapses (Kimi-Researcher discards some negative samples for this reason). What is pushed down most easily is
    kept first: format failures, because they are the mistake whose cause stands in the trajectory itself; the rest in
    sampling order, which is random. A wrong answer in a group of format failures lies above the mean: it is never dropped, so a
    group without a correct answer still teaches the format. Dropped ones have already informed the baseline, and the
    loss's denominator is constant.

    Args:
        group: rewards of the trajectories of one task.
        ratio: negatives kept for each trajectory with a positive reward; infinity keeps all.
    """
    mean = sum(outcome.total for outcome in group) / max(1, len(group))
    negatives = sorted(
        (k for k, outcome in enumerate(group) if outcome.total < mean),
        key=lambda k: group[k].format_ok,
    )
    allowed = max(1, ratio * sum(outcome.total > 0 for outcome in group))
    dropped = {k for rank, k in enumerate(negatives) if rank >= allowed}
    return [k not in dropped for k in range(len(group))]
