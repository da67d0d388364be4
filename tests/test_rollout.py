"""The engine against `generate`, and the agent loop: what is sampled, recorded and ended."""

import itertools
import json
import pickle
import random
from collections import Counter

import numpy as np
import pytest
import torch
from scripted import ScriptedLoop, scripted_tasks, trainer_gap, trainer_gaps
from transformers import AutoConfig, AutoModelForCausalLM

from context import Segment, Trajectory, Turn
from data.task import Task
from decode_graphs import StaticDecoder
from engine import Engine, Slot, load_policy
from rollout import AgentLoop, RolloutArgs, SyncRollouts, new_group, take_results
from rollout import play as play_all
from train import Policy


@pytest.fixture(scope="module")
def nano():
    return load_policy("nano")[0]


def fresh(tasks, samples=2, seed=0) -> list[Trajectory]:
    groups = [new_group(task, position, samples, seed) for position, task in enumerate(tasks)]
    return [t for group in groups for t in group.trajectories]


def play(engine, chat, tasks, toolbox, args, samples=2, seed=0, lockstep=True):
    loop = AgentLoop(engine, chat, toolbox, args, lockstep)
    return play_all(loop, fresh(tasks, samples, seed))


@pytest.fixture(scope="module")
def played(nano, chat, toolbox, dev_tasks):
    """Trajectories of the shipped model, in lockstep. Tests read them only."""
    args = RolloutArgs(slots=6)
    return play(Engine(nano, chat, args), chat, dev_tasks[:4], toolbox, args)


def actions(trajectories) -> list[list[list[int]]]:
    return [[turn.action_ids for turn in t.turns] for t in trajectories]


# ------------------------------------------------------------------------------------- the engine


def test_a_copy_in_bf16_differs_by_rounding_and_follows_the_weights(tiny, chat):
    args = RolloutArgs(slots=16, precision="bf16", max_new_tokens=24)
    engine, policy = Engine(tiny, chat, args), Policy(tiny, 1.0)
    for version in range(2):
        tasks = fresh(scripted_tasks(3, 2, latency_s=0.0, turns=lambda rng: 2))
        trajectories = play_all(ScriptedLoop(engine, chat, None, args, True), tasks)
        gaps = trainer_gaps(policy, trajectories, version)
        assert 1e-6 < sum(gaps) / len(gaps) < 0.05
        with torch.no_grad():
            for parameter in tiny.parameters():
                parameter.mul_(1.5)
        engine.new_weights(version + 1)
    assert engine.model.dtype == torch.bfloat16 and tiny.dtype == torch.float32


def decode_all(engine, prompts, tasks):
    """Sampled ids of one turn for each prompt, more prompts than slots."""
    queue, done = list(enumerate(prompts)), {}
    running = {}
    while queue or running:
        for place in engine.free_places()[: len(queue)]:
            number, prompt = queue.pop(0)
            slot = engine.slots[place] = Slot(Trajectory(tasks[0], (0, number)))
            running[slot] = number
            engine.start_turn(slot, prompt)
        for slot in engine.step():
            done[running.pop(slot)] = slot
            engine.slots[engine.slots.index(slot)] = None
    return [done[number] for number in range(len(prompts))]


def finish_turns(engine) -> None:
    while not engine.at_boundary():
        engine.step()


def ragged_prompts(chat, count):
    rng = random.Random(0)
    return [
        (chat.before_question if rng.random() < 0.5 else [])
        + [rng.randrange(300, 2000) for _ in range(rng.randint(1, 90))]
        for _ in range(count)
    ]


def generated(model, chat, prompt, new_tokens=20) -> list[int]:
    """What `generate` says greedily after a prompt."""
    return model.generate(
        torch.tensor([prompt]),
        attention_mask=torch.ones(1, len(prompt)),
        do_sample=False,
        max_new_tokens=new_tokens,
        eos_token_id=chat.end_id,
        pad_token_id=0,
    )[0, len(prompt) :].tolist()


