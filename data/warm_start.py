r"""Warm start: supervised imitation of mostly clumsy explorers, so that RL has something to find.

A general model of this size has never seen our tools, and earns nothing with them, so all attempts
at a task earn the same and RL learns nothing. This command shows it the transcripts that made
`data/nano` (data/base/explorers.py), in its own tokens and chat template, with loss on the
explorer's own tokens. They come from worlds that no task of train, dev or test is set in. With
--read_tasks they come from readers of a user's own pages (data/base/readers.py). Most explorers
behave badly, and which behaviour pays is left to RL: this is not RL, and its Pass@1 is only a place
to start from. It ends where the model writes valid turns and is right now and then.

In: any causal language model with a chat template. Out: a folder for `train.py --model`.
To try an idea, change what `Explorer` does, or the goals of `main`.

    python data/warm_start.py --model SmolLM2-135M-Instruct.Q4_1.gguf --max_context 1536
    python train.py --model runs/warm --max_context 1536 --learning_rate 2e-5
"""

import os
import resource
import signal
import sqlite3
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # before torch, as in train.py
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch
from tqdm import tqdm
from transformers.hf_argparser import HfArg

from context import Chat, Segment
from data.base.explorers import Row as Transcript
from data.base.explorers import write_transcripts
from data.base.readers import write_readings
from data.pretrain import batches_of
from data.task import Task, load_tasks
from data.tasks import SHARES
from engine import in_bf16, keep_memory
from evaluate import open_policy, summarise
from rollout import AgentLoop, RolloutArgs, play
from support.batches import micro_batches
from support.checks import at_least, check_rollout_args
from support.evaluation import NO_TURN, make_trajectories
from support.flags import parse_flags
from support.run_folder import save_model
from support.toolbox import Toolbox
from train import DATA, Policy, Row, loss_of


@dataclass
class Args:
    model: str = HfArg(default="nano", help="nano, a checkpoint, a .gguf file or a hub name")
    out: str = HfArg(default="runs/warm", help="folder to write the model to; it must not exist")
    seed: int = HfArg(default=0, help="decides worlds, explorers, batches and what is sampled")
    transcripts: int = HfArg(default=4000, help="explorer transcripts to write")
    skilled_share: float = HfArg(default=0.30, help="share of explorers that behave sensibly")
    read_tasks: str = HfArg(default="", help="tasks about --corpus, to be shown instead of worlds")
    families: list[str] = HfArg(
        default_factory=list,
        metadata={"choices": sorted({family for family, _ in SHARES["pretrain"]})},
        help="families of the tasks, also of those on dev (default: all)",
    )
    steps: int = HfArg(default=600, help="optimizer steps, at most")
    batch_tokens: int = HfArg(default=8192, help="tokens in one optimizer step")
    micro_tokens: int = HfArg(default=4096, help="padded tokens in one forward and backward pass")
    learning_rate: float = HfArg(default=3e-4, help="of AdamW; models of billions: 1e-5")
    warmup: int = HfArg(default=20, help="steps of linear warm-up")
    dev_tasks: str = HfArg(default=str(DATA / "dev.jsonl"), help="played now and then")
    eval_tasks: int = HfArg(default=100, help="tasks of dev that are played, once each")
    eval_every: int = HfArg(default=50, help="steps between two of these; each saves the model")
    until_valid: float = HfArg(default=0.8, help="stop where so many turns are well formed and …")
    until_pass: float = HfArg(default=0.08, help="… Pass@1 on dev is so high (above 1: never)")


def check_args(args: Args, rollout_args: RolloutArgs) -> None:
    """Raise a ValueError, one line, for flags that cannot work."""
    check_rollout_args(rollout_args)
    at_least(args, 1, "transcripts", "steps", "batch_tokens", "micro_tokens", "warmup")
    at_least(args, 1, "eval_tasks", "eval_every")
    at_least(args, 0, "seed", "learning_rate", "skilled_share", "until_valid", "until_pass")
    if args.read_tasks and not rollout_args.corpus:
        raise ValueError("give --read_tasks a --corpus, which its tasks are about")
    if Path(args.out).exists():
        raise ValueError(f"--out {args.out} exists: choose another folder")


def read_transcripts(
    chat: Chat, args: Args, rollout_args: RolloutArgs, toolbox: Toolbox, to_read: list[Task]
) -> list[list[Transcript]]:
    """Batches of transcripts, without those that the policy could not sample.

    Args:
        to_read: tasks of readers; without any, explorers write the transcripts.

    Raises:
        OSError, ValueError: an index cannot be read, or nothing is left.
    """
    rows, most = [], rollout_args.max_new_tokens
    number, skilled_share = args.transcripts, args.skilled_share
    if to_read:
        tools = toolbox.index_of(to_read[0])
        written = write_readings(
            chat, args.seed, to_read, number, skilled_share, rollout_args, tools
        )
    else:
        where = (chat, args.seed, min(16, number), 300, number, skilled_share)
        written = write_transcripts(*where, rollout_args, args.families)
    for ids, is_own in written:
        edges = np.flatnonzero(np.diff(np.concatenate([[0], is_own, [0]])))  # of the turns
        if (edges[1::2] - edges[::2]).max() <= most:
            rows.append((ids, is_own))
    if len(rows) < len(written):
        print(f"{len(written) - len(rows)} have a turn above --max_new_tokens {most}: left out")
    if not rows:
        words = "0 transcripts fill no batch: all have a turn above --max_new_tokens"
        raise ValueError(f"{words} {most}, give more")
    return batches_of(rows, args.batch_tokens, np.random.default_rng(args.seed))


