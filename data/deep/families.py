"""The task families of deep worlds, and pure mathematics and code: generators that know the truth
from the world's functions.

    collection   walk a catalogue of 200 and more entries to its end; level 3 opens every entry
    conflict     notices contradict each other; the rule stands on a page of its own; some notices
                 retract others
    compute      arithmetic over two to four facts (levels 2 and 3; level 1 is in data/tasks.py)
    logic        the one that meets one to three conditions, among those named or in the whole world
    algorithmic  shortest ways, order by a number, days of festivals without overlap
    math, code   no page helps: `python` is needed

Each generator is `(world, level, rng) -> Draft`. WORDINGS gives each form several wordings; the
last is held out: only test tasks use it. The second solver (data/deep/solve.py) shares nothing with
this file. To try an idea, add a form to WORDINGS, a branch here, and a function to the solver.
"""

import math
import random
from collections import deque
from dataclasses import dataclass, field

from data.deep import pages as deep
from data.parts import LEAD, RELATIONS, TYPES, number_relation

# form of the question, and one of its wordings; the last wording of a form is held out
_WORDINGS = """
extreme   the entry with the {word} price in the catalogue of {x}
extreme   the {word} price's entry in the catalogue of {x}
extreme   the entry of {word} price in {x}'s catalogue
list      all {word} entries in the catalogue of {x}
list      every {word} entry of the catalogue of {x}
list      the {word} entries in {x}'s catalogue
count     the number of {word} entries in the catalogue of {x}
count     the count of {word} entries in the catalogue of {x}
count     the number of {word} entries in {x}'s catalogue
total     the total price of the {word} entries in the catalogue of {x}
total     the total price of all {word} entries of the catalogue of {x}
total     the total price of the {word} entries in {x}'s catalogue
visit     the number of entries that are a {word} in the catalogue of {x}
visit     the count of entries that are a {word} in the catalogue of {x}
visit     the number of entries that are a {word} in {x}'s catalogue
valid     the valid {word} of {x}
valid     the {word} that is valid for {x}
date      the date of the valid notice on {x}
date      the date on the valid notice on {x}
digits    the sum of the digits of the product of these numbers: {x}
digits    the digits of the product of these numbers, added up: {x}
average   the average of these numbers, rounded down: {x}
average   the average, without its fraction, of these numbers: {x}
squares   the sum of the squares of these numbers: {x}
squares   the squares of these numbers, added up: {x}
among     the {word} of the one among {x} whose {y}
inverse   the {word} of the {x} whose {y}
way       the length of the shortest way by road from {x} to {y}
way       the miles of the shortest journey by road from {x} to {y}
cities    the cities between on the shortest way by road from {x} to {y}
cities    the cities passed on the shortest journey by road from {x} to {y}
rank      the {word} of the one with the {y} among {x}
schedule  the most days at whole festivals that do not overlap, among {x}
schedule  the largest number of days at whole festivals without overlap, among {x}
power     the sum of the digits of {x} to the power of {y}
power     the digits of {x} to the power of {y}, added up
modulo    the remainder of {x} to the power of {y} divided by {word}
modulo    the remainder that {x} to the power of {y} leaves when divided by {word}
divisible the number of integers from {x} to {y} that are divisible by {word}
divisible the count of integers from {x} to {y} divisible by {word}
primes    the sum of all primes from {x} to {y}
primes    the total of the primes from {x} to {y}
program   the output of the program below
program   the line that the program below prints
"""
WORDINGS: dict[str, list[str]] = {}
for _line in _WORDINGS.strip().splitlines():
    _form, _wording = _line.split(maxsplit=1)
    WORDINGS.setdefault(_form, []).append(_wording)


@dataclass
class Draft:
    form: str
    slots: dict  # what the wording's {x}, {y}, {word} become
    answer: str | list[str]
    paths: list[str] = field(default_factory=list)  # pages that hold the answer
    suffix: str = ""  # after the question


def names_list(names: list[str]) -> str:
    return f"{', '.join(names[:-1])} and {names[-1]}"


def names_of(entities: list) -> list[str]:
    return [entity.name for entity in entities]


