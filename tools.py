"""The agent's tools, and the parser of its calls.

    search(queries)                    several queries at once; each hit has title, url and snippet
    browse(url, page | find | links)   a page as text over HTTP, a few hundred characters at a time
    python(code)                       a stateful session in a process of its own, confined by sandbox.py

In: the text of one turn. Out: `parse_action` gives tool calls or an answer, or raises FormatError; `run_calls` gives the
results in call order. What goes wrong is one of three things, and the difference decides what is rewarded:

    FormatError    the policy's action cannot be read: the trajectory ends and is penalised
    a plain result what the policy can see and correct: no such page, a traceback, a time-out of its own code
    ToolFault      the environment failed (a server is down): retried with back-off, then shown as a result, counted, never punished

Everything that comes from outside (pages, hits, output of code) is hostile: sizes and times are bounded here, and
context.py encodes the text so that it cannot contain a control token. A new tool is one class with `name`, `signature`,
`check` and `__call__`:

    class Clock:
        name, signature = "clock", "clock()"
        def check(self, arguments): return None if not arguments else "clock takes no arguments"
        def __call__(self): return time.strftime("%H:%M")
"""

import atexit
import concurrent.futures
import html
import json
import os
import re
import select
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

import requests

from support import cpython_sandbox as sandbox
from support.cpython_sandbox import FOLDER_BYTES
from support.web import (
    MAX_PAGE_BYTES,
    Browse,
    DiskCache,
    Pace,
    ToolFault,
    read_limited,
    retry_after,
)

CACHE = (
    Path(__file__).resolve().parent / "runs" / "cache"
)  # pages and search results of the real web
MAX_CALLS = 8  # in one turn
RETRY_S = 0.5  # before a second request to a search service; then twice as long each time
SANDBOX = Path(__file__).resolve().parent / "support" / "cpython_sandbox.py"
MAX_OUTPUT_BYTES = 1_000_000  # of one python call; more ends the session


class FormatError(Exception):
    """The policy's action is malformed. `kind` is a short code for the metrics, the message says it in words."""

    def __init__(self, kind: str, message: str):
        super().__init__(message)
        self.kind = kind


# ------------------------------------------------------------------------------------------------------------- parsing


@dataclass
class ToolCall:
    name: str
    arguments: dict


def parse_tool_calls(text: str) -> list[ToolCall]:
    """The tool calls of one turn, in order. What stands inside <think>…</think> is thought, not called.

    Args:
        text: decoded tokens that the policy sampled; never text from a page or a prompt.

    Raises:
        FormatError: a tag without its partner, bad JSON, no name, arguments that are no object.
    """
    text = re.sub(r"<think>.*?</think>", "", text, flags=re.DOTALL)
    blocks = re.findall(r"<tool_call>(.*?)</tool_call>", text, flags=re.DOTALL)
    if text.count("<tool_call>") != len(blocks) or text.count("</tool_call>") != len(blocks):
        raise FormatError("unclosed_tag", "a <tool_call> tag has no partner")
    calls = []
    for block in blocks:
        try:
            call = json.loads(block, parse_constant=lambda constant: float("not a number"))
        except (ValueError, RecursionError):
            raise FormatError("bad_json", "a tool call is not valid JSON") from None
        if not isinstance(call, dict):
            raise FormatError("not_an_object", "a tool call is not a JSON object")
        if not isinstance(call.get("name"), str):
            raise FormatError("missing_name", "a tool call has no name")
        if not isinstance(call.get("arguments", {}), dict):
            raise FormatError("bad_arguments", "the arguments of a tool call are not a JSON object")
        calls.append(ToolCall(call["name"], call.get("arguments", {})))
    return calls


