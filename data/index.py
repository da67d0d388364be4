"""A search index over any corpus: SQLite FTS5, ranked by BM25, in one file.

In: documents {url, title, text, description?, html?} from a fictional world, a folder of HTML files or a JSON-lines file.
Out: a database with the full-text table `pages`, the pages' HTML where there is any, and `meta`. Nothing is held in memory,
so a corpus may be larger than RAM. To try an idea (another ranking, another snippet), change `search_index`.

    python data/index.py --html DIR | --jsonl FILE --out corpus.db
"""

import argparse
import functools
import html as html_module
import json
import multiprocessing
import os
import random
import re
import signal
import sqlite3
import sys
from collections.abc import Callable, Iterable, Iterator
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection
from pathlib import Path
from urllib.parse import quote, urlsplit

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tqdm import tqdm

from support.html_text import html_to_text

SNIPPET_TOKENS = 24
LARGE_INDEX = 20_000  # pages from which on words that stand in more than one page in COMMON are left out of a query
COMMON = 20


def run_jobs(connection: Connection, jobs: list[Callable]) -> None:
    """A process of `in_processes`: sends the result of one job after another, or the exception that ends it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    try:
        for job in jobs:
            try:
                connection.send((job(), None))
            except BrokenPipeError:
                raise
            except Exception as error:
                return connection.send((None, error))
    except BrokenPipeError:  # the parent is gone
        pass


def in_processes(jobs: list[Callable], processes: int) -> Iterator:
    """The jobs' results in order, computed by several processes. A process waits until its last result is taken: memory stays flat.

    Args:
        jobs: functions without arguments, such as functools.partial(function, argument); they and their results must pickle.
        processes: how many; below 2 the jobs run in this process.

    Raises:
        What a job raises.
    """
    if processes < 2 or len(jobs) < 2:
        yield from (job() for job in jobs)
        return
    spawn, workers, connections = (
        multiprocessing.get_context("spawn"),
        [],
        [],
    )  # forking a process that has threads is not safe
    resource_tracker.ensure_running()  # it would unblock SIGINT again
    try:
        signal.pthread_sigmask(
            signal.SIG_BLOCK, [signal.SIGINT]
        )  # a process inherits this: Ctrl-C would end it in the middle of an import
        try:
            for number in range(processes):
                connection, theirs = spawn.Pipe(duplex=False)
                connections.append(connection)
                worker = spawn.Process(
                    target=run_jobs, args=(theirs, jobs[number::processes]), daemon=True
                )
                worker.start()
                workers.append(worker)
                theirs.close()
        finally:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGINT])
        for number in range(len(jobs)):
            result, error = connections[number % processes].recv()
            if error:
                raise error
            yield result
    except EOFError:
        raise OSError("a process that makes pages has died") from None
    finally:
        for connection in connections:
            connection.close()
        for worker in workers:
            worker.kill()
            worker.join()


def build_index(
    documents: Iterable[dict], out: Path | str, total: int | None = None, require_some: bool = False
) -> int:
    """Write an index; the old file at `out` stays until the new one is whole.

    Args:
        documents: dicts with url, title and text; optional description (the snippet, if given) and html (to serve it).
        out: database file to write.
        total: number of documents, for the progress bar.
        require_some: no document at all is an error, and the old index stays.

    Returns:
        The number of documents written.

    Raises:
        OSError, sqlite3.Error: the file cannot be written.
        ValueError: a document's url is none; no document though there should be some.
    """
    out = Path(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = out.with_name(f"{out.name}.{os.getpid()}.partial")
    partial.unlink(missing_ok=True)
    connection = sqlite3.connect(partial)
    count, host = 0, ""
    try:
        # The index is rebuilt from its source if the machine dies: no journal, no fsync.
        connection.executescript(
            "pragma journal_mode=off; pragma synchronous=off; pragma cache_size=-65536;"  # 64 MiB, whatever the corpus
            "create virtual table pages using fts5(title, text, url unindexed, description unindexed);"
            "create table html(url text primary key, html text); create table meta(key text primary key, value text);"
        )
        for document in tqdm(
            documents,
            total=total,
            desc=f"indexing {out.name}",
            unit="page",
            mininterval=1,
            leave=False,
        ):
            if "://" not in document["url"]:
                raise ValueError(
                    f"{document['url']!r} is no address: urls and --base_url begin with http://"
                )
            connection.execute(
                "insert into pages(title, text, url, description) values (?, ?, ?, ?)",
                (
                    document["title"],
                    document["text"],
                    document["url"],
                    document.get("description") or "",
                ),
            )
            if document.get("html"):
                connection.execute(
                    "insert or replace into html values (?, ?)", (document["url"], document["html"])
                )
            host = host or urlsplit(document["url"]).hostname or ""
            count += 1
        if require_some and count == 0:
            raise ValueError("no page found")
        connection.execute("insert into meta values ('host', ?), ('count', ?)", (host, str(count)))
        if count >= LARGE_INDEX:
            connection.executescript(
                "create table common(word text primary key, pages integer) without rowid;"
                "create virtual table temp.vocabulary using fts5vocab(main, pages, row);"
                f"insert into common select term, doc from vocabulary where doc > {count // COMMON};"
            )
        connection.commit()
        connection.close()
        os.replace(partial, out)
    finally:
        connection.close()
        partial.unlink(missing_ok=True)
    return count


def open_index(path: Path | str) -> sqlite3.Connection:
    """A read-only connection to an index.

    Raises:
        FileNotFoundError: no index there; the message says how to make one.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(
            f"no search index {path}: make one with data/world.py or data/index.py"
        )
    return sqlite3.connect(
        f"file:{quote(str(Path(path).resolve()))}?mode=ro&immutable=1",
        uri=True,
        check_same_thread=False,
    )


