"""Tasks with answers that can be checked: questions over a fictional world, each solved twice.

The generator walks the world's relations and writes a question; an independent solver then reads
only the *question's words* and the *pages* (not the world's facts), and a task is kept only where
both agree. Families:

    lookup    one hop, the fact shows in a search snippet
    browse    one hop, the fact stands only in the records of a page
    multihop  2 to 6 hops: the mayor of the headquarters of the employer of X
    compute   the sum, difference or product of two looked-up numbers, for `python`

and those of data/deep/families.py: collection, conflict, logic, algorithmic, math, code. A world of
kind "deep" asks all of them. Which tasks are kept is decided by the funnel, data/deep/funnel.py.

In: a world folder (data/world.py). Out: one JSON line a task, the schema of `Task`. Question
templates differ between splits, and the possessive form ("X's employer's headquarters") is never
seen in training tasks: only in test. So is the last wording of each form in data/deep/families.py.
To try an idea, add a template to FRAMES (data/parts.py) or a family to `draw_task`.

    python data/tasks.py --world data/worlds/w7 --out my.jsonl
    python data/tasks.py --corpus corpus.db --out my.jsonl      # from documents: data/blanks.py
    python data/tasks.py --shipped train dev test      # rebuilds data/train.jsonl and so on
"""

import hashlib
import random
import sqlite3
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from transformers.hf_argparser import HfArg

from data.blanks import tasks_from_pages
from data.deep.families import FAMILIES, NEED_DEEP, WORDINGS
from data.deep.funnel import Funnel
from data.parts import FRAMES, LEAD, OPERATIONS, RECORDS, TYPES, number_relation
from data.task import Task, save_lines, save_tasks
from data.world import World, load_world, world_folder
from support.flags import parse_flags, try_files

DATA = Path(__file__).resolve().parent

# Shares of the families, each with its hops. At least 40% of test is multi-hop, and half of that
# has 3 hops or more.
_PLAIN = [("lookup", 1), ("browse", 1), *(("multihop", hops) for hops in (2, 3, 4)), ("compute", 1)]
_TRAIN = dict(zip(_PLAIN, (0.20, 0.22, 0.18, 0.12, 0.08, 0.20)))
_TEST = dict(zip(_PLAIN, (0.15, 0.22, 0.19, 0.14, 0.08, 0.22)))
SHARES = {"pretrain": _TRAIN, "train": _TRAIN, "dev": _TEST, "test": _TEST}
# A deep world asks every family; the numbers are hops, or the level (1 to 3) of a family in
# data/deep/families.py.
_DEEP = {
    "lookup": {1: 0.04},
    "browse": {1: 0.05},
    "multihop": dict.fromkeys((2, 3, 4, 5, 6), 0.03),
    "compute": {1: 0.05, 2: 0.04, 3: 0.04},
    "collection": {1: 0.07, 2: 0.07, 3: 0.02},
    "conflict": {1: 0.03, 2: 0.03, 3: 0.03},
    "logic": {1: 0.03, 2: 0.03, 3: 0.03},
    "algorithmic": {1: 0.03, 2: 0.03, 3: 0.03},
    "math": {1: 0.04, 2: 0.04, 3: 0.02},
    "code": {1: 0.04, 2: 0.04, 3: 0.02},
}
DEEP_SHARES = {(f, level): share for f, levels in _DEEP.items() for level, share in levels.items()}


# What ships in data/: worlds, number of tasks, forms (none: all). No policy learns one world by
# heart among many small ones. Half of a test is in worlds whose addresses or layouts no training
# world has. Walks of 30 steps are learned from the deep ones.
_TEST_STYLES = ("varied", "varied", "unseen-hosts", "unseen-layouts")
SHIPPED = {
    "train": ([World(seed, 120, "train", style="varied") for seed in range(101, 133)], 4000, ()),
    "dev": ([World(seed, 120, "dev", style="varied") for seed in range(201, 205)], 200, ()),
    "test": ([World(300 + n, 120, "test", style=_TEST_STYLES[n % 4]) for n in range(8)], 500, ()),
    "deep-train": (
        [World(n, 750, "train", "deep", "varied") for n in range(41, 49)],
        240,
        ("list",),
    ),
    "deep-dev": ([World(51, 1500, "dev", "deep", "varied")], 60, ("list",)),
    "deep-test": (
        [World(60 + n, 750, "test", "deep", _TEST_STYLES[n]) for n in range(4)],
        120,
        ("list",),
    ),
}


