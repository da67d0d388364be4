"""The funnel: which tasks are worth asking. Each stage looks at what those before it let through.

    schema     fields and types are right, and the answer scores 1 under its own answer type
    solver     the second solver (data/deep/solve.py) finds the answer on the pages; our own
               families must be solvable by it
    unique     it finds no other: candidates are sought in the whole world, ties and equally short
               ways are seen
    reach      every evidence page can be found by the search tool or by a link from one that can
    leak       the answer stands in no question, URL, title or task id
    snippet    a browse fact shows in no search snippet, a lookup fact does
    guess      no yes or no, no tiny number, no answer of one in ten of its template's
    tools      closed book, mental arithmetic, one search, and copying instead of computing all fail
    repeat     the same question again
    near       the same question in other words: the same answer, names and numbers, and mostly the
               same other words

In: a task, and the folder of its world. Out: whether it passes, and the rejects with stage and
reason. Without a world the stages that need pages (reach, snippet, parts of solver, unique and
tools) are left out. To try an idea, write `stage(task, funnel) -> reason or None` and put it into
STAGES.
"""

import functools
import re
from collections import Counter, defaultdict
from dataclasses import asdict
from pathlib import Path
from urllib.parse import unquote, urlsplit

from data.deep.solve import parse_question, solutions
from data.index import open_index, search_index
from data.parts import FRAMES
from data.task import Task, check_task, parse_tasks
from data.world import load_world
from support.answers import correct, normalize, parse_date, parse_number
from support.toolbox import open_index_tools
from support.words import index_words

PAGELESS = {"math", "code"}  # solved without pages
# The second solver must solve these.
OURS = {"lookup", "browse", "multihop", "collection", "conflict", "compute", "logic", "algorithmic"}
OURS |= PAGELESS
EVERYDAY = (
    "a an and are as at be by did do does for from given has have how in is it its of on or s that "
    "the their there this to was were what when where which who will with you your"
)
# What a question has besides its content: everyday words and those of the question frames.
ALL_FRAMES = " ".join(frame for frames in FRAMES.values() for frame in frames)
STOP_WORDS = set(EVERYDAY.split())
STOP_WORDS |= set(re.findall(r"[a-z]+", ALL_FRAMES.replace("{np}", "").lower()))


def items(answer: str | list[str]) -> list[str]:
    return answer if isinstance(answer, list) else [answer]


def stands_in(answer: str | list[str], text: str) -> bool:
    """Whether a text gives the answer away: all items of it as whole words, where letters and
    digits bound each other."""
    return all(
        re.search(rf"(?<![^\W_]){re.escape(item)}(?![^\W_])", text, re.IGNORECASE)
        for item in items(answer)
    )


def words_of(text: str) -> set[str]:
    return set(re.findall(r"\w+", text.casefold()))


def plain_question(task: Task) -> str:
    return " ".join(task.question.split()).casefold()


def content(task: Task) -> tuple[tuple, frozenset]:
    """What makes a question the same in other words: (answer, names and numbers), and its other
    words that carry meaning."""
    words = re.findall(r"[^\W_]+", task.question)
    words = [word for word in words if word.casefold() not in STOP_WORDS]
    special = frozenset(word for word in words if word[0].isupper() or word[0].isdigit())
    answer = tuple(sorted(map(normalize, items(task.answer))))
    return (answer, special), frozenset(words) - special


# ------------------------------------------------------------------------------------------- stages


def schema(task: Task, funnel: "Funnel") -> str | None:
    try:
        check_task(asdict(task))
        if not all(urlsplit(url).scheme in ("http", "https") for url in task.evidence):
            return "evidence is no list of http addresses"
    except ValueError as error:
        return str(error)
    readable = {"number": parse_number, "date": parse_date}.get(task.answer_type, str)
    if not all(readable(item) for item in items(task.answer)):
        return f"the answer cannot be read as a {task.answer_type}"
    said = ", ".join(items(task.answer)) if task.answer_type == "list" else items(task.answer)[0]
    if correct(said, task.answer, task.answer_type) != 1.0:
        return f"the answer is no {task.answer_type}: it would not score against itself"
    return None


def solver(task: Task, funnel: "Funnel") -> str | None:
    found = funnel.solutions(task.question)
    if not found:
        must_solve = task.family in OURS and (funnel.index or task.family in PAGELESS)
        return "the second solver finds no answer" if must_solve else None
    said = [", ".join(items(answer)) for answer in found]
    if any(correct(answer, task.answer, task.answer_type) for answer in said):
        return None
    return f"the second solver finds {found[0]!r}"


