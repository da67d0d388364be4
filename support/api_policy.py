"""A policy behind an OpenAI-style endpoint: the agent loop with messages in the place of token ids.

In: a fresh trajectory, the endpoint, the tools. Out: the finished trajectory, without ids. The
server turns our texts into tokens, so text from outside must not hold what it could take for a
control token: see `defuse`.
"""

import copy
import re

from context import SYSTEM_PROMPT, Trajectory, Turn
from rollout import RolloutArgs, take_results
from support.endpoint import ask
from support.threads import in_thread
from support.toolbox import Toolbox
from tools import FormatError, parse_action, run_calls, signatures

# The start of a tag: <tool_call>, </think>, <|im_end|>, <｜User｜>, <<SYS>>, [/INST], [|user|].
TAG_START = re.compile(r"<(?=/?[A-Za-z_]|[|｜])|\[(?=\||/?[a-z]?[A-Z_]+\])")


def defuse(text: str) -> str:
    """Text from outside with a zero-width space inside each tag: the server does not see the tag,
    nor does our parser when the policy quotes it. `Chat.decode` breaks quoted tags the same way."""
    return TAG_START.sub(lambda start: start.group() + "\u200b", text)


def api_rollout(
    trajectory: Trajectory, url: str, model: str, toolbox: Toolbox, args: RolloutArgs
) -> Trajectory:
    """Play a trajectory to its end: the same prompt and tools as for a local policy, and as many
    turns, tokens a turn and seconds for its tools.

    The window in tokens is the server's own, and no time is measured. A request that fails for good
    ends the trajectory as `tool_fault`, with the reason in `error`: it counts as wrong, and is
    counted.
    """
    system = SYSTEM_PROMPT.format(signatures="; ".join(signatures()))
    messages = [
        {"role": "system", "content": system},
        {"role": "user", "content": defuse(trajectory.task.question)},
    ]
    sampling = {"temperature": args.temperature, "max_tokens": args.max_new_tokens}
    tools = toolbox.tools_for(trajectory)
    while trajectory.status == "running":
        if len(trajectory.turns) == args.max_turns:
            trajectory.status = "over_turns"
            break
        try:
            text = ask(url, {"model": model, "messages": messages} | sampling)
        except ValueError as error:
            trajectory.status, trajectory.error = "tool_fault", f"server: {error}"[:200]
            break
        trajectory.memory.setdefault("texts", []).append(text)
        turn = Turn([], [], version=-1)
        trajectory.turns.append(turn)
        try:
            # Where the server's template opens a thought, its answer begins in the middle of it.
            opened = "<think>" if "</think>" in text.partition("<think>")[0] else ""
            calls, answer = parse_action(opened + text, tools)
        except FormatError as error:
            trajectory.status, trajectory.error = "format_error", error.kind
            trajectory.memory["why"] = str(error)
            break
        if answer is not None:
            trajectory.status, trajectory.answer = "answered", answer
            break
        turn.calls = [{"name": call.name, "arguments": call.arguments} for call in calls]
        memory = copy.deepcopy(trajectory.memory)
        try:
            results = in_thread(run_calls, calls, tools).result(args.tool_timeout_s)
        except TimeoutError:
            trajectory.memory = memory  # late calls write to the old dict
            tools = toolbox.tools_for(trajectory)
            results = [(f"error: no answer within {args.tool_timeout_s:g} s", True)] * len(calls)
        take_results(trajectory, results)
        observation = "".join(
            f"<tool_response>{defuse(result)}</tool_response>" for result in turn.results
        )
        messages.append({"role": "assistant", "content": text})
        messages.append({"role": "user", "content": observation})
    toolbox.close(trajectory)
    return trajectory
