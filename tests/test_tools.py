import json
import os
import pickle
import random
import re
import threading
import time
from dataclasses import replace

import pytest

import tools
from context import Trajectory
from data.world import load_world
from rollout import RolloutArgs
from support import cpython_sandbox
from support.html_text import html_to_text, split_pages, view_page
from support.toolbox import Toolbox, open_index_tools
from tools import (
    MAX_CALLS,
    Browse,
    FormatError,
    Python,
    Search,
    ToolCall,
    ToolFault,
    parse_action,
    parse_tool_calls,
    run_calls,
)

GOOD = '<tool_call>{"name": "search", "arguments": {"queries": ["a"]}}</tool_call>'


class Echo:
    name, signature = "search", "search(queries)"

    def check(self, arguments):
        return None if set(arguments) == {"queries"} else "search takes 'queries'"

    def __call__(self, queries):
        time.sleep(float(queries[0]))
        return queries[0]


def test_parse_tool_calls():
    assert (
        parse_tool_calls(f"<think>x {GOOD}</think>{GOOD}{GOOD}")
        == [ToolCall("search", {"queries": ["a"]})] * 2
    )
    assert parse_tool_calls("nothing") == []


@pytest.mark.parametrize(
    "text, kind",
    [
        ("hello", "no_action"),
        ("", "no_action"),
        (GOOD + "<answer>a</answer>", "call_and_answer"),
        ("<answer>a</answer><answer>b</answer>", "two_answers"),
        ("<tool_call>{}", "unclosed_tag"),
        ("<answer>a", "unclosed_tag"),
        ("<think>never closed " + GOOD, "unclosed_tag"),
        ("<tool_call>{not json}</tool_call>", "bad_json"),
        ("<tool_call>[1]</tool_call>", "not_an_object"),
        ('<tool_call>{"arguments": {}}</tool_call>', "missing_name"),
        ('<tool_call>{"name": "search", "arguments": [1]}</tool_call>', "bad_arguments"),
        ('<tool_call>{"name": "rm", "arguments": {}}</tool_call>', "unknown_tool"),
        ('<tool_call>{"name": "search", "arguments": {"q": 1}}</tool_call>', "bad_arguments"),
        (GOOD * (MAX_CALLS + 1), "too_many_calls"),
        ("<tool_call>" + "[" * 100000 + "</tool_call>", "bad_json"),
    ],
)
def test_format_error_kinds(text, kind):
    with pytest.raises(FormatError) as error:
        parse_action(text, {"search": Echo()})
    assert error.value.kind == kind


def test_tags_inside_a_string_are_text():
    code = "print('</tool_call>', '<think>a</think>', '<tool_call>')"
    call = {"name": "search", "arguments": {"queries": [code]}}
    text = f"<think>I write <tool_call></think><tool_call>\n{json.dumps(call)} </tool_call>"
    assert parse_tool_calls(text) == [ToolCall("search", {"queries": [code]})]
    assert parse_action(text, {"search": Echo()})[0][0].arguments["queries"] == [code]


@pytest.mark.parametrize("tag", ["<tool_call>", "</tool_call>", "<answer>", "<think>", "</think>"])
def test_what_is_taken_out_joins_nothing(tag):
    """A tag that was never sampled whole does not arise where a thought or a call was."""
    for middle in ("<think></think>", GOOD):
        for at in range(1, len(tag)):
            text = tag[:at] + middle + tag[at:]
            assert len(parse_tool_calls(text)) == (middle == GOOD)
            try:
                assert parse_action(text, {"search": Echo()})[1] is None
            except FormatError as error:
                assert error.kind == "no_action"
    assert parse_action("<answer>Be<think>x</think>lin</answer>", {})[1] == "Be\nlin"


