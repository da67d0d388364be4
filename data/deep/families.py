"""The task families of deep worlds, and pure mathematics and code: generators that know the truth from the world's functions.

    collection   walk a catalogue of 200 and more entries to its end; level 3 opens every entry
    conflict     notices contradict each other; the rule stands on a page of its own; retractions on other notices
    compute      arithmetic over two to four facts (levels 2 and 3; level 1 is in data/tasks.py)
    logic        the one that meets one to three conditions, among those named or in the whole world
    algorithmic  shortest ways, order by a number, days of festivals without overlap
    math, code   no page helps: `python` is needed

Each generator is `(world, level, rng) -> Draft`. WORDINGS gives each form several wordings; the last is held out: only
test tasks use it. The second solver (data/solve.py) shares nothing with this file.
To try an idea, add a form to WORDINGS, a branch here, and a function to data/solve.py.
"""

import math
import random
from collections import deque
from dataclasses import dataclass, field

from data.deep import pages as deep
from data.world import RELATIONS, TYPES

WORDINGS = {
    "extreme": [
        "the entry with the {word} price in the catalogue of {x}",
        "the {word} price's entry in the catalogue of {x}",
        "the entry of {word} price in {x}'s catalogue",
    ],
    "list": [
        "all {word} entries in the catalogue of {x}",
        "every {word} entry of the catalogue of {x}",
        "the {word} entries in {x}'s catalogue",
    ],
    "count": [
        "the number of {word} entries in the catalogue of {x}",
        "the count of {word} entries in the catalogue of {x}",
        "the number of {word} entries in {x}'s catalogue",
    ],
    "total": [
        "the total price of the {word} entries in the catalogue of {x}",
        "the total price of all {word} entries of the catalogue of {x}",
        "the total price of the {word} entries in {x}'s catalogue",
    ],
    "visit": [
        "the number of entries that are a {word} in the catalogue of {x}",
        "the count of entries that are a {word} in the catalogue of {x}",
        "the number of entries that are a {word} in {x}'s catalogue",
    ],
    "valid": ["the valid {word} of {x}", "the {word} that is valid for {x}"],
    "date": ["the date of the valid notice on {x}", "the date on the valid notice on {x}"],
    "digits": [
        "the sum of the digits of the product of these numbers: {x}",
        "the digits of the product of these numbers, added up: {x}",
    ],
    "average": [
        "the average of these numbers, rounded down: {x}",
        "the average, without its fraction, of these numbers: {x}",
    ],
    "squares": [
        "the sum of the squares of these numbers: {x}",
        "the squares of these numbers, added up: {x}",
    ],
    "among": ["the {word} of the one among {x} whose {y}"],
    "inverse": ["the {word} of the {x} whose {y}"],
    "way": [
        "the length of the shortest way by road from {x} to {y}",
        "the miles of the shortest journey by road from {x} to {y}",
    ],
    "cities": [
        "the cities between on the shortest way by road from {x} to {y}",
        "the cities passed on the shortest journey by road from {x} to {y}",
    ],
    "rank": ["the {word} of the one with the {y} among {x}"],
    "schedule": [
        "the most days at whole festivals that do not overlap, among {x}",
        "the largest number of days at whole festivals without overlap, among {x}",
    ],
    "power": [
        "the sum of the digits of {x} to the power of {y}",
        "the digits of {x} to the power of {y}, added up",
    ],
    "modulo": [
        "the remainder of {x} to the power of {y} divided by {word}",
        "the remainder that {x} to the power of {y} leaves when divided by {word}",
    ],
    "divisible": [
        "the number of integers from {x} to {y} that are divisible by {word}",
        "the count of integers from {x} to {y} divisible by {word}",
    ],
    "primes": ["the sum of all primes from {x} to {y}", "the total of the primes from {x} to {y}"],
    "program": ["the output of the program below", "the line that the program below prints"],
}


@dataclass
class Draft:
    form: str
    slots: dict  # what the wording's {x}, {y}, {word} become
    answer: str | list[str]
    answer_type: str
    paths: list[str] = field(default_factory=list)  # pages that hold the answer
    suffix: str = ""  # after the question


def names_list(names: list[str]) -> str:
    return f"{', '.join(names[:-1])} and {names[-1]}"


