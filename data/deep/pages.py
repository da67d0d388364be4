"""What a deep world has beyond a plain one: work for an agent that must look at many pages and weigh what they say.

    catalogues  200 and more entries on a chain of pages; each page links only to the next one, at an address that cannot be guessed
    notices     dated claims about one fact of an entity that contradict its page and each other; some retract others
    rules       one page that says which notice counts; the rule differs from world to world
    roads       each city's page tells its distance to three other cities
    calendar    each festival's page tells its days

In: a `World` with kind "deep" (data/world.py). Out: functions of (world, index), like the world itself, and the pages' HTML.
Everything that a question can ask stands on some page. To try an idea, add a section to `sections` or a page to `pages`.
"""

import datetime
import random

# ---------------------------------------------------------------------------------------------------------- catalogues

ENTRIES_ON_PAGE = (
    7  # a page fits into one view of the browse tool (400 characters, 192 tokens of the nano model)
)
COLOURS = ["red", "blue", "green", "black", "white", "grey"]
RARE_COLOUR = "gold"  # of two or three entries: short enough to be listed


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
    """The pages of a catalogue: the first is named after its keeper, the others have names that no entity has."""
    keeper = world.name(world.nth("company", number))
    count = len(catalogue(world, number)) // ENTRIES_ON_PAGE
    return [f"{keeper}-catalogue"] + [
        world.name(world.entities + 40 * number + page) for page in range(1, count)
    ]


# ------------------------------------------------------------------------------------------------------------- notices

OFFICES = ["census", "court", "guild"]


def rule(world) -> tuple[str, list[str]]:
    """("latest" or "earliest", offices from the strongest to the weakest, or no offices if only the date counts)."""
    rng = random.Random(f"rule-{world.seed}-{world.split}")
    return rng.choice(["latest", "earliest"]), rng.choice([[], rng.sample(OFFICES, len(OFFICES))])


def disputed(world, index: int) -> str | None:
    """The relation of an entity that notices dispute; None for two entities in three."""
    if index % 3 or index >= world.entities:
        return None
    from data.world import RELATIONS

    choices = [relation for relation, _, where in RELATIONS[world.type(index)] if where == "lead"]
    return random.Random(f"disputed-{world.seed}-{world.split}-{index}").choice(choices)


def notices(world, index: int) -> list[dict]:
    """The notices on an entity, in order of their numbers: value, date, office, and the number of the notice it retracts (or None)."""
    relation = disputed(world, index)
    if relation is None:
        return []
    from data.world import RELATIONS

    rng = random.Random(f"notices-{world.seed}-{world.split}-{index}")
    kind = next(kind for name, kind, _ in RELATIONS[world.type(index)] if name == relation)
    found, values = [], {world.entity(index).facts[relation]}
    days = sorted(rng.sample(range(200 * 365), rng.randint(2, 4)))
    rng.shuffle(days)  # a later notice may have a lower number: the date has to be read
    for day in days:
        value = None
        while value is None or value in values:
            value = (
                str(rng.randint(100, 999))
                if kind == "number"
                else world.name(world.random_entity(kind, rng))
            )
        values.add(value)
        date = datetime.date(1750, 1, 1) + datetime.timedelta(days=day)
        found.append(
            {
                "value": value,
                "date": date.isoformat(),
                "office": rng.choice(OFFICES),
                "retracts": None,
            }
        )
    if len(found) > 2 and rng.random() < 0.7:  # the last published one takes back another
        last = max(found, key=lambda notice: notice["date"])
        last["retracts"] = rng.choice(
            [n for n, notice in enumerate(found, start=1) if notice is not last]
        )
    return found


def valid_notice(world, index: int) -> int:
    """Position (from 0) of the notice that counts by the world's rule."""
    which, offices = rule(world)
    found = notices(world, index)
    retracted = {notice["retracts"] for notice in found}
    left = [k for k in range(len(found)) if k + 1 not in retracted]
    if offices:
        strongest = min(offices.index(found[k]["office"]) for k in left)
        left = [k for k in left if offices.index(found[k]["office"]) == strongest]
    return (max if which == "latest" else min)(left, key=lambda k: found[k]["date"])


# --------------------------------------------------------------------------------------------------- roads and calendar


def roads(world, index: int) -> dict[int, int]:
    """Entity index of each neighbouring city -> miles. A ring of all cities, and a chord from each: short ways are not obvious."""
    count, city = world.count("city"), world.position(index)
    chord = (
        random.Random(f"chords-{world.seed}-{world.split}").randrange(count) - city
    ) % count  # its own inverse
    neighbours = sorted({(city - 1) % count, (city + 1) % count, chord} - {city})
    return {
        world.nth("city", other): random.Random(
            f"road-{world.seed}-{world.split}-{min(city, other)}-{max(city, other)}"
        ).randint(20, 99)
        for other in neighbours
    }


