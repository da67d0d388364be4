import pickle
import random
from collections import Counter

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from context import Trajectory
from engine import Slot, load_policy
from rollout import RolloutArgs, finish_turn, next_prompt, rollout, take_results, trajectory_key
from tools import run_calls


def play(engine, chat, tasks, toolbox, args, samples=2, seed=0):
    trajectories = [
        Trajectory(t, trajectory_key(seed, 0, t, k)) for t in tasks for k in range(samples)
    ]
    return rollout(engine, chat, trajectories, toolbox, args)


def decode_all(engine, prompts, tasks):
    """Sampled ids of one turn for each prompt, more prompts than slots."""
    queue, done = list(enumerate(prompts)), {}
    running = {}
    while queue or running:
        for row in engine.free_slots():
            if queue:
                number, prompt = queue.pop(0)
                engine.slots[row] = Slot(Trajectory(tasks[0], (0, number)))
                running[engine.slots[row]] = number
                engine.start_turn(engine.slots[row], prompt)
        for slot in engine.step():
            done[running.pop(slot)] = slot
            engine.slots[engine.slots.index(slot)] = None
    return [done[number] for number in range(len(prompts))]


def ragged_prompts(chat, count):
    rng = random.Random(0)
    return [
        (chat.before_question if rng.random() < 0.5 else [])
        + [rng.randrange(300, 2000) for _ in range(rng.randint(1, 90))]
        for _ in range(count)
    ]


def assert_equals_generate(model, chat, prompts, slots):
    for prompt, slot in zip(prompts, slots):
        wanted = model.generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt)),
            do_sample=False,
            max_new_tokens=20,
            eos_token_id=chat.end_id,
            pad_token_id=0,
        )[0, len(prompt) :].tolist()
        assert slot.ids == wanted


# few slots: decoding is replayed from a trace; many: rows are bounded by eights; 800 tokens are two rows of the cache; pieces
# of 32 tokens cut the longer prompts.
@pytest.mark.parametrize(
    "slots, kv_tokens, piece", [(4, 0, 2048), (22, 0, 2048), (7, 800, 2048), (4, 0, 32)]
)
def test_greedy_engine_equals_generate(
    tiny, chat, make_engine, dev_tasks, monkeypatch, slots, kv_tokens, piece
):
    monkeypatch.setattr("rollout.PREFILL_TOKENS", piece)
    prompts = ragged_prompts(chat, max(11, slots))
    engine = make_engine(
        tiny,
        RolloutArgs(
            slots=slots, kv_tokens=kv_tokens, temperature=0.0, max_new_tokens=20, max_context=400
        ),
    )
    assert_equals_generate(tiny, chat, prompts, decode_all(engine, prompts, dev_tasks))
    assert engine.traced is not False
    assert bool(engine.cache.keys[0].shape[0] == 3) == bool(kv_tokens)


@pytest.mark.parametrize("name", ["qwen3", "gpt_neox", "gpt2", "gemma"])
def test_other_architectures(chat, make_engine, dev_tasks, tokenizer, name):
    """Untied with norms on the heads, partial rotary with fused projections, learned positions, one key head."""
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
            parameter.mul_(3.0) if parameter.dim() > 1 else None
    prompts = ragged_prompts(chat, 5)
    engine = make_engine(
        model, RolloutArgs(slots=4, temperature=0.0, max_new_tokens=20, max_context=400)
    )
    assert_equals_generate(model, chat, prompts, decode_all(engine, prompts, dev_tasks))