def pick(world, rng: random.Random, suits, hops: int) -> tuple[str, int, list[str]]:
    """A random entity that suits, as a noun phrase: its name, or (hops 1) "the employer of X". Also the pages on the way."""
    for _ in range(100_000):
        index = rng.randrange(world.entities)
        start = world.entity(index)
        if hops:
            relation = rng.choice(
                [
                    r
                    for r, _, where in RELATIONS[start.type]
                    if where == "lead" and r in start.targets
                ]
            )
            index = start.targets[relation]
        if suits(index):
            return (
                (f"the {relation} of {start.name}", index, [start.name])
                if hops
                else (start.name, index, [])
            )
    raise ValueError("no entity of this world suits: use a larger world")


def several(world, type: str, count: int, rng: random.Random) -> list:
    """Distinct entities of a type."""
    return [
        world.entity(world.nth(type, number))
        for number in rng.sample(range(world.count(type)), count)
    ]


def number_relation(type: str) -> str:
    return next(r for r, kind, where in RELATIONS[type] if kind == "number" and where == "lead")


def collection(world, level: int, rng: random.Random) -> Draft:
    last_keeper = world.nth("company", deep.catalogues(world) - 1)
    phrase, keeper, path = pick(
        world,
        rng,
        lambda i: world.type(i) == "company" and i <= last_keeper,
        hops=int(rng.random() < 0.3),
    )
    number = world.position(keeper)
    entries, path = deep.catalogue(world, number), path + deep.catalogue_paths(world, number)
    form = {1: rng.choice(["extreme", "list"]), 2: rng.choice(["count", "total"]), 3: "visit"}[
        level
    ]
    word = {
        "extreme": rng.choice(["greatest", "smallest"]),
        "list": deep.RARE_COLOUR,
        "visit": rng.choice(TYPES),
    }.get(form) or rng.choice(deep.COLOURS)
    if form == "extreme":
        answer = world.name(
            sorted(entries, key=lambda entry: entry[2])[-1 if word == "greatest" else 0][0]
        )
    elif form == "visit":
        answer, path = (
            str(sum(world.type(i) == word for i, _, _ in entries)),
            path + [world.name(i) for i, _, _ in entries],
        )
    else:
        chosen = [entry for entry in entries if entry[1] == word]
        answer = {
            "list": [world.name(i) for i, _, _ in chosen],
            "count": str(len(chosen)),
            "total": str(sum(price for _, _, price in chosen)),
        }[form]
    kind = "list" if form == "list" else "name" if form == "extreme" else "number"
    return Draft(form, {"x": phrase, "word": word}, answer, kind, path)


def conflict(world, level: int, rng: random.Random) -> Draft:
    """Level 1: the rule alone; 2: a notice is retracted; 3: and the subject is one hop away."""

    def suits(index: int) -> bool:
        found = deep.notices(world, index)
        return bool(found) and any(notice["retracts"] for notice in found) == (level > 1)

    phrase, index, path = pick(world, rng, suits, hops=int(level == 3))
    valid = deep.notices(world, index)[deep.valid_notice(world, index)]
    form = rng.choice(["valid", "valid", "date"])
    kind = "date" if form == "date" else "number" if valid["value"].isdigit() else "name"
    path += [world.name(index), "rules"] + [
        f"{world.name(index)}-notice-{n + 1}" for n in range(len(deep.notices(world, index)))
    ]
    return Draft(
        form,
        {"x": phrase, "word": deep.disputed(world, index)},
        valid["date" if form == "date" else "value"],
        kind,
        path,
    )


def compute(world, level: int, rng: random.Random) -> Draft:
    """Level 2: two or three facts of named entities; 3: three or four, each of them one hop away."""
    phrases, numbers, paths = [], [], []
    for _ in range(rng.choice([2, 3]) + level - 2):
        phrase, index, path = pick(world, rng, lambda _: True, hops=int(level == 3))
        relation = number_relation(world.type(index))
        phrases.append(f"the {relation} of {phrase}")
        numbers.append(int(world.entity(index).facts[relation]))
        paths += path + [world.name(index)]
    form = rng.choice(["digits", "average", "squares"])
    answer = {
        "digits": sum(map(int, str(math.prod(numbers)))),
        "average": sum(numbers) // len(numbers),
        "squares": sum(n**2 for n in numbers),
    }[form]
    return Draft(form, {"x": names_list(phrases)}, str(answer), "number", paths)


