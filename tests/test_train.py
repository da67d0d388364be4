import copy
import json
import math
import os
import random

import pytest
import torch
from accelerate import Accelerator

from context import Segment, Trajectory, Turn
from data.task import Task
from rollout import RolloutArgs
from support.run_folder import cut_lines, load_state, save, save_atomically, sha256, share_of
from train import (
    Policy,
    Row,
    TrainArgs,
    check_args,
    collate,
    gradient,
    micro_batches,
    rows_of,
    tasks_of_step,
)


def made_up_rows(count, seed=0, vocabulary=2000):
    rng = random.Random(seed)
    rows = []
    for _ in range(count):
        segment = Segment([])
        for turn in range(rng.randint(1, 4)):
            segment.append([rng.randrange(vocabulary) for _ in range(rng.randint(2, 20))])
            ids = [rng.randrange(vocabulary) for _ in range(rng.randint(1, 9))]
            segment.append(ids, turn, [-1.0] * len(ids))
        advantages = [rng.uniform(-1, 1) for _ in range(5)]
        rows.append(
            Row(segment, [advantages[turn] if turn >= 0 else 0.0 for turn in segment.turn_of])
        )
    return rows


def gradient_of(model, rows, args):
    """Gradient of the loss over rows, by name of the parameter."""
    model = copy.deepcopy(model)
    gradient(Policy(model, 1.0), Accelerator(cpu=True), rows, 100.0, args)
    return {name: p.grad for name, p in model.named_parameters()}


ARGS = TrainArgs(max_grad_norm=1e9)


def same(a, b, tolerance=1e-5):
    return all(torch.allclose(a[name], b[name], atol=tolerance) for name in a)


def test_gradient_by_hand(tiny):
    """-1/N sum A log pi, over the sampled tokens only, row by row without padding."""
    rows = made_up_rows(5)
    model = copy.deepcopy(tiny)
    loss = 0
    for row in rows:
        logprobs = torch.log_softmax(model(torch.tensor([row.segment.ids])).logits[0], -1)
        loss = (
            loss
            - sum(w * logprobs[t - 1, row.segment.ids[t]] for t, w in enumerate(row.weights) if w)
            / 100
        )
    loss.backward()
    assert same({n: p.grad for n, p in model.named_parameters()}, gradient_of(tiny, rows, ARGS))


def test_micro_batches_and_padding_change_nothing(tiny):
    rows = made_up_rows(9)
    whole = gradient_of(tiny, rows, ARGS)
    for micro_tokens in (1, 150, 100000):
        assert same(
            whole, gradient_of(tiny, rows, TrainArgs(max_grad_norm=1e9, micro_tokens=micro_tokens))
        )
    assert sorted(id(row) for batch in micro_batches(rows, 150) for row in batch) == sorted(
        map(id, rows)
    )


def test_observation_tokens_have_exactly_no_gradient(tiny):
    """Another observation *target* (with the same inputs elsewhere) leaves the loss unchanged; its logits get zero gradient."""
    rows = made_up_rows(3)
    ids, weights = collate(rows, "cpu")
    policy = Policy(tiny, 1.0)
    seen = {}
    handle = tiny.lm_head.register_forward_hook(
        lambda m, inputs, logits: seen.update(rows=logits.shape[0])
    )
    policy(ids, weights != 0)
    handle.remove()
    assert seen["rows"] == int((weights != 0).sum())  # no logits exist where there is no loss
    hidden = {}
    handle = tiny.model.register_forward_hook(
        lambda m, a, out: (
            hidden.update(h=out.last_hidden_state),
            out.last_hidden_state.retain_grad(),
        )[-1]
    )
    (policy(ids, weights != 0) * weights[weights != 0]).sum().backward()
    handle.remove()
    not_in_loss = weights[:, 1:] == 0
    assert (
        float(hidden["h"].grad[not_in_loss].abs().max()) == 0.0
        and float(hidden["h"].grad[~not_in_loss].abs().min(-1).values.max()) > 0
    )


