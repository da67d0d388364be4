"""What a score is compared with: answers without an agent, and agents with weakened tools.

In: a trajectory that has not begun, or a toolbox. Out: the trajectory with an answer, or a toolbox
that does less.
"""

import copy
import functools
import re
from typing import Literal

import torch

from context import Chat, Trajectory
from data.index import random_pages
from support.toolbox import Toolbox
from tools import ToolCall, run_calls

Baseline = Literal["none", "closed_book", "top_snippet", "snippet_reader"]
CLOSED_BOOK_TOKENS = 12


def closed_book(trajectory: Trajectory, model, chat: Chat) -> None:
    """The model's greedy answer at once, without tools: what it knows by heart."""
    ids = chat.head(trajectory.task.question) + chat.trusted("<answer>")
    prompt, stop = len(ids), chat.trusted("</answer>")[0]
    with torch.no_grad():
        while len(ids) < prompt + CLOSED_BOOK_TOKENS and ids[-1] != stop:
            inputs = torch.tensor([ids], device=model.device)
            ids.append(int(model(input_ids=inputs, use_cache=False).logits[0, -1].argmax()))
    trajectory.answer = chat.decode(ids[prompt:]).split("<")[0].strip()
    trajectory.status = "answered"


def read_snippet(trajectory: Trajectory, toolbox: Toolbox, nearest: bool) -> None:
    """Search the question once and copy a value from the top hit's snippet.

    Args:
        nearest: take the fact whose words are nearest to the question, not the first one.
    """
    call = ToolCall("search", {"queries": [trajectory.task.question]})
    [(text, is_fault)] = run_calls([call], toolbox.tools_for(trajectory))
    toolbox.close(trajectory)
    lines = text.splitlines()
    facts = re.findall(r"([^.]*?) is (\w+)\.", lines[1]) if len(lines) > 1 else []
    facts = [(subject, value) for subject, value in facts if value not in ("a", "an")]
    words = set(re.findall(r"\w+", trajectory.task.question.casefold()))
    if nearest:
        facts.sort(key=lambda fact: -len(words & set(re.findall(r"\w+", fact[0].casefold()))))
    trajectory.status = "tool_fault" if is_fault else "answered"
    trajectory.answer = facts[0][1] if facts else ""


class TakenAway:
    """A tool that is not there. The prompt still names it, and a well-formed call of it is no
    format error: a policy that is used to one prompt would be thrown by another one, and the loss
    would measure that instead of the tool."""

    def __init__(self, tool):
        self.name, self.signature, self.check = tool.name, tool.signature, tool.check

    def __call__(self, **arguments) -> str:
        return f"error: {self.name} is not available"


def play_baseline(name: Baseline, trajectory: Trajectory, toolbox: Toolbox, model, chat) -> None:
    """Answer a task as the baseline of this name does; only closed_book needs the model."""
    if name == "closed_book":
        closed_book(trajectory, model, chat)
    else:
        read_snippet(trajectory, toolbox, nearest=name == "snippet_reader")


def weaken(toolbox: Toolbox, without: list[str], retriever: str, seed: int) -> None:
    """Take tools away from a toolbox, or make its search engine worthless: what a policy loses then
    is what it owed to them.

    Args:
        without: names of the tools to take away.
        retriever: "bm25" changes nothing; "random" shows pages drawn at random from the index, the
            same ones for the same query and seed; "empty" never finds anything.
    """
    tools_for = toolbox.tools_for

    def weaker_tools_for(trajectory: Trajectory) -> dict:
        tools = tools_for(trajectory)
        search = tools["search"] = copy.copy(tools["search"])
        if retriever == "random":
            search.index = copy.copy(search.index)
            search.index.look_up = functools.partial(random_pages, seed=seed)
        elif retriever == "empty":
            search.find = lambda queries: [[] for _ in queries]
        return {name: TakenAway(tool) if name in without else tool for name, tool in tools.items()}

    toolbox.tools_for = weaker_tools_for
