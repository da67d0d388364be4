"""What surrounds a training run: its folder (checkpoints, logs, curves), its processes and how it ends.

In: the learner's state, the flags of train.py. Out: files that appear whole or not at all, so that a run killed at any moment
goes on from the last whole one (`--resume`). Nothing here knows how the policy learns. To draw something else, change
`draw_curves`.
"""

import hashlib
import json
import math
import os
import shutil
import signal
import sys
import threading
from pathlib import Path

import psutil
import torch
from safetensors import SafetensorError

from context import Chat
from workers import die_with_parent, signals_later

END_S = 8.0  # after a signal the process is gone at the latest so many seconds later


def save_atomically(folder: Path, write) -> None:
    """`write(temporary folder)`, then put it in the place of `folder`: whoever reads sees the old one or the new one."""
    temporary, old = folder.with_name(folder.name + ".new"), folder.with_name(folder.name + ".old")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        write(temporary)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)  # a full disk gets its space back
        raise
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        os.replace(folder, old)
    os.replace(temporary, folder)
    shutil.rmtree(old, ignore_errors=True)


@signals_later()  # torch makes a RuntimeError of a Ctrl-C in the middle of its writing; so the write ends first
def save(out: Path, step: int, policy, optimizer, chat: Chat, rollouts: list) -> None:
    """Write state/ (for --resume) and checkpoint/ (for users); the last two states are kept, in case one is damaged.

    A state is one file whose name holds the start of its SHA-256: it appears whole, under its final name, or not at all.

    Args:
        rollouts: `Rollouts.state()` of each rank, None in sync mode.

    Raises:
        OSError: the disk is full, say; what was there before stays whole.
    """
    model, states, temporary = policy.model, out / "state", out / "state" / "saving"
    states.mkdir(exist_ok=True)
    try:
        torch.save(
            {
                "step": step,
                "model": model.state_dict(),
                "optimizer": optimizer.state_dict(),
                "rollouts": rollouts,
            },
            temporary,
        )
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, states / f"step-{step:06d}-{sha256(temporary)}.pt")
        save_atomically(
            out / "checkpoint",
            lambda folder: (model.save_pretrained(folder), chat.tokenizer.save_pretrained(folder)),
        )
    except (
        RuntimeError,
        SafetensorError,
    ) as error:  # what torch and safetensors make of a full disk
        free = shutil.disk_usage(out).free / 1e6
        raise OSError(
            f"cannot write a checkpoint: {'the disk is full' if free < 100 else str(error).splitlines()[0][:100]}"
        ) from None
    finally:
        temporary.unlink(missing_ok=True)
    for old in sorted(states.glob("step-*.pt"), key=lambda path: path.name[:11])[:-2]:
        old.unlink()


def sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:16]


def save_config(out: Path, config: dict) -> None:
    temporary = out / "config.json.new"
    temporary.write_text(json.dumps(config, indent=1))
    os.replace(temporary, out / "config.json")


def load_state(out: Path) -> dict:
    """The newest whole state of a run.

    Raises:
        FileNotFoundError: there is none.
    """
    for path in sorted((out / "state").glob("step-*.pt"), reverse=True):
        try:
            if path.stem != f"{path.stem[:11]}-{sha256(path)}":
                raise ValueError("checksum")
            return torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:
            print(
                f"{path} is damaged ({type(error).__name__}: {str(error)[:60]}): trying the one before",
                file=sys.stderr,
            )
    raise FileNotFoundError(f"--resume: no whole state in {out}/state; start anew with --out")


