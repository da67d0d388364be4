"""Which training task comes next: tasks that fail often are drawn often.

Kimi k1.5 (arXiv:2501.12599) keeps the success rate of each problem and samples problems in
proportion to one minus that rate. A short run meets most tasks once at most, so here a task's rate
begins as the rate of all tasks of its kind (family and hops), and its own attempts move it away
from there. Old attempts fade, because the policy learns.

In: tasks, and what came of those that were played. Out: the task at each position of the stream.
To try an idea (another rule), change `fail_rates`.
"""

from collections import Counter

import numpy as np

from data.task import Task, task_at

PRIOR = 4.0  # attempts that the rate of its kind counts for in the rate of a task
FADE = 0.9  # what an attempt still counts for after an update
LEAST = 0.05  # no task is drawn less often than one that fails in every twentieth attempt


def kind_of(task: Task) -> str:
    return f"{task.family} {task.hops}"


def fail_rates(tasks: list[Task], tries: dict, hits: dict) -> np.ndarray:
    """How often each task is expected to fail, at least LEAST.

    Args:
        tries, hits: attempts at each task by its id, and how many of them were right.

    Returns:
        One number a task. Each is smoothed twice: that of a kind by one success and one failure,
        that of a task by PRIOR attempts of its kind.
    """
    tries_of, hits_of = Counter(), Counter()
    for task in tasks:
        tries_of[kind_of(task)] += tries.get(task.id, 0)
        hits_of[kind_of(task)] += hits.get(task.id, 0)
    rates = []
    for task in tasks:
        kind = kind_of(task)
        of_kind = (hits_of[kind] + 1) / (tries_of[kind] + 2)
        right = hits.get(task.id, 0) + PRIOR * of_kind
        rates.append(1 - right / (tries.get(task.id, 0) + PRIOR))
    return np.maximum(rates, LEAST)


class Curriculum:
    """The stream of training tasks.

    Args:
        tasks: to draw from.
        seed: decides the draws, with the position in the stream and what came of earlier updates.
        on: False draws each task once an epoch, in the order of `task_at`.
        state: of an earlier run, see `state`.
    """

    def __init__(self, tasks: list[Task], seed: int, on: bool, state: dict | None = None):
        self.tasks, self.seed, self.on = tasks, seed, on
        self.tries, self.hits = state or ({}, {})
        self.rates = fail_rates(tasks, self.tries, self.hits)

    def task_at(self, position: int) -> Task:
        """The task at a position of the stream, by what is known now."""
        if not self.on:
            return task_at(self.tasks, position, self.seed)
        ends = np.cumsum(self.rates)
        point = np.random.default_rng([self.seed, position]).random() * ends[-1]
        return self.tasks[int(np.searchsorted(ends, point, side="right"))]

    def learn(self, tries: dict, hits: dict) -> dict:
        """Take in the attempts of an update.

        Args:
            tries, hits: as of `fail_rates`, of all ranks together.

        Returns:
            For the metrics: the share of draws that each kind of task gets from now on.
        """
        for known, new in ((self.tries, tries), (self.hits, hits)):
            for task in known:
                known[task] *= FADE
            for task, count in new.items():
                known[task] = known.get(task, 0.0) + count
        self.rates = fail_rates(self.tasks, self.tries, self.hits)
        of_kind = Counter()
        for task, rate in zip(self.tasks, self.rates):
            of_kind[kind_of(task)] += rate if self.on else 1.0
        total = sum(of_kind.values())
        return {kind: share / total for kind, share in sorted(of_kind.items())}

    def state(self) -> tuple[dict, dict]:
        """What a resumed run needs in order to draw the same tasks."""
        return self.tries, self.hits
