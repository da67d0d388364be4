"""What a deep world has beyond a plain one: work for an agent that must look at many pages and
weigh what they say.

    catalogues  200 and more entries on a chain of pages; each page links only to the next one, at
                an address that cannot be guessed
    notices     dated claims about one fact of an entity that contradict its page and each other;
                some retract others
    rules       one page that says which notice counts; the rule differs from world to world
    roads       each city's page tells its distance to three other cities
    calendar    each festival's page tells its days

In: a `World` with kind "deep" (data/world.py). Out: functions of (world, index), like the world
itself, and the pages' HTML. Everything that a question can ask stands on some page. To try an
idea, add a section to `sections` or a page to `pages`.
"""

import datetime
import random
from collections.abc import Iterator

from data.parts import LEAD, html_page

# A page fits into one view of the browse tool (400 characters, 192 tokens of the nano model).
ENTRIES_ON_PAGE = 7
COLOURS = ["red", "blue", "green", "black", "white", "grey"]
RARE_COLOUR = "gold"  # of two or three entries: short enough to be listed
OFFICES = ["census", "court", "guild"]

# --------------------------------------------------------------------------------------- catalogues


def catalogues(world) -> int:
    """Number of catalogues; the n-th is kept by the n-th company."""
    return max(4, world.entities // 50)


def catalogue(world, number: int) -> list[tuple[int, str, int]]:
    """(index of the entity, colour, price) of each entry, in the order of the pages."""
    rng = random.Random(f"catalogue-{world.seed}-{world.split}-{number}")
    size = ENTRIES_ON_PAGE * rng.randint(30, 36)
    members = rng.sample(range(world.entities), size)
    rare = set(rng.sample(range(size), rng.randint(2, 3)))
    return [
        (index, RARE_COLOUR if k in rare else rng.choice(COLOURS), rng.randint(100, 999))
        for k, index in enumerate(members)
    ]


def catalogue_paths(world, number: int) -> list[str]:
    """The pages of a catalogue: the first is named after its keeper, the others as no entity is."""
    keeper = world.name(world.nth("company", number))
    count = len(catalogue(world, number)) // ENTRIES_ON_PAGE
    others = [world.name(world.entities + 40 * number + page) for page in range(1, count)]
    return [f"{keeper}-catalogue"] + others


# ------------------------------------------------------------------------------------------ notices


def rule(world) -> tuple[str, list[str]]:
    """("latest" or "earliest", offices from the strongest to the weakest); no offices if only the
    date counts."""
    rng = random.Random(f"rule-{world.seed}-{world.split}")
    return rng.choice(["latest", "earliest"]), rng.choice([[], rng.sample(OFFICES, len(OFFICES))])


def disputed(world, index: int) -> str | None:
    """The relation of an entity that notices dispute; None for two entities in three."""
    if index % 3 or index >= world.entities:
        return None
    rng = random.Random(f"disputed-{world.seed}-{world.split}-{index}")
    return rng.choice(list(LEAD[world.type(index)]))


def notices(world, index: int) -> list[dict]:
    """The notices on an entity, in order of their numbers (from 1).

    Returns:
        dicts of value, date, office, and the number of the notice that it retracts (or None).
    """
    relation = disputed(world, index)
    if relation is None:
        return []
    rng = random.Random(f"notices-{world.seed}-{world.split}-{index}")
    kind = LEAD[world.type(index)][relation]
    value = world.entity(index).facts[relation]
    found, values = [], {value}
    days = sorted(rng.sample(range(200 * 365), rng.randint(2, 4)))
    rng.shuffle(days)  # a later notice may have a lower number: the date has to be read
    for day in days:
        while value in values:
            value, _ = world.random_value(kind, rng)
        values.add(value)
        date = (datetime.date(1750, 1, 1) + datetime.timedelta(days=day)).isoformat()
        office = rng.choice(OFFICES)
        found.append({"value": value, "date": date, "office": office, "retracts": None})
    if len(found) > 2 and rng.random() < 0.7:  # the last published one takes back another
        last = max(found, key=lambda notice: notice["date"])
        others = [n for n, notice in enumerate(found, start=1) if notice is not last]
        last["retracts"] = rng.choice(others)
    return found


def valid_notice(world, index: int) -> dict:
    """The notice that counts by the world's rule."""
    which, offices = rule(world)
    found = notices(world, index)
    retracted = {notice["retracts"] for notice in found}
    left = [notice for n, notice in enumerate(found, start=1) if n not in retracted]
    if offices:
        strongest = min((notice["office"] for notice in left), key=offices.index)
        left = [notice for notice in left if notice["office"] == strongest]
    return (max if which == "latest" else min)(left, key=lambda notice: notice["date"])


# ------------------------------------------------------------------------------- roads and calendar


def roads(world, index: int) -> dict[int, int]:
    """Entity index of each neighbouring city -> miles.

    The roads are a ring of all cities and a chord from each, so that short ways are not obvious.
    """
    count, city = world.count("city"), world.position(index)
    key = f"{world.seed}-{world.split}"
    chord = (random.Random(f"chords-{key}").randrange(count) - city) % count  # its own inverse
    neighbours = sorted({(city - 1) % count, (city + 1) % count, chord} - {city})
    found = {}
    for other in neighbours:
        rng = random.Random(f"road-{key}-{min(city, other)}-{max(city, other)}")
        found[world.nth("city", other)] = rng.randint(20, 99)
    return found


def days(world, index: int) -> tuple[int, int]:
    """First and last day of a festival, both inclusive."""
    rng = random.Random(f"days-{world.seed}-{world.split}-{index}")
    first = rng.randint(1, 60)
    return first, first + rng.randint(2, 19)


# -------------------------------------------------------------------------------------------- pages


def sections(world, entity) -> str:
    """What a deep world adds to the page of an entity, as HTML."""
    name, index, parts = entity.name, entity.index, []
    if entity.type == "city" and world.position(index) is not None:
        sentences = [
            f"The road from {name} to {world.link(world.name(other))} is {miles} miles long."
            for other, miles in roads(world, index).items()
        ]
        parts.append(f"<h2>Roads</h2><p>{' '.join(sentences)}</p>")
    if entity.type == "festival":
        first, last = days(world, index)
        held = f"{name} is held from day {first} to day {last} of each year."
        parts.append(f"<h2>Calendar</h2><p>{held}</p>")
    if count := len(notices(world, index)):
        links = [world.link(f"{name}-notice-{n}", f"notice {n}") for n in range(1, count + 1)]
        parts.append(
            f"<h2>Dispute</h2><p>Some notices dispute the {disputed(world, index)} given here: "
            f"{', '.join(links)}. "
            "Which one is valid follows from the "
            f"{world.link('rules', 'rules of the register')}.</p>"
        )
    if entity.type == "company" and index <= world.nth("company", catalogues(world) - 1):
        parts.append(f"<p>{name} keeps a {world.link(f'{name}-catalogue', 'catalogue')}.</p>")
    return "".join(parts)


def pages(world) -> Iterator[tuple[str, str, str, str]]:
    """(path, title, description, HTML) of the pages that only a deep world has."""
    yield rules_page(world)
    for index in range(0, world.entities, 3):
        yield from notice_pages(world, index)
    for number in range(catalogues(world)):
        yield from catalogue_pages(world, number)


def page(path: str, title: str, body: str, description: str = "") -> tuple[str, str, str, str]:
    return path, title, description, html_page(title, f"<h1>{title}</h1>{body}")


def rules_page(world) -> tuple[str, str, str, str]:
    which, offices = rule(world)
    rules = "A retracted notice never counts. "
    if offices:
        first, second, third = offices
        rules += f"A notice of the {first} counts before one of the {second}, "
        rules += f"and one of the {second} before one of the {third}. "
    rules += f"{'Of what is left' if offices else 'Of the others'} the notice with the {which} "
    return page("rules", "Rules of the register", f"<p>{rules}date counts.</p>")


def notice_pages(world, index: int) -> Iterator[tuple[str, str, str, str]]:
    name, relation, found = world.name(index), disputed(world, index), notices(world, index)
    links = [world.link(f"{name}-notice-{n}", f"notice {n}") for n in range(1, len(found) + 1)]
    for number, notice in enumerate(found, start=1):
        retracts = ""
        if notice["retracts"]:
            retracts = f"<p>Notice {notice['retracts']} on {name} is retracted.</p>"
        others = " ".join(links[: number - 1] + links[number:])
        # The title is without the name, so that the entity's own page comes first in a search.
        yield page(
            f"{name}-notice-{number}",
            f"Notice {number}",
            f"<p>Published on {notice['date']} by the {notice['office']}. "
            f"It puts the {relation} of {world.link(name)} at {notice['value']}.</p>{retracts}"
            f"<p>See also {others} and the {world.link('rules', 'rules of the register')}.</p>",
        )


def catalogue_pages(world, number: int) -> Iterator[tuple[str, str, str, str]]:
    paths, entries = catalogue_paths(world, number), catalogue(world, number)
    for k, path in enumerate(paths):
        rows = ""
        for index, colour, price in entries[k * ENTRIES_ON_PAGE : (k + 1) * ENTRIES_ON_PAGE]:
            name = world.name(index)
            rows += f"<p>{colour} {name} {price} {world.link(name, world.address(name))}</p>"
        if k + 1 < len(paths):
            rows += f"<p>Next: {world.link(paths[k + 1], world.address(paths[k + 1]))}</p>"
        else:
            rows += "<p>The catalogue ends here.</p>"
        if k == 0:
            keeper = world.name(world.nth("company", number))
            yield page(path, f"Catalogue of {keeper}", rows, "Entries with colour and price.")
        else:
            yield page(path, "More entries", rows)
