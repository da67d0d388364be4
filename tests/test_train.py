"""The loss and its gradient by hand, the stream of tasks, metrics, flags, and the run's folder."""

import copy
import itertools
import json
import math
import os
import random
from collections import Counter, deque
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from safetensors import SafetensorError

import support.run
from context import Segment, Trajectory, Turn
from data.task import Task, task_at
from reward import Reward, control_negatives
from rollout import EVALUATION, Group, RolloutArgs, SyncRollouts, new_group
from support import batches, processes
from support.batches import micro_batches, padded
from support.checks import check_args
from support.curriculum import Curriculum
from support.flags import parse_flags
from support.metrics import counts_of, metrics_of
from support.run import Run
from support.run_folder import (
    MAY_CHANGE,
    choose_folder,
    cut_lines,
    flags_of,
    load_state,
    lock,
    save,
    save_atomically,
    save_config,
    sha256,
    share_of,
    take_config,
)
from train import (
    IS_CAP,
    Policy,
    Row,
    TrainArgs,
    gradient,
    learning_rate_at,
    loss_of,
    rows_of,
)
from workers import AsyncArgs

ARGS = TrainArgs(max_grad_norm=1e9)
ROLLOUTS = SimpleNamespace(parked=lambda: 3, restarts=1, idle_share=0.25)


def row_of(segment: Segment, turn_advantages: list[float]) -> Row:
    """A row in which every sampled token is in the loss and none is stale."""
    by_token = [turn_advantages[turn] if turn >= 0 else 0.0 for turn in segment.turn_of]
    return Row(segment, by_token, [False] * len(by_token))


def made_up_rows(count, seed=0, vocabulary=2000):
    rng = random.Random(seed)
    rows = []
    for _ in range(count):
        segment = Segment()
        for turn in range(rng.randint(1, 4)):
            segment.append([rng.randrange(vocabulary) for _ in range(rng.randint(2, 20))])
            ids = [rng.randrange(vocabulary) for _ in range(rng.randint(1, 9))]
            segment.append(ids, turn, [-1.0] * len(ids))
        rows.append(row_of(segment, [rng.uniform(-1, 1) for _ in range(5)]))
    return rows


def gradient_of(model, rows, args):
    """Gradient of the loss over rows, by name of the parameter."""
    model = copy.deepcopy(model)
    gradient(Policy(model, 1.0), Accelerator(cpu=True), rows, 100.0, args)
    return {name: p.grad for name, p in model.named_parameters()}


def same(a, b, tolerance=1e-5):
    return all(torch.allclose(a[name], b[name], atol=tolerance) for name in a)


# ------------------------------------------------------------------------------------- the loss


def test_gradient_by_hand(tiny):
    """-1/N sum A log pi, over the sampled tokens only, row by row without padding."""
    rows = made_up_rows(5)
    model = copy.deepcopy(tiny)
    loss = 0
    for row in rows:
        ids = row.segment.ids
        logprobs = torch.log_softmax(model(torch.tensor([ids])).logits[0], -1)
        in_loss = [(t, advantage) for t, advantage in enumerate(row.advantages) if advantage]
        loss = loss - sum(a * logprobs[t - 1, ids[t]] for t, a in in_loss) / 100
    loss.backward()
    assert same({n: p.grad for n, p in model.named_parameters()}, gradient_of(tiny, rows, ARGS))


def test_micro_batches_and_padding_change_nothing(tiny):
    rows = made_up_rows(9)
    whole = gradient_of(tiny, rows, ARGS)
    for micro_tokens in (1, 150, 100000):
        args = TrainArgs(max_grad_norm=1e9, micro_tokens=micro_tokens)
        assert same(whole, gradient_of(tiny, rows, args))
    batches = micro_batches(rows, 150)
    assert sorted(id(row) for batch in batches for row in batch) == sorted(map(id, rows))
    lengths = [[len(row.segment.ids) for row in batch] for batch in batches]
    assert all(len(batch) == 1 or len(batch) * max(batch) <= 150 for batch in lengths)


def test_every_rank_gets_as_many_micro_batches(monkeypatch):
    """Also a rank that has sampled nothing; what it lacks has weight 0."""
    parts = [made_up_rows(6), made_up_rows(1), []]
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: len(parts))
    monkeypatch.setattr(batches, "gather_object", lambda rows: sum(parts, []))
    shares = []
    for rank, rows in enumerate(parts):
        monkeypatch.setattr(torch.distributed, "get_rank", lambda rank=rank: rank)
        shares.append(batches.shared_batches(rows, 1))
    assert [len(share) for share in shares] == [3, 3, 3]
    trained = [row for share in shares for batch, weight in share if weight for row in batch]
    assert sorted(map(id, trained)) == sorted(map(id, sum(parts, [])))
    lacking = [batch for share in shares for batch, weight in share if not weight]
    assert len(lacking) == 2 and all(len(batch) == 1 for batch in lacking)
    parts = [[], [], []]
    assert batches.shared_batches([], 1) == []


