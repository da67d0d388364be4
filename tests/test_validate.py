import json
import random
import shutil
from collections import Counter

import pytest
from bench_funnel import KINDS, bench

from data.deep.funnel import STAGES, Funnel
from data.deep.solve import solutions
from data.task import Task, load_tasks, save_tasks
from data.tasks import DEEP_SHARES, draw_task, make_tasks
from data.tasks import main as tasks_main
from data.validate import main
from data.world import World, load_world, write_world


@pytest.fixture(scope="session")
def made(deep_dir):
    return make_tasks(load_world(deep_dir), deep_dir, 150, seed=3)


def test_every_family_and_level_passes_the_funnel(made):
    tasks, funnel = made
    assert {t.family for t in tasks} == {family for family, _ in DEEP_SHARES}
    assert {(t.family, t.meta["level"]) for t in tasks if "level" in t.meta} == {
        key
        for key in DEEP_SHARES
        if key[0] not in ("lookup", "browse", "multihop") and key != ("compute", 1)
    }
    assert {t.hops for t in tasks if t.family == "multihop"} == {2, 3, 4, 5, 6}
    assert {t.answer_type for t in tasks} == {"name", "number", "date", "list"}
    assert (
        funnel.counts["solver"] == funnel.counts["schema"] == 0
    )  # raw draws are right: the truth comes from the facts
    deep = [t for t in tasks if t.family == "collection"]
    assert all(len(t.evidence) > 20 for t in deep) and any(
        "held out" in t.meta["template"] for t in tasks
    )


def test_same_seed_same_tasks(made, deep_dir):
    assert [t.id for t in make_tasks(load_world(deep_dir), deep_dir, 40, seed=3)[0]] == [
        t.id for t in made[0][:40]
    ]


def test_planted_damage_is_found(deep_dir):
    result = bench(deep_dir, load_world(deep_dir), 150, seed=5)
    assert result["found"]["wrong"] == result["total"]["wrong"]
    assert sum(result["found"][kind] for kind in KINDS) >= 0.95 * sum(
        result["total"][kind] for kind in KINDS
    ), result["missed"]
    assert result["found"]["good"] <= 0.01 * result["total"]["good"]


def damaged(made, family, **change) -> Task:
    task = next(t for t in made[0] if t.family == family)
    return Task(**{**task.__dict__, "id": "x1", **change})


@pytest.mark.parametrize(
    "stage, family, change",
    [
        ("schema", "math", {"answer": "many", "answer_type": "number"}),
        ("schema", "math", {"answer_type": "essay"}),
        ("solver", "conflict", {"answer": "Nobody", "answer_type": "name"}),
        ("solver", "code", {"answer": "-7"}),
        ("reach", "lookup", {"evidence": ["http://w12.test/Nowhere"]}),
    ],
)
def test_each_stage_names_what_it_found(made, deep_dir, stage, family, change):
    funnel = Funnel(deep_dir)
    assert not funnel.check(damaged(made, family, **change))
    assert (
        funnel.rejects[0]["stage"] == stage
        and funnel.rejects[0]["reason"]
        and funnel.rejects[0]["task"]["id"] == "x1"
    )


@pytest.mark.parametrize(
    "question",
    [
        "What is the remainder of 7 to the power of 3 divided by 0?",
        "How many integers from 1 to 9 are divisible by 0 but not by 3?",
        "What is the sum of the primes from 1 to 99999999999?",
        "What is the remainder of 7 to the power of 99999999999 divided by 5?",
        "What is the sum of the digits of 999999 to the power of 999999?",
        "How many integers from one to nine are divisible by 2 but not by 3?",
    ],
)
def test_a_sum_that_cannot_be_done_has_no_solution(question):
    assert solutions(question, lambda path: None, lambda phrase: []) == []


def test_a_lookup_in_other_words_meets_no_snippet(deep_dir):
    funnel = Funnel(deep_dir, ["snippet"])
    task = Task("t", "Pray, who leads Alba?", "Bel", family="lookup", evidence=["http://a.test/b"])
    assert funnel.check(task) and not funnel.rejects


def test_two_equal_answers_make_a_question_ambiguous():
    pages = {
        "Aa": "The road from Aa to Bb is 20 miles long. The road from Aa to Cc is 20 miles long.",
        "Bb": "The road from Bb to Dd is 30 miles long.",
        "Cc": "The road from Cc to Dd is 30 miles long.",
        "Dd": "",
    }
    assert solutions(
        "State the length of the shortest way by road from Aa to Dd, please.",
        pages.get,
        lambda p: [],
    ) == ["50"]
    assert sorted(
        solutions(
            "Name the cities between on the shortest way by road from Aa to Dd.",
            pages.get,
            lambda p: [],
        )
    ) == [["Bb"], ["Cc"]]
    pages = {
        name: f"{name} is a river. The length of {name} is {length}. "
        f"The mouth of {name} is {mouth}."
        for name, length, mouth in (
            ("Ee", 900, "Kk"),
            ("Ff", 500, "Ll"),
            ("Gg", 500, "Mm"),
            ("Hh", 100, "Nn"),
        )
    }
    assert solutions(
        "What is the mouth of the one with the second greatest length among Ee, Ff, Gg and Hh?",
        pages.get,
        lambda p: [],
    ) == ["Ll", "Mm"]