def entity_relations(type: str) -> list[str]:
    """The relations of a type whose values are names."""
    return [relation for relation, kind in RELATIONS[type].items() if kind in TYPES]


def pick(world, rng: random.Random, suits, hops: int) -> tuple[str, int, list[str]]:
    """A random entity that suits.

    Args:
        suits: function from an entity's index to whether it will do.
        hops: 0 to name the entity itself, 1 for "the employer of X".

    Returns:
        Its noun phrase, its index, and the paths of the pages on the way to it.
    """
    for _ in range(100_000):
        index = rng.randrange(world.entities)
        start = world.entity(index)
        phrase, path = start.name, []
        if hops:
            relation = rng.choice([r for r in LEAD[start.type] if r in start.targets])
            index = start.targets[relation]
            phrase, path = f"the {relation} of {start.name}", [start.name]
        if suits(index):
            return phrase, index, path
    raise ValueError("no entity of this world suits: use a larger world")


def several(world, type: str, count: int, rng: random.Random) -> list:
    """Distinct entities of a type."""
    if count > world.count(type):
        raise ValueError(f"this world has no {count} entities of type {type}: use a larger world")
    numbers = rng.sample(range(world.count(type)), count)
    return [world.entity(world.nth(type, number)) for number in numbers]


def collection(world, level: int, rng: random.Random) -> Draft:
    last_keeper = world.nth("company", deep.catalogues(world) - 1)

    def keeps_one(index: int) -> bool:
        return world.type(index) == "company" and index <= last_keeper

    phrase, keeper, path = pick(world, rng, keeps_one, hops=int(rng.random() < 0.3))
    number = world.position(keeper)
    entries, path = deep.catalogue(world, number), path + deep.catalogue_paths(world, number)
    forms = {1: rng.choice(["extreme", "list"]), 2: rng.choice(["count", "total"]), 3: "visit"}
    form = forms[level]
    # Each of these words is drawn, whichever form uses its own.
    words = {
        "extreme": rng.choice(["greatest", "smallest"]),
        "list": deep.RARE_COLOUR,
        "visit": rng.choice(TYPES),
    }
    word = words.get(form) or rng.choice(deep.COLOURS)
    chosen = [entry for entry in entries if entry[1] == word]
    if form == "extreme":
        by_price = sorted(entries, key=lambda entry: entry[2])
        answer = world.name(by_price[-1 if word == "greatest" else 0][0])
    elif form == "visit":
        answer = str(sum(world.type(i) == word for i, _, _ in entries))
        path = path + [world.name(i) for i, _, _ in entries]
    elif form == "list":
        answer = [world.name(i) for i, _, _ in chosen]
    elif form == "count":
        answer = str(len(chosen))
    else:
        answer = str(sum(price for _, _, price in chosen))
    return Draft(form, {"x": phrase, "word": word}, answer, path)


def conflict(world, level: int, rng: random.Random) -> Draft:
    """Level 1: the rule alone; 2: a notice is retracted; 3: and the subject is one hop away."""

    def suits(index: int) -> bool:
        found = deep.notices(world, index)
        return bool(found) and any(notice["retracts"] for notice in found) == (level > 1)

    phrase, index, path = pick(world, rng, suits, hops=int(level == 3))
    name, found = world.name(index), deep.notices(world, index)
    valid = deep.valid_notice(world, index)
    form = rng.choice(["valid", "valid", "date"])
    path += [name, "rules"] + [f"{name}-notice-{n + 1}" for n in range(len(found))]
    slots = {"x": phrase, "word": deep.disputed(world, index)}
    return Draft(form, slots, valid["date" if form == "date" else "value"], path)


def compute(world, level: int, rng: random.Random) -> Draft:
    """Level 2: two or three facts of named entities; 3: three or four, each one hop away."""
    phrases, numbers, paths = [], [], []
    for _ in range(rng.choice([2, 3]) + level - 2):
        phrase, index, path = pick(world, rng, lambda _: True, hops=int(level == 3))
        relation = number_relation(world.type(index))
        phrases.append(f"the {relation} of {phrase}")
        numbers.append(int(world.entity(index).facts[relation]))
        paths += path + [world.name(index)]
    form = rng.choice(["digits", "average", "squares"])
    answers = {
        "digits": sum(map(int, str(math.prod(numbers)))),
        "average": sum(numbers) // len(numbers),
        "squares": sum(n**2 for n in numbers),
    }
    return Draft(form, {"x": names_list(phrases)}, str(answers[form]), paths)


