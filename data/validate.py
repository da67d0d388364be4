"""The funnel: which tasks are worth asking. Each stage looks at what the stages before it let through.

    schema     fields and types are right, and the answer scores 1 under its own answer type
    solver     the second solver (data/solve.py) finds the answer on the pages; our own families must be solvable by it
    unique     it finds no other: candidates are sought in the whole world, ties and equally short ways are seen
    reach      every evidence page can be found by the search tool or by a link from one that can
    leak       the answer stands in no question, URL, title or task id
    snippet    a browse fact shows in no search snippet, a lookup fact does
    guess      no yes or no, no tiny number, no answer that its template nearly always has
    tools      closed book, mental arithmetic, one search, and copying instead of computing all fail
    repeat     the same question again
    near       the same question in other words: the same answer, names and numbers, and mostly the same other words
    pass@n     with --model: a task that the named policy never or always solves in --pass_n attempts (slow)

In: a task file, a user's own too. Out: the good ones, and the rejects with stage and reason. Without --world the stages that
need pages (reach, snippet, parts of solver, unique and tools) are left out. To try an idea, write `stage(task, funnel) ->
reason or None` and put it into STAGES.

    python data/validate.py --tasks in.jsonl --world DIR --out good.jsonl --rejects rejects.jsonl
"""

import argparse
import functools
import json
import re
import sys
from collections import Counter, defaultdict
from dataclasses import asdict
from pathlib import Path
from urllib.parse import unquote, urlsplit

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from data.deep.solve import parse_question, solutions
from data.index import open_index
from data.task import Task, parse_task, save_tasks
from data.tasks import FRAMES
from reward import correct
from support.answers import normalize, parse_date, parse_number
from tools import Toolbox

PAGELESS = {"math", "code"}  # solved without pages
OURS = {
    "lookup",
    "browse",
    "multihop",
    "collection",
    "conflict",
    "compute",
    "logic",
    "algorithmic",
} | PAGELESS  # the second solver must solve them
EVERYDAY = "a an and are as at be by did do does for from given has have how in is it its of on or s that the their there this to was were what when where which who will with you your"
# What a question has besides its content: everyday words and those of the question frames.
STOP_WORDS = set(EVERYDAY.split()) | {
    w
    for frames in FRAMES.values()
    for frame in frames
    for w in re.findall(r"[a-z]+", frame.replace("{np}", "").lower())
}


def items(answer: str | list[str]) -> list[str]:
    return answer if isinstance(answer, list) else [answer]


def stands_in(answer: str | list[str], text: str) -> bool:
    """Whether a text gives the answer away: all items of it as whole words, where letters and digits bound each other."""
    return all(
        re.search(rf"(?<![^\W_]){re.escape(item)}(?![^\W_])", text, re.IGNORECASE)
        for item in items(answer)
    )


# -------------------------------------------------------------------------------------------------------------- stages


def schema(task: Task, funnel) -> str | None:
    if not isinstance(task.answer, (str, list)) or not all(
        isinstance(item, str) and item.strip() for item in items(task.answer)
    ):
        return "the answer is no text or list of texts"
    if task.answer_type not in ("name", "number", "date", "list"):
        return f"unknown answer type {task.answer_type!r}"
    if not isinstance(task.evidence, list) or not all(
        urlsplit(str(url)).scheme in ("http", "https") for url in task.evidence
    ):
        return "evidence is no list of http addresses"
    readable = {"number": parse_number, "date": parse_date}.get(task.answer_type, str)
    if not all(readable(item) for item in items(task.answer)):
        return f"the answer cannot be read as a {task.answer_type}"
    said = ", ".join(items(task.answer)) if task.answer_type == "list" else items(task.answer)[0]
    if correct(said, task.answer, task.answer_type) != 1.0:
        return f"the answer is no {task.answer_type}: it would not score against itself"
    return None


def solver(task: Task, funnel) -> str | None:
    found = funnel.solutions(task.question)
    if not found:
        return (
            "the second solver finds no answer"
            if task.family in OURS and (funnel.index or task.family in PAGELESS)
            else None
        )
    for answer in found:
        if correct(", ".join(items(answer)), task.answer, task.answer_type):
            return None
    return f"the second solver finds {found[0]!r}"


