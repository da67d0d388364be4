"""Cost of the tools as a table in Markdown: calls of Monty; start and calls of the CPython sandbox,
latency and memory over many calls, many sandboxes at once; cold and warm browse; search.

    python tests/bench_tools.py [--calls 1000] [--sandboxes 100] [--json FILE]
"""

import argparse
import json
import math
import os
import platform
import statistics
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import psutil

from data.serve import start_server
from data.world import World, write_world
from support import cpython_sandbox as sandbox
from support.cpython_sandbox import CPythonSession
from tools import Browse, Python, Search


def timed(call, *inputs) -> list[float]:
    """Milliseconds of each call."""
    times = []
    for value in inputs:
        started = time.perf_counter()
        call(value)
        times.append(1000 * (time.perf_counter() - started))
    return times


def summary(times: list[float]) -> str:
    p99 = sorted(times)[math.ceil(0.99 * len(times)) - 1]
    return f"median {statistics.median(times):.2f} ms, p99 {p99:.2f} ms of {len(times)}"


def monty_rows(calls: int, rows: dict) -> None:
    """The default interpreter: its pool, calls of one and of many sessions, size of a snapshot."""
    process, memory = psutil.Process(), {}
    rows["monty: first call of a process, with the pool"] = summary(
        timed(lambda _: Python()(code="1 + 1"), 0)
    )
    rows["monty: a session's first call"] = summary(
        timed(lambda n: Python()(code=f"print({n} + 116)"), *range(calls))
    )
    session = Python(memory)
    times = timed(lambda n: session(code=f"x = {n}\nx + 1"), *range(min(calls, 200)))
    rows["monty: a further call"] = summary(times)
    rows["monty: snapshot"] = (
        f"{len(memory['python']) / len(times):.0f} bytes a call after {len(times)} calls"
    )
    sessions = [Python() for _ in range(64)]
    started = time.perf_counter()
    with ThreadPoolExecutor(64) as pool:
        list(pool.map(lambda n: sessions[n % 64](code=f"x = {n}"), range(calls)))
    each = 1000 * (time.perf_counter() - started) / calls
    workers = [child for child in process.children() if "monty" in child.name()]
    resident = sum(worker.memory_info().rss for worker in workers) / 2**20
    rows["monty: 64 threads"] = f"{each:.2f} ms a call; {len(workers)} workers, {resident:.0f} MiB"


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--calls", type=int, default=1000)
    parser.add_argument("--sandboxes", type=int, default=100)
    parser.add_argument("--json", default="", help="file for the numbers")
    args = parser.parse_args()
    process, rows = psutil.Process(), {}
    unsafe = bool(sandbox.missing())

    def cycle(code: str) -> None:
        session = CPythonSession(timeout_s=60, unsafe=unsafe)
        session(code=code)
        session.close()

    session = CPythonSession(timeout_s=60, unsafe=unsafe)
    session.start()
    rows["machine"] = (
        f"{os.cpu_count()} cores, {platform.machine()}, Linux {platform.release()}, "
        f"Python {platform.python_version()}"
    )
    rows["sandbox"] = session.isolation
    monty_rows(args.calls, rows)
    starts = []
    for _ in range(args.sandboxes):
        other = CPythonSession(timeout_s=60, unsafe=unsafe)
        starts += timed(CPythonSession.start, other)
        other.close()
    rows["cpython: start until it is confined"] = summary(starts)
    rows["cpython: start, one call, close"] = summary(timed(cycle, *["1 + 1"] * args.sandboxes))
    rows["cpython: start, import numpy, close"] = summary(timed(cycle, *["import numpy"] * 5))
    session(code="1")
    child, tenth = psutil.Process(session.process.pid), max(1, args.calls // 10)
    for n in range(tenth):  # what is set up once is no growth
        session(code=f"x = {n}\nx + 1")
    before = (process.memory_info().rss, process.num_fds(), child.memory_info().rss)
    times = timed(lambda n: session(code=f"x = {n}\nx + 1"), *range(args.calls))
    rows["cpython: a further call"] = summary(times)
    first, last = statistics.median(times[:tenth]), statistics.median(times[-tenth:])
    rows[f"cpython: first and last tenth of {args.calls} calls"] = (
        f"median {first:.2f} and {last:.2f} ms ({last / first - 1:+.0%})"
    )
    rows[f"cpython: growth over {args.calls} calls"] = (
        f"{(process.memory_info().rss - before[0]) >> 10} KiB of ours, "
        f"{(child.memory_info().rss - before[2]) >> 10} KiB of the session, "
        f"{process.num_fds() - before[1]} descriptors"
    )
    rows["cpython: memory of a session"] = f"{child.memory_info().rss / 2**20:.1f} MiB"
    session.close()
    with tempfile.TemporaryDirectory() as folder:
        tempfile.tempdir, children, fds = folder, len(process.children()), process.num_fds()
        os.chmod(folder, 0o755)
        sessions = [CPythonSession(timeout_s=60, unsafe=unsafe) for _ in range(args.sandboxes)]
        started = time.perf_counter()
        with ThreadPoolExecutor(16) as pool:
            list(pool.map(lambda session: session(code="1"), sessions))
            started_s = time.perf_counter() - started
            memory = sum(child.memory_info().rss for child in process.children()) / 2**20
            list(pool.map(CPythonSession.close, sessions))
        closed_s = time.perf_counter() - started - started_s
        rows[f"cpython: {args.sandboxes} sessions at once"] = (
            f"{started_s:.2f} s to start all and call each, {closed_s:.2f} s to close; "
            f"{memory:.0f} MiB resident, shared pages counted each time"
        )
        rows["cpython: left behind"] = (
            f"{len(process.children()) - children} processes, "
            f"{len(os.listdir(folder))} folders, {process.num_fds() - fds} descriptors"
        )
        tempfile.tempdir = None
        world = World(7, 300, "train")
        write_world(world, folder)
        server = start_server(Path(folder) / "pages.db")
        search, browse = (
            Search(Path(folder) / "pages.db"),
            Browse(server.hosts),
        )
        urls = [world.url(n) for n in range(300)]
        rows["browse: a page for the first time"] = summary(
            timed(lambda url: browse(url=url), *urls)
        )
        rows["browse: the same page again"] = summary(
            timed(lambda url: browse(url=url, page=2), *urls)
        )
        rows["search: one query"] = summary(
            timed(lambda n: search(queries=[f"mayor of {world.name(n)}"]), *range(300))
        )
    print("| | |\n|---|---|\n" + "\n".join(f"| {name} | {value} |" for name, value in rows.items()))
    if args.json:
        Path(args.json).write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
