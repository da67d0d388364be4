"""Tasks with answers that can be checked: questions over a fictional world, each solved twice.

The generator walks the world's relations and writes a question; an independent solver then reads only the *question's
words* and the *pages* (not the world's facts), and a task is kept only where both agree. Families:

    lookup    one hop, the fact shows in a search snippet
    browse    one hop, the fact stands only in the table deep in a page
    multihop  2 to 4 hops: the mayor of the headquarters of the employer of X
    compute   the sum, difference or product of two looked-up numbers, for `python`

In: a world folder (data/world.py). Out: one JSON line a task, the schema of `Task`. Question templates differ between
splits, and the possessive form ("X's employer's headquarters") is never seen in training tasks: only in test.
To try an idea, add a template to FRAMES or a family to `draw_task`.

    python data/tasks.py --world data/worlds/w7 --out my.jsonl
    python data/tasks.py --shipped        # rebuilds data/train.jsonl, dev.jsonl, test.jsonl
"""

import argparse
import hashlib
import json
import random
import re
import sys
from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from data.world import RELATIONS, TYPES, World, load_world, write_world

DATA = Path(__file__).resolve().parent


@dataclass
class Task:
    """One question. A user's own file needs only `question` and `answer` on each line."""
    id: str
    question: str
    answer: str | list[str]
    answer_type: str = "name"  # name, number, date or list: decides how reward.correct compares
    family: str = "own"
    split: str = "own"
    hops: int = 0
    evidence: list[str] = field(default_factory=list)  # URLs of the pages that hold the answer
    meta: dict = field(default_factory=dict)  # "world": arguments of the World it was made from


