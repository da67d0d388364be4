"""A scripted environment for tests and benches: real decoding, but the task says how many turns a
trajectory takes and how long its tool takes. Every turn calls `wait`, which sleeps; the last one
answers. What the policy writes is recorded and not read.

In: tasks with meta["turns"], the number of turns of each attempt, and meta["latency_s"], the same
for every call or "heavy".
"""

import time
import zlib

import numpy as np

from context import Trajectory
from data.task import Task
from rollout import AgentLoop
from support.batches import logprob_gaps
from tools import ToolCall
from train import rows_of


def heavy_latency(rng) -> float:
    """Seconds: log-normal with median 50 ms; sigma 1.586 puts 1% above 2 s; cut at 5 s."""
    return min(5.0, 0.05 * float(np.exp(1.586 * rng.standard_normal())))


def heavy_turns(rng) -> int:
    """1 to 50 turns: log-normal with median 4, so that one trajectory in fifty takes more than 25."""
    return int(np.clip(np.ceil(4 * np.exp(0.95 * rng.standard_normal())), 1, 50))


def scripted_tasks(
    count: int, samples: int, seed: int = 0, turns=heavy_turns, latency_s: float | str = "heavy"
) -> list[Task]:
    rng = np.random.default_rng(seed)
    return [
        Task(
            f"scripted-{number}",
            f"How many steps does number {number} take?",
            "",
            family="scripted",
            meta={"turns": [turns(rng) for _ in range(samples)], "latency_s": latency_s},
        )
        for number in range(count)
    ]


def turns_of(trajectory: Trajectory) -> int:
    return trajectory.task.meta["turns"][trajectory.key[3]]


def wait(seconds: float) -> str:
    time.sleep(seconds)
    return "waited"


class ScriptedToolbox:
    """In the place of support.toolbox.Toolbox."""

    def tools_for(self, trajectory: Trajectory) -> dict:
        return {"wait": wait}

    def close(self, trajectory: Trajectory) -> None:
        pass

    def close_all(self) -> None:
        pass


class ScriptedLoop(AgentLoop):
    """An agent loop that does not read what the policy writes. A subclass may name another toolbox."""

    toolbox_type = ScriptedToolbox

    def __init__(self, engine, chat, toolbox, args, lockstep: bool = False):
        super().__init__(engine, chat, self.toolbox_type(), args, lockstep)

    def read_turn(self, trajectory: Trajectory) -> list[ToolCall]:
        number = len(trajectory.turns) - 1
        if number + 1 >= turns_of(trajectory):
            trajectory.status, trajectory.answer = "answered", ""
            return []
        if number in trajectory.memory.get("notes_turns", []):  # it calls nothing, as in rollout.py
            return []
        latency_s = trajectory.task.meta["latency_s"]
        if latency_s == "heavy":  # the same call takes the same time, however often it is made
            key = [zlib.crc32(trajectory.task.id.encode()), trajectory.key[3], number + 1]
            latency_s = heavy_latency(np.random.default_rng(key))
        return [ToolCall("wait", {"seconds": latency_s})]


def trainer_gaps(
    policy, trajectories: list[Trajectory], version: int = 0, device: str = "cpu"
) -> list[float]:
    """|trainer - sampler| log-prob of all tokens that this version sampled."""
    turns = [(t, [1.0] * len(t.turns)) for t in trajectories]
    rows = [row for t, ones in turns for row in rows_of(t, ones, version)]
    return logprob_gaps(policy, rows, 4096, device)


def trainer_gap(policy, trajectories: list[Trajectory], version: int = 0) -> float:
    return max(trainer_gaps(policy, trajectories, version), default=0.0)