def unique(task: Task, funnel) -> str | None:
    found = funnel.solutions(task.question)
    return (
        f"{len(found)} answers fit, such as {found[0]!r} and {found[1]!r}"
        if len(found) > 1
        else None
    )


def reach(task: Task, funnel) -> str | None:
    if not funnel.index:
        return None
    linked: set[str] = set()
    for url in task.evidence:
        if url not in linked and not funnel.searchable(url):
            return f"no search and no link leads to {url}"
        links = funnel.links(url)
        if links is None:
            return f"{url} cannot be opened"
        linked |= links
    return None


def leak(task: Task, funnel) -> str | None:
    if stands_in(task.answer, task.question):
        return "the answer stands in the question"
    if stands_in(task.answer, task.id):
        return "the answer stands in the task id"
    hidden = set(items(task.answer))
    for url in (
        task.evidence if task.family != "collection" else []
    ):  # the pages of all entries are evidence there
        if task.answer_type != "list" and any(
            stands_in(item, unquote(urlsplit(url).path)) for item in hidden
        ):
            return "the answer stands in the address or title of a page on the way"
    return None


def snippet(task: Task, funnel) -> str | None:
    if not funnel.index or task.family not in ("lookup", "browse") or not task.evidence:
        return None
    _, chains = parse_question(task.question)
    name, relations = chains[0]
    seen = stands_in(task.answer, " ".join(funnel.snippets(f"{relations[0]} of {name}", 3)))
    if seen and task.family == "browse":
        return "a browse fact shows in a snippet"
    return "a lookup fact shows in no snippet" if not seen and task.family == "lookup" else None


def guess(task: Task, funnel) -> str | None:
    said = normalize(items(task.answer)[0])
    if task.answer_type != "list" and said in {"yes", "no", "true", "false", "0", "1", "2", "3"}:
        return f"{said!r} can be guessed"
    group = funnel.answers[
        task.family, task.meta.get("template", "") if isinstance(task.meta, dict) else ""
    ]
    if group[str(task.answer)] >= 5 and group[str(task.answer)] > 0.1 * group.total():
        return f"{task.answer!r} is the answer of one in ten questions of its template"
    return None


