"""The HTML page of report.py: data in, one file out. report.html beside this file draws it.

All words that the page shows of a trajectory are chosen here. Trajectories are compressed update by
update, and the page unpacks an update when it is looked at. In: lines of trajectories.jsonl, panels
and tables. Out: a file that works without a network.
"""

import base64
import itertools
import json
import re
import statistics
import zlib
from bisect import bisect_left
from pathlib import Path

from support.run_folder import replace_text

TEMPLATE = Path(__file__).with_name("report.html")
PART = re.compile(r"<(think|tool_call|answer)>.*?(?:</\1>|$)", re.DOTALL)
END_OF_TURN = re.compile(r"\s*(<[^<>]*>)?\s*")  # such a rest of a turn is no part of its own


class Pieces:
    """The texts of token ids, as the page's list `pieces`; a token is a place in that list.

    Args:
        tokenizer: a `tokenizers.Tokenizer`, or None: then there are no tokens to show.
    """

    def __init__(self, tokenizer):
        self.tokenizer, self.texts, self.place = tokenizer, [""], {"": 0}
        self.of_id: dict[int, int] = {}
        self.broken: set[int] = set()  # ids that hold a part of a character
        if tokenizer:
            self.anchor = tokenizer.encode("a", add_special_tokens=False).ids[-1:]
            self.before = len(tokenizer.decode(self.anchor, skip_special_tokens=False))

    def decode(self, ids: list[int]) -> str:
        """Text of ids in the middle of a text, where no tokenizer strips a blank."""
        return self.tokenizer.decode(self.anchor + ids, skip_special_tokens=False)[self.before :]

    def place_of(self, text: str) -> int:
        if text not in self.place:
            self.place[text] = len(self.texts)
            self.texts.append(text)
        return self.place[text]

    def places(self, ids: list[int]) -> list[int]:
        """One place an id. Tokens that share a character are decoded together: its text stands at
        the first of them.
        """
        for id in set(ids).difference(self.of_id):
            text = self.decode([id])
            self.of_id[id] = self.place_of(text)
            if "\ufffd" in text:
                self.broken.add(id)
        result = [self.of_id[id] for id in ids]
        if self.broken.isdisjoint(ids):
            return result
        at = 0
        for is_broken, run in itertools.groupby(ids, key=self.broken.__contains__):
            run = list(run)
            if is_broken:
                whole = self.place_of(self.decode(run))
                result[at : at + len(run)] = [whole] + [0] * (len(run) - 1)
            at += len(run)
        return result


def parts_of(texts: list[str]) -> list[tuple[str, int, int]]:
    """The thoughts, calls and answers of a turn, and what stands between them.

    Args:
        texts: of its tokens.

    Returns:
        (kind, first token, token behind the last) of each; a token belongs to where it begins.
    """
    whole, starts = "".join(texts), [0, *itertools.accumulate(map(len, texts))]
    parts, end = [], 0
    for found in PART.finditer(whole):
        kind = found[1].removeprefix("tool_")
        parts += [("", end, found.start()), (kind, found.start(), found.end())]
        end = found.end()
    if parts and END_OF_TURN.fullmatch(whole[end:]):
        parts[-1] = (*parts[-1][:2], len(whole))
    else:
        parts.append(("", end, len(whole)))
    tokens = [(kind, bisect_left(starts, a), bisect_left(starts, b)) for kind, a, b in parts]
    return [(kind, first, last) for kind, first, last in tokens if first < last]


def number(value: float | None, digits: int = 2) -> str:
    return "none" if value is None else f"{value:+.{digits}f}".replace("-", "\u2212")