def unique(task: Task, funnel: "Funnel") -> str | None:
    found = funnel.solutions(task.question)
    if len(found) > 1:
        return f"{len(found)} answers fit, such as {found[0]!r} and {found[1]!r}"
    return None


def reach(task: Task, funnel: "Funnel") -> str | None:
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


def leak(task: Task, funnel: "Funnel") -> str | None:
    if stands_in(task.answer, task.question):
        return "the answer stands in the question"
    if stands_in(task.answer, task.id):
        return "the answer stands in the task id"
    # The evidence of a collection is the pages of all its entries, the answer's among them.
    if task.family == "collection" or task.answer_type == "list":
        return None
    urls = [unquote(url) for url in task.evidence]
    if any(stands_in(item, url) for url in urls for item in set(items(task.answer))):
        return "the answer stands in the address or title of a page on the way"
    return None


def snippet(task: Task, funnel: "Funnel") -> str | None:
    if not funnel.index or task.family not in ("lookup", "browse") or not task.evidence:
        return None
    _, chains = parse_question(task.question)
    if not chains:  # in other words than those of the generator
        return None
    name, relations = chains[0]
    seen = stands_in(task.answer, " ".join(funnel.snippets(f"{relations[0]} of {name}", 3)))
    if seen and task.family == "browse":
        return "a browse fact shows in a snippet"
    return "a lookup fact shows in no snippet" if not seen and task.family == "lookup" else None


def guess(task: Task, funnel: "Funnel") -> str | None:
    said = normalize(items(task.answer)[0])
    if task.answer_type != "list" and said in {"yes", "no", "true", "false", "0", "1", "2", "3"}:
        return f"{said!r} can be guessed"
    group = funnel.answers[task.family, task.meta.get("template", "")]
    count = group[str(task.answer)]
    if count >= 5 and count > 0.1 * group.total():
        return f"{task.answer!r} is the answer of one in ten questions of its template"
    return None


def tools_needed(task: Task, funnel: "Funnel") -> str | None:
    if is_mental_arithmetic(task):
        return "mental arithmetic is enough"
    if task.family in PAGELESS or not funnel.index:
        return None
    closed_book = solutions(task.question, lambda path: None, lambda phrase: [])
    if any(correct(str(answer), task.answer, task.answer_type) for answer in closed_book):
        return "the question itself is enough"
    if task.family == "compute":
        pages = [funnel.read(url) or "" for url in task.evidence]
        if any(stands_in(task.answer, page) for page in pages):
            return "the result can be copied from a page"
    if task.family != "lookup" and is_one_search(task, funnel):
        return "one search and its nearest sentence are enough"
    return None


