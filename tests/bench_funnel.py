"""Does the funnel (data/validate.py) find bad tasks, and does it leave good ones alone?

Good tasks are drawn over a fresh deep world; into them go, for each kind of damage, 5% bad ones: wrong answers, ambiguous
questions, leaks, duplicates, trivial tasks. A second funnel sees the shuffled mixture. "Good" tasks have passed a funnel once,
so good ones lost here are those that the company of others costs (repeat, near, guess); what the first pass rejects of raw
draws is printed too: there the stage `solver` must stay at zero, since every raw truth comes from the world's own facts.

    python tests/bench_funnel.py --number 10000 --json out.json
"""

import argparse
import json
import random
import re
import resource
import sys
import tempfile
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))


from data.deep.funnel import Funnel
from data.parts import FRAMES, RELATIONS, TYPES, number_relation
from data.task import Task
from data.tasks import make_tasks
from data.world import World, write_world
from reward import correct

KINDS = ["wrong", "ambiguous", "leak", "duplicate", "trivial"]


def wrong(task: Task, tasks: list[Task], world: World, rng: random.Random) -> Task | None:
    """Another answer of the same type: another task's, a near miss, or a list with an item lost."""
    answer = task.answer
    if task.answer_type == "list":
        answer = (
            answer[1:]
            if len(answer) > 1 and rng.random() < 0.5
            else answer + [world.name(rng.randrange(world.entities))]
        )
    elif task.answer_type == "number" and rng.random() < 0.5:
        answer = str(int(answer) + rng.choice([-10, -1, 1, 2, 10]))
    else:
        answer = rng.choice([t.answer for t in tasks if t.answer_type == task.answer_type])
    return (
        None
        if correct(
            ", ".join(answer) if isinstance(answer, list) else answer, task.answer, task.answer_type
        )
        else replace(task, answer=answer)
    )


def ambiguous(task: Task, tasks: list[Task], world: World, rng: random.Random) -> Task | None:
    """A question that several answers fit, with one of them; or one that says too little."""
    frame = rng.choice(FRAMES[world.split])
    way = rng.randrange(4)
    if way == 0 and task.meta["template"].startswith(
        "among"
    ):  # without its conditions but one that two candidates meet
        names = re.findall(r"[A-Z]\w+", re.search(r"among (.+?) whose", task.question).group(1))
        type = next(world.type(i) for i in range(world.entities) if world.name(i) == names[0])
        wanted, number = (
            re.search(r"the (\w+) of the one among", task.question).group(1),
            number_relation(type),
        )
        return replace(
            task,
            question=frame.format(
                np=f"the {wanted} of the one among {', '.join(names)} whose {number} is above 99"
            ),
        )
    if way == 1:  # the person whose employer is X: several are
        by_fact: dict[tuple, list] = {}
        for i in rng.sample(range(world.entities), min(world.entities, 300)):
            for relation, kind, where in RELATIONS[world.type(i)]:
                if kind in TYPES and where == "lead":
                    by_fact.setdefault(
                        (world.type(i), relation, world.entity(i).facts[relation]), []
                    ).append(i)
        type, relation, value = rng.choice(
            [key for key, group in by_fact.items() if len(group) > 1] or list(by_fact)
        )
        group = by_fact[type, relation, value]
        if len(group) > 1:
            wanted = number_relation(type)
            return replace(
                task,
                question=frame.format(np=f"the {wanted} of the {type} whose {relation} is {value}"),
                answer_type="number",
                answer=world.entity(group[0]).facts[wanted],
                evidence=[world.url(group[0])],
                family="logic",
                meta={"template": "inverse"},
            )
    if way == 2 and task.family in ("lookup", "browse"):  # the name is gone
        relation = task.meta["relations"][0]
        return replace(task, question=frame.format(np=f"the {relation} of the {rng.choice(TYPES)}"))
    if way == 3:  # a tie for the third place
        type = rng.choice([t for t in TYPES if t != "country"])
        relation, groups = number_relation(type), {}
        for number in range(world.count(type)):
            entity = world.entity(world.nth(type, number))
            groups.setdefault(int(entity.facts[relation]), []).append(entity)
        tied = [
            (value, group)
            for value, group in groups.items()
            if len(group) > 1 and value > min(groups)
        ]
        if tied:
            value, group = rng.choice(tied)
            lower, wanted = (
                rng.choice(groups[min(groups)]),
                rng.choice([r for r, kind, _ in RELATIONS[type] if kind in TYPES]),
            )
            names = [group[0].name, group[1].name, lower.name]
            return replace(
                task,
                question=frame.format(
                    np=f"the {wanted} of the one with the second greatest {relation} among {', '.join(names[:2])} and {names[2]}"
                ),
                answer=group[1].facts[wanted],
                answer_type="name",
                evidence=[e.name and world.url(e.index) for e in (*group[:2], lower)],
                family="algorithmic",
                meta={"template": "rank"},
            )
    return None


def leak(task: Task, tasks: list[Task], world: World, rng: random.Random) -> Task | None:
    """The answer shows in the question, the id or an address; or a browse task whose fact shows in a snippet."""
    said = ", ".join(task.answer) if isinstance(task.answer, list) else task.answer
    way = rng.randrange(4)
    if way == 0:
        return replace(
            task,
            question=f"{task.question} ({rng.choice(['Hint', 'Known', 'Not to be confused with'])}: {said})",
        )
    if way == 1:
        return replace(task, id=f"{task.family}-{said}-{rng.randrange(10**6)}")
    if way == 2 and task.evidence and task.answer_type == "name":
        return replace(task, evidence=[*task.evidence, f"http://{world.host}/{said}"])
    return replace(task, family="browse") if way == 3 and task.family == "lookup" else None