def logic(world, level: int, rng: random.Random) -> Draft:
    """`level` conditions that one of the candidates meets: chosen true of it, until no other candidate is left."""
    type = rng.choice([t for t in TYPES if t != "country"])
    relations = RELATIONS[type]
    number, names = number_relation(type), [r for r, kind, _ in relations if kind in TYPES]
    if (
        level < 3 and rng.random() < 0.5
    ):  # in the whole world: the search engine has to be asked backwards
        hero = several(world, type, 1, rng)[0]
        used = rng.sample(names, level)
        wanted = rng.choice([r for r, _, _ in relations if r not in used])
        conditions = " and whose ".join(f"{r} is {hero.facts[r]}" for r in used)
        return Draft(
            "inverse",
            {"word": wanted, "x": type, "y": conditions},
            hero.facts[wanted],
            "number" if hero.facts[wanted].isdigit() else "name",
            [hero.name],
        )
    while True:
        *group, other = several(world, type, 3 + level, rng)
        hero, rest = rng.choice(group), list(group)
        conditions = []
        years = [
            r for r, kind, _ in relations if kind == "year" or (kind == "number" and r != number)
        ]
        for relation in rng.sample([number] + years + names[:1], min(level, 2 + len(years))):
            fact = hero.facts[relation]
            if not fact.isdigit():
                conditions.append(
                    f"{relation} is not {rng.choice([e for e in group if e is not hero]).facts[relation]}"
                )
                rest = [e for e in rest if e.facts[relation] != conditions[-1].split()[-1]]
            elif level == 3 and relation == number and int(fact) > int(other.facts[relation]):
                conditions.append(f"{relation} is above that of {other.name}")
                rest = [e for e in rest if int(e.facts[relation]) > int(other.facts[relation])]
            else:
                bound, above = int(fact) + rng.choice([-1, 1]) * rng.randint(1, 150), None
                above = int(fact) > bound
                conditions.append(f"{relation} is {'above' if above else 'below'} {bound}")
                rest = [
                    e
                    for e in rest
                    if (int(e.facts[relation]) > bound) == above and int(e.facts[relation]) != bound
                ]
        if rest == [hero]:
            break
    wanted = rng.choice([r for r in names if f"{r} is" not in " ".join(conditions)])
    return Draft(
        "among",
        {
            "word": wanted,
            "x": names_list([e.name for e in group]),
            "y": " and whose ".join(conditions),
        },
        hero.facts[wanted],
        "name",
        [e.name for e in group],
    )


def algorithmic(world, level: int, rng: random.Random) -> Draft:
    form = rng.choice(["way", "cities", "rank", "schedule"])
    if form == "rank":
        type = rng.choice([t for t in TYPES if t != "country"])
        group, relation, place = (
            several(world, type, 3 + 2 * level, rng),
            number_relation(type),
            rng.randint(1, 3),
        )
        ordered = sorted(group, key=lambda e: -int(e.facts[relation]))
        wanted = rng.choice([r for r, kind, _ in RELATIONS[type] if kind in TYPES])
        return Draft(
            "rank",
            {
                "word": wanted,
                "y": f"{['second', 'third', 'fourth'][place - 1]} greatest {relation}",
                "x": names_list([e.name for e in group]),
            },
            ordered[place].facts[wanted],
            "name",
            [e.name for e in group],
        )
    if form == "schedule":
        group = several(world, "festival", 4 + 2 * level, rng)
        best = {
            0: 0
        }  # last day -> most days that end by then: the classical weighted interval scheduling
        for first, last in sorted(
            (deep.days(world, e.index) for e in group), key=lambda span: span[1]
        ):
            best[last] = max(
                max(best.values()),
                last - first + 1 + max(days for end, days in best.items() if end < first),
            )
        return Draft(
            "schedule",
            {"x": names_list([e.name for e in group])},
            str(max(best.values())),
            "number",
            [e.name for e in group],
        )
    phrase, start, paths = pick(
        world,
        rng,
        lambda i: world.type(i) == "city" and world.position(i) is not None,
        hops=int(level == 3),
    )
    goal, bound = start, 0
    for _ in range(level + 1):  # a random walk gives the goal and a bound
        goal, miles = rng.choice(list(deep.roads(world, goal).items()))
        bound += miles
    if goal == start:
        return algorithmic(world, level, rng)
    labels, routes, queue = (
        {start: 0},
        {start: []},
        deque([start]),
    )  # label correcting, cut off at the bound
    while queue:
        city = queue.popleft()
        for other, miles in deep.roads(world, city).items():
            if labels[city] + miles < min(labels.get(other, math.inf), bound + 1):
                labels[other], routes[other] = labels[city] + miles, routes[city] + [other]
                queue.append(other)
    route = [world.name(i) for i in routes[goal]]
    if form == "cities" and len(route) < 2:
        return algorithmic(world, level, rng)
    answer = [*route[:-1]] if form == "cities" else str(labels[goal])
    return Draft(
        form,
        {"x": phrase, "y": world.name(goal)},
        answer,
        "list" if form == "cities" else "number",
        paths + [world.name(start)] + route,
    )


