"""What surrounds the training loop: processes, folder, logs, held-out tests, and the end of a run.

`train.main` opens a `Run` in a `with` statement. Whatever ends the block, the run is saved where it
can be, every process ends, and the user reads one line.

In: flags and a learner. Out: runs/NAME/. Nothing here knows how the policy learns.
"""

import os
import sqlite3
import sys
import time
import traceback
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NoReturn

import torch
from accelerate import Accelerator
from accelerate.utils import ProjectConfiguration, broadcast_object_list, gather_object, set_seed
from tqdm import tqdm
from transformers.utils import logging

from context import Chat
from engine import WorkerError, in_bf16, keep_memory
from evaluate import format_table, summarise
from report import write_report
from rollout import AgentLoop, Group, SyncRollouts, new_group, play
from support import endings, run_folder
from support.batches import logprob_gaps
from support.curriculum import Curriculum
from support.curves import draw_curves
from support.evaluation import NO_TURN, make_trajectories
from support.processes import (
    cores_of,
    end_ranks,
    end_with_the_launcher,
    join_ranks,
    own_rank,
    start_ranks,
    wanted_ranks,
)
from support.run_folder import share_of
from support.shards import load_moments
from support.toolbox import Toolbox
from support.trajectory_log import is_written, to_lines, update_records
from support.user_code import UserCodeError, where_it_failed
from workers import AsyncRollouts, Setup

MAX_GAP = 1e-4  # between log-probs of trainer and sampler: rounding errors are below it
NO_GRADIENT = (
    "an update had no gradient, since the attempts at each task earned the same "
    "(docs/metrics.md, 'What trouble looks like')"
)
SKIPS = 3  # updates in a row without a finite gradient, before the run stops


@dataclass
class Learner:
    """The policy with what it needs to play and to learn."""

    model: torch.nn.Module  # the language model; `policy` holds the same weights
    policy: torch.nn.Module  # train.Policy, as Accelerate has wrapped it, or with shards in it
    optimizer: torch.optim.Optimizer
    chat: Chat
    loop: AgentLoop | None = None  # plays with the learner's own weights


