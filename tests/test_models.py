"""Families of models: trainer and sampler agree on a tiny random one, or one line refuses it.

python tests/test_models.py     # prints the table of docs/models.md
"""

import random
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import pytest
import torch
from accelerate import Accelerator
from habits import (
    CHATML_TAGS,
    GEMMA,
    LLAMA2,
    QWEN3,
    QWEN3_OFF,
    QWEN3_PREFILLED,
    SMOLLM2,
    SYSTEM_TEXT,
    TOOL_TAGS,
    small_tokenizer,
)
from scripted import ScriptedLoop, scripted_tasks, trainer_gap
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.utils import logging

from context import Chat, Trajectory, Turn, add_turn
from data.base.explorers import Explorer, explore, open_site
from data.tasks import draw_task
from data.world import World
from engine import Engine, load_policy
from rollout import RolloutArgs, new_group, next_prompt, play, read_turn, take_results
from support.toolbox import Toolbox
from tools import signatures
from train import Policy, gradient, rows_of

SIZES = dict(
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
)
HEADS = SIZES | dict(head_dim=8)
EXPERTS = dict(
    num_experts=4,
    num_local_experts=4,
    n_routed_experts=4,
    num_experts_per_tok=2,
    moe_intermediate_size=32,
    n_group=1,
    topk_group=1,
)
LATENT = SIZES | dict(
    num_key_value_heads=4,
    q_lora_rank=16,
    kv_lora_rank=16,
    qk_nope_head_dim=8,
    qk_rope_head_dim=8,
    v_head_dim=8,
)
GPT2 = dict(n_embd=32, n_layer=2, n_head=4)
STATE = dict(hidden_size=32, num_hidden_layers=2, state_size=8)
# model type -> (its configuration, what is peculiar)
FAMILIES = {
    "llama": (SIZES | dict(tie_word_embeddings=True), "tied embeddings"),
    "mistral": (SIZES | dict(sliding_window=400), "window as long as the context"),
    "qwen2": (SIZES, "biases in attention"),
    "qwen3": (HEADS, "norms of queries and keys"),
    "phi": (SIZES, "partial rotary, bias in the head"),
    "phi3": (SIZES, "fused projections"),
    "gpt2": (GPT2, "learned positions"),
    "gpt_neox": (SIZES, "parallel residual"),
    "gpt_bigcode": (GPT2, "one key head, learned positions"),
    "opt": (SIZES | dict(ffn_dim=64, word_embed_proj_dim=32), "learned positions with an offset"),
    "falcon": (SIZES, "one key head"),
    "stablelm": (SIZES, "partial rotary"),
    "starcoder2": (SIZES, "biases everywhere"),
    "nemotron": (SIZES, "squared relu"),
    "olmo": (SIZES, "norms without weights"),
    "olmo2": (SIZES, "norms behind the layers"),
    "smollm3": (SIZES, "layers without positions"),
    "exaone4": (HEADS, "layers without positions"),
    "glm4": (HEADS, "partial rotary"),
    "hunyuan_v1_dense": (HEADS, "norms of queries and keys"),
    "seed_oss": (HEADS, "biases in attention"),
    "apertus": (SIZES, "xIELU"),
    "granite": (SIZES | dict(logits_scaling=8.0), "logits divided by 8"),
    "cohere": (SIZES | dict(logit_scale=0.0625), "logits times 1/16"),
    "cohere2": (SIZES | dict(logit_scale=0.25), "logits times 1/4, layers without positions"),
    "gemma": (HEADS, "scaled embeddings"),
    "gemma3_text": (HEADS | dict(final_logit_softcapping=5.0), "logits capped at 5"),
    "nanochat": (SIZES | dict(final_logit_softcapping=5.0), "logits capped at 5"),
    "minicpm3": (LATENT | dict(dim_model_base=16, scale_emb=12), "hidden states scaled, latent"),
    "deepseek_v3": (LATENT | EXPERTS | dict(first_k_dense_replace=1), "experts, latent attention"),
    "mixtral": (SIZES | EXPERTS, "experts"),
    "qwen3_moe": (HEADS | EXPERTS, "experts"),
    "granitemoe": (SIZES | EXPERTS | dict(logits_scaling=8.0), "experts, logits divided by 8"),
    "gemma2": (HEADS, "capped attention scores"),
    "gpt_oss": (HEADS | EXPERTS, "attention sinks"),
    "bloom": (dict(hidden_size=32, n_layer=2, n_head=4), "ALiBi"),
    "mamba": (STATE, "state space"),
    "jamba": (SIZES | EXPERTS, "state space"),
    "qwen3_next": (HEADS | EXPERTS, "linear attention"),
    "llama4_text": (HEADS | EXPERTS, "chunked attention"),
}
# Models with habits of their own -> (family, sizes, chat template, what cuts its texts, its tokens).
TAGS = CHATML_TAGS + TOOL_TAGS
TIED, PADDED = dict(tie_word_embeddings=True), dict(vocab_size=1024)
BYTES, WORDS, PIECES = ("byte-level",), ("prepend", True), ("replace", True)
HABITS = {
    "SmolLM2": ("llama", TIED, SMOLLM2, BYTES, CHATML_TAGS),
    "Qwen3": ("qwen3", TIED | PADDED, QWEN3, BYTES, [*TAGS, "<think>", "</think>"]),
    "Qwen3, thinking off": ("qwen3", PADDED, QWEN3_OFF, BYTES, [*TAGS, "<think>", "</think>"]),
    "Qwen3 Thinking": ("qwen3", PADDED, QWEN3_PREFILLED, BYTES, [*TAGS, "<think>", "</think>"]),
    "Llama 2": ("llama", {}, LLAMA2, WORDS, ["<s>", "</s>"]),
    "Gemma": ("gemma", TIED, GEMMA, PIECES, ["<bos>", "<start_of_turn>", "<end_of_turn>"]),
}
REFUSED = {"gemma2", "gpt_oss", "bloom", "mamba", "jamba", "qwen3_next", "llama4_text"}
SAMPLE = ["gpt2", "granite", "cohere", "gemma3_text", "minicpm3", "deepseek_v3", "mamba", "jamba"]


