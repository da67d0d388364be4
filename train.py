"""REINFORCE for a research agent: read this file from top to bottom, it is the algorithm.

An update takes some training tasks, plays each several times with the current weights (rollout.py),
rewards the trajectories (reward.py), and follows the policy gradient

    grad J = 1/N * sum over trajectories k, turns i, tokens t of
             A(k, i) * grad log pi(token t | everything before it)

    A(k, i) = R(k, i) - leave-one-out baseline
    R(k, i) = r_k * gamma**(T_k - i) for turn i of the T_k turns of a correct trajectory, else r_k

with N constant. Only tokens that the policy sampled are in the sum. There is no value network, no
KL term and no ratio: data are used once, by the weights that sampled them. (With --partial, in
workers.py, older weights may have sampled some turns; --stale says what happens to those.)

In: a model, task files. Out: runs/NAME/ with config.json, the logs metrics.jsonl, evaluations.jsonl
and trajectories.jsonl, curves.png, report.html, checkpoint/ (a plain save_pretrained folder) and
state/ (for --resume). To try an idea, look for HACK HERE, in here and in the other files.

Letters in the comments on shapes: B rows of a batch, L tokens of a row, V tokens of the vocabulary.

    accelerate launch train.py
"""

from support import endings

if __name__ == "__main__":  # before the imports that take seconds
    endings.listen("train.py")

import contextlib
import math
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

# Before torch: waiting threads give up their core early (docs/results.md).
os.environ.setdefault("GOMP_SPINCOUNT", "1000")
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # no warnings about names of this host

import torch
from accelerate import Accelerator
from transformers.hf_argparser import HfArg

from context import Chat, Segment, Trajectory
from data.task import load_tasks
from engine import load_policy
from reward import advantages, control_negatives, penalised, turn_rewards
from rollout import AgentLoop, RolloutArgs
from server_engine import open_engine
from support.batches import checkpoint_layers, padded, shared_batches
from support.checks import check_args
from support.flags import parse_flags
from support.metrics import counts_of, metrics_of
from support.processes import sum_over_ranks
from support.run import Run
from support.run_folder import RESUME_HELP, take_config
from support.user_code import load_reward
from tools import signatures
from workers import AsyncArgs

DATA = Path(__file__).resolve().parent / "data"
# Of tokens that older weights sampled: "mask" leaves them out of the loss, "keep" does not, "is"
# weighs each by p_now / p_sampler, at most IS_CAP. "all-is" weighs every token so (bf16 rounds).
Stale = Literal["mask", "is", "keep", "all-is"]
IS_CAP = 2.0
Baseline = Literal["leave-one-out", "none"]


@dataclass
class TrainArgs:
    """Flags of training; those of rollouts are in rollout.py and workers.py."""

    model: str = HfArg(default="nano", help="nano, a checkpoint, a .gguf file or a hub name")
    train_tasks: str = HfArg(default=str(DATA / "train.jsonl"), help="tasks to learn from")
    dev_tasks: str = HfArg(default=str(DATA / "dev.jsonl"), help="held out, for the curve")
    test_tasks: str = HfArg(default=str(DATA / "test.jsonl"), help="held out, before and after")
    out: str = HfArg(default="", help="folder of the run (default: runs/run-1, run-2, …)")
    resume: str = HfArg(default="", help=RESUME_HELP)
    seed: int = HfArg(default=0, help="decides every random choice")
    steps: int = HfArg(default=40, help="updates of the optimizer")
    tasks_per_step: int = HfArg(default=16, help="tasks in one update, over all processes")
    samples: int = HfArg(default=8, help="trajectories of one task: a group")
    learning_rate: float = HfArg(default=5e-4, help="before warm-up and decay; large models: 1e-6")
    warmup: int = HfArg(default=3, help="updates of linear warm-up")
    decay_steps: int = HfArg(default=40, help="updates until a tenth of the rate (0: constant)")
    max_grad_norm: float = HfArg(default=1.0, help="gradient clipping")
    curriculum: Literal["on", "off"] = HfArg(default="off", help="on: hard tasks come more often")
    gamma: float = HfArg(default=0.95, help="decay of a correct trajectory's reward a turn")
    format_penalty: float = HfArg(default=0.5, help="cost of a format failure, for any --reward")
    baseline: Baseline = HfArg(default="leave-one-out", help="subtract the other tries' mean")
    negatives: float = HfArg(default=2.0, help="negatives kept for each reward above 0; inf: all")
    reward: str = HfArg(default="", help="file.py:function, a reward of your own")
    nominal_tokens: int = HfArg(default=128, help="assumed for a trajectory in the constant N")
    micro_tokens: int = HfArg(default=4096, help="padded tokens in one forward and backward pass")
    gradient_checkpointing: bool = HfArg(default=False, help="less memory, a slower update")
    rollout: Literal["sync", "async"] = HfArg(default="sync", help="async: in processes beside it")
    stale: Stale = HfArg(default="mask", help="mask, reweight (is) or keep tokens of older weights")
    check_logprobs: bool = HfArg(default=False, help="against the sampler's; float32 must agree")
    eval_every: int = HfArg(default=15, help="updates between evaluations on dev (0: never)")
    eval_tasks: int = HfArg(default=128, help="test tasks, and half as many of dev (0: none)")
    save_every: int = HfArg(default=10, help="updates between checkpoints")
    processes: int = HfArg(default=0, help="on CPUs (0: one a core, as memory and tasks allow)")
    threads: int = HfArg(default=0, help="CPU threads of a process (0: its share of the cores)")
    keep_trajectories: int = HfArg(default=60, help="updates whose trajectories are written")
    log_with: str = HfArg(default="", help="tracker of Accelerate: tensorboard, wandb, …")