def duplicate(task: Task, tasks: list[Task], world: World, rng: random.Random) -> Task | None:
    """The same question again: as it is, in another frame, in other letters, or as a possessive."""
    way = rng.randrange(4)
    if way == 0:
        return task
    if way == 1 and "```" not in task.question:
        return replace(
            task, question=task.question.upper()[:1] + task.question[1:].replace(" ", "  ", 2) + " "
        )
    chain = re.search(r"((?:the \w+ of )+)([A-Z]\w+)(?=[?.,])", task.question)
    if way == 2 and chain and task.family in ("lookup", "browse", "multihop"):
        relations = re.findall(r"the (\w+) of", chain.group(1))[::-1]
        return replace(
            task, question="Tell me " + chain.group(2) + "".join(f"'s {r}" for r in relations) + "."
        )
    for frame in FRAMES[world.split] if way == 3 else []:
        before, after = (re.escape(part) for part in frame.split("{np}"))
        if match := re.fullmatch(f"(?s){before}(.+?){after}(\n.*)?", task.question):
            other = rng.choice([f for f in FRAMES[world.split] if f != frame])
            return replace(task, question=other.format(np=match.group(1)) + (match.group(2) or ""))
    return None


def trivial(task: Task, tasks: list[Task], world: World, rng: random.Random) -> Task | None:
    """Yes-no questions, mental arithmetic, tiny counts, one search sold as several hops."""
    way, index = rng.randrange(4), rng.randrange(world.entities)
    a, b = rng.randint(2, 12), rng.randint(2, 12)
    if way == 0:
        return replace(
            task,
            question=f"Is {world.name(index)} a {world.type(index)} of {world.host}?",
            answer="yes",
            answer_type="name",
            family="own",
            meta={"template": "yes"},
        )
    if way == 1:
        word, value = rng.choice([("plus", a + b), ("times", a * b), ("minus", abs(a - b))])
        return replace(
            task,
            question=f"What is {max(a, b)} {word} {min(a, b)}?",
            answer=str(value),
            answer_type="number",
            family="own",
            evidence=[],
            meta={"template": "sums"},
        )
    if way == 2:
        return replace(
            task,
            question=f"How many capitals are on the page of {world.name(index)}?",
            answer="1",
            answer_type="number",
            family="own",
            meta={"template": "tiny"},
        )
    return replace(task, family="multihop") if task.family == "lookup" else None


PLANT = dict(zip(KINDS, (wrong, ambiguous, leak, duplicate, trivial)))


def bench(folder: Path, world: World, number: int, seed: int = 0) -> dict:
    """Draw, plant, sift; returns the figures."""
    started = time.time()
    tasks, first = make_tasks(world, folder, number, seed)
    made_s = time.time() - started
    rng, mixture = random.Random(seed), []
    left = rng.sample(tasks, len(tasks))  # each good task is damaged at most once
    for kind in KINDS:
        planted = 0
        while planted < max(5, number // 20):
            source = left.pop()
            bad = PLANT[kind](source, tasks, world, rng)
            if bad is None:
                left.insert(0, source)
                continue
            if bad.id == source.id:
                bad = replace(bad, id=f"planted{kind[0]}{rng.randrange(10**12):x}x")
            planted += 1
            mixture.append((kind, bad))
            if (
                kind not in ("wrong", "leak")
            ):  # those stand in place of the good one: twins would be found as duplicates, not for what they are
                mixture.append(("good", source))
    mixture += [("good", task) for task in left]
    # a duplicate comes after what it repeats; all else in random order
    order = {id(task): rng.random() + (1 if kind == "duplicate" else 0) for kind, task in mixture}
    mixture.sort(key=lambda pair: order[id(pair[1])])
    funnel, found, stages = Funnel(folder), Counter(), {}
    for kind, task in mixture:
        if not funnel.check(task):
            found[kind] += 1
            stages.setdefault(kind, Counter())[funnel.rejects[-1]["stage"]] += 1
    total = Counter(kind for kind, _ in mixture)
    return {
        "made": number,
        "made_s": made_s,
        "first": first.table(),
        "second_s": time.time() - started - made_s,
        "stages": stages,
        "total": total,
        "found": found,
        "missed": [
            (k, t.question, t.answer)
            for k, t in mixture
            if k != "good" and t.id not in {r["task"]["id"] for r in funnel.rejects}
        ][:20],
        "peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
    }


def main():
    parser = argparse.ArgumentParser(description="Plant bad tasks and see what the funnel finds.")
    parser.add_argument("--number", type=int, default=2000, help="good tasks to draw")
    parser.add_argument("--entities", type=int, default=5000, help="size of the fresh deep world")
    parser.add_argument("--seed", type=int, default=21, help="decides world, tasks and damage")
    parser.add_argument("--json", default="", help="file for the figures")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        started = time.time()
        world = World(args.seed, args.entities, "test", kind="deep")
        write_world(world, folder)
        print(f"world of {args.entities} entities written in {time.time() - started:.0f} s")
        result = bench(Path(folder), world, args.number, args.seed)
    print(
        f"{args.number} validated tasks in {result['made_s']:.0f} s; what the funnel rejected of the raw draws:\n{result['first']}"
    )
    print(f"{'planted':10s} {'tasks':>6s} {'rejected':>8s}  by stage")
    for kind in ["good"] + KINDS:
        print(
            f"{kind:10s} {result['total'][kind]:6d} {result['found'][kind] / result['total'][kind]:8.1%}  {dict(result['stages'].get(kind, {}))}"
        )
    print(
        f"peak memory {result['peak_mb']:.0f} MB; missed, at most 20:", *result["missed"], sep="\n"
    )
    if args.json:
        Path(args.json).write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
