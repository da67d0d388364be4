"""The ladder of rollout modes on one heavy-tailed mix of tasks: sync, async, async+partial,
+overlap. Run by hand.

Each mode trains on the same trajectories, every one of them to its last turn, on the same cores.
They have 1 to 50 turns (log-normal, median 4) and a tool that sleeps (log-normal, median 50 ms, 1%
above 2 s); both are written in the task. Engine, decoding, worker processes, the update (forward,
backward, AdamW on every sampled token) and the hand-over of weights are the real ones. Only what
the policy writes is not read. The clock runs from the first trajectory to the last update; starting
processes is not counted, since a run does it once. Modes take turns in one process. Ratios are made
within a round, and their median is given.

In: flags. Out: a text table. With --json the figures, and beside them a timeline picture (a row a
slot).

    python tests/bench_rollout.py --quick --json out.json
"""

import json
import os
import statistics
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # before torch, as in train.py
ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(Path(__file__).resolve().parent)]

import matplotlib
import torch
from accelerate import Accelerator

matplotlib.use("Agg")

import matplotlib.pyplot as plt
from bench_engine import cost_of_turns
from bench_peer import PeerArgs, compare_with_trl
from matplotlib.patches import Patch
from scripted import ScriptedLoop, scripted_tasks, turns_of
from transformers.hf_argparser import HfArg
from transformers.utils import logging

from context import Chat, Trajectory
from engine import Engine, keep_memory, load_policy
from rollout import Group, RolloutArgs, SyncRollouts, new_group
from support.flags import parse_flags
from support.processes import cores_of
from tools import signatures
from train import Policy, TrainArgs, gradient, rows_of
from workers import AsyncArgs, AsyncRollouts, Setup

MODES = {
    "sync": AsyncArgs(),
    "async": AsyncArgs(),
    "async+partial": AsyncArgs(partial=True),
    "+overlap": AsyncArgs(partial=True, overlap=True),
}
COLOURS = {"decode": "#2a6fbb", "tool": "#f2b134", "idle": "#d0d0d0", "parked": "#b04a5a"}
COLUMNS = (  # of the table: title, width and format of a figure
    ("seconds", ">9.1f"),
    ("rollout_s", ">11.1f"),
    ("update_s", ">10.1f"),
    ("steps", ">7.0f"),
    ("idle_share", ">12.0%"),
    ("stale_share", ">13.0%"),
    ("tokens_per_s", ">14.0f"),
)


@dataclass
class BenchArgs:
    model: str = HfArg(default="nano", help="nano, a checkpoint, a .gguf file or a hub name")
    rounds: int = HfArg(default=3, help="runs of each mode")
    steps: int = HfArg(default=6, help="updates' worth of tasks")
    tasks_per_step: int = HfArg(default=8, help="groups of an update")
    samples: int = HfArg(default=8, help="trajectories of a group")
    slots: int = HfArg(default=64, help="trajectories in flight, over all workers")
    workers: int = HfArg(default=0, help="rollout processes (0: one a core)")
    new_tokens: int = HfArg(default=16, help="tokens of a turn at most")
    quick: bool = HfArg(
        default=False, help="two rounds of 4 updates of 4 groups of 4: a few minutes on two cores"
    )
    peer: Literal["none", "trl"] = HfArg(
        default="none", help="compare with TRL's GRPOTrainer too (pip install trl==1.16.0)"
    )
    seed: int = HfArg(default=0, help="decides turns, latencies and sampling")
    json: str = HfArg(default="", help="write the figures to this file")
    picture: str = HfArg(
        default="", help="timeline of the last round (default: beside --json, else none)"
    )


# ------------------------------------------------------------------------------------ one mode