def load_tasks(path: Path | str) -> list[Task]:
    """Read a task file.

    Raises:
        FileNotFoundError, ValueError: one line that names the file, the line number and what is wrong with it.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"no task file {path}")
    tasks, seen = [], set()
    known = set(Task.__dataclass_fields__)
    with open(path, "rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                record = json.loads(line.decode("utf-8-sig"))
            except ValueError as error:
                raise ValueError(f"{path}:{number}: not valid JSON ({error})") from None
            if not isinstance(record, dict):
                raise ValueError(f"{path}:{number}: a task is a JSON object, not {type(record).__name__}")
            for key in ("question", "answer"):
                if not record.get(key):
                    raise ValueError(f"{path}:{number}: the task has no {key!r}")
            answers = record["answer"] if isinstance(record["answer"], list) else [record["answer"]]
            if not isinstance(record["question"], str) or not all(isinstance(answer, str) and answer.strip() for answer in answers):
                raise ValueError(f"{path}:{number}: 'question' must be a string, 'answer' a string or a list of strings (\"42\", not 42)")
            if record.get("answer_type", "name") not in ("name", "number", "date", "list"):
                raise ValueError(f"{path}:{number}: 'answer_type' {record['answer_type']!r}: use name, number, date or list")
            for key, kind in (("id", str), ("family", str), ("split", str), ("hops", int), ("evidence", list), ("meta", dict)):
                if key in record and not isinstance(record[key], kind):
                    raise ValueError(f"{path}:{number}: {key!r} must be of type {kind.__name__}, not {type(record[key]).__name__}")
            question = record["question"].encode("utf-8", "replace")
            record.setdefault("id", hashlib.sha256(question).hexdigest()[:12])
            if record["id"] in seen:
                raise ValueError(f"{path}:{number}: the id {record['id']!r} was used on an earlier line (without an id, the question stands for it)")
            seen.add(record["id"])
            tasks.append(Task(**{key: value for key, value in record.items() if key in known}))
    if not tasks:
        raise ValueError(f"{path}: no tasks in it")
    return tasks


def save_tasks(tasks: list[Task], path: Path | str) -> None:
    Path(path).write_text("".join(json.dumps(asdict(task)) + "\n" for task in tasks), encoding="utf-8")


# ----------------------------------------------------------------------------------------------------------- questions

# {np} is a noun phrase such as "the mayor of the capital of Norland". The splits share no frame.
FRAMES = {
    "pretrain": ["Find {np}.", "Look up {np}.", "Please find {np}.", "I need {np}.", "I want to know {np}.", "Give me {np}.",
                 "Which is {np}?", "Search for {np}.", "Could you find {np}?", "My question: {np}?", "We want {np}.",
                 "Who or what is {np}?", "Answer this: {np}?", "What do they call {np}?", "Find out {np} for me.",
                 "It is about {np}. What is it?", "{np}?", "Can anyone say what {np} is?", "Say {np}, please.",
                 "We would like to hear {np}.", "Name the answer: {np}.", "You should report {np}.", "Tell us {np}."],
    "train": ["What is {np}?", "Tell me {np}.", "Can you name {np}?", "Do you know {np}?", "I would like {np}."],
    "dev": ["Say what {np} is.", "Let me know {np}.", "What could {np} be?"],
    "test": ["Name {np}.", "Report {np}.", "Which answer fits {np}?", "Can you tell me {np}?", "State {np}, please."],
}
OPERATIONS = {"sum": "+", "difference": "-", "product": "*"}
# Shares of the families; a multihop entry is (family, hops). At least 40% of test is multi-hop, half of it 3 hops or more.
SHARES = {
    "train": {("lookup", 1): 0.20, ("browse", 1): 0.22, ("multihop", 2): 0.18, ("multihop", 3): 0.12, ("multihop", 4): 0.08,
              ("compute", 1): 0.20},
    "test": {("lookup", 1): 0.15, ("browse", 1): 0.22, ("multihop", 2): 0.19, ("multihop", 3): 0.14, ("multihop", 4): 0.08,
             ("compute", 1): 0.22},
}
SHARES["pretrain"] = SHARES["train"]
SHARES["dev"] = SHARES["test"]


def noun_phrase(name: str, relations: list[str], possessive: bool) -> str:
    """`relations` in the order they are followed: ["capital", "mayor"] of X is "the mayor of the capital of X"."""
    if possessive:
        return name + "".join(f"'s {relation}" for relation in relations)
    return "".join(f"the {relation} of " for relation in reversed(relations)) + name


def walk(world: World, start: int, hops: int, rng: random.Random, last_is_deep: bool) -> tuple[list[str], list[int], str]:
    """Follow random lead relations from `start`; returns the relations, the entities passed, and the last value."""
    relations, passed = [], [start]
    for hop in range(hops):
        entity = world.entity(passed[-1])
        is_last = hop == hops - 1
        where = "deep" if is_last and last_is_deep else "lead"
        choices = [r for r, _, place in RELATIONS[entity.type] if place == where and (is_last or r in entity.targets)]
        relation = rng.choice(choices)
        relations.append(relation)
        if not is_last:
            passed.append(entity.targets[relation])
    return relations, passed, world.entity(passed[-1]).facts[relations[-1]]


def draw_task(world: World, family: str, hops: int, rng: random.Random, possessive: bool = False) -> Task:
    """One random task of a family; `hops` counts pages to visit on the way (compute: 1, for each of two operands)."""
    if family == "compute":
        type = rng.choice(TYPES)
        first = world.random_entity(type, rng)
        second = world.random_entity(type, rng)
        while second == first:
            second = world.random_entity(type, rng)
        relation = next(r for r, kind, where in RELATIONS[type] if kind == "number" and where == "lead")
        operation = rng.choice(list(OPERATIONS))
        a, b = (int(world.entity(i).facts[relation]) for i in (first, second))
        phrases = [noun_phrase(world.name(i), [relation], possessive) for i in (first, second)]
        phrase = f"the {operation} of {phrases[0]} and {phrases[1]}"
        answer = str({"sum": a + b, "difference": abs(a - b), "product": a * b}[operation])
        passed, chain, answer_type = [first, second], [relation, operation], "number"
    else:
        start = world.random_entity(rng.choice(TYPES), rng)
        last_is_deep = family == "browse" or (family == "multihop" and rng.random() < 0.25)
        chain, passed, answer = walk(world, start, hops, rng, last_is_deep)
        phrase = noun_phrase(world.name(start), chain, possessive)
        answer_type = "number" if answer.isdigit() else "name"
    question = rng.choice(FRAMES[world.split]).format(np=phrase)
    question = question[0].upper() + question[1:]
    return Task(id=hashlib.sha256(f"{world.seed} {question}".encode()).hexdigest()[:12], question=question, answer=answer,
                answer_type=answer_type, family=family, split=world.split, hops=hops,
                evidence=[world.url(i) for i in passed],
                meta={"template": "possessive" if possessive else "of", "relations": chain,
                      "world": {"seed": world.seed, "entities": world.entities, "split": world.split}})


# ------------------------------------------------------------------------------------- the second solver: pages only

def parse_question(question: str) -> tuple[str | None, list[tuple[str, list[str]]]]:
    """The operation asked for, if any, and each (entity name, relations in the order to follow), from the words alone."""
    operation = re.search(rf"\b({'|'.join(OPERATIONS)}) of\b", question, re.IGNORECASE)
    rest = question[operation.end():] if operation else question
    chains = [(m.group(2), re.findall(r"the (\w+) of", m.group(1), re.IGNORECASE)[::-1])
              for m in re.finditer(r"((?:\bthe \w+ of )+)([A-Z]\w+)", rest, re.IGNORECASE)]
    chains = chains or [(m.group(1), re.findall(r"'s (\w+)", m.group(2))) for m in re.finditer(r"\b([A-Z]\w+)((?:'s \w+)+)", rest)]
    return (operation.group(1).lower() if operation else None), chains


def read_fact(text: str, name: str, relation: str) -> str | None:
    """The value of a relation on the page of `name`, from the page's text; None where the page does not say."""
    match = re.search(rf"\b[Tt]he {relation} of {name} is (\w+)\.", text)
    match = match or re.search(rf"^\s*{relation}\s*\|\s*(\w+)", text, re.MULTILINE)
    return match.group(1) if match else None


