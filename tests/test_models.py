"""Families of models: trainer and sampler agree on a tiny random one, or one line refuses it.

python tests/test_models.py     # prints the table of docs/models.md
"""

import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import pytest
import torch
from scripted import ScriptedLoop, scripted_tasks, trainer_gap
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.utils import logging

from context import Chat
from engine import Engine, load_policy
from rollout import RolloutArgs, new_group, play
from tools import signatures
from train import Policy

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


def gap_of(model, tokenizer, folder, max_context: int = 400) -> float:
    """Largest |trainer - sampler| log-prob of the model as a user loads it, over four trajectories of
    three turns."""
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    model, tokenizer = load_policy(str(folder))
    chat = Chat(tokenizer, signatures())
    args = RolloutArgs(slots=3, max_new_tokens=24, max_context=max_context, tool_steps=4)
    loop = ScriptedLoop(Engine(model, chat, args), chat, None, args, lockstep=True)
    tasks = scripted_tasks(2, 2, turns=lambda rng: 3, latency_s=0.001)
    trajectories = [
        t for n, task in enumerate(tasks) for t in new_group(task, n, 2, 0).trajectories
    ]
    played = play(loop, trajectories)
    assert all(len(t.turns) == 3 for t in played)
    return trainer_gap(Policy(model, args.temperature), played)


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
