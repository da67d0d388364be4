"""A task: one question with its answer, and the file it stands in.

In: a file of JSON lines. Out: `Task` objects, or one line that says what is wrong and where. This file imports nothing of the
project, so everything else may import it.
"""

import hashlib
import json
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np


@dataclass
class Task:
    """One question. A user's own file needs only `question` and `answer` on each line."""

    id: str
    question: str
    answer: str | list[str]
    answer_type: str = "name"  # name, number, date or list: decides how reward.correct compares
    family: str = "own"
    split: str = "own"
    hops: int = 0  # pages on the way; for a family of data/families.py its level, 1 to 3
    evidence: list[str] = field(default_factory=list)  # URLs of the pages that hold the answer
    meta: dict = field(default_factory=dict)  # "world": arguments of the World it was made from


def parse_task(line: str) -> Task:
    """One line of a task file.

    Raises:
        ValueError: what is wrong with it.
    """
    try:
        record = json.loads(line)
    except ValueError as error:
        raise ValueError(f"not valid JSON ({error})") from None
    if not isinstance(record, dict):
        raise ValueError(f"a task is a JSON object, not {type(record).__name__}")
    for key in ("question", "answer"):
        if not record.get(key):
            raise ValueError(f"the task has no {key!r}")
    answers = record["answer"] if isinstance(record["answer"], list) else [record["answer"]]
    if not isinstance(record["question"], str) or not all(
        isinstance(answer, str) and answer.strip() for answer in answers
    ):
        raise ValueError(
            "'question' must be a string, 'answer' a string or a list of strings (\"42\", not 42)"
        )
    if record.get("answer_type", "name") not in ("name", "number", "date", "list"):
        raise ValueError(f"'answer_type' {record['answer_type']!r}: use name, number, date or list")
    for key, kind in (
        ("id", str),
        ("family", str),
        ("split", str),
        ("hops", int),
        ("evidence", list),
        ("meta", dict),
    ):
        if key in record and not isinstance(record[key], kind):
            raise ValueError(
                f"{key!r} must be of type {kind.__name__}, not {type(record[key]).__name__}"
            )
    record.setdefault(
        "id", hashlib.sha256(record["question"].encode("utf-8", "replace")).hexdigest()[:12]
    )
    return Task(**{key: value for key, value in record.items() if key in Task.__dataclass_fields__})


def load_tasks(path: Path | str) -> list[Task]:
    """Read a task file.

    Raises:
        FileNotFoundError, ValueError: one line that names the file, the line number and what is wrong with it.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"no task file {path}")
    tasks, seen = [], set()
    with open(path, "rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                task = parse_task(line.decode("utf-8-sig"))
                if task.id in seen:
                    raise ValueError(
                        f"the id {task.id!r} was used on an earlier line (without an id, the question stands for it)"
                    )
            except ValueError as error:
                raise ValueError(f"{path}:{number}: {error}") from None
            seen.add(task.id)
            tasks.append(task)
    if not tasks:
        raise ValueError(f"{path}: no tasks in it")
    return tasks


def save_tasks(tasks: list[Task], path: Path | str) -> None:
    Path(path).write_text(
        "".join(json.dumps(asdict(task)) + "\n" for task in tasks), encoding="utf-8"
    )


def task_at(tasks: list[Task], position: int, seed: int) -> Task:
    """The stream of training tasks, from position 0 on. Each epoch is a new permutation, which
    follows from the seed, so a resumed run draws the same tasks.
    """
    epoch, index = divmod(position, len(tasks))
    order = np.random.default_rng([seed, epoch]).permutation(len(tasks))
    return tasks[order[index]]
