"""A search index over any corpus: SQLite FTS5, ranked by BM25, in one file.

In: documents {url, title, text, description?, html?} from a fictional world, a folder of HTML
files or a JSON-lines file. Out: a database with the `pages`, their `words` in the one form of
support/words.py, their HTML where there is any, and `meta`. Nothing is held in memory, so a corpus
may be larger than RAM. To try an idea (another ranking), change `search_index`.

    python data/index.py --html DIR | --jsonl FILE --out corpus.db
"""

import contextlib
import functools
import html as html_module
import itertools
import multiprocessing
import os
import random
import re
import signal
import sqlite3
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote, urlsplit

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tqdm import tqdm
from transformers.hf_argparser import HfArg

from data.task import parse_object
from support.flags import parse_flags
from support.html_text import decode_page, parse, title_and_description, tree_to_text
from support.web import plain_address
from support.words import across, fold_words, index_words, query_words, without_accents


@dataclass
class Args:
    out: str = HfArg(help="database file to write")
    html: str = HfArg(default="", help="folder of HTML files")
    jsonl: str = HfArg(default="", help="or a file of JSON documents, one a line: text, title, url")
    base_url: str = HfArg(default="http://corpus.test/", help="for pages that have no URL")
    processes: int = HfArg(default=os.cpu_count() or 1, help="how many read a large folder")
    strict: bool = HfArg(default=False, help="stop at the first malformed line, skip none")


SNIPPET_CHARS = 150
LARGE_INDEX = 20_000  # pages from which on COMMON words are left out of a query
COMMON = 20  # a word is common if it stands in more than one page in this many
# The index is rebuilt from its source if the machine dies, so it needs no journal and no fsync.
# The cache is 64 MiB, whatever the size of the corpus.
# `address` is the url in its plain form; several passages may have one.
TABLES = """
create table pages(id integer primary key, address text, url text, title text, text text,
    description text);
create index pages_address on pages(address);
create virtual table words using fts5(title, text, content='', tokenize='ascii');
create table html(id integer primary key, url text, html text);
create table meta(key text primary key, value text);
"""
SCHEMA = "pragma journal_mode=off; pragma synchronous=off; pragma cache_size=-65536;" + TABLES
COMMON_TABLE = "create table common(word text primary key, pages integer) without rowid;"
COMMON_WORDS = """
create virtual table temp.vocabulary using fts5vocab(main, words, row);
insert into common select term, doc from vocabulary where doc > {};
"""


# ---------------------------------------------------------------------------------------- processes


def end_with_parent() -> None:
    """Started in each process of `in_processes`: a killed parent leaves no process behind."""

    def wait():
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


def in_processes(jobs: list[Callable], processes: int) -> Iterator:
    """The jobs' results in order, computed by several processes.

    Only a few results wait at a time, so memory stays flat however slowly they are taken.

    Args:
        jobs: functions without arguments, such as functools.partial(function, argument); they and
            their results must pickle.
        processes: how many; below 2 the jobs run in this process.

    Raises:
        OSError: a process died. Besides, what a job raises.
    """
    if processes < 2 or len(jobs) < 2:
        yield from (job() for job in jobs)
        return
    # A process that has threads cannot be forked safely, so the new ones are spawned. They inherit
    # that Ctrl-C is ignored: it is this process that ends them.
    spawn = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(processes, spawn, end_with_parent)
    handler = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        waiting = deque(pool.submit(job) for job in jobs[: 2 * processes])
        signal.signal(signal.SIGINT, handler)
        for job in jobs[2 * processes :]:
            yield waiting.popleft().result()
            waiting.append(pool.submit(job))
        while waiting:
            yield waiting.popleft().result()
    except BrokenProcessPool:
        raise OSError("a process that makes pages has died") from None
    finally:
        signal.signal(signal.SIGINT, handler)
        pool.shutdown(cancel_futures=True)


# -------------------------------------------------------------------------------------------- index