def solve(question: str, read_page) -> str | None:
    """Answer a question from pages alone.

    Args:
        question: the task's question.
        read_page: function from an entity's name to the text of its page, or None.
    """
    operation, chains = parse_question(question)
    values = []
    for name, relations in chains:
        value = name
        for relation in relations:
            text = read_page(value)
            value = read_fact(text, value, relation) if text else None
            if value is None:
                return None
        values.append(value)
    if operation is None:
        return values[0] if len(values) == 1 else None
    if len(values) != 2 or not all(v.isdigit() for v in values):
        return None
    a, b = map(int, values)
    return str({"sum": a + b, "difference": abs(a - b), "product": a * b}[operation])


def make_tasks(world: World, folder: Path | str, number: int, seed: int) -> tuple[list[Task], Counter]:
    """Draw tasks until `number` have passed the funnel.

    Args:
        world: the world; its split decides templates and family shares.
        folder: where `write_world` wrote it: the solver and the checks read its pages and search its index.
        number: how many tasks to keep.
        seed: decides every draw.

    Returns:
        The tasks, in the order drawn with the families interleaved, and a count of the reason for each reject.
    """
    from data.index import open_index, page_html_of, search_index
    from tools import html_to_text

    index = open_index(Path(folder) / "pages.db")

    def read_page(name: str) -> str | None:
        page = page_html_of(index, f"http://{world.host}/{name}")
        return html_to_text(page) if page else None

    def rejection(task: Task) -> str | None:
        if task.question in questions:
            return "duplicate"
        if re.search(rf"\b{re.escape(task.answer)}\b", task.question):
            return "answer stands in the question"
        if task.answer in [url.rsplit("/", 1)[1] for url in task.evidence]:
            return "answer is a page on the way"
        if solve(task.question, read_page) != task.answer:
            return "second solver disagrees"
        if task.family in ("lookup", "browse"):
            name, relation = task.evidence[0].rsplit("/", 1)[1], task.meta["relations"][0]
            snippets = " ".join(hit["snippet"] for hit in search_index(index, f"{relation} of {name}", 3))
            seen = re.search(rf"\b{task.answer}\b", snippets) is not None
            if seen and task.family == "browse":
                return "browse task answered by a snippet"
            if not seen and task.family == "lookup":
                return "lookup task not answered by a snippet"
        return None

    rng = random.Random(f"tasks-{world.seed}-{world.split}-{seed}")
    shares = SHARES[world.split]
    tasks, questions, rejects, drawn = [], set(), Counter(), Counter()
    while len(tasks) < number:
        # the family that lags furthest behind its share is drawn next
        family, hops = max(shares, key=lambda key: shares[key] - drawn[key] / (len(tasks) + 1))
        possessive = rng.random() < {"train": 0.0, "dev": 0.0, "test": 0.25, "pretrain": 0.3}[world.split]
        task = draw_task(world, family, hops, rng, possessive)
        reason = rejection(task)
        if reason:
            rejects[reason] += 1
            if sum(rejects.values()) > 20 * number + 1000:
                raise ValueError(f"only {len(tasks)} of {number} tasks passed the funnel ({dict(rejects)}): use a larger world")
            continue
        drawn[family, hops] += 1
        questions.add(task.question)
        tasks.append(task)
    return tasks, rejects


