"""The README is a program, too: its recipes run as they stand there, and what it names exists.

pytest tests/test_readme.py
"""

import ast
import re
import shlex
import textwrap
from pathlib import Path

import pytest
from conftest import ROOT

import context
import reward
import tools
from context import Trajectory, Turn
from data.task import Task
from support.user_code import load_reward

README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = {"README.md": README} | {
    f"docs/{path.name}": path.read_text(encoding="utf-8")
    for path in sorted((ROOT / "docs").glob("*.md"))
}
# Flags of programs that are not ours.
OTHERS_FLAGS = {"--num_processes", "--no-deps", "--full"}
PASSED_ON = {"tests/necessity.py": "evaluate.py"}  # it hands flags of its own on to that script
OTHERS_FILES = {"corpus.db"}


def recipe(name: str) -> str:
    """The code block of the README under the marker `<!-- recipe: NAME -->`."""
    blocks = re.findall(rf"<!-- recipe: {name} -->\n```python\n(.*?)```", README, re.DOTALL)
    assert len(blocks) == 1, f"the README has {len(blocks)} recipes named {name!r}"
    return blocks[0]


def played(status: str = "answered", answer: str = "Belin", pages: int = 0) -> Trajectory:
    """A finished trajectory about Belin that opened so many pages."""
    trajectory = Trajectory(Task("t", "Where?", "Belin"), key=(0,))
    trajectory.status, trajectory.answer = status, answer
    trajectory.pages = [f"http://w1.test/{number}" for number in range(pages)]
    return trajectory


# ------------------------------------------------------------------------------------- recipes


def test_reward_recipe_counts_the_pages_that_were_opened(tmp_path):
    (tmp_path / "my_reward.py").write_text(recipe("reward"))
    brief = load_reward(f"{tmp_path / 'my_reward.py'}:brief")
    few, many, very_many = brief(played()), brief(played(pages=5)), brief(played(pages=99))
    assert few.total == 1.0 and few.correct == 1.0
    assert many.total == pytest.approx(0.9) and many.correct == 1.0
    assert very_many.total == 0.5
    assert many.parts["pages"] == 5
    wrong = brief(played(answer="Kor", pages=5))
    assert wrong.total == 0.0 and wrong.correct == 0.0


@pytest.mark.parametrize("status", ["format_error", "over_context", "over_turns"])
def test_reward_recipe_leaves_the_format_penalty_to_the_trainer(tmp_path, status):
    (tmp_path / "my_reward.py").write_text(recipe("reward"))
    brief = load_reward(f"{tmp_path / 'my_reward.py'}:brief")
    for pages in (0, 5):
        outcome = reward.penalised(brief(played(status, pages=pages)), 0.3)
        assert outcome.total == -0.3 and not outcome.format_ok
    assert reward.penalised(brief(played(pages=5)), 0.3).total == pytest.approx(0.9)


def test_tool_recipe_reaches_the_prompt_and_runs(monkeypatch, world_dir):
    space = {}
    exec(recipe("tool"), space)
    clock = space["Clock"]
    before = tools.signatures()
    monkeypatch.setattr(tools, "TOOLS", [*tools.TOOLS, clock])
    assert tools.signatures() == [*before, "clock()"]
    calls, answer = tools.parse_action(
        '<tool_call>{"name": "clock", "arguments": {}}</tool_call>', {"clock": clock()}
    )
    assert answer is None
    (result,) = tools.run_calls(calls, {"clock": clock()})
    assert re.fullmatch(r"\d{4}-\d\d-\d\d", result[0])
    with pytest.raises(tools.FormatError, match="clock takes no arguments"):
        tools.parse_action(
            '<tool_call>{"name": "clock", "arguments": {"zone": "UTC"}}</tool_call>',
            {"clock": clock()},
        )


def test_context_manager_recipe_keeps_the_question_and_the_last_two_turns(monkeypatch, chat):
    space = {}
    exec(recipe("context manager"), space)
    monkeypatch.setitem(context.MANAGERS, "last_two", space["last_two"])
    trajectory = Trajectory(Task("t", "Where?", "Belin"), key=(0,), head_ids=chat.head("Where?"))
    manager = context.MANAGERS["last_two"]
    assert manager(trajectory, chat, 512) == chat.head("Where?")
    for number in range(4):
        turn = Turn(action_ids=[10 + number], logprobs=[0.0], version=0)
        turn.observation_ids = [20 + number]
        trajectory.turns.append(turn)
    assert manager(trajectory, chat, 512) == [*chat.head("Where?"), 12, 22, 13, 23]


# --------------------------------------------------------------------------- sizes and names


def test_readme_is_at_most_12_kb():
    assert len(README.encode()) <= 12_288


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page):
    folder = (ROOT / page).parent
    for target in re.findall(r"\]\(([^)\s]+)\)", PAGES[page]):
        if target.startswith(("http://", "https://")):
            continue
        name, _, heading = target.partition("#")
        path = folder / name if name else ROOT / page
        assert path.exists(), f"{page} links to {target}"
        if heading:
            titles = re.findall(r"^#+ (.*)$", path.read_text(encoding="utf-8"), re.MULTILINE)
            anchors = [re.sub(r"[^\w\- ]", "", t.lower()).replace(" ", "-") for t in titles]
            assert heading in anchors, f"{page} links to {target}: {anchors}"


