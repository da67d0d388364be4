import os
import re
import time

import pytest

from data.world import load_world
from tools import MAX_CALLS, Browse, FormatError, Python, Search, Toolbox, ToolCall, ToolFault, html_to_text, parse_action, parse_tool_calls, run_calls, split_pages, view_page

GOOD = '<tool_call>{"name": "search", "arguments": {"queries": ["a"]}}</tool_call>'


class Echo:
    name, signature = "search", "search(queries)"

    def check(self, arguments):
        return None if set(arguments) == {"queries"} else "search takes 'queries'"

    def __call__(self, queries):
        time.sleep(float(queries[0]))
        return queries[0]


def test_parse_tool_calls():
    assert parse_tool_calls(f"<think>x {GOOD}</think>{GOOD}{GOOD}") == [ToolCall("search", {"queries": ["a"]})] * 2
    assert parse_tool_calls("nothing") == []


@pytest.mark.parametrize("text, kind", [
    ("hello", "no_action"), ("", "no_action"), (GOOD + "<answer>a</answer>", "call_and_answer"), ("<answer>a</answer><answer>b</answer>", "two_answers"),
    ("<tool_call>{}", "unclosed_tag"), ("<answer>a", "unclosed_tag"), ("<think>never closed " + GOOD, "unclosed_tag"),
    ("<tool_call>{not json}</tool_call>", "bad_json"), ("<tool_call>[1]</tool_call>", "not_an_object"),
    ('<tool_call>{"arguments": {}}</tool_call>', "missing_name"), ('<tool_call>{"name": "search", "arguments": [1]}</tool_call>', "bad_arguments"),
    ('<tool_call>{"name": "rm", "arguments": {}}</tool_call>', "unknown_tool"), ('<tool_call>{"name": "search", "arguments": {"q": 1}}</tool_call>', "bad_arguments"),
    (GOOD * (MAX_CALLS + 1), "too_many_calls"), ("<tool_call>" + "[" * 100000 + "</tool_call>", "bad_json")])
def test_format_error_kinds(text, kind):
    with pytest.raises(FormatError) as error:
        parse_action(text, {"search": Echo()})
    assert error.value.kind == kind


def test_answer_is_read():
    assert parse_action("<think>so</think><answer> Belin </answer>", {}) == ([], "Belin")


def test_results_come_back_in_call_order():
    calls = [ToolCall("search", {"queries": [delay]}) for delay in ("0.2", "0.0", "0.1")]
    assert run_calls(calls, {"search": Echo()}) == [("0.2", False), ("0.0", False), ("0.1", False)]


def test_no_exception_of_a_tool_escapes():
    class Broken(Echo):
        def __call__(self, queries):
            raise ToolFault("HTTP 500") if queries == ["fault"] else KeyError("bug")
    results = run_calls([ToolCall("search", {"queries": [q]}) for q in ("fault", "bug")], {"search": Broken()})
    assert [fault for _, fault in results] == [True, True] and "HTTP 500" in results[0][0] and "KeyError" in results[1][0]


def test_search_and_browse_an_embedded_world(world_dir):
    world = load_world(world_dir)
    search, browse = Toolbox().open(world_dir / "pages.db")
    entity = world.entity(0)
    text = search(queries=[entity.name, "no such thing at all"])
    assert world.url(0) in text and "no results" not in text.split(world.url(0))[0]
    page = browse(url=world.url(0))
    assert page.startswith(f"{world.url(0)} (page 1 of ") and entity.name in page
    pages = int(re.search(r"of (\d+)", page).group(1))
    assert pages >= 3 and "Records" in "".join(browse(url=world.url(0), page=n) for n in range(1, pages + 1))
    assert "has only" in browse(url=world.url(0), page=99)
    deep = [r for r in entity.facts if r in ("teacher", "birth")][0]
    assert entity.facts[deep] in browse(url=world.url(0), find=deep)
    assert browse(url=world.url(0), find="zebra") == "Not found."
    assert "http" in browse(url=world.url(0), links=True)
    assert browse(url=f"http://{world.host}/absent").startswith("error 404")
    assert "no such site" in browse(url="http://elsewhere.test/")


@pytest.mark.parametrize("url", ["file:///etc/passwd", "ftp://a.test/", "http://", "http://user:pass@a.test/", "gopher://x", "http://[", "javascript:alert(1)", "http://127.0.0.1/",
                                 "http://169.254.169.254/", "http://[::1]/", "http://10.0.0.1/", "http://2130706433/"])
def test_addresses_that_are_refused(url):
    assert Browse(live=True)(url=url).startswith("error ")


def test_an_unreachable_server_is_a_fault_not_a_mistake():
    with pytest.raises(ToolFault):
        Browse({"w.test": "127.0.0.1:9"}, timeout_s=1)(url="http://w.test/")


def test_missing_index_is_named():
    with pytest.raises(FileNotFoundError, match="data/world.py or data/index.py"):
        Search("nowhere.db")


def test_pages_of_text_lose_nothing():
    text = "\n".join(f"Line {i} says something. And more." for i in range(200))
    pieces = split_pages(text, 400)
    assert max(map(len, pieces)) <= 400 and re.sub(r"\s", "", "".join(pieces)) == re.sub(r"\s", "", text)


@pytest.mark.parametrize("page", ["", "<", "<table>" * 500, "<script>x</script>", "\0\ud800", "<a href=''>", "&#xFFFFFFFF;"])
def test_hostile_html(page):
    assert isinstance(html_to_text(page), str) and isinstance(view_page(page, "http://a.test/"), str)


def test_python_is_stateful_and_bounded():
    python = Python(timeout_s=2, output_chars=100)
    try:
        assert python(code="x = 20") == "(no output)"
        assert python(code="print('sum'); x + 1") == "sum\n21"
        assert "ZeroDivisionError" in python(code="1/0")
        assert python(code="print('a' * 1000)").endswith("(1000 characters)")
        assert "timeout" in python(code="while True: pass")
        assert "NameError" in python(code="x")  # a new session after the timeout
        assert "died" in python(code="import os; os._exit(3)")
        assert "SECRET" not in python(code="import os; print(dict(os.environ))")
        assert "MemoryError" in python(code="b = bytearray(4 << 30)")
        assert python(code="print(3)") == "3"
        pid = python.process.pid
    finally:
        python.close()
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


def test_nothing_survives_a_session():
    python = Python(timeout_s=5)
    child = int(python(code="import subprocess; p = subprocess.Popen(['/bin/sleep', '60']); print(p.pid)"))
    folder = python.folder
    python.close()
    time.sleep(0.2)
    assert not os.path.exists(folder)
    status = f"/proc/{child}/stat"
    assert not os.path.exists(status) or open(status).read().split()[2] == "Z"
