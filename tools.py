"""The agent's tools, the parser of its calls, and the sandbox its code runs in.

    search(queries)                    several queries at once; each hit has title, url and snippet
    browse(url, page | find | links)   a page as text over HTTP, a few hundred characters at a time
    python(code)                       a stateful session in a process of its own

In: the text of one turn. Out: `parse_action` gives tool calls or an answer, or raises FormatError (the policy's mistake);
`run_calls` gives the results in call order and says which failed through no fault of the policy (ToolFault).
A new tool is one class with `name`, `signature`, `check` and `__call__`:

    class Clock:
        name, signature = "clock", "clock()"
        def check(self, arguments): return None if not arguments else "clock takes no arguments"
        def __call__(self): return time.strftime("%H:%M")
"""

import atexit
import collections
import concurrent.futures
import ipaddress
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
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urljoin, urlsplit

import html2text
import requests

MAX_PAGE_BYTES = 2_000_000
MAX_CALLS = 8  # in one turn


class ToolFault(Exception):
    """The environment failed (time-out, HTTP 500): shown to the policy, counted, never punished."""


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
    if outside_calls.count("<answer>") != len(answers) or outside_calls.count("</answer>") != len(answers):
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
        except Exception as error:  # a bug in a tool must not end the run, and is not the policy's fault
            return f"error: the tool failed ({type(error).__name__})", True

    if len(calls) == 1 or any(call.name == "python" for call in calls):  # a session runs its code in order
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
        from data.index import open_index
        self.db, self.k, self.local = db, k, threading.local()
        open_index(db).close()  # a missing index is reported here, not in a thread

    def check(self, arguments: dict) -> str | None:
        queries = arguments.get("queries")
        if set(arguments) != {"queries"} or not isinstance(queries, list) or not 1 <= len(queries) <= 8:
            return "search takes 'queries', a list of 1 to 8 strings"
        return None if all(isinstance(query, str) for query in queries) else "search takes 'queries', a list of strings"

    def __call__(self, queries: list[str]) -> str:
        from data.index import open_index, search_index
        if not hasattr(self.local, "connection"):  # an SQLite connection belongs to one thread
            self.local.connection = open_index(self.db)
        queries = [queries] if isinstance(queries, str) else queries
        blocks = []
        for query in queries:
            try:
                hits = search_index(self.local.connection, query, self.k)
            except sqlite3.Error as error:
                raise ToolFault(f"search failed ({error})") from None
            lines = [f"[{n}] {hit['title']} {hit['url']}\n{hit['snippet']}" for n, hit in enumerate(hits, start=1)]
            heading = [f"{query}:"] if len(queries) > 1 else []
            blocks.append("\n".join(heading + (lines or ["no results"])))
        return "\n".join(blocks)


# -------------------------------------------------------------------------------------------------------------- browse

def html_to_text(page: str) -> str:
    """HTML as compact plain text: one line a paragraph, `a | b` for a table row, no links, no pictures, no scripts."""
    converter = html2text.HTML2Text(bodywidth=0)
    converter.ignore_links = converter.ignore_images = converter.ignore_emphasis = True
    page = re.sub(r"(?is)<(script|style|title)\b.*?</\1>", " ", page)
    # Where a page marks its main part, the menus around it are left out, and so are the paragraph signs beside headings.
    if main := re.search(r"""(?i)<main\b|<[a-z]+\b[^>]*\srole=["']?main\b""", page):
        page = re.split(r"(?i)</main>|<footer\b|<div class=\"(?:sphinxsidebar|related|footer)\"", page[main.start():], maxsplit=1)[0]
    page = re.sub(r"""(?is)<a\s[^>]*class=["']?headerlink\b.*?</a>""", "", page)
    try:
        text = converter.handle(page)
    except Exception:  # html2text recurses and has bugs on hostile pages: fall back to dropping the tags
        text = re.sub(r"<[^>]*>", " ", page)
    lines = (line.strip() for line in text.splitlines())
    return "\n".join(line for line in lines if line and not re.fullmatch(r"[-| :]+", line))


def split_pages(text: str, page_chars: int) -> list[str]:
    """Cut text into pieces of at most `page_chars` characters, at line ends or sentence ends where there are any."""
    pages, rest = [], text
    while len(rest) > page_chars:
        cut = max(rest.rfind("\n", 0, page_chars), rest.rfind(". ", 0, page_chars) + 1)
        cut = cut if cut > page_chars // 2 else page_chars
        pages.append(rest[:cut].strip())
        rest = rest[cut:].lstrip()
    return pages + [rest]