# What ships in data/: (seed of the world, entities, number of tasks)
SHIPPED = {"train": (1, 1000, 4000), "dev": (2, 400, 200), "test": (3, 600, 500)}


def world_folder(meta_world: dict) -> Path:
    """Folder of the world a task was made from (`task.meta["world"]`), written on first use: a few seconds."""
    folder = DATA / "worlds" / "{split}-{seed}-{entities}".format(**meta_world)
    if not (folder / "pages.db").exists():
        write_world(World(**meta_world), folder)
    return folder


def print_funnel(tasks: list[Task], rejects: Counter) -> None:
    print(f"drawn {len(tasks) + sum(rejects.values())}")
    for reason, count in rejects.most_common():
        print(f"  rejected {count:5d}  {reason}")
    print(f"kept  {len(tasks)}")
    for (family, hops), count in sorted(Counter((t.family, t.hops) for t in tasks).items()):
        print(f"  {family:9s} hops {hops}  {count:5d}  {count / len(tasks):.0%}")


def main():
    parser = argparse.ArgumentParser(description="Synthesise and check tasks over a world; prints the funnel.")
    parser.add_argument("--world", help="folder written by data/world.py")
    parser.add_argument("--out", help="task file to write (JSON lines)")
    parser.add_argument("--number", type=int, default=200, help="tasks to keep")
    parser.add_argument("--seed", type=int, default=0, help="decides every draw")
    parser.add_argument("--shipped", action="store_true", help="rebuild data/train.jsonl, dev.jsonl and test.jsonl")
    args = parser.parse_args()
    if not args.shipped and not (args.world and args.out):
        parser.error("give --world DIR and --out FILE, or --shipped")
    try:
        if args.shipped:
            for split, (seed, entities, number) in SHIPPED.items():
                world = World(seed, entities, split)
                tasks, rejects = make_tasks(world, world_folder({"seed": seed, "entities": entities, "split": split}), number, args.seed)
                save_tasks(tasks, DATA / f"{split}.jsonl")
                print(f"--- {split}")
                print_funnel(tasks, rejects)
        else:
            tasks, rejects = make_tasks(load_world(args.world), args.world, args.number, args.seed)
            save_tasks(tasks, args.out)
            print_funnel(tasks, rejects)
    except (OSError, ValueError) as error:
        sys.exit(f"data/tasks.py: {error}")


if __name__ == "__main__":
    main()