def trajectory(versions=(3, 3), segments=1):
    t = Trajectory(Task("i", "q", "a"), (0,))
    t.turns = [Turn([5, 6], [-1.0, -1.0], v, [7, 8]) for v in versions]
    t.segments = [Segment([])]
    t.segments[0].append([1, 2])
    for number in range(len(versions)):
        if number and segments == 2:
            t.segments.append(Segment([]))
            t.segments[-1].append(
                [1, 2, 5, 6, 7, 8]
            )  # rewritten: old actions come back as context, not as actions
        t.segments[-1].append([5, 6], number, [-1.0, -1.0])
        t.segments[-1].append([7, 8])
    return t


def test_stale_turns_get_no_weight():
    (row,) = rows_of(trajectory(versions=(2, 3)), [0.5, 0.7], version=3)
    assert row.weights == [0, 0, 0, 0, 0, 0, 0.7, 0.7, 0, 0]
    assert rows_of(trajectory(versions=(2, 2)), [0.5, 0.7], version=3) == []


def test_what_stale_turns_weigh(tiny):
    """mask: nothing. keep: as they are. is: times min(2, p_now / p_sampler), a constant of the gradient; current turns times 1."""
    t = trajectory(versions=(2, 3))
    mask, keep, corrected = (rows_of(t, [0.5, 0.7], 3, stale) for stale in ("mask", "keep", "is"))
    assert mask[0].weights == [0, 0, 0, 0, 0, 0, 0.7, 0.7, 0, 0] and not mask[0].correct
    assert (
        keep[0].weights == corrected[0].weights == [0, 0, 0.5, 0.5, 0, 0, 0.7, 0.7, 0, 0]
        and not keep[0].correct
    )
    assert corrected[0].correct == [False, False, True, True] + [False] * 6
    with torch.no_grad():
        now = torch.log_softmax(tiny(torch.tensor([t.segments[0].ids])).logits[0], -1)[
            [1, 2], [5, 6]
        ]
    for gap, ratio in (
        (-0.3, math.exp(-0.3)),
        (0.2, math.exp(0.2)),
        (5.0, 2.0),
    ):  # log p_now - log p_sampler; the last one is cut
        t.segments[0].logprobs[2:4] = (now - gap).tolist()
        by_hand = copy.deepcopy(keep)
        by_hand[0].weights = [0, 0, 0.5 * ratio, 0.5 * ratio, 0, 0, 0.7, 0.7, 0, 0]
        assert same(
            gradient_of(tiny, rows_of(t, [0.5, 0.7], 3, "is"), ARGS),
            gradient_of(tiny, by_hand, ARGS),
            1e-6,
        )
    assert not same(gradient_of(tiny, keep, ARGS), gradient_of(tiny, by_hand, ARGS), 1e-4)


def test_parked_work_is_dealt_out_to_another_number_of_ranks():
    states = [{"next_number": 5, "groups": ["a", "b"]}, {"next_number": 4, "groups": ["c"]}]
    assert (
        share_of(states, 1, 2) == states[1]
        and share_of([None], 0, 1) is None
        and share_of([], 0, 1) is None
    )
    assert share_of(states, 0, 1) == {"next_number": 10, "groups": ["a", "b", "c"]}
    assert [share_of(states, rank, 3)["groups"] for rank in range(3)] == [["a"], ["b"], ["c"]]


def test_splitting_into_segments_leaves_the_gradient_unchanged(tiny):
    one, two = (rows_of(trajectory(segments=n), [0.5, 0.7], version=3) for n in (1, 2))
    assert len(one) == 1 and len(two) == 2
    assert same(gradient_of(tiny, one, ARGS), gradient_of(tiny, two, ARGS), 1e-6)


def test_a_longer_trajectory_does_not_thin_the_others(tiny):
    """Constant denominator: adding a row adds its gradient and changes nothing of the rest."""
    rows = made_up_rows(4)
    all_of, first, rest = (
        gradient_of(tiny, rows, ARGS),
        gradient_of(tiny, rows[:1], ARGS),
        gradient_of(tiny, rows[1:], ARGS),
    )
    assert same(all_of, {name: first[name] + rest[name] for name in first})


def test_a_gradient_that_is_not_finite_is_none(tiny):
    rows = made_up_rows(1)
    rows[0].weights = [float("nan") if w else 0.0 for w in rows[0].weights]
    assert (
        gradient(Policy(copy.deepcopy(tiny), 1.0), Accelerator(cpu=True), rows, 1.0, ARGS) is None
    )