def learn(
    policy: Policy, optimizer, batch: list[Transcript], args: Args, precision: str = "auto"
) -> float:
    """One step on a batch: the loss of an update whose advantage is 1 on the explorer's tokens.

    Args:
        precision: as of `RolloutArgs`.

    Returns:
        Its mean over these tokens.
    """
    device = policy.model.device
    is_bf16 = in_bf16(precision, device.type == "cuda")
    rows = [
        Row(Segment(ids.tolist()), own.astype(float).tolist(), [False] * len(own))
        for ids, own in batch
    ]
    total, tokens = 0.0, sum(int(own.sum()) for _, own in batch)
    for part in micro_batches(rows, args.micro_tokens):
        with torch.autocast(device.type, torch.bfloat16, enabled=is_bf16):
            loss = loss_of(policy, part, device) / tokens
        loss.backward()
        total += loss.item()
    torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
    return total


def measure(loop: AgentLoop, tasks: list[Task], seed: int) -> tuple[float, float, str]:
    """Play each task once.

    Returns:
        Pass@1, the share of turns that are a valid call or answer, and both in words.

    Raises:
        ValueError: the window has no room for a turn.
    """
    trajectories = make_trajectories(tasks, 1, seed)
    with tqdm(desc="dev", total=len(tasks), mininterval=1, leave=False, disable=None) as bar:
        play(loop, trajectories, bar)
    result, turns = summarise(trajectories, {}, seed), sum(len(t.turns) for t in trajectories)
    if not turns:
        raise ValueError(NO_TURN)
    valid = 1 - sum(t.status == "format_error" for t in trajectories) / turns
    families = {name: f"{part['pass@1']:.0%}" for name, part in result["by_hops"].items()}
    words = f"Pass@1 {result['pass@1']:.1%} {families}, valid turns {valid:.1%}, "
    return result["pass@1"], valid, words + f"endings {result['status']}"


def memory_gb() -> float:
    """The most that was in use so far: of the GPU, or of this process where there is none."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 1e9
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


def train(policy: Policy, loop: AgentLoop, batches, tasks: list[Task], args: Args) -> Iterator[int]:
    """Learn until the goals are reached on dev, or --steps are done. Yields the steps done so far,
    before the next one and before a report.
    """
    optimizer = torch.optim.AdamW(
        policy.parameters(), args.learning_rate, betas=(0.9, 0.98), weight_decay=0.0
    )
    rng, queue, losses = np.random.default_rng(args.seed), [], []
    start, tokens = time.time(), 0
    for step in tqdm(range(args.steps + 1), desc="warm start", mininterval=1, disable=None):
        yield step
        if step % args.eval_every == 0 or step == args.steps:
            loop.engine.new_weights(step)
            passed, valid, words = measure(loop, tasks, args.seed)
            loss = f"loss {np.mean(losses):.3f}, " if losses else ""
            cost = f"{time.time() - start:.0f} s, {tokens:,} tokens, {memory_gb():.1f} GB"
            tqdm.write(f"step {step}: {loss}{words} | {cost}", file=sys.stdout)
            sys.stdout.flush()
            if (passed >= args.until_pass and valid >= args.until_valid) or step == args.steps:
                return
            losses = []
        for group in optimizer.param_groups:
            group["lr"] = args.learning_rate * min(1.0, (step + 1) / args.warmup)
        queue = queue or [batches[i] for i in rng.permutation(len(batches))]
        batch = queue.pop()
        losses.append(learn(policy, optimizer, batch, args, loop.args.precision))
        tokens += sum(len(ids) for ids, _ in batch)


def main():
    args, rollout_args = parse_flags((Args, RolloutArgs), __doc__)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # it ends as Ctrl-C does
    keep_memory()
    torch.manual_seed(args.seed)
    try:
        check_args(args, rollout_args)
        tasks = load_tasks(args.dev_tasks)
        tasks = [task for task in tasks if not args.families or task.family in args.families]
        if not tasks:
            raise ValueError(f"{args.dev_tasks} has no task of these families")
        to_read = load_tasks(args.read_tasks) if args.read_tasks else []
        toolbox = Toolbox(rollout_args)
        toolbox.prepare(tasks[: args.eval_tasks])
        model, chat, engine = open_policy(args.model, rollout_args)
        batches = read_transcripts(chat, args, rollout_args, toolbox, to_read)
    except (OSError, ValueError, sqlite3.Error) as error:
        sys.exit(f"data/warm_start.py: {error}")

    loop, done, end = AgentLoop(engine, chat, toolbox, rollout_args, lockstep=True), 0, "done"
    try:
        for done in train(Policy(model, 1.0), loop, batches, tasks[: args.eval_tasks], args):
            if done % args.eval_every == 0:
                save_model(Path(args.out), model, chat.tokenizer)
    except KeyboardInterrupt:
        end = "stopped"
    except (OSError, ValueError) as error:
        sys.exit(f"data/warm_start.py: {error}")
    if end == "stopped" or done % args.eval_every:  # else the last report has saved it
        save_model(Path(args.out), model, chat.tokenizer)
    print(f"{end} after {done} steps; go on with: python train.py --model {args.out}")


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit("data/warm_start.py: stopped before the first step")