# ---------------------------------------------------------------------------------------- the loss


class Policy(torch.nn.Module):
    """The model as the loss sees it, in one module, so that Accelerate can wrap it."""

    def __init__(self, model, temperature: float):
        super().__init__()
        self.model, self.temperature = model, temperature

    def forward(self, ids: torch.Tensor, in_loss: torch.Tensor) -> torch.Tensor:
        """Log-probs of chosen tokens given what stands before them.

        Args:
            ids: (B, L), padded on the right; causal attention needs no mask then.
            in_loss: (B, L) bool, the chosen tokens; never the first of a row.

        Returns:
            (chosen tokens,): log-probs under softmax(logits / temperature), the distribution that
            they were sampled from.
        """
        chosen = in_loss[:, 1:]  # (B, L-1): the logits after a token predict the next one
        output = self.model(input_ids=ids[:, :-1], use_cache=False, logits_to_keep=chosen)
        logits = output.logits.float()  # (chosen tokens, V): the mask keeps these alone
        logprobs = torch.log_softmax(logits / self.temperature, dim=-1)
        return logprobs.gather(-1, ids[:, 1:][chosen][:, None])[:, 0]


@dataclass
class Row:
    """A segment as the loss sees it: an advantage for each token, 0 where it is not in the loss."""

    segment: Segment
    advantages: list[float]
    reweighted: list[bool]  # tokens to which --stale gives an importance ratio


def rows_of(
    trajectory: Trajectory, turn_advantages: list[float], version: int, stale: str = "mask"
) -> list[Row]:
    """The rows that training sees of a trajectory. This is the mask.

    A token is in the loss if the policy sampled it. Prompt and observation tokens are not; with
    --stale mask, nor are tokens that older weights sampled. A turn that stands in several segments
    (the context manager has opened a new one) is in the loss only where it was sampled: elsewhere
    its tokens are context, and `turn_of` says -1.

    Args:
        turn_advantages: one number a turn.
        version: of the weights that are updated.
    """
    rows = []
    for segment in trajectory.segments:
        row = Row(segment, [], [])
        for number in segment.turn_of:  # -1: the policy did not sample this token
            is_stale = number >= 0 and trajectory.turns[number].version != version
            in_loss = number >= 0 and not (is_stale and stale == "mask")
            row.advantages.append(turn_advantages[number] if in_loss else 0.0)
            row.reweighted.append(stale == "all-is" or is_stale and stale == "is")
        if any(row.advantages):
            rows.append(row)
    return rows


def loss_of(policy, rows: list[Row], device) -> torch.Tensor:
    """The sum of -advantage * log-prob over the tokens in the loss of a micro-batch."""
    ids = padded([row.segment.ids for row in rows], torch.long, device)  # (B, L)
    advantage = padded([row.advantages for row in rows], torch.float32, device)  # (B, L)
    # A token with advantage 0 would add nothing. A loss with another term needs a mask of its own.
    in_loss = advantage != 0
    logprobs = policy(ids, in_loss)  # (tokens in the loss,)
    # HACK HERE: the loss. J is maximised, hence the minus.
    per_token = -logprobs * advantage[in_loss]
    if any(any(row.reweighted) for row in rows):  # truncated importance ratios
        sampled = padded([row.segment.logprobs for row in rows], torch.float32, device)[in_loss]
        reweighted = padded([row.reweighted for row in rows], torch.bool, device)[in_loss]
        ratio = (logprobs.detach() - sampled).exp().clamp(max=IS_CAP)
        per_token = per_token * torch.where(reweighted, ratio, 1.0)
    return per_token.sum()


def gradient(
    policy, accelerator: Accelerator, rows: list[Row], denominator: float, args
) -> float | None:
    """The REINFORCE gradient over this process's rows, summed over processes and clipped. It is
    left in the parameters' `.grad`.

    Args:
        denominator: the N of the formula, a constant. So no trajectory counts less because it, or
            another one, is long.

    Returns:
        Its norm before clipping, or None if that is not finite: then no step must be made with it.

    Raises:
        Stopped: the user asked for an end; no weight has changed.
    """
    batches = shared_batches(rows, args.micro_tokens)  # as many in every process
    if not batches:
        return 0.0
    checkpoint_layers(policy, args.gradient_checkpointing)
    for number, (batch, weight) in enumerate(batches):
        endings.check()
        # Gradients travel between processes once, in the last pass. Those of a sharded model travel
        # in each: whole ones would be a second copy on the device.
        now = accelerator.is_fsdp2 or number == len(batches) - 1
        with contextlib.nullcontext() if now else accelerator.no_sync(policy):
            with accelerator.autocast():
                loss = loss_of(policy, batch, accelerator.device) * weight / denominator
            # Data parallelism takes the mean over processes, and we want the sum.
            accelerator.backward(loss * accelerator.num_processes)
    checkpoint_layers(policy, False)  # the sampler may be the same model
    norm = float(accelerator.clip_grad_norm_(policy.parameters(), args.max_grad_norm))
    return norm if math.isfinite(norm) else None