def test_observation_tokens_have_exactly_no_gradient(tiny):
    """No logits exist where there is no loss, and the hidden states there get a gradient of 0."""
    rows = made_up_rows(3)
    ids = padded([row.segment.ids for row in rows], torch.long, "cpu")
    advantage = padded([row.advantages for row in rows], torch.float32, "cpu")
    policy, seen = Policy(tiny, 1.0), {}
    handle = tiny.lm_head.register_forward_hook(
        lambda module, inputs, logits: seen.update(rows=logits.shape[0])
    )
    policy(ids, advantage != 0)
    handle.remove()
    assert seen["rows"] == int((advantage != 0).sum())

    def keep(module, inputs, output):
        seen["hidden"] = output.last_hidden_state
        output.last_hidden_state.retain_grad()

    handle = tiny.model.register_forward_hook(keep)
    loss_of(policy, rows, "cpu").backward()
    handle.remove()
    not_in_loss = advantage[:, 1:] == 0
    grad = seen["hidden"].grad.abs()
    assert float(grad[not_in_loss].max()) == 0.0 < float(grad[~not_in_loss].min(-1).values.max())


def trajectory(versions=(3, 3), segments=1):
    """Two turns of two tokens each, the first four prompt tokens and observations in between."""
    t = Trajectory(Task("i", "q", "a"), (0,))
    t.turns = [Turn([5, 6], [-1.0, -1.0], v, [7, 8]) for v in versions]
    t.segments = [Segment()]
    t.segments[0].append([1, 2])
    for number in range(len(versions)):
        if number and segments == 2:  # old actions come back as context, not as actions
            t.segments.append(Segment())
            t.segments[-1].append([1, 2, 5, 6, 7, 8])
        t.segments[-1].append([5, 6], number, [-1.0, -1.0])
        t.segments[-1].append([7, 8])
    return t


def test_the_mask_is_what_the_current_policy_sampled():
    (row,) = rows_of(trajectory(versions=(2, 3)), [0.5, 0.7], version=3)
    assert row.advantages == [0, 0, 0, 0, 0, 0, 0.7, 0.7, 0, 0] and not any(row.reweighted)
    assert rows_of(trajectory(versions=(2, 2)), [0.5, 0.7], version=3) == []
    first, second = rows_of(trajectory(segments=2), [0.5, 0.7], version=3)
    assert first.advantages == [0, 0, 0.5, 0.5, 0, 0]
    assert second.advantages == [0, 0, 0, 0, 0, 0, 0.7, 0.7, 0, 0]


def test_what_stale_turns_count(tiny):
    """mask: nothing. keep: as they are. is: times min(2, p_now / p_sampler), a constant of the
    gradient. Current turns count as they are."""
    t = trajectory(versions=(2, 3))
    mask, keep, corrected = (rows_of(t, [0.5, 0.7], 3, stale) for stale in ("mask", "keep", "is"))
    all_of = [0, 0, 0.5, 0.5, 0, 0, 0.7, 0.7, 0, 0]
    assert mask[0].advantages == [0, 0, 0, 0, 0, 0, 0.7, 0.7, 0, 0]
    assert keep[0].advantages == corrected[0].advantages == all_of
    assert not any(mask[0].reweighted) and not any(keep[0].reweighted)
    assert corrected[0].reweighted == [False, False, True, True] + [False] * 6
    with torch.no_grad():
        logits = tiny(torch.tensor([t.segments[0].ids])).logits[0]
    now = torch.log_softmax(logits, -1)[[1, 2], [5, 6]]
    # log p_now - log p_sampler, and the ratio; the last one is cut.
    for gap, ratio in ((-0.3, math.exp(-0.3)), (0.2, math.exp(0.2)), (5.0, IS_CAP)):
        t.segments[0].logprobs[2:4] = (now - gap).tolist()
        by_hand = copy.deepcopy(keep)
        by_hand[0].advantages = [0, 0, 0.5 * ratio, 0.5 * ratio, 0, 0, 0.7, 0.7, 0, 0]
        with_ratios = gradient_of(tiny, rows_of(t, [0.5, 0.7], 3, "is"), ARGS)
        assert same(with_ratios, gradient_of(tiny, by_hand, ARGS), 1e-6)
    assert not same(gradient_of(tiny, keep, ARGS), gradient_of(tiny, by_hand, ARGS), 1e-4)


def test_splitting_into_segments_leaves_the_gradient_unchanged(tiny):
    one, two = (rows_of(trajectory(segments=n), [0.5, 0.7], version=3) for n in (1, 2))
    assert len(one) == 1 and len(two) == 2
    assert same(gradient_of(tiny, one, ARGS), gradient_of(tiny, two, ARGS), 1e-6)


def test_a_longer_trajectory_does_not_thin_the_others(tiny):
    """Constant denominator: adding a row adds its gradient and changes nothing of the rest."""
    rows = made_up_rows(4)
    all_of, first, rest = (gradient_of(tiny, some, ARGS) for some in (rows, rows[:1], rows[1:]))
    assert same(all_of, {name: first[name] + rest[name] for name in first})


def test_a_gradient_that_is_not_finite_is_none(tiny):
    rows = made_up_rows(1)
    rows[0].advantages = [float("nan") if a else 0.0 for a in rows[0].advantages]
    policy = Policy(copy.deepcopy(tiny), 1.0)
    assert gradient(policy, Accelerator(cpu=True), rows, 1.0, ARGS) is None
    assert gradient(policy, Accelerator(cpu=True), [], 1.0, ARGS) == 0.0


# ------------------------------------------------------------------- tasks, rewards and rate