@dataclass
class Args:
    world: str = HfArg(default="", help="folder written by data/world.py")
    corpus: str = HfArg(default="", help="or an index of documents (data/index.py)")
    test_share: float = HfArg(
        default=0.2,
        help="share of a corpus's pages that only the tasks of OUT-test.jsonl ask about",
    )
    out: str = HfArg(default="", help="task file to write (JSON lines)")
    number: int = HfArg(default=200, help="tasks to keep")
    families: list[str] = HfArg(
        default_factory=list,
        metadata={"choices": sorted({family for family, _ in DEEP_SHARES})},
        help="families to draw (default: lookup, browse, multihop, compute; all in a deep world)",
    )
    forms: list[str] = HfArg(
        default_factory=list,
        metadata={"choices": sorted(WORDINGS)},
        help="forms of question to draw (default: all)",
    )
    rejects: str = HfArg(default="", help="file for what the funnel rejected, with reasons")
    seed: int = HfArg(default=0, help="decides every draw")
    shipped: list[str] = HfArg(
        default_factory=list,
        metadata={"choices": list(SHIPPED)},
        help="rebuild these task files in data/",
    )


# ---------------------------------------------------------------------------------------- questions


def noun_phrase(name: str, relations: list[str], possessive: bool) -> str:
    """`relations` stand in the order they are followed.

    ["capital", "mayor"] of X is "the mayor of the capital of X", or "X's capital's mayor".
    """
    if possessive:
        return name + "".join(f"'s {relation}" for relation in relations)
    return "".join(f"the {relation} of " for relation in reversed(relations)) + name


def chain(
    world: World, family: str, hops: int, rng: random.Random, possessive: bool
) -> tuple[str, list[str], str, list[int]]:
    """Follow random lead relations; the last one may stand in the records of a page.

    Returns:
        The noun phrase, the relations, the value at the end, and the entities passed.
    """
    start = world.random_entity(rng.choice(TYPES), rng)
    last_is_deep = family == "browse" or (family == "multihop" and rng.random() < 0.25)
    relations, passed = [], [start]
    for _ in range(hops - 1):
        entity = world.entity(passed[-1])
        relations.append(rng.choice([r for r in LEAD[entity.type] if r in entity.targets]))
        passed.append(entity.targets[relations[-1]])
    last = world.entity(passed[-1])
    relations.append(rng.choice(list((RECORDS if last_is_deep else LEAD)[last.type])))
    phrase = noun_phrase(world.name(start), relations, possessive)
    return phrase, relations, last.facts[relations[-1]], passed


def two_numbers(
    world: World, rng: random.Random, possessive: bool
) -> tuple[str, list[str], str, list[int]]:
    """The sum, difference or product of a number of two entities; returns what `chain` does."""
    type = rng.choice(TYPES)
    first = world.random_entity(type, rng)
    second = world.random_entity(type, rng)
    while second == first:
        second = world.random_entity(type, rng)
    relation = number_relation(type)
    operation = rng.choice(list(OPERATIONS))
    a, b = (int(world.entity(i).facts[relation]) for i in (first, second))
    one, other = (noun_phrase(world.name(i), [relation], possessive) for i in (first, second))
    answer = str({"sum": a + b, "difference": abs(a - b), "product": a * b}[operation])
    return f"the {operation} of {one} and {other}", [relation, operation], answer, [first, second]