def parse_action(text: str, tools: dict) -> tuple[list[ToolCall], str | None]:
    """One turn's action: tool calls, or the final answer.

    Args:
        text: the policy's whole turn.
        tools: name -> tool.

    Returns:
        (calls, None) or ([], answer).

    Raises:
        FormatError: neither or both, an unknown tool, wrong arguments, an unclosed tag.
    """
    visible = re.sub(r"<think>.*?</think>", "", text, flags=re.DOTALL)
    if "<think>" in visible or "</think>" in visible:
        raise FormatError("unclosed_tag", "a <think> tag has no partner")
    calls = parse_tool_calls(visible)
    outside_calls = re.sub(r"<tool_call>.*?</tool_call>", "", visible, flags=re.DOTALL)
    answers = re.findall(r"<answer>(.*?)</answer>", outside_calls, flags=re.DOTALL)
    if outside_calls.count("<answer>") != len(answers) or outside_calls.count("</answer>") != len(
        answers
    ):
        raise FormatError("unclosed_tag", "an <answer> tag has no partner")
    if len(answers) > 1:
        raise FormatError("two_answers", "more than one answer")
    if calls and answers:
        raise FormatError("call_and_answer", "a tool call and an answer in one turn")
    if not calls and not answers:
        raise FormatError("no_action", "neither a tool call nor an answer")
    if len(calls) > MAX_CALLS:
        raise FormatError("too_many_calls", f"more than {MAX_CALLS} tool calls in one turn")
    for call in calls:
        if call.name not in tools:
            raise FormatError("unknown_tool", f"no tool named {call.name[:40]!r}")
        problem = tools[call.name].check(call.arguments)
        if problem:
            raise FormatError("bad_arguments", problem)
    return calls, answers[0].strip() if answers else None


def run_calls(calls: list[ToolCall], tools: dict) -> list[tuple[str, bool]]:
    """Run one turn's calls side by side.

    Returns:
        One (text, is_fault) a call, in call order. A fault is the environment's; no exception escapes.
    """

    def run(call: ToolCall) -> tuple[str, bool]:
        try:
            return str(tools[call.name](**call.arguments)), False
        except ToolFault as fault:
            return f"error: {fault}", True
        except (
            Exception
        ) as error:  # a bug in a tool must not end the run, and is not the policy's fault
            return f"error: the tool failed ({type(error).__name__})", True

    if len(calls) == 1 or any(
        call.name == "python" for call in calls
    ):  # a session runs its code in order
        return [run(call) for call in calls]
    with concurrent.futures.ThreadPoolExecutor(len(calls)) as pool:
        return list(pool.map(run, calls))


# -------------------------------------------------------------------------------------------------------------- search


class Search:
    """The embedded search engine: BM25 over an index file (data/index.py).

    Args:
        db: path of the index.
        k: results a query.
    """

    name, signature = "search", "search(queries: list of str)"

    def __init__(self, db: Path | str, k: int = 2):
        from data.index import open_index, search_index

        self.db, self.k, self.open, self.look_up = db, k, open_index, search_index
        self.idle = [
            open_index(db)
        ]  # connections that no thread uses now; a missing index is reported here

    def check(self, arguments: dict) -> str | None:
        queries = arguments.get("queries")
        if (
            set(arguments) != {"queries"}
            or not isinstance(queries, list)
            or not 1 <= len(queries) <= 8
        ):
            return "search takes 'queries', a list of 1 to 8 strings"
        return (
            None
            if all(isinstance(query, str) for query in queries)
            else "search takes 'queries', a list of strings"
        )

    def __call__(self, queries: list[str]) -> str:
        queries = [queries] if isinstance(queries, str) else queries
        blocks = []
        for query, hits in zip(queries, self.find(queries)):
            lines = [
                f"[{n}] {hit['title']} {hit['url']}\n{hit['snippet']}"
                for n, hit in enumerate(hits, start=1)
            ]
            heading = [f"{query}:"] if len(queries) > 1 else []
            blocks.append("\n".join(heading + (lines or ["no results"])))
        return "\n".join(blocks)

    def find(self, queries: list[str]) -> list[list[dict]]:
        """The hits of each query: dicts with title, url, snippet. HACK HERE: another engine overrides this one method.

        Raises:
            ToolFault: the index cannot be read.
        """
        try:
            connection = self.idle.pop()
        except IndexError:
            connection = self.open(self.db)
        try:
            return [self.look_up(connection, query, self.k) for query in queries]
        except sqlite3.Error as error:
            raise ToolFault(f"search failed ({error})") from None
        finally:
            self.idle.append(connection)