def test_task_order_is_a_function_of_seed_and_position():
    tasks = [Task(str(i), f"q{i}", "a") for i in range(10)]
    drawn = [task_at(tasks, position, 0).id for position in range(20)]
    assert sorted(drawn[:10], key=int) == sorted(drawn[10:], key=int) == [str(i) for i in range(10)]
    assert drawn[:10] != drawn[10:]
    assert [task_at(tasks, position, 1).id for position in range(20)] != drawn


def test_the_curriculum_draws_what_fails():
    kinds = [("lookup", 1)] * 30 + [("compute", 2)] * 10
    tasks = [Task(str(i), "q", "a", family=f, hops=h) for i, (f, h) in enumerate(kinds)]
    stream = Curriculum(tasks, seed=3, on=True)
    fresh = [stream.task_at(position).id for position in range(400)]
    assert set(fresh) == {task.id for task in tasks}  # before anything is known all are alike
    share = stream.learn({"0": 8, "1": 8, "30": 8}, {"0": 8, "1": 7, "30": 0})
    assert share["compute 2"] > 0.5 and sum(share.values()) == pytest.approx(1)
    drawn = Counter(stream.task_at(position).id for position in range(20_000))
    assert len(drawn) == 40  # none is never drawn
    assert drawn["30"] > drawn["31"] > drawn["2"] > drawn["0"]  # own attempts, kind, kind, own
    for number, task in enumerate(tasks):  # in proportion to the expected rate of failure
        expected = stream.rates[number] / stream.rates.sum() * 20_000
        assert abs(drawn[task.id] - expected) < 5 * expected**0.5

    resumed = Curriculum(tasks, 3, True, json.loads(json.dumps(stream.state())))
    assert all(resumed.task_at(p) == stream.task_at(p) for p in range(50))
    off = Curriculum(tasks, 3, False, stream.state())
    assert [off.task_at(p) for p in range(60)] == [task_at(tasks, p, 3) for p in range(60)]
    for _ in range(100):  # what is long past is forgotten
        stream.learn({}, {})
    assert np.ptp(stream.rates) < 0.01


def source_of(monkeypatch, mode, tasks, update, rank=0, ranks=1, per_update=4, state=None):
    """What train.py's rollouts of a rank play from this update on: (next_group, groups of an
    update, number of the first one). No worker is started: only what one would get is looked at."""
    opened = []
    monkeypatch.setattr(support.run, "AsyncRollouts", lambda *given: opened.append(given))
    args = TrainArgs(rollout=mode, tasks_per_step=per_update, samples=2, seed=7)
    run = Run(args, [])
    run.rank, run.ranks, run.local_ranks, run.done = rank, ranks, ranks, update
    run.device, run.state = torch.device("cpu"), {"rollouts": state} if state else None
    run.learner = SimpleNamespace(model=None, loop=SimpleNamespace(args=RolloutArgs(), engine=None))
    rollouts = run.open_rollouts(tasks, AsyncArgs(workers=1))
    if mode == "sync":
        assert isinstance(rollouts, SyncRollouts)
        return rollouts.next_group, rollouts.enough, rollouts.next_number
    [(_, _, _, next_group, enough, _, version, state, _)] = opened
    assert version == update
    return next_group, enough, state["next_number"]


def groups_of_update(monkeypatch, mode, tasks, update, rank=0, ranks=1):
    next_group, enough, first = source_of(monkeypatch, mode, tasks, update, rank, ranks)
    return [next_group(number, update) for number in range(first, first + enough)]


def test_both_modes_draw_alike(monkeypatch):
    """The same task with the same keys, hence the same random numbers, stands at a position of the
    stream, in any mode and on any number of ranks."""
    tasks = [Task(str(i), f"q{i}", "a") for i in range(6)]
    described = lambda groups: sorted(
        (group.position, t.task.id, t.key) for group in groups for t in group.trajectories
    )
    for update in (0, 2):
        wanted = described(groups_of_update(monkeypatch, "sync", tasks, update))
        positions = sorted({position for position, _, _ in wanted})
        assert positions == [4 * update + k for k in range(4)]
        assert all(key[:3] == (7, 0, position) for position, _, key in wanted)
        for mode in ("sync", "async"):
            for ranks in (1, 2, 3):
                dealt = []
                for rank in range(ranks):
                    dealt += groups_of_update(monkeypatch, mode, tasks, update, rank, ranks)
                assert described(dealt) == wanted


def test_a_task_that_stands_twice_in_an_update_is_attempted_with_other_keys(monkeypatch):
    groups = groups_of_update(monkeypatch, "sync", [Task("only", "q", "a")], 3)
    keys = [t.key for group in groups for t in group.trajectories]
    assert len(groups) == 4 and len(set(keys)) == len(keys) == 8
    held_out = new_group(Task("only", "q", "a"), 12, 2, 7, stream=EVALUATION)
    assert not set(keys) & {t.key for t in held_out.trajectories}


def test_learning_rate_warms_up_and_decays_to_a_tenth():
    args = TrainArgs(learning_rate=1.0, warmup=4, decay_steps=10)
    rates = [learning_rate_at(update, args) for update in range(20)]
    assert rates[:2] == pytest.approx([0.25, 0.5 * 0.91])
    assert rates[10:] == pytest.approx([0.1] * 10)
    constant = TrainArgs(learning_rate=1.0, warmup=1, decay_steps=0)
    assert [learning_rate_at(update, constant) for update in (0, 99)] == [1.0, 1.0]


# ------------------------------------------------------------------------------------- metrics


