"""Tasks with answers that can be checked: questions over a fictional world, each solved twice.

The generator walks the world's relations and writes a question; an independent solver then reads only the *question's
words* and the *pages* (not the world's facts), and a task is kept only where both agree. Families:

    lookup    one hop, the fact shows in a search snippet
    browse    one hop, the fact stands only in the table deep in a page
    multihop  2 to 6 hops: the mayor of the headquarters of the employer of X
    compute   the sum, difference or product of two looked-up numbers, for `python`

and those of data/families.py: collection, conflict, logic, algorithmic, math, code. A world of kind "deep" asks all of them.
Which tasks are kept is decided by the funnel, data/validate.py.

In: a world folder (data/world.py). Out: one JSON line a task, the schema of `Task`. Question templates differ between
splits, and the possessive form ("X's employer's headquarters") is never seen in training tasks: only in test. So is the last
wording of each form in data/families.py.
To try an idea, add a template to FRAMES or a family to `draw_task`.

    python data/tasks.py --world data/worlds/w7 --out my.jsonl
    python data/tasks.py --shipped        # rebuilds data/train.jsonl, dev.jsonl, test.jsonl
"""

import argparse
import hashlib
import json
import random
import sys
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from data.deep.families import FAMILIES, NEED_DEEP, WORDINGS
from data.task import Task, load_tasks, parse_task, save_tasks  # noqa: F401
from data.world import RELATIONS, TYPES, World, load_world, world_folder

DATA = Path(__file__).resolve().parent


# ----------------------------------------------------------------------------------------------------------- questions

# {np} is a noun phrase such as "the mayor of the capital of Norland". The splits share no frame.
FRAMES = {
    "pretrain": [
        "Find {np}.",
        "Look up {np}.",
        "Please find {np}.",
        "I need {np}.",
        "I want to know {np}.",
        "Give me {np}.",
        "Which is {np}?",
        "Search for {np}.",
        "Could you find {np}?",
        "My question: {np}?",
        "We want {np}.",
        "Who or what is {np}?",
        "Answer this: {np}?",
        "What do they call {np}?",
        "Find out {np} for me.",
        "It is about {np}. What is it?",
        "{np}?",
        "Can anyone say what {np} is?",
        "Say {np}, please.",
        "We would like to hear {np}.",
        "Name the answer: {np}.",
        "You should report {np}.",
        "Tell us {np}.",
    ],
    "train": [
        "What is {np}?",
        "Tell me {np}.",
        "Can you name {np}?",
        "Do you know {np}?",
        "I would like {np}.",
    ],
    "dev": ["Say what {np} is.", "Let me know {np}.", "What could {np} be?"],
    "test": [
        "Name {np}.",
        "Report {np}.",
        "Which answer fits {np}?",
        "Can you tell me {np}?",
        "State {np}, please.",
    ],
}
OPERATIONS = {"sum": "+", "difference": "-", "product": "*"}
# Shares of the families; a multihop entry is (family, hops). At least 40% of test is multi-hop, half of it 3 hops or more.
SHARES = {
    "train": {
        ("lookup", 1): 0.20,
        ("browse", 1): 0.22,
        ("multihop", 2): 0.18,
        ("multihop", 3): 0.12,
        ("multihop", 4): 0.08,
        ("compute", 1): 0.20,
    },
    "test": {
        ("lookup", 1): 0.15,
        ("browse", 1): 0.22,
        ("multihop", 2): 0.19,
        ("multihop", 3): 0.14,
        ("multihop", 4): 0.08,
        ("compute", 1): 0.22,
    },
}
SHARES["pretrain"] = SHARES["train"]
SHARES["dev"] = SHARES["test"]
# A deep world asks every family; the second number is hops, or the level (1 to 3) of a family in data/families.py.
DEEP_SHARES = {
    ("lookup", 1): 0.04,
    ("browse", 1): 0.05,
    **{("multihop", hops): 0.03 for hops in range(2, 7)},
    ("compute", 1): 0.05,
    ("compute", 2): 0.04,
    ("compute", 3): 0.04,
    ("collection", 1): 0.07,
    ("collection", 2): 0.07,
    ("collection", 3): 0.02,
    **{
        (family, level): 0.03
        for family in ("conflict", "logic", "algorithmic")
        for level in (1, 2, 3)
    },
    **{(family, level): 0.04 for family in ("math", "code") for level in (1, 2)},
    ("math", 3): 0.02,
    ("code", 3): 0.02,
}


def noun_phrase(name: str, relations: list[str], possessive: bool) -> str:
    """`relations` in the order they are followed: ["capital", "mayor"] of X is "the mayor of the capital of X"."""
    if possessive:
        return name + "".join(f"'s {relation}" for relation in relations)
    return "".join(f"the {relation} of " for relation in reversed(relations)) + name


