"""What holds on a GPU alone: decoding by CUDA graphs, and the two precisions."""

import pytest
import torch
from scripted import ScriptedLoop, scripted_tasks, trainer_gaps
from test_rollout import decode_all, fresh, generated, ragged_prompts

from engine import Engine, load_policy
from rollout import RolloutArgs
from rollout import play as play_all
from train import Policy

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no GPU")


@pytest.fixture(scope="module")
def on_gpu():
    return load_policy("nano", "cuda")[0]


def greedy(slots: int) -> RolloutArgs:
    return RolloutArgs(
        slots=slots, temperature=0.0, max_new_tokens=20, max_context=400, precision="fp32"
    )


def test_graphs_give_what_generate_gives(tiny, chat, dev_tasks):
    """Batches grow and shrink, so graphs of several sizes are recorded and used again."""
    model = tiny.to("cuda")
    try:
        engine = Engine(model, chat, greedy(13))
        prompts = ragged_prompts(chat, 40)
        slots = decode_all(engine, prompts, dev_tasks)
        assert len(engine.static.graphs) > 1
        model = tiny.to("cpu")
        assert [slot.ids for slot in slots] == [generated(model, chat, p) for p in prompts]
    finally:
        tiny.to("cpu")


def play_scripted(engine, chat, args):
    tasks = fresh(scripted_tasks(6, 2, latency_s=0.0, turns=lambda rng: 3))
    return play_all(ScriptedLoop(engine, chat, None, args, True), tasks)


def test_trainer_and_sampler_agree_before_and_after_new_weights(on_gpu, chat):
    args = RolloutArgs(slots=16, precision="fp32", max_new_tokens=24)
    engine, policy = Engine(on_gpu, chat, args), Policy(on_gpu, 1.0)
    kept = [parameter.detach().clone() for parameter in on_gpu.parameters()]
    try:
        for version in range(2):
            gaps = trainer_gaps(policy, play_scripted(engine, chat, args), version, "cuda")
            assert 0 < max(gaps) < 1e-4
            with torch.no_grad():
                for parameter in on_gpu.parameters():
                    parameter.mul_(1.2)
            engine.new_weights(version + 1)
    finally:
        with torch.no_grad():
            for parameter, old in zip(on_gpu.parameters(), kept):
                parameter.copy_(old)


def test_a_copy_in_bf16_differs_by_rounding(on_gpu, chat):
    args = RolloutArgs(slots=16, precision="bf16", max_new_tokens=24)
    engine, policy = Engine(on_gpu, chat, args), Policy(on_gpu, 1.0)
    assert engine.model.dtype == torch.bfloat16 and on_gpu.dtype == torch.float32
    gaps = trainer_gaps(policy, play_scripted(engine, chat, args), 0, "cuda")
    assert 1e-6 < sum(gaps) / len(gaps) < 0.05