def view_page(page: str, url: str, page_number: int = 1, find: str | None = None, links: bool = False, page_chars: int = 400) -> str:
    """What the policy sees of a page: one piece of its text, the passages with a word, or its links.

    Args:
        page: HTML.
        url: address of the page, to complete relative links and to head the text.
        page_number: which piece, from 1.
        find: show only lines and sentences that contain this, ignoring case, each with the number of its piece.
        links: show numbered links instead of text.
        page_chars: size of a piece in characters.
    """
    if links:
        found = re.findall(r'(?is)<a\s[^>]*?href="([^"]*)"[^>]*>(.*?)</a>', page)
        unique = dict.fromkeys((urljoin(url, href), " ".join(re.sub(r"<[^>]*>", "", label).split())) for href, label in found)
        text = "\n".join(f"[{n}] {label} {href}" for n, (href, label) in enumerate(unique, start=1)) or "no links"
    else:
        text = html_to_text(page)
    pieces = split_pages(text, page_chars)
    if find:
        passages = []
        for number, piece in enumerate(pieces, start=1):
            for passage in re.split(r"\n|(?<=\.) ", piece):
                if find.casefold() in passage.casefold():
                    passages.append(f"p{number}: {passage.strip()}")
        return "\n".join(passages)[:page_chars] or "Not found."
    if page_number > len(pieces):
        return f"{url} has only {len(pieces)} pages"
    return f"{url} (page {page_number} of {len(pieces)})\n{pieces[page_number - 1]}"


class Browse:
    """Reads web pages over HTTP.

    Args:
        hosts: an /etc/hosts for the embedded world: {"w7.test": "127.0.0.1:8123"}. URLs in task files do not depend on ports.
        live: allow public addresses of the real web too.
        page_chars: characters of one piece of a page.
        timeout_s: limit for one request, in seconds.
    """
    name, signature = "browse", "browse(url, page or find or links)"

    def __init__(self, hosts: dict[str, str] | None = None, live: bool = False, page_chars: int = 400, timeout_s: float = 10.0):
        self.hosts, self.live, self.page_chars, self.timeout_s = hosts or {}, live, page_chars, timeout_s
        self.local, self.cache, self.lock = threading.local(), collections.OrderedDict(), threading.Lock()

    def check(self, arguments: dict) -> str | None:
        kinds = {"url": str, "page": int, "find": str, "links": bool}
        unknown = set(arguments) - set(kinds)
        if unknown or "url" not in arguments:
            return "browse takes 'url' and, if wanted, one of 'page', 'find', 'links'"
        for key, value in arguments.items():
            if not isinstance(value, kinds[key]) or (kinds[key] is int and isinstance(value, bool)):
                return f"browse: {key!r} must be of type {kinds[key].__name__}"
        return None if arguments.get("page", 1) >= 1 else "browse: 'page' counts from 1"

    def __call__(self, url: str, page: int = 1, find: str | None = None, links: bool = False) -> str:
        with self.lock:
            html = self.cache.get(url)
        if html is None:
            html = self.fetch(url)
            if html.startswith("error "):
                return html
            with self.lock:
                self.cache[url] = html
                if len(self.cache) > 512:
                    self.cache.popitem(last=False)
        return view_page(html, url, page, find, links, self.page_chars)

    def address(self, url: str) -> tuple[str, dict]:
        """Where to send the request and with which headers; raises ValueError with a text for the policy if not allowed."""
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname or parts.username or parts.password:
            raise ValueError("only http and https addresses without a user name can be opened")
        if parts.hostname in self.hosts:
            return parts._replace(scheme="http", netloc=self.hosts[parts.hostname]).geturl(), {"Host": parts.hostname}
        if not self.live:
            raise ValueError("no such site")
        # A first guard: every address of the name must be public. Pinning the connection to the checked address is the
        # next step of hardening (SSRF by DNS rebinding is not stopped here).
        for *_, sockaddr in socket.getaddrinfo(parts.hostname, parts.port or 443, proto=socket.IPPROTO_TCP):
            ip = ipaddress.ip_address(sockaddr[0].split("%")[0])
            if not ip.is_global or ip.is_multicast or ip.is_reserved:
                raise ValueError("this address is not public")
        return url, {}

    def fetch(self, url: str) -> str:
        """The HTML (or text) at a URL, or a line that begins with "error " for what the policy got wrong.

        Raises:
            ToolFault: the server cannot be reached or answers with a 5xx, after three tries.
        """
        if not hasattr(self.local, "session"):
            self.local.session = requests.Session()
            self.local.session.trust_env = False  # no proxies, no ~/.netrc
        for attempt in range(3):
            try:
                target = url
                for _ in range(5):  # redirects are followed by hand: each hop is checked
                    address, headers = self.address(target)
                    headers["User-Agent"] = "nano-researcher"
                    with self.local.session.get(address, headers=headers, timeout=self.timeout_s, allow_redirects=False, stream=True) as reply:
                        if reply.is_redirect:
                            target = urljoin(target, reply.headers["location"])
                            continue
                        if reply.status_code >= 500:
                            raise requests.ConnectionError(f"HTTP {reply.status_code}")
                        if reply.status_code >= 400:
                            return f"error {reply.status_code} for {url}"
                        kind = reply.headers.get("content-type", "text/html").split(";")[0].strip().lower()
                        if not (kind.startswith("text/") or kind in ("application/xhtml+xml", "application/json", "application/xml")):
                            return f"error {url} is not a text page ({kind})"
                        body = b""
                        for chunk in reply.iter_content(65536):
                            body += chunk
                            if len(body) > MAX_PAGE_BYTES:
                                break
                        return body[:MAX_PAGE_BYTES].decode(reply.encoding or "utf-8", "replace")
                return f"error too many redirects for {url}"
            except ValueError as error:  # includes requests' InvalidURL: the policy's own address
                return f"error {error}: {url}"
            except (OSError, requests.RequestException, LookupError) as error:
                if attempt == 2:
                    raise ToolFault(f"{url} cannot be reached ({type(error).__name__})") from None
                time.sleep(0.1 * 2**attempt)
        raise AssertionError("unreachable")