def tiny_of(name: str, tokenizer, **more):
    """A random model of this family, far from uniform, so that wrong masks or scales show."""
    torch.manual_seed(0)
    common = dict(vocab_size=len(tokenizer), bos_token_id=None, eos_token_id=0, pad_token_id=0)
    config = AutoConfig.for_model(name, **common | FAMILIES[name][0] | more)
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(8.0)
    return model


def scripted(model, tokenizer, folder, max_context: int = 400, turns: int = 3):
    """The model as a user loads it, and a function that plays four trajectories with it."""
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    model, tokenizer = load_policy(str(folder))
    chat = Chat(tokenizer, signatures())
    args = RolloutArgs(slots=3, max_new_tokens=24, max_context=max_context, tool_steps=4)
    loop = ScriptedLoop(Engine(model, chat, args), chat, None, args, lockstep=True)
    tasks = scripted_tasks(2, 2, turns=lambda rng: turns, latency_s=0.001)

    def play_all() -> list[Trajectory]:
        groups = [new_group(task, n, 2, 0) for n, task in enumerate(tasks)]
        played = play(loop, [t for group in groups for t in group.trajectories])
        assert all(len(t.turns) == turns for t in played)
        return played

    return Policy(model, args.temperature), loop.engine, play_all


def gap_of(model, tokenizer, folder, max_context: int = 400) -> float:
    """Largest |trainer - sampler| log-prob over four trajectories of three turns."""
    policy, _, play_all = scripted(model, tokenizer, folder, max_context)
    return trainer_gap(policy, play_all())


def with_habits(name: str):
    """A tiny random model with this one's template, tokenizer and embeddings."""
    family, more, template, cut, tags = HABITS[name]
    names = {"<s>": "bos_token", "<bos>": "bos_token", "</s>": "eos_token"}
    special = {names[tag]: tag for tag in tags if tag in names}
    tokenizer = small_tokenizer(cut[0], tags, *cut[1:], **special)
    tokenizer.chat_template = template
    return tiny_of(family, tokenizer, **more), tokenizer