def test_greedy_engine_equals_generate(tiny, chat, make_engine, dev_tasks, monkeypatch):
    """Also with the fixed shapes that a GPU decodes in: padded rows, rounded contexts."""
    monkeypatch.setattr("decode_graphs.SMALLEST", 2)
    monkeypatch.setattr("decode_graphs.LENGTH", 24)
    prompts = ragged_prompts(chat, 22)
    wanted = [generated(tiny, chat, prompt) for prompt in prompts]
    # 800 tokens are two rows of the cache; pieces of 32 tokens cut the longer prompts.
    sizes = [(4, 0, 2048), (22, 0, 2048), (7, 800, 2048), (4, 0, 32)]
    for (slots, kv_tokens, piece), static in itertools.product(sizes, (False, True)):
        monkeypatch.setattr("engine.PREFILL_TOKENS", piece)
        args = RolloutArgs(
            slots=slots, kv_tokens=kv_tokens, temperature=0.0, max_new_tokens=20, max_context=400
        )
        engine = make_engine(tiny, args)
        engine.static = StaticDecoder(tiny, engine.cache) if static else None
        count = max(11, slots)
        decoded = decode_all(engine, prompts[:count], dev_tasks)
        assert [slot.ids for slot in decoded] == wanted[:count], (slots, kv_tokens, piece, static)
        assert bool(engine.cache.keys[0].shape[0] == 3) == bool(kv_tokens)


@pytest.mark.parametrize("name", ["qwen3", "gpt_neox", "gpt2", "gemma"])
def test_other_architectures(chat, make_engine, dev_tasks, tokenizer, name):
    """Untied with norms on the heads, partial rotary with fused projections, learned positions, one
    key head."""
    common = dict(
        vocab_size=len(tokenizer), bos_token_id=None, eos_token_id=chat.end_id, pad_token_id=0
    )
    sizes = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4)
    sizes |= {
        "qwen3": dict(num_key_value_heads=2, head_dim=8, tie_word_embeddings=False),
        "gemma": dict(num_key_value_heads=1, head_dim=8),
    }.get(name, {})
    sizes = dict(n_embd=32, n_layer=2, n_head=4) if name == "gpt2" else sizes
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(
        AutoConfig.for_model(name, **common, **sizes), attn_implementation="sdpa"
    ).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(3.0)
    prompts = ragged_prompts(chat, 5)
    wanted = [generated(model, chat, prompt) for prompt in prompts]
    args = RolloutArgs(slots=4, temperature=0.0, max_new_tokens=20, max_context=400)
    for static in (False, True):
        engine = make_engine(model, args)
        engine.static = StaticDecoder(model, engine.cache) if static else None
        assert [slot.ids for slot in decode_all(engine, prompts, dev_tasks)] == wanted


