"""Does the funnel (data/deep/funnel.py) find bad tasks, and does it leave good ones alone?

Good tasks are drawn over a fresh deep world; into them go, for each kind of damage, 5% bad ones:
wrong answers, ambiguous questions, leaks, duplicates, trivial tasks. A second funnel sees the
shuffled mixture. "Good" tasks have passed a funnel once, so good ones lost here are those that the
company of others costs (repeat, near, guess). What the first pass rejects of raw draws is printed
too: there the stage `solver` must stay at zero, since every raw truth comes from the world's own
facts.

    python tests/bench_funnel.py --number 10000 --json out.json
"""

import json
import random
import re
import resource
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from transformers.hf_argparser import HfArg

from data.deep.families import entity_relations
from data.deep.funnel import Funnel
from data.parts import FRAMES, LEAD, TYPES, number_relation
from data.task import Task
from data.tasks import make_tasks
from data.world import World, write_world
from support.answers import correct
from support.flags import parse_flags

KINDS = ["wrong", "ambiguous", "leak", "duplicate", "trivial"]


@dataclass
class Args:
    number: int = HfArg(default=2000, help="good tasks to draw")
    entities: int = HfArg(default=5000, help="size of the fresh deep world")
    seed: int = HfArg(default=21, help="decides world, tasks and damage")
    json: str = HfArg(default="", help="file for the figures")


# Each function below damages a task, or gives None where it cannot. `rng` decides how.


def wrong(task: Task, tasks: list[Task], world: World, rng: random.Random) -> Task | None:
    """Another answer of the same type: another task's, a near miss, or a list with an item lost."""
    answer = task.answer
    if task.answer_type == "list":
        is_lost = len(answer) > 1 and rng.random() < 0.5
        answer = answer[1:] if is_lost else answer + [world.name(rng.randrange(world.entities))]
    elif task.answer_type == "number" and rng.random() < 0.5:
        answer = str(int(answer) + rng.choice([-10, -1, 1, 2, 10]))
    else:
        answer = rng.choice([t.answer for t in tasks if t.answer_type == task.answer_type])
    said = ", ".join(answer) if isinstance(answer, list) else answer
    is_right = correct(said, task.answer, task.answer_type)
    return None if is_right else replace(task, answer=answer)


def ambiguous(task: Task, tasks: list[Task], world: World, rng: random.Random) -> Task | None:
    """A question that several answers fit, with one of them; or one that says too little."""
    frame = rng.choice(FRAMES[world.split])
    way = rng.randrange(4)
    if way == 0 and task.meta["template"].startswith("among"):
        return without_conditions(task, world, frame)
    if way == 1:
        return shared_fact(task, world, rng, frame)
    if way == 2 and task.family in ("lookup", "browse"):  # the name is gone
        relation = task.meta["relations"][0]
        return replace(task, question=frame.format(np=f"the {relation} of the {rng.choice(TYPES)}"))
    return tied_place(task, world, rng, frame) if way == 3 else None


def without_conditions(task: Task, world: World, frame: str) -> Task:
    """One among some, without its conditions but one that all candidates meet."""
    names = re.findall(r"[A-Z]\w+", re.search(r"among (.+?) whose", task.question).group(1))
    type = next(world.type(i) for i in range(world.entities) if world.name(i) == names[0])
    wanted = re.search(r"the (\w+) of the one among", task.question).group(1)
    condition = f"whose {number_relation(type)} is above 99"
    phrase = f"the {wanted} of the one among {', '.join(names)} {condition}"
    return replace(task, question=frame.format(np=phrase))