def days(world, index: int) -> tuple[int, int]:
    """First and last day of a festival, both inclusive."""
    rng = random.Random(f"days-{world.seed}-{world.split}-{index}")
    first = rng.randint(1, 60)
    return first, first + rng.randint(2, 19)


# --------------------------------------------------------------------------------------------------------------- pages


def sections(world, entity) -> str:
    """What a deep world adds to the page of an entity, as HTML."""

    def link(path: str, label: str) -> str:
        return f'<a href="/{path}">{label}</a>'

    parts = []
    if entity.type == "city" and world.position(entity.index) is not None:
        sentences = [
            f"The road from {entity.name} to {link(world.name(other), world.name(other))} is {miles} miles long."
            for other, miles in roads(world, entity.index).items()
        ]
        parts.append(f"<h2>Roads</h2><p>{' '.join(sentences)}</p>")
    if entity.type == "festival":
        first, last = days(world, entity.index)
        parts.append(
            f"<h2>Calendar</h2><p>{entity.name} is held from day {first} to day {last} of each year.</p>"
        )
    if found := notices(world, entity.index):
        links = ", ".join(
            link(f"{entity.name}-notice-{n}", f"notice {n}") for n in range(1, len(found) + 1)
        )
        parts.append(
            f"<h2>Dispute</h2><p>Some notices dispute the {disputed(world, entity.index)} given here: {links}. "
            f"Which one is valid follows from the {link('rules', 'rules of the register')}.</p>"
        )
    if entity.type == "company" and entity.index <= world.nth("company", catalogues(world) - 1):
        parts.append(
            f"<p>{entity.name} keeps a {link(f'{entity.name}-catalogue', 'catalogue')}.</p>"
        )
    return "".join(parts)


def pages(world):
    """(path, title, description, HTML) of the pages that only a deep world has."""

    def page(path: str, title: str, body: str, description: str = ""):
        return (
            path,
            title,
            description,
            (
                f'<!doctype html><html><head><meta charset="utf-8"><title>{title}</title></head>'
                f"<body><h1>{title}</h1>{body}</body></html>"
            ),
        )

    which, offices = rule(world)
    order = (
        "A notice of the {0} counts before one of the {1}, and one of the {1} before one of the {2}. ".format(
            *offices
        )
        if offices
        else ""
    )
    yield page(
        "rules",
        "Rules of the register",
        f"<p>A retracted notice never counts. {order}"
        f"{'Of what is left' if offices else 'Of the others'} the notice with the {which} date counts.</p>",
    )
    for index in range(0, world.entities, 3):
        name, relation, found = world.name(index), disputed(world, index), notices(world, index)
        for number, notice in enumerate(found, start=1):
            retracts = (
                f"<p>Notice {notice['retracts']} on {name} is retracted.</p>"
                if notice["retracts"]
                else ""
            )
            others = " ".join(
                f'<a href="/{name}-notice-{n}">notice {n}</a>'
                for n in range(1, len(found) + 1)
                if n != number
            )
            yield page(
                f"{name}-notice-{number}",
                f"Notice {number}",  # without the name, so that the entity's own page comes first in a search
                f'<p>Published on {notice["date"]} by the {notice["office"]}. It puts the {relation} of <a href="/{name}">{name}</a> '
                f'at {notice["value"]}.</p>{retracts}<p>See also {others} and the <a href="/rules">rules of the register</a>.</p>',
            )
    for number in range(catalogues(world)):
        paths, entries = catalogue_paths(world, number), catalogue(world, number)
        for k, path in enumerate(paths):
            rows = "".join(
                f'<p>{colour} {world.name(index)} {price} <a href="/{world.name(index)}">{world.url(index)}</a></p>'
                for index, colour, price in entries[k * ENTRIES_ON_PAGE : (k + 1) * ENTRIES_ON_PAGE]
            )
            more = (
                f'<p>Next: <a href="/{paths[k + 1]}">http://{world.host}/{paths[k + 1]}</a></p>'
                if k + 1 < len(paths)
                else "<p>The catalogue ends here.</p>"
            )
            title = (
                f"Catalogue of {world.name(world.nth('company', number))}"
                if k == 0
                else "More entries"
            )
            yield page(path, title, rows + more, "Entries with colour and price." if k == 0 else "")