def walk(
    world: World, start: int, hops: int, rng: random.Random, last_is_deep: bool
) -> tuple[list[str], list[int], str]:
    """Follow random lead relations from `start`; returns the relations, the entities passed, and the last value."""
    relations, passed = [], [start]
    for hop in range(hops):
        entity = world.entity(passed[-1])
        is_last = hop == hops - 1
        where = "deep" if is_last and last_is_deep else "lead"
        choices = [
            r
            for r, _, place in RELATIONS[entity.type]
            if place == where and (is_last or r in entity.targets)
        ]
        relation = rng.choice(choices)
        relations.append(relation)
        if not is_last:
            passed.append(entity.targets[relation])
    return relations, passed, world.entity(passed[-1]).facts[relations[-1]]


def draw_task(
    world: World, family: str, hops: int, rng: random.Random, possessive: bool = False
) -> Task:
    """One random task of a family; `hops` counts pages to visit on the way (compute: 1, for each of two operands)."""
    if family in FAMILIES and (family, hops) != ("compute", 1):
        return draw_deep(world, family, hops, rng, possessive)
    if family == "compute":
        type = rng.choice(TYPES)
        first = world.random_entity(type, rng)
        second = world.random_entity(type, rng)
        while second == first:
            second = world.random_entity(type, rng)
        relation = next(
            r for r, kind, where in RELATIONS[type] if kind == "number" and where == "lead"
        )
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
    return Task(
        id=hashlib.sha256(f"{world.seed} {question}".encode()).hexdigest()[:12],
        question=question,
        answer=answer,
        answer_type=answer_type,
        family=family,
        split=world.split,
        hops=hops,
        evidence=[world.url(i) for i in passed],
        meta={
            "template": "possessive" if possessive else "of",
            "relations": chain,
            "world": world.description(),
        },
    )


def draw_deep(world: World, family: str, level: int, rng: random.Random, held_out: bool) -> Task:
    """One random task of a family of data/families.py, in a wording that is held out or in one of the others."""
    draft = FAMILIES[family](world, level, rng)
    wordings = WORDINGS[draft.form]
    wording = wordings[-1] if held_out else rng.choice(wordings[:-1] or wordings)
    question = rng.choice(FRAMES[world.split]).format(np=wording.format(**draft.slots))
    question = question[0].upper() + question[1:] + draft.suffix
    return Task(
        id=hashlib.sha256(f"{world.seed} {question}".encode()).hexdigest()[:12],
        question=question,
        answer=draft.answer,
        answer_type=draft.answer_type,
        family=family,
        split=world.split,
        hops=level,
        evidence=[f"http://{world.host}/{path}" for path in draft.paths],
        meta={
            "template": draft.form + (" held out" if held_out and len(wordings) > 1 else ""),
            "level": level,
            "world": world.description(),
        },
    )


def form_of(task: Task) -> str:
    """The form of a question: a key of WORDINGS, or "of" or "possessive"."""
    return task.meta["template"].split()[0]


# The shipped files of plain worlds were made with these stages of the funnel alone; they stay as they are, since results were measured on them.
SHIPPED_STAGES = ("solver", "unique", "leak", "snippet", "repeat")


def make_tasks(
    world: World, folder: Path | str, number: int, seed: int, families=(), forms=(), funnel=None
) -> tuple:
    """Draw tasks until `number` have passed the funnel.

    Args:
        world: the world; its split decides templates, and its kind the shares of the families.
        folder: where `write_world` wrote it: the funnel reads its pages and searches its index.
        number: how many tasks to keep.
        seed: decides every draw.
        families: names of the families to draw (default: all of the world's kind).
        forms: keys of data/families.py's WORDINGS: other questions are left out (default: all).
        funnel: a `Funnel` with stages of your choice (default: all of them).

    Returns:
        The tasks, in the order drawn with the families interleaved, and the funnel with its counts and rejects.

    Raises:
        ValueError: too few tasks pass, or a family that this world cannot ask.
    """
    from data.validate import Funnel

    funnel = funnel or Funnel(folder)
    shares = dict(DEEP_SHARES if world.kind == "deep" else SHARES[world.split])
    if families:
        shares = {
            key: share
            for key, share in (
                (shares | DEEP_SHARES)
                if world.kind == "plain" and set(families) - {f for f, _ in shares}
                else shares
            ).items()
            if key[0] in families
        }
        missing = set(families) - {family for family, _ in shares} | (
            NEED_DEEP & set(families) if world.kind == "plain" else set()
        )
        if missing:
            raise ValueError(
                f"this world has no tasks of the family {', '.join(sorted(missing))}: a deep one (data/world.py --kind deep) has "
                f"{', '.join(dict.fromkeys(family for family, _ in DEEP_SHARES))}"
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
                f"no task of these families has the form {', '.join(forms)}: forms are {', '.join(WORDINGS)}"
            )
    shares = {key: share / sum(shares.values()) for key, share in shares.items()}
    rng = random.Random(f"tasks-{world.seed}-{world.split}-{seed}")
    tasks, drawn = [], Counter()
    while len(tasks) < number:
        # the family that lags furthest behind its share is drawn next
        family, hops = max(shares, key=lambda key: shares[key] - drawn[key] / (len(tasks) + 1))
        possessive = (
            rng.random() < {"train": 0.0, "dev": 0.0, "test": 0.25, "pretrain": 0.3}[world.split]
        )
        task = draw_task(world, family, hops, rng, possessive)
        if forms and form_of(task) not in forms:
            continue
        if not funnel.check(task):
            if len(funnel.rejects) > 20 * number + 1000:
                raise ValueError(
                    f"only {len(tasks)} of {number} tasks passed the funnel ({dict(funnel.counts)}): use a larger world"
                )
            continue
        drawn[family, hops] += 1
        tasks.append(task)
    return tasks, funnel


