"""What holds on a GPU alone: decoding by CUDA graphs, and the two precisions."""

import pytest
import torch
from scripted import ScriptedLoop, scripted_tasks, trainer_gap
from test_rollout import assert_equals_generate, decode_all, fresh, ragged_prompts

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
        model, slots = tiny.to("cpu"), list(slots)
        assert_equals_generate(model, chat, prompts, slots)
    finally:
        tiny.to("cpu")


@pytest.mark.parametrize("precision, most", [("fp32", 1e-4), ("bf16", 0.5)])
def test_trainer_and_sampler_agree(on_gpu, chat, precision, most):
    """New weights reach the sampler's copy: its log-probs follow them."""
    args = RolloutArgs(slots=16, precision=precision, max_new_tokens=24)
    engine = Engine(on_gpu, chat, args)
    policy = Policy(on_gpu, 1.0)
    kept = [p.detach().clone() for p in on_gpu.parameters()]
    try:
        for version in range(2):
            tasks = fresh(scripted_tasks(6, 2, latency_s=0.0, turns=lambda rng: 3))
            trajectories = play_all(ScriptedLoop(engine, chat, None, args, True), tasks)
            gap = trainer_gap(policy, trajectories, version, "cuda")
            assert 0 < gap < most
            with torch.no_grad():
                for parameter in on_gpu.parameters():
                    parameter.mul_(1.2)
            engine.new_weights(version + 1)
    finally:
        with torch.no_grad():
            for parameter, old in zip(on_gpu.parameters(), kept):
                parameter.copy_(old)
