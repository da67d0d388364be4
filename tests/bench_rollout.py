"""The ladder of rollout modes on one heavy-tailed mix of tasks: sync, async, async+partial, +overlap. Run by hand.

Each mode trains on the same trajectories, every one of them to its last turn, on the same cores: 1 to 50 turns (log-normal,
median 4), a tool that sleeps (log-normal, median 50 ms, 1% above 2 s), both written in the task. Engine, decoding, worker
processes, the update (forward, backward, AdamW on every sampled token) and the hand-over of weights are the real ones; only
what the policy writes is not read. The clock runs from the first trajectory to the last update; starting processes is not
counted, since a run does it once. Modes take turns in one process; ratios are made within a round, and their median is given.

In: flags. Out: a text table, a timeline picture (a row a slot), and with --json the figures.

    python tests/bench_rollout.py --quick --json out.json
"""

import json
import os
import statistics
import sys
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path

os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # before torch, as in train.py
ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(Path(__file__).resolve().parent)]

import torch
from accelerate import Accelerator
from scripted import ScriptedToolbox, scripted_tasks, scripted_turn, turns_of

from context import Chat, Trajectory
from engine import keep_memory, load_policy
from rollout import RolloutArgs, engine_for, rollout
from support.flags import parse_flags
from support.run_folder import cores_of
from tools import signatures
from train import Policy, TrainArgs, gradient, rows_of
from workers import Group, Rollouts, Setup, make_group

MODES = {
    "sync": {},
    "async": {},
    "async+partial": {"partial": True},
    "+overlap": {"partial": True, "overlap": True},
}
COLOURS = {"decode": "#2a6fbb", "tool": "#f2b134", "idle": "#d0d0d0", "parked": "#b04a5a"}


@dataclass
class BenchArgs:
    model: str = field(
        default="nano", metadata={"help": "nano, a checkpoint folder, a .gguf file or a hub name"}
    )
    rounds: int = field(default=3, metadata={"help": "runs of each mode"})
    steps: int = field(default=6, metadata={"help": "steps' worth of tasks"})
    tasks_per_step: int = field(default=8, metadata={"help": "groups in a step"})
    samples: int = field(default=8, metadata={"help": "trajectories of a group"})
    slots: int = field(default=64, metadata={"help": "trajectories in flight, over all workers"})
    workers: int = field(default=0, metadata={"help": "rollout processes (0: one a core)"})
    new_tokens: int = field(default=16, metadata={"help": "tokens of a turn at most"})
    quick: bool = field(
        default=False,
        metadata={
            "help": "two rounds of 4 steps of 4 groups of 4: within five minutes on two quiet cores"
        },
    )
    peer: str = field(
        default="",
        metadata={"help": "trl: compare with TRL's GRPOTrainer too (pip install trl==1.16.0)"},
    )
    seed: int = field(default=0, metadata={"help": "decides turns, latencies and sampling"})
    json: str = field(default="", metadata={"help": "write the figures to this file"})
    picture: str = field(
        default="timeline.png",
        metadata={"help": "write the timeline of the last round to this file"},
    )