def show_turn(turn: dict, following: dict | None) -> None:
    """Add the words that head a turn, and name its results."""
    facts = []
    if turn["version"] >= 0:  # a served model's weights have no number, and nobody has timed it
        facts += [f"weights {turn['version']}", f"decode {turn['generate_s']:.2f} s"]
        facts += [f"tools {turn['tool_s']:.2f} s"] if turn["calls"] else []
    if following and following["version"] != turn["version"]:
        parked = following["began"] - turn["began"] - turn["generate_s"] - turn["tool_s"]
        facts += (
            [f"parked {parked:.2f} s"] if parked >= 0 else []
        )  # the clock begins anew at a boot
    if "advantage" in turn:
        facts.append(f"advantage {number(turn['advantage'], 3)}")
        facts += [] if turn["in_loss"] else ["not in the loss"]
    turn["facts"] = facts
    names = [f"result of {call['name']}" for call in turn.pop("calls")]
    turn["results"] = list(zip(names, turn["results"]))


def show_record(record: dict, spread: float, about_group: str, pieces: Pieces) -> None:
    """Add to a record what the page shows of it; ids become places in `pieces`."""
    reward = record.setdefault("reward", record.get("score"))
    facts = [f"attempt {record['index'] + 1}", f"reward {number(reward)}"]
    facts += [f"{name} {number(part)}" for name, part in record.get("reward_parts", {}).items()]
    if record.get("kept") is False:
        facts.append("failed by the environment" if reward is None else "dropped as a negative")
    ended = [record[key] for key in ("status", "error", "why") if record[key]]
    record |= {"facts": facts, "spread": spread, "about": about_group}
    record["ended"] = "" if record["status"] == "answered" else ": ".join(ended)
    record["name"] = f"{record['group']}.{record['index']}"
    record["right"] = (record.get("correct") or record.get("score") or 0) > 0
    if not pieces.tokenizer:
        record["segments"] = []
    for segment in record["segments"]:
        segment["tokens"] = pieces.places(segment.pop("ids"))
    turns = record["turns"]
    said: dict[int, list] = {}  # turn -> (place in pieces, log-prob) of each of its tokens
    for segment in record["segments"]:
        of_tokens = (segment["tokens"], segment["turn_of"], segment["logprobs"])
        for place, by, logprob in zip(*of_tokens):
            said.setdefault(by, []).append((place, logprob))
    for n, (turn, following) in enumerate(itertools.zip_longest(turns, turns[1:])):
        show_turn(turn, following)
        tokens = said.get(n) or [(pieces.place_of(turn["text"]), None)]
        parts = parts_of([pieces.texts[place] for place, _ in tokens])
        turn["parts"] = [(kind, tokens[first:last]) for kind, first, last in parts]


def to_json(data) -> str:
    """Compact JSON that every browser reads: NaN and infinities become null."""
    try:
        return json.dumps(data, separators=(",", ":"), allow_nan=False)
    except ValueError:
        return to_json(json.loads(json.dumps(data), parse_constant=lambda name: None))


def pack(records: list[dict], pieces: Pieces) -> str:
    """The trajectories of an update, as the page unpacks them: JSON, deflated, in base 64."""
    for _, group in itertools.groupby(records, key=lambda record: record["group"]):
        group = list(group)
        rewards = [record.get("reward", record.get("score")) for record in group]
        rewards = [reward for reward in rewards if reward is not None] or [0.0]
        right = sum((record.get("correct") or record.get("score") or 0) > 0 for record in group)
        spread = statistics.pvariance(rewards)
        words = f"{group[0]['family']} · {right} of {len(group)} correct · variance {spread:.2f}"
        for record in group:
            show_record(record, spread, words, pieces)
    text = to_json(records)
    return base64.b64encode(zlib.compress(text.encode(), 6)).decode()


def write_page(path: str | Path, data: dict) -> None:
    """Write the page; it appears whole or not at all.

    Args:
        data: what report.html reads: title, runs, panels and tables.
    """
    # ASCII without "<": no text can end the script element that holds it.
    text = to_json(data).replace("<", "\\u003c")
    page = TEMPLATE.read_text(encoding="utf-8").replace("DATA_OF_THE_RUNS", text, 1)
    replace_text(Path(path), page)