def draw_task(
    world: World, family: str, hops: int, rng: random.Random, held_out: bool = False, frame=""
) -> Task:
    """One random task of a family.

    Args:
        hops: pages to visit on the way (compute: 1, for each of two operands); for a family of
            data/deep/families.py its level.
        held_out: use the possessive form, or the last wording of a form, instead of the others.
        frame: of the question (default: one of the split's).
    """
    if family in FAMILIES and (family, hops) != ("compute", 1):
        draft = FAMILIES[family](world, hops, rng)
        form, answer, paths, suffix = draft.form, draft.answer, draft.paths, draft.suffix
        wordings = WORDINGS[form]
        wording = wordings[-1] if held_out else rng.choice(wordings[:-1] or wordings)
        phrase = wording.format(**draft.slots)
        template = f"{form} held out" if held_out and len(wordings) > 1 else form
        meta = {"template": template, "level": hops}
    else:
        form, suffix = "possessive" if held_out else "of", ""
        if family == "compute":
            phrase, relations, answer, passed = two_numbers(world, rng, held_out)
        else:
            phrase, relations, answer, passed = chain(world, family, hops, rng, held_out)
        paths = [world.name(i) for i in passed]
        meta = {"template": form, "relations": relations}
    question = (frame or rng.choice(FRAMES[world.split])).format(np=phrase)
    question = question[0].upper() + question[1:] + suffix
    one_answer = "date" if form == "date" else "number" if str(answer).isdigit() else "name"
    return Task(
        id=hashlib.sha256(f"{world.seed} {question}".encode()).hexdigest()[:12],
        question=question,
        answer=answer,
        answer_type="list" if isinstance(answer, list) else one_answer,
        family=family,
        split=world.split,
        hops=hops,
        evidence=[world.address(path) for path in paths],
        meta=meta | {"world": world.description()},
    )


def form_of(task: Task) -> str:
    """The form of a question: a key of WORDINGS, or "of" or "possessive"."""
    return task.meta["template"].split()[0]


# ------------------------------------------------------------------------------------------- choice

HELD_OUT_SHARES = {"train": 0.0, "dev": 0.0, "test": 0.25, "pretrain": 0.3}


def shares_of(world: World, families, forms) -> dict[tuple[str, int], float]:
    """(family, hops or level) -> its share of the tasks; see `make_tasks` for the arguments."""
    shares = dict(DEEP_SHARES if world.kind == "deep" else SHARES[world.split])
    if set(families) - {family for family, _ in shares}:
        shares |= DEEP_SHARES  # a plain world can be asked some of these, by name
    if families:
        shares = {key: share for key, share in shares.items() if key[0] in families}
        missing = set(families) - {family for family, _ in shares}
        if world.kind == "plain":
            missing |= NEED_DEEP & set(families)
        if missing:
            raise ValueError(
                f"this world has no tasks of the family {', '.join(sorted(missing))}: a deep one "
                "(data/world.py --kind deep) has "
                + ", ".join(dict.fromkeys(family for family, _ in DEEP_SHARES))
            )
    if forms:
        trial = random.Random(0)
        shares = {
            key: share
            for key, share in shares.items()
            if any(form_of(draw_task(world, *key, trial)) in forms for _ in range(50))
        }
        if not shares:
            raise ValueError(
                f"no task of these families has the form {', '.join(forms)}: "
                f"forms are {', '.join(WORDINGS)}"
            )
    return {key: share / sum(shares.values()) for key, share in shares.items()}


def make_tasks(
    world: World, folder: Path | str, number: int, seed: int, families=(), forms=(), funnel=None
) -> tuple[list[Task], Funnel]:
    """Draw tasks until `number` have passed the funnel.

    Args:
        world: the world; its split decides templates, and its kind the shares of the families.
        folder: where `write_world` wrote it: the funnel reads its pages and searches its index.
        number: how many tasks to keep.
        seed: decides every draw.
        families: names of the families to draw (default: all of the world's kind).
        forms: keys of WORDINGS in data/deep/families.py: other questions are left out (default:
            all).
        funnel: a `Funnel` with stages of your choice (default: all of them).

    Returns:
        The tasks, in the order drawn with the families interleaved, and the funnel with its counts
        and rejects.

    Raises:
        ValueError: too few tasks pass, or a family that this world cannot ask.
    """
    funnel = funnel or Funnel(folder)
    shares = shares_of(world, families, forms)
    rng = random.Random(f"tasks-{world.seed}-{world.split}-{seed}")
    tasks, drawn = [], Counter()
    while len(tasks) < number:
        # The family that lags furthest behind its share is drawn next.
        behind = {key: share - drawn[key] / (len(tasks) + 1) for key, share in shares.items()}
        family, hops = max(behind, key=behind.get)
        held_out = rng.random() < HELD_OUT_SHARES[world.split]
        task = draw_task(world, family, hops, rng, held_out)
        if forms and form_of(task) not in forms:
            continue
        if funnel.check(task):
            drawn[family, hops] += 1
            tasks.append(task)
        elif len(funnel.rejects) > 20 * number + 1000:
            raise ValueError(
                f"only {len(tasks)} of {number} tasks passed the funnel ({dict(funnel.counts)}): "
                "use a larger world"
            )
    return tasks, funnel