def test_what_is_not_full_attention_is_refused(make_engine, tokenizer):
    sizes = dict(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    window = AutoModelForCausalLM.from_config(
        AutoConfig.for_model("mistral", sliding_window=64, **sizes)
    )
    with pytest.raises(ValueError, match="sliding window of 64"):
        make_engine(window, RolloutArgs(slots=2, max_context=128))
    make_engine(
        window, RolloutArgs(slots=2, max_context=64)
    )  # never longer than the window: as good as full
    with pytest.raises(ValueError, match="caps attention scores"):
        make_engine(
            AutoModelForCausalLM.from_config(AutoConfig.for_model("gemma2", head_dim=8, **sizes)),
            RolloutArgs(slots=2, max_context=64),
        )


def test_waiting_trajectories_give_up_their_rows(tiny, chat, make_engine, dev_tasks):
    """Six trajectories in flight, memory for two: every second turn goes on as if nothing had been evicted."""
    args = RolloutArgs(slots=6, kv_tokens=800, temperature=0.0, max_new_tokens=8, max_context=400)
    outputs = {}
    for kv_tokens in (800, 0):
        engine = make_engine(tiny, RolloutArgs(**(vars(args) | {"kv_tokens": kv_tokens})))
        engine.end_id = -1
        engine.slots = [Slot(Trajectory(dev_tasks[0], (0, k))) for k in range(6)]
        prompts = ragged_prompts(chat, 6)
        for turn in range(2):
            for slot, prompt in zip(engine.slots, prompts):
                engine.start_turn(slot, prompt)
            while not all(slot.turn_done for slot in engine.slots):
                engine.step()
            prompts = [
                prompt + slot.ids + [400 + turn] * 5 for slot, prompt in zip(engine.slots, prompts)
            ]
        outputs[kv_tokens] = [slot.ids for slot in engine.slots]
        assert bool(engine.stats["evicted"]) == bool(kv_tokens)
        assert engine.cache.keys[0].shape[0] == (3 if kv_tokens else 7)
    assert outputs[800] == outputs[0]


def test_sampled_distribution_is_the_softmax(tiny, chat, make_engine, dev_tasks):
    """Chi-square of 4,000 draws of one token against softmax(logits / T)."""
    engine = make_engine(
        tiny, RolloutArgs(slots=64, temperature=0.7, max_new_tokens=1, max_context=128)
    )
    prompt = [300, 301, 302]
    engine.end_id = -1
    tokens = [slot.ids[0] for slot in decode_all(engine, [prompt] * 4000, dev_tasks)]
    with torch.no_grad():
        p = (
            torch.softmax(tiny(torch.tensor([prompt])).logits[0, -1] / 0.7, -1)
            .numpy()
            .astype(float)
        )
    observed = np.bincount(tokens, minlength=len(p))
    big = p * 4000 >= 5
    statistic = ((observed[big] - 4000 * p[big]) ** 2 / (4000 * p[big])).sum()
    freedom = big.sum()
    assert freedom > 5 and statistic < freedom + 5 * (2 * freedom) ** 0.5


def test_a_cached_turn_equals_a_fresh_one_and_new_weights_void_the_cache(
    tiny, chat, make_engine, dev_tasks
):
    args = RolloutArgs(slots=2, temperature=0.0, max_new_tokens=8, max_context=400)
    engine, prompt = make_engine(tiny, args), list(range(300, 340))
    engine.end_id = -1
    slot = engine.slots[0] = Slot(Trajectory(dev_tasks[0], (0,)))

    def turn(ids):
        engine.start_turn(slot, ids)
        while not slot.turn_done:
            engine.step()
        return slot.ids

    first = turn(prompt)
    longer = prompt + first + list(range(500, 520))
    before = engine.stats["prefilled"]
    second = turn(longer)
    assert (
        engine.stats["prefilled"] - before == 21
    )  # 20 new tokens and the last sampled one, not the whole context
    rewritten = turn(longer[:20] + longer[30:])  # the context manager rewrote the prompt
    fresh = make_engine(tiny, args)
    fresh.end_id = -1
    assert [s.ids for s in decode_all(fresh, [longer, longer[:20] + longer[30:]], dev_tasks)] == [
        second,
        rewritten,
    ]
    with torch.no_grad():
        for parameter in tiny.parameters():
            parameter.mul_(1.1)
    engine.new_weights(1)
    again, other = turn(longer), make_engine(tiny, args)
    other.end_id = -1
    assert again == decode_all(other, [longer], dev_tasks)[0].ids


@pytest.mark.parametrize(
    "context, temperature, kv_tokens", [("none", 1.0, 2048), ("elide", 0.7, 0)]
)
def test_trainer_and_sampler_agree_on_every_turn(
    chat, make_engine, toolbox, dev_tasks, context, temperature, kv_tokens
):
    from train import Policy, logprob_gap

    model, _ = load_policy("nano")
    args = RolloutArgs(
        context=context, context_budget=300, temperature=temperature, slots=5, kv_tokens=kv_tokens
    )
    engine = make_engine(model, args)
    trajectories = play(engine, chat, dev_tasks[:6], toolbox, args)
    assert kv_tokens == 0 or engine.stats["evicted"] > 0
    assert any(len(t.turns) > 2 for t in trajectories)
    assert context == "none" or any(len(t.segments) > 1 for t in trajectories)
    assert logprob_gap(Policy(model, temperature), trajectories, 4096, "cpu") < 1e-4
    if temperature != 1.0:
        assert logprob_gap(Policy(model, 1.0), trajectories, 4096, "cpu") > 1e-2


def test_training_ids_are_the_sampled_ids(chat, make_engine, toolbox, dev_tasks):
    model, _ = load_policy("nano")
    args = RolloutArgs(slots=8)
    for t in play(make_engine(model, args), chat, dev_tasks[:6], toolbox, args):
        assert len(t.segments) == 1
        ids = list(t.head_ids)
        for number, turn in enumerate(t.turns):
            ids += turn.action_ids + (
                turn.observation_ids
                if number < len(t.turns) - 1 or t.segments[0].turn_of[-1] == -1
                else []
            )
        assert t.segments[0].ids == ids[: len(t.segments[0].ids)]
        sampled = [i for i, turn in zip(t.segments[0].ids, t.segments[0].turn_of) if turn >= 0]
        assert sampled == [i for turn in t.turns for i in turn.action_ids]


def test_same_seed_same_trajectories_whatever_the_slots(chat, make_engine, toolbox, dev_tasks):
    model, _ = load_policy("nano")
    runs = []
    for slots in (8, 8, 3):
        args = RolloutArgs(slots=slots)
        runs.append(
            [
                [turn.action_ids for turn in t.turns]
                for t in play(make_engine(model, args), chat, dev_tasks[:4], toolbox, args)
            ]
        )
    assert runs[0] == runs[1]
    assert (
        sum(a == b for a, b in zip(runs[0], runs[2])) >= 7
    )  # other batches round differently: almost never another token
    args = RolloutArgs(slots=8)
    assert runs[0] != [
        [turn.action_ids for turn in t.turns]
        for t in play(make_engine(model, args), chat, dev_tasks[:4], toolbox, args, seed=1)
    ]


def test_limits_end_a_trajectory(chat, make_engine, toolbox, dev_tasks, tiny):
    model, _ = load_policy("nano")
    for changes, status in (
        (dict(max_turns=1), "over_turns"),
        (dict(max_context=220), "over_context"),
    ):
        args = RolloutArgs(slots=16, **changes)
        assert (
            Counter(
                t.status for t in play(make_engine(model, args), chat, dev_tasks[:8], toolbox, args)
            )[status]
            > 0
        )
    args = RolloutArgs(slots=4, max_new_tokens=5)
    ended = play(make_engine(tiny, args), chat, dev_tasks[:2], toolbox, args)
    assert all(t.status == "format_error" and t.error in ("unfinished", "no_action") for t in ended)


def test_slow_and_faulty_tools(chat, make_engine, toolbox, dev_tasks, monkeypatch):
    model, _ = load_policy("nano")
    args = RolloutArgs(slots=8)
    monkeypatch.setattr(
        "rollout.run_calls", lambda calls, tools: [("error: HTTP 500", True)] * len(calls)
    )
    ended = play(make_engine(model, args), chat, dev_tasks[:4], toolbox, args)
    faulty = [t for t in ended if t.status == "tool_fault"]
    assert faulty and all(t.error == "" for t in faulty)
    assert all(len(t.turns) == 3 for t in faulty)


def test_a_parked_trajectory_goes_on_from_its_pickle(chat, make_engine, toolbox, dev_tasks):
    model, _ = load_policy("nano")
    args = RolloutArgs(slots=1, temperature=0.0)
    whole = play(make_engine(model, args), chat, dev_tasks[:3], toolbox, args, samples=1)
    for t in (t for t in whole if len(t.turns) > 1):
        parked = Trajectory(t.task, t.key, head_ids=list(t.head_ids))
        next_prompt(parked, chat, args)
        tools = toolbox.tools_for(parked)
        calls = finish_turn(parked, t.turns[0].action_ids, t.turns[0].logprobs, 0, chat, tools)
        take_results(parked, run_calls(calls, tools), chat, args)
        parked = pickle.loads(pickle.dumps(parked))
        rollout(make_engine(model, args), chat, [parked], toolbox, args)
        assert [turn.action_ids for turn in parked.turns] == [turn.action_ids for turn in t.turns]
        assert parked.segments == t.segments or [s.ids for s in parked.segments] == [
            s.ids for s in t.segments
        ]


@pytest.mark.parametrize("name", ["./nowhere", "data", "nowhere.gguf"])
def test_a_missing_model_is_one_line(name):
    with pytest.raises(ValueError, match="cannot load the model") as error:
        load_policy(name)
    assert "\n" not in str(error.value)