def shared_fact(task: Task, world: World, rng: random.Random, frame: str) -> Task | None:
    """The person whose employer is X: several are."""
    by_fact: dict[tuple, list[int]] = {}
    for i in rng.sample(range(world.entities), min(world.entities, 300)):
        for relation, kind in LEAD[world.type(i)].items():
            if kind in TYPES:
                fact = (world.type(i), relation, world.entity(i).facts[relation])
                by_fact.setdefault(fact, []).append(i)
    several = [fact for fact, group in by_fact.items() if len(group) > 1]
    type, relation, value = rng.choice(several or list(by_fact))
    if not several:
        return None
    one, wanted = by_fact[type, relation, value][0], number_relation(type)
    return replace(
        task,
        question=frame.format(np=f"the {wanted} of the {type} whose {relation} is {value}"),
        answer_type="number",
        answer=world.entity(one).facts[wanted],
        evidence=[world.url(one)],
        family="logic",
        meta={"template": "inverse"},
    )


def tied_place(task: Task, world: World, rng: random.Random, frame: str) -> Task | None:
    """A tie for the second place."""
    type = rng.choice([t for t in TYPES if t != "country"])
    relation, groups = number_relation(type), {}
    for number in range(world.count(type)):
        entity = world.entity(world.nth(type, number))
        groups.setdefault(int(entity.facts[relation]), []).append(entity)
    lowest = min(groups)
    tied = [group for value, group in groups.items() if len(group) > 1 and value > lowest]
    if not tied:
        return None
    one, other = rng.choice(tied)[:2]
    third, wanted = rng.choice(groups[lowest]), rng.choice(entity_relations(type))
    names = f"{one.name}, {other.name} and {third.name}"
    phrase = f"the {wanted} of the one with the second greatest {relation} among {names}"
    return replace(
        task,
        question=frame.format(np=phrase),
        answer=other.facts[wanted],
        answer_type="name",
        evidence=[world.url(e.index) for e in (one, other, third)],
        family="algorithmic",
        meta={"template": "rank"},
    )


def leak(task: Task, tasks: list[Task], world: World, rng: random.Random) -> Task | None:
    """The answer shows in question, id or address; or a browse task's fact shows in a snippet."""
    said = ", ".join(task.answer) if isinstance(task.answer, list) else task.answer
    way = rng.randrange(4)
    if way == 0:
        word = rng.choice(["Hint", "Known", "Not to be confused with"])
        return replace(task, question=f"{task.question} ({word}: {said})")
    if way == 1:
        return replace(task, id=f"{task.family}-{said}-{rng.randrange(10**6)}")
    if way == 2 and task.evidence and task.answer_type == "name":
        return replace(task, evidence=[*task.evidence, f"http://{world.host}/{said}"])
    return replace(task, family="browse") if way == 3 and task.family == "lookup" else None


def duplicate(task: Task, tasks: list[Task], world: World, rng: random.Random) -> Task | None:
    """The same question again: as it is, in another frame, in other letters, or as a possessive."""
    way, question = rng.randrange(4), task.question
    if way == 0:
        return task
    if way == 1 and "```" not in question:
        spaced = question[1:].replace(" ", "  ", 2)
        return replace(task, question=f"{question[:1].upper()}{spaced} ")
    chain = re.search(r"((?:the \w+ of )+)([A-Z]\w+)(?=[?.,])", question)
    if way == 2 and chain and task.family in ("lookup", "browse", "multihop"):
        relations = re.findall(r"the (\w+) of", chain.group(1))[::-1]
        phrase = chain.group(2) + "".join(f"'s {relation}" for relation in relations)
        return replace(task, question=f"Tell me {phrase}.")
    for frame in FRAMES[world.split] if way == 3 else []:
        before, after = (re.escape(part) for part in frame.split("{np}"))
        if match := re.fullmatch(f"(?s){before}(.+?){after}(\n.*)?", question):
            other = rng.choice([f for f in FRAMES[world.split] if f != frame])
            return replace(task, question=other.format(np=match.group(1)) + (match.group(2) or ""))
    return None