@dataclass
class Provider:
    """How a web search service is asked and answers."""

    url: str  # "" if everybody has their own
    key_name: str  # environment variable with the API key; "" if it needs none
    request: Callable[
        [str, int, str], dict
    ]  # (query, k, key) -> keyword arguments of requests.request
    hits: Callable[[dict], list]  # reply -> its list of hits
    fields: tuple[str, str, str]  # names of title, url and snippet in a hit


PROVIDERS = {
    "searxng": Provider(
        "",
        "",
        lambda q, k, key: {"method": "GET", "params": {"q": q, "format": "json"}},
        lambda r: r["results"],
        ("title", "url", "content"),
    ),
    "brave": Provider(
        "https://api.search.brave.com/res/v1/web/search",
        "BRAVE_API_KEY",
        lambda q, k, key: {
            "method": "GET",
            "params": {"q": q[:400], "count": k},
            "headers": {"X-Subscription-Token": key, "Accept": "application/json"},
        },
        lambda r: (r.get("web") or {"results": []})["results"],
        ("title", "url", "description"),
    ),
    "serper": Provider(
        "https://google.serper.dev/search",
        "SERPER_API_KEY",
        lambda q, k, key: {
            "method": "POST",
            "json": {"q": q, "num": k},
            "headers": {"X-API-KEY": key},
        },
        lambda r: r["organic"],
        ("title", "link", "snippet"),
    ),
    "tavily": Provider(
        "https://api.tavily.com/search",
        "TAVILY_API_KEY",
        lambda q, k, key: {
            "method": "POST",
            "json": {"query": q, "max_results": k},
            "headers": {"Authorization": f"Bearer {key}"},
        },
        lambda r: r["results"],
        ("title", "url", "content"),
    ),
}


