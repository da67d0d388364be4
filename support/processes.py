"""Processes of one training run on this machine: how many, who starts them, which share each has.

On CPUs a run has one process (rank) a core, each with one thread: an update is then 1.3 to 1.9
times as fast as with one process of all threads (docs/results.md). The process that the user
started is rank 0. It starts the others itself. On GPUs, under torchrun or under MPI, the launcher
has started all ranks.

In: `--processes`. Out: the environment that Accelerate reads, and a process group on loopback.
"""

import math
import os
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path

import psutil
import torch
from accelerate.utils import gather_object

from engine import NANO
from support import endings

RANK_NAMES = ("RANK", "PMI_RANK", "OMPI_COMM_WORLD_RANK")  # where launchers write it
RANK_BYTES = 1 << 30  # memory of a rank beside its model


def cores() -> int:
    """CPU cores of this machine, or of what a container may use of it (cgroup's cpu.max)."""
    count = os.cpu_count() or 1
    if hasattr(os, "sched_getaffinity"):
        count = len(os.sched_getaffinity(0))
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        count = min(count, math.ceil(int(quota) / int(period)))
    except (OSError, ValueError):  # there is no such file, or it says "max": no limit
        pass
    return max(1, count)


def cores_of(processes: int) -> int:
    """CPU cores for each of so many processes on this machine."""
    return max(1, cores() // processes)


def wanted_ranks(processes: int, tasks: int, model: str) -> int:
    """How many ranks to run on this machine's CPUs.

    Args:
        processes: as the user asked; 0 means one a core, as memory and tasks allow.
        tasks: of one update; a rank without a task would only wait.
        model: a folder with weights tells their size; another model is left to one process.
    """
    if processes:
        return min(processes, tasks)
    folder = NANO if model == "nano" else Path(model)
    weights = sum(file.stat().st_size for file in folder.rglob("*.safetensors"))
    if not weights:
        return 1
    # Each rank holds the weights, their gradient and Adam's two moments; activations take as much.
    fitting = psutil.virtual_memory().available // (RANK_BYTES + 6 * weights)
    return max(1, min(cores(), tasks, fitting))


def start_ranks(count: int) -> None:
    """Become rank 0 of `count` ranks on this machine, unless a launcher has started ranks already.

    The other ranks run the same command. They get our signals from us (`endings`), and end when the
    pipe to us closes. Everything listens on loopback only.
    """
    if endings.is_child():  # we are one of the others
        threading.Thread(target=end_with_the_pipe, daemon=True).start()
        return
    launched = any(name in os.environ for name in RANK_NAMES)
    if launched or count == 1 or torch.cuda.is_available():
        return
    listener = socket.create_server(("127.0.0.1", 0))
    os.environ |= {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(listener.getsockname()[1]),
        "WORLD_SIZE": str(count),
        "LOCAL_WORLD_SIZE": str(count),
        "RANK": "0",
        "LOCAL_RANK": "0",
        "OMP_NUM_THREADS": str(cores_of(count)),
        "NANO_LISTENER": str(listener.detach()),
    }
    for rank in range(1, count):
        own = {"RANK": str(rank), "LOCAL_RANK": str(rank), "NANO_PARENT": str(os.getpid())}
        with endings.deaf():
            child = subprocess.Popen(
                [sys.executable, *sys.argv],
                env=os.environ | own,
                stdin=subprocess.PIPE,
                start_new_session=True,  # Ctrl-C in the terminal is for us to pass on
            )
        endings.children.append(child)
        threading.Thread(target=notice_the_end, args=(child, rank), daemon=True).start()


def join_ranks() -> None:
    """Wait for the ranks that `start_ranks` has started, and make their process group. Ranks of one
    machine, whoever has started them, listen on loopback only.
    """
    if os.environ.get("LOCAL_WORLD_SIZE", "") == os.environ.get("WORLD_SIZE"):
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo0" if sys.platform == "darwin" else "lo")
    if "NANO_LISTENER" not in os.environ:
        return
    port, is_master = int(os.environ["MASTER_PORT"]), not endings.is_child()
    listener = int(os.environ["NANO_LISTENER"]) if is_master else None
    store = torch.distributed.TCPStore(
        "127.0.0.1", port, is_master=is_master, master_listen_fd=listener, wait_for_workers=False
    )
    rank, ranks = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    torch.distributed.init_process_group("gloo", store=store, rank=rank, world_size=ranks)


def own_rank() -> int:
    """The number of this process, 0 where nobody has numbered it."""
    return next((int(os.environ[name]) for name in RANK_NAMES if name in os.environ), 0)


def end_with_the_launcher() -> None:
    """A launcher that is killed does not end what it started, so on Linux we then get SIGTERM."""
    if "ACCELERATE_MIXED_PRECISION" in os.environ or "TORCHELASTIC_RUN_ID" in os.environ:
        endings.die_with_parent(os.getppid(), signal.SIGTERM)


def end_with_the_pipe() -> None:
    """Rank 0 keeps our standard input open as long as it lives."""
    os.read(sys.stdin.fileno(), 1)
    os._exit(1)


def notice_the_end(child: subprocess.Popen, rank: int) -> None:
    """A rank that fails, or is killed, ends the run. We might wait for it for a long time."""
    code = child.wait()
    if code and not endings.received:
        killed = f"was killed by {signal.Signals(-code).name}" if code < 0 else "has failed"
        endings.lose("train.py", f"since process {rank} {killed}")


def end_ranks(joined: bool) -> None:
    """Wait for the other ranks, which are ending too; kill those that do not.

    Args:
        joined: whether they had joined us; one that had not waits for that, and is killed at once.
    """
    for child in endings.children:
        try:
            child.wait(timeout=5 if joined else 0)
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()


def sum_over_ranks(counts: dict) -> dict:
    """Counts of all ranks together: numbers are added, dicts are added key by key."""
    parts = gather_object([counts])
    total = {}
    for key, value in counts.items():
        values = [part[key] for part in parts]
        if isinstance(value, dict):
            names = sorted({name for each in values for name in each}, key=str)
            total[key] = {name: sum(each.get(name, 0) for each in values) for name in names}
        else:
            total[key] = sum(values)
    return total