def test_what_is_not_full_attention_is_refused(make_engine, tokenizer):
    sizes = dict(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    model_of = lambda name, **more: AutoModelForCausalLM.from_config(
        AutoConfig.for_model(name, **sizes | more)
    )
    window = model_of("mistral", sliding_window=64)
    with pytest.raises(ValueError, match="sliding window of 64"):
        make_engine(window, RolloutArgs(slots=2, max_context=128))
    # A context that is never longer than the window is as good as full attention.
    make_engine(window, RolloutArgs(slots=2, max_context=64))
    with pytest.raises(ValueError, match="caps attention scores"):
        make_engine(model_of("gemma2", head_dim=8), RolloutArgs(slots=2, max_context=64))


def test_waiting_trajectories_give_up_their_rows(tiny, chat, make_engine, dev_tasks):
    """Six trajectories in flight, memory for two: every second turn goes on as if nothing had been
    evicted."""
    outputs = {}
    for kv_tokens in (800, 0):
        args = RolloutArgs(
            slots=6, kv_tokens=kv_tokens, temperature=0.0, max_new_tokens=8, max_context=400
        )
        engine = make_engine(tiny, args)
        engine.end_id = -1
        engine.slots = [Slot(Trajectory(dev_tasks[0], (0, k))) for k in range(6)]
        prompts = ragged_prompts(chat, 6)
        for turn in range(2):
            for slot, prompt in zip(engine.slots, prompts):
                engine.start_turn(slot, prompt)
            finish_turns(engine)
            after = [400 + turn] * 5
            prompts = [p + slot.ids + after for slot, p in zip(engine.slots, prompts)]
        outputs[kv_tokens] = [slot.ids for slot in engine.slots]
        assert bool(engine.stats["evicted"]) == bool(kv_tokens)
        assert engine.cache.keys[0].shape[0] == (3 if kv_tokens else 7)
    assert outputs[800] == outputs[0]


def test_sampled_distribution_is_the_softmax(tiny, make_engine, dev_tasks):
    """Chi-square of 4,000 draws of one token against softmax(logits / T)."""
    args = RolloutArgs(slots=64, temperature=0.7, max_new_tokens=1, max_context=128)
    engine, prompt = make_engine(tiny, args), [300, 301, 302]
    engine.end_id = -1
    tokens = [slot.ids[0] for slot in decode_all(engine, [prompt] * 4000, dev_tasks)]
    with torch.no_grad():
        logits = tiny(torch.tensor([prompt])).logits[0, -1]
    p = torch.softmax(logits / 0.7, -1).numpy().astype(float)
    observed = np.bincount(tokens, minlength=len(p))
    big = p * 4000 >= 5
    statistic = ((observed[big] - 4000 * p[big]) ** 2 / (4000 * p[big])).sum()
    freedom = big.sum()
    assert freedom > 5 and statistic < freedom + 5 * (2 * freedom) ** 0.5


def test_a_cached_turn_equals_a_fresh_one_and_new_weights_void_the_cache(
    tiny, make_engine, dev_tasks
):
    args = RolloutArgs(slots=2, temperature=0.0, max_new_tokens=8, max_context=400)
    engine, prompt = make_engine(tiny, args), list(range(300, 340))
    engine.end_id = -1
    slot = engine.slots[0] = Slot(Trajectory(dev_tasks[0], (0,)))

    def turn(ids):
        engine.start_turn(slot, ids)
        finish_turns(engine)
        return slot.ids

    def afresh(*prompts):
        other = make_engine(tiny, args)
        other.end_id = -1
        return [slot.ids for slot in decode_all(other, prompts, dev_tasks)]

    first = turn(prompt)
    longer = prompt + first + list(range(500, 520))
    before = engine.stats["prefilled"]
    second = turn(longer)
    # 20 new tokens and the last sampled one are computed, not the whole context.
    assert engine.stats["prefilled"] - before == 21
    rewritten = longer[:20] + longer[30:]  # as a context manager may do
    assert [second, turn(rewritten)] == afresh(longer, rewritten)
    with torch.no_grad():
        for parameter in tiny.parameters():
            parameter.mul_(1.1)
    engine.new_weights(1)
    assert [turn(longer)] == afresh(longer)


@pytest.mark.parametrize("name", ["./nowhere", "data", "nowhere.gguf"])
def test_a_missing_model_is_one_line(name):
    with pytest.raises(ValueError, match="cannot load the model") as error:
        load_policy(name)
    assert "\n" not in str(error.value)


def test_code_beside_a_model_is_never_run_nor_asked_about(tmp_path, tokenizer, monkeypatch):
    tokenizer.save_pretrained(tmp_path)
    (tmp_path / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    names = {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "evil", "auto_map": names}))
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    with pytest.raises(ValueError, match="cannot load the model") as error:
        load_policy(str(tmp_path))
    assert "\n" not in str(error.value) and not (tmp_path / "ran").exists()


# --------------------------------------------------------------------------------- the agent loop


@pytest.mark.parametrize(
    "context, temperature, kv_tokens", [("none", 1.0, 2048), ("elide", 0.7, 0)]
)
def test_trainer_and_sampler_agree_on_every_turn(
    nano, chat, make_engine, toolbox, dev_tasks, full, context, temperature, kv_tokens
):
    args = RolloutArgs(
        context=context, context_budget=300, temperature=temperature, slots=4, kv_tokens=kv_tokens
    )
    engine = make_engine(nano, args)
    trajectories = play(engine, chat, dev_tasks[: 6 if full else 3], toolbox, args)
    assert kv_tokens == 0 or engine.stats["evicted"] > 0
    assert any(len(t.turns) > 2 for t in trajectories)
    assert context == "none" or any(len(t.segments) > 1 for t in trajectories)
    assert trainer_gap(Policy(nano, temperature), trajectories) < 1e-4
    if temperature != 1.0:
        assert trainer_gap(Policy(nano, 1.0), trajectories) > 1e-2


def test_training_ids_are_the_sampled_ids(played):
    for t in played:
        (segment,) = t.segments
        ids = list(t.head_ids)
        for turn in t.turns:
            ids += turn.action_ids + turn.observation_ids
        # The observation of the last turn was in no prompt.
        assert segment.ids == ids[: len(segment.ids)]
        sampled = [i for i, turn in zip(segment.ids, segment.turn_of) if turn >= 0]
        assert sampled == [i for turn in t.turns for i in turn.action_ids]
        logprobs = [p for p, turn in zip(segment.logprobs, segment.turn_of) if turn >= 0]
        assert logprobs == [p for turn in t.turns for p in turn.logprobs]