def insert_documents(connection: sqlite3.Connection, documents: Iterable[dict]) -> int:
    """Fill a new index; returns the number of documents."""
    count, sites = 0, {}
    for count, document in enumerate(documents, start=1):
        url, text = document["url"], document["text"]
        title = " ".join(document["title"].split())  # search shows it on one line
        address = plain_address(url)
        description = document.get("description") or ""
        row = (count, address, url, title, text, description)
        connection.execute("insert into pages values (?, ?, ?, ?, ?, ?)", row)
        row = (count, index_words(title), index_words(text))
        connection.execute("insert into words(rowid, title, text) values (?, ?, ?)", row)
        if document.get("html"):
            row = (count, url, document["html"])
            connection.execute("insert into html values (?, ?, ?)", row)
        sites["://".join(urlsplit(address)[:2])] = None
    connection.execute("insert into meta values (?, ?)", ("sites", "\n".join(sites)))
    return count


def build_index(
    documents: Iterable[dict], out: Path | str, total: int | None = None, require_some: bool = False
) -> int:
    """Write an index; the old file at `out` stays until the new one is whole.

    Args:
        documents: dicts with url, title and text; optional are description (the snippet, if given)
            and html (to serve it).
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
    bar = {"desc": f"indexing {out.name}", "unit": "page", "mininterval": 1, "leave": False}
    pages = tqdm(documents, total=total, delay=1, **bar)  # a small index shows none
    try:
        connection.executescript(SCHEMA)
        count = insert_documents(connection, pages)
        if require_some and count == 0:
            raise ValueError("no page found")
        if count >= LARGE_INDEX:
            connection.executescript(COMMON_TABLE + COMMON_WORDS.format(count // COMMON))
        connection.commit()
        connection.close()
        os.replace(partial, out)
    finally:
        connection.close()
        partial.unlink(missing_ok=True)
    return count


def shape_of(connection: sqlite3.Connection) -> set[tuple]:
    return set(connection.execute("select type, name, sql from sqlite_master"))


@functools.cache
def known_shapes() -> list[set[tuple]]:
    """The tables of a small and of a large index."""
    with contextlib.closing(sqlite3.connect(":memory:")) as own:
        return [own.executescript(tables) and shape_of(own) for tables in (TABLES, COMMON_TABLE)]


def open_index(path: Path | str) -> sqlite3.Connection:
    """A read-only connection to an index.

    Raises:
        FileNotFoundError: no index there; the message says how to make one.
        ValueError: the file has other tables. An earlier version may have made it; or it is hostile
            and has a view, which could compute without end.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(
            f"no search index {path}: make one with data/world.py or data/index.py"
        )
    address = f"file:{quote(str(Path(path).resolve()))}?mode=ro&immutable=1"
    connection = sqlite3.connect(address, uri=True, check_same_thread=False)
    try:
        if shape_of(connection) in known_shapes():
            return connection
    except sqlite3.DatabaseError:
        pass
    connection.close()
    again = "make it anew with data/world.py or data/index.py"
    raise ValueError(f"{path} is no search index of this version: {again}")


def sites_of(connection: sqlite3.Connection) -> list[str]:
    """Scheme and host of the pages of an index, such as http://w7.test, in the order of pages."""
    found = connection.execute("select value from meta where key = 'sites'").fetchone()
    return str(found[0] if found else "").split() or ["http://corpus.test"]


def rarer_words(connection: sqlite3.Connection, words: list[str]) -> list[str]:
    """The words of a query without the common ones of a large index, or the rarest of those."""
    if not connection.execute("select 1 from sqlite_master where name = 'common'").fetchone():
        return words
    marks = ",".join("?" * len(words))
    found = connection.execute(f"select word, pages from common where word in ({marks})", words)
    pages = dict(found)
    return [word for word in words if word not in pages] or sorted(words, key=pages.get)[:1]