@pytest.mark.parametrize("page", PAGES)
def test_files_that_are_named_exist(page):
    """Whatever stands in backticks and looks like a file or folder of the project."""
    for span in re.findall(r"`([^`\n]+)`", re.sub(r"```.*?```", "", PAGES[page], flags=re.DOTALL)):
        for word in span.split():
            if re.fullmatch(
                r"[\w./-]+\.(py|md|png|txt|db)|(data|docs|support|tests)/[\w./-]*", word
            ):
                mine = word.startswith(("my", "runs/", "data/worlds/")) or word in OTHERS_FILES
                made = word in ("curves.png", "pages.db")  # in the folder of a run or of a world
                assert mine or made or (ROOT / word).exists(), f"{page} names {word}"


def test_readme_gives_each_file_of_the_reading_path_one_line():
    rows = re.findall(r"^\| `(\w+\.py)` \| (.+) \|$", README, re.MULTILINE)
    assert [name for name, _ in rows] == [
        "context.py",
        "reward.py",
        "tools.py",
        "rollout.py",
        "train.py",
        "evaluate.py",
        "engine.py",
        "decode_graphs.py",
        "server_engine.py",
        "workers.py",
        "report.py",
    ]
    assert {path.name for path in ROOT.glob("*.py")} == {name for name, _ in rows}


# ------------------------------------------------------------------------------------ commands


def commands(text: str) -> list[list[str]]:
    """The commands of a page that start a script of ours, as words from the script's name on."""
    text = re.sub(r"\\\n\s*", " ", text)
    found = re.findall(r"(?:python3?|accelerate launch)(?: --\w+ \w+)* [\w/]+\.py\b[^`\n&]*", text)
    words = [shlex.split(command, comments=True) for command in found]
    return [line[next(i for i, w in enumerate(line) if w.endswith(".py")) :] for line in words]


def flags_of(script: Path, seen: set[Path] | None = None) -> set[str]:
    """The flags of a script, read from its source: fields of the dataclasses that it gives to
    `parse_flags`, and arguments that it adds to a parser. A script that has none of its own gets
    those of the modules that it imports `main` from."""
    seen = seen if seen is not None else set()
    seen.add(script)
    tree = ast.parse(script.read_text(encoding="utf-8"))
    classes = {node.name: node for node in tree.body if isinstance(node, ast.ClassDef)}
    origin = {}  # imported name -> file of the project
    for node in tree.body:
        if isinstance(node, ast.ImportFrom) and node.module:
            file = ROOT / (node.module.replace(".", "/") + ".py")
            if file.exists():
                origin |= {alias.name: file for alias in node.names}

    def fields(name: str, where: Path) -> set[str]:
        body = ast.parse(where.read_text(encoding="utf-8")).body
        for node in body:
            if isinstance(node, ast.ClassDef) and node.name == name:
                own = {f"--{n.target.id}" for n in node.body if isinstance(n, ast.AnnAssign)}
                bases = [base.id for base in node.bases if isinstance(base, ast.Name)]
                return own.union(*(fields(base, where) for base in bases))
        return set()

    flags = set()
    for call in (node for node in ast.walk(tree) if isinstance(node, ast.Call)):
        name = call.func.attr if isinstance(call.func, ast.Attribute) else None
        name = call.func.id if isinstance(call.func, ast.Name) else name
        if name == "add_argument" and isinstance(call.args[0], ast.Constant):
            flags |= {call.args[0].value}
        elif name == "parse_flags":
            for node in ast.walk(call):
                if isinstance(node, ast.Name) and node.id in classes:
                    flags |= fields(node.id, script)
                elif isinstance(node, ast.Name) and node.id in origin:
                    flags |= fields(node.id, origin[node.id])
    if not flags and "main" in origin and origin["main"] not in seen:
        flags = flags_of(origin["main"], seen)
    return {flag for flag in flags if flag.startswith("--")}


@pytest.mark.parametrize("page", PAGES)
def test_commands_have_the_flags_that_they_are_given(page):
    for name, *words in commands(PAGES[page]):
        script = ROOT / name
        assert script.is_file(), f"{page} runs {name}"
        given = {word.split("=")[0] for word in words if word.startswith("--")}
        known = flags_of(script) | (
            flags_of(ROOT / PASSED_ON[name]) if name in PASSED_ON else set()
        )
        unknown = given - known
        assert not unknown, f"{page}: {name} has no {', '.join(sorted(unknown))}"


def test_commands_are_found():
    found = commands(
        "Run `accelerate launch --num_processes 2 train.py --seed 1` or\n`python a.py`."
    )
    assert found == [["train.py", "--seed", "1"], ["a.py"]]
    folded = commands(
        textwrap.dedent("""
        python data/x.py --a b \\
            --c d && python data/y.py --out e
    """)
    )
    assert folded == [["data/x.py", "--a", "b", "--c", "d"], ["data/y.py", "--out", "e"]]
    assert len(commands(README)) >= 8


@pytest.mark.parametrize("page", PAGES)
def test_flags_that_are_named_exist(page):
    scripts = [*ROOT.glob("*.py"), *(ROOT / "data").glob("*.py"), *(ROOT / "tests").glob("*.py")]
    known = OTHERS_FLAGS.union(*(flags_of(script) for script in scripts))
    spans = re.findall(r"`([^`\n]+)`", re.sub(r"```.*?```", "", PAGES[page], flags=re.DOTALL))
    named = {flag for span in spans for flag in re.findall(r"(?<!\S)--[a-z][\w-]*", span)}
    assert not named - known, f"{page} names {', '.join(sorted(named - known))}"