def test_same_key_same_trajectories_whatever_plays_them(
    nano, chat, make_engine, toolbox, dev_tasks, played, full
):
    """The key decides the draws, not the slots or the mode: lockstep is sync, the other loop is
    what a rollout process runs. Other batches round differently, which almost never gives another
    token."""

    def replay(slots, lockstep, tasks=4, seed=0):
        args = RolloutArgs(slots=slots)
        engine = make_engine(nano, args)
        return play(engine, chat, dev_tasks[:tasks], toolbox, args, 2, seed, lockstep)

    again = replay(6, True)
    assert actions(again) == actions(played)
    logprobs = lambda run: [turn.logprobs for t in run for turn in t.turns]
    assert logprobs(again) == logprobs(played)  # in lockstep to the last bit
    for slots, lockstep in [(3, False)] + [(3, True), (6, False)] * full:
        other = replay(slots, lockstep)
        assert [t.key for t in other] == [t.key for t in played]
        assert sum(a == b for a, b in zip(actions(played), actions(other))) >= 7
    assert actions(replay(6, True, tasks=1, seed=1)) != actions(played)[:2]


def test_attempts_at_a_task_that_comes_twice_differ(tiny, chat, make_engine, toolbox, dev_tasks):
    """Four attempts at two places of the stream: eight keys, and eight sets of random draws."""
    args = RolloutArgs(slots=8, max_new_tokens=8)
    trajectories = play(make_engine(tiny, args), chat, [dev_tasks[0]] * 2, toolbox, args, 4)
    assert len({t.key for t in trajectories}) == 8
    assert len({tuple(t.turns[0].action_ids) for t in trajectories}) == 8


def test_limits_end_a_trajectory(nano, chat, make_engine, toolbox, dev_tasks, tiny):
    for changes, status in (
        (dict(max_turns=1), "over_turns"),
        (dict(max_context=220), "over_context"),
    ):
        args = RolloutArgs(slots=16, **changes)
        ended = play(make_engine(nano, args), chat, dev_tasks[:8], toolbox, args)
        assert Counter(t.status for t in ended)[status] > 0
    args = RolloutArgs(slots=4, max_new_tokens=5)
    ended = play(make_engine(tiny, args), chat, dev_tasks[:2], toolbox, args)
    assert all(t.status == "format_error" and t.error in ("unfinished", "no_action") for t in ended)


def test_slow_and_faulty_tools(nano, chat, make_engine, toolbox, dev_tasks, monkeypatch):
    args = RolloutArgs(slots=8)
    monkeypatch.setattr(
        "rollout.run_calls", lambda calls, tools: [("error: HTTP 500", True)] * len(calls)
    )
    ended = play(make_engine(nano, args), chat, dev_tasks[:4], toolbox, args)
    faulty = [t for t in ended if t.status == "tool_fault"]
    assert faulty and all(t.error == "" for t in faulty)
    assert all(len(t.turns) == 3 for t in faulty)


@pytest.mark.parametrize("boundary", ["after the result", "before the result"])
def test_a_parked_trajectory_goes_on_from_its_pickle(
    nano, chat, make_engine, toolbox, dev_tasks, full, boundary
):
    """A trajectory that was pickled behind its first turn goes on as if it had not been: with the
    tools' result, or before it had come, and then the calls are made again."""
    args = RolloutArgs(slots=1, temperature=0.0)
    loop = AgentLoop(make_engine(nano, args), chat, toolbox, args)
    whole = play_all(loop, fresh(dev_tasks[:3], samples=1))
    longer = [t for t in whole if len(t.turns) > 1]
    assert longer
    for t in longer if full else longer[:1]:
        loop = AgentLoop(make_engine(nano, args), chat, toolbox, args)
        parked = Trajectory(t.task, t.key)
        loop.add([parked])
        while not parked.turns:
            loop.step()
        if boundary == "before the result":
            parked = pickle.loads(pickle.dumps(parked))
            parked.turns[0].results = []  # if the tool was faster than we
            parked.turns[0].observation_ids = []
        else:
            while not parked.turns[0].results:
                assert loop.step(hold=True) == []
            for _ in range(3):
                loop.step(hold=True)
            assert len(parked.turns) == 1  # no turn begins on hold
            parked = pickle.loads(pickle.dumps(parked))
        other = AgentLoop(make_engine(nano, args), chat, toolbox, args, lockstep=True)
        play_all(other, [parked])
        assert actions([parked]) == actions([t])
        assert [s.ids for s in parked.segments] == [s.ids for s in t.segments]
        assert [turn.results for turn in parked.turns] == [turn.results for turn in t.turns]