def logic(world, level: int, rng: random.Random) -> Draft:
    """`level` conditions that one entity alone meets."""
    type = rng.choice([t for t in TYPES if t != "country"])
    if level < 3 and rng.random() < 0.5:
        return inverse(world, level, rng, type)
    return among(world, level, rng, type)


def inverse(world, level: int, rng: random.Random, type: str) -> Draft:
    """The one in the whole world: the search engine has to be asked backwards."""
    hero = several(world, type, 1, rng)[0]
    used = rng.sample(entity_relations(type), level)
    wanted = rng.choice([r for r in RELATIONS[type] if r not in used])
    conditions = " and whose ".join(f"{r} is {hero.facts[r]}" for r in used)
    slots = {"word": wanted, "x": type, "y": conditions}
    return Draft("inverse", slots, hero.facts[wanted], [hero.name])


def among(world, level: int, rng: random.Random, type: str) -> Draft:
    """The one among some that are named. Conditions that hold for it are drawn until they leave no
    other."""
    number, names = number_relation(type), entity_relations(type)
    other_numbers = [r for r in RELATIONS[type] if r not in [*names, number]]
    usable = [number] + other_numbers + names[:1]
    rest, hero = [], None
    while rest != [hero]:
        *group, other = several(world, type, 3 + level, rng)
        hero, rest, conditions = rng.choice(group), list(group), []
        for relation in rng.sample(usable, min(level, 2 + len(other_numbers))):
            condition, rest = narrow(relation, hero, group, rest, other, number, level, rng)
            conditions.append(condition)
    said = " and whose ".join(conditions)
    wanted = rng.choice([r for r in names if f"{r} is" not in said])
    slots = {"word": wanted, "x": names_list(names_of(group)), "y": said}
    return Draft("among", slots, hero.facts[wanted], names_of(group))


def narrow(relation: str, hero, group: list, rest: list, other, number: str, level: int, rng):
    """A condition on this relation that holds for the hero, and those of the rest that meet it."""
    fact = hero.facts[relation]
    if not fact.isdigit():
        value = rng.choice([e for e in group if e is not hero]).facts[relation]
        return f"{relation} is not {value}", [e for e in rest if e.facts[relation] != value]
    values = {e.name: int(e.facts[relation]) for e in [*group, other]}
    if level == 3 and relation == number and int(fact) > values[other.name]:
        condition = f"{relation} is above that of {other.name}"
        return condition, [e for e in rest if values[e.name] > values[other.name]]
    bound = int(fact) + rng.choice([-1, 1]) * rng.randint(1, 150)
    if int(fact) > bound:
        return f"{relation} is above {bound}", [e for e in rest if values[e.name] > bound]
    return f"{relation} is below {bound}", [e for e in rest if values[e.name] < bound]


def algorithmic(world, level: int, rng: random.Random) -> Draft:
    makers, draft = {"way": way, "cities": way, "rank": rank, "schedule": schedule}, None
    while draft is None:
        form = rng.choice(list(makers))
        draft = makers[form](world, level, rng, form)
    return draft


def rank(world, level: int, rng: random.Random, form: str) -> Draft:
    """A fact about the second, third or fourth of some entities in the order of a number."""
    type = rng.choice([t for t in TYPES if t != "country"])
    group, relation = several(world, type, 3 + 2 * level, rng), number_relation(type)
    place = rng.randint(1, 3)
    ordered = sorted(group, key=lambda e: -int(e.facts[relation]))
    wanted = rng.choice(entity_relations(type))
    order = f"{['second', 'third', 'fourth'][place - 1]} greatest {relation}"
    slots = {"word": wanted, "y": order, "x": names_list(names_of(group))}
    return Draft(form, slots, ordered[place].facts[wanted], names_of(group))


