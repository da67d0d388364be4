"""The second solver: answers a question from its words and the pages alone, by other ways than the
generator's.

It imports nothing of the generator (data/tasks.py, data/deep/families.py) or the world
(data/world.py, data/deep/pages.py), so that an error in one is not repeated in the other, and it
gives *all* answers that fit: none means it cannot tell, two or more that the question is ambiguous.

In: a question, `read(path)` -> text of a page (of its address too) or None, `find(phrase)` -> paths
of all pages with that phrase. Out: a list of answers. To try an idea, write a function
`(question, read, find) -> list of answers` and add its pattern to FORMS.
"""

import heapq
import itertools
import math
import re

from tools import Python

NP = r"(?:the \w+ of )*[A-Z]\w+"  # a name, or "the mayor of the capital of Norland"
ORDINALS = {"second": 1, "third": 2, "fourth": 3}


def parse_question(question: str) -> tuple[str | None, list[tuple[str, list[str]]]]:
    """What the words ask for.

    Returns:
        The operation, if any, and each (entity name, relations in the order to follow).
    """
    operation = re.search(r"\b(sum|difference|product) of\b", question, re.IGNORECASE)
    rest = question[operation.end() :] if operation else question
    chains = [
        (m.group(2), re.findall(r"the (\w+) of", m.group(1), re.IGNORECASE)[::-1])
        for m in re.finditer(r"((?:\bthe \w+ of )+)([A-Z]\w+)", rest, re.IGNORECASE)
    ]
    chains = chains or [
        (m.group(1), re.findall(r"'s (\w+)", m.group(2)))
        for m in re.finditer(r"\b([A-Z]\w+)((?:'s \w+)+)", rest)
    ]
    return (operation.group(1).lower() if operation else None), chains


def read_fact(text: str, name: str, relation: str) -> str | None:
    """The value of a relation in the text of the page of `name`; None where it does not say."""
    match = re.search(rf"\b[Tt]he {relation} of {name} is (\w+)\.", text)
    # In a table, a list or below a heading, where the value is a name or a number.
    match = match or re.search(rf"^\W*{relation}\W+([A-Z\d]\w*)", text, re.MULTILINE)
    return match.group(1) if match else None


def read_entries(text: str) -> list[tuple[str, str, int]]:
    """(name, colour, price) of each entry on a page of a catalogue, from the page's text."""
    return [
        (name, colour, int(price))
        for colour, name, price in re.findall(r"([a-z]+) (\w+) (\d+) https?://", text)
    ]


def follow(name: str, relations: list[str], read) -> str | None:
    """The value at the end of a chain of relations."""
    for relation in relations:
        text = read(name)
        name = read_fact(text, name, relation) if text else None
        if name is None:
            return None
    return name


def resolve(phrase: str, read) -> str | None:
    """The value of a noun phrase of the form NP."""
    *relations, name = re.findall(r"(?<=the )\w+(?= of)|\w+$", phrase)
    return follow(name, relations[::-1], read)


def chain(question: str, read, find) -> list:
    """Lookups, hops, and the sum, difference or product of two of them."""
    operation, chains = parse_question(question)
    values = [follow(name, relations, read) for name, relations in chains]
    if None in values or len(values) != (1 if operation is None else 2):
        return []
    if operation is None:
        return values
    if not all(value.isdigit() for value in values):
        return []
    a, b = map(int, values)
    return [str({"sum": a + b, "difference": abs(a - b), "product": a * b}[operation])]