def open_rollouts(mode: str, args: BenchArgs, model, chat: Chat, next_group):
    """Rollouts in this mode, with their workers ready to begin."""
    cores = cores_of(1)
    workers = args.workers or cores
    rollout_args = RolloutArgs(
        slots=args.slots if mode == "sync" else max(1, args.slots // workers),
        max_new_tokens=args.new_tokens,
        max_context=2048,
        max_turns=99,
        observation_tokens=16,
    )
    if mode == "sync":
        engine = Engine(model, chat, rollout_args)
        loop = ScriptedLoop(engine, chat, None, rollout_args, lockstep=True)
        return SyncRollouts(loop, next_group, args.tasks_per_step, 0)
    setup = Setup(args.model, rollout_args, threads=max(1, cores // workers), loop=ScriptedLoop)
    none_yet = lambda number, version: None
    pool = AsyncRollouts(model, setup, workers, none_yet, args.tasks_per_step, MODES[mode])
    while not all(worker.ready for worker in pool.workers):
        pool.pump(0.1)
    pool.next_group = next_group
    return pool


def run_mode(mode: str, args: BenchArgs, seed: int) -> dict:
    """Train on all tasks once in this mode.

    Returns:
        seconds; rollout_s and update_s of them; idle_share, of the engines' time while they were to
        generate; steps, that is updates; trajectories; tokens and tokens_per_s, sampled;
        stale_share of tokens; timeline, the moment when the clock started and the trajectories.
    """
    torch.set_num_threads(cores_of(1))
    tasks = scripted_tasks(args.steps * args.tasks_per_step, args.samples, seed)
    model, tokenizer = load_policy(args.model)
    accelerator, policy = Accelerator(cpu=True), Policy(model, 1.0)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=1e-6)

    def next_group(number: int, version: int) -> Group | None:
        if number < len(tasks):
            return new_group(tasks[number], number, args.samples, seed, version)

    rollouts = open_rollouts(mode, args, model, Chat(tokenizer, signatures()), next_group)
    trained: list[tuple[Trajectory, int]] = []  # and the version that was updated
    version, rollout_s, idle_s = 0, 0.0, 0.0
    began = time.perf_counter()
    try:
        while len(trained) < len(tasks) * args.samples:
            clock = time.perf_counter()
            groups = rollouts.collect(version)
            seconds = time.perf_counter() - clock
            rollout_s, idle_s = rollout_s + seconds, idle_s + rollouts.idle_share * seconds
            trajectories = [t for group in groups for t in group.trajectories]
            rows = []
            for number, t in enumerate(trajectories):
                advantage = 1.0 - 2.0 * (number % 2)
                rows += rows_of(t, [advantage] * len(t.turns), version, "keep")
            gradient(policy, accelerator, rows, 1e4, TrainArgs())
            optimizer.step()
            optimizer.zero_grad()
            trained += [(t, version) for t in trajectories]
            version += 1
            rollouts.publish(model, version)
        seconds = time.perf_counter() - began
    finally:
        rollouts.close()
    played = [t for t, _ in trained]
    assert len({t.key[2:4] for t in played}) == len(played), "a trajectory was trained twice"
    assert all(len(t.turns) == turns_of(t) for t in played)
    turns = [(len(turn.action_ids), turn.version < by) for t, by in trained for turn in t.turns]
    tokens = sum(count for count, _ in turns)
    return {
        "seconds": seconds,
        "rollout_s": rollout_s,
        "update_s": seconds - rollout_s,
        "idle_share": idle_s / rollout_s,
        "steps": version,
        "trajectories": len(played),
        "tokens": tokens,
        "tokens_per_s": tokens / seconds,
        "stale_share": sum(count for count, is_stale in turns if is_stale) / tokens,
        "timeline": (began, played),
    }


# ---------------------------------------------------------------------------------- the picture


def lanes(trajectories: list[Trajectory]) -> list[list[Trajectory]]:
    """Trajectories in rows, so that none of a row overlap in time: as a slot would play them, one
    after another.
    """
    rows: list[list[Trajectory]] = []
    ends: list[float] = []
    for t in sorted(trajectories, key=lambda t: t.turns[0].began):
        free = [k for k, end in enumerate(ends) if end <= t.turns[0].began]
        k = free[0] if free else len(rows)
        if not free:
            rows.append([])
            ends.append(0.0)
        rows[k].append(t)
        ends[k] = t.turns[-1].began + t.turns[-1].generate_s + t.turns[-1].tool_s
    return rows


def bars_of(trajectories: list[Trajectory], zero: float) -> dict[str, list[tuple[float, float]]]:
    """What a slot did when: (start, length) in seconds since `zero`."""
    bars = {name: [] for name in COLOURS}
    for t in trajectories:
        for turn, following in zip(t.turns, [*t.turns[1:], None]):
            decoded = turn.began + turn.generate_s
            bars["decode"].append((turn.began - zero, turn.generate_s))
            bars["tool"].append((decoded - zero, turn.tool_s))
            gap = following.began - decoded - turn.tool_s if following else 0.0
            if gap > 0 and following.version != turn.version:
                bars["parked"].append((decoded + turn.tool_s - zero, gap))
    return bars


def draw_timeline(runs: dict[str, dict], path: Path) -> None:
    """A panel a mode, a row a slot: what its trajectory did when. Grey: it had no trajectory, or
    one that waited to join the batch.
    """
    size = (12, 2.6 * len(runs))
    figure, axes = plt.subplots(len(runs), 1, figsize=size, sharex=True, layout="constrained")
    for axis, (mode, run) in zip(axes, runs.items()):
        zero, trajectories = run["timeline"]
        for row, played in enumerate(lanes(trajectories)):
            bars = bars_of(played, zero) | {"idle": [(0.0, run["seconds"])]}
            for name in ("idle", "tool", "parked", "decode"):
                axis.broken_barh(bars[name], (row, 0.9), color=COLOURS[name])
        idle = f"engines idle {run['idle_share']:.0%} of the rollout"
        axis.set_title(f"{mode}: {run['seconds']:.1f} s, {idle}", loc="left", fontsize=10)
        axis.set_ylabel("slot")
        axis.set_xlim(0, max(run["seconds"] for run in runs.values()))
    axes[-1].set_xlabel("seconds")
    handles = [Patch(color=colour, label=name) for name, colour in COLOURS.items()]
    axes[0].legend(handles=handles, ncol=4, loc="upper right", fontsize=8)
    figure.savefig(path, dpi=100)


# -------------------------------------------------------------------------------- the comparison


def run_all(args: BenchArgs) -> dict[str, list[dict]]:
    """The runs of each mode; modes take turns."""
    runs: dict[str, list[dict]] = {mode: [] for mode in MODES}
    for number in range(args.rounds):
        for mode in MODES:
            run = run_mode(mode, args, args.seed + number)
            runs[mode].append(run)
            line = f"round {number + 1} {mode:14s} {run['seconds']:7.1f} s"
            print(line, file=sys.stderr, flush=True)
    return runs


def ratios_of(runs: dict[str, list[dict]]) -> dict:
    """How many times as fast a mode is as another one, in each round and as a median."""
    result = {}
    for name, mode, other in (
        ("async_over_sync", "async", "sync"),
        ("partial_over_sync", "async+partial", "sync"),
        ("overlap_over_sync", "+overlap", "sync"),
        ("partial_over_async", "async+partial", "async"),
    ):
        ratios = [a["seconds"] / b["seconds"] for a, b in zip(runs[other], runs[mode])]
        result |= {name: statistics.median(ratios), f"{name}_runs": ratios}
    return result


def print_table(runs: dict[str, list[dict]], ratios: dict) -> None:
    first = runs["sync"][0]
    print(
        f"{first['trajectories']} trajectories of 1 to 50 turns, {first['tokens']} sampled tokens, "
        f"{cores_of(1)} cores, median of {len(runs['sync'])} rounds"
    )
    titles = "".join(f"{name:>{form[1:].split('.')[0]}}" for name, form in COLUMNS)
    print(f"{'mode':14s}{titles}{'over sync':>11s}  rounds")
    names = ("", "async_over_sync", "partial_over_sync", "overlap_over_sync")
    for (mode, of_mode), name in zip(runs.items(), names):
        medians = {key: statistics.median(run[key] for run in of_mode) for key, _ in COLUMNS}
        cells = "".join(f"{medians[key]:{form}}" for key, form in COLUMNS)
        rounds = " ".join(f"{ratio:.2f}" for ratio in ratios.get(f"{name}_runs", []))
        print(f"{mode:14s}{cells}{ratios.get(name, 1.0):10.2f}x  {rounds}")


def main():
    [args] = parse_flags((BenchArgs,), __doc__)
    keep_memory()
    logging.disable_progress_bar()  # of loading weights
    if args.quick:
        args.rounds, args.steps, args.tasks_per_step, args.samples, args.slots = 2, 4, 4, 4, 32
    runs = run_all(args)
    picture = args.picture or (args.json and Path(args.json).with_suffix(".png"))
    if picture:
        draw_timeline({mode: of_mode[-1] for mode, of_mode in runs.items()}, Path(picture))
    for run in (run for of_mode in runs.values() for run in of_mode):
        del run["timeline"]
    machine = {"cores": cores_of(1), "torch": torch.__version__, "load": os.getloadavg()[0]}
    result = {"settings": asdict(args) | machine, "runs": runs} | ratios_of(runs)
    print_table(runs, result)
    if picture:
        print(f"timeline: {picture}")
    turns = cost_of_turns(load_policy(args.model)[0], 50, 16, 1 if args.quick else 3)
    result |= {"turn50_over_turn2": turns["turn50_over_turn2"], "turns": turns}
    print(f"turn 50 over turn 2: {result['turn50_over_turn2']:.2f}")
    if args.peer == "trl":
        try:
            peer = compare_with_trl(PeerArgs(pairs=1 if args.quick else 3))
        except ImportError as error:
            sys.exit(f"bench_rollout.py: {error}")
        ratios = {key: value for key, value in peer.items() if key.startswith("trl_")}
        result |= ratios | {"trl_runs": peer["runs"]}
        words = ", ".join(f"{key} {value:.2f}" for key, value in ratios.items())
        print(f"TRL's seconds over ours: {words}")
    if args.json:
        Path(args.json).write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