def run_mode(mode: str, args: BenchArgs, seed: int) -> dict:
    """Train on all tasks once in this mode.

    Returns:
        seconds, rollout_s, update_s, idle_share (of the engines' time while they were to generate), steps, tokens, stale_share,
        and the trajectories with the moment the clock started.
    """
    tasks = scripted_tasks(args.steps * args.tasks_per_step, args.samples, seed)
    cores = cores_of(1)
    torch.set_num_threads(cores)
    model, tokenizer = load_policy(args.model)
    chat = Chat(tokenizer, signatures())
    accelerator = Accelerator(cpu=True)
    policy = Policy(model, 1.0)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=1e-6)
    train_args = TrainArgs()
    workers = args.workers or cores
    rollout_args = RolloutArgs(
        slots=args.slots if mode == "sync" else max(1, args.slots // workers),
        max_new_tokens=args.new_tokens,
        max_context=2048,
        max_turns=99,
        observation_tokens=16,
    )

    def next_group(n: int, version: int) -> Group | None:
        return make_group(tasks[n], n, version, args.samples, seed) if n < len(tasks) else None

    if mode == "sync":
        engine = engine_for(model, chat, rollout_args)
        started_groups = 0
    else:
        setup = Setup(
            args.model,
            rollout_args,
            threads=max(1, cores // workers),
            toolbox=ScriptedToolbox,
            act=scripted_turn,
        )
        none_yet = Rollouts(
            model, setup, workers, lambda n, version: None, args.tasks_per_step, **MODES[mode]
        )
        while not all(worker.ready for worker in none_yet.workers):
            none_yet.pump(0.1)
        pool, pool.next_group = none_yet, next_group

    trained, version, rollout_s, update_s, idle_s = [], 0, 0.0, 0.0, 0.0
    began = time.perf_counter()
    try:
        while len(trained) < len(tasks) * args.samples:
            clock = time.perf_counter()
            if mode == "sync":
                groups = [
                    next_group(started_groups + n, version) for n in range(args.tasks_per_step)
                ]
                started_groups += len(groups)
                idle_before = engine.stats["idle_s"]
                rollout(
                    engine,
                    chat,
                    [t for group in groups for t in group.trajectories],
                    ScriptedToolbox(),
                    rollout_args,
                    act=scripted_turn,
                )
                idle_s += engine.stats["idle_s"] - idle_before
            else:
                groups = pool.collect(version)
                idle_s += pool.idle_share * (time.perf_counter() - clock)
            rollout_s += time.perf_counter() - clock
            clock = time.perf_counter()
            trajectories = [t for group in groups for t in group.trajectories]
            rows = [
                row
                for k, t in enumerate(trajectories)
                for row in rows_of(t, [1.0 - 2.0 * (k % 2)] * len(t.turns), version, "keep")
            ]
            gradient(policy, accelerator, rows, 1e4, train_args)
            optimizer.step()
            optimizer.zero_grad()
            version += 1
            if mode == "sync":
                engine.new_weights(version)
            else:
                pool.publish(model, version)
            for t in trajectories:
                t.memory["trained_by"] = version - 1
            trained += trajectories
            update_s += time.perf_counter() - clock
        seconds = time.perf_counter() - began
    finally:
        if mode != "sync":
            pool.close()
    assert len({t.key[2:4] for t in trained}) == len(trained) and all(
        len(t.turns) == turns_of(t) for t in trained
    )
    turns = [(turn, t.memory["trained_by"]) for t in trained for turn in t.turns]
    tokens = sum(len(turn.action_ids) for turn, _ in turns)
    return {
        "seconds": seconds,
        "rollout_s": rollout_s,
        "update_s": update_s,
        "idle_share": idle_s / rollout_s,
        "steps": version,
        "trajectories": len(trained),
        "tokens": tokens,
        "stale_share": sum(len(turn.action_ids) for turn, by in turns if turn.version < by)
        / tokens,
        "timeline": (began, trained),
    }


def lanes(trajectories: list[Trajectory]) -> list[list[Trajectory]]:
    """Trajectories in rows, so that none of a row overlap in time: as a slot would play them, one after another."""
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


def draw_timeline(runs: dict[str, dict], path: str) -> None:
    """A panel a mode, a row a slot: what its trajectory did when. Grey: no trajectory, or one that waits to join the batch."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.patches import Patch

    longest = max(run["seconds"] for run in runs.values())
    figure, axes = plt.subplots(
        len(runs), 1, figsize=(12, 2.6 * len(runs)), sharex=True, layout="constrained"
    )
    for axis, (mode, run) in zip(axes, runs.items()):
        zero, trajectories = run["timeline"]
        for row, played in enumerate(lanes(trajectories)):
            bars = {name: [] for name in COLOURS}
            bars["idle"].append((0.0, run["seconds"]))
            for t in played:
                for turn, following in zip(t.turns, t.turns[1:] + [None]):
                    decoded = turn.began + turn.generate_s
                    bars["decode"].append((turn.began - zero, turn.generate_s))
                    bars["tool"].append((decoded - zero, turn.tool_s))
                    gap = following.began - decoded - turn.tool_s if following else 0.0
                    if gap > 0 and following.version != turn.version:
                        bars["parked"].append((decoded + turn.tool_s - zero, gap))
            for name in ("idle", "tool", "parked", "decode"):
                axis.broken_barh(bars[name], (row, 0.9), color=COLOURS[name])
        axis.set_title(
            f"{mode}: {run['seconds']:.1f} s, engines idle {run['idle_share']:.0%} of the rollout",
            loc="left",
            fontsize=10,
        )
        axis.set_ylabel("slot")
        axis.set_xlim(0, longest)
    axes[-1].set_xlabel("seconds")
    axes[0].legend(
        handles=[Patch(color=colour, label=name) for name, colour in COLOURS.items()],
        ncol=4,
        loc="upper right",
        fontsize=8,
    )
    figure.savefig(path, dpi=100)


def main():
    [args] = parse_flags((BenchArgs,), __doc__)
    keep_memory()
    if args.quick:
        args.rounds, args.steps, args.tasks_per_step, args.samples, args.slots = 2, 4, 4, 4, 32
    runs: dict[str, list[dict]] = {mode: [] for mode in MODES}
    for number in range(args.rounds):
        for mode in MODES:
            runs[mode].append(run := run_mode(mode, args, args.seed + number))
            print(
                f"round {number + 1} {mode:14s} {run['seconds']:7.1f} s",
                file=sys.stderr,
                flush=True,
            )
    draw_timeline({mode: of_mode[-1] for mode, of_mode in runs.items()}, args.picture)
    for of_mode in runs.values():
        for run in of_mode:
            del run["timeline"]

    def median(mode: str, key: str) -> float:
        return statistics.median(run[key] for run in runs[mode])

    result = {
        "settings": asdict(args)
        | {"cores": cores_of(1), "torch": torch.__version__, "load": os.getloadavg()[0]},
        "runs": runs,
    }
    for name, mode in (("async", "async"), ("partial", "async+partial"), ("overlap", "+overlap")):
        ratios = [a["seconds"] / b["seconds"] for a, b in zip(runs["sync"], runs[mode])]
        result |= {f"{name}_over_sync": statistics.median(ratios), f"{name}_over_sync_runs": ratios}
    ratios = [a["seconds"] / b["seconds"] for a, b in zip(runs["async"], runs["async+partial"])]
    result |= {"partial_over_async": statistics.median(ratios), "partial_over_async_runs": ratios}

    print(
        f"{runs['sync'][0]['trajectories']} trajectories of 1 to 50 turns, {runs['sync'][0]['tokens']} sampled tokens, {cores_of(1)} cores, median of {args.rounds} rounds"
    )
    print(
        f"{'mode':14s}{'seconds':>9s}{'rollout':>9s}{'update':>9s}{'steps':>7s}{'idle':>7s}{'stale':>7s}{'tokens/s':>10s}{'over sync':>11s}  runs"
    )
    for mode, key in zip(MODES, ("", "async", "partial", "overlap")):
        ratio, each = (
            (result[f"{key}_over_sync"], result[f"{key}_over_sync_runs"]) if key else (1.0, [])
        )
        print(
            f"{mode:14s}{median(mode, 'seconds'):9.1f}{median(mode, 'rollout_s'):9.1f}{median(mode, 'update_s'):9.1f}{median(mode, 'steps'):7.0f}"
            f"{median(mode, 'idle_share'):7.0%}{median(mode, 'stale_share'):7.0%}{median(mode, 'tokens') / median(mode, 'seconds'):10.0f}"
            f"{ratio:10.2f}x  {' '.join(f'{r:.2f}' for r in each)}"
        )
    print(f"timeline: {args.picture}")
    try:
        from bench_engine import cost_of_turns

        result["turn50_over_turn2"] = (
            turns := cost_of_turns(load_policy(args.model)[0], 50, 16, 1 if args.quick else 3)
        )["turn50_over_turn2"]
        result["turns"] = turns
        print(f"turn 50 over turn 2: {result['turn50_over_turn2']:.2f}")
    except ImportError as error:
        print(f"turn 50 over turn 2: not measured ({error})")
    if args.peer == "trl":
        try:
            from bench_peer import compare_with_trl

            peer = compare_with_trl(pairs=1 if args.quick else 3)
            result |= {key: value for key, value in peer.items() if key.startswith("trl_")} | {
                "trl_runs": peer["runs"]
            }
            print(
                "TRL's seconds over ours: "
                + ", ".join(
                    f"{key} {value:.2f}" for key, value in peer.items() if key.startswith("trl_")
                )
            )
        except ImportError as error:
            print(f"TRL: not compared ({error})")
    elif args.peer:
        sys.exit(f"bench_rollout.py: --peer {args.peer}: only trl is known")
    if args.json:
        Path(args.json).write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