# -------------------------------------------------------------------------------------------------------------- python

# What runs in the child: limits first, then one JSON line in, one JSON line out. `-S` keeps the start short (no site
# module); site-packages come last on the path so that numpy can be imported where it is installed.
WORKER = r"""
import ast, ctypes, io, json, os, resource, signal, sys, traceback
memory, cpu_s, packages, out_fd = json.loads(sys.argv[1])
os.umask(0o077)
for limit, value in ((resource.RLIMIT_CORE, 0), (resource.RLIMIT_AS, memory), (resource.RLIMIT_CPU, cpu_s),
                     (resource.RLIMIT_FSIZE, 16 << 20), (resource.RLIMIT_NOFILE, 64)):
    try: resource.setrlimit(limit, (value, value))
    except (ValueError, OSError): pass
if sys.platform == "linux":
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # die with the parent
sys.path.append(packages)
space = {"__name__": "__main__"}
for line in sys.stdin:
    sys.stdout = sys.stderr = out = io.StringIO()
    try:
        tree = ast.parse(json.loads(line))
        last = tree.body.pop() if tree.body and isinstance(tree.body[-1], ast.Expr) else None
        exec(compile(tree, "<code>", "exec"), space)
        if last is not None:
            value = eval(compile(ast.Expression(last.value), "<code>", "eval"), space)
            if value is not None: print(repr(value))
    except BaseException as error:
        print("".join(traceback.format_exception_only(error)).strip())
    with os.fdopen(os.dup(out_fd), "w", encoding="utf-8", errors="replace") as reply:
        reply.write(json.dumps(out.getvalue()[:200000]) + "\n")
"""


