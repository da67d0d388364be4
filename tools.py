"""The agent's tools, and the parser of its calls.

    search(queries)                    several queries at once; each hit has title, url and snippet
    browse(url, page | find | links)   a page as text over HTTP, a few hundred characters at a time
    python(code)                       a stateful session, run by Monty, which has no system calls

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

import concurrent.futures
import html
import json
import os
import re
import socket
import sqlite3
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

import requests

from support.monty_session import MontyError, run_code, shown
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
    """A stateful Python session, run by Monty; support/monty_session.py says what confines it.

    A session is a snapshot in `memory["python"]`, so it has no process and need not be closed. The
    memory of a trajectory travels with it, and the session goes on wherever the trajectory does.

    Args:
        memory: a trajectory's `memory`; None for a session of its own.
        timeout_s: limit for one call, in seconds of computing; as much again may be slept.
        memory_mb: limit for the interpreter's heap, in MiB.
        output_chars: what the policy sees of the output, in characters.
    """

    name, signature = "python", "python(code)"
    stateful = True  # the calls of a turn run in order

    def __init__(
        self,
        memory: dict | None = None,
        timeout_s: float = 5.0,
        memory_mb: int = 256,
        output_chars: int = 2000,
    ):
        self.memory = {} if memory is None else memory
        self.timeout_s, self.memory_mb, self.output_chars = timeout_s, memory_mb, output_chars

    def check(self, arguments: dict) -> str | None:
        good = set(arguments) == {"code"} and isinstance(arguments["code"], str)
        return None if good else "python takes 'code', a string"

    def __call__(self, code: str) -> str:
        """Run code.

        Returns:
            What it printed, then the value of its last expression as Python's prompt shows it, or
            the error.

        Raises:
            ToolFault: the interpreter cannot be started.
        """
        snapshot = self.memory.get("python", b"")
        try:
            output, problem, snapshot = run_code(code, snapshot, self.timeout_s, self.memory_mb)
        except (OSError, RuntimeError, MontyError) as error:
            raise ToolFault(f"python cannot be started ({error})") from None
        self.memory["python"] = snapshot
        return shown(output, problem, self.output_chars)


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
        unsafe_python: with python="cpython", run code without the sandbox.
        python: "monty", or on Linux "cpython", the whole language (support/cpython_sandbox.py).

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
        python: str = "monty",
    ):
        self.corpus, self.live, self.search_results, self.page_chars = (
            corpus,
            live or search != "embedded",
            search_results,
            page_chars,
        )
        self.shared: dict[str, tuple[Search, Browse]] = {}  # by index file; "" is the web alone
        self.sessions: dict[tuple, object] = {}  # of CPython, by trajectory key
        self.unsafe_python, self.cpython = unsafe_python, None
        if python == "cpython":
            from support import cpython_sandbox  # for Linux alone, so it is read where it is chosen

            if not unsafe_python and (lacks := cpython_sandbox.missing()):
                raise ValueError(
                    f"--python cpython has no sandbox on this machine: {lacks}. --python monty"
                    " needs none; --unsafe_python runs the model's code without one"
                )
            self.cpython = cpython_sandbox.CPythonSession
        self.cache = DiskCache(CACHE) if self.live else None
        self.web_search = None
        if search != "embedded":
            self.web_search = WebSearch(search, search_url, search_results, self.cache)
            self.web_search.probe()
            self.shared[""] = self.web_search, Browse({}, True, page_chars, cache=self.cache)
        if corpus:
            self.open(corpus)

    def isolation(self) -> str:
        """What confines the python tool, in words; of CPython a session is started to tell.

        Raises:
            ValueError: it cannot be started or confined.
        """
        if self.cpython is None:
            return "Monty, an interpreter without system calls"
        session = self.cpython(unsafe=self.unsafe_python)
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
        return {tool.name: tool for tool in (search, browse, self.python_for(trajectory))}

    def python_for(self, trajectory):
        """The trajectory's session; that of CPython is begun anew if it was continued elsewhere."""
        if self.cpython is None:
            return Python(trajectory.memory)
        session = self.sessions.get(trajectory.key)
        if session is None or session.memory is not trajectory.memory:
            self.close(trajectory)
            session = self.cpython(trajectory.memory, unsafe=self.unsafe_python)
            self.sessions[trajectory.key] = session
        return session

    def close(self, trajectory) -> None:
        """End the trajectory's process, if it has one; its memory stays."""
        if session := self.sessions.pop(trajectory.key, None):
            session.close()

    def close_all(self) -> None:
        for key in list(self.sessions):
            self.sessions.pop(key).close()


TOOLS = [Search, Browse, Python]


def signatures() -> list[str]:
    return [tool.signature for tool in TOOLS]