def share_of(states: list, rank: int, ranks: int) -> dict | None:
    """What this rank has to go on with of the `Rollouts.state()`s in a checkpoint, None if they hold nothing. With another number of
    ranks than before the groups are dealt out anew, and new tasks begin after the furthest one."""
    states = [state for state in states if state]
    if not states:
        return None
    if len(states) == ranks:
        return states[rank]
    groups = [group for state in states for group in state["groups"]]
    return {
        "next_number": -(-max(state["next_number"] for state in states) * len(states) // ranks),
        "groups": groups[rank::ranks],
    }


def cut_lines(path: Path, last_step: int) -> None:
    """Drop the lines of steps after `last_step` from a JSON-lines file: those steps will be done again."""
    if path.exists():
        lines = [
            line
            for line in path.read_text(encoding="utf-8").splitlines()
            if line.endswith("}") and json.loads(line)["step"] <= last_step
        ]
        temporary = path.with_name(path.name + ".new")
        temporary.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
        os.replace(temporary, path)


@signals_later()  # nor does matplotlib's import survive one
def draw_curves(out: Path) -> None:
    """curves.png from metrics.jsonl and evaluations.jsonl."""
    import matplotlib
    import matplotlib.ticker

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    metrics = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    held_out = (
        [json.loads(line) for line in (out / "evaluations.jsonl").read_text().splitlines()]
        if (out / "evaluations.jsonl").exists()
        else []
    )
    steps = [m["step"] for m in metrics]
    plt.rcParams.update({"font.size": 12, "axes.spines.top": False, "axes.spines.right": False})
    figure, axes = plt.subplots(2, 2, figsize=(11, 7), layout="constrained")
    axes[0, 0].plot(
        steps, [m["pass_rate"] for m in metrics], color="0.6", linewidth=1.5, label="training tasks"
    )
    for split, style in (("dev", "o-"), ("test", "s--")):
        points = [(e["step"], e["pass@1"], e["pass@1_ci"]) for e in held_out if e["split"] == split]
        if points:
            x, y, intervals = zip(*points)
            errors = [
                [v - low for v, (low, _) in zip(y, intervals)],
                [high - v for v, (_, high) in zip(y, intervals)],
            ]
            axes[0, 0].errorbar(
                x,
                y,
                yerr=errors,
                fmt=style,
                capsize=4,
                linewidth=2,
                color={"dev": "C0", "test": "C3"}[split],
                label=f"held-out {split} tasks, 95% interval",
            )
    axes[0, 0].set_title("Pass@1")
    axes[0, 0].set_ylim(0, 1)
    axes[0, 0].yaxis.set_major_formatter(matplotlib.ticker.PercentFormatter(1.0))
    axes[0, 0].legend(fontsize=10, frameon=False, loc="upper left")
    for axis, key, title in (
        (axes[0, 1], "turns", "turns a trajectory"),
        (axes[1, 0], "entropy", "entropy of the policy, nats a token"),
        (axes[1, 1], "reward", "mean reward"),
    ):
        axis.plot(
            steps, [m[key] for m in metrics], linewidth=2, marker="o" if len(steps) == 1 else None
        )
        axis.set_title(title)
    for axis in axes.flat:
        axis.set_xlabel("step")
        axis.xaxis.set_major_locator(matplotlib.ticker.MaxNLocator(integer=True))
        axis.grid(alpha=0.3)
    figure.savefig(out / "curves.png.new", dpi=100, format="png")
    os.replace(out / "curves.png.new", out / "curves.png")
    plt.close(figure)


def choose_folder(args) -> Path:
    """--resume's folder, --out, or the first free runs/run-N.

    Raises:
        ValueError: --out holds another run.
    """
    if args.resume:
        return Path(args.resume)
    if args.out:
        if (Path(args.out) / "metrics.jsonl").exists():
            raise ValueError(
                f"--out {args.out} holds a run: go on with it by --resume {args.out}, or choose another folder"
            )
        return Path(args.out)
    number = 1
    while (Path("runs") / f"run-{number}").exists():
        number += 1
    return Path("runs") / f"run-{number}"


def start_ranks() -> None:
    """`accelerate launch --num_processes N` starts N processes on GPUs, but a single one on a CPU without MPI. Then this
    process turns into torch's own launcher, which starts this script N times (gloo)."""
    if (
        "RANK" in os.environ
        or "PMI_RANK" in os.environ
        or "OMPI_COMM_WORLD_RANK" in os.environ
        or torch.cuda.is_available()
    ):
        return
    parent = psutil.Process().parent()
    words = (
        " ".join(parent.cmdline() if parent else [])
        .split(sys.argv[0])[0]
        .replace("num-processes", "num_processes")
        .replace("=", " ")
        .split()
    )
    count = words[words.index("--num_processes") + 1] if "--num_processes" in words[:-1] else "1"
    if count.isdigit() and int(count) > 1:
        sys.stdout.flush()
        os.execv(
            sys.executable,
            [
                sys.executable,
                "-m",
                "torch.distributed.run",
                "--standalone",
                f"--nproc_per_node={count}",
                *sys.argv,
            ],
        )


def cores_of(processes: int) -> int:
    """CPU cores for one of so many processes on this machine, or of what a container may use of it (cgroup's cpu.max)."""
    cores = (
        len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    )
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        cores = min(cores, math.ceil(int(quota) / int(period)))
    except (OSError, ValueError):  # no such file, or "max": no limit
        pass
    return max(1, cores // processes)


def use_threads(threads: int, processes: int) -> None:
    """All cores, shared by the processes of this machine: accelerate's launcher would leave it at one."""
    torch.set_num_threads(threads or cores_of(processes))


def end_on_signals() -> None:
    """Ctrl-C, SIGTERM and a closed terminal end the run once, in order, and in END_S seconds at the latest (once Python runs: not
    in the middle of a call into C)."""

    def stop(number, frame):
        for each in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(each, signal.SIG_IGN)
        last_resort = threading.Timer(
            END_S,
            lambda: (
                sys.stderr.write(
                    "train.py: stopped, in the middle of something that did not end\n"
                ),
                os._exit(1),
            ),
        )
        last_resort.daemon = True
        last_resort.start()
        raise KeyboardInterrupt

    for each in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if (
            each != signal.SIGHUP or signal.getsignal(each) != signal.SIG_IGN
        ):  # nohup: a closed terminal is to change nothing
            signal.signal(each, stop)
    # A launcher that is killed does not end what it has started: Linux then sends us SIGTERM.
    parent = psutil.Process().parent()
    if parent and {Path(word).name for word in parent.cmdline()} & {
        "accelerate",
        "accelerate.commands.launch",
        "torchrun",
        "torch.distributed.run",
    }:
        die_with_parent(parent.pid, signal.SIGTERM)
