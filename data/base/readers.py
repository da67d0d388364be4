"""Readers: explorers of mixed skill on a user's own pages, for the tasks of data/blanks.py.

A small model that has seen the tools in fictional worlds alone cannot use them on other pages
(docs/log.md). Readers show it the tools on the pages that it will be asked about. A sensible reader
searches for the page that the question names, looks for the words next to the blank, and completes
them. The others search for any words of the question, look for others, and answer with any word
that they see.

In: tasks, and the tools over their corpus. Out: transcripts as explorers.py writes them.
To try an idea, change `sensible_move` or `random_move`.
"""

import random
import re
from dataclasses import dataclass, field

import numpy as np
from tqdm import tqdm

from context import Chat
from data.base.explorers import (
    Call,
    Row,
    browse,
    draw_skill,
    explore,
    row_of,
    search_for,
)
from data.deep.funnel import items, stands_in
from data.task import Task
from reward import correct
from rollout import RolloutArgs
from tools import Browse, Search, ToolCall, run_calls, urls_in


def result_of(call: Call, tools: dict) -> str:
    """What a tool answers; `tools` is name -> tool."""
    [(text, _)] = run_calls([ToolCall(**call)], tools)
    return text


def answer_of(task: Task) -> str:
    """The first of the answers that count as right."""
    return items(task.answer)[0]


def words_before(task: Task) -> list[str]:
    """The words before the blank."""
    return task.meta["before"].removesuffix(": ").split()


def phrases_of(task: Task) -> list[str]:
    """Words of the question next to its blank, and the entry that it names."""
    before, after = words_before(task), task.meta["after"].split()
    spans = [before[-n:] for n in (2, 3, 4)] + [after[:n] for n in (2, 3, 4)]
    phrases = [task.meta["entry"], *map(" ".join, spans)]
    return [phrase for phrase in dict.fromkeys(phrases) if re.search(r"\w", phrase)]


def any_words(text: str, rng: random.Random) -> str:
    """One to four words of a text, as they stand there."""
    words = re.findall(r"\w[\w.-]*", text) or ["page"]
    start = rng.randrange(len(words))
    return " ".join(words[start : start + rng.randint(1, 4)])


@dataclass
class Reader:
    """Decides the turns of one task with a given skill, as `Explorer` does in worlds."""

    task: Task
    phrase: str  # words of the question next to the blank
    tools: dict  # name -> tool
    rng: random.Random
    skill: float  # probability of a sensible move
    shown: str = ""  # the last result
    urls: list[str] = field(default_factory=list)  # of the last search

    def sensible_move(self) -> tuple[str, Call | str]:
        """Search for the page, look for the phrase, complete it."""
        answer = answer_of(self.task)
        if stands_in(answer, self.shown):
            return " ".join([*words_before(self.task)[-4:], answer]), answer
        title, [page] = self.task.meta["title"], self.task.evidence
        plan = f"{title}: {self.phrase}."
        if page in self.urls:
            return plan, browse(page, find=self.phrase)
        return plan, search_for(title)

    def random_move(self) -> tuple[str, Call | str]:
        """A valid move that follows no plan."""
        rng, question, roll = self.rng, self.task.question, self.rng.random()
        thought = rng.choice(["Let me look.", "Not sure.", f"{any_words(question, rng)}."])
        if self.shown and roll < 0.35:
            answer = any_words(self.shown, rng).split()[0]
            return f"{thought} {answer}", answer
        if self.urls and roll < 0.7:
            views = [{"page": rng.randint(1, 4)}] + 3 * [{"find": any_words(question, rng)}]
            return thought, browse(rng.choice(self.urls), **rng.choice(views))
        return thought, search_for(any_words(question, rng))

    def move(self, turn: int) -> tuple[str, Call | str]:
        return self.sensible_move() if self.rng.random() < self.skill else self.random_move()

    def run(self, call: Call) -> str:
        return result_of(call, self.tools)

    def see(self, call: Call, result: str) -> None:
        self.shown = result
        if call["name"] == "search":
            self.urls = urls_in(result)


def write_readings(
    chat: Chat,
    seed: int,
    tasks: list[Task],
    number: int,
    skilled_share: float,
    args: RolloutArgs,
    tools: tuple[Search, Browse],
) -> list[Row]:
    """Transcripts of readers; prints how often they were right.

    Args:
        seed: decides tasks and moves.
        tasks: what they are asked, in turn. Left out are those whose page is not found by its
            title, and those whose answer no phrase of the question shows: entries that stand above
            their description, mostly.
        number: how many transcripts to write.
        skilled_share: share of readers that behave sensibly.
        args: limits of the readers, as of the agent loop.
        tools: search and browse over the corpus.

    Raises:
        ValueError: a task is not of data/blanks.py, or no task is left.
    """
    needed = {"title", "entry", "before", "after"}
    if not all(
        len(task.evidence) == 1 and all(isinstance(task.meta.get(key), str) for key in needed)
        for task in tasks
    ):
        raise ValueError("readers know the tasks of data/tasks.py --corpus alone")
    rng, by_name = random.Random(f"readers-{seed}"), {tool.name: tool for tool in tools}
    readable: list[tuple[Task, list[str]]] = []  # with the phrases that show the answer
    for task in tqdm(tasks, "readers", unit="task", mininterval=5):
        [page], answer = task.evidence, answer_of(task)
        if "<" in task.question + answer:  # a tag could end a turn
            continue
        if page not in urls_in(result_of(search_for(task.meta["title"]), by_name)):
            continue
        views = {phrase: browse(page, find=phrase) for phrase in phrases_of(task)}
        leads = [p for p, view in views.items() if stands_in(answer, result_of(view, by_name))]
        if leads:
            readable.append((task, leads))
    if not readable:
        raise ValueError("readers find the answer to none of these tasks")
    rows, right = [], []
    for count in range(number):
        task, leads = readable[count % len(readable)]
        lead, skill = rng.choice(leads), draw_skill(rng, skilled_share)
        reader = Reader(task, lead, by_name, rng, skill)
        ids, mask, answer = explore(reader, task, chat, args)
        rows.append(row_of(ids, mask))
        right.append(answer is not None and bool(correct(answer, task.answer, task.answer_type)))
    length = np.mean([len(ids) for ids, _ in rows])
    print(
        f"readers were right on {np.mean(right):.1%} of {number} tries at {len(readable)} of "
        f"{len(tasks)} tasks; {length:.0f} tokens a transcript"
    )
    return rows