def search_index(connection: sqlite3.Connection, query: str, k: int) -> list[dict]:
    """The k best pages for a free-text query, by BM25 with the title counted five times.

    The snippet is the page's own description where it has one, as web search engines show it, else the passage that
    matches best. Odd text (quotes, operators, NUL) is harmless: only its words are searched, joined by OR. In a large index
    a word that stands in every twentieth page ("the") is left out if the query has a rarer one: BM25 gives it little weight,
    and each such word costs a walk over all its pages.

    Returns:
        dicts with title, url, snippet; best first, ties in the order of indexing.
    """
    words = list(dict.fromkeys(re.findall(r"\w+", query.casefold())))[:32]
    if not words:
        return []
    if (
        len(words) > 1
        and connection.execute("select 1 from sqlite_master where name = 'common'").fetchone()
    ):
        pages = dict(
            connection.execute(
                f"select word, pages from common where word in ({','.join('?' * len(words))})",
                words,
            )
        )
        rare = [word for word in words if word not in pages]
        words = rare or sorted(words, key=pages.get)[:1]
    match = " OR ".join(f'"{word}"' for word in words)
    rows = connection.execute(
        f"select title, url, description, snippet(pages, 1, '', '', ' … ', {SNIPPET_TOKENS}) from pages where pages match ?"
        " order by bm25(pages, 5.0, 1.0), rowid limit ?",
        (match, k),
    ).fetchall()
    return [
        {"title": title, "url": url, "snippet": " ".join((description or snippet).split())}
        for title, url, description, snippet in rows
    ]


def random_pages(connection: sqlite3.Connection, query: str, k: int, seed: int) -> list[dict]:
    """k pages that have nothing to do with the query but to be the same for the same query and seed; hits as of search_index."""
    rng, most = (
        random.Random(f"{seed} {query}"),
        connection.execute("select max(rowid) from pages").fetchone()[0] or 0,
    )
    rows = [
        connection.execute(
            "select title, url, description, substr(text, 1, 150) from pages where rowid = ?",
            (rowid,),
        ).fetchone()
        for rowid in rng.sample(range(1, most + 1), min(k, most))
    ]
    return [
        {"title": title, "url": url, "snippet": " ".join((description or text).split())}
        for title, url, description, text in rows
    ]


def page_html_of(connection: sqlite3.Connection, url: str) -> str | None:
    """The stored HTML of a page, or its text as a plain page if the corpus had no HTML; None if there is no such page."""
    row = connection.execute("select html from html where url = ?", (url,)).fetchone()
    if row is None:
        row = connection.execute("select text from pages where url = ?", (url,)).fetchone()
        return (
            f"<!doctype html><html><body><pre>{html_module.escape(row[0])}</pre></body></html>"
            if row
            else None
        )
    return row[0]