# What ships in data/: world, number of tasks, forms (none: all). Walks of 30 steps are learned from the deep ones.
SHIPPED = {
    "train": (World(1, 1000, "train"), 4000, ()),
    "dev": (World(2, 400, "dev"), 200, ()),
    "test": (World(3, 600, "test"), 500, ()),
    "deep-train": (World(6, 3000, "train", "deep"), 240, ("list",)),
    "deep-dev": (World(7, 1500, "dev", "deep"), 60, ("list",)),
    "deep-test": (World(8, 1500, "test", "deep"), 120, ("list",)),
}


def print_funnel(tasks: list[Task], funnel) -> None:
    print(f"drawn {len(tasks) + len(funnel.rejects)}\n{funnel.table()}\nkept {len(tasks)}")
    for (family, grade), count in sorted(
        Counter(
            (t.family, f"level {t.meta['level']}" if "level" in t.meta else f"hops {t.hops}")
            for t in tasks
        ).items()
    ):
        print(f"  {family:11s} {grade:8s} {count:5d}  {count / len(tasks):.0%}")


def main():
    parser = argparse.ArgumentParser(
        description="Synthesise and check tasks over a world; prints the funnel."
    )
    parser.add_argument("--world", help="folder written by data/world.py")
    parser.add_argument("--out", help="task file to write (JSON lines)")
    parser.add_argument("--number", type=int, default=200, help="tasks to keep")
    parser.add_argument(
        "--families",
        nargs="*",
        default=[],
        choices=sorted({f for f, _ in DEEP_SHARES}),
        help="families to draw (default: lookup, browse, multihop and compute; all of them in a deep world)",
    )
    parser.add_argument(
        "--forms",
        nargs="*",
        default=[],
        choices=sorted(WORDINGS),
        help="forms of question to draw (default: all)",
    )
    parser.add_argument(
        "--rejects", help="file for what the funnel rejected, with stage and reason"
    )
    parser.add_argument("--seed", type=int, default=0, help="decides every draw")
    parser.add_argument(
        "--shipped",
        action="store_true",
        help="rebuild data/train.jsonl, dev.jsonl, test.jsonl and the deep ones",
    )
    args = parser.parse_args()
    if not args.shipped and not (args.world and args.out):
        parser.error("give --world DIR and --out FILE, or --shipped")
    from data.validate import Funnel

    try:
        if args.shipped:
            for name, (world, number, forms) in SHIPPED.items():
                folder = world_folder(world.description())
                funnel = Funnel(folder, SHIPPED_STAGES) if world.kind == "plain" else None
                tasks, funnel = make_tasks(
                    world, folder, number, args.seed, forms=forms, funnel=funnel
                )
                save_tasks(tasks, DATA / f"{name}.jsonl")
                print(f"--- {name}")
                print_funnel(tasks, funnel)
        else:
            tasks, funnel = make_tasks(
                load_world(args.world),
                args.world,
                args.number,
                args.seed,
                args.families,
                args.forms,
            )
            save_tasks(tasks, args.out)
            if args.rejects:
                Path(args.rejects).write_text(
                    "".join(json.dumps(reject) + "\n" for reject in funnel.rejects),
                    encoding="utf-8",
                )
            print_funnel(tasks, funnel)
    except (OSError, ValueError) as error:
        sys.exit(f"data/tasks.py: {error}")


if __name__ == "__main__":
    main()