@pytest.mark.parametrize(
    "shape",
    [
        "<think>",
        "</think>",
        "<think></think>",
        "<think>x",
        "<tool_call>",
        "<tool_call>{}",
        "<tool_call>{}</tool_call>",
        GOOD,
        "<answer>",
        "</answer>",
        "<answer>x</answer>",
        "<",
        '<tool_call>{"name": "',
        "<tool_call>" + " " * 1000,
        "<tool_call>[",
        "<tool_call>" + "[" * 1_000_000,
        '<tool_call>{"name": "' + "<think>" * 140_000,
        "<tool_call>" + "9" * 1_000_000 + "</tool_call>",
    ],
)
def test_a_hostile_turn_takes_linear_time(shape):
    text = (shape * (1_000_000 // len(shape) + 1))[:1_000_000]
    started = time.process_time()
    for parse in (parse_tool_calls, lambda text: parse_action(text, {"search": Echo()})):
        try:
            parse(text)
        except FormatError as error:
            assert len(str(error)) < 200
    assert time.process_time() - started < 3  # what is quadratic takes a minute


def test_arguments_that_are_null_or_whole_numbers():
    browse = Browse()
    for arguments, good in (
        ({"url": "u", "page": 1, "find": None}, True),
        ({"url": "u", "page": None, "find": None, "links": None}, True),
        ({"url": "u", "page": 2.0}, True),
        ({"url": "u", "page": 2.5}, False),
        ({"url": "u", "page": 0}, False),
        ({"url": "u", "page": True}, False),
        ({"url": "u", "page": 1e999}, False),
        ({"url": "u", "page": "2"}, False),
        ({"url": "u", "links": 1}, False),
        ({"url": None}, False),
        ({"url": "u", "other": None}, False),
        ({}, False),
    ):
        assert (browse.check(arguments) is None) == good, arguments


def test_calls_of_a_stateful_tool_run_in_order():
    running, seen = [], []

    class Stateful(Echo):
        stateful = True

        def __call__(self, queries):
            running.append(queries[0])
            time.sleep(0.05)
            seen.append(len(running))
            running.remove(queries[0])
            return queries[0]

    calls = [ToolCall("search", {"queries": [n]}) for n in "abc"]
    assert [text for text, _ in run_calls(calls, {"search": Stateful()})] == list("abc")
    assert seen == [1, 1, 1]


def test_a_tool_is_added_in_one_line(monkeypatch, world_dir):
    from data.task import Task

    class Clock:
        name, signature = "clock", "clock()"

        def check(self, arguments):
            return None if not arguments else "clock takes no arguments"

        def __call__(self):
            return "12:00"

    monkeypatch.setattr("tools.TOOLS", [*tools.TOOLS, Clock])
    assert tools.signatures()[-1] == "clock()" and len(tools.signatures()) == 4
    toolbox = Toolbox(RolloutArgs(corpus=str(world_dir / "pages.db")))
    mine = toolbox.tools_for(Trajectory(Task("t", "q", "a"), (0,)))
    assert list(mine) == ["search", "browse", "python", "clock"]
    calls, _ = parse_action('<tool_call>{"name": "clock", "arguments": {}}</tool_call>', mine)
    assert run_calls(calls, mine) == [("12:00", False)]
    toolbox.close_all()


def test_answer_is_read():
    assert parse_action("<think>so</think><answer> Belin </answer>", {}) == ([], "Belin")


def test_results_come_back_in_call_order():
    calls = [ToolCall("search", {"queries": [delay]}) for delay in ("0.2", "0.0", "0.1")]
    assert run_calls(calls, {"search": Echo()}) == [("0.2", False), ("0.0", False), ("0.1", False)]


def test_no_exception_of_a_tool_escapes():
    class Broken(Echo):
        def __call__(self, queries):
            raise ToolFault("HTTP 500") if queries == ["fault"] else KeyError("bug")

    results = run_calls(
        [ToolCall("search", {"queries": [q]}) for q in ("fault", "bug")], {"search": Broken()}
    )
    assert (
        [fault for _, fault in results] == [True, True]
        and "HTTP 500" in results[0][0]
        and "KeyError" in results[1][0]
    )


def test_search_and_browse_an_embedded_world(world_dir):
    world = load_world(world_dir)
    search, browse = open_index_tools(world_dir / "pages.db")
    entity = world.entity(0)
    text = search(queries=[entity.name, "no such thing at all"])
    assert world.url(0) in text and "no results" not in text.split(world.url(0))[0]
    page = browse(url=world.url(0))
    assert page.startswith(f"{world.url(0)} (page 1 of ") and entity.name in page
    pages = int(re.search(r"of (\d+)", page).group(1))
    assert pages >= 3 and "Records" in "".join(
        browse(url=world.url(0), page=n) for n in range(1, pages + 1)
    )
    assert "has only" in browse(url=world.url(0), page=99)
    deep = [r for r in entity.facts if r in ("teacher", "birth")][0]
    assert entity.facts[deep] in browse(url=world.url(0), find=deep)
    assert browse(url=world.url(0), find="zebra") == "Not found."
    assert "http" in browse(url=world.url(0), links=True)
    assert browse(url=f"http://{world.host}/absent").startswith("error 404")
    assert "no such site" in browse(url="http://elsewhere.test/")


def test_an_unreachable_server_is_a_fault_not_a_mistake():
    with pytest.raises(ToolFault):
        Browse({"w.test": "127.0.0.1:9"}, timeout_s=1)(url="http://w.test/")


def test_missing_index_is_named():
    with pytest.raises(FileNotFoundError, match="data/world.py or data/index.py"):
        Search("nowhere.db")


def test_pages_of_text_lose_nothing():
    text = "\n".join(f"Line {i} says something. And more." for i in range(200))
    pieces = split_pages(text, 400)
    assert max(map(len, pieces)) <= 400 and re.sub(r"\s", "", "".join(pieces)) == re.sub(
        r"\s", "", text
    )


def test_embedded_pages_come_whole_over_one_connection(world_dir):
    from data.serve import PageServer
    from data.world import page_html

    class Counting(PageServer):
        connections = 0

        def get_request(self):
            Counting.connections += 1
            return super().get_request()

    server, world = Counting(world_dir / "pages.db"), load_world(world_dir)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    browse = Browse(server.hosts)
    for number in range(10):
        url, page = world.url(number), page_html(world, world.entity(number))
        for arguments in ({}, {"page": 2}, {"page": 3}, {"find": "the"}, {"links": True}):
            shown = view_page(
                page,
                url,
                arguments.get("page", 1),
                arguments.get("find"),
                arguments.get("links", False),
            )
            assert browse(url=url, **arguments) == shown and "was cut" not in shown
    assert Counting.connections == 1
    server.shutdown()


@pytest.mark.parametrize(
    "page",
    ["", "<", "<table>" * 500, "<script>x</script>", "\0\ud800", "<a href=''>", "&#xFFFFFFFF;"],
)
def test_hostile_html(page):
    assert isinstance(html_to_text(page), str) and isinstance(
        view_page(page, "http://a.test/"), str
    )


@pytest.fixture(params=["monty", "cpython"])
def new_python(request):
    """A function that makes sessions of the `python` tool, of both kinds."""
    if request.param == "cpython" and cpython_sandbox.missing():
        pytest.skip(cpython_sandbox.missing())
    sessions = []

    def make(**settings):
        kind = {"monty": Python, "cpython": cpython_sandbox.CPythonSession}[request.param]
        sessions.append(kind(**settings))
        return sessions[-1]

    yield make
    for session in sessions:
        if request.param == "cpython":
            session.close()


def test_python_is_stateful_and_bounded(new_python):
    python = new_python(timeout_s=2, output_chars=100)
    assert python(code="x = 20") == "(no output)"
    assert python(code="print('sum'); x + 1") == "sum\n21"
    assert "ZeroDivisionError" in python(code="1/0")
    assert python(code="print('a' * 1000)").endswith("(1000 characters)")
    assert "MemoryError" in python(code="b = 'a' * (4 << 30)")
    assert "NameError" in python(code="b")
    text = python(code="print('partial: 17')\nwhile True: pass")
    assert text.startswith("partial: 17\ntimeout after 2 s; ")
    kept = "variables are as before the call" in text
    assert python(code="x") == ("20" if kept else "NameError: name 'x' is not defined")
    assert python(code="print(3)") == "3"
    assert python.check({"code": "1"}) is None and python.check({"code": 1}) and python.check({})


# What a small policy writes, and what it must see, whichever interpreter runs it.
WORDS = {
    "print(251 + 116)": "367",
    "print(abs(384 - 127))": "257",
    "251 + 116": "367",
    "print(3, 'a', sep='-')": "3-a",
    "a = 5": "(no output)",
    "a; a + 1": "6",
    "a;": "5",
    "(b := 6)": "6",
    "b, _ if False else 7": "(6, 7)",
    "a  # the value\n# of a": "5",
    "(\n1,\n'b')": "(1, 'b')",
    "'it\\'s', \"é\", 'a\\nb'": "(\"it's\", 'é', 'a\\nb')",
    "1/3, 0.1 + 0.2, 1e16, 10**20, -7 // 2": (
        "(0.3333333333333333, 0.30000000000000004, 1e+16, 100000000000000000000, -4)"
    ),
    "None": "(no output)",
    "print(None)": "None",
    "[1, None, True, {'k': (1,)}]": "[1, None, True, {'k': (1,)}]",
    "for i in range(3): i; i": "(no output)",
    "for i in range(3):\r\n    print(i)": "0\n1\n2",
    "type(5), len, range(3)": "(<class 'int'>, <built-in function len>, range(0, 3))",
    "f'{a:>5}|{a=}|{1234567:,}'": "'    5|a=5|1,234,567'",
    "x": "NameError: name 'x' is not defined",
    "math.sqrt(2)": "NameError: name 'math' is not defined",
    "1/0": "ZeroDivisionError: division by zero",
    "{}['k']": "KeyError: 'k'",
    "1 + 'a'": "TypeError: unsupported operand type(s) for +: 'int' and 'str'",
    "int('a')": "ValueError: invalid literal for int() with base 10: 'a'",
    "raise ValueError": "ValueError",
    "assert a == 6": "AssertionError",
    "import nope": "ModuleNotFoundError: No module named 'nope'",
    "exit()": "NameError: name 'exit' is not defined",
}


def test_both_interpreters_say_the_same(new_python):
    python = new_python(timeout_s=30)
    assert {code: python(code=code) for code in WORDS} == WORDS
    for code in ("def", "print(5", "x = = 3", "return 5", "1 +", "a b", "5 = a", "  1", "'abc"):
        assert re.search(
            r"line 1\n.*(SyntaxError|IndentationError): ", python(code=code), re.DOTALL
        )


def json_at(text, at):
    try:
        return json.JSONDecoder().raw_decode(text, at)[0]
    except (ValueError, RecursionError):
        return None


def test_fuzzed_turns(world_dir):
    """10,000 mutated turns: nothing but FormatError escapes, and a call stands whole in the turn."""
    search, browse = open_index_tools(world_dir / "pages.db")
    tools = {"search": search, "browse": browse, "python": Echo()}
    rng = random.Random(0)
    good = [
        GOOD,
        '<tool_call>{"name": "browse", "arguments": {"url": "http://w11.test/", "page": 2}}'
        "</tool_call>",
        "<answer>Belin</answer>",
        "<think>I look.</think>",
        '<tool_call>{"name": "python", "arguments": {"queries": ["0"]}}</tool_call>',
    ]
    pieces = [
        "<tool_call>",
        "</tool_call>",
        "<think>",
        "</think>",
        "<answer>",
        "</answer>",
        "{",
        "}",
        "[",
        "]",
        '"',
        "\\",
        "\0",
        "\ud800",
        "\u202e",
        "1e999",
        "NaN",
        "-Infinity",
        "null",
        "true",
        ",",
        ":",
        '"name"',
        '"arguments"',
        "9" * 5000,
        "\\ud800",
        "<|im_end|>",
        "\u200b",
        "é",
        "\n",
        "file:///etc/passwd",
        "http://[",
    ]
    parsed = ran = 0
    for _ in range(10_000):
        text = "".join(rng.choice(good) for _ in range(rng.randint(1, 4)))
        for _ in range(rng.choice((0, 0, 1, 1, 2, 5))):
            at = rng.randrange(len(text) + 1)
            text = text[:at] + rng.choice(pieces) + text[at + rng.choice((0, 0, 1, 5, 20)) :]
        try:
            calls, answer = parse_action(text, tools)
        except FormatError as error:
            assert error.kind and len(str(error)) < 200
            continue
        parsed += 1
        assert bool(calls) != (answer is not None) and len(calls) <= MAX_CALLS
        assert len(calls) <= text.count("<tool_call>")
        stated = [json_at(text, match.end()) for match in re.finditer(r"<tool_call>\s*", text)]
        for call in calls:
            assert any(isinstance(each, dict) and each["name"] == call.name for each in stated)
        if (
            calls
            and not any(
                call.name == "python" and not call.arguments.get("queries", ["x"])[0] == "0"
                for call in calls
            )
            and ran < 1500
        ):
            ran += 1
            results = run_calls(calls, tools)
            assert len(results) == len(calls) and all(
                isinstance(text, str) and len(text) < 100_000 for text, _ in results
            )
    assert parsed > 2000 and ran == 1500


@pytest.mark.parametrize(
    "code",
    [
        "\0",
        "\ud800",
        "print('\\ud800')",
        "x" * 200_000,
        "(" * 5000,
        "\r\n\t",
        "print('<tool_call>{}</tool_call><|im_end|>')",
        "raise SystemExit",
        "exit()",
        "import sys; sys.stdout = None",
        "del __builtins__",
        "'é' * 3",
    ],
)
def test_odd_code(code, new_python):
    python = new_python(timeout_s=30)
    assert isinstance(python(code=code), str) and "\0" not in python(code=code)
    assert python(code="1 + 1").endswith("2")


def test_faults_are_counted_and_never_punished(world_dir, dev_tasks):
    """A server that is down: the policy sees it; that is neither a format error nor wrong."""
    from context import Turn
    from reward import reward
    from rollout import take_results

    calls = [ToolCall("browse", {"url": "http://w.test/"})]
    trajectory = Trajectory(dev_tasks[0], (0,))
    for _ in range(3):
        trajectory.turns.append(
            Turn([1], [0.0], 0, calls=[{"name": "browse", "arguments": calls[0].arguments}])
        )
        results = run_calls(calls, {"browse": Browse({"w.test": "127.0.0.1:9"})})
        assert results == [("error: http://w.test/ cannot be reached (ConnectionError)", True)]
        take_results(trajectory, results)
    assert [turn.faults for turn in trajectory.turns] == [1, 1, 1]
    assert trajectory.status == "tool_fault" and reward(trajectory).total >= 0
    assert (
        run_calls([ToolCall("browse", {"url": "file:///"})], {"browse": Browse()})[0][1] is False
    )  # the policy's own mistake is no fault


def test_a_sandbox_that_cannot_start_is_a_fault(monkeypatch):
    def full(*_, **__):
        raise BlockingIOError(11, "Resource temporarily unavailable")

    before = len(os.listdir("/proc/self/fd"))
    for name in ("subprocess.Popen", "tempfile.mkdtemp"):
        with monkeypatch.context() as patch:
            patch.setattr(name, full)
            session = cpython_sandbox.CPythonSession()
            ((text, fault),) = run_calls([ToolCall("python", {"code": "1"})], {"python": session})
        assert fault and "python cannot be started" in text
    assert len(os.listdir("/proc/self/fd")) <= before


def test_a_machine_without_a_sandbox_is_refused_for_cpython_alone(monkeypatch):
    monkeypatch.setattr(cpython_sandbox, "missing", lambda: "the kernel offers no Landlock")
    with pytest.raises(ValueError, match="no Landlock.*--unsafe_python"):
        Toolbox(RolloutArgs(python="cpython"))
    assert (
        Toolbox(RolloutArgs(python="cpython", unsafe_python=True))
        .isolation()
        .startswith("NO sandbox")
    )
    assert Toolbox(RolloutArgs()).isolation() == "Monty, an interpreter without system calls"


@pytest.mark.parametrize("python", ["monty", "cpython"])
def test_a_trajectory_takes_its_session_along(python, dev_tasks, world_dir):
    """Parked, sent elsewhere and brought back, a session goes on where the trajectory was."""
    if python == "cpython" and cpython_sandbox.missing():
        pytest.skip(cpython_sandbox.missing())
    here, there = (
        Toolbox(RolloutArgs(corpus=str(world_dir / "pages.db"), python=python)) for _ in range(2)
    )

    def call(toolbox, trajectory, code):
        return toolbox.tools_for(trajectory)["python"](code=code)

    try:
        trajectory, other = (Trajectory(replace(dev_tasks[0], meta={}), (n,)) for n in range(2))
        assert call(here, trajectory, "x = 1\nprint('once')") == "once"
        assert "NameError" in call(here, other, "x")
        trajectory = pickle.loads(pickle.dumps(trajectory))
        assert call(there, trajectory, "x += 1\nx") == "2"
        trajectory = pickle.loads(pickle.dumps(trajectory))
        assert call(here, trajectory, "x += 1\nx") == "3"
        assert call(here, trajectory, "x") == "3"
        here.close(trajectory)
        assert not [key for key in here.sessions if key == trajectory.key]
    finally:
        here.close_all()
        there.close_all()
    assert not here.sessions and not there.sessions


def test_frequent_words_are_left_out_of_a_large_index(tmp_path, monkeypatch):
    import data.index

    monkeypatch.setattr("data.index.LARGE_INDEX", 100)
    documents = [
        {
            "url": f"http://c.test/{n}",
            "title": f"Page {n}",
            "text": f"the number of this page is w{n}" + " the" * (n == 7),
        }
        for n in range(200)
    ]
    data.index.build_index(documents, tmp_path / "large.db")
    index = data.index.open_index(tmp_path / "large.db")
    assert {word for (word,) in index.execute("select word from common")} == {
        "the",
        "number",
        "of",
        "this",
        "page",
        "is",
    }
    for query in ("what is the number of w42", "w42"):
        assert [hit["url"] for hit in data.index.search_index(index, query, 3)] == [
            "http://c.test/42"
        ]
    assert (
        len(data.index.search_index(index, "the page", 3)) == 3
    )  # nothing but frequent words: the rarest is searched
    monkeypatch.setattr("data.index.LARGE_INDEX", 1000)
    data.index.build_index(documents, tmp_path / "small.db")
    assert (
        data.index.search_index(data.index.open_index(tmp_path / "small.db"), "the", 1)[0]["url"]
        == "http://c.test/7"
    )


def test_many_clients_search_one_index(world_dir):
    from concurrent.futures import ThreadPoolExecutor

    search, browse = open_index_tools(world_dir / "pages.db")
    world = load_world(world_dir)
    names = [world.name(n % 60) for n in range(400)]
    alone = {name: search(queries=[name]) for name in names}
    with ThreadPoolExecutor(16) as pool:
        assert list(pool.map(lambda name: search(queries=[name]), names)) == [
            alone[name] for name in names
        ]
        pages = list(pool.map(lambda name: browse(url=f"http://{world.host}/{name}"), names))
    assert all(name in page for name, page in zip(names, pages))
    assert len(search.index.idle) <= 16