def gaps_around_an_update(name: str, folder) -> tuple[float, float]:
    """Largest |trainer - sampler| log-prob of a model of HABITS before and after one update."""
    policy, engine, play_all = scripted(*with_habits(name), folder, 1200)
    gaps, args = (
        [],
        SimpleNamespace(micro_tokens=4096, max_grad_norm=1.0, gradient_checkpointing=False),
    )
    for version in (0, 1):
        played = play_all()
        gaps.append(trainer_gap(policy, played, version))
        if version == 0:
            rows = [
                row
                for n, t in enumerate(played)
                for row in rows_of(t, [1.0 - 2 * (n % 2)] * len(t.turns), version)
            ]
            norm = gradient(policy, Accelerator(cpu=True), rows, 100.0, args)
            before = [parameter.clone() for parameter in policy.parameters()]
            torch.optim.AdamW(policy.parameters(), lr=1e-3).step()
            moved = [not torch.equal(*pair) for pair in zip(before, policy.parameters())]
            assert norm > 0 and any(moved)
            engine.new_weights(1)
    return tuple(gaps)


@pytest.mark.parametrize("name", FAMILIES)
def test_trainer_and_sampler_agree_or_one_line_refuses(name, tokenizer, tmp_path, full):
    if not full and name not in SAMPLE:
        pytest.skip("runs with --full")
    model = tiny_of(name, tokenizer)
    if name not in REFUSED:
        assert gap_of(model, tokenizer, tmp_path) < 1e-4
        return
    with pytest.raises(ValueError, match="cannot (load|play)") as error:
        gap_of(model, tokenizer, tmp_path)
    assert "\n" not in str(error.value)


def test_a_padded_vocabulary_changes_nothing(tokenizer, tmp_path):
    assert gap_of(tiny_of("qwen3", tokenizer, vocab_size=3000), tokenizer, tmp_path) < 1e-4


@pytest.mark.parametrize("name", HABITS)
def test_a_model_with_habits_of_its_own_learns_from_what_it_sampled(name, tmp_path):
    assert max(gaps_around_an_update(name, tmp_path)) < 1e-4


@pytest.mark.parametrize("name", HABITS)
def test_a_prompt_is_what_the_published_template_makes(name):
    _, _, template, cut, tags = HABITS[name]
    tokenizer = with_habits(name)[1]
    chat = Chat(tokenizer, ["search(queries)"])

    def whole(*messages):
        return tokenizer.apply_chat_template(
            [{"role": role, "content": text} for role, text in messages],
            add_generation_prompt=True,
            return_dict=False,
        )

    asked = [("system", SYSTEM_TEXT), ("user", "Who is it?")]
    if template == GEMMA:  # it refuses a system message
        asked = [("user", f"{SYSTEM_TEXT}\n\nWho is it?")]
    head = chat.head("Who is it?")
    assert head == whole(*asked)
    result = "<tool_response>Belin</tool_response>"
    observation = chat.observation(["Belin"], 50)
    # Llama 2's template puts a space on either side of an action, which a policy need not write.
    past = [("assistant", "so"), ("user", result)]
    if template == QWEN3:  # a thought that stands in this form comes back as it was
        past[0] = ("assistant", "<think>\na\n</think>\n\nso")
    ours = head + chat.trusted(past[0][1]) + [chat.end_id] + observation
    if template in (SMOLLM2, QWEN3, GEMMA):
        assert tokenizer.decode(ours) == tokenizer.decode(whole(*asked, *past))
    assert tokenizer.decode(whole(*asked, *past)).endswith(tokenizer.decode(observation))


class Noting(Explorer):
    """An explorer that notes the results of its calls."""

    def see(self, call: dict, result: str) -> None:
        self.results = [*getattr(self, "results", []), (call, result)]
        super().see(call, result)


def actions_in(ids: list[int], mask: list[int], end_id: int) -> list[list[int]]:
    actions = [[]]
    for id, is_own in zip(ids, mask):
        actions[-1] += [id] if is_own else []
        actions += [[]] if is_own and id == end_id else []
    return actions[:-1]


