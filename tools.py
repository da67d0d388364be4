"""The agent's tools, and the parser of its calls.

    search(queries)                    several queries at once; a hit has title, url and snippet
    browse(url, page | find | links)   a page as text over HTTP, a few hundred characters at a time
    python(code)                       a stateful session that the code cannot leave

In: the text of one turn. Out: `parse_action` gives tool calls or an answer, or raises FormatError;
`run_calls` gives the results in call order. What goes wrong is one of three things, and the
difference decides what is rewarded:

    FormatError     the policy's action cannot be read: the trajectory ends and is penalised
    a plain result  what the policy can see and correct: no such page, a traceback of its own code
    ToolFault       the environment failed (a server is down): shown, counted, never punished

Everything that comes from outside (pages, hits, output of code) is hostile: sizes and times are
bounded, and context.py encodes the text so that it cannot contain a control token. A new tool is a
class with `name`, `signature`, `check` and `__call__`, and one line in TOOLS at the end:

    class Clock:
        name, signature = "clock", "clock()"
        def check(self, arguments): return None if not arguments else "clock takes no arguments"
        def __call__(self): return time.strftime("%H:%M")
"""

import atexit
import concurrent.futures
import json
import os
import re
import select
import shutil
import signal
import sqlite3
import subprocess
import sys
import sysconfig
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from data.index import open_index, search_index
from data.serve import start_server
from data.world import world_folder
from support import cpython_sandbox as sandbox
from support.cpython_sandbox import FOLDER_BYTES
from support.html_text import html_to_text, view_page
from support.search_services import WebSearch
from support.web import LiveWeb, Refused, ToolFault, WebReader

CACHE = Path(__file__).resolve().parent / "runs" / "cache"  # of the real web
MAX_CALLS = 8  # in one turn
TAG, SPACE = re.compile("</?(?:think|tool_call)>"), re.compile(r"\s*")
JSON = json.JSONDecoder(parse_constant=int)  # NaN and Infinity are not JSON, and int() refuses them
SANDBOX = Path(__file__).resolve().parent / "support" / "cpython_sandbox.py"
MAX_OUTPUT_BYTES = 1_000_000  # of one python call; more ends the session


class FormatError(Exception):
    """The policy's action is malformed. `kind` is a short code for the metrics."""

    def __init__(self, kind: str, message: str):
        super().__init__(message)
        self.kind = kind


# ------------------------------------------------------------------------------------------ parsing


@dataclass
class ToolCall:
    name: str
    arguments: dict


def parse_tool_calls(text: str) -> list[ToolCall]:
    """The tool calls of one turn, in order. What stands inside <think>…</think> is not called.

    Args:
        text: decoded tokens that the policy sampled; never text from a page or a prompt.

    Raises:
        FormatError: a tag without its partner, bad JSON, no name, arguments that are no object.
    """
    return calls_and_rest(text)[0]


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
    calls, rest = calls_and_rest(text)
    before, *answers = rest.split("<answer>")
    if "</answer>" in before or any(part.count("</answer>") != 1 for part in answers):
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
    return calls, answers[0].split("</answer>")[0].strip() if answers else None


def calls_and_rest(text: str) -> tuple[list[ToolCall], str]:
    """The calls of a turn, and what is left of its text; raises as parse_tool_calls does.

    The text is read once, from left to right. A line break replaces each call and each thought, so
    that the text before it and the text after it cannot join into a tag.
    """
    calls, rest, at = [], [], 0
    while tag := TAG.search(text, at):
        rest.append(text[at : tag.start()])
        if tag.group() == "<tool_call>":
            call, at = read_call(text, tag.end())
            calls.append(call)
        elif tag.group() == "<think>" and (end := text.find("</think>", tag.end())) >= 0:
            at = end + len("</think>")
        else:
            raise FormatError("unclosed_tag", f"a {tag.group()} tag has no partner")
    return calls, "\n".join([*rest, text[at:]])


def read_call(text: str, start: int) -> tuple[ToolCall, int]:
    """The call that stands at `start`, and where its </tool_call> ends.

    Its JSON is read before that tag is looked for, so a tag inside a string is text.
    """
    if text.find("</tool_call>", start) < 0:
        raise FormatError("unclosed_tag", "a <tool_call> tag has no partner")
    try:
        call, end = JSON.raw_decode(text, SPACE.match(text, start).end())
    except (ValueError, RecursionError):
        raise FormatError("bad_json", "a tool call is not valid JSON") from None
    end = SPACE.match(text, end).end()
    if not text.startswith("</tool_call>", end):
        raise FormatError("bad_json", "more than one JSON object in a tool call")
    if not isinstance(call, dict):
        raise FormatError("not_an_object", "a tool call is not a JSON object")
    if not isinstance(call.get("name"), str):
        raise FormatError("missing_name", "a tool call has no name")
    if not isinstance(call.get("arguments", {}), dict):
        raise FormatError("bad_arguments", "the arguments of a tool call are not a JSON object")
    return ToolCall(call["name"], call.get("arguments", {})), end + len("</tool_call>")