def made_up_group(family: str, lengths: list[int], version=3, statuses=None) -> Group:
    """A group of one-turn trajectories with so many sampled tokens, each of log-prob -0.5."""
    group = new_group(Task(family, "q", "a", family=family), 0, len(lengths), 0)
    statuses = statuses or ["answered"] * len(lengths)
    for t, length, status in zip(group.trajectories, lengths, statuses):
        t.turns = [Turn([5] * length, [-0.5] * length, version)]
        t.status, t.error = status, "bad_json" if status == "format_error" else ""
    return group


def test_metrics_by_hand():
    """Three groups: one right answer among wrong ones, one where all are alike, and one where the
    environment failed a trajectory, which is in no group then."""
    right = lambda: Reward(1.0, 1.0, parts={"correct": 1.0, "short": 0.2})
    wrong = lambda: Reward(0.0, 0.0, parts={"correct": 0.0})
    malformed = Reward(-0.5, 0.0, False, {"format": -0.5})
    groups = [
        made_up_group("hop", [2, 4, 4, 6], statuses=["answered"] * 3 + ["format_error"]),
        made_up_group("hop", [1, 1]),
        made_up_group("list", [10, 12], version=2, statuses=["answered", "tool_fault"]),
    ]
    outcomes = [[right(), wrong(), wrong(), malformed], [wrong(), wrong()], [right()]]
    kept = [control_negatives(group, 2.0) for group in outcomes]
    # The mean of the first group is 1/8, so three lie below it. Two are kept for one positive: the
    # format failure first. In the other groups none lies below the mean.
    assert kept == [[True, True, False, True], [True, True], [True]]
    total = counts_of(groups, outcomes, kept, 10, ROLLOUTS)
    metrics = metrics_of(total, version=3)
    assert metrics == {
        "reward": pytest.approx(1.5 / 7),
        "reward_parts": pytest.approx({"correct": 2 / 7, "short": 0.4 / 7, "format": -0.5 / 7}),
        "pass_rate": 2 / 8,
        "pass_rate_by_family": {"hop": 1 / 6, "list": 1 / 2},
        "turns": 1.0,
        "tokens": 40 / 8,
        "entropy": 0.5,
        "zero_variance_groups": 2 / 3,
        "all_right_groups": 1 / 3,
        "all_wrong_groups": 1 / 3,
        "kept_negatives": 2 / 3,
        "stale_share": 22 / 40,
        "staleness": {"0": 18 / 40, "1": 22 / 40},
        "trained_share": 10 / 40,
        "status": {"answered": 6, "format_error": 1, "tool_fault": 1},
        "format_errors": {"bad_json": 1},
        "parked": 3,
        "restarts": 1,
        "idle_share": 0.25,
    }


def test_metrics_of_nothing():
    """All trajectories were the environment's failures, and nothing was sampled."""
    groups = [made_up_group("hop", [0, 0], statuses=["tool_fault"] * 2)]
    metrics = metrics_of(counts_of(groups, [[]], [[]], 0, ROLLOUTS), 0)
    assert metrics["reward"] == metrics["pass_rate"] == metrics["zero_variance_groups"] == 0
    assert metrics["kept_negatives"] == 1  # none was dropped
    assert metrics["pass_rate_by_family"] == {"hop": 0} and metrics["reward_parts"] == {}
    json.dumps(metrics)


def test_counts_of_ranks_are_added(monkeypatch):
    other = {"turns": 4, "parts": {"correct": 2.0, "mine": 1.0}, "versions": {3: 5}}
    monkeypatch.setattr(processes, "gather_object", lambda mine: [*mine, other])
    mine = {"turns": 3, "parts": {"correct": 1.0}, "versions": {2: 7}}
    assert processes.sum_over_ranks(mine) == {
        "turns": 7,
        "parts": {"correct": 3.0, "mine": 1.0},
        "versions": {2: 7, 3: 5},
    }


# -------------------------------------------------------------------------------------- flags


@pytest.mark.parametrize(
    "changes, rollout_changes, async_changes",
    [
        ({}, {}, dict(partial=True)),
        (dict(rollout="async"), {}, dict(overlap=True)),
        (dict(rollout="async"), {}, dict(budget_s=1.0)),
        (dict(rollout="async"), {}, dict(partial=True, max_age=0)),
        (dict(rollout="async"), {}, dict(partial=True, ahead=float("inf"))),
        ({}, dict(temperature=0.0), {}),
        (dict(samples=0), {}, {}),
        (dict(gamma=0.0), {}, {}),
        (dict(learning_rate=float("nan")), {}, {}),
        (dict(negatives=-1.0), {}, {}),
        (dict(format_penalty=-1.0), {}, {}),
        (dict(eval_every=-1), {}, {}),
        (dict(processes=-1), {}, {}),
        (dict(max_grad_norm=0.0), {}, {}),
        (dict(nominal_tokens=0), {}, {}),
        ({}, dict(max_turns=0), {}),
        ({}, dict(slots=0), {}),
        ({}, dict(context="forget"), {}),
        ({}, dict(context="summarize", context_budget=900), {}),
        ({}, dict(max_context=96), {}),
        ({}, dict(page_chars=0), {}),
        ({}, dict(temperature=float("nan")), {}),
    ],
)
def test_flags_that_cannot_work(changes, rollout_changes, async_changes):
    parts = TrainArgs(**changes), RolloutArgs(**rollout_changes), AsyncArgs(**async_changes)
    with pytest.raises(ValueError, match="--") as error:
        check_args(*parts)
    assert "\n" not in str(error.value)