class WebSearch(Search):
    """Search by a service on the web, with the same call and the same text as the embedded one.

    Args:
        provider: a key of PROVIDERS.
        url: address of the service, if not the provider's own (needed for searxng).
        k: results a query.
        cache: where answers are kept.
        timeout_s: limit for one query with its retries, in seconds.
        gap_s: seconds between two requests, over all trajectories of this process.

    Raises:
        ValueError: unknown provider, no key in the environment, no URL.
    """

    def __init__(
        self,
        provider: str,
        url: str = "",
        k: int = 5,
        cache: "DiskCache | None" = None,
        timeout_s: float = 20.0,
        gap_s: float = 0.2,
    ):
        if provider not in PROVIDERS:
            raise ValueError(
                f"no search provider {provider!r}: choose embedded, {', '.join(PROVIDERS)}"
            )
        self.provider, self.label, self.k, self.cache, self.timeout_s = (
            PROVIDERS[provider],
            provider,
            k,
            cache,
            timeout_s,
        )
        self.url, self.pace = url or self.provider.url, Pace(gap_s)
        if provider == "searxng" and self.url and not self.url.rstrip("/").endswith("/search"):
            self.url = self.url.rstrip("/") + "/search"
        self.host = urlsplit(self.url).hostname
        if urlsplit(self.url).scheme not in ("http", "https") or not self.host:
            raise ValueError(
                f"search by {provider} needs the address of a server: --search_url http://HOST:PORT"
            )
        self.key = (
            os.environ.get(self.provider.key_name, "").strip() if self.provider.key_name else ""
        )
        if self.provider.key_name and not self.key:
            raise ValueError(
                f"search by {provider} needs an API key in the environment variable {self.provider.key_name}"
            )

    def probe(self) -> None:
        """Find out now, at no cost, whether the service can be reached.

        Raises:
            ValueError: it cannot.
        """
        try:
            port = urlsplit(self.url).port or (443 if self.url.startswith("https") else 80)
            socket.create_connection((self.host, port), timeout=5).close()
        except OSError as error:
            raise ValueError(
                f"search by {self.label}: cannot reach {self.host} ({error.strerror or error})"
            ) from None

    def find(self, queries: list[str]) -> list[list[dict]]:
        with concurrent.futures.ThreadPoolExecutor(len(queries)) as pool:
            return list(
                pool.map(self.ask, queries)
            )  # side by side; results in the order of the queries

    def ask(self, query: str) -> list[dict]:
        """One query, from the cache or with up to four requests.

        Raises:
            ToolFault: no usable answer; the text names service and reason, never the key.
        """
        cache_key = f"{self.label} {self.url} {self.k} {query}"
        if self.cache and (kept := self.cache.get(cache_key)) is not None:
            return json.loads(kept)
        deadline, problem = time.monotonic() + self.timeout_s, "no answer"
        for attempt in range(4):
            wait = RETRY_S * 2**attempt
            try:
                self.pace.wait(self.host, deadline)
                with requests.Session() as session:
                    session.trust_env = False  # ~/.netrc would replace our header
                    left = max(0.1, deadline - time.monotonic())
                    with session.request(
                        url=self.url,
                        timeout=left,
                        allow_redirects=False,
                        stream=True,
                        **self.provider.request(query, self.k, self.key),
                    ) as reply:
                        if reply.status_code in (401, 402, 403):
                            key = (
                                f" (is {self.provider.key_name} right?)"
                                if self.provider.key_name
                                else ' (is "json" among the formats in its settings.yml?)'
                            )
                            raise ToolFault(
                                f"search by {self.label}: {self.host} refused, HTTP {reply.status_code}{key}"
                            )
                        if reply.status_code == 200:
                            body = b"".join(
                                read_limited(reply.iter_content(65536), MAX_PAGE_BYTES, deadline)
                            )
                            hits = [
                                self.hit(hit)
                                for hit in self.provider.hits(json.loads(body))[: self.k]
                                if isinstance(hit, dict)
                            ]
                            if self.cache:
                                self.cache.put(cache_key, json.dumps(hits))
                            return hits
                        problem = f"HTTP {reply.status_code}"
                        wait = retry_after(reply.headers.get("retry-after"), wait)
                        if 300 <= reply.status_code < 500 and reply.status_code not in (408, 429):
                            break
            except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
                problem = "its answer is not a list of results in JSON"
            except (requests.RequestException, OSError) as error:
                problem = f"cannot be reached, {type(error).__name__}"  # the text of the error may hold the request
            if time.monotonic() + wait > deadline:
                break
            time.sleep(wait)
        raise ToolFault(f"search by {self.label}: {self.host}: {problem}")

    def hit(self, hit: dict) -> dict:
        """A hit in our words: plain text on one line each."""
        title, url, snippet = (hit.get(field) or "" for field in self.provider.fields)
        clean = lambda text, limit: " ".join(
            html.unescape(re.sub(r"</?\w+[^<>]{0,100}>", "", str(text))).split()
        )[:limit]
        return {
            "title": clean(title, 200),
            "url": "".join(str(url).split())[:2000],
            "snippet": clean(snippet, 500),
        }


# -------------------------------------------------------------------------------------------------------------- python