def mathematics(world, level: int, rng: random.Random) -> Draft:
    size = 10 ** (level + 1)
    form = rng.choice(["power", "modulo", "divisible", "primes"])
    x, y, m = rng.randint(3, 99), rng.randint(size // 10, size), rng.randint(101, 9999)
    if form == "power":
        y = rng.randint(10, 60 * level)
        return Draft(form, {"x": x, "y": y}, str(sum(map(int, str(x**y)))), "number")
    if form == "modulo":
        return Draft(form, {"x": x, "y": y, "word": m}, str(pow(x, y, m)), "number")
    start = rng.randint(1, 20 * size)
    if form == "divisible":
        a, b = rng.randint(3, 19), rng.randint(3, 19)
        upto = lambda n: n // a - n // math.lcm(a, b)
        end = start + rng.randint(size, 20 * size)
        return Draft(
            form,
            {"x": start, "y": end, "word": f"{a} but not by {b}"},
            str(upto(end) - upto(start - 1)),
            "number",
        )
    end = start + rng.randint(20, size)
    sieve = bytearray([1]) * (end + 1)
    for p in range(2, math.isqrt(end) + 1):
        sieve[p * p :: p] = bytes(len(range(p * p, end + 1, p)))
    return Draft(
        form,
        {"x": start, "y": end},
        str(sum(k for k in range(max(2, start), end + 1) if sieve[k])),
        "number",
    )


def program(world, level: int, rng: random.Random) -> Draft:
    """A short program; the truth comes from another way to compute the same."""
    n, a, b, m = (
        rng.randint(20, 10 ** (level + 1)),
        rng.randint(2, 9),
        rng.randint(3, 97),
        rng.randint(101, 9999),
    )
    kind = rng.choice(["sum", "recurrence", "sort", "digits"])
    if kind == "sum":
        text = (
            f"t = 0\nfor i in range({n}):\n    if i % {a} == 1:\n        t += i * i\nprint(t % {m})"
        )
        answer = sum(k * k for k in range(1, n, a)) % m
    elif kind == "recurrence":
        text = f"x = {b}\nfor i in range({n}):\n    x = ({a} * x + {b}) % {m}\nprint(x)"
        multiplier, shift, (c, d), k = 1, 0, (a, b), n  # x -> c x + d, composed by squaring
        while k:
            if k % 2:
                multiplier, shift = multiplier * c % m, (c * shift + d) % m
            c, d, k = c * c % m, (c * d + d) % m, k // 2
        answer = (multiplier * b + shift) % m
    elif kind == "sort":
        text = f"v = [({b} * i * i + {a}) % {m} for i in range({n})]\nv.sort()\nprint(v[{n // 3}])"
        heap = sorted(((b * i * i + a) % m for i in range(n)), reverse=True)
        answer = heap[n - 1 - n // 3]
    else:
        text = f"s = 0\nfor i in range({n}):\n    for c in str(i * {b}):\n        s += int(c) * (i % {a})\nprint(s)"
        digits = lambda k: k % 10 + digits(k // 10) if k else 0
        answer = sum(digits(i * b) * (i % a) for i in range(n))
    return Draft("program", {}, str(answer), "number", suffix=f"\n```python\n{text}\n```")


FAMILIES = {
    "collection": collection,
    "conflict": conflict,
    "compute": compute,
    "logic": logic,
    "algorithmic": algorithmic,
    "math": mathematics,
    "code": program,
}
NEED_DEEP = {"collection", "conflict", "algorithmic"}  # their pages stand in deep worlds only
