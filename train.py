"""REINFORCE for a research agent, end to end: read this file from top to bottom, it is the algorithm.

Each step: take some training tasks, play each several times with the current weights (rollout.py), reward the trajectories
(reward.py), and follow the policy gradient

    grad J = 1/N * sum over trajectories k, steps i, tokens t of  A(k, i) * grad log pi(token t | everything before it)

with A(k, i) = r_k * gamma**(T_k - i) - leave-one-out baseline, N constant, and only tokens that the current policy sampled.
No value network, no KL term, no clipping of ratios: data are used once, by the weights that sampled them. (With --partial a
trajectory may be sampled by several versions of the weights; --stale says what happens to the older ones' turns.)

In: a model, a task file. Out: runs/NAME/ with config.json, metrics.jsonl, curves.png, trajectories.jsonl, checkpoint/
(a plain save_pretrained folder) and state/ (for --resume). To try an idea, look for HACK HERE, in here and in reward.py.

    accelerate launch train.py
"""

import os
import signal
import sqlite3
import sys

os.environ.setdefault(
    "GOMP_SPINCOUNT", "1000"
)  # before torch: threads that wait soon leave their core to others (README, Limits)
if __name__ == "__main__":  # until main() listens: no traceback out of the middle of an import
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if (
            number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN
        ):  # as nohup leaves it
            signal.signal(
                number,
                lambda *_: (sys.stderr.write("train.py: stopped before it began\n"), os._exit(130)),
            )

import contextlib
import json
import math
import time
from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object, set_seed
from tqdm import tqdm

from context import Chat, Segment, Trajectory
from data.task import Task, load_tasks
from engine import check_full_attention, keep_memory, load_policy
from evaluate import format_table, make_trajectories, summarise
from reward import advantages, control_negatives, load_reward, step_rewards
from rollout import (
    RolloutArgs,
    check_rollout_args,
    engine_for,
    open_toolbox,
    rollout,
    trajectory_key,
)
from support.flags import parse_flags
from support.run_folder import (
    choose_folder,
    cores_of,
    cut_lines,
    draw_curves,
    end_on_signals,
    load_state,
    save,
    save_config,
    share_of,
    start_ranks,
    use_threads,
)
from tools import signatures
from workers import Group, Rollouts, Setup, WorkerError, make_group, signals_later, where_it_failed

DATA = Path(__file__).resolve().parent / "data"
IS_CAP = 2.0  # --stale is: an importance ratio counts at most so much