def is_mental_arithmetic(task: Task) -> bool:
    """Whether the question has two numbers whose sum, difference, product or quotient, easily done
    in the head, is the answer."""
    numbers = [int(number) for number in re.findall(r"\b\d{1,4}\b", task.question)]
    if task.answer_type != "number" or len(numbers) != 2 or "```" in task.question:
        return False
    a, b = numbers
    if max(a, b) >= 1000:
        return False
    easy = {a + b, abs(a - b)}
    if min(a, b) < 13 and max(a, b) < 100:
        easy.add(a * b)
    if 0 < b < 13 and a < 100:
        easy |= {a // b, a % b}
    return any(correct(str(value), task.answer, "number") for value in easy)


def is_one_search(task: Task, funnel: "Funnel") -> bool:
    """Whether the sentence of the top hit that is nearest to the question gives the answer."""
    words = re.findall(r"\w+", task.question)
    query = " ".join(word for word in words if word.casefold() not in STOP_WORDS)
    facts = re.findall(r"([^.]*?) is (\w+)\.", " ".join(funnel.snippets(query, 1)))
    facts = [fact for fact in facts if fact[1] not in ("a", "an")] or [("", "")]
    asked = words_of(task.question)
    _, value = max(facts, key=lambda fact: len(asked & words_of(fact[0])))
    return bool(correct(value, task.answer, task.answer_type))


def repeat(task: Task, funnel: "Funnel") -> str | None:
    is_known = plain_question(task) in funnel.questions
    return "the same question was asked before" if is_known else None


def near(task: Task, funnel: "Funnel") -> str | None:
    key, words = content(task)
    others = funnel.contents.get(key, [])
    if any(len(words & other) >= 0.6 * len(words | other) for other in others):
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


# ------------------------------------------------------------------------------------------- funnel


class Funnel:
    """Runs the stages and remembers what they need: pages read, links, questions accepted so far,
    counts of rejects.

    Args:
        folder: world folder (data/world.py); None leaves out what needs pages.
        stages: names of the stages to run, all by default.
        functions: the stages that there are, by name; others for tasks without a world.
        pages: what those others read (data/blanks.py).
    """

    def __init__(self, folder: Path | str | None = None, stages=None, functions=STAGES, pages=None):
        self.functions, self.pages = functions, pages
        self.stages = [name for name in functions if stages is None or name in stages]
        self.index = None
        if folder:
            db = Path(folder) / "pages.db"
            self.index, self.world = open_index(db), load_world(folder)
            # These are the tools as the agent has them, over HTTP; only the pieces of a page are
            # larger, to read it in one call.
            self.search, self.browse = open_index_tools(db, page_chars=10_000_000)
        self.questions, self.contents, self.answers = set(), {}, defaultdict(Counter)
        self.looked, self.counts, self.rejects = Counter(), Counter(), []
        # Memories are bounded, so that the funnel stays small on any world.
        self.read = functools.lru_cache(maxsize=8192)(self.read)
        self.links = functools.lru_cache(maxsize=8192)(self.links)
        self.searchable = functools.lru_cache(maxsize=65536)(self.searchable)
        self.solutions = functools.lru_cache(maxsize=8)(self.solutions)

    def read(self, path: str) -> str | None:
        """Text of a page, named by its path or address, through the browse tool."""
        if not self.index:
            return None
        text = self.browse(path if "://" in path else self.world.address(path))
        return None if text.startswith("error") else text.split("\n", 1)[1]

    def find(self, phrase: str) -> list[str]:
        """Paths of all pages that contain the phrase: the exhaustive query behind `unique`."""
        words = index_words(phrase)
        if not self.index or not words:
            return []
        query = (f'text : "{words}"',)
        page = "select url from words join pages on id = words.rowid where words match ?"
        rows = self.index.execute(page, query)
        return [self.world.path(url) for (url,) in rows]

    def links(self, url: str) -> frozenset[str] | None:
        """The addresses that a page links to; None if it cannot be opened."""
        text = self.browse(url, links=True)
        if text.startswith("error"):
            return None
        return frozenset(re.findall(r"https?://\S+", text.split("\n", 1)[1]))

    def searchable(self, url: str) -> bool:
        """Whether a search for the page's own name shows it."""
        name = (self.world.path(url) or url).replace("-", " ")
        return f" {url}\n" in self.search(queries=[name]) + "\n"

    def snippets(self, query: str, count: int) -> list[str]:
        return [hit["snippet"] for hit in search_index(self.index, query, count)]

    def solutions(self, question: str) -> list:
        return solutions(question, self.read, self.find)

    def reject(self, stage: str, reason: str, record: dict) -> None:
        self.counts[stage] += 1
        self.rejects.append({"stage": stage, "reason": reason, "task": record})

    def check(self, task: Task) -> bool:
        """Whether the task passes.

        If so it is remembered for `repeat`, `near` and `guess`, else it is among the rejects.
        """
        for name in self.stages:
            self.looked[name] += 1
            if reason := self.functions[name](task, self):
                self.reject(name, reason, asdict(task))
                return False
        self.questions.add(plain_question(task))
        key, words = content(task)
        self.contents.setdefault(key, []).append(words)
        self.answers[task.family, task.meta.get("template", "")][str(task.answer)] += 1
        return True

    def read_tasks(self, path: Path | str) -> list[Task]:
        """All tasks of a file; a broken line is a reject (stage "json"), not the end.

        Raises:
            OSError: no such file.
        """
        tasks = []
        for number, line, task in parse_tasks(path):
            self.looked["json"] += 1
            if isinstance(task, Task):
                tasks.append(task)
            else:
                text = line.decode("utf-8", "replace").strip()
                self.reject("json", f"line {number}: {task}", {"line": text[:1000]})
        return tasks

    def table(self) -> str:
        """How many tasks each stage looked at and rejected."""
        names = ["json"] if self.counts["json"] else []
        names += self.stages + (["pass@n"] if self.looked["pass@n"] else [])
        rows = [f"{name:8s} {self.looked[name]:9d} {self.counts[name]:8d}" for name in names]
        return "\n".join([f"{'stage':8s} {'looked at':>9s} {'rejected':>8s}"] + rows)