class Python:
    """A stateful Python session in a sandbox (sandbox.py says what it stops and what not); one for each trajectory.

    Args:
        timeout_s: wall-clock limit for one call, in seconds.
        memory_mb: address space of the child, in MiB.
        output_chars: what the policy sees of the output, in characters.
        unsafe: run without the sandbox, with limits on time, memory and output only: for code that you would run yourself.
    """

    name, signature = "python", "python(code)"

    def __init__(
        self,
        timeout_s: float = 5.0,
        memory_mb: int = 1024,
        output_chars: int = 2000,
        unsafe: bool = False,
    ):
        self.timeout_s, self.memory_mb, self.output_chars, self.unsafe = (
            timeout_s,
            memory_mb,
            output_chars,
            unsafe,
        )
        self.process, self.folder, self.code_fd, self.done_fd, self.poll = None, None, -1, -1, None
        self.isolation = ""  # what confines the child, in its own words

    def check(self, arguments: dict) -> str | None:
        good = set(arguments) == {"code"} and isinstance(arguments["code"], str)
        return None if good else "python takes 'code', a string"

    def start(self) -> None:
        """Start the child and wait until it has given up its rights (about 40 ms).

        Raises:
            ToolFault: it cannot be started or confined.
        """
        code_read, code_write = os.pipe()
        done_read, done_write = os.pipe()
        self.code_fd, self.done_fd, self.folder = (
            code_write,
            done_read,
            tempfile.mkdtemp(prefix="nano-python-"),
        )
        settings = {
            "memory": self.memory_mb << 20,
            "packages": sorted({sysconfig.get_path(name) for name in ("purelib", "platlib")}),
            "unsafe": self.unsafe,
            "code": code_read,
            "done": done_write,
        }
        command = [sys.executable, "-I", "-S", str(SANDBOX), json.dumps(settings)]
        environment = {
            "PATH": "/usr/bin:/bin",
            "LANG": "C.UTF-8",
            "HOME": self.folder,
            "TMPDIR": self.folder,
            "OMP_NUM_THREADS": "1",
            "OPENBLAS_NUM_THREADS": "1",
            "MALLOC_ARENA_MAX": "2",
        }
        try:
            # In a thread of its own that never ends: the child dies with the *thread* that started it (PR_SET_PDEATHSIG).
            self.process = STARTER.submit(
                subprocess.Popen,
                command,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                bufsize=0,
                pass_fds=[code_read, done_write],
                start_new_session=True,
                cwd=self.folder,
                env=environment,
            ).result(timeout=30)
        except (OSError, RuntimeError, TimeoutError) as error:
            self.close()
            raise ToolFault(f"python cannot be started ({error})") from None
        finally:
            os.close(code_read)
            os.close(done_write)
        LIVE_SESSIONS.add(self)
        for fd in (self.code_fd, self.done_fd, self.process.stdout.fileno()):
            os.set_blocking(fd, False)
        self.poll = select.poll()  # select.select() cannot do file descriptors above 1023
        self.poll.register(self.done_fd, select.POLLIN)
        ready = self.poll.poll(30_000)
        words = (
            os.read(self.done_fd, 1000).decode().strip()
            if ready
            else "it did not start within 30 s"
        )
        if not words.startswith("ready: "):
            words = (
                words
                or self.process.stdout.read(1000).decode(errors="replace").strip().split("\n")[-1]
            )
            self.close()
            raise ToolFault(f"python cannot be started ({words})")
        self.isolation = words.removeprefix("ready: ")
        self.poll.register(self.process.stdout, select.POLLIN)

    def __call__(self, code: str) -> str:
        for attempt in range(3):
            try:
                if self.process is None:
                    self.start()
                break
            except ToolFault:
                if attempt == 2:
                    raise
                time.sleep(0.1 * 2**attempt)
        try:
            output, problem = self.run(code)
        except OSError:  # a pipe is closed: the child has ended itself
            output, problem = "", "the session died and was restarted, variables are lost"
        if problem:
            self.close()
        output = output.strip()
        if len(output) > self.output_chars:
            output = f"{output[: self.output_chars]} … ({len(output)} characters)"
        return "\n".join(filter(None, (output, problem))) or "(no output)"

    def run(self, code: str) -> tuple[str, str]:
        """Send code to the child and wait until it is done: (output, why the session must end or "").

        Raises:
            OSError: the child has ended.
        """
        lost = "the session was restarted, variables are lost"
        unsent, output, done = json.dumps(code).encode() + b"\n", bytearray(), False
        start = time.monotonic()
        look = start + 0.25
        os.killpg(self.process.pid, signal.SIGCONT)
        self.poll.register(self.code_fd, select.POLLOUT)
        while not done:
            now = time.monotonic()
            if now >= start + self.timeout_s:
                return "", f"timeout after {self.timeout_s:g} s; {lost}"
            if now >= look:
                look = now + 0.25
                if folder_bytes(self.folder) > FOLDER_BYTES:
                    return "", f"more than {FOLDER_BYTES >> 20} MiB in files; {lost}"
            for fd, _ in self.poll.poll(1000 * (min(look, start + self.timeout_s) - now) + 1):
                if fd == self.code_fd:
                    unsent = unsent[os.write(fd, unsent) :]
                    if not unsent:
                        self.poll.unregister(fd)
                elif fd == self.done_fd:
                    done = True
                    if not os.read(fd, 1000):
                        raise BrokenPipeError
                else:
                    self.read_output(output, 1 << 16)
            if len(output) > MAX_OUTPUT_BYTES:
                return output.decode(
                    "utf-8", "replace"
                ), f"more than {MAX_OUTPUT_BYTES} bytes of output; {lost}"
        self.read_output(output, MAX_OUTPUT_BYTES)
        os.killpg(
            self.process.pid, signal.SIGSTOP
        )  # a thread that was left running waits until the next call
        full = folder_bytes(self.folder) > FOLDER_BYTES
        return output.decode("utf-8", "replace").replace(
            "\0", "\ufffd"
        ), f"more than {FOLDER_BYTES >> 20} MiB in files; {lost}" if full else ""

    def read_output(self, output: bytearray, limit: int) -> None:
        """Append what is in the pipe now, up to about `limit` bytes."""
        try:
            for _ in range(0, limit, 1 << 16):
                chunk = os.read(self.process.stdout.fileno(), 1 << 16)
                if not chunk:
                    raise BrokenPipeError
                output += chunk
        except BlockingIOError:
            pass

    def close(self) -> None:
        """Kill the session with everything it started, and remove its folder."""
        if self.process is not None:
            try:
                os.killpg(self.process.pid, signal.SIGKILL)
            except ProcessLookupError:
                pass
            try:
                self.process.wait(timeout=10)
            except subprocess.TimeoutExpired:  # the kernel holds it; it is dead to us
                pass
            self.process.stdout.close()
        for fd in (self.code_fd, self.done_fd):
            if fd >= 0:
                os.close(fd)
        if self.folder:
            try:
                shutil.rmtree(self.folder, ignore_errors=True)
            except RecursionError:
                pass
            if os.path.exists(self.folder):  # nested deeper than rmtree can go
                subprocess.run(["rm", "-rf", self.folder])
        self.process, self.folder, self.code_fd, self.done_fd = None, None, -1, -1
        LIVE_SESSIONS.discard(self)