@dataclass
class TrainArgs:
    model: str = field(
        default="nano", metadata={"help": "nano, a checkpoint folder, a .gguf file or a hub name"}
    )
    train_tasks: str = field(
        default=str(DATA / "train.jsonl"), metadata={"help": "tasks to learn from"}
    )
    dev_tasks: str = field(
        default=str(DATA / "dev.jsonl"),
        metadata={"help": "held-out tasks for the curve during training"},
    )
    test_tasks: str = field(
        default=str(DATA / "test.jsonl"),
        metadata={"help": "held-out tasks for the figures before and after"},
    )
    out: str = field(
        default="", metadata={"help": "folder of the run (default: runs/run-1, run-2, …)"}
    )
    resume: str = field(
        default="",
        metadata={
            "help": "folder of a run to go on with; its own flags are used, but --steps may be given anew"
        },
    )
    seed: int = field(default=0, metadata={"help": "decides every random choice"})
    steps: int = field(default=60, metadata={"help": "optimizer steps"})
    tasks_per_step: int = field(
        default=16, metadata={"help": "tasks in one step, over all processes"}
    )
    samples: int = field(
        default=8, metadata={"help": "trajectories of one task: the group that gives the baseline"}
    )
    learning_rate: float = field(
        default=5e-4,
        metadata={"help": "peak learning rate of AdamW; 1e-6 is usual for large models"},
    )
    warmup: int = field(default=3, metadata={"help": "steps of linear warm-up"})
    decay_steps: int = field(
        default=60,
        metadata={
            "help": "steps over which the rate then falls to a tenth, along a line (0: constant)"
        },
    )
    max_grad_norm: float = field(default=1.0, metadata={"help": "gradient clipping"})
    gamma: float = field(
        default=0.95,
        metadata={"help": "decay of a correct trajectory's reward a step; 1 turns it off"},
    )
    format_penalty: float = field(default=0.5, metadata={"help": "cost of a format failure"})
    negatives: float = field(
        default=2.0,
        metadata={
            "help": "incorrect trajectories kept for each correct one of the same task; inf keeps all"
        },
    )
    reward: str = field(default="", metadata={"help": "file.py:function, a reward of your own"})
    nominal_tokens: int = field(
        default=128,
        metadata={"help": "sampled tokens a trajectory, for the constant denominator of the loss"},
    )
    micro_tokens: int = field(
        default=4096, metadata={"help": "padded tokens in one forward and backward pass"}
    )
    rollout: str = field(
        default="sync",
        metadata={
            "help": "sync: trajectories are played in this process, the same ones at each repetition; async: in rollout processes"
        },
    )
    workers: int = field(
        default=0,
        metadata={
            "help": "rollout processes of each rank with --rollout async (0: one a core on CPUs, one on a GPU)"
        },
    )
    partial: bool = field(
        default=False,
        metadata={
            "help": "async: a step ends when tasks_per_step groups are whole or its budget is over; the others are parked at a turn boundary and continued by the next weights"
        },
    )
    ahead: float = field(
        default=0.5,
        metadata={
            "help": "partial: as slots fall idle groups are begun beyond a step's worth, at most this share of it (at least one); more means less waiting and more tokens by older weights"
        },
    )
    budget_s: float = field(
        default=0.0,
        metadata={
            "help": "partial: seconds of rollout after which a step ends with the groups that are whole (at least one; 0: no limit)"
        },
    )
    budget_tokens: int = field(
        default=0, metadata={"help": "partial: the same in sampled tokens of one rank"}
    )
    max_age: int = field(
        default=4,
        metadata={
            "help": "partial: a group begun so many steps ago is waited for, whatever the budget"
        },
    )
    overlap: bool = field(
        default=False,
        metadata={
            "help": "partial: workers go on during the update, with the weights they have, and take the new ones between turns"
        },
    )
    stale: str = field(
        default="mask",
        metadata={
            "help": "turns sampled by older weights: mask leaves them out of the loss, is weights each token by min(2, p_now / p_sampler), keep trains on them as they are"
        },
    )
    check_logprobs: bool = field(
        default=False,
        metadata={
            "help": "before each update compare trainer and sampler log-probs; stop if they differ by more than 1e-4"
        },
    )
    eval_every: int = field(
        default=15, metadata={"help": "steps between evaluations on dev (0: never)"}
    )
    eval_tasks: int = field(
        default=128,
        metadata={
            "help": "test tasks before and after, half as many dev tasks in between (0: no evaluation)"
        },
    )
    save_every: int = field(default=10, metadata={"help": "steps between checkpoints"})
    threads: int = field(
        default=0,
        metadata={"help": "CPU threads of each process (0: the cores, divided by the processes)"},
    )
    log_with: str = field(
        default="", metadata={"help": "tracker of Accelerate: tensorboard, wandb, …"}
    )


# ------------------------------------------------------------------------------------------------------------ learning