def run_calls(calls: list[ToolCall], tools: dict) -> list[tuple[str, bool]]:
    """Run one turn's calls: side by side, or in order if one of the tools is stateful.

    Returns:
        One (text, is_fault) a call, in call order. A fault is the environment's. Nothing is raised.
    """

    def run(call: ToolCall) -> tuple[str, bool]:
        try:
            return str(tools[call.name](**call.arguments)), False
        except ToolFault as fault:
            return f"error: {fault}", True
        except Exception as error:  # a bug in a tool must not end the run, nor count as a mistake
            return f"error: the tool failed ({type(error).__name__})", True

    if len(calls) == 1 or any(getattr(tools[call.name], "stateful", False) for call in calls):
        return [run(call) for call in calls]
    with concurrent.futures.ThreadPoolExecutor(len(calls)) as pool:
        return list(pool.map(run, calls))


# -------------------------------------------------------------------------------- search and browse


class Search:
    """Search: BM25 over an index file (data/index.py), or a service on the web.

    Args:
        db: path of the index; a missing one is reported here.
        k: results a query.
        service: asked instead of the index.
    """

    name, signature = "search", "search(queries: list of str)"

    def __init__(self, db: Path | str, k: int = 2, service: WebSearch | None = None):
        self.db, self.k, self.service, self.look_up = db, k, service, search_index
        self.idle = [] if service else [open_index(db)]  # connections that no thread uses now

    def check(self, arguments: dict) -> str | None:
        queries = arguments.get("queries")
        good = set(arguments) == {"queries"} and isinstance(queries, list) and 0 < len(queries) < 9
        if good and all(isinstance(query, str) for query in queries):
            return None
        return "search takes 'queries', a list of 1 to 8 strings"

    def __call__(self, queries: list[str]) -> str:
        queries = [queries] if isinstance(queries, str) else queries
        blocks = []
        for query, hits in zip(queries, self.find(queries)):
            heading = [f"{query}:"] if len(queries) > 1 else []
            lines = [
                f"[{n}] {hit['title']} {hit['url']}\n{hit['snippet']}"
                for n, hit in enumerate(hits, start=1)
            ]
            blocks.append("\n".join(heading + (lines or ["no results"])))
        return "\n".join(blocks)

    def find(self, queries: list[str]) -> list[list[dict]]:
        """The hits of each query: dicts with title, url, snippet. HACK HERE: another engine.

        Raises:
            ToolFault: the index cannot be read, or the service does not answer.
        """
        if self.service:
            return self.service.find(queries)
        try:
            connection = self.idle.pop()
        except IndexError:
            connection = open_index(self.db)
        try:
            return [self.look_up(connection, query, self.k) for query in queries]
        except sqlite3.Error as error:
            raise ToolFault(f"search failed ({error})") from None
        finally:
            self.idle.append(connection)


class Browse:
    """Browse: one piece of a page, the passages with a word, or its links.

    Args:
        hosts: an /etc/hosts for the embedded world, {"w7.test": "127.0.0.1:8123"}, so that URLs in
            task files do not depend on ports.
        live: let it open public addresses of the real web; or a LiveWeb to share with others.
        page_chars: characters of one piece of a page.
        timeout_s: limit for one page with its redirects and retries, in seconds.

    Raises:
        ValueError: a package that only the live web needs is missing.
    """

    name, signature = "browse", "browse(url, page or find or links)"

    def __init__(
        self,
        hosts: dict[str, str] | None = None,
        live: bool | LiveWeb = False,
        page_chars: int = 400,
        timeout_s: float = 10.0,
    ):
        web = LiveWeb() if live is True else live or None
        self.reader, self.page_chars = WebReader(hosts or {}, web, timeout_s), page_chars

    def check(self, arguments: dict) -> str | None:
        kinds = {"url": str, "page": (int, float), "find": str, "links": bool}
        if not set(arguments) <= set(kinds) or not isinstance(arguments.get("url"), str):
            return "browse takes 'url', a string, and if wanted one of 'page', 'find', 'links'"
        given = {key: value for key, value in arguments.items() if value is not None}
        page = given.get("page", 1)
        for key, value in given.items():
            if not isinstance(value, kinds[key]):
                return f"browse: {key!r} is of the wrong type"
        if isinstance(page, bool) or page % 1 or page < 1:  # True, 2.5, infinity
            return "browse: 'page' counts from 1"
        return None

    def __call__(
        self,
        url: str,
        page: int | None = None,
        find: str | None = None,
        links: bool | None = None,
    ) -> str:
        try:
            read = self.reader.read(url)
        except Refused as error:
            return f"error {error}"
        if not links and read.text is None:
            read.text = html_to_text(read.html)
        where = read.url if links else url
        return view_page(read.html, where, int(page or 1), find, links, self.page_chars, read.text)


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


