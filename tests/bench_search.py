"""Builds the index of a large fictional world and queries it: build rate, size, memory, latency.

python tests/bench_search.py --entities 100000 [--out DIR] [--json FILE]
"""

import argparse
import functools
import json
import os
import random
import resource
import shutil
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import psutil

from data.index import build_index
from data.serve import start_server
from data.world import RELATIONS, World, documents
from tools import Browse, Search


def percentile(values: list[float], share: float) -> float:
    return sorted(values)[min(len(values) - 1, int(share * len(values)))]


def latency_ms(call, value) -> float:
    started = time.perf_counter()
    call(value)
    return 1000 * (time.perf_counter() - started)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--entities", type=int, default=100_000)
    parser.add_argument(
        "--queries", type=int, default=2000, help="queries for each number of clients"
    )
    parser.add_argument(
        "--processes", type=int, default=os.cpu_count(), help="how many make the pages"
    )
    parser.add_argument(
        "--out", default="", help="folder to keep the index in; used again if it is there"
    )
    parser.add_argument("--json", default="", help="file for the numbers")
    args = parser.parse_args()
    process, rows = psutil.Process(), {}
    world = World(5, args.entities, "train")
    folder = Path(args.out or tempfile.mkdtemp(prefix="bench-search-"))
    db = folder / f"pages-{args.entities}.db"
    if not db.is_file():
        memory, count, started = [], 0, time.perf_counter()

        def watched():
            nonlocal count
            for document in documents(world, args.processes):
                count += 1
                if count % max(1, args.entities // 20) == 0:
                    memory.append(process.memory_info().rss >> 20)
                yield document

        build_index(watched(), db, total=args.entities)
        rows["build, s"] = round(time.perf_counter() - started, 1)
        rows["pages a second"] = round(count / (time.perf_counter() - started))
        rows["memory after 1/4, 2/4, 3/4, 4/4 of the build, MiB"] = memory[4::5]
        rows["peak memory of the build, MiB"] = (
            resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10
        )
    rows["index with HTML, MiB"] = db.stat().st_size >> 20
    rng = random.Random(0)
    queries = []
    for number in range(args.queries):
        entity = world.entity(rng.randrange(args.entities))
        relation = rng.choice(list(RELATIONS[entity.type]))
        queries.append(
            (f"{entity.name} {relation}", f"What is the {relation} of {entity.name}?", entity.name)[
                number % 3
            ]
        )
    search = Search(db)
    right = sum(
        query.split()[0 if "What" not in query else -1].strip("?")
        in search(queries=[query]).split("\n")[0]
        for query in queries[:300]
    )
    rows["first hit is the entity asked for"] = f"{right} of 300"
    server = start_server(db)
    browse = Browse(server.hosts)
    urls = [world.url(rng.randrange(args.entities)) for _ in range(args.queries)]
    for name, call, inputs in (
        ("search", lambda query: search(queries=[query]), queries),
        ("browse", lambda url: browse(url=url), urls),
    ):
        for clients in (1, 16):
            browse.reader.pages.clear()
            started = time.perf_counter()
            with ThreadPoolExecutor(clients) as pool:
                latencies = list(pool.map(functools.partial(latency_ms, call), inputs))
            rows[f"{name}, {clients} clients: p50, p99 ms; calls a second"] = [
                round(percentile(latencies, 0.5), 2),
                round(percentile(latencies, 0.99), 2),
                round(len(inputs) / (time.perf_counter() - started)),
            ]
    rows["memory at the end, MiB"] = process.memory_info().rss >> 20
    for name, value in rows.items():
        print(f"{name:<55} {value}")
    if args.json:
        Path(args.json).write_text(json.dumps({"entities": args.entities} | rows, indent=1))
    if not args.out:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