class Policy(torch.nn.Module):
    """The model as the loss sees it, in one module, so that Accelerate can wrap it."""

    def __init__(self, model, temperature: float):
        super().__init__()
        self.model, self.temperature = model, temperature

    def forward(self, ids: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
        """Log-probs of chosen tokens given what stands before them.

        Args:
            ids: (B, T), padded on the right; causal attention needs no mask then.
            wanted: (B, T) bool, the tokens in the loss; never the first of a row.

        Returns:
            (number of wanted tokens,): log-probs under softmax(logits / temperature), the distribution sampled from.
        """
        hidden = self.model.base_model(
            input_ids=ids[:, :-1], use_cache=False
        ).last_hidden_state  # (B, T-1, D)
        picked = wanted[:, 1:]
        logits = (
            self.model.get_output_embeddings()(hidden[picked]).float() / self.temperature
        )  # (wanted, V): only where needed
        return torch.log_softmax(logits, dim=-1).gather(-1, ids[:, 1:][picked][:, None])[:, 0]


@dataclass
class Row:
    """A segment with the advantage of each of its tokens; 0 means not in the loss."""

    segment: Segment
    weights: list[float]
    correct: list[bool] = field(
        default_factory=list
    )  # tokens whose weight is to be multiplied by an importance ratio; empty: none


def rows_of(
    trajectory: Trajectory, step_advantages: list[float], version: int, stale: str = "mask"
) -> list[Row]:
    """The rows that training sees of a trajectory.

    Prompt and observation tokens (turn -1) get no weight, and with `mask` neither do turns of older policy versions. A turn that
    stands in several segments (the context manager opened a new one) is trained only in the segment where it was sampled.
    """
    rows = []
    for segment in trajectory.segments:
        old = [turn >= 0 and trajectory.turns[turn].version != version for turn in segment.turn_of]
        weights = [
            step_advantages[turn] if turn >= 0 and not (is_old and stale == "mask") else 0.0
            for turn, is_old in zip(segment.turn_of, old)
        ]
        if any(weights):
            rows.append(Row(segment, weights, old if stale == "is" and any(old) else []))
    return rows


def micro_batches(rows: list[Row], micro_tokens: int) -> list[list[Row]]:
    """Rows of like length together, at most `micro_tokens` padded tokens each: the padding of a mixed batch is half of it."""
    batches: list[list[Row]] = []
    for row in sorted(rows, key=lambda row: len(row.segment.ids)):
        if batches and (len(batches[-1]) + 1) * len(row.segment.ids) <= micro_tokens:
            batches[-1].append(row)
        else:
            batches.append([row])
    return batches


def collate(rows: list[Row], device) -> tuple[torch.Tensor, torch.Tensor]:
    """(ids, weights), both (B, T), padded with zeros on the right."""
    T = max(len(row.segment.ids) for row in rows)
    ids, weights = torch.zeros(len(rows), T, dtype=torch.long), torch.zeros(len(rows), T)
    for b, row in enumerate(rows):
        ids[b, : len(row.segment.ids)] = torch.tensor(row.segment.ids)
        weights[b, : len(row.weights)] = torch.tensor(row.weights)
    return ids.to(device), weights.to(device)


def importance(rows: list[Row], wanted: torch.Tensor, logprobs: torch.Tensor) -> torch.Tensor:
    """Truncated importance ratios of the tokens in the loss: min(IS_CAP, p_now / p_sampler) for stale ones, exactly 1 for the others.

    Args:
        wanted: (B, T) bool. logprobs: (wanted tokens,), of the policy now.
    """
    ratios = torch.ones_like(logprobs)
    if any(row.correct for row in rows):
        sampled, stale = torch.zeros(wanted.shape), torch.zeros(wanted.shape, dtype=torch.bool)
        for b, row in enumerate(rows):
            sampled[b, : len(row.segment.logprobs)] = torch.tensor(row.segment.logprobs)
            stale[b, : len(row.correct)] = torch.tensor(row.correct, dtype=torch.bool)
        sampled, stale = sampled.to(wanted.device)[wanted], stale.to(wanted.device)[wanted]
        ratios[stale] = (logprobs.detach() - sampled).exp().clamp(max=IS_CAP)[stale]
    return ratios


def gradient(
    policy, accelerator: Accelerator, rows: list[Row], denominator: float, args: TrainArgs
) -> float | None:
    """The REINFORCE gradient over this process's rows, summed over processes and clipped; it is left in the parameters' `.grad`.

    Returns:
        Its norm before clipping, or None if that is not finite: then no step must be made with it.
    """
    batches = micro_batches(rows, args.micro_tokens)
    # Every process has to run as many backward passes as the one with most: missing ones are passes with weight 0.
    count = int(accelerator.gather(torch.tensor([len(batches)], device=accelerator.device)).max())
    if count == 0:
        return 0.0
    for number in range(count):
        if number < len(batches):
            ids, weights = collate(batches[number], accelerator.device)
            wanted = weights != 0
        else:
            ids, weights = (
                torch.zeros(1, 2, dtype=torch.long, device=accelerator.device),
                torch.zeros(1, 2, device=accelerator.device),
            )
            wanted = torch.tensor([[False, True]], device=accelerator.device)
        # Gradients travel between processes once, in the last pass.
        with contextlib.nullcontext() if number == count - 1 else accelerator.no_sync(policy):
            with accelerator.autocast():
                logprobs = policy(ids, wanted)
                # HACK HERE: the loss. J is maximised, hence the minus; x num_processes, for data parallelism takes the mean.
                ratios = (
                    importance(batches[number], wanted, logprobs) if number < len(batches) else 1.0
                )
                loss = (
                    -(logprobs * ratios * weights[wanted]).sum()
                    / denominator
                    * accelerator.num_processes
                )
            accelerator.backward(loss)
    norm = float(accelerator.clip_grad_norm_(policy.parameters(), args.max_grad_norm))
    return norm if math.isfinite(norm) else None


@torch.no_grad()
def logprob_gap(
    policy, trajectories: list[Trajectory], micro_tokens: int, device, version: int = 0
) -> float:
    """Largest |trainer - sampler| over the log-probs of all tokens that this version of the weights sampled: rounding error."""
    gap = 0.0
    rows = [row for t in trajectories for row in rows_of(t, [1.0] * len(t.turns), version)]
    for batch in micro_batches(rows, micro_tokens):
        ids, weights = collate(batch, device)
        sampled = torch.tensor(
            [
                value
                for row in batch
                for value, weight in zip(row.segment.logprobs, row.weights)
                if weight
            ],
            device=device,
        )
        if len(sampled):
            gap = max(gap, float((policy(ids, weights != 0) - sampled).abs().max()))
    return gap


# -------------------------------------------------------------------------------------------------------- bookkeeping


def task_at(tasks: list[Task], position: int, seed: int) -> Task:
    """The stream of training tasks, from position 0 on: each epoch is a new permutation, so a resumed run draws the same ones."""
    epoch, index = divmod(position, len(tasks))
    return tasks[np.random.default_rng([seed, epoch]).permutation(len(tasks))[index]]


def tasks_of_step(tasks: list[Task], step: int, count: int, seed: int) -> list[Task]:
    """The tasks of a step (from 0)."""
    return [task_at(tasks, position, seed) for position in range(step * count, (step + 1) * count)]


def learning_rate_at(step: int, args: TrainArgs) -> float:
    """Linear warm-up, then linear decay to a tenth at `decay_steps`. It does not look at --steps, so a resumed run may be longer."""
    decayed = 1 - 0.9 * min(1.0, step / args.decay_steps) if args.decay_steps else 1.0
    return args.learning_rate * min(1.0, (step + 1) / args.warmup) * decayed


def check_args(args: TrainArgs, rollout_args: RolloutArgs) -> None:
    """Raises ValueError with one clear line for a flag that cannot work."""
    if args.stale not in ("mask", "is", "keep"):
        raise ValueError(f"--stale {args.stale}: choose mask, is or keep")
    if args.rollout not in ("sync", "async"):
        raise ValueError(f"--rollout {args.rollout}: choose sync or async")
    if args.partial and args.rollout != "async":
        raise ValueError("--partial needs --rollout async")
    if not args.partial and (args.overlap or args.budget_s or args.budget_tokens):
        raise ValueError("--overlap, --budget_s and --budget_tokens need --partial")
    for name in ("workers", "ahead", "budget_s", "budget_tokens"):
        if not 0 <= getattr(args, name) < math.inf:
            raise ValueError(f"--{name} must be finite and not negative")
    if args.max_age < 1:
        raise ValueError("--max_age must be at least 1")
    if rollout_args.temperature <= 0:
        raise ValueError(
            "--temperature must be above 0 in training: greedy decoding has no log-probs to learn from"
        )
    for name in (
        "steps",
        "tasks_per_step",
        "samples",
        "micro_tokens",
        "save_every",
        "warmup",
        "nominal_tokens",
    ):
        if getattr(args, name) < 1:
            raise ValueError(f"--{name} must be at least 1, not {getattr(args, name)}")
    for name in (
        "seed",
        "decay_steps",
        "eval_every",
        "eval_tasks",
        "threads",
        "format_penalty",
        "negatives",
    ):
        if not getattr(args, name) >= 0:  # "not >=" refuses nan too
            raise ValueError(f"--{name} must be at least 0, not {getattr(args, name)}")
    for name in ("learning_rate", "max_grad_norm"):
        if not 0 < getattr(args, name) < math.inf:
            raise ValueError(f"--{name} must be above 0 and finite, not {getattr(args, name)}")
    check_rollout_args(rollout_args)
    if not 0 < args.gamma <= 1:
        raise ValueError("--gamma must be above 0 and at most 1")


# ---------------------------------------------------------------------------------------------------------------- main


def main():
    args, rollout_args = parse_flags((TrainArgs, RolloutArgs), __doc__)
    end_on_signals()
    start_ranks()
    keep_memory()
    accelerator = Accelerator(
        cpu=not torch.cuda.is_available(),
        log_with=args.log_with or None,
        mixed_precision="bf16" if torch.cuda.is_available() else "no",
    )
    device, is_main = accelerator.device, accelerator.is_main_process
    rank, ranks = accelerator.process_index, accelerator.num_processes
    local_ranks = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    use_threads(args.threads, local_ranks)
    try:
        out = choose_folder(args)
        state = None
        if args.resume:
            if not (out / "config.json").is_file():
                raise ValueError(f"--resume {out}: no run there")
            config, given = (
                json.loads((out / "config.json").read_text()),
                {
                    a.split("=")[0].lstrip("-").replace("-", "_")
                    for a in sys.argv[1:]
                    if a.startswith("--")
                },
            )
            for part in (args, rollout_args):
                for key in asdict(part):
                    if key in config and key not in given:
                        setattr(part, key, config[key])
            state = load_state(out)
        check_args(args, rollout_args)
        train_tasks = load_tasks(args.train_tasks)
        test_tasks = load_tasks(args.test_tasks)[: args.eval_tasks] if args.eval_tasks else []
        dev_tasks = (
            load_tasks(args.dev_tasks)[: args.eval_tasks // 2]
            if args.eval_tasks and args.eval_every
            else []
        )
        reward_of = load_reward(args.reward)
        toolbox = open_toolbox(rollout_args)
        if is_main:
            print(f"python tool: {toolbox.isolation()}")
        model, tokenizer = load_policy(args.model, device)
        check_full_attention(model, rollout_args.max_context)
        chat = Chat(tokenizer, signatures())
        with (
            accelerator.main_process_first()
        ):  # one process writes the worlds, the others find them
            toolbox.prepare(train_tasks + test_tasks + dev_tasks)
        if is_main:
            out.mkdir(parents=True, exist_ok=True)
            save_config(out, asdict(args) | asdict(rollout_args))
    except (OSError, ValueError, sqlite3.Error) as error:
        sys.exit(f"train.py: {error}")
    except KeyboardInterrupt:
        sys.exit("train.py: stopped before the first step")
    set_seed(args.seed)
    if state:
        model.load_state_dict(state["model"])
    policy = Policy(model, rollout_args.temperature)
    optimizer = torch.optim.AdamW(
        policy.parameters(), lr=args.learning_rate, betas=(0.9, 0.99), weight_decay=0.0
    )
    policy, optimizer = accelerator.prepare(policy, optimizer)
    first_step = 0
    if state:
        optimizer.load_state_dict(state["optimizer"])
        first_step = state["step"]
    # The sampler uses the learner's own weights: on-policy by construction, and nothing to copy.
    engine = engine_for(model, chat, rollout_args)
    engine.new_weights(first_step)
    mine = len(
        range(rank, args.tasks_per_step, ranks)
    )  # this process's share of the tasks of a step
    if args.log_with:
        accelerator.init_trackers("nano-researcher", config=asdict(args) | asdict(rollout_args))
    if is_main:
        for name in ("metrics.jsonl", "trajectories.jsonl", "evaluations.jsonl"):
            cut_lines(out / name, first_step)
        print(
            f"{sum(p.numel() for p in model.parameters()):,} parameters, {len(train_tasks)} training tasks, run folder {out}"
        )

    def bar(count: int, title: str):
        return tqdm(
            total=count,
            desc=title,
            unit="trajectory",
            leave=False,
            disable=not is_main,
            mininterval=0.5,
        )

    def play(trajectories: list[Trajectory], title: str) -> list[Trajectory]:
        """Play this process's trajectories to their end, in this process."""
        with bar(len(trajectories), title) as progress:
            return rollout(
                engine,
                chat,
                trajectories,
                toolbox,
                rollout_args,
                on_finish=lambda _: progress.update(),
            )

    def sync_groups(step: int) -> list[Group]:
        """This process's groups of a step, played by the current weights."""
        tasks = tasks_of_step(train_tasks, step, args.tasks_per_step, args.seed)[rank::ranks]
        groups = [
            Group(
                number,
                step,
                [
                    Trajectory(task, trajectory_key(args.seed, step, task, attempt))
                    for attempt in range(args.samples)
                ],
            )
            for number, task in enumerate(tasks)
        ]
        play([t for group in groups for t in group.trajectories], "rollout")
        return groups

    def async_groups(step: int) -> list[Group]:
        """The groups that this process's workers have made whole."""
        with bar(mine * args.samples, "rollout") as progress:
            return pool.collect(step, on_finish=lambda _: progress.update())

    def score(trajectory: Trajectory):
        try:
            return (
                reward_of(trajectory) if args.reward else reward_of(trajectory, args.format_penalty)
            )
        except Exception as error:  # never a silent 0: a broken reward stops the run
            sys.exit(
                f"train.py: the reward failed on task {trajectory.task.id!r}: {where_it_failed(error)}"
            )

    def next_group(n: int, version: int) -> Group:
        position = n * ranks + rank
        return make_group(
            task_at(train_tasks, position, args.seed), position, version, args.samples, args.seed
        )

    def start_workers() -> Rollouts:
        """This process's rollout workers, with what an earlier run had under way."""
        on_cpu = device.type == "cpu"
        count = args.workers or (cores_of(local_ranks) if on_cpu else 1)
        setup = Setup(
            args.model, rollout_args, str(device), cores_of(local_ranks * count) if on_cpu else 1
        )
        return Rollouts(
            model,
            setup,
            count,
            next_group,
            mine,
            args.partial,
            args.overlap,
            args.ahead,
            args.budget_s,
            args.budget_tokens,
            args.max_age,
            first_step,
            share_of(state.get("rollouts", []) if state else [], rank, ranks)
            or {"next_number": first_step * mine, "groups": []},
        )

    def evaluate_on(split: str, tasks: list[Task], step: int) -> dict | None:
        played = gather_object(
            play(
                make_trajectories(tasks[rank::ranks], 1, args.seed, 1_000_000),
                f"evaluate on {split}",
            )
        )
        result = summarise(played, {"step": step, "split": split}, args.seed)
        if is_main:
            with open(out / "evaluations.jsonl", "a") as file:
                file.write(json.dumps({"step": step, "split": split} | result) + "\n")
            accelerator.log({f"{split}/pass@1": result["pass@1"]}, step=step)
        return result

    before = after = pool = None
    done, skipped, changing = first_step, 0, False
    try:
        if args.rollout == "async":
            pool = start_workers()
        if test_tasks and first_step == 0:
            before = evaluate_on("test", test_tasks, 0)
            if is_main:
                print(
                    f"before training: held-out Pass@1 {before['pass@1']:.1%} (95% interval "
                    f"{before['pass@1_ci'][0]:.1%} to {before['pass@1_ci'][1]:.1%}, {before['n']} test tasks)",
                    flush=True,
                )
        progress = tqdm(
            range(first_step, args.steps),
            desc="train",
            initial=first_step,
            total=args.steps,
            disable=not is_main,
        )
        for step in progress:
            # 1. Rollouts: every task of the step several times, by the current weights (or partly by older ones, see --partial).
            clock = time.perf_counter()
            idle_before = engine.stats["idle_s"]
            groups = async_groups(step) if pool else sync_groups(step)
            trajectories = [t for group in groups for t in group.trajectories]
            rollout_s = time.perf_counter() - clock
            idle_share = (
                pool.idle_share if pool else (engine.stats["idle_s"] - idle_before) / rollout_s
            )
            if args.check_logprobs:
                gap = logprob_gap(
                    accelerator.unwrap_model(policy), trajectories, args.micro_tokens, device, step
                )
                print(
                    f"step {step + 1}: largest |trainer - sampler| log-prob {gap:.1e}", flush=True
                )
                if gap > 1e-4 and device.type == "cpu":
                    sys.exit(
                        "train.py: trainer and sampler disagree by more than 1e-4: the data would not be on-policy"
                    )

            # 2. Rewards and advantages, group by group; some negatives are discarded after they informed the baseline.
            clock = time.perf_counter()
            rows, outcomes, negatives, kept_negatives = [], [], 0, 0
            for group in (
                [t for t in group.trajectories if t.status != "tool_fault"] for group in groups
            ):
                rewards = [score(t) for t in group]
                steps_of = [
                    step_rewards(r, len(t.turns), args.gamma) for r, t in zip(rewards, group)
                ]
                kept = control_negatives(rewards, args.negatives)
                for t, advantage, keep in zip(group, advantages(steps_of), kept):
                    if keep:
                        rows += rows_of(t, advantage, step, args.stale)
                outcomes += rewards
                negatives += sum(r.total <= 0 for r in rewards)
                kept_negatives += sum(keep for r, keep in zip(rewards, kept) if r.total <= 0)

            # 3. The update. The denominator is a constant: no trajectory counts less because it, or another, is long.
            for group in optimizer.param_groups:
                group["lr"] = learning_rate_at(step, args)
            denominator = args.tasks_per_step * args.samples * args.nominal_tokens
            norm = gradient(policy, accelerator, rows, denominator, args)
            with signals_later():  # weights, their number and the groups that are behind us change together: Ctrl-C saves a state before or after
                changing = True
                if norm is not None:
                    optimizer.step()
                optimizer.zero_grad()
                engine.new_weights(step + 1)
                if pool:
                    pool.publish(model, step + 1)
                done, changing = step + 1, False
            train_s = time.perf_counter() - clock
            skipped = skipped + 1 if norm is None else 0
            if norm is None and is_main:
                print(f"step {done}: the gradient is not finite; the step was skipped", flush=True)
            if skipped == 3:
                sys.exit(
                    "train.py: three steps in a row without a finite gradient: lower --learning_rate"
                )

            # 4. Bookkeeping.
            turns = [turn for t in trajectories for turn in t.turns]
            sampled = [
                -p for turn in turns for p in turn.logprobs
            ]  # its mean is an unbiased estimate of the entropy
            ages = (
                Counter()
            )  # sampled tokens by how many updates old the weights were that sampled them
            for turn in turns:
                ages[done - 1 - turn.version] += len(turn.action_ids)
            local = {
                "trajectories": len(trajectories),
                "reward": sum(o.total for o in outcomes),
                "outcomes": len(outcomes),
                "right": sum(o.correct for o in outcomes),
                "turns": len(turns),
                "tokens": len(sampled),
                "surprise": sum(sampled),
                "negatives": negatives,
                "kept": kept_negatives,
                "idle_share": idle_share,
                "in_loss": sum(sum(map(bool, row.weights)) for row in rows),
                "parked": pool.parked() if pool else 0,
                "restarts": pool.restarts if pool else 0,
                "ages": dict(ages),
                "status": dict(Counter(t.status for t in trajectories)),
                "error": dict(Counter(t.error for t in trajectories if t.error)),
            }
            parts = gather_object([local])
            total = {
                key: sum(part[key] for part in parts)
                for key in local
                if key not in ("status", "error", "ages")
            }
            status, errors, ages = (
                sum((Counter(part[key]) for part in parts), Counter())
                for key in ("status", "error", "ages")
            )
            tokens = max(1, total["tokens"])
            metrics = {
                "step": done,
                "reward": total["reward"] / max(1, total["outcomes"]),
                "pass_rate": total["right"] / total["trajectories"],
                "turns": total["turns"] / total["trajectories"],
                "tokens": total["tokens"] / total["trajectories"],
                "entropy": total["surprise"] / tokens,
                "kept_negatives": total["kept"] / max(1, total["negatives"]),
                "stale_share": 1 - ages[0] / tokens,
                "staleness": {str(age): count / tokens for age, count in sorted(ages.items())},
                "trained_share": total["in_loss"] / tokens,
                "parked": total["parked"],
                "idle_share": total["idle_share"] / ranks,
                "restarts": total["restarts"],
                "learning_rate": optimizer.param_groups[0]["lr"],
                "rollout_s": rollout_s,
                "train_s": train_s,
                "tokens_per_s": total["tokens"] / rollout_s,
                "grad_norm": norm,
                "status": dict(status),
                "format_errors": dict(errors),
            }
            if is_main:
                with open(out / "metrics.jsonl", "a") as file:
                    file.write(json.dumps(metrics) + "\n")
                with open(out / "trajectories.jsonl", "a", encoding="utf-8") as file:
                    for t in (group.trajectories[0] for group in groups):
                        file.write(
                            json.dumps(
                                {
                                    "step": done,
                                    "id": t.task.id,
                                    "question": t.task.question,
                                    "truth": t.task.answer,
                                    "answer": t.answer,
                                    "status": t.status,
                                    "error": t.error,
                                    "turns": len(t.turns),
                                    "text": "\n\n".join(
                                        chat.decode(segment.ids) for segment in t.segments
                                    ),
                                }
                            )
                            + "\n"
                        )
                progress.set_postfix(
                    {
                        "pass": f"{metrics['pass_rate']:.2f}",
                        "turns": f"{metrics['turns']:.1f}",
                        "entropy": f"{metrics['entropy']:.2f}",
                        "s": f"{rollout_s:.1f}+{train_s:.1f}",
                    }
                )
            accelerator.log(
                {key: value for key, value in metrics.items() if isinstance(value, (int, float))},
                step=done,
            )
            if dev_tasks and done % args.eval_every == 0 and done < args.steps:
                evaluate_on("dev", dev_tasks, done)
            if done % args.save_every == 0 or done == args.steps:
                under_way = gather_object([pool.state() if pool else None])
                if is_main:
                    save(out, done, accelerator.unwrap_model(policy), optimizer, chat, under_way)
                    draw_curves(out)
        progress.close()
        if test_tasks:
            if dev_tasks:
                evaluate_on("dev", dev_tasks, done)
            after = evaluate_on("test", test_tasks, done)
            if is_main:
                draw_curves(out)
                print(format_table(after))
                start = f"{before['pass@1']:.1%} before, " if before else ""
                print(
                    f"held-out Pass@1: {start}{after['pass@1']:.1%} after {done} steps ({after['n']} test tasks, one sample each; "
                    f"for more: python evaluate.py --model {out}/checkpoint)"
                )
    except KeyboardInterrupt:
        for number in (
            signal.SIGINT,
            signal.SIGTERM,
        ):  # the launcher passes on a second one: let the save end
            signal.signal(number, signal.SIG_IGN)
        try:
            if (
                is_main and not changing and done > first_step and (ranks == 1 or not pool)
            ):  # other ranks' parked work cannot be asked for now
                save(
                    out,
                    done,
                    accelerator.unwrap_model(policy),
                    optimizer,
                    chat,
                    [pool.state(ask=False) if pool else None],
                )
        except OSError as error:
            print(f"train.py: the last steps could not be saved: {error}", file=sys.stderr)
        how = (
            f"go on with: accelerate launch train.py --resume {out}"
            if any((out / "state").glob("step-*.pt"))
            else "nothing to go on with was saved yet"
        )
        sys.exit(f"train.py: stopped after step {done}; {how}" if is_main else 130)
    except WorkerError as error:
        sys.exit(f"train.py: {error}; the last whole checkpoint is kept, go on with --resume {out}")
    except OSError as error:
        sys.exit(
            f"train.py: {error.strerror or error} ({error.filename or out}); the last whole checkpoint is kept, go on with --resume {out}"
        )
    finally:
        if pool:
            pool.close()
        # DDP must go before its process group: with the group's last reference, DDP's destructor would wait for gloo's threads with
        # the interpreter lock in hand, and one of them may want that lock to free the last collective's tensors (pytorch issue 56297).
        policy = None
        accelerator.free_memory()
        if args.log_with:
            accelerator.end_training()
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit("train.py: stopped before the first step")
