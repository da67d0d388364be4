"""A task: one question with its answer, and the file it stands in.

In: a file of JSON lines. Out: `Task` objects, or one line that says what is wrong and where. This
file imports nothing of the project, so everything else may import it. To try an idea, add a field
to `Task` and its type to `FIELD_TYPES`.
"""

import hashlib
import json
import re
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal, get_args

import numpy as np

Split = Literal["pretrain", "train", "dev", "test"]
Kind = Literal["plain", "deep"]
Style = Literal["single", "varied", "unseen-hosts", "unseen-layouts"]
STYLES = get_args(Style)  # of a world's addresses and layouts, see data/world.py
SPLITS = get_args(Split)  # worlds of different splits share no name, whatever their seeds
DEFAULTS = {"kind": "plain", "style": "single", "hosts": []}  # what a world's arguments may omit
HOST = r"[a-z0-9]([a-z0-9-]*[a-z0-9])?(\.[a-z0-9]([a-z0-9-]*[a-z0-9])?)+(/[\w-][\w.-]*)*"
MAX_ENTITIES = 1_000_000  # a larger world would run out of names
ANSWER_TYPES = ("name", "number", "date", "list")
FIELD_TYPES = {"id": str, "family": str, "split": str, "hops": int, "evidence": list, "meta": dict}


@dataclass
class Task:
    """One question. A user's own file needs only `question` and `answer` on each line."""

    id: str
    question: str
    answer: str | list[str]
    answer_type: str = "name"  # one of ANSWER_TYPES; it decides how reward.correct compares
    family: str = "own"
    split: str = "own"
    hops: int = 0  # pages on the way; for a family of data/deep/families.py its level, 1 to 3
    evidence: list[str] = field(default_factory=list)  # URLs of the pages that hold the answer
    meta: dict = field(default_factory=dict)  # "world": arguments of the World it was made from


def check_world(world) -> None:
    """Whether these are arguments of a World (data/world.py).

    Raises:
        ValueError: what is wrong with them.
    """
    if not isinstance(world, dict) or not {"seed", "entities", "split"} <= set(world):
        raise ValueError("a world is an object with seed, entities and split")
    if unknown := set(world) - {"seed", "entities", "split", *DEFAULTS}:
        raise ValueError(f"a world has no {min(unknown)!r}")
    seed, entities, split = world["seed"], world["entities"], world["split"]
    kind, style, hosts = ((DEFAULTS | world)[key] for key in DEFAULTS)
    if type(seed) is not int or abs(seed) >= 10**18:
        raise ValueError("the seed of a world is an integer of at most 18 digits")
    if type(entities) is not int or entities > MAX_ENTITIES:
        raise ValueError(f"'entities' of a world is an integer of at most {MAX_ENTITIES}")
    if split not in SPLITS:
        raise ValueError(f"unknown split {split!r}; choose from {', '.join(SPLITS)}")
    for key, value, choices in (("kind", kind, get_args(Kind)), ("style", style, STYLES)):
        if value not in choices:
            raise ValueError(f"unknown {key} {value!r} of world; choose from {', '.join(choices)}")
    for host in hosts if isinstance(hosts, list) else [hosts]:
        if not isinstance(host, str) or len(host) > 200 or not re.fullmatch(HOST, host, re.ASCII):
            raise ValueError(f"{host!r} is no host such as kor.test or kor.test/maps")
    least = 300 if kind == "deep" else 20  # a deep world needs them for its catalogues
    if entities < least:
        raise ValueError(f"a {kind} world needs at least {least} entities, not {entities}")


def too_deep(value, levels: int = 50) -> bool:
    """Whether JSON is nested deeper than this. Copying a much deeper task would fail later."""
    inside = value.values() if isinstance(value, dict) else value
    inside = inside if isinstance(value, (dict, list)) else ()
    return levels == 0 or any(too_deep(each, levels - 1) for each in inside)