# ------------------------------------------------------------------------------------------ toolbox


def urls_in(text: str) -> list[str]:
    """The addresses that stand in a tool result."""
    return list(dict.fromkeys(re.findall(r"https?://[^\s<>\"']+", text)))


class Toolbox:
    """Gives each trajectory its tools: search and browse of its task's world, and its own Python.

    Args:
        corpus: index (data/index.py) for tasks that name no world; "" if there are none.
        live: let browse open public addresses of the real web.
        search_results, page_chars: how much search and browse show.
        search, search_url: "embedded", or a search service of the web (support/search_services.py)
            and its address; browse then opens the real web as well.
        unsafe_python: run code without the sandbox.

    Raises:
        FileNotFoundError: the corpus has no index.
        ValueError: one line that says what to do: a service lacks its key or cannot be reached, a
            package is missing, or this machine has no sandbox.
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
        self.corpus, self.search_results, self.page_chars = corpus, search_results, page_chars
        self.shared: dict[str, tuple[Search, Browse]] = {}  # by index file; "" is the web alone
        self.sessions: dict[tuple, Python] = {}  # by trajectory key
        self.unsafe_python = unsafe_python
        if not unsafe_python and (lacks := sandbox.missing()):
            raise ValueError(
                f"no sandbox for the python tool on this machine: {lacks}. --unsafe_python runs the model's code without one"
            )
        self.others = [tool() for tool in TOOLS if tool not in (Search, Browse, Python)]
        self.service = None
        if search != "embedded":
            self.service = WebSearch(search, search_url, search_results, CACHE / "search")
            self.service.probe()
        self.web = LiveWeb(CACHE / "pages") if live or self.service else None
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
        """Search and browse over one index, whose pages are served here; "" is the web alone."""
        if str(db) not in self.shared:
            hosts = {}
            if db:
                server = start_server(db)
                hosts = {server.host: "127.0.0.1:%d" % server.server_address[1]}
            search = Search(db, self.search_results, self.service)
            self.shared[str(db)] = search, Browse(hosts, self.web or False, self.page_chars)
        return self.shared[str(db)]

    def prepare(self, tasks) -> None:
        """Open (and on first use write) the worlds of these tasks before the first rollout.

        Raises:
            ValueError: a task names no world and there is no corpus.
        """
        for task in tasks:
            self.index_of(task)

    def index_of(self, task) -> tuple[Search, Browse]:
        world = task.meta.get("world")
        if world:
            return self.open(world_folder(world) / "pages.db")
        if not self.corpus and not self.service:
            raise ValueError(
                f"task {task.id!r} names no world: give --corpus FILE.db (data/index.py makes one)"
            )
        return self.open(self.corpus)

    def tools_for(self, trajectory) -> dict:
        """name -> tool, in the order of TOOLS."""
        search, browse = self.index_of(trajectory.task)
        session = self.sessions.setdefault(trajectory.key, Python(unsafe=self.unsafe_python))
        made = {tool.name: tool for tool in (search, browse, session, *self.others)}
        return {tool.name: made[tool.name] for tool in TOOLS}

    def close(self, trajectory) -> None:
        """End what belongs to this trajectory alone."""
        if session := self.sessions.pop(trajectory.key, None):
            session.close()

    def close_all(self) -> None:
        for key in list(self.sessions):
            self.sessions.pop(key).close()


Python.stateful = True  # its calls run in the order they stand in, never side by side

# HACK HERE: a tool of your own is one more class in this list; it is made without arguments, once
# for all trajectories. Search, Browse and Python are made by Toolbox.
TOOLS = [Search, Browse, Python]


def signatures() -> list[str]:
    """The tools as the prompt declares them."""
    return [tool.signature for tool in TOOLS]