def schedule(world, level: int, rng: random.Random, form: str) -> Draft:
    """Weighted interval scheduling: the most days at festivals that do not overlap."""
    group = several(world, "festival", 4 + 2 * level, rng)
    best = {0: 0}  # last day -> most days that end by then
    spans = [deep.days(world, e.index) for e in group]
    for first, last in sorted(spans, key=lambda span: span[1]):
        before = max(days for end, days in best.items() if end < first)
        best[last] = max(max(best.values()), last - first + 1 + before)
    slots = {"x": names_list(names_of(group))}
    return Draft(form, slots, str(max(best.values())), names_of(group))


def way(world, level: int, rng: random.Random, form: str) -> Draft | None:
    """The shortest way by road, its length or its cities; None if it came out too short."""

    def has_roads(index: int) -> bool:
        return world.type(index) == "city" and world.position(index) is not None

    phrase, start, paths = pick(world, rng, has_roads, hops=int(level == 3))
    goal, bound = start, 0
    for _ in range(level + 1):  # a random walk gives the goal, and a bound on the shortest way
        goal, miles = rng.choice(list(deep.roads(world, goal).items()))
        bound += miles
    if goal == start:
        return None
    miles, route = shortest_way(world, start, goal, bound)
    if form == "cities" and len(route) < 2:
        return None
    names = [world.name(i) for i in route]
    slots = {"x": phrase, "y": world.name(goal)}
    answer = names[:-1] if form == "cities" else str(miles)
    return Draft(form, slots, answer, paths + [world.name(start)] + names)


def shortest_way(world, start: int, goal: int, bound: int) -> tuple[int, list[int]]:
    """Miles and cities (without the start) of the shortest way: label correcting up to a bound."""
    labels, routes, queue = {start: 0}, {start: []}, deque([start])
    while queue:
        city = queue.popleft()
        for other, miles in deep.roads(world, city).items():
            if labels[city] + miles < min(labels.get(other, math.inf), bound + 1):
                labels[other], routes[other] = labels[city] + miles, routes[city] + [other]
                queue.append(other)
    return labels[goal], routes[goal]


def mathematics(world, level: int, rng: random.Random) -> Draft:
    size = 10 ** (level + 1)
    form = rng.choice(["power", "modulo", "divisible", "primes"])
    x, y, m = rng.randint(3, 99), rng.randint(size // 10, size), rng.randint(101, 9999)
    if form == "power":
        y = rng.randint(10, 60 * level)
        return Draft(form, {"x": x, "y": y}, str(sum(map(int, str(x**y)))))
    if form == "modulo":
        return Draft(form, {"x": x, "y": y, "word": m}, str(pow(x, y, m)))
    start = rng.randint(1, 20 * size)
    if form == "divisible":
        a, b = rng.randint(3, 19), rng.randint(3, 19)
        end = start + rng.randint(size, 20 * size)
        up_to_start, up_to_end = (n // a - n // math.lcm(a, b) for n in (start - 1, end))
        slots = {"x": start, "y": end, "word": f"{a} but not by {b}"}
        return Draft(form, slots, str(up_to_end - up_to_start))
    end = start + rng.randint(20, size)
    sieve = bytearray([1]) * (end + 1)
    for p in range(2, math.isqrt(end) + 1):
        sieve[p * p :: p] = bytes(len(range(p * p, end + 1, p)))
    total = sum(k for k in range(max(2, start), end + 1) if sieve[k])
    return Draft(form, {"x": start, "y": end}, str(total))


def program(world, level: int, rng: random.Random) -> Draft:
    """A short program; the truth comes from another way to compute the same."""
    n, a, b = rng.randint(20, 10 ** (level + 1)), rng.randint(2, 9), rng.randint(3, 97)
    m = rng.randint(101, 9999)
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
        text = (
            f"s = 0\nfor i in range({n}):\n    for c in str(i * {b}):\n"
            f"        s += int(c) * (i % {a})\nprint(s)"
        )
        answer = sum(digit_sum(i * b) * (i % a) for i in range(n))
    return Draft("program", {}, str(answer), suffix=f"\n```python\n{text}\n```")


def digit_sum(number: int) -> int:
    return number % 10 + digit_sum(number // 10) if number else 0


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