def folder_bytes(folder: str) -> int:
    """Disk space below a folder (at least 16 KiB an entry: so many files at most), counted until it is too much; what cannot be looked into is too much."""
    total, folders = 0, [folder]
    while folders and total <= FOLDER_BYTES:
        try:
            with os.scandir(folders.pop()) as entries:
                for entry in entries:
                    total += max(16384, 512 * entry.stat(follow_symlinks=False).st_blocks)
                    if entry.is_dir(follow_symlinks=False):
                        folders.append(entry.path)
        except FileNotFoundError:  # removed since
            pass
        except OSError:
            return FOLDER_BYTES + 1
    return total


STARTER = concurrent.futures.ThreadPoolExecutor(1, "python-starter")
LIVE_SESSIONS: set[Python] = set()  # closed at exit, so that no child outlives us


@atexit.register
def close_sessions() -> None:
    for session in list(LIVE_SESSIONS):
        session.close()


# ------------------------------------------------------------------------------------------------------------- toolbox


def urls_in(text: str) -> list[str]:
    """The addresses that stand in a tool result."""
    return list(dict.fromkeys(re.findall(r"https?://[^\s<>\"']+", text)))


class Toolbox:
    """Gives each trajectory its tools: search and browse of its task's world, and a Python session of its own.

    Args:
        corpus: index (data/index.py) for tasks that name no world; "" if there are none.
        live: let browse open public addresses of the real web.
        search_results, page_chars: how much search and browse show.
        search, search_url: "embedded", or a provider of WebSearch and its address; browse then opens the real web as well.
        unsafe_python: run code without the sandbox.

    Raises:
        FileNotFoundError: the corpus has no index.
        ValueError: the provider lacks its key or cannot be reached, or this machine has no sandbox; one line that says what to do.
    """

    def __init__(
        self,
        corpus: str = "",
        live: bool = False,
        search_results: int = 2,
        page_chars: int = 400,
        search: str = "embedded",
        search_url: str = "",
        unsafe_python: bool = False,
    ):
        self.corpus, self.live, self.search_results, self.page_chars = (
            corpus,
            live or search != "embedded",
            search_results,
            page_chars,
        )
        self.shared: dict[str, tuple[Search, Browse]] = {}  # by index file; "" is the web alone
        self.sessions: dict[tuple, Python] = {}  # by trajectory key
        self.unsafe_python = unsafe_python
        if not unsafe_python and (lacks := sandbox.missing()):
            raise ValueError(
                f"no sandbox for the python tool on this machine: {lacks}. --unsafe_python runs the model's code without one"
            )
        self.cache = DiskCache(CACHE) if self.live else None
        self.web_search = None
        if search != "embedded":
            self.web_search = WebSearch(search, search_url, search_results, self.cache)
            self.web_search.probe()
            self.shared[""] = self.web_search, Browse({}, True, page_chars, cache=self.cache)
        if corpus:
            self.open(corpus)

    def isolation(self) -> str:
        """What confines the python tool, in words, from a session that is started for the purpose.

        Raises:
            ValueError: it cannot be started or confined.
        """
        session = Python(unsafe=self.unsafe_python)
        try:
            session.start()
            return session.isolation
        except ToolFault as fault:
            raise ValueError(str(fault)) from None
        finally:
            session.close()

    def open(self, db: Path | str) -> tuple[Search, Browse]:
        """Search and browse over one index, whose pages are served on loopback from the first use on."""
        from data.serve import start_server

        if str(db) not in self.shared:
            server = start_server(db)
            hosts = {server.host: "127.0.0.1:%d" % server.server_address[1]}
            search = self.web_search or Search(db, self.search_results)
            self.shared[str(db)] = (
                search,
                Browse(hosts, self.live, self.page_chars, cache=self.cache),
            )
        return self.shared[str(db)]

    def prepare(self, tasks) -> None:
        """Open (and on first use write) the worlds of these tasks now rather than in the middle of a rollout.

        Raises:
            ValueError: a task names no world and there is no corpus.
        """
        for task in tasks:
            self.index_of(task)

    def index_of(self, task) -> tuple[Search, Browse]:
        from data.world import world_folder

        world = task.meta.get("world")
        if world:
            return self.open(world_folder(world) / "pages.db")
        if not self.corpus and not self.web_search:
            raise ValueError(
                f"task {task.id!r} names no world: give --corpus FILE.db (data/index.py makes one)"
            )
        return self.open(self.corpus) if self.corpus else self.shared[""]

    def tools_for(self, trajectory) -> dict:
        """name -> tool. HACK HERE: add a tool of your own to this dict and its signature to SIGNATURES."""
        search, browse = self.index_of(trajectory.task)
        session = self.sessions.setdefault(trajectory.key, Python(unsafe=self.unsafe_python))
        return {tool.name: tool for tool in (search, browse, session)}

    def close(self, trajectory) -> None:
        """End what belongs to this trajectory alone."""
        if session := self.sessions.pop(trajectory.key, None):
            session.close()

    def close_all(self) -> None:
        for key in list(self.sessions):
            self.sessions.pop(key).close()


SIGNATURES = [tool.signature for tool in (Search, Browse, Python)]