@pytest.mark.parametrize("name", HABITS)
def test_explorers_write_what_the_agent_loop_would_have_made_of_their_turns(name):
    """Each turn is read as the move that was meant, and prompts and actions are these ids."""
    tokenizer = with_habits(name)[1]
    chat, site = Chat(tokenizer, signatures()), open_site(World(99, 120, "pretrain"))
    args, rng = RolloutArgs(max_context=4000, max_new_tokens=400, max_turns=5), random.Random(0)
    toolbox, ends = Toolbox(args), []
    for family in ("lookup", "browse", "compute") * 4:
        task = draw_task(site.world, family, 1, rng)
        explorer = Noting(task, site, rng, 0.5, args.page_chars)
        ids, mask, _ = explore(explorer, task, chat, args)
        trajectory = Trajectory(task, (0,), head_ids=chat.head(task.question))
        for number, action in enumerate(actions_in(ids, mask, chat.end_id)):
            assert next_prompt(trajectory, chat, args)
            turn = Turn(action, [0.0] * len(action), 0)
            add_turn(trajectory, turn)
            text = chat.opened + chat.decode(action)  # a thought is opened once, and closed
            assert text.count("<think>") == text.count("</think>") > 0
            if calls := read_turn(trajectory, chat, toolbox.tools_for(trajectory)):
                call, result = explorer.results[number]
                assert [(each.name, each.arguments) for each in calls] == [tuple(call.values())]
                take_results(trajectory, [(result, False)])
                turn.observation_ids = chat.observation(turn.results, args.observation_tokens)
        ends.append(trajectory.status)
        [segment] = trajectory.segments
        length = len(segment.ids)
        assert segment.ids == ids[:length] and not any(mask[length:])
        assert [number >= 0 for number in segment.turn_of] == [bool(own) for own in mask[:length]]
    assert set(ends) <= {"running", "answered"} and ends.count("answered") >= 6


@pytest.mark.parametrize(
    "name, more, words",
    [
        ("llama", dict(vocab_size=2500), "knows 2500 tokens, its tokenizer more"),
        ("gpt2", dict(n_positions=128), "128 positions; --max_context 128 or less"),
        ("llama", dict(max_position_embeddings=399), "399 positions"),
        ("mistral", dict(sliding_window=399), "sliding window of 399 tokens"),
        (
            "phi3",
            dict(
                max_position_embeddings=4096,
                original_max_position_embeddings=256,
                rope_parameters=dict(
                    rope_type="longrope",
                    rope_theta=10000.0,
                    short_factor=[1.0] * 4,
                    long_factor=[2.0] * 4,
                    original_max_position_embeddings=256,
                ),
            ),
            "256 positions before its rotary angles change",
        ),
    ],
)
def test_a_context_that_the_model_cannot_hold_is_refused_before_it_runs(
    tokenizer, tmp_path, name, more, words
):
    model = tiny_of(name, tokenizer, **more)
    with pytest.raises(ValueError, match=words) as error:
        gap_of(model, tokenizer, tmp_path)
    assert "\n" not in str(error.value)


def test_a_model_that_sees_ahead_is_refused(make_engine, tokenizer):
    """Nothing in its configuration says so: the engine finds out by trying."""
    config = AutoConfig.for_model("bert", vocab_size=len(tokenizer), **SIZES)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(8.0)
    with pytest.raises(ValueError, match="cannot play a bert model: its log-probs depend"):
        make_engine(model, RolloutArgs(slots=2, max_context=400))


if __name__ == "__main__":
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    nano = load_policy("nano")[1]
    print("| family | what is peculiar | largest gap |\n| --- | --- | --- |")
    for family, (_, words) in FAMILIES.items():
        with tempfile.TemporaryDirectory() as place:
            try:
                found = f"{gap_of(tiny_of(family, nano), nano, place):.0e}"
            except ValueError as error:
                found = str(error).replace(f"'{place}'", "…").split(". ")[0]
        print(f"| {family} | {words} | {found} |")
    print("\n| model | family | gap before and after an update |\n| --- | --- | --- |")
    for name, (family, *_) in HABITS.items():
        with tempfile.TemporaryDirectory() as place:
            gaps = " and ".join(f"{gap:.0e}" for gap in gaps_around_an_update(name, place))
        print(f"| {name} | {family} | {gaps} |")
