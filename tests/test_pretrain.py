"""The base models' recipe: walkers, drills, and the rows that it writes."""

import hashlib
import random
import re

import numpy as np
import pytest
import torch

import data.pretrain
from context import ELIDED
from data.base.drills import copy_drill, fact_drill, plans, sums, text_drill, visits, walks
from data.base.explorers import open_site, write_transcripts
from data.base.walkers import WINDOWS, Walker, write_walks
from data.parts import FRAMES
from data.pretrain import addresses_copied
from data.tasks import draw_task, form_of
from data.world import World, load_world


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--transcripts", 210], "--transcripts must be at least 216"),
        (["--seed", -1], "--seed must be at least 0"),
        (["--deep_share", 1], "--deep_share must be at least 0 and below 1"),
        (["--deep_share", 0.5, "--deep_entities", 20], "--deep_entities must be at least 300"),
        (["--layers", 1], "--layers must be at least 2"),
        (["--hidden", 40], "--hidden must be a multiple of --heads, at least 12 times"),
        (["--batch_tokens", 100], "--batch_tokens must be at least 256"),
        (["--init", "./nowhere"], "cannot load the model './nowhere': there is no such folder"),
    ],
)
def test_errors_of_the_recipe_are_one_line(run_here, tmp_path, flags, words):
    done = run_here(data.pretrain.main, *flags, "--out", tmp_path / "new")
    assert done.returncode == 1 and words in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1 and not (tmp_path / "new").exists()


def play_walks(deep_dir, chat, skill, args=WINDOWS[0], count=12):
    site, rng, done = open_site(load_world(deep_dir)), random.Random(0), []
    while len(done) < count:
        level = 1 + len(done) % 2
        task = draw_task(site.world, "collection", level, rng, rng.random() < 0.3)
        if form_of(task) != "total":
            done.append((task, *Walker(task, site, rng, skill).walk(chat, args)))
    return done


def test_skilled_walkers_find_the_answer_in_a_window_of_a_few_pages(deep_dir, chat):
    done = play_walks(deep_dir, chat, 1.0)
    assert sum(right for _, _, right in done) >= 11
    for _, rows, _ in done:
        assert len(rows) >= 3  # the first segment, the last, and what was chosen between
        rows = [(ids.tolist(), mask.tolist()) for ids, mask in rows]
        for ids, mask in rows:
            assert len(ids) == len(mask) <= 1024
            own = [i for i, mine in zip(ids, mask) if mine]
            assert ids[: len(chat.before_question)] == chat.before_question and set(own) & {
                chat.end_id
            }
            text = chat.decode(own)  # the explorer's tokens alone: no result, no request
            assert "<tool_response>" not in text and "earlier turns" not in text
        assert chat.decode(rows[0][0]).endswith("<|im_end|>") and "Notes: " not in chat.decode(
            rows[0][0]
        )
        assert all("Notes: " in chat.decode(ids) for ids, _ in rows[1:])
        assert "<answer>" in chat.decode([i for i, mine in zip(*rows[-1]) if mine])


def test_skilled_walkers_find_the_answer_among_stubs(deep_dir, chat):
    done = play_walks(deep_dir, chat, 1.0, WINDOWS[-1])
    assert sum(right for _, _, right in done) >= 11
    for _, rows, _ in done:
        assert all(len(ids) <= 2560 for ids, _ in rows)
        assert chat.decode(rows[-1][0].tolist()).count(ELIDED) >= 8


def test_most_walkers_do_it_badly(deep_dir, chat):
    assert sum(right for _, _, right in play_walks(deep_dir, chat, 0.3)) <= 3


def test_walk_drills_are_learned_where_their_rule_decides(deep_dir, chat):
    ids, labels = text_drill(walks, np.random.default_rng(0), chat, load_world(deep_dir), 8, 256)
    assert ids.shape == labels.shape == (8, 256) and bool(
        ((labels == ids) | (labels == -100)).all()
    )
    learned = chat.decode(ids[0][labels[0] >= 0].tolist())
    assert learned.startswith("<think>") and "Next:" not in learned and "browse" in learned
    assert torch.equal(
        ids, text_drill(walks, np.random.default_rng(0), chat, load_world(deep_dir), 8, 256)[0]
    )


def shown_and_learned(source, chat):
    """The text of eight rows of a drill, apart: what is shown, and what there is loss on."""
    world = World(116, 5000, "pretrain", style="varied")
    ids, labels = text_drill(source, np.random.default_rng(0), chat, world, 8, 256)
    for row in range(8):
        is_shown = labels[row] < 0
        yield chat.decode(ids[row][is_shown].tolist()), chat.decode(ids[row][~is_shown].tolist())