def html_document(path: Path, folder: Path, base_url: str) -> dict | None:
    """A file as a document; None, and a line on stderr, if it cannot be read."""
    try:
        page = path.read_bytes().decode("utf-8", "replace")
    except OSError as error:
        print(f"{path}: skipped ({error.strerror})", file=sys.stderr)
        return None
    relative = path.relative_to(folder).as_posix()
    title = re.search(r"<title[^>]*>(.*?)</title>", page, re.IGNORECASE | re.DOTALL)
    description = re.search(r'<meta\s+name="description"\s+content="([^"]*)"', page, re.IGNORECASE)
    return {
        "url": base_url + quote(relative),
        "html": page,
        "text": html_to_text(page),
        "title": " ".join(html_module.unescape(title.group(1)).split()) if title else relative,
        "description": html_module.unescape(description.group(1)) if description else "",
    }


def html_documents(folder: Path | str, base_url: str, processes: int = 1) -> Iterator[dict]:
    """All .html and .htm files below a folder, in sorted order; an unreadable one is reported and skipped."""
    paths = sorted(p for p in Path(folder).rglob("*") if p.suffix.lower() in (".html", ".htm"))
    jobs = [functools.partial(html_document, path, Path(folder), base_url) for path in paths]
    return filter(None, in_processes(jobs, min(processes, len(paths) // 500)))


def jsonl_documents(file: Path | str, base_url: str, strict: bool) -> Iterator[dict]:
    """One document a line: `text` (or `contents`), and `title`, `url`, `html` if known.

    Raises:
        ValueError: a malformed line, with file and line number, if `strict`; otherwise it is reported and skipped.
    """
    with open(file, encoding="utf-8", errors="replace") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                record = json.loads(line)
                text = record.get("text") or record["contents"]
                if not isinstance(text, str):
                    raise ValueError("'text' is not a string")
                title = str(record.get("title") or text[:60])
                yield {
                    "url": str(record.get("url") or f"{base_url}{number}"),
                    "title": title,
                    "text": text,
                    "description": "",
                    "html": record.get("html"),
                }
            except (ValueError, KeyError, AttributeError, TypeError) as error:
                reason = f"no {error} in it" if isinstance(error, KeyError) else str(error)
                if strict:
                    raise ValueError(f"{file}:{number}: {reason}") from None
                print(f"{file}:{number}: skipped ({reason})", file=sys.stderr)


def main():
    parser = argparse.ArgumentParser(
        description="Index a corpus of your own for the search and browse tools."
    )
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--html", help="folder of HTML files")
    source.add_argument("--jsonl", help="file with one JSON document a line: text, title, url")
    parser.add_argument("--out", required=True, help="database file to write")
    parser.add_argument(
        "--base_url",
        default="http://corpus.test/",
        help="what the URLs of pages without one begin with",
    )
    parser.add_argument(
        "--processes",
        type=int,
        default=os.cpu_count(),
        help="how many work at a large folder of HTML files",
    )
    parser.add_argument(
        "--strict",
        action="store_true",
        help="stop at the first malformed line instead of skipping it",
    )
    args = parser.parse_args()
    if args.html and not Path(args.html).is_dir():
        sys.exit(f"data/index.py: no folder {args.html}")
    if args.jsonl and not Path(args.jsonl).is_file():
        sys.exit(f"data/index.py: no file {args.jsonl}")
    documents = (
        html_documents(args.html, args.base_url, args.processes)
        if args.html
        else jsonl_documents(args.jsonl, args.base_url, args.strict)
    )
    try:
        count = build_index(documents, args.out, require_some=True)
    except (OSError, ValueError, sqlite3.Error) as error:
        sys.exit(f"data/index.py: {error}")
    except KeyboardInterrupt:
        sys.exit(f"data/index.py: stopped; {args.out} is as it was")
    print(
        f"{count} pages indexed in {args.out}; serve them with: python data/serve.py --db {args.out}"
    )


if __name__ == "__main__":
    main()