def search_index(connection: sqlite3.Connection, query: str, k: int) -> list[dict]:
    """The k best pages for a free-text query, by BM25 with the title counted five times.

    The snippet is the page's own description where it has one, as web search engines show it, else
    the passage with most of the words. Odd text (quotes, operators, NUL) is harmless: only its
    words are searched, joined by OR. In a large index a word that stands in every twentieth page
    ("the") is left out if the query has a rarer one: BM25 gives it little weight, and each such
    word costs a walk over all its pages.

    Returns:
        dicts with title, url, snippet; best first, ties in the order of indexing.
    """
    words = query_words(query)[:32]
    if len(words) > 1:
        words = rarer_words(connection, words)
    if not words:
        return []
    found = connection.execute(
        "select rowid from words where words match ? order by bm25(words, 5.0, 1.0), rowid limit ?",
        (" OR ".join(f'"{word}"' for word in words), k),
    )
    return [hit(connection, rowid, words) for (rowid,) in found.fetchall()]


def hit(connection: sqlite3.Connection, rowid: int, words: list[str]) -> dict:
    """A page as search shows it, with its description or else the passage with most of the words"""
    page = "select title, url, description, text from pages where id = ?"
    title, url, description, text = connection.execute(page, (rowid,)).fetchone()
    snippet = description or (best_passage(text, words) if text.strip() else "")
    return {"title": title, "url": url, "snippet": " ".join(snippet.split())}