def test_visit_drills_are_learned_at_the_address_and_at_what_the_record_says(chat):
    for shown, learned in shown_and_learned(visits, chat):
        calls = re.findall(r'"url": "(.*?)"', learned)
        assert calls and len(set(calls)) == len(calls)
        assert all(f" {url}\n" in shown for url in calls)
        records = re.findall(r"<tool_response>(p\d: .*?)</tool_response>", shown, re.DOTALL)
        answers = re.findall(r"<answer>(\w+)</answer>", learned)
        assert answers and all(value in record for value, record in zip(answers, records))
        # These signs stand only in layouts that training has not.
        assert "#" not in shown and "*" not in shown


def test_sum_drills_are_learned_at_the_operands_the_sign_and_the_result(chat):
    signs = {"sum": "{} + {}", "difference": "abs({} - {})", "product": "{} * {}"}
    for shown, learned in shown_and_learned(sums, chat):
        # With facts, there is loss on the operands, which stand in them.
        operations = re.findall(r"<think>((?:The .*?)?)(\w+): ((?:\d+, \d+)?)", shown)
        operands = iter(re.findall(r"(?:^|>)(\d+, \d+)\.</think>", learned))
        codes = re.findall(r"print\((.*?)\)\"", learned)
        assert 0 < len(codes) <= len(operations)
        for code, (facts, name, given) in zip(codes, operations):
            pair = (given or next(operands)).split(", ")
            assert bool(facts) != bool(given) and all(f" {n}." in facts for n in pair if facts)
            assert code == signs[name].format(*pair)
        answers = re.findall(r"<answer>(\d+)</answer>", learned)
        assert answers == [str(eval(code)) for code in codes][: len(answers)] != []


def test_plan_drills_take_the_names_out_of_questions_of_any_wording(chat):
    known = {frame.partition("{np}")[0] for frame in FRAMES["pretrain"]}
    is_new = set()
    for shown, learned in shown_and_learned(plans, chat):
        question = shown.split("\n")[0]
        plan = re.match(r"<think>(.*?)\.</think>", learned)[1]
        names = re.findall(r"\b[A-Z][a-z]{5}\b", plan)
        assert names and all(name in question for name in names)
        is_new.add(not any(question.startswith(start) for start in known if start))
    assert is_new == {False, True}


def test_the_measure_counts_addresses_that_are_copied_whole(chat, monkeypatch):
    def said(model, chat, row):
        tokens = chat.tokenizer.convert_ids_to_tokens(row[0][row[1]].tolist())
        return 0.0, [("", token, token not in wrong) for token in tokens]

    monkeypatch.setattr(data.pretrain, "tokens_of", said)
    wrong = set()
    assert addresses_copied(None, chat).count("100.0%") == 4
    wrong = {"test"}  # this token stands in most addresses, and nowhere else
    shares = re.findall(r"([\d.]+)% of 1", addresses_copied(None, chat))
    assert len(shares) == 4 and all(0 < float(share) < 60 for share in shares)


DRILLS = ["b3834507477a", "c23fc26306bc", "00816a047d0f", "92f6cef32bd0", "81c08e3a0658"]
DRILLS += ["65fe496fce4f"]
TRANSCRIPTS, WALKS = "7331db107717", ("25c12afdb1a4", "c743771f1eae")


def digest(rows) -> str:
    """Of (ids, mask) or (ids, labels), whatever they are arrays of."""
    numbers = [part.tolist() for row in rows for part in row]
    return hashlib.sha256(repr(numbers).encode()).hexdigest()[:12]


def test_the_recipe_writes_the_rows_that_the_shipped_model_learned_from(chat):
    """A change here means that data/nano or data/nano-deep cannot be made again."""
    drills = [
        copy_drill(np.random.default_rng(0), len(chat.tokenizer), 4, 256),
        fact_drill(np.random.default_rng(0), chat, 4, 256),
        *(
            text_drill(
                source,
                np.random.default_rng(0),
                chat,
                World(116, 5000, "pretrain", style="varied"),
                8,
                256,
            )
            for source in (plans, sums, visits, walks)
        ),
    ]
    assert [digest([drill]) for drill in drills] == DRILLS
    assert digest(write_transcripts(chat, 0, 2, 60, 60, 0.3, any_frame=0.5)) == TRANSCRIPTS
    segments, held_out = write_walks(chat, 0, 1, 300, 20, 0.7)
    assert (digest(segments), digest(held_out)) == WALKS