class Python:
    """A stateful Python session in a child process with limits; one for each trajectory.

    It stops accidents (loops, memory, output), not a determined attacker: the code can still read files and open sockets.

    Args:
        timeout_s: wall-clock limit for one call, in seconds.
        memory_mb: address space of the child, in MiB.
        output_chars: what the policy sees of the output, in characters.
    """
    name, signature = "python", "python(code)"

    def __init__(self, timeout_s: float = 5.0, memory_mb: int = 1024, output_chars: int = 2000):
        self.timeout_s, self.memory_mb, self.output_chars = timeout_s, memory_mb, output_chars
        self.process, self.replies, self.folder = None, None, None

    def check(self, arguments: dict) -> str | None:
        good = set(arguments) == {"code"} and isinstance(arguments["code"], str)
        return None if good else "python takes 'code', a string"

    def start(self) -> None:
        self.folder = tempfile.mkdtemp(prefix="nano-python-")
        read_fd, write_fd = os.pipe()
        limits = json.dumps([self.memory_mb << 20, 600, sysconfig.get_path("purelib"), write_fd])
        try:
            self.process = subprocess.Popen(
                [sys.executable, "-I", "-S", "-c", WORKER, limits], stdin=subprocess.PIPE, stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL, pass_fds=[write_fd], start_new_session=True, cwd=self.folder,
                env={"PATH": "/usr/bin:/bin", "LANG": "C.UTF-8", "HOME": self.folder, "OMP_NUM_THREADS": "1"})
        finally:
            os.close(write_fd)
        self.replies = os.fdopen(read_fd, "rb")
        LIVE_SESSIONS.add(self)

    def __call__(self, code: str) -> str:
        if self.process is None:
            self.start()
        try:
            self.process.stdin.write(json.dumps(code).encode() + b"\n")
            self.process.stdin.flush()
            reply, deadline = b"", time.monotonic() + self.timeout_s
            while not reply.endswith(b"\n"):
                ready, _, _ = select.select([self.replies], [], [], max(0.0, deadline - time.monotonic()))
                if not ready:
                    self.close()
                    return f"timeout after {self.timeout_s:g} s; the session was restarted, variables are lost"
                chunk = os.read(self.replies.fileno(), 65536)
                if not chunk:
                    raise BrokenPipeError
                reply += chunk
        except (BrokenPipeError, OSError):
            self.close()
            return "the session died and was restarted, variables are lost"
        output = json.loads(reply).strip()
        if len(output) > self.output_chars:
            output = f"{output[:self.output_chars]} … ({len(output)} characters)"
        return output or "(no output)"

    def close(self) -> None:
        """Kill the session with everything it started, and remove its folder."""
        if self.process is not None:
            try:
                os.killpg(self.process.pid, signal.SIGKILL)
            except ProcessLookupError:
                pass
            self.process.stdin.close()
            self.process.wait()
            self.replies.close()
            shutil.rmtree(self.folder, ignore_errors=True)
            self.process = None
            LIVE_SESSIONS.discard(self)


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

    Raises:
        FileNotFoundError: the corpus has no index.
    """

    def __init__(self, corpus: str = "", live: bool = False, search_results: int = 2, page_chars: int = 400):
        self.corpus, self.live, self.search_results, self.page_chars = corpus, live, search_results, page_chars
        self.shared: dict[str, tuple[Search, Browse]] = {}  # by index file
        self.sessions: dict[tuple, Python] = {}  # by trajectory key
        if corpus:
            self.open(corpus)

    def open(self, db: Path | str) -> tuple[Search, Browse]:
        """Search and browse over one index, whose pages are served on loopback from the first use on."""
        from data.serve import start_server
        if str(db) not in self.shared:
            server = start_server(db)
            hosts = {server.host: "127.0.0.1:%d" % server.server_address[1]}
            self.shared[str(db)] = (Search(db, self.search_results), Browse(hosts, self.live, self.page_chars))
        return self.shared[str(db)]

    def prepare(self, tasks) -> None:
        """Open (and on first use write) the worlds of these tasks now rather than in the middle of a rollout.

        Raises:
            ValueError: a task names no world and there is no corpus.
        """
        for task in tasks:
            self.index_of(task)

    def index_of(self, task) -> tuple[Search, Browse]:
        from data.tasks import world_folder
        world = task.meta.get("world")
        if world:
            return self.open(world_folder(world) / "pages.db")
        if not self.corpus:
            raise ValueError(f"task {task.id!r} names no world: give --corpus FILE.db (data/index.py makes one)")
        return self.open(self.corpus)

    def tools_for(self, trajectory) -> dict:
        """name -> tool. HACK HERE: add a tool of your own to this dict and its signature to SIGNATURES."""
        search, browse = self.index_of(trajectory.task)
        session = self.sessions.setdefault(trajectory.key, Python())
        return {tool.name: tool for tool in (search, browse, session)}

    def close(self, trajectory) -> None:
        """End what belongs to this trajectory alone."""
        if session := self.sessions.pop(trajectory.key, None):
            session.close()

    def close_all(self) -> None:
        for key in list(self.sessions):
            self.sessions.pop(key).close()


SIGNATURES = [tool.signature for tool in (Search, Browse, Python)]