def best_passage(text: str, words: list[str]) -> str:
    """SNIPPET_CHARS characters of a text, from the place on where most of the words follow."""
    folded, in_folded, in_text = fold_words(text, without_accents)
    wanted = "|".join(re.escape(word.replace(" ", "")) for word in words)
    matches = itertools.islice(re.finditer(rf"(?<![a-z\d])(?:{wanted})", folded), 200)
    found = [(match.start(), match.group()) for match in matches] or [(0, "")]
    near = lambda at: {word for place, word in found if at <= place < at + SNIPPET_CHARS}
    start = across(max((at for at, _ in found), key=lambda at: len(near(at))), in_folded, in_text)
    before = text[max(0, start - SNIPPET_CHARS // 2) : start]
    *earlier, sentence = re.split(r"\n|\. |。", before)
    if earlier or len(before) == start:
        start -= len(sentence)
    return "… " * (start > 0) + text[start : start + SNIPPET_CHARS]


def random_pages(connection: sqlite3.Connection, query: str, k: int, seed: int) -> list[dict]:
    """k pages that have nothing to do with the query, the same for the same query and seed.

    Returns:
        dicts as of `search_index`.
    """
    rng = random.Random(f"{seed} {query}")
    most = connection.execute("select max(id) from pages").fetchone()[0] or 0
    chosen = rng.sample(range(1, most + 1), min(k, most))
    return [hit(connection, rowid, []) for rowid in chosen]


class Index:
    """A search index for several threads: each search takes a connection that no other uses now.

    `look_up` may be set to another function that finds hits for (connection, query, k).
    """

    def __init__(self, path: Path | str):
        self.path, self.look_up, self.idle = path, search_index, [open_index(path)]

    def hits(self, queries: list[str], k: int) -> list[list[dict]]:
        """What `look_up` finds for each query.

        Raises:
            sqlite3.Error: the file cannot be read.
        """
        try:
            connection = self.idle.pop()
        except IndexError:
            connection = open_index(self.path)
        try:
            return [self.look_up(connection, query, k) for query in queries]
        finally:
            self.idle.append(connection)


def page_html_of(connection: sqlite3.Connection, url: str) -> str | None:
    """The HTML of a page, in which a passage without HTML is plain text. Passages of one address
    stand together, and sub/ means sub/index.html too.

    Returns:
        None if there is no such page.
    """
    page = "select distinct html, text from pages left join html using (id) where address = ?"
    address = plain_address(url)
    names = ("", "index.html", "index.htm") if address.endswith("/") else ("",)
    found = (connection.execute(f"{page} order by id", (address + name,)) for name in names)
    rows = next(filter(None, (rows.fetchall() for rows in found)), [])
    parts = [html or f"<pre>{html_module.escape(text)}</pre>" for html, text in rows]
    if len(rows) == 1 and rows[0][0]:
        return parts[0]
    return f"<!doctype html><html><body>{'<hr>'.join(parts)}</body></html>" if parts else None


# ------------------------------------------------------------------------------------------ corpora


def html_document(path: Path, folder: Path, base_url: str) -> dict | None:
    """A file as a document; None, and a line on stderr, if it cannot be read."""
    try:
        if path.is_symlink() or not path.is_file():
            raise ValueError("no regular file")
        relative = path.relative_to(folder).as_posix()
        url = base_url + quote(relative)  # it raises an error if the name is not UTF-8
        page = decode_page(path.read_bytes())
        if re.search("&#[0-9]{9}", page):  # an attack on parsers, which do not agree about it
            raise ValueError("a reference to a character that does not exist")
        tree = parse(page)
        title, description = title_and_description(tree)
        return {
            "url": url,
            "html": page,
            "text": tree_to_text(tree),
            "title": title or relative,
            "description": description,
        }
    except Exception as error:  # one hostile page must not end the index of the others
        reason = str(error) or type(error).__name__
        name = os.fsencode(path).decode("utf-8", "replace")
        print(f"{name}: skipped ({reason})", file=sys.stderr)
        return None


def html_documents(folder: Path | str, base_url: str, processes: int = 1) -> Iterator[dict]:
    """All .html and .htm files below a folder, sorted; an unreadable one is named and skipped."""
    paths = sorted(p for p in Path(folder).rglob("*") if p.suffix.lower() in (".html", ".htm"))
    jobs = [functools.partial(html_document, path, Path(folder), base_url) for path in paths]
    return filter(None, in_processes(jobs, min(processes, len(paths) // 500)))


def jsonl_document(line: bytes, own_url: str) -> dict:
    """One line of a JSON-lines corpus: `text` (or `contents`), and `title`, `url`, `html` if known.

    Args:
        own_url: the address of a page that names none.

    Raises:
        ValueError: what is wrong with it.
    """
    record = parse_object(line, errors="replace")
    text = record.get("text") or record.get("contents")
    if not isinstance(text, str):
        raise ValueError("no 'text' or 'contents' in it that is a string")
    url, page = str(record.get("url") or own_url), record.get("html") or ""
    if not isinstance(page, str):
        raise ValueError("'html' is not a string")
    plain_address(url)  # it raises an error if this is none
    if len(url.splitlines()) > 1:
        raise ValueError("'url' has a line break in it")
    title = str(record.get("title") or text[:60])
    (url + title + text + page).encode()  # half of a surrogate pair cannot be stored
    return {"url": url, "title": title, "text": text, "description": "", "html": page}


def jsonl_documents(file: Path | str, base_url: str, strict: bool) -> Iterator[dict]:
    """One document a line, see `jsonl_document`; a page without an address is named by its line.

    Raises:
        ValueError: a malformed line, with file and line number, if `strict`; otherwise it is named
            on stderr and skipped.
    """
    with open(file, "rb") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                yield jsonl_document(line, f"{base_url}{number}")
            except ValueError as error:
                if strict:
                    raise ValueError(f"{file}:{number}: {error}") from None
                print(f"{file}:{number}: skipped ({error})", file=sys.stderr)


def main():
    (args,) = parse_flags((Args,), __doc__)
    if bool(args.html) == bool(args.jsonl):
        sys.exit("data/index.py: give --html DIR or --jsonl FILE (see --help)")
    if args.html and not Path(args.html).is_dir():
        sys.exit(f"data/index.py: no folder {args.html}")
    if args.jsonl and not Path(args.jsonl).is_file():
        sys.exit(f"data/index.py: no file {args.jsonl}")
    if "://" not in args.base_url:
        sys.exit(f"data/index.py: --base_url {args.base_url!r} does not begin with http://")
    base_url = args.base_url if args.base_url.endswith(("/", "=")) else f"{args.base_url}/"
    if args.html:
        documents = html_documents(args.html, base_url, args.processes)
    else:
        documents = jsonl_documents(args.jsonl, base_url, args.strict)
    try:
        count = build_index(documents, args.out, require_some=True)
    except (OSError, ValueError, sqlite3.Error) as error:
        sys.exit(f"data/index.py: {error}")
    except KeyboardInterrupt:
        sys.exit(f"data/index.py: stopped; {args.out} is as it was")
    serve = f"python data/serve.py --db {args.out}"
    print(f"{count} pages indexed in {args.out}; serve them with: {serve}")


if __name__ == "__main__":
    main()