def test_pages_are_those_that_were_opened(played):
    """An address that a search only showed, or that could not be opened, is seen and not opened."""
    call = lambda name, **arguments: {"name": name, "arguments": arguments}
    good, absent, shown = "http://a.test/1", "http://a.test/404", "http://a.test/2"
    calls = [call("search", queries=["q"]), call("browse", url=good), call("browse", url=absent)]
    trajectory = Trajectory(Task("t", "q", "a"), (0,), turns=[Turn([], [], 0, calls=calls)])
    results = [f"hit: {shown}", f"{good} (page 1 of 1)\ntext", f"error 404 for {absent}"]
    take_results(trajectory, [(text, False) for text in results])
    assert trajectory.pages == [good]
    assert trajectory.urls == [shown, good, absent]
    assert trajectory.turns[0].results == results and trajectory.turns[0].faults == 0

    assert any(t.pages for t in played) and any(set(t.urls) - set(t.pages) for t in played)
    for t in played:
        calls = [call for turn in t.turns for call in turn.calls if call["name"] == "browse"]
        assert set(t.pages) <= {call["arguments"]["url"] for call in calls}
        assert set(t.pages) <= set(t.urls)


class Counting(ScriptedLoop):
    """Counts the turns that begin."""

    begun = 0

    def begin_turns(self) -> None:
        self.begun += len(self.ready)
        super().begin_turns()


@pytest.mark.parametrize("lockstep", [True, False])
def test_more_trajectories_than_slots_take_the_places_that_get_free(
    tiny, chat, make_engine, lockstep
):
    tasks = scripted_tasks(9, 1, turns=lambda rng: int(rng.integers(1, 5)), latency_s=0.001)
    args = RolloutArgs(slots=3, max_new_tokens=2, max_turns=9, tool_steps=2)
    loop = Counting(make_engine(tiny, args), chat, None, args, lockstep)
    ended, trajectories = [], fresh(tasks, 1)
    loop.add(trajectories)
    while loop.busy():
        assert sum(slot is not None for slot in loop.engine.slots) <= 3
        ended += loop.step()
    assert sorted(map(id, ended)) == sorted(map(id, trajectories))  # each once
    assert [len(t.turns) for t in trajectories] == [t.task.meta["turns"][0] for t in trajectories]
    assert loop.begun == sum(len(t.turns) for t in trajectories)
    assert loop.engine.free_places() == [0, 1, 2] and not any(loop.engine.slots)


# ---------------------------------------------------------------------------------- sync rollouts


class Bar:
    """In the place of a progress bar."""

    moved = 0

    def update(self, n=1) -> None:
        self.moved += n


def test_sync_rollouts_take_the_groups_of_an_update_in_order(tiny, chat, make_engine):
    tasks = scripted_tasks(20, 2, turns=lambda rng: 2, latency_s=0.0)
    args = RolloutArgs(slots=4, max_new_tokens=2)
    loop = ScriptedLoop(make_engine(tiny, args), chat, None, args, lockstep=True)
    next_group = lambda n, version: new_group(tasks[n], n, 2, 0, version)
    rollouts, bar = SyncRollouts(loop, next_group, enough=3, next_number=6), Bar()
    for update in (2, 3):
        groups = rollouts.collect(update, bar)
        first = 3 * update
        assert [group.position for group in groups] == [first, first + 1, first + 2]
        assert all(group.whole() and group.born == update for group in groups)
        trajectories = [t for group in groups for t in group.trajectories]
        assert {turn.version for t in trajectories for turn in t.turns} == {update - 2}
        rollouts.publish(tiny, update - 1)
        assert 0 <= rollouts.idle_share < 1
    assert bar.moved == 12 and rollouts.parked() == 0 and rollouts.state() is None


def test_keys_differ_by_seed_stream_place_and_attempt():
    task = Task("t", "q", "a")
    groups = [
        new_group(task, position, 3, seed, stream=stream)
        for seed in (0, 1)
        for stream in (0, 1)
        for position in (0, 1)
    ]
    keys = [t.key for group in groups for t in group.trajectories]
    assert len(set(keys)) == len(keys) == 24
    assert keys[:3] == [(0, 0, 0, index, 0) for index in range(3)]
    assert not any(group.whole() for group in groups)
    assert groups[0].trajectories[0].segments == [] and Segment().ids == []
