"""trajectories.jsonl: all that is known of a trajectory, on one line of JSON.

train.py and `evaluate.py --trajectories` write such lines, and report.py shows them.
docs/metrics.md says what each key means.

In: finished trajectories. Out: dicts, and lines of JSON.
"""

import itertools
import json
import math

from context import Chat, Trajectory

RESULT_CHARS = 2000  # of a tool's result; the ids hold all that the policy saw of it
TEXT_CHARS = 20000  # of a turn of a served model
DIGITS = 4  # of times, log-probs and advantages


def record_of(t: Trajectory, chat: Chat | None) -> dict:
    """What was asked, said and done, whoever scores it.

    Args:
        chat: turns token ids into text; None where there are no ids.
    """
    texts = t.memory.get("texts", [])  # of a served model, which gives no ids
    if not texts:
        texts = [chat.decode(turn.action_ids) for turn in t.turns]
    turns = [
        {
            "text": text[:TEXT_CHARS],
            "version": turn.version,
            "began": round(turn.began, DIGITS),
            "generate_s": round(turn.generate_s, DIGITS),
            "tool_s": round(turn.tool_s, DIGITS),
            "calls": turn.calls,
            "results": [result[:RESULT_CHARS] for result in turn.results],
            "faults": turn.faults,
        }
        for turn, text in zip(t.turns, texts)
    ]
    segments = [
        {
            "ids": segment.ids,
            "turn_of": segment.turn_of,
            "logprobs": [round(logprob, DIGITS) or 0 for logprob in segment.logprobs],
        }
        for segment in t.segments
    ]
    asked = {"id": t.task.id, "family": t.task.family, "question": t.task.question}
    ended = {"truth": t.task.answer, "answer": t.answer, "status": t.status, "error": t.error}
    why = {"why": t.memory.get("why", ""), "pages": t.pages}
    return asked | ended | why | {"turns": turns, "segments": segments}


def without_texts(record: dict, canary: str | None) -> dict:
    """The record of a public benchmark's task, without what repeats its question or its answer."""
    turns = [turn | {"text": "", "calls": [], "results": []} for turn in record["turns"]]
    texts = {"canary": canary, "question": "", "truth": "", "answer": "", "why": ""}
    return record | texts | {"pages": [], "turns": turns, "segments": []}


def update_records(
    step: int, groups: list, rows: list, outcomes: list, kept: list, advantages: list, chat: Chat
) -> list[dict]:
    """The records of an update.

    Args:
        groups: `Group` objects that it trains on.
        rows: what the loss saw of them (`train.Row`): a token without an advantage is not in it.
        outcomes: the Reward of each trajectory of each group that the environment did not fail.
        kept: whether negative control kept it.
        advantages: of each of its turns.
    """
    by_token = {id(row.segment): row.advantages for row in rows}
    records, nothing = [], (None, False, itertools.repeat(0.0))
    for group, *scores in zip(groups, outcomes, kept, advantages):
        scored = zip(*scores)
        for index, t in enumerate(group.trajectories):
            is_sound = t.status != "tool_fault"
            reward, is_kept, by_turn = next(scored) if is_sound else nothing
            record = {"step": step, "group": group.position, "index": index} | record_of(t, chat)
            trained = {
                number
                for segment in t.segments
                for number, advantage in zip(segment.turn_of, by_token.get(id(segment), ()))
                if advantage
            }
            for number, (turn, advantage) in enumerate(zip(record["turns"], by_turn)):
                turn |= {"advantage": round(advantage, DIGITS), "in_loss": number in trained}
            record["kept"] = is_kept
            record["correct"] = reward.correct if reward else None
            record["reward"] = reward.total if reward else None
            record["reward_parts"] = reward.parts if reward else {}
            records.append(record)
    return records


def is_written(step: int, steps: int, most: int) -> bool:
    """Whether the trajectories of update `step` are written: those of every k-th update and of the
    last one, so that at most `most` of `steps` updates are.
    """
    return most > 0 and (steps - step) % math.ceil(steps / most) == 0


def to_lines(records: list[dict]) -> list[str]:
    return [json.dumps(record, separators=(",", ":")) + "\n" for record in records]
