"""Public benchmarks in the files that their authors publish: BrowseComp, SimpleQA, FRAMES,
xbench-DeepSearch, HLE and GAIA.

In: a .csv, .tsv or .parquet file. Out: tasks. To add a benchmark, add a line to BENCHMARKS.
"""

import base64
import csv
import hashlib
import re
import string
import unicodedata
from pathlib import Path

from data.task import Task

SUFFIXES = (".csv", ".tsv", ".parquet")
# name, column of the question, column of the answer, other columns that tell the benchmark, and the
# column of a file or a picture: a question that comes with one is left out, since no tool reads it.
BENCHMARKS = [
    ("encoded", "problem", "answer", {"canary"}, ""),  # BrowseComp or xbench, see decode_rows
    ("encoded", "prompt", "answer", {"canary"}, ""),
    ("hle", "question", "answer", {"answer_type", "image", "canary"}, "image"),  # in plain text
    ("frames", "Prompt", "Answer", {"reasoning_types"}, ""),
    ("gaia", "Question", "Final answer", {"task_id"}, "file_name"),
    ("simpleqa", "problem", "answer", {"metadata"}, ""),
]
# The key of a row, from its canary.
KEYS = {
    "browsecomp": lambda canary: hashlib.sha256(canary.encode()).digest(),
    "xbench": lambda canary: canary.encode(),
}


def decode_text(text: str, key: bytes) -> str:
    """The text behind base64 and XOR; ValueError if what comes out is not printable text."""
    data = base64.b64decode(text, validate=True)
    decoded = bytes(byte ^ key[i % len(key)] for i, byte in enumerate(data)).decode("utf-8")
    unprintable = ("Cc", "Cn", "Co", "Cs")
    if any(unicodedata.category(c) in unprintable and c not in "\r\n\t" for c in decoded):
        raise ValueError("not text")
    return decoded


def decode_rows(rows: list[dict], columns: tuple[str, str], path: Path) -> tuple[str, list[dict]]:
    """Undo a benchmark's protection against crawlers; (its name, the rows in plain text).

    The key that gives printable text in every row is the right one; anything else is refused rather
    than guessed. The decoded text stays in memory.
    """
    fitting = []
    for name, key_of in KEYS.items():
        try:
            decoded = [
                row
                | {column: decode_text(row[column], key_of(row["canary"])) for column in columns}
                for row in rows
            ]
        except (ValueError, ZeroDivisionError, AttributeError, TypeError):
            continue
        fitting.append((name, decoded))
    if len(fitting) != 1:
        count = "more than one" if fitting else "no"
        raise ValueError(
            f"{path}: the questions are encoded, and {count} known key makes text of every row"
        )
    return fitting[0]


def read_rows(path: Path) -> list[dict]:
    """The rows of a table file as dicts; raises FileNotFoundError or ValueError, one line."""
    if not path.is_file():
        raise FileNotFoundError(f"no task file {path}")
    if path.suffix == ".parquet":
        try:
            import pyarrow.parquet
        except ImportError:
            raise ValueError(f"{path}: reading parquet needs `pip install pyarrow`") from None
        return pyarrow.parquet.read_table(path).to_pylist()
    csv.field_size_limit(2**31 - 1)
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            return list(csv.DictReader(file, delimiter="\t" if path.suffix == ".tsv" else ","))
    except (csv.Error, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: {error}") from None


def load_benchmark(path: Path | str) -> list[Task]:
    """Questions of a public benchmark; its column names tell which one it is.

    Raises:
        FileNotFoundError, ValueError: no file, an unknown header or unreadable rows; one line.
    """
    path = Path(path)
    rows = read_rows(path)
    header = set(rows[0]) if rows else set()
    fitting = [entry for entry in BENCHMARKS if {entry[1], entry[2]} | entry[3] <= header]
    if not fitting:
        columns = ", ".join(sorted(map(str, header))) or "(none)"
        raise ValueError(
            f"{path}: no known benchmark has the columns {columns}; "
            "a file of your own is JSON lines"
        )
    name, question, answer, _, attachment = fitting[0]
    if name == "encoded":
        name, rows = decode_rows(rows, (question, answer), path)
    if attachment:
        rows = [row for row in rows if not row.get(attachment)]
    if not rows:
        raise ValueError(f"{path}: no question in it can be read without its file or picture")
    tasks = {}
    for number, row in enumerate(rows, start=1):
        try:
            task = parse_row(row, f"{name}-{number}", name, row[question], row[answer])
            if task.id in tasks:
                raise ValueError(f"the id {task.id!r} was used before")
        except ValueError as error:
            raise ValueError(f"{path}: row {number}: {error}") from None
        tasks[task.id] = task
    return list(tasks.values())


def parse_row(row: dict, default_id: str, name: str, question: str, answer: str) -> Task:
    """One row of the benchmark of this name; raises ValueError if nobody can answer it."""
    told = all(isinstance(text, str) and text.strip() for text in (question, answer))
    if not told or (name == "gaia" and answer == "?"):
        raise ValueError("it has no question or no public answer")
    meta = {"canary": row["canary"]} if row.get("canary") else {}
    if topic := re.search("'topic': '([^']*)'", str(row.get("metadata"))):
        meta["topic"] = topic[1]
    return Task(
        id=str(row.get("id") or row.get("task_id") or default_id),
        question=question.strip(),
        answer=answer.strip(),
        answer_type="gaia" if name == "gaia" else "name",
        family=f"{name}-{row['Level']}" if row.get("Level") else name,
        split="public",
        meta=meta,
    )


def gaia_correct(answer: str, truth: str) -> float:
    """GAIA's rule: a number is compared without $ % and commas, a list item by item, and other text
    without spaces, case and punctuation."""
    items, wanted = re.split(r"[,;]", answer), re.split(r"[,;]", truth)
    if len(wanted) == 1:
        return float(gaia_same(answer, truth))
    pairs = zip(items, wanted)
    same = all(gaia_same(item, truth, string.punctuation) for item, truth in pairs)
    return float(same and len(items) == len(wanted))


def gaia_same(answer: str, truth: str, keep: str = "") -> bool:
    """Whether two items are the same; `keep` holds the punctuation that counts."""
    try:
        number = float(truth)
    except ValueError:
        dropped = set(string.punctuation) - set(keep)
        told = lambda text: [c for c in text.casefold() if not c.isspace() and c not in dropped]
        return told(answer) == told(truth)
    try:
        return float(re.sub(r"[$%,]", "", answer)) == number
    except ValueError:
        return False