def test_flags_that_work():
    check_args(TrainArgs(), RolloutArgs(), AsyncArgs())
    partial = AsyncArgs(partial=True, overlap=True, budget_s=1.0)
    check_args(TrainArgs(rollout="async", negatives=float("inf")), RolloutArgs(), partial)


@pytest.mark.parametrize(
    "words",
    ["--stale some", "--rollout maybe", "--search altavista", "--python jython", "--steps many"],
)
def test_values_that_a_flag_does_not_have(monkeypatch, words):
    monkeypatch.setattr("sys.argv", ["train.py", *words.split()])
    flag, value = words.split()
    with pytest.raises(SystemExit) as error:
        parse_flags((TrainArgs, RolloutArgs, AsyncArgs), "Doc.")
    line = str(error.value)
    assert flag in line and value in line and "\n" not in line


# ------------------------------------------------------------------------------ number of ranks


@pytest.mark.parametrize(
    "processes_flag, tasks, memory_gib, wanted",
    [
        (0, 16, 100.0, 8),  # one a core
        (0, 3, 100.0, 3),  # no rank without a task
        (0, 16, 4.5, 3),  # as many as memory holds: 1 GiB each, and six times 64 MiB of weights
        (0, 16, 0.1, 1),  # never none
        (5, 16, 0.1, 5),  # as the user asks
        (5, 2, 100.0, 2),
    ],
)
def test_wanted_ranks(monkeypatch, tmp_path, processes_flag, tasks, memory_gib, wanted):
    monkeypatch.setattr(processes, "cores", lambda: 8)
    memory = SimpleNamespace(available=int(memory_gib * 2**30))
    monkeypatch.setattr(processes.psutil, "virtual_memory", lambda: memory)
    with open(tmp_path / "model.safetensors", "wb") as file:
        file.truncate(64 << 20)
    assert processes.wanted_ranks(processes_flag, tasks, str(tmp_path)) == wanted


def test_a_model_of_unknown_size_gets_one_rank(monkeypatch, tmp_path):
    monkeypatch.setattr(processes, "cores", lambda: 8)
    (tmp_path / "large.gguf").write_bytes(b"GGUF")
    for model in ("Qwen/Qwen3-8B", str(tmp_path / "large.gguf"), str(tmp_path)):
        assert processes.wanted_ranks(0, 16, model) == 1
    assert processes.wanted_ranks(0, 16, "nano") > 1


