"""The warm start: what it learns from, where it stops, and what it leaves."""

import os
import re
import signal
import subprocess

import numpy as np
import pytest
import torch
from conftest import ROOT

import data.warm_start
import train
from context import Chat
from data.base.explorers import write_transcripts
from data.warm_start import Args, learn, main, read_transcripts
from engine import load_policy
from rollout import RolloutArgs
from tools import signatures
from train import Policy

FAST = {"transcripts": 3, "batch_tokens": 300, "eval_tasks": 2, "eval_every": 2, "until_pass": 2}


@pytest.fixture
def warm(tiny, tokenizer, tmp_path, run_here):
    """warm(**flags) runs the command on a tiny random model, and returns how it ended."""
    tiny.save_pretrained(tmp_path / "tiny")
    tokenizer.save_pretrained(tmp_path / "tiny")

    def run(**flags) -> subprocess.CompletedProcess:
        flags = FAST | {"model": tmp_path / "tiny", "out": tmp_path / "warm", "steps": 3} | flags
        return run_here(main, *(word for name in flags for word in (f"--{name}", flags[name])))

    before = signal.getsignal(signal.SIGTERM)
    yield run
    signal.signal(signal.SIGTERM, before)


@pytest.mark.parametrize("precision, gap", [("auto", 1e-4), ("bf16", 1.0)])
def test_the_folder_that_it_leaves_trains(warm, run_here, tmp_path, precision, gap):
    said = warm(precision=precision).stdout
    lines = [line for line in said.splitlines() if line.startswith("step ")]
    assert [line.split(":")[0] for line in lines] == ["step 0", "step 2", "step 3"]
    assert all(
        words in lines[2] for words in ("loss", "Pass@1", "valid turns", " tokens", "GB", "s,")
    )
    assert said.splitlines()[-1].startswith("done after 3 steps")
    flags = "--steps 1 --tasks_per_step 1 --samples 2 --eval_tasks 0 --processes 1 --check_logprobs"
    flags += f" --max_turns 2 --train_tasks data/dev.jsonl --precision {precision}"
    model = ["--model", tmp_path / "warm", "--out", tmp_path / "run"]
    done = run_here(train.main, *flags.split(), *model)
    assert done.returncode == 0 and "update 1" in done.stdout, done.stderr
    assert gap / 1e4 < float(re.search(r"log-prob (\S+),", done.stdout)[1]) < gap
    assert (tmp_path / "run" / "checkpoint" / "model.safetensors").exists()


def test_its_result_follows_from_the_seed(warm, tmp_path, tiny):
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        warm(out=tmp_path / name, seed=seed, steps=2)
    a, b, c = (load_policy(str(tmp_path / name))[0].state_dict() for name in "abc")
    assert all(torch.equal(a[key], b[key]) for key in a)
    assert not all(torch.equal(a[key], c[key]) for key in a)
    assert not all(torch.equal(a[key], tiny.state_dict()[key]) for key in a)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_what_was_learned_is_saved_when_it_is_stopped(warm, monkeypatch, tmp_path, number, tiny):
    calls = []

    def stopped(*args) -> float:
        calls.append(args)
        if len(calls) == 2:
            os.kill(os.getpid(), number)
        return learn(*args)

    monkeypatch.setattr(data.warm_start, "learn", stopped)
    assert "stopped after 1 steps" in warm(steps=9, eval_every=9).stdout
    saved = load_policy(str(tmp_path / "warm"))[0].state_dict()
    assert not all(torch.equal(saved[key], tiny.state_dict()[key]) for key in saved)
    assert not list(tmp_path.glob("warm.*"))


@pytest.mark.parametrize(
    "seen, steps",
    [
        ([(0, 0), (0.2, 0.5), (0.05, 0.9), (0.08, 0.8), (1, 1)], 6),  # both goals, together
        ([(0.1, 0.9)], 0),  # the model plays already
        ([(0, 0)] * 5, 7),
    ],
)
def test_it_ends_where_turns_are_valid_and_some_are_right(warm, monkeypatch, seen, steps):
    left = iter(seen)
    monkeypatch.setattr(data.warm_start, "measure", lambda *_: (*next(left), ""))
    assert f"done after {steps} steps" in warm(steps=7, until_pass=0.08, until_valid=0.8).stdout


