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
from dataclasses import asdict
from pathlib import Path
from typing import NoReturn

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object, set_seed
from tqdm import tqdm
from transformers.utils import logging

from engine import keep_memory
from evaluate import format_table, summarise
from rollout import EVALUATION, new_group, play
from support import endings, run_folder
from support.curves import draw_curves
from support.processes import (
    cores_of,
    end_ranks,
    end_with_the_launcher,
    start_ranks,
    wanted_ranks,
)
from workers import WorkerError

SKIPS = 3  # updates in a row without a finite gradient, before the run stops


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

    def __enter__(self):
        return self

    def begin(self) -> None:
        """Start the ranks, listen to signals, and read what an earlier run has left.

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
        on_gpu = torch.cuda.is_available()
        self.accelerator = Accelerator(
            cpu=not on_gpu,
            log_with=args.log_with or None,
            mixed_precision="bf16" if on_gpu else "no",
        )
        self.device, self.is_main = self.accelerator.device, self.accelerator.is_main_process
        self.rank, self.ranks = self.accelerator.process_index, self.accelerator.num_processes
        if args.resume:
            self.state = run_folder.load_state(Path(args.resume))
            self.done = self.saved = self.state["step"]
        set_seed(args.seed)

    def open_folder(self) -> None:
        """Make the run's folder, and cut from its logs the updates that an earlier run lost."""
        folder = [Path(self.args.resume) if self.args.resume else None]
        if self.is_main:
            folder = folder if folder[0] else [run_folder.choose_folder(self.args.out)]
            config = {key: value for part in self.parts for key, value in asdict(part).items()}
            run_folder.save_config(folder[0], config)
            for name in run_folder.LOGS:
                run_folder.cut_lines(folder[0] / name, self.done)
            if self.args.log_with:
                self.accelerator.init_trackers("nano-researcher", config=config)
        [self.out] = broadcast_object_list(folder)

    def bar(self, count: int, title: str) -> tqdm:
        """A progress bar over this rank's trajectories."""
        hidden = not self.is_main
        return tqdm(total=count, desc=title, unit="trajectory", leave=False, disable=hidden)

    def updates(self):
        """The numbers of the updates that are left, from 0, under a progress bar."""
        steps = range(self.done, self.args.steps)
        self.progress = tqdm(
            steps, "train", initial=self.done, total=self.args.steps, disable=not self.is_main
        )
        for update in self.progress:
            endings.check()
            self.began = True
            yield update
        self.progress.close()

    def check_gap(self, gap: float, largest: float) -> None:
        """Print the gap between trainer and sampler; on a CPU a larger one than rounding ends the
        run.
        """
        gap = max(gather_object([gap]))
        line = f"step {self.done + 1}: largest |trainer - sampler| log-prob {gap:.1e}"
        if self.is_main:
            print(line, flush=True)
        if gap > largest and self.device.type == "cpu":
            self.fail(
                f"trainer and sampler disagree by more than {largest:g}: "
                "the data would not be on-policy"
            )

    def fail(self, words: str) -> NoReturn:
        """End the run for a reason that all ranks see; rank 0 speaks for all."""
        sys.exit(f"train.py: {words}" if self.is_main else 1)

    def step(self, norm: float | None, update: int) -> None:
        """Take the optimizer's step, if the gradient is finite, and hand over the new weights."""
        optimizer = self.learner.optimizer
        if norm is not None:
            optimizer.step()
        optimizer.zero_grad()
        self.rollouts.publish(self.learner.model, update + 1)
        self.done = update + 1
        self.skipped = 0 if norm is not None else self.skipped + 1
        if norm is None and self.is_main:
            print(f"step {self.done}: the gradient is not finite; the step was skipped", flush=True)
        if self.skipped == SKIPS:
            self.fail(f"{SKIPS} steps in a row without a finite gradient: lower --learning_rate")

    def log(self, metrics: dict, groups: list) -> None:
        """Write an update's line, and a trajectory of each group as text."""
        if self.is_main:
            run_folder.append_line(self.out / "metrics.jsonl", {"step": self.done} | metrics)
            for group in groups:
                t = group.trajectories[0]
                texts = [self.learner.chat.decode(segment.ids) for segment in t.segments]
                record = {"step": self.done, "id": t.task.id, "question": t.task.question}
                record |= {"truth": t.task.answer, "answer": t.answer, "status": t.status}
                record |= {"error": t.error, "turns": len(t.turns), "text": "\n\n".join(texts)}
                run_folder.append_line(self.out / "trajectories.jsonl", record)
            self.progress.set_postfix_str(
                f"pass {metrics['pass_rate']:.2f}, turns {metrics['turns']:.1f}, "
                f"entropy {metrics['entropy']:.2f}, "
                f"{metrics['rollout_s']:.1f} s rollout, {metrics['train_s']:.1f} s update"
            )
        numbers = {key: v for key, v in metrics.items() if isinstance(v, (int, float))}
        self.accelerator.log(numbers, step=self.done)

    def evaluate(self, loop, split: str, tasks: list) -> dict | None:
        """Pass@1 on held-out tasks, one sample each; None if there are no tasks."""
        if not tasks:
            return None
        shares = range(self.rank, len(tasks), self.ranks)
        seed = self.args.seed
        groups = [new_group(tasks[n], n, 1, seed, stream=EVALUATION) for n in shares]
        trajectories = [t for group in groups for t in group.trajectories]
        with self.bar(len(trajectories), f"evaluate on {split}") as progress:
            played = gather_object(play(loop, trajectories, progress))
        settings = {"step": self.done, "split": split}
        result = summarise(played, settings, seed)
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
        if self.is_main:
            learner = self.learner
            model, tokenizer = learner.model, learner.chat.tokenizer
            run_folder.save(self.out, self.done, model, learner.optimizer, tokenizer, under_way)
            draw_curves(self.out)
        self.saved = self.done

    def report(self, before: dict | None, after: dict | None) -> None:
        """The last lines of a run."""
        if not (self.is_main and after):
            return
        draw_curves(self.out)
        print(format_table(after))
        start = f"{before['pass@1']:.1%} before, " if before else ""
        print(
            f"held-out Pass@1: {start}{after['pass@1']:.1%} after {self.done} steps "
            f"({after['n']} test tasks, one sample each; "
            f"for more: python evaluate.py --model {self.out}/checkpoint)"
        )

    # ------------------------------------------------------------------------------- the end

    def __exit__(self, kind, error, trace) -> None:
        words = self.why(error)
        try:
            if isinstance(words, str) and "stopped" in words:
                words += self.save_at_the_end()
        finally:
            self.close(trace)
        if words is not None:
            sys.exit(f"train.py: {words}" if words else 1)

    def why(self, error) -> str | None:
        """The line for the user, "" where another rank says it, None where there is no line."""
        is_main = self.accelerator is None or self.is_main
        told = endings.received or endings.losses
        # The end of another rank breaks what we wait for together with it.
        broken = isinstance(error, RuntimeError) and (told or "gloo" in str(error))
        if isinstance(error, endings.Stopped) or broken:
            if not is_main:
                return ""
            if not told:
                time.sleep(0.2)  # which rank it was is known a moment after the error
            since = endings.losses or ["since another process has ended"]
            return "stopped" if endings.received else f"stopped, {since[0]},"
        if isinstance(error, (ValueError, OSError, sqlite3.Error)) and not self.began:
            return str(error) if is_main else ""
        if isinstance(error, (WorkerError, OSError)):
            reason = str(error)
            if isinstance(error, OSError) and error.strerror:
                reason = f"{error.strerror} ({error.filename or self.out})"
            return f"{reason}; {self.how_to_go_on()}"
        return None

    def how_to_go_on(self) -> str:
        if self.out and any((self.out / "state").glob("step-*.pt")):
            return f"go on with: accelerate launch train.py --resume {self.out}"
        return "nothing to go on with was saved yet"

    def save_at_the_end(self) -> str:
        """Save what a stopped run has done; returns the rest of its last line.

        Parked work of other ranks cannot be asked for now. So with several ranks and workers the
        last checkpoint is what the run goes on from.
        """
        if not self.began:
            return " before the first step"
        problem = ""
        alone = self.ranks == 1 or self.rollouts.state(ask=False) is None
        if self.done > self.saved and alone:
            try:
                self.save(ask=False)
            except OSError as error:
                problem = f"; the last steps could not be saved: {error}"
        return f" after step {self.done}{problem}; {self.how_to_go_on()}"

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
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
        end_ranks()