def test_task_order_is_a_function_of_seed_and_step():
    tasks = [Task(str(i), f"q{i}", "a") for i in range(10)]
    drawn = [t.id for step in range(5) for t in tasks_of_step(tasks, step, 4, 0)]
    assert sorted(drawn[:10], key=int) == sorted(drawn[10:], key=int) == [str(i) for i in range(10)]
    assert [t.id for t in tasks_of_step(tasks, 3, 4, 0)] == drawn[12:16]
    assert [t.id for step in range(5) for t in tasks_of_step(tasks, step, 4, 1)] != drawn


def test_a_failed_save_keeps_the_old_folder(tmp_path):
    save_atomically(tmp_path / "c", lambda folder: (folder / "x").write_text("old"))

    def disk_full(folder):
        (folder / "x").write_text("half")
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError):
        save_atomically(tmp_path / "c", disk_full)
    assert (tmp_path / "c" / "x").read_text() == "old" and [p.name for p in tmp_path.iterdir()] == [
        "c"
    ]


@pytest.mark.parametrize(
    "error", [OSError(28, "No space left on device"), RuntimeError("unexpected pos 1 vs 2")]
)
def test_a_full_disk_leaves_the_last_state_and_no_rest(tmp_path, tiny, chat, monkeypatch, error):
    policy, optimizer = Policy(tiny, 1.0), torch.optim.AdamW(tiny.parameters())
    save(tmp_path, 1, policy, optimizer, chat, [None])

    def full(what, path):
        path.write_bytes(b"half")
        raise error

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(OSError):
        save(tmp_path, 2, policy, optimizer, chat, [None])
    assert load_state(tmp_path)["step"] == 1 and [
        p.name[:11] for p in (tmp_path / "state").iterdir()
    ] == ["step-000001"]
    assert {p.name for p in tmp_path.iterdir()} == {"state", "checkpoint"} and (
        tmp_path / "checkpoint/model.safetensors"
    ).exists()


def test_a_damaged_state_falls_back_to_the_one_before(tmp_path, capsys):
    (tmp_path / "state").mkdir()
    torch.save({"step": 1}, tmp_path / "good")
    digest = sha256(tmp_path / "good")
    os.replace(tmp_path / "good", tmp_path / "state" / f"step-000001-{digest}.pt")
    (tmp_path / "state" / "step-000002-0123456789abcdef.pt").write_bytes(b"torn")
    changed = bytearray((tmp_path / "state" / f"step-000001-{digest}.pt").read_bytes())
    changed[len(changed) // 2] ^= 1
    (tmp_path / "state" / f"step-000003-{digest}.pt").write_bytes(changed)
    assert load_state(tmp_path) == {"step": 1}
    assert capsys.readouterr().err.count(" is damaged ") == 2
    with pytest.raises(FileNotFoundError, match="start anew"):
        load_state(tmp_path / "absent")


def test_lines_of_undone_steps_are_cut(tmp_path):
    path = tmp_path / "m.jsonl"
    path.write_text(
        "".join(json.dumps({"step": n}) + "\n" for n in range(1, 6)) + '{"step": 6, "to'
    )
    cut_lines(path, 3)
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [1, 2, 3]


@pytest.mark.parametrize(
    "changes, rollout_changes",
    [
        (dict(stale="some"), {}),
        (dict(partial=True), {}),
        (dict(rollout="async", overlap=True), {}),
        (dict(rollout="async", partial=True, max_age=0), {}),
        ({}, dict(temperature=0.0)),
        (dict(samples=0), {}),
        (dict(gamma=0.0), {}),
        (dict(learning_rate=float("nan")), {}),
        (dict(negatives=-1.0), {}),
        (dict(format_penalty=-1.0), {}),
        (dict(eval_every=-1), {}),
        (dict(max_grad_norm=0.0), {}),
        (dict(nominal_tokens=0), {}),
        ({}, dict(max_turns=0)),
        ({}, dict(slots=0)),
        ({}, dict(context="forget")),
        ({}, dict(context="summarize", context_budget=900)),
        ({}, dict(max_context=96)),
        ({}, dict(page_chars=0)),
        ({}, dict(temperature=float("nan"))),
    ],
)
def test_flags_that_cannot_work(changes, rollout_changes):
    with pytest.raises(ValueError, match="--"):
        check_args(TrainArgs(**changes), RolloutArgs(**rollout_changes))