def compute(question: str, read, find) -> list:
    """Other arithmetic over two or more facts."""
    values = [resolve(phrase, read) for phrase in re.findall(r"the \w+ of " + NP, question)]
    if len(values) < 2 or not all(value and value.isdigit() for value in values):
        return []
    numbers = [int(value) for value in values]
    if "product" in question:
        return [str(sum(map(int, str(math.prod(numbers)))))]
    if "average" in question:
        return [str(sum(numbers) // len(numbers))]
    if "squares" in question:
        return [str(sum(n * n for n in numbers))]
    return []


def walk_catalogue(keeper: str, read) -> list[tuple[str, str, int]]:
    """All entries of a catalogue, by following its pages; none if its end is not reached."""
    path, entries = f"{keeper}-catalogue", []
    while path and (text := read(path)):
        entries += read_entries(text)
        following = re.search(r"Next: (\S+)", text)
        path = following.group(1) if following else None
        if path is None and "ends here" not in text:
            return []
    return entries


def collection(question: str, read, find) -> list:
    """Walk a catalogue to its end, then count, add up, list or find the extreme."""
    owner = re.search(rf"catalogue of ({NP})|({NP})'s catalogue", question)
    keeper = owner and resolve(owner.group(1) or owner.group(2), read)
    entries = walk_catalogue(keeper, read)
    if not entries:
        return []
    question = question.replace(owner.group(0), "")
    if type := re.search(r"\bentries that are a (\w+)", question):
        pages = [(name, read(name) or "") for name, _, _ in entries]
        return [str(sum(f"{name} is a {type.group(1)}." in page for name, page in pages))]
    if colour := re.search(r"\b(red|blue|green|black|white|grey|gold)\b", question):
        entries = [entry for entry in entries if entry[1] == colour.group(1)]
    if re.search(r"\b(greatest|smallest)\b", question):
        wanted = (max if "greatest" in question else min)(price for _, _, price in entries)
        return [name for name, _, price in entries if price == wanted]
    if "total" in question:
        return [str(sum(price for _, _, price in entries))]
    if "number of" in question or "count of" in question:
        return [str(len(entries))]
    return [[name for name, _, _ in entries]]


def conflict(question: str, read, find) -> list:
    """Apply the rule on the rules page to all notices."""
    subject = re.search(
        rf"(?:valid notice on|valid (\w+) of|(\w+) that is valid for) ({NP})", question
    )
    name, rules = subject and resolve(subject.group(3), read), read("rules") or ""
    relation = subject and (subject.group(1) or subject.group(2))
    which = re.search(r"the notice with the (latest|earliest) date counts", rules)
    order = re.search(
        r"notice of the (\w+) counts before one of the (\w+), "
        r"and one of the \w+ before one of the (\w+)",
        rules,
    )
    if not name or not which:
        return []
    claims, retracted = read_notices(name, read)
    left = [
        claim
        for number, claim in claims.items()
        if number not in retracted and relation in (None, claim[2])
    ]
    if order and left:
        best = min(order.groups().index(claim[1]) for claim in left)
        left = [claim for claim in left if order.groups().index(claim[1]) == best]
    dates = sorted(claim[0] for claim in left)
    return [
        claim[0] if relation is None else claim[3]
        for claim in left
        if claim[0] == (dates[-1] if which.group(1) == "latest" else dates[0])
    ]


def read_notices(name: str, read) -> tuple[dict[int, tuple], set[int]]:
    """Number -> (date, office, relation, value) of the notices on an entity, and the numbers of
    those that others retract."""
    claims, retracted = {}, set()
    for number in itertools.count(1):
        text = read(f"{name}-notice-{number}")
        if text is None:
            return claims, retracted
        claim = re.search(
            r"Published on (\S+) by the (\w+)\. It puts the (\w+) of \w+ at (\w+)\.", text
        )
        claims[number] = claim.groups()
        retracted |= {int(n) for n in re.findall(rf"Notice (\d+) on {name} is retracted", text)}


def logic(question: str, read, find) -> list:
    """The entity that meets all conditions: among those named, or in the whole world."""
    head, conditions = question.split(" whose ", 1)
    conditions = re.findall(
        r"(\w+) is (above that of|above|below|not|) ?([A-Z]\w+|\d+)", conditions
    )
    wanted, type = re.search(r"the (\w+) of (?:the one among|the (\w+)$)", head).groups()
    if among := re.search(r"among (.+)$", head):
        candidates = re.findall(r"[A-Z]\w+", among.group(1))
    else:  # every page that says "is X" or has X in its table is looked at
        equal = [(relation, value) for relation, comparison, value in conditions if not comparison]
        phrases = [phrase for r, value in equal for phrase in (f"is {value}", f"{r} {value}")]
        paths = sorted({path for phrase in phrases for path in find(phrase)})
        candidates = [path for path in paths if f"{path} is a {type}." in (read(path) or "")]
    for condition in conditions:
        candidates = [name for name in candidates if holds(name, *condition, read)]
    if not conditions:
        return []
    return [value for name in candidates if (value := read_fact(read(name) or "", name, wanted))]


def holds(name: str, relation: str, comparison: str, value: str, read) -> bool:
    """Whether a condition is true of an entity by what its page says."""
    fact = read_fact(read(name) or "", name, relation)
    if fact is None or comparison in ("", "not"):
        return fact is not None and (fact == value) == (comparison == "")
    bound = follow(value, [relation], read) if comparison == "above that of" else value
    if bound is None:
        return False
    return int(fact) < int(bound) if comparison == "below" else int(fact) > int(bound)


def way(question: str, read, find) -> list:
    """Shortest ways by Dijkstra's algorithm, reading a city's page when it is reached; all equally
    short ones are found."""
    ends = re.search(rf"from ({NP}) to ({NP})", question).groups()
    start, goal = (resolve(phrase, read) for phrase in ends)
    if not start or not goal:
        return []
    distance, before, heap = {start: 0}, {start: []}, [(0, start)]
    while heap:
        miles, city = heapq.heappop(heap)
        if miles > distance[city]:
            continue
        if city == goal:
            break
        road = rf"The road from {city} to (\w+) is (\d+) miles long"
        for other, length in dict(re.findall(road, read(city) or "")).items():
            there = miles + int(length)
            if there < distance.get(other, math.inf):
                distance[other], before[other] = there, [city]
                heapq.heappush(heap, (there, other))
            elif there == distance[other]:
                before[other].append(city)
    if goal not in distance:
        return []
    if "cities" not in question:
        return [str(distance[goal])]
    routes, partial = [], [[goal]]
    while partial:
        route = partial.pop()
        partial += [[city] + route for city in before[route[0]]]
        if route[0] == start:
            routes.append(route[1:-1])
    return routes


def rank(question: str, read, find) -> list:
    """The fact about the second, third … greatest of the named ones."""
    wanted, place, relation, names = re.search(
        r"the (\w+) of the one with the (\w+) greatest (\w+) among (.+)", question
    ).groups()
    names = re.findall(r"[A-Z]\w+", names)
    values = {name: follow(name, [relation], read) for name in names}
    if None in values.values() or place not in ORDINALS:
        return []
    nth = sorted((int(value) for value in values.values()), reverse=True)[ORDINALS[place]]
    return [follow(name, [wanted], read) for name in names if int(values[name]) == nth]


def schedule(question: str, read, find) -> list:
    """Most days at whole festivals: every choice of festivals is tried."""
    names = re.findall(r"[A-Z]\w+", question.split("among", 1)[1])
    held = [
        re.search(rf"{name} is held from day (\d+) to day (\d+)", read(name) or "")
        for name in names
    ]
    if not all(held):
        return []
    spans = [(int(m.group(1)), int(m.group(2))) for m in held]
    best = 0
    for size in range(1, len(spans) + 1):
        for chosen in itertools.combinations(spans, size):
            pairs = itertools.combinations(chosen, 2)
            if all(a[1] < b[0] or b[1] < a[0] for a, b in pairs):
                best = max(best, sum(last - first + 1 for first, last in chosen))
    return [str(best)]


def mathematics(question: str, read, find) -> list:
    """By brute force, where the generator has a formula."""
    n = [int(number) for number in re.findall(r"\d+", question)]
    # Brute force has its limits, and the generator's tasks are below them.
    if "digits" in question and n[1] * len(str(n[0])) <= 4300:
        return [str(sum(map(int, str(math.prod([n[0]] * n[1])))))]
    if "remainder" in question and n[1] <= 10**7:
        value = 1
        for _ in range(n[1]):
            value = value * n[0] % n[2]
        return [str(value)]
    if "divisible" in question and n[1] - n[0] <= 10**7:
        return [str(sum(k % n[2] == 0 and k % n[3] != 0 for k in range(n[0], n[1] + 1)))]
    if "primes" in question and n[1] <= 400_000:
        numbers = range(max(2, n[0]), n[1] + 1)
        primes = [k for k in numbers if all(k % d for d in range(2, math.isqrt(k) + 1))]
        return [str(sum(primes))]
    return []


def code(question: str, read, find) -> list:
    """Run the program in the `python` tool, as the policy would."""
    output = Python()(question.split("```")[1].removeprefix("python\n"))
    return [output.strip()] if re.fullmatch(r"-?\w+", output.strip()) else []


FORMS = [
    (r"```", code),
    (r"\d+ to the power|integers from|primes from", mathematics),
    (r"catalogue", collection),
    (r"\bvalid\b", conflict),
    (r"by road", way),
    (r"greatest \w+ among", rank),
    (r"days at whole festivals", schedule),
    (r" whose ", logic),
    (r"these numbers", compute),
    (r"", chain),
]


def solutions(question: str, read, find) -> list:
    """All answers that the pages give. The first form whose pattern is in the question decides how.

    Args:
        question: the task's question.
        read: function from the path of a page ("Kalbor"), or its address, to its text, or None.
        find: function from a phrase to the paths of all pages that contain it.
    """
    solve = next(function for pattern, function in FORMS if re.search(pattern, question))
    try:
        return solve(question, read, find)
    except (AttributeError, ValueError, IndexError, TypeError, ArithmeticError):
        return []  # the question is not of the form it looked like