@pytest.mark.parametrize(
    "flags, words",
    [
        ({"out": ROOT / "data"}, "exists: choose another folder"),
        ({"model": "no/such/model/here"}, "cannot load the model"),
        ({"batch_tokens": 100_000}, "transcripts fill no batch"),
        ({"max_new_tokens": 5}, "0 transcripts fill no batch"),
        ({"steps": 0}, "--steps must be at least 1"),
        ({"families": "logic"}, "invalid choice"),
        ({"dev_tasks": "data/deep-dev.jsonl", "families": "lookup"}, "no task of these families"),
        ({"dev_tasks": "nothing.jsonl"}, "nothing.jsonl"),
        ({"max_context": 100}, "--max_context is too small"),
        ({"read_tasks": "data/dev.jsonl"}, "give --read_tasks a --corpus"),
    ],
)
def test_what_cannot_work_is_one_line(warm, flags, words):
    done = warm(**flags)
    assert (
        done.returncode and words in done.stderr.splitlines()[-1] and "Traceback" not in done.stderr
    )


def test_the_loss_is_on_the_explorers_own_tokens_alone(tiny, chat):
    rows = write_transcripts(chat, 0, 1, 60, 4, 0.3)
    ids, own = (torch.from_numpy(part) for part in rows[0])
    logprobs = tiny(input_ids=ids[None].long()).logits.log_softmax(-1)[0, :-1]
    said = logprobs.gather(-1, ids[1:, None].long())[:, 0][own[1:]]
    policy, still = Policy(tiny, 1.0), torch.optim.SGD(tiny.parameters(), lr=0.0)
    assert learn(policy, still, rows[:1], Args()) == pytest.approx(-said.mean().item(), abs=1e-4)
    whole, cut = (learn(policy, still, rows, Args(micro_tokens=n)) for n in (9999, 1))
    assert whole == pytest.approx(cut, abs=1e-4)
    rounded = learn(policy, still, rows, Args(), "bf16")
    assert 0 < abs(rounded - learn(policy, still, rows, Args(), "fp32")) < 0.05
    moving = torch.optim.AdamW(tiny.parameters(), lr=1e-2)
    losses = [learn(policy, moving, rows, Args()) for _ in range(5)]
    assert losses[-1] < losses[0] - 0.5


def test_explorers_keep_the_limits_of_the_agent_loop(chat):
    def texts(families=(), **limits) -> list[str]:
        args = RolloutArgs(**limits)
        rows = write_transcripts(chat, 0, 1, 60, 60, 0.9, args, families)
        assert all(len(ids) == len(own) <= args.max_context for ids, own in rows)
        return [chat.decode(ids.tolist()) for ids, _ in rows]

    pages = lambda texts: max(
        int(n) for text in texts for n in re.findall(r"page 1 of (\d+)", text)
    )
    turns = lambda texts: max(text.count("<think>") - 1 for text in texts)  # one is the prompt's
    few, many = texts(max_turns=2, max_context=700), texts()
    assert turns(few) == 2 and turns(many) > 4
    assert pages(texts(page_chars=100)) > pages(many)
    found = r'"search".*?<tool_response>(.*?)</tool_response>'
    for number, shown in ((1, False), (2, True)):
        results = re.findall(found, "".join(texts(search_results=number)), re.DOTALL)
        assert any("[2]" in text for text in results) == shown
    families = ["lookup", "browse"]
    asked = "".join(text.split("<|im_start|>assistant")[0] for text in texts(families))
    assert "difference" not in asked and "difference" in "".join(many)


def test_a_transcript_with_a_turn_too_long_to_sample_is_left_out(chat, capsys):
    args = Args(transcripts=20, batch_tokens=500)
    turns = lambda batches: [row for batch in batches for row in batch]
    all_of_them = turns(read_transcripts(chat, args, RolloutArgs(), None, []))
    most = max(np.diff(np.flatnonzero(np.diff([0, *own, 0])))[::2].max() for _, own in all_of_them)
    fewer = turns(read_transcripts(chat, args, RolloutArgs(max_new_tokens=int(most) - 1), None, []))
    assert 0 < len(fewer) < len(all_of_them) and "left out" in capsys.readouterr().out


def test_a_large_vocabulary_fits(chat):
    """Ids above 32767, as SmolLM2 has them."""

    class Shifted(Chat):
        def encode(self, *texts, **more):
            return [i + 40_000 for i in chat.encode(*texts, **more)]

    large = Shifted.__new__(Shifted)
    large.__dict__ = Chat(chat.tokenizer, signatures()).__dict__ | {"end_id": chat.end_id + 40_000}
    large.__dict__.pop("encode")
    rows, plain = (write_transcripts(each, 0, 1, 60, 4, 0.3) for each in (large, chat))
    for (ids, own), (small, _) in zip(rows, plain):
        assert (ids[own] == small[own] + 40_000).all() and ids[own].min() >= 40_000