def tools_needed(task: Task, funnel) -> str | None:
    numbers = [int(number) for number in re.findall(r"\b\d{1,4}\b", task.question)]
    if task.answer_type == "number" and len(numbers) == 2 and "```" not in task.question:
        a, b = numbers
        easy = (
            {a + b, abs(a - b)}
            | ({a * b} if min(a, b) < 13 and max(a, b) < 100 else set())
            | ({a // b, a % b} if 0 < b < 13 and a < 100 else set())
        )
        if max(numbers) < 1000 and any(
            correct(str(value), task.answer, "number") for value in easy
        ):
            return "mental arithmetic is enough"
    if task.family in PAGELESS or not funnel.index:
        return None
    if any(
        correct(str(answer), task.answer, task.answer_type)
        for answer in solutions(task.question, lambda path: None, lambda phrase: [])
    ):
        return "the question itself is enough"
    if task.family == "compute" and any(
        stands_in(task.answer, funnel.read(path) or "") for path in map(path_of, task.evidence)
    ):
        return "the result can be copied from a page"
    if task.family != "lookup":
        words = set(re.findall(r"\w+", task.question.casefold()))
        query = " ".join(
            word for word in re.findall(r"\w+", task.question) if word.casefold() not in STOP_WORDS
        )
        for text in funnel.snippets(
            query, 1
        ):  # the sentence of the top hit that is nearest to the question
            facts = [
                fact
                for fact in re.findall(r"([^.]*?) is (\w+)\.", text)
                if fact[1] not in ("a", "an")
            ]
            nearest = max(
                facts,
                key=lambda fact: len(words & set(re.findall(r"\w+", fact[0].casefold()))),
                default=("", ""),
            )
            if correct(nearest[1], task.answer, task.answer_type):
                return "one search and its nearest sentence are enough"
    return None


def repeat(task: Task, funnel) -> str | None:
    return (
        "the same question was asked before"
        if " ".join(task.question.split()).casefold() in funnel.questions
        else None
    )


def near(task: Task, funnel) -> str | None:
    key, words = content(task)
    for other in funnel.contents.get(key, []):
        if len(words & other) >= 0.6 * len(words | other):
            return "the same question in other words"
    return None


STAGES = {
    "schema": schema,
    "solver": solver,
    "unique": unique,
    "reach": reach,
    "leak": leak,
    "snippet": snippet,
    "guess": guess,
    "tools": tools_needed,
    "repeat": repeat,
    "near": near,
}


def content(task: Task) -> tuple[tuple, frozenset]:
    """What makes a question the same in other words: (answer, names, numbers), and its other words that carry meaning."""
    words = [
        word for word in re.findall(r"[^\W_]+", task.question) if word.casefold() not in STOP_WORDS
    ]
    special = frozenset(word for word in words if word[0].isupper() or word[0].isdigit())
    return (tuple(sorted(map(normalize, items(task.answer)))), special), frozenset(words) - special


def path_of(url: str) -> str:
    return unquote(urlsplit(url).path).lstrip("/")


class Funnel:
    """Runs the stages and remembers what they need: pages read, links, questions accepted so far, counts of rejects.

    Args:
        folder: world folder (data/world.py); None leaves out what needs pages.
        stages: names of the stages to run, all by default.
    """

    def __init__(self, folder: Path | str | None = None, stages=tuple(STAGES)):
        self.stages = [name for name in STAGES if name in stages]
        self.index, self.base = None, ""
        if folder:
            self.index = open_index(Path(folder) / "pages.db")
            # the tools as the agent has them, over HTTP; only the pieces of a page are larger, to read it in one call
            self.search, self.browse = Toolbox(page_chars=10_000_000).open(
                Path(folder) / "pages.db"
            )
            self.base = f"http://{dict(self.index.execute('select key, value from meta'))['host']}/"
        self.questions, self.contents, self.answers = set(), {}, defaultdict(Counter)
        self.looked, self.counts, self.rejects = Counter(), Counter(), []
        # bounded memories, so that the funnel stays small on any world
        self.read = functools.lru_cache(maxsize=8192)(self.read)
        self.links = functools.lru_cache(maxsize=8192)(self.links)
        self.searchable = functools.lru_cache(maxsize=65536)(self.searchable)
        self.solutions = functools.lru_cache(maxsize=8)(self.solutions)

    def read(self, path: str) -> str | None:
        """Text of a page through the browse tool."""
        text = self.browse(self.base + path) if self.index else "error"
        return None if text.startswith("error") else text.split("\n", 1)[1]

    def find(self, phrase: str) -> list[str]:
        """Paths of all pages that contain the phrase: the exhaustive query behind `unique`."""
        words = " ".join(re.findall(r"\w+", phrase))
        rows = (
            self.index.execute("select url from pages where pages match ?", (f'text : "{words}"',))
            if self.index and words
            else []
        )
        return [path_of(url) for (url,) in rows]

    def links(self, url: str) -> frozenset[str] | None:
        text = self.browse(url, links=True)
        return (
            None
            if text.startswith("error")
            else frozenset(re.findall(r"https?://\S+", text.split("\n", 1)[1]))
        )

    def searchable(self, url: str) -> bool:
        """Whether a search for the page's own name shows it."""
        return f" {url}\n" in self.search(queries=[path_of(url).replace("-", " ")]) + "\n"

    def snippets(self, query: str, count: int) -> list[str]:
        from data.index import search_index

        return [hit["snippet"] for hit in search_index(self.index, query, count)]

    def solutions(self, question: str) -> list:
        return solutions(question, self.read, self.find)

    def reject(self, stage: str, reason: str, record: dict) -> None:
        self.counts[stage] += 1
        self.rejects.append({"stage": stage, "reason": reason, "task": record})

    def check(self, task: Task) -> bool:
        """Whether the task passes; if so it is remembered for `repeat`, `near` and `guess`, else it is among the rejects."""
        for name in self.stages:
            self.looked[name] += 1
            if reason := STAGES[name](task, self):
                self.reject(name, reason, asdict(task))
                return False
        self.questions.add(" ".join(task.question.split()).casefold())
        key, words = content(task)
        self.contents.setdefault(key, []).append(words)
        self.answers[task.family, task.meta.get("template", "")][str(task.answer)] += 1
        return True

    def table(self) -> str:
        names = (
            (["json"] if self.counts["json"] else [])
            + self.stages
            + (["pass@n"] if self.looked["pass@n"] else [])
        )
        return "\n".join(
            [f"{'stage':8s} {'looked at':>9s} {'rejected':>8s}"]
            + [f"{n:8s} {self.looked[n]:9d} {self.counts[n]:8d}" for n in names]
        )


def read_records(path: Path | str, funnel: Funnel) -> list[Task]:
    """All tasks of a file; a broken line is a reject (stage "json"), not the end.

    Raises:
        OSError: no such file.
    """
    tasks, ids = [], set()
    with open(path, encoding="utf-8", errors="replace") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            funnel.looked["json"] += 1
            try:
                task = parse_task(line)
                if task.id in ids:
                    raise ValueError(f"the id {task.id!r} was used on an earlier line")
            except ValueError as error:
                funnel.reject("json", f"line {number}: {error}", {"line": line.strip()[:1000]})
                continue
            ids.add(task.id)
            tasks.append(task)
    return tasks


def pass_window(
    tasks: list[Task], funnel: Funnel, model: str, n: int, max_turns: int, corpus: str
) -> list[Task]:
    """Pass@N: keep what the named policy solves sometimes. Plays n trajectories a task."""
    from evaluate import make_trajectories, open_policy
    from rollout import RolloutArgs, rollout

    args = RolloutArgs(max_turns=max_turns, corpus=corpus)
    _, chat, engine = open_policy(model, args)
    trajectories = rollout(engine, chat, make_trajectories(tasks, n, 0, 0), Toolbox(corpus), args)
    solved = Counter(
        t.task.id
        for t in trajectories
        if t.status == "answered" and correct(t.answer, t.task.answer, t.task.answer_type)
    )
    funnel.looked["pass@n"] = len(tasks)
    for task in tasks:
        if solved[task.id] in (0, n):
            funnel.reject(
                "pass@n", f"{model} solved it in {solved[task.id]} of {n} attempts", asdict(task)
            )
    return [task for task in tasks if 0 < solved[task.id] < n]


def main():
    parser = argparse.ArgumentParser(
        description="Check tasks; keep the good ones and the rejects with their reasons."
    )
    parser.add_argument("--tasks", required=True, help="task file to check (JSON lines)")
    parser.add_argument(
        "--world", help="folder of the world (data/world.py) that the tasks are about"
    )
    parser.add_argument("--out", required=True, help="file for the good tasks")
    parser.add_argument(
        "--rejects", required=True, help="file for the rejected ones, with stage and reason"
    )
    parser.add_argument(
        "--skip", nargs="*", default=[], choices=list(STAGES), help="stages to leave out"
    )
    parser.add_argument(
        "--model",
        default="",
        help="policy of the Pass@N stage: nano or a checkpoint folder (default: no such stage)",
    )
    parser.add_argument(
        "--pass_n", type=int, default=4, help="attempts at each task in the Pass@N stage"
    )
    parser.add_argument("--max_turns", type=int, default=8, help="model steps of one attempt")
    args = parser.parse_args()
    try:
        funnel = Funnel(args.world, [name for name in STAGES if name not in args.skip])
        good = [task for task in read_records(args.tasks, funnel) if funnel.check(task)]
        if args.model and good:
            good = pass_window(
                good,
                funnel,
                args.model,
                args.pass_n,
                args.max_turns,
                str(Path(args.world) / "pages.db") if args.world else "",
            )
        save_tasks(good, args.out)
        Path(args.rejects).write_text(
            "".join(json.dumps(reject) + "\n" for reject in funnel.rejects), encoding="utf-8"
        )
    except (OSError, ValueError) as error:
        sys.exit(f"data/validate.py: {error}")
    print(funnel.table())
    print(
        f"kept {len(good)} of {len(good) + len(funnel.rejects)} tasks; the others are in {args.rejects}"
    )


if __name__ == "__main__":
    main()