class Run:
    """One training run.

    Args:
        args: `TrainArgs`.
        parts: all dataclass objects with flags; they go into config.json.
    """

    def __init__(self, args, parts: list):
        self.args, self.parts = args, parts
        self.out: Path | None = None
        self.state: dict | None = None  # of an earlier run
        self.learner = self.rollouts = self.accelerator = None
        self.done = self.saved = self.skipped = 0  # updates
        self.began = False  # the first update
        self.sharded = False  # the learner, by FSDP
        self.rank, self.ranks = own_rank(), 1
        self.is_main = self.rank == 0
        self.lock: int | None = None  # of the folder
        self.warned: set[str] = set()
        self.no_bars = None if self.is_main else True  # None: where no terminal is

    def __enter__(self):
        return self

    def begin(self) -> None:
        """Start the ranks, and read what an earlier run has left.

        Raises:
            ValueError, OSError: one line says what is wrong with a flag or a file.
        """
        args = self.args
        end_with_the_launcher()
        start_ranks(wanted_ranks(args.processes, args.tasks_per_step, args.model))
        keep_memory()
        logging.disable_progress_bar()  # of loading and saving weights
        self.local_ranks = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        torch.set_num_threads(args.threads or cores_of(self.local_ranks))
        if args.resume:
            self.state = run_folder.load_state(Path(args.resume))
            self.done = self.saved = self.state["step"]
        set_seed(args.seed)

    def open_tools(self, rollout_args, tasks: list) -> Toolbox:
        """The tools, with the worlds of these tasks open, and all ranks together. Rank 0 writes the
        worlds, on first use, while the others still import.
        """
        toolbox = Toolbox(rollout_args)
        if self.is_main:
            print(f"python tool: {toolbox.isolation()}")
            toolbox.prepare(tasks)
        join_ranks()
        on_gpu = torch.cuda.is_available()
        os.environ.setdefault("FSDP_AUTO_WRAP_POLICY", "TRANSFORMER_BASED_WRAP")  # by layers
        self.accelerator = Accelerator(
            cpu=not on_gpu,
            log_with=self.args.log_with or None,
            project_config=ProjectConfiguration(logging_dir="."),  # open_folder names the folder
            mixed_precision="bf16" if in_bf16(rollout_args.precision, on_gpu) else "no",
        )
        self.device, self.ranks = self.accelerator.device, self.accelerator.num_processes
        self.accelerator.wait_for_everyone()
        if not self.is_main:
            toolbox.prepare(tasks)
        return toolbox

    def prepare(self, policy, learning_rate: float, chat: Chat) -> Learner:
        """The learner, as an earlier run has left it, on its device, and wrapped by Accelerate."""
        model = policy.model
        if self.args.gradient_checkpointing:
            model.activation_checkpointing_enable({"use_reentrant": False})
        if self.state:
            model.load_state_dict(self.state["model"])
        optimizer = torch.optim.AdamW(
            policy.parameters(), lr=learning_rate, betas=(0.9, 0.99), weight_decay=0.0
        )
        self.sharded = self.accelerator.is_fsdp2
        if self.sharded:  # layer by layer, inside of `policy`
            plugin = self.accelerator.state.fsdp_plugin
            if dtypes := plugin.mixed_precision_policy:  # sums are in float32, as DDP's
                in_float32 = replace(dtypes, reduce_dtype=torch.float32)
                plugin.mixed_precision_policy = in_float32
            model, optimizer = self.accelerator.prepare(model, optimizer)
        else:
            policy, optimizer = self.accelerator.prepare(policy, optimizer)
        if self.state:
            load_moments(optimizer, self.state["optimizer"])
        self.learner = Learner(model, policy, optimizer, chat)
        return self.learner

    def open_rollouts(self, tasks: list, async_args):
        """This rank's source of groups: its share of the tasks of each update, played here (sync)
        or in rollout processes (async).
        """
        args, learner = self.args, self.learner
        self.warn(
            args.samples == 1, "--samples 1: one attempt at a task has nothing to compare with"
        )
        self.warn(
            len(tasks) < args.tasks_per_step,
            f"{len(tasks)} training tasks are fewer than --tasks_per_step {args.tasks_per_step}: "
            "an update plays some of them more than once",
        )
        enough = len(range(self.rank, args.tasks_per_step, self.ranks))  # of this rank, an update
        known = (self.state or {}).get("curriculum")
        self.curriculum = Curriculum(tasks, args.seed, args.curriculum == "on", known)

        def next_group(number: int, version: int) -> Group:
            update, k = divmod(number, enough)
            position = update * args.tasks_per_step + self.rank + k * self.ranks
            task = self.curriculum.task_at(position)
            return new_group(task, position, args.samples, args.seed, version)

        first = self.done * enough
        if args.rollout == "sync":
            self.rollouts = SyncRollouts(learner.loop, next_group, enough, first)
            return self.rollouts
        on_cpu = self.device.type == "cpu"
        workers = async_args.workers or (cores_of(self.local_ranks) if on_cpu else 1)
        threads = args.threads or (cores_of(self.local_ranks * workers) if on_cpu else 1)
        setup = Setup(args.model, learner.loop.args, str(self.device), threads)
        under_way = self.state["rollouts"] if self.state else []
        state = share_of(under_way, self.rank, self.ranks, args.tasks_per_step)
        state = state or {"next_number": first, "groups": []}
        model, engine = learner.model, learner.loop.engine
        self.rollouts = AsyncRollouts(
            model, setup, workers, next_group, enough, async_args, self.done, state, engine
        )
        return self.rollouts

    def open_folder(self) -> None:
        """Make the run's folder, and cut from its logs the updates that an earlier run lost."""
        folder = [Path(self.args.resume) if self.args.resume else None]
        if self.is_main:
            folder = folder if folder[0] else [run_folder.choose_folder(self.args.out)]
            self.lock = run_folder.lock(folder[0])
            run_folder.save_config(folder[0], self.parts)
            done = self.done if self.args.resume else -1  # a new run keeps no line at all
            for name in run_folder.LOGS:
                run_folder.cut_lines(folder[0] / name, done)
            if self.args.log_with:
                self.open_tracker(folder[0])
        [self.out] = broadcast_object_list(folder)

    def open_tracker(self, folder: Path) -> None:
        """Tell the tracker of --log_with the run's flags; its files go into the run's folder.

        Raises:
            ValueError: it cannot be started; one line.
        """
        self.accelerator.project_configuration.logging_dir = str(folder)
        config = run_folder.flags_of(self.parts)
        try:
            self.accelerator.init_trackers(
                "nano-researcher", config, {"wandb": {"dir": str(folder)}}
            )
        except Exception as error:  # each tracker has its own: no key, no server
            words = where_it_failed(error)
            raise ValueError(f"--log_with {self.args.log_with} does not start: {words}") from None

    def warn(self, holds: bool, words: str) -> None:
        """Print a warning if it holds, once a run."""
        if holds and self.is_main and words not in self.warned:
            self.warned.add(words)
            tqdm.write(f"warning: {words}", file=sys.stderr)

    def bar(self, count: int, title: str) -> tqdm:
        """A progress bar over this rank's trajectories."""
        return tqdm(total=count, desc=title, unit="trajectory", leave=False, disable=self.no_bars)

    def updates(self):
        """The numbers of the updates that are left, from 0, under a progress bar."""
        steps = range(self.done, self.args.steps)
        total = self.args.steps
        for update in tqdm(steps, "train", initial=self.done, total=total, disable=self.no_bars):
            endings.check()
            self.began = True
            yield update

    def check_logprobs(self, rows: list) -> None:
        """Print the largest and the mean difference between trainer and sampler. In float32 one
        above MAX_GAP ends the run: the data would not be on-policy. (In bfloat16 rounding
        alone is above it; `--stale all-is` weighs each token by its ratio.)

        Args:
            rows: of trajectories that the present weights sampled.
        """
        policy = self.accelerator.unwrap_model(self.learner.policy)
        gaps = gather_object(logprob_gaps(policy, rows, self.args.micro_tokens, self.device))
        gap, mean = max(gaps, default=0.0), sum(gaps) / max(1, len(gaps))
        if self.is_main:
            words = f"largest |trainer - sampler| log-prob {gap:.1e}, mean {mean:.1e}"
            print(f"step {self.done + 1}: {words}", flush=True)
        is_near = all(gap <= MAX_GAP for gap in gaps)  # a gap may be nan
        if not is_near and self.accelerator.mixed_precision == "no":
            self.fail(f"trainer and sampler disagree by more than {MAX_GAP:g}")

    def fail(self, words: str) -> NoReturn:
        """End the run for a reason that all ranks see; rank 0 speaks for all."""
        sys.exit(f"train.py: {words}" if self.is_main else 1)

    def step(self, norm: float | None, update: int) -> None:
        """Take the optimizer's step, if the gradient is finite, and hand over the new weights."""
        optimizer = self.learner.optimizer
        if norm is not None:
            optimizer.step()
        optimizer.zero_grad()
        self.done = update + 1  # a stop while a server gets the weights loses no update
        self.rollouts.publish(self.learner.model, self.done)
        self.skipped = 0 if norm is not None else self.skipped + 1
        if norm is None and self.is_main:
            print(f"step {self.done}: the gradient is not finite; the step was skipped", flush=True)
        if self.skipped == SKIPS:
            self.fail(f"{SKIPS} steps in a row without a finite gradient: lower --learning_rate")

    def log(self, metrics: dict, groups: list[Group], rows: list, *scores: list) -> None:
        """Write an update's line, and the trajectories of all ranks.

        Args:
            rows: what the loss saw of them.
            scores: for each group the Reward, whether it was kept, and the advantages of each
                trajectory, without those that the environment failed.
        """
        args, lines = self.args, []
        if is_written(self.done, args.steps, args.keep_trajectories):
            records = update_records(self.done, groups, rows, *scores, self.learner.chat)
            lines = gather_object(to_lines(records))
        memory = ""
        if torch.cuda.is_available():
            metrics["peak_gib"] = torch.cuda.max_memory_allocated() / 2**30
            memory = f", {metrics['peak_gib']:.1f} GiB"
        if self.is_main:
            run_folder.append_line(self.out / "metrics.jsonl", {"step": self.done} | metrics)
            run_folder.append(self.out / "trajectories.jsonl", lines)
            tqdm.write(
                f"update {self.done}: Pass@1 {metrics['pass_rate']:.1%}, "
                f"reward {metrics['reward']:.2f}, {metrics['turns']:.1f} turns, "
                f"entropy {metrics['entropy']:.2f}, rollout {metrics['rollout_s']:.1f} s, "
                f"update {metrics['train_s']:.1f} s{memory}"
            )
            sys.stdout.flush()  # into a log, too
            if self.done == 1 and args.rollout == "sync":  # workers would have to wait
                draw_curves(self.out)
        self.warn(not metrics["turns"], NO_TURN)
        self.warn(metrics["turns"] and metrics["grad_norm"] == 0, NO_GRADIENT)
        numbers = {key: v for key, v in metrics.items() if isinstance(v, (int, float))}
        self.accelerator.log(numbers, step=self.done)

    def evaluate(self, split: str, tasks: list) -> dict | None:
        """Pass@1 on held-out tasks, one sample each; None if there are no tasks."""
        if not tasks:
            return None
        trajectories = make_trajectories(tasks, 1, self.args.seed)[self.rank :: self.ranks]
        with self.bar(len(trajectories), f"evaluate on {split}") as progress:
            played = gather_object(play(self.learner.loop, trajectories, progress))
        settings = {"step": self.done, "split": split}
        result = summarise(played, settings, self.args.seed)
        if self.is_main:
            run_folder.append_line(self.out / "evaluations.jsonl", settings | result)
            self.accelerator.log({f"{split}/pass@1": result["pass@1"]}, step=self.done)
        return result

    def save(self, ask: bool = True) -> None:
        """Write a checkpoint and the curves.

        Args:
            ask: whether workers and other ranks are asked for what they have under way. At a sudden
                end they are not: what this rank knows is saved.
        """
        under_way = [self.rollouts.state(ask)]
        if ask:
            under_way = gather_object(under_way)
        learner = self.learner
        model, tokenizer = learner.model, learner.chat.tokenizer
        more = {"rollouts": under_way, "curriculum": self.curriculum.state()}
        run_folder.save(self.out, self.done, model, learner.optimizer, tokenizer, more)
        if self.is_main:
            draw_curves(self.out)
        self.saved = self.done

    def report(self, before: dict | None, after: dict | None) -> None:
        """The page of the run, and its last lines."""
        if not self.is_main:
            return
        draw_curves(self.out)
        try:
            write_report([self.out], self.out / "report.html")
            print(f"curves and every trajectory: {self.out}/report.html")
        except Exception as error:  # logs of an earlier run, or a full disk; the figures come first
            print(f"no report.html: {type(error).__name__}: {error}", file=sys.stderr)
        more = f"python evaluate.py --model {self.out}/checkpoint"
        if not after:
            print(f"{self.done} steps are done; the held-out Pass@1 was not measured: {more}")
            return
        print(format_table(after))
        start = f"{before['pass@1']:.1%} before, " if before else ""
        print(
            f"held-out Pass@1: {start}{after['pass@1']:.1%} after {self.done} steps "
            f"({after['n']} test tasks, one sample each; for more: {more})"
        )

    # ------------------------------------------------------------------------------- the end

    def __exit__(self, kind, error, trace) -> None:
        try:
            if self.was_stopped(error):
                words = self.save_at_the_end(broken=isinstance(error, RuntimeError))
            else:
                words = self.why(error)
        finally:
            self.close(trace)
        if words is not None:
            sys.exit(f"train.py: {words}" if words else 1)

    def was_stopped(self, error) -> bool:
        """Whether the user, or the end of another rank, has ended the run. The end of another rank
        breaks what we wait for together with it.
        """
        broken = isinstance(error, RuntimeError) and not isinstance(error, WorkerError)
        told = endings.received or endings.losses or "gloo" in str(error)
        return isinstance(error, endings.Stopped) or bool(broken and told)

    def why(self, error) -> str | None:
        """The line for the user, "" where another rank says it, None where there is no line."""
        if isinstance(error, UserCodeError):
            return f"{error}; {self.how_to_go_on()}" if self.done else str(error)
        if isinstance(error, (ValueError, OSError, sqlite3.Error)) and not self.began:
            return str(error) if self.is_main else ""
        if isinstance(error, (WorkerError, OSError)):
            reason = str(error)
            if isinstance(error, OSError) and error.strerror:
                reason = f"{error.strerror} ({error.filename or self.out})"
            return f"{reason}; {self.how_to_go_on()}"
        return None

    def how_to_go_on(self) -> str:
        if self.out and any((self.out / "state").glob("step-*.pt")):
            again = run_folder.to_give_again(run_folder.flags_of(self.parts), self.parts)
            return f"go on with: accelerate launch train.py --resume {self.out} {again}".rstrip()
        return "nothing to go on with was saved yet"

    def save_at_the_end(self, broken: bool) -> str:
        """Save what a stopped run has done; returns its last line, which rank 0 speaks for all.

        Parked work and shards of other ranks cannot be asked for now. So with several ranks and
        workers, or a sharded learner, the last checkpoint is what the run goes on from.

        Args:
            broken: another rank has ended in the middle of what we did together.
        """
        if not self.is_main:
            return ""
        since = ""
        if broken and not endings.received:
            time.sleep(0.2)  # which rank has ended is known a moment after the error
            since = ", since another process has ended,"
        if endings.losses:
            since = f", {endings.losses[0]},"
        if not self.began and not (self.done and self.rollouts):
            return f"stopped{since} before the first step"
        problem = ""
        whole = self.ranks == 1 or self.rollouts.state(ask=False) is None
        if self.done > self.saved and whole and not self.sharded:
            try:
                self.save(ask=False)
            except OSError as error:
                problem = f"; the last steps could not be saved: {error}"
        return f"stopped{since} after step {self.done}{problem}; {self.how_to_go_on()}"

    def close(self, trace) -> None:
        """End workers and ranks.

        DDP must go before its process group. With the group's last reference, DDP's destructor
        would wait for gloo's threads with the interpreter lock in hand, and one of them may want
        that lock (pytorch issue 56297).
        """
        if self.rollouts:
            self.rollouts.close()
        if trace:
            traceback.clear_frames(trace)  # they hold references to the policy
        if self.learner:
            self.learner.policy = None
        if self.accelerator:
            self.accelerator.free_memory()
            if self.args.log_with:
                self.accelerator.end_training()
        if self.lock is not None:
            os.close(self.lock)
        joined = torch.distributed.is_initialized()
        if joined:
            torch.distributed.destroy_process_group()
        end_ranks(joined)