def trivial(task: Task, tasks: list[Task], world: World, rng: random.Random) -> Task | None:
    """Yes-no questions, mental arithmetic, tiny counts, one search sold as several hops."""
    way, index = rng.randrange(4), rng.randrange(world.entities)
    a, b = rng.randint(2, 12), rng.randint(2, 12)
    own = replace(task, family="own", answer_type="number", meta={"template": str(way)})
    if way == 0:
        question = f"Is {world.name(index)} a {world.type(index)} of {world.host}?"
        return replace(own, question=question, answer="yes", answer_type="name")
    if way == 1:
        word, value = rng.choice([("plus", a + b), ("times", a * b), ("minus", abs(a - b))])
        question = f"What is {max(a, b)} {word} {min(a, b)}?"
        return replace(own, question=question, answer=str(value), evidence=[])
    if way == 2:
        question = f"How many capitals are on the page of {world.name(index)}?"
        return replace(own, question=question, answer="1")
    return replace(task, family="multihop") if task.family == "lookup" else None


PLANT = dict(zip(KINDS, (wrong, ambiguous, leak, duplicate, trivial)))


def planted(tasks: list[Task], world: World, rng: random.Random) -> list[tuple[str, Task]]:
    """(kind or "good", task): good tasks with bad ones among them; each is damaged at most once."""
    mixture, left = [], rng.sample(tasks, len(tasks))
    for kind in KINDS:
        count = 0
        while count < max(5, len(tasks) // 20):
            source = left.pop()
            bad = PLANT[kind](source, tasks, world, rng)
            if bad is None:
                left.insert(0, source)
                continue
            if bad.id == source.id:
                bad = replace(bad, id=f"planted{kind[0]}{rng.randrange(10**12):x}x")
            count += 1
            mixture.append((kind, bad))
            # A wrong or leaking task stands in place of the good one: as its twin it would be
            # found as a duplicate, not for what it is.
            if kind not in ("wrong", "leak"):
                mixture.append(("good", source))
    mixture += [("good", task) for task in left]
    # A duplicate comes after what it repeats; all else stands in random order.
    keys = [rng.random() + (kind == "duplicate") for kind, _ in mixture]
    return [pair for _, pair in sorted(zip(keys, mixture), key=lambda item: item[0])]


def bench(folder: Path, world: World, number: int, seed: int = 0) -> dict:
    """Draw, plant, sift; returns the figures."""
    started = time.time()
    tasks, first = make_tasks(world, folder, number, seed)
    made_s = time.time() - started
    mixture = planted(tasks, world, random.Random(seed))
    funnel, found, stages, missed = Funnel(folder), Counter(), {}, []
    for kind, task in mixture:
        if not funnel.check(task):
            found[kind] += 1
            stages.setdefault(kind, Counter())[funnel.rejects[-1]["stage"]] += 1
        elif kind != "good":
            missed.append((kind, task.question, task.answer))
    return {
        "made": number,
        "made_s": made_s,
        "first": first.table(),
        "second_s": time.time() - started - made_s,
        "stages": stages,
        "total": Counter(kind for kind, _ in mixture),
        "found": found,
        "missed": missed[:20],
        "peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
    }


def main():
    (args,) = parse_flags((Args,), __doc__)
    with tempfile.TemporaryDirectory() as folder:
        started = time.time()
        world = World(args.seed, args.entities, "test", kind="deep")
        write_world(world, folder)
        print(f"world of {args.entities} entities written in {time.time() - started:.0f} s")
        result = bench(Path(folder), world, args.number, args.seed)
    print(f"{args.number} validated tasks in {result['made_s']:.0f} s")
    print(f"what the funnel rejected of the raw draws:\n{result['first']}")
    print(f"{'planted':10s} {'tasks':>6s} {'rejected':>8s}  by stage")
    for kind in ["good"] + KINDS:
        total, stages = result["total"][kind], dict(result["stages"].get(kind, {}))
        print(f"{kind:10s} {total:6d} {result['found'][kind] / total:8.1%}  {stages}")
    print(f"peak memory {result['peak_mb']:.0f} MB; missed, at most 20:")
    print(*result["missed"], sep="\n")
    if args.json:
        Path(args.json).write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
