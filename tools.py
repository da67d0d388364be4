"""The agent's tools, and the parser of its calls.

    search(queries)                    several queries at once; a hit has title, url and snippet
    browse(url, page | find | links)   a page as text over HTTP, a few hundred characters at a time
    python(code)                       a stateful session that the code cannot leave

In: the text of one turn. Out: `parse_action` gives tool calls or an answer, or raises FormatError;
`run_calls` gives the results in call order. What goes wrong is one of three things, and the
difference decides what is rewarded:

    FormatError     the action cannot be read, or is no call of a tool: the trajectory is penalised
    a plain result  what the policy can see and correct: no such page, a traceback of its own code
    ToolFault       the environment failed (a server is down): shown, counted, never punished

Everything that comes from outside (pages, hits, output of code) is hostile: sizes and times are
bounded, and context.py encodes the text so that it cannot contain a control token. A new tool is a
class with `name`, `signature`, `check` and `__call__`, and one line in TOOLS at the end:

    class Dice:
        name, signature = "dice", "dice(sides)"
        def check(self, arguments):  # what is wrong with them, or None
            good = set(arguments) == {"sides"} and arguments["sides"] in (6, 20)
            return None if good else "dice takes 'sides', 6 or 20"
        def __call__(self, sides):  # several threads may call it at once
            return str(random.randint(1, sides))
"""

import json
import re
import sqlite3
from dataclasses import dataclass
from pathlib import Path

from data.index import Index
from support.html_text import html_to_text, view_page
from support.monty_session import MontyError, run_code, shown
from support.search_services import WebSearch
from support.threads import in_thread
from support.web import LiveWeb, Refused, ToolFault, WebReader

MAX_CALLS = 8  # in one turn
TAG, SPACE = re.compile("</?(?:think|tool_call)>"), re.compile(r"\s*")
JSON = json.JSONDecoder(parse_constant=int)  # NaN and Infinity are not JSON, and int() refuses them


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
        try:
            problem = tools[call.name].check(call.arguments)
        except Exception as error:  # a bug in a tool must not end the run
            problem = f"{call.name} cannot read its arguments ({type(error).__name__})"
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

    Its JSON is read to its end first, so a tag inside a string is text.
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
    return [future.result() for future in [in_thread(run, call) for call in calls]]


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
        self.k, self.service = k, service
        self.index = None if service else Index(db)

    def check(self, arguments: dict) -> str | None:
        queries = arguments.get("queries")
        good = set(arguments) == {"queries"} and isinstance(queries, list) and 0 < len(queries) < 9
        if good and all(isinstance(query, str) for query in queries):
            return None
        return "search takes 'queries', a list of 1 to 8 strings"

    def __call__(self, queries: list[str]) -> str:
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
            return self.index.hits(queries, self.k)
        except sqlite3.Error as error:
            raise ToolFault(f"search failed ({error})") from None


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
            return "browse takes 'url', a string, and if wanted 'page', 'find' or 'links'"
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
        where = read.url if links else url  # links are relative to where redirects have led
        return view_page(read.html, where, int(page or 1), find, links, self.page_chars, read.text)


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


# ------------------------------------------------------------------------------------------ toolbox


def urls_in(text: str) -> list[str]:
    """The addresses that stand in a tool result."""
    return list(dict.fromkeys(re.findall(r"https?://[^\s<>\"']+", text)))


# HACK HERE: a tool of your own is one more class in this list. It is made once, without arguments,
# for all trajectories; support/toolbox.py makes Search, Browse and Python.
TOOLS = [Search, Browse, Python]


def signatures() -> list[str]:
    """The tools as the prompt declares them."""
    return [tool.signature for tool in TOOLS]