def print_funnel(tasks: list[Task], funnel: Funnel) -> None:
    print(f"drawn {len(tasks) + len(funnel.rejects)}\n{funnel.table()}\nkept {len(tasks)}")
    grades = Counter()
    for task in tasks:
        level = f"level {task.meta['level']}" if "level" in task.meta else f"hops {task.hops}"
        grades[task.family, level] += 1
    for (family, grade), count in sorted(grades.items()):
        print(f"  {family:11s} {grade:8s} {count:5d}  {count / len(tasks):.0%}")


def make_shipped(name: str, seed: int, number: int) -> list[Task]:
    """The first tasks of a shipped file, the worlds taking turns; prints what the funnel rejected.

    Args:
        name: a key of SHIPPED.
        seed: decides every draw.
        number: how many tasks, at most as many as the file has.
    """
    worlds, _, forms = SHIPPED[name]
    made, kept, whole = [], [], Funnel()
    for skipped, world in enumerate(worlds):
        # The worlds are at different places of one order of families, so that each part of the file
        # has all of them.
        count = -(-number // len(worlds)) + skipped
        folder = world_folder(world.description())
        tasks, funnel = make_tasks(world, folder, count, seed, forms=forms)
        made.append(tasks[skipped:])
        kept += tasks
        whole.looked += funnel.looked
        whole.counts += funnel.counts
        whole.rejects += funnel.rejects
    print(f"--- {name}, the first {number} of these:")
    print_funnel(kept, whole)
    return [task for turn in zip(*made) for task in turn][:number]


def from_corpus(args: Args) -> list[dict]:
    """Write the tasks of a corpus, and those of its other pages for the test; returns rejects."""
    train, test, funnel = tasks_from_pages(args.corpus, args.number, args.test_share, args.seed)
    out = Path(args.out)
    save_tasks(train, out)
    print_funnel(train + test, funnel)
    print(f"{len(train)} tasks in {out}")
    if test:
        held_out = out.with_name(f"{out.stem}-test{out.suffix}")
        save_tasks(test, held_out)
        print(f"{len(test)} tasks from other pages in {held_out}")
    return funnel.rejects


def from_world(args: Args) -> list[dict]:
    """Write the tasks of a world; returns rejects."""
    if args.number < 1:
        raise ValueError("--number is 1 or more")
    world = load_world(args.world)
    tasks, funnel = make_tasks(world, args.world, args.number, args.seed, args.families, args.forms)
    save_tasks(tasks, args.out)
    print_funnel(tasks, funnel)
    return funnel.rejects


def main():
    (args,) = parse_flags((Args,), __doc__)
    if bool(args.world) + bool(args.corpus) + bool(args.shipped) != 1 or not (
        args.out or args.shipped
    ):
        sys.exit(
            "data/tasks.py: give --world DIR or --corpus FILE.db, and --out FILE; or --shipped "
            "(see --help)"
        )
    if args.corpus and (args.families or args.forms):
        sys.exit("data/tasks.py: --families and --forms are of worlds, not of a corpus")
    try:
        try_files(args.out, args.rejects)
        for name in args.shipped:
            save_tasks(make_shipped(name, args.seed, SHIPPED[name][1]), DATA / f"{name}.jsonl")
        if not args.shipped:
            rejects = from_corpus(args) if args.corpus else from_world(args)
            if args.rejects:
                save_lines(rejects, args.rejects)
    except (OSError, ValueError, sqlite3.Error) as error:
        sys.exit(f"data/tasks.py: {error}")
    except KeyboardInterrupt:
        sys.exit("data/tasks.py: stopped")


if __name__ == "__main__":
    main()