@pytest.mark.parametrize(
    "limit, wanted", [("max 100000\n", 6), ("150000 100000\n", 2), ("50000 100000\n", 1), ("", 6)]
)
def test_cores_of_a_container(monkeypatch, limit, wanted):
    affinity = lambda process: set(range(6))
    monkeypatch.setattr(processes.os, "sched_getaffinity", affinity, raising=False)
    monkeypatch.setattr(processes.Path, "read_text", lambda path: limit)
    assert processes.cores() == wanted
    assert processes.cores_of(2) == max(1, wanted // 2)


# --------------------------------------------------------------------------------- the run's folder


def test_simultaneous_starts_get_folders_of_their_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with ThreadPoolExecutor(8) as pool:
        folders = list(pool.map(choose_folder, [""] * 16))
    assert sorted(folder.name for folder in folders) == sorted(f"run-{n}" for n in range(1, 17))


def test_an_out_folder_that_holds_a_run_is_refused(tmp_path):
    out = str(tmp_path / "a" / "b")
    assert choose_folder(out).is_dir() and choose_folder(out).is_dir()  # still empty
    (tmp_path / "a" / "b" / "metrics.jsonl").write_text("")
    with pytest.raises(ValueError, match="--resume"):
        choose_folder(out)


def test_a_resumed_run_has_its_flags_but_for_those_given_now(tmp_path, monkeypatch):
    before = asdict(TrainArgs(steps=5, gamma=0.5, negatives=float("inf"))) | {"slots": 3}
    (tmp_path / "config.json").write_text(json.dumps(before | {"of_another_version": 1}))
    monkeypatch.setattr("sys.argv", ["train.py", "--resume", str(tmp_path), "--steps=9"])
    args, rollout_args = TrainArgs(steps=9, resume=str(tmp_path)), RolloutArgs()
    take_config(str(tmp_path), [args, rollout_args])
    assert (args.steps, args.gamma, args.negatives) == (9, 0.5, float("inf"))
    assert args.resume == str(tmp_path) and rollout_args.slots == 3
    with pytest.raises(ValueError, match="no run there"):
        take_config(str(tmp_path / "absent"), [args])


def resumed(folder: Path, monkeypatch, config, *words: str) -> list:
    """The flags of a run that goes on with this config.json and these words."""
    text = config if isinstance(config, str) else json.dumps(config)
    (folder / "config.json").write_text(text)
    monkeypatch.setattr("sys.argv", ["train.py", "--resume", str(folder), *words])
    flags = parse_flags((TrainArgs, RolloutArgs, AsyncArgs), "Doc.")
    take_config(str(folder), flags)
    return flags


GUARDED = {
    "reward": "evil.py:f",
    "unsafe_python": True,
    "python": "cpython",
    "live": True,
    "search": "searxng",
    "search_url": "http://evil.test/",
    "engine": "http://evil.test/",
    "engine_weights": "/",
}


@pytest.mark.parametrize("name", GUARDED)
def test_what_runs_code_or_lowers_a_guard_is_never_taken_from_a_runs_folder(
    tmp_path, monkeypatch, name
):
    config = {"steps": 5, name: GUARDED[name]}
    with pytest.raises(ValueError, match="from the command line only") as error:
        resumed(tmp_path, monkeypatch, config)
    word = f"--{name}={GUARDED[name]}"
    assert word in str(error.value) and "\n" not in str(error.value)
    for given in (word, f"--{name}={GUARDED[name]}".replace("evil", "mine")):
        flags = resumed(tmp_path, monkeypatch, config, given)
        assert f"--{name}={flags_of(flags)[name]}" == given
    # What stands there in another type, or with a line break, is no way in either.
    for odd in (["x"], {"a": 1}, "x\n\x1b[2J"):
        with pytest.raises(ValueError, match=f"--{name}") as error:
            resumed(tmp_path, monkeypatch, {name: odd})
        assert str(error.value).isprintable()


@pytest.mark.parametrize("word", ["--learning_rate=1e-5", "--seed=1", "--out=other", "--model=x"])
def test_resume_refuses_flags_that_would_make_another_run_of_it(tmp_path, monkeypatch, word):
    config = asdict(TrainArgs()) | asdict(RolloutArgs()) | asdict(AsyncArgs())
    with pytest.raises(ValueError, match="only these may be changed: steps, ") as error:
        resumed(tmp_path, monkeypatch, config, word)
    assert word.split("=")[0] in str(error.value) and "\n" not in str(error.value)
    as_before = [f"--{name}={value}" for name, value in config.items() if name != "resume"]
    assert flags_of(resumed(tmp_path, monkeypatch, config, *as_before))["learning_rate"] == 5e-4
    args, _, async_args = resumed(
        tmp_path, monkeypatch, config, "--steps=9", "--save-every=2", "--workers", "3"
    )
    assert (args.steps, args.save_every, async_args.workers) == (9, 2, 3)


def test_help_says_what_resume_may_be_given(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["train.py", "--help"])
    monkeypatch.setenv("COLUMNS", "10000")
    with pytest.raises(SystemExit):
        parse_flags((TrainArgs, RolloutArgs, AsyncArgs), "Doc.")
    [line] = [line for line in capsys.readouterr().out.splitlines() if " --resume RESUME" in line]
    for name in (*MAY_CHANGE, *GUARDED):
        assert name in line and name in flags_of([TrainArgs(), RolloutArgs(), AsyncArgs()])
    assert "learning_rate" not in line


@pytest.mark.parametrize(
    "config",
    ["", "[1, 2]", "7", "{", "[" * 100_000, '{"steps": "many"}', '{"steps": [1]}']
    + ['{"rollout": "maybe"}', '{"partial": "perhaps"}', '{"gamma": null}', '{"seed": 1.5}'],
    ids=lambda config: config[:16],
)
def test_a_damaged_config_is_one_line(tmp_path, monkeypatch, config):
    with pytest.raises((ValueError, SystemExit), match="config.json") as error:
        resumed(tmp_path, monkeypatch, config)
    assert "\n" not in str(error.value)


def test_one_run_writes_into_a_folder(tmp_path):
    first = lock(tmp_path)
    with pytest.raises(ValueError, match="another run is writing into"):
        lock(tmp_path)
    os.close(first)
    os.close(lock(tmp_path))


def test_a_run_can_be_repeated_from_its_folder(tmp_path):
    (tmp_path / "mine.py").write_text("def f(t): return 0\n")
    (tmp_path / "run").mkdir()
    for spec in (f"{tmp_path}/mine.py:f", f"{tmp_path}/run/mine.py"):  # resumed from the copy, too
        save_config(tmp_path / "run", [TrainArgs(reward=spec)])
        config = json.loads((tmp_path / "run" / "config.json").read_text())
        assert config["reward"] == spec and len(config["commit"].split("-")[0]) in (0, 40)
        assert (tmp_path / "run" / "mine.py").read_text() == "def f(t): return 0\n"
    assert config["packages"]["torch"] == version("torch") and config["packages"]["python"]


def logged(tmp_path, monkeypatch, capsys, **metrics) -> list[str]:
    """The warnings of a run whose first three updates have these metrics."""
    drawn = []
    monkeypatch.setattr("support.run.draw_curves", drawn.append)
    run = Run(TrainArgs(keep_trajectories=0), [])
    run.out, run.accelerator = tmp_path, Accelerator(cpu=True)
    usual = dict(pass_rate=0.5, reward=0.5, turns=2.0, entropy=0.3, rollout_s=1.0, train_s=1.0)
    for run.done in (1, 2, 3):
        run.log(usual | {"grad_norm": 0.1} | metrics, [], [], [])
    printed, errors = capsys.readouterr()
    assert drawn == [tmp_path]  # curves.png is there after the first update
    assert [line.split(":")[0] for line in printed.splitlines()] == [
        f"update {n}" for n in (1, 2, 3)
    ]
    assert "rollout 1.0 s, update 1.0 s" in printed
    return errors.splitlines()


def test_what_gives_no_signal_is_said_once(tmp_path, monkeypatch, capsys):
    assert logged(tmp_path, monkeypatch, capsys) == []
    assert logged(tmp_path, monkeypatch, capsys, grad_norm=None) == []  # said at the step
    [line] = logged(tmp_path, monkeypatch, capsys, grad_norm=0.0)
    assert line.startswith("warning: ") and "no gradient" in line
    [line] = logged(tmp_path, monkeypatch, capsys, grad_norm=0.0, turns=0.0)
    assert line.startswith("warning: ") and "--max_context" in line


def test_warnings_before_the_first_update(capsys):
    tasks = [Task(str(n), "q", "a") for n in range(10)]
    run = Run(TrainArgs(samples=1), [])
    run.learner = SimpleNamespace(loop=None)
    run.open_rollouts(tasks, AsyncArgs())
    alone, few = capsys.readouterr().err.splitlines()
    assert alone.startswith("warning: --samples 1")
    assert few.startswith("warning: 10 training tasks are fewer than --tasks_per_step 16")


def test_the_last_lines_of_a_run_without_held_out_tasks(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("support.run.draw_curves", lambda out: None)
    monkeypatch.setattr("support.run.write_report", lambda folders, out: None)
    run = Run(TrainArgs(), [])
    run.out, run.done = tmp_path, 7
    run.report(None, None)
    page, line = capsys.readouterr().out.splitlines()
    assert page.endswith(f"{tmp_path}/report.html")
    assert line.startswith("7 steps are done") and f"--model {tmp_path}/checkpoint" in line


def test_a_tracker_that_is_missing_is_refused_before_the_start(monkeypatch):
    monkeypatch.setattr("support.checks.get_available_trackers", lambda: ["wandb"])
    for name in ("tensorboard", "tensorbord"):
        with pytest.raises(ValueError, match=f"--log_with {name}: there is wandb on this") as error:
            check_args(TrainArgs(log_with=name), RolloutArgs(), AsyncArgs())
        assert "\n" not in str(error.value)
    check_args(TrainArgs(log_with="wandb"), RolloutArgs(), AsyncArgs())


@pytest.mark.parametrize(
    "error", [ImportError("no yaml"), RuntimeError("api_key\nnot set"), KeyError()]
)
def test_a_tracker_that_does_not_start_is_one_line(tmp_path, error):
    def init(*arguments):
        raise error

    run = Run(TrainArgs(log_with="wandb"), [])
    run.accelerator = SimpleNamespace(
        init_trackers=init, project_configuration=SimpleNamespace(logging_dir=".")
    )
    with pytest.raises(ValueError, match="--log_with wandb does not start: ") as raised:
        run.open_tracker(tmp_path)
    assert "\n" not in str(raised.value)
    assert run.accelerator.project_configuration.logging_dir == str(tmp_path)


def test_a_failed_save_keeps_the_old_folder(tmp_path):
    with save_atomically(tmp_path / "c") as folder:
        (folder / "x").write_text("old")
    with pytest.raises(OSError), save_atomically(tmp_path / "c") as folder:
        (folder / "x").write_text("half")
        raise OSError(28, "No space left on device")
    assert (tmp_path / "c" / "x").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["c"]


@pytest.mark.parametrize(
    "error", [OSError(28, "No space left on device"), RuntimeError("unexpected pos 1 vs 2")]
)
def test_a_full_disk_leaves_the_last_state_and_no_rest(tmp_path, tiny, chat, monkeypatch, error):
    optimizer = torch.optim.AdamW(tiny.parameters())
    save(tmp_path, 1, tiny, optimizer, chat.tokenizer, {"rollouts": [None]})

    def full(what, path):
        path.write_bytes(b"half")
        raise error

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(OSError):
        save(tmp_path, 2, tiny, optimizer, chat.tokenizer, {"rollouts": [None]})
    assert load_state(tmp_path)["step"] == 1
    assert [path.name[:11] for path in (tmp_path / "state").iterdir()] == ["step-000001"]
    assert {path.name for path in tmp_path.iterdir()} == {"state", "checkpoint"}
    assert (tmp_path / "checkpoint/model.safetensors").exists()


def test_a_disk_that_is_full_for_the_checkpoint_is_one_line(tmp_path, tiny, chat, monkeypatch):
    optimizer = torch.optim.AdamW(tiny.parameters())
    save(tmp_path, 1, tiny, optimizer, chat.tokenizer, {"rollouts": [None]})

    def full(folder):
        (folder / "model.safetensors").write_bytes(b"half")
        raise SafetensorError("I/O error: No space left on device\nmore")

    monkeypatch.setattr(tiny, "save_pretrained", full)
    with pytest.raises(OSError, match="cannot write a checkpoint") as error:
        save(tmp_path, 2, tiny, optimizer, chat.tokenizer, {"rollouts": [None]})
    assert "\n" not in str(error.value)
    assert (tmp_path / "checkpoint/model.safetensors").stat().st_size > 1000
    assert load_state(tmp_path)["step"] in (1, 2)


def test_a_state_holds_everything_and_two_are_kept(tmp_path, tiny, chat):
    optimizer = torch.optim.AdamW(tiny.parameters())
    sum(p.sum() for p in tiny.parameters()).backward()
    optimizer.step()
    under_way = {"next_number": 3, "groups": [asdict(new_group(Task("t", "q", "a"), 2, 2, 0))]}
    for step in (1, 2, 3):
        save(tmp_path, step, tiny, optimizer, chat.tokenizer, {"rollouts": [under_way]})
    names = sorted(path.name[:11] for path in (tmp_path / "state").iterdir())
    assert names == ["step-000002", "step-000003"]
    state = load_state(tmp_path)
    assert state["step"] == 3 and state["rollouts"] == [under_way]
    assert same(state["model"], tiny.state_dict(), 0.0)
    moments = state["optimizer"]["state"]
    assert len(moments) == len(list(tiny.parameters()))
    assert torch.equal(moments[0]["exp_avg"], optimizer.state_dict()["state"][0]["exp_avg"])


@pytest.mark.parametrize("value", [deque([1]), np.float64(1.0), 10**700, Path("p")])
def test_a_state_that_could_not_be_read_again_is_not_written(tmp_path, tiny, chat, value):
    optimizer = torch.optim.AdamW(tiny.parameters())
    save(tmp_path, 1, tiny, optimizer, chat.tokenizer, {"rollouts": [None]})
    group = asdict(new_group(Task("t", "q", "a"), 2, 2, 0))
    group["trajectories"][1]["memory"]["mine"] = value
    more = {"rollouts": [{"next_number": 3, "groups": [group]}]}
    with pytest.raises(OSError, match="trajectory.memory holds what no checkpoint can hold") as e:
        save(tmp_path, 2, tiny, optimizer, chat.tokenizer, more)
    assert "\n" not in str(e.value) and load_state(tmp_path)["step"] == 1


def test_a_damaged_state_falls_back_to_the_one_before(tmp_path, capsys):
    states = tmp_path / "state"
    states.mkdir()
    torch.save({"step": 1}, tmp_path / "good")
    digest = sha256(tmp_path / "good")
    good = states / f"step-000001-{digest}.pt"
    os.replace(tmp_path / "good", good)
    (states / "step-000002-0123456789abcdef.pt").write_bytes(b"torn")
    changed = bytearray(good.read_bytes())
    changed[len(changed) // 2] ^= 1
    (states / f"step-000003-{digest}.pt").write_bytes(changed)
    assert load_state(tmp_path) == {"step": 1}
    assert capsys.readouterr().err.count(" is damaged ") == 2
    with pytest.raises(FileNotFoundError, match="start anew"):
        load_state(tmp_path / "absent")


def test_lines_of_undone_steps_are_cut(tmp_path):
    path = tmp_path / "m.jsonl"
    lines = [json.dumps({"step": n, "reward_parts": {"correct": 1.0}}) for n in range(1, 6)]
    deep = '{"step":' + "[" * 100_000
    path.write_bytes("\n".join([deep, *lines]).encode() + b'\n\xff\n{"step": 6, "to')
    cut_lines(path, 3)
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [1, 2, 3]
    assert [p.name for p in tmp_path.iterdir()] == ["m.jsonl"]
    cut_lines(tmp_path / "absent.jsonl", 3)


def test_a_line_that_was_cut_anywhere_goes(tmp_path):
    """Also behind an inner }, where its end looks whole, and where what is left is JSON."""
    path = tmp_path / "m.jsonl"
    whole = json.dumps({"step": 1, "status": {"answered": 2}, "text": "é\u2028 }"})
    second = whole.replace('"step": 1', '"step": 2')
    for length in range(len(second)):
        path.write_text(f"{whole}\n{second[:length]}", encoding="utf-8")
        cut_lines(path, 5)
        assert path.read_text(encoding="utf-8") == whole + "\n", second[:length]
    for rest in (second, second + "\n"):
        path.write_text(f"{whole}\n[]\n2\n\0\0\n{rest}", encoding="utf-8")
        cut_lines(path, 5)
        assert path.read_text(encoding="utf-8") == f"{whole}\n{second}\n"


# ------------------------------------------------------------------------------- other ranks' work


def test_parked_work_is_dealt_out_to_another_number_of_ranks():
    states = [{"next_number": 5, "groups": ["a", "b"]}, {"next_number": 4, "groups": ["c"]}]
    assert share_of(states, 1, 2, 4) == states[1]
    assert share_of([None], 0, 1, 4) is None and share_of([], 0, 1, 4) is None
    # Two tasks of an update for each of two ranks: the third update was begun, so the fourth is
    # next.
    assert share_of(states, 0, 1, 4) == {"next_number": 12, "groups": ["a", "b", "c"]}
    assert [share_of(states, rank, 3, 4)["groups"] for rank in range(3)] == [["a"], ["b"], ["c"]]


def test_no_position_is_begun_twice_by_another_number_of_ranks(monkeypatch, full):
    """Whatever each rank had begun of its stream: in the books a group is known by its position."""
    tasks = [Task("t", "q", "a")]

    def positions(rank, ranks, per_update, count, state=None):
        arguments = "async", tasks, 2, rank, ranks, per_update, state
        next_group, _, first = source_of(monkeypatch, *arguments)
        first = first if state else 0
        return {next_group(number, 0).position for number in range(first, first + count)}

    for per_update in range(1, 9 if full else 6):
        counts = range(1, min(per_update, 3) + 1)
        for before, after, begun in itertools.product(counts, counts, range(9 if full else 6)):
            states = [{"next_number": begun, "groups": []} for _ in range(before)]
            old = [positions(rank, before, per_update, begun) for rank in range(before)]
            new = [positions(rank, after, per_update, 8, states) for rank in range(after)]
            assert not set().union(*old) & set().union(*new)
            assert sum(map(len, new)) == len(set().union(*new))