def test_users_own_file_without_a_world(tmp_path, run_here):
    lines = [
        '{"question": "Who painted the ceiling of the old hall?", "answer": "Moritz Vane"}',
        "{broken",
        '{"question": "Is it so?", "answer": "yes"}',
        '{"question": "Tell me who painted the ceiling of the old hall.", "answer": "Moritz Vane"}',
        '{"question": "Who wrote Rime, by Ada Low?", "answer": "Ada Low"}',
        '{"question": "What is 3 plus 4?", "answer": "7", "answer_type": "number"}',
        '{"question": "How long is the wall of Orvel?", "answer": "5120", "answer_type": "number"}',
    ]
    (tmp_path / "in.jsonl").write_text("\n".join(lines))
    names = ("in.jsonl", "good.jsonl", "rejects.jsonl")
    read, good, rejects = (tmp_path / name for name in names)
    done = run_here(main, "--tasks", read, "--out", good, "--rejects", rejects)
    assert done.returncode == 0, done.stderr
    assert [t.answer for t in load_tasks(good)] == ["Moritz Vane", "5120"]
    rejects = [json.loads(line) for line in rejects.read_text().splitlines()]
    assert Counter(r["stage"] for r in rejects) == {
        "json": 1,
        "guess": 1,
        "near": 1,
        "leak": 1,
        "tools": 1,
    }
    assert all(stage in done.stdout for stage in STAGES) and "kept 2 of 7" in done.stdout


def test_pass_window_drops_what_is_never_solved(made, deep_dir, tmp_path, run_here):
    tasks = [t for t in made[0] if t.family == "code"][:2]
    save_tasks(tasks, tmp_path / "in.jsonl")
    flags = ["--tasks", tmp_path / "in.jsonl", "--world", deep_dir]
    flags += ["--out", tmp_path / "good.jsonl"]
    flags += ["--rejects", tmp_path / "rejects.jsonl", "--model", "nano", "--pass_n", "2"]
    done = run_here(main, *flags, "--max_turns", "2")
    assert done.returncode == 0, done.stderr
    assert (
        "nano solved it in 0 of 2 attempts" in (tmp_path / "rejects.jsonl").read_text()
        and "kept 0 of 2" in done.stdout
    )


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--out", "nowhere/good.jsonl"], "nowhere/good.jsonl"),
        (["--rejects", "nowhere/rejects.jsonl"], "nowhere/rejects.jsonl"),
        (["--pass_n", "1"], "--pass_n must be at least 2"),
        (["--max_turns", "0"], "--max_turns must be at least 1"),
    ],
)
def test_flags_are_refused_before_the_work(tmp_path, run_here, monkeypatch, flags, words):
    monkeypatch.setattr(Funnel, "check", lambda *_: pytest.fail("the work has begun"))
    (tmp_path / "in.jsonl").write_text('{"question": "Who painted it?", "answer": "Moritz Vane"}')
    files = {"--tasks": "in.jsonl", "--out": "good.jsonl", "--rejects": "rejects.jsonl"}
    usual = [word for flag, name in files.items() for word in (flag, tmp_path / name)]
    done = run_here(main, *usual, "--model", "nano", *flags)
    assert done.returncode == 1 and words in done.stderr and "\n" not in done.stderr


@pytest.mark.parametrize("run", [main, tasks_main])
def test_ctrl_c_is_one_line(tmp_path, run_here, monkeypatch, world_dir, run):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(Funnel, "check", interrupt)
    (tmp_path / "in.jsonl").write_text('{"question": "Who painted it?", "answer": "Moritz Vane"}')
    flags = ["--world", world_dir, "--out", tmp_path / "out.jsonl"]
    if run is main:
        flags += ["--tasks", tmp_path / "in.jsonl", "--rejects", tmp_path / "rejects.jsonl"]
    done = run_here(run, *flags)
    assert ".py: stopped" in done.stderr and "\n" not in done.stderr


def test_a_damaged_index_is_one_line(world_dir, tmp_path, run_here):
    shutil.copytree(world_dir, tmp_path, dirs_exist_ok=True)
    tasks, _ = make_tasks(load_world(world_dir), world_dir, 10, seed=0)
    save_tasks(tasks, tmp_path / "in.jsonl")
    pages = (tmp_path / "pages.db").read_bytes()
    (tmp_path / "pages.db").write_bytes(pages[:16384].ljust(len(pages), b"x"))
    flags = ["--world", tmp_path, "--out", tmp_path / "out.jsonl"]
    checked = ["--tasks", tmp_path / "in.jsonl", "--rejects", tmp_path / "rejects.jsonl"]
    for done in (run_here(tasks_main, *flags), run_here(main, *flags, *checked)):
        assert done.returncode == 1 and "malformed" in done.stderr and "\n" not in done.stderr


def test_families_are_chosen_and_a_plain_world_says_what_it_lacks(world_dir, tmp_path):
    tasks, _ = make_tasks(load_world(world_dir), world_dir, 12, seed=0, families=["math", "logic"])
    assert {t.family for t in tasks} == {"math", "logic"}
    with pytest.raises(ValueError, match="deep one"):
        make_tasks(load_world(world_dir), world_dir, 5, seed=0, families=["collection"])
    small = write_world(World(3, 20, "dev"), tmp_path / "small")
    with pytest.raises(ValueError, match="use a larger world"):
        make_tasks(load_world(small), small, 5, seed=0, families=["logic"])


def test_wordings_of_every_form_can_be_read_by_the_solver(deep_dir):
    """Ten raw draws of each family and level, in held-out wordings too, have the answer that the
    pages give."""
    world, funnel, rng = load_world(deep_dir), Funnel(deep_dir, ["solver"]), random.Random(1)
    for family, level in DEEP_SHARES:
        for number in range(3 if (family, level) == ("collection", 3) else 10):
            task = draw_task(world, family, level, rng, held_out=number % 2 == 0)
            assert funnel.check(task), (task.question, task.answer, funnel.rejects[-1]["reason"])
