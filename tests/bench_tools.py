"""Cost of the tools: start and calls of the sandbox, memory over many calls, many sandboxes at once; cold and warm browse; search.

    python tests/bench_tools.py [--calls 1000] [--sandboxes 100] [--json FILE]
"""
import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import psutil

import sandbox
from data.serve import start_server
from data.world import World, write_world
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
    return f"p50 {statistics.median(times):.2f} ms, p99 {sorted(times)[int(0.99 * (len(times) - 1))]:.2f} ms"


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--calls", type=int, default=1000)
    parser.add_argument("--sandboxes", type=int, default=100)
    parser.add_argument("--json", default="", help="file for the numbers")
    args = parser.parse_args()
    process, rows = psutil.Process(), {}
    unsafe = bool(sandbox.missing())
    rows["sandbox"] = f"none here: {sandbox.missing()}" if unsafe else f"as uid {os.geteuid()}"

    def cycle(code: str) -> None:
        session = Python(timeout_s=60, unsafe=unsafe)
        session(code=code)
        session.close()
    rows["python: start, one call, close"] = summary(timed(cycle, *["1 + 1"] * 30))
    rows["python: start, import numpy, close"] = summary(timed(cycle, *["import numpy"] * 5))
    session = Python(timeout_s=60, unsafe=unsafe)
    session(code="1")
    child, tenth = psutil.Process(session.process.pid), max(1, args.calls // 10)
    before = (process.memory_info().rss, process.num_fds())
    times = timed(lambda n: session(code=f"x = {n}\nx + 1"), *range(args.calls))
    rows["python: a further call"] = summary(times)
    rows[f"python: first and last tenth of {args.calls} calls, p50 ms"] = [round(statistics.median(part), 3) for part in (times[:tenth], times[-tenth:])]
    rows["python: growth of our memory, KiB, and descriptors"] = [(process.memory_info().rss - before[0]) >> 10, process.num_fds() - before[1]]
    rows["python: memory of a session, MiB"] = round(child.memory_info().rss / 2**20, 1)
    session.close()
    with tempfile.TemporaryDirectory() as folder:
        tempfile.tempdir, children, fds = folder, len(process.children()), process.num_fds()
        os.chmod(folder, 0o755)
        sessions = [Python(timeout_s=60, unsafe=unsafe) for _ in range(args.sandboxes)]
        started = time.perf_counter()
        with ThreadPoolExecutor(16) as pool:
            list(pool.map(lambda session: session(code="1"), sessions))
            list(pool.map(Python.close, sessions))
        rows[f"python: {args.sandboxes} sessions at once, s"] = round(time.perf_counter() - started, 2)
        rows["python: left behind: processes, folders, descriptors"] = [len(process.children()) - children, len(os.listdir(folder)), process.num_fds() - fds]
        tempfile.tempdir = None
        world = World(7, 300, "train")
        write_world(world, folder)
        server = start_server(Path(folder) / "pages.db")
        search, browse = Search(Path(folder) / "pages.db"), Browse({server.host: "127.0.0.1:%d" % server.server_address[1]})
        urls = [world.url(n) for n in range(300)]
        rows["browse: a page for the first time"] = summary(timed(lambda url: browse(url=url), *urls))
        rows["browse: the same page again"] = summary(timed(lambda url: browse(url=url, page=2), *urls))
        rows["search: one query"] = summary(timed(lambda n: search(queries=[f"mayor of {world.name(n)}"]), *range(300)))
    for name, value in rows.items():
        print(f"{name:<60} {value}")
    if args.json:
        Path(args.json).write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