# -------------------------------------------------------------------------------------------- main


def learning_rate_at(update: int, args: TrainArgs) -> float:
    """Linear warm-up, times a linear decay from 1 to a tenth at `decay_steps`. The rate does not
    depend on --steps, so a resumed run may be longer.
    """
    decayed = 1 - 0.9 * min(1.0, update / args.decay_steps) if args.decay_steps else 1.0
    return args.learning_rate * min(1.0, (update + 1) / args.warmup) * decayed


def main():
    flags = parse_flags((TrainArgs, RolloutArgs, AsyncArgs), __doc__)
    args, rollout_args, async_args = flags
    with Run(args, flags) as run:
        if args.resume:
            take_config(args.resume, flags)
        check_args(args, rollout_args, async_args)
        run.begin()
        train_tasks = load_tasks(args.train_tasks)
        dev_tasks = load_tasks(args.dev_tasks, args.eval_tasks // 2 if args.eval_every else 0)
        test_tasks = load_tasks(args.test_tasks, args.eval_tasks)
        reward_of = load_reward(args.reward)
        toolbox = run.open_tools(rollout_args, train_tasks + dev_tasks + test_tasks)
        model, tokenizer = load_policy(args.model)
        chat = Chat(tokenizer, signatures())
        policy = Policy(model, rollout_args.temperature)
        learner = run.prepare(policy, args.learning_rate, chat)
        engine = open_engine(model, chat, rollout_args, run.done)  # with the learner's own weights
        learner.loop = AgentLoop(engine, chat, toolbox, rollout_args, lockstep=True)
        run.open_folder()
        rollouts = run.open_rollouts(train_tasks, async_args)
        before = run.evaluate("test", test_tasks) if run.done == 0 else None

        # Update u trains weights of version u, and makes version u + 1.
        for update in run.updates():
            # 1. Rollouts: each task several times, by the current weights.
            clock = time.perf_counter()
            with run.bar(rollouts.enough * args.samples, "rollout") as progress:
                groups = rollouts.collect(update, progress)
            trajectories = [t for group in groups for t in group.trajectories]
            rollout_s = time.perf_counter() - clock
            if args.check_logprobs:
                fresh = [rows_of(t, [1.0] * len(t.turns), update) for t in trajectories]
                run.check_logprobs(sum(fresh, []))

            # 2. Rewards and advantages, group by group. Negatives that are discarded have informed
            # the baseline. Trajectories that the environment failed are left out.
            clock = time.perf_counter()
            rows, outcomes, kept, by_turns = [], [], [], []
            for group in groups:
                sound = [t for t in group.trajectories if t.status != "tool_fault"]
                rewards = [penalised(reward_of(t), args.format_penalty) for t in sound]
                returns = [
                    turn_rewards(r, len(t.turns), args.gamma) for r, t in zip(rewards, sound)
                ]
                outcomes.append(rewards)
                kept.append(control_negatives(rewards, args.negatives))
                by_turns.append(advantages(returns, args.baseline))
                for trajectory, by_turn, is_kept in zip(sound, by_turns[-1], kept[-1]):
                    if is_kept:
                        rows += rows_of(trajectory, by_turn, update, args.stale)

            # 3. The update.
            for parameters in learner.optimizer.param_groups:
                parameters["lr"] = learning_rate_at(update, args)
            denominator = args.tasks_per_step * args.samples * args.nominal_tokens
            norm = gradient(learner.policy, run.accelerator, rows, denominator, args)
            run.step(norm, update)

            # 4. Bookkeeping.
            trained = sum(sum(map(bool, row.advantages)) for row in rows)  # tokens
            counts = sum_over_ranks(counts_of(groups, outcomes, kept, trained, rollouts))
            shares = run.curriculum.learn(counts["tries"], counts["hits"])  # for the next tasks
            metrics = metrics_of(counts, update) | {
                "curriculum": shares,
                "learning_rate": learning_rate_at(update, args),
                "grad_norm": norm,
                "rollout_s": rollout_s,
                "train_s": time.perf_counter() - clock,
                "tokens_per_s": counts["tokens"] / rollout_s,
            }
            run.log(metrics, groups, rows, outcomes, kept, by_turns)
            if args.eval_every and run.done % args.eval_every == 0 and run.done < args.steps:
                run.evaluate("dev", dev_tasks)
            if run.done % args.save_every == 0 or run.done == args.steps:
                run.save()
        run.evaluate("dev", dev_tasks)
        run.report(before, run.evaluate("test", test_tasks))


if __name__ == "__main__":
    main()