def check_task(record: dict) -> None:
    """Whether these are fields of a Task.

    Raises:
        ValueError: what is wrong with them.
    """
    if too_deep(record):
        raise ValueError("not valid JSON (nested too deeply)")
    for key in ("question", "answer"):
        if not record.get(key):
            raise ValueError(f"the task has no {key!r}")
    answers = record["answer"] if isinstance(record["answer"], list) else [record["answer"]]
    texts = [record["question"], *answers]
    if not all(isinstance(text, str) and text.strip() for text in texts):
        raise ValueError(
            "'question' must be a string, 'answer' a string or a list of strings (\"42\", not 42)"
        )
    if record.get("answer_type", "name") not in ANSWER_TYPES:
        raise ValueError(f"'answer_type' {record['answer_type']!r}: use {', '.join(ANSWER_TYPES)}")
    for key, kind in FIELD_TYPES.items():
        if key in record and not isinstance(record[key], kind):
            found = type(record[key]).__name__
            raise ValueError(f"{key!r} must be of type {kind.__name__}, not {found}")
    if not all(isinstance(url, str) for url in record.get("evidence", [])):
        raise ValueError("'evidence' must be a list of strings")
    meta = record.get("meta", {})
    if not isinstance(meta.get("template", ""), str):
        raise ValueError("'template' in 'meta' must be a string")
    for text in (record.get("id", ""), record.get("family", ""), meta.get("template", "")):
        if text != text.encode("utf-8", "replace").decode("utf-8"):
            raise ValueError(f"{text!r} is no text that can be written")
    if "world" in meta:
        check_world(meta["world"])


def parse_object(line: bytes, errors: str = "strict") -> dict:
    """The JSON object of one line, in UTF-8 with or without a byte order mark.

    Args:
        errors: what becomes of bytes that are no UTF-8, as bytes.decode takes it.

    Raises:
        ValueError: what is wrong with it.
    """
    try:
        record = json.loads(line.decode("utf-8-sig", errors))
    except ValueError as error:
        raise ValueError(f"not valid JSON ({error})") from None
    except RecursionError:
        raise ValueError("not valid JSON (nested too deeply)") from None
    if not isinstance(record, dict):
        raise ValueError(f"a JSON object is needed, not {type(record).__name__}")
    return record


def parse_task(line: bytes) -> Task:
    """One line of a task file.

    Raises:
        ValueError: what is wrong with it.
    """
    record = parse_object(line)
    check_task(record)
    question_hash = hashlib.sha256(record["question"].encode("utf-8", "replace")).hexdigest()
    record.setdefault("id", question_hash[:12])
    return Task(**{key: value for key, value in record.items() if key in Task.__dataclass_fields__})


def parse_tasks(path: Path | str):
    """Each line of a task file that is not blank: its number, its bytes, and a Task or ValueError.

    Raises:
        FileNotFoundError: there is no such file.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"no task file {path}")
    seen = set()
    with open(path, "rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                task = parse_task(line)
                if task.id in seen:
                    raise ValueError(
                        f"the id {task.id!r} was used on an earlier line "
                        "(without an id, the question stands for it)"
                    )
                seen.add(task.id)
                yield number, line, task
            except ValueError as error:
                yield number, line, error


def load_tasks(path: Path | str, most: int | None = None) -> list[Task]:
    """Read a task file.

    Args:
        most: how many of its first tasks are given; with 0 the file is not read.

    Raises:
        FileNotFoundError, ValueError: one line that names the file, the line number and what is
            wrong with it.
    """
    if most == 0:
        return []
    tasks = []
    for number, _, task in parse_tasks(path):
        if isinstance(task, ValueError):
            raise ValueError(f"{path}:{number}: {task}") from None
        tasks.append(task)
    if not tasks:
        raise ValueError(f"{path}: no tasks in it")
    return tasks[:most]


def save_tasks(tasks: list[Task], path: Path | str) -> None:
    """Write a task file."""
    save_lines([asdict(task) for task in tasks], path)


def save_lines(records: list[dict], path: Path | str) -> None:
    """Write one JSON object a line."""
    lines = [json.dumps(record) + "\n" for record in records]
    Path(path).write_text("".join(lines), encoding="utf-8")


def task_at(tasks: list[Task], position: int, seed: int) -> Task:
    """The stream of training tasks, from position 0 on. Each epoch is a new permutation, which
    follows from the seed, so a resumed run draws the same tasks.
    """
    epoch, index = divmod(position, len(tasks))
    order = np.random.default_rng([seed, epoch]).permutation(len(tasks))
    return tasks[order[index]]
