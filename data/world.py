"""A seeded, fictional web: nothing in it can be known by heart, so every answer has to be looked up.

`World(seed, entities, split)` is a *function* of its seed: `world.entity(i)` computes the i-th entity (its name, type and
facts) from random numbers keyed by (seed, i), so a world of 100,000 entities takes no more memory than one of 500.
`page_html` writes an entity's page: navigation, a lead whose sentences are also the page's meta description (what a search
engine shows as the snippet), a history with stale facts, and a table of records that stands deep in the page. A world of
kind "deep" has catalogues, contradicting notices, roads and a calendar besides (data/deep.py), for questions that take many pages.

In: a seed. Out: a folder with `pages.db` (full-text index + HTML, see data/index.py) and `facts.jsonl` (the ground truth).
To try an idea, add a relation to RELATIONS or a sentence form to `page_html`.

    python data/world.py --seed 7 --entities 500 --out data/worlds/w7                  # add --kind deep for the richer one
"""

import argparse
import contextlib
import functools
import html
import itertools
import json
import os
import random
import sqlite3
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from data.deep import pages as deep

# type -> relations: (keyword, type of the value, where it stands). "lead" facts show in search snippets, "deep" ones only
# in the table of records at the end of the page, so that they need `browse`.
RELATIONS = {
    "country": [
        ("capital", "city", "lead"),
        ("president", "person", "lead"),
        ("area", "number", "lead"),
        ("poet", "person", "deep"),
        ("independence", "year", "deep"),
    ],
    "city": [
        ("mayor", "person", "lead"),
        ("river", "river", "lead"),
        ("population", "number", "lead"),
        ("architect", "person", "deep"),
        ("foundation", "year", "deep"),
    ],
    "person": [
        ("birthplace", "city", "lead"),
        ("employer", "company", "lead"),
        ("height", "number", "lead"),
        ("teacher", "person", "deep"),
        ("birth", "year", "deep"),
    ],
    "company": [
        ("headquarters", "city", "lead"),
        ("founder", "person", "lead"),
        ("staff", "number", "lead"),
        ("auditor", "company", "deep"),
        ("opening", "year", "deep"),
    ],
    "river": [
        ("mouth", "city", "lead"),
        ("source", "country", "lead"),
        ("length", "number", "lead"),
        ("explorer", "person", "deep"),
        ("depth", "number", "deep"),
    ],
    "book": [
        ("author", "person", "lead"),
        ("publisher", "company", "lead"),
        ("chapters", "number", "lead"),
        ("translator", "person", "deep"),
        ("printing", "year", "deep"),
    ],
    "festival": [
        ("venue", "city", "lead"),
        ("sponsor", "company", "lead"),
        ("attendance", "number", "lead"),
        ("organizer", "person", "deep"),
        ("opening", "year", "deep"),
    ],
}
TYPES = list(RELATIONS)
PLURALS = {
    "country": "countries",
    "city": "cities",
    "person": "persons",
    "company": "companies",
    "river": "rivers",
    "book": "books",
    "festival": "festivals",
}
# People are what most relations point at, so a third of the entities are people.
TYPE_OF_SLOT = [
    "person",
    "city",
    "person",
    "company",
    "country",
    "river",
    "person",
    "book",
    "city",
    "festival",
]
WORLDS = Path(__file__).resolve().parent / "worlds"
SPLITS = [
    "pretrain",
    "train",
    "dev",
    "test",
]  # names of different splits never coincide, whatever their seeds
KINDS = ["plain", "deep"]
LINKS_PER_LIST = 40
PAGES_PER_JOB = 200  # what a process makes at a time


def _syllables(seed: int, count: int) -> list[str]:
    """`count` distinct consonant-vowel-consonant syllables: names are read off unambiguously, three letters at a time."""
    all_of_them = [
        "".join(letters) for letters in itertools.product("bdfghklmnprstvz", "aeiou", "klmnrst")
    ]
    return random.Random(seed).sample(all_of_them, count)


SYLLABLES = 200  # of each kind; a multiple of the number of splits
FIRST_SYLLABLES = [s.capitalize() for s in _syllables(1, SYLLABLES)]
MIDDLE_SYLLABLES = LAST_SYLLABLES = _syllables(2, SYLLABLES)


@dataclass
class Entity:
    index: int
    name: str
    type: str
    facts: dict[str, str]  # relation -> value as it stands on the page
    targets: dict[
        str, int
    ]  # relation -> index of the entity it points at (entity-valued relations only)


class World:
    """A fictional world as a function of its seed.

    Args:
        seed: any integer; decides every name and fact.
        entities: how many entities the world has.
        split: one of SPLITS; worlds of different splits share no entity name.
        kind: "plain", or "deep" for the pages of data/deep.py besides; names and facts are the same.
    """

    def __init__(self, seed: int, entities: int, split: str = "train", kind: str = "plain"):
        if entities < 2 * len(TYPE_OF_SLOT):
            raise ValueError(
                f"a world needs at least {2 * len(TYPE_OF_SLOT)} entities, not {entities}"
            )
        if split not in SPLITS:
            raise ValueError(f"unknown split {split!r}; choose from {', '.join(SPLITS)}")
        if kind not in KINDS:
            raise ValueError(f"unknown kind {kind!r} of world; choose from {', '.join(KINDS)}")
        if kind == "deep" and entities < 300:
            raise ValueError(
                f"a deep world needs at least 300 entities for its catalogues, not {entities}"
            )
        self.seed, self.entities, self.split, self.kind = seed, entities, split, kind
        self.host = f"w{seed}.test"
        # Two syllables while they suffice, three in large worlds. An affine permutation of the name numbers scatters them.
        self.syllables = 2 if entities * len(SPLITS) <= SYLLABLES**2 // 2 else 3
        self.name_space = SYLLABLES**self.syllables // len(SPLITS)
        rng = random.Random(f"names-{seed}-{split}")
        self.name_offset = rng.randrange(self.name_space)
        # a step coprime with the size of the name space visits every name once
        self.name_step = next(
            s
            for s in iter(lambda: rng.randrange(1, self.name_space), None)
            if s % 2 and s % 3 and s % 5
        )

    def description(self) -> dict:
        """The arguments that make this world again; `kind` is named only where it is not plain."""
        return {"seed": self.seed, "entities": self.entities, "split": self.split} | (
            {"kind": self.kind} if self.kind != "plain" else {}
        )

    def name(self, index: int) -> str:
        number = (self.name_offset + index * self.name_step) % self.name_space
        number, last = divmod(number, SYLLABLES // len(SPLITS))
        number, middle = divmod(number, SYLLABLES) if self.syllables == 3 else (number, None)
        # Every split uses every syllable, but a pair (first, last) belongs to one split: the sum of their numbers modulo 4.
        last = last * len(SPLITS) + (SPLITS.index(self.split) - number) % len(SPLITS)
        return (
            FIRST_SYLLABLES[number]
            + ("" if middle is None else MIDDLE_SYLLABLES[middle])
            + LAST_SYLLABLES[last]
        )

    def type(self, index: int) -> str:
        return TYPE_OF_SLOT[index % len(TYPE_OF_SLOT)]

    def url(self, index: int) -> str:
        return f"http://{self.host}/{self.name(index)}"

    def random_entity(self, type: str, rng: random.Random) -> int:
        """Index of a random entity of this type."""
        slots = [slot for slot, t in enumerate(TYPE_OF_SLOT) if t == type]
        full_rounds = self.entities // len(TYPE_OF_SLOT)
        return rng.randrange(full_rounds) * len(TYPE_OF_SLOT) + rng.choice(slots)

    def count(self, type: str) -> int:
        """Entities of this type that `nth` counts: those in full rounds of TYPE_OF_SLOT."""
        return self.entities // len(TYPE_OF_SLOT) * TYPE_OF_SLOT.count(type)

    def nth(self, type: str, number: int) -> int:
        """Index of the number-th entity (from 0) of this type."""
        slots = [slot for slot, t in enumerate(TYPE_OF_SLOT) if t == type]
        return number // len(slots) * len(TYPE_OF_SLOT) + slots[number % len(slots)]

    def position(self, index: int) -> int | None:
        """The inverse of `nth`: the entity's number among those of its type; None in the last, broken round."""
        slots = [slot for slot, t in enumerate(TYPE_OF_SLOT) if t == self.type(index)]
        number = index // len(TYPE_OF_SLOT) * len(slots) + slots.index(index % len(TYPE_OF_SLOT))
        return number if number < self.count(self.type(index)) else None

    def entity(self, index: int) -> Entity:
        """The entity with this index: a pure function of (seed, split, index)."""
        rng = random.Random(f"facts-{self.seed}-{self.split}-{index}")
        facts, targets = {}, {}
        for relation, kind, _ in RELATIONS[self.type(index)]:
            if kind == "number":
                facts[relation] = str(rng.randint(100, 999))
            elif kind == "year":
                facts[relation] = str(rng.randint(1500, 1999))
            else:
                targets[relation] = self.random_entity(kind, rng)
                facts[relation] = self.name(targets[relation])
        return Entity(index, self.name(index), self.type(index), facts, targets)


FILLER = [
    "Travellers from {0} come here often.",
    "There is an old story about {0}.",
    "Some letters mention {0} and {1}.",
    "The archive in {0} keeps a drawing.",
    "A song of {0} was sung here for years.",
    "Nobody knows why {0} left.",
    "In spring the people remember {0}.",
    "{0} and {1} are named in the same chronicle.",
]


def lead_sentences(entity: Entity) -> list[str]:
    """The sentences at the top of an entity's page; they are also its meta description."""
    rng = random.Random(f"lead-{entity.name}")
    relations = [r for r, _, where in RELATIONS[entity.type] if where == "lead"]
    rng.shuffle(relations)
    sentences = [f"{entity.name} is a {entity.type}."]
    for relation in relations:
        sentences.append(f"The {relation} of {entity.name} is {entity.facts[relation]}.")
    return sentences


def page_html(world: World, entity: Entity) -> str:
    """The HTML page of an entity."""
    rng = random.Random(f"page-{world.seed}-{entity.index}")

    def link(index: int) -> str:
        return f'<a href="/{world.name(index)}">{world.name(index)}</a>'

    def filler(count: int) -> str:
        others = [link(rng.randrange(world.entities)) for _ in range(2 * count)]
        return " ".join(rng.choice(FILLER).format(*others[2 * i : 2 * i + 2]) for i in range(count))

    lead = lead_sentences(entity)
    stale_relation = rng.choice([r for r, kind, where in RELATIONS[entity.type] if where == "lead"])
    stale_kind = dict((r, k) for r, k, _ in RELATIONS[entity.type])[stale_relation]
    stale = (
        str(rng.randint(100, 999))
        if stale_kind == "number"
        else link(world.random_entity(stale_kind, rng))
    )
    records = [r for r, _, where in RELATIONS[entity.type] if where == "deep"]
    rows = []
    for relation in records:
        value = (
            link(entity.targets[relation]) if relation in entity.targets else entity.facts[relation]
        )
        rows.append(f"<tr><td>{relation}</td><td>{value}</td></tr>")
    plural = PLURALS[entity.type]
    # Names and numbers are our own letters and digits: nothing here needs escaping but the meta attribute.
    linked_lead = " ".join(lead)
    for relation, target in entity.targets.items():
        linked_lead = linked_lead.replace(
            f"{relation} of {entity.name} is {entity.facts[relation]}.",
            f"{relation} of {entity.name} is {link(target)}.",
        )
    return (
        f'<!doctype html><html><head><meta charset="utf-8"><title>{entity.name}</title>'
        f'<meta name="description" content="{html.escape(" ".join(lead))}"></head><body>'
        f'<nav><a href="/">Home</a> <a href="/{plural}">{plural}</a></nav><h1>{entity.name}</h1>'
        f"<p>{linked_lead}</p><h2>Stories</h2><p>{filler(5)}</p><p>{filler(4)}</p>"
        f"<h2>History</h2><p>Long ago the {stale_relation} was {stale}. {filler(6)}</p><p>{filler(5)}</p>"
        f"<h2>Records</h2><table>{''.join(rows)}</table><p>{filler(3)}</p>"
        f"{deep.sections(world, entity) if world.kind == 'deep' else ''}</body></html>"
    )


def document(world: World, path: str, title: str, description: str, page: str) -> dict:
    """A page as data.index.build_index wants it."""
    from support.html_text import html_to_text

    return {
        "url": f"http://{world.host}/{path}",
        "title": title,
        "description": description,
        "text": html_to_text(page),
        "html": page,
    }


def entity_documents(world: World, indices: range) -> list[dict]:
    """The pages of these entities."""
    entities = [world.entity(index) for index in indices]
    return [
        document(
            world,
            entity.name,
            entity.name,
            " ".join(lead_sentences(entity)),
            page_html(world, entity),
        )
        for entity in entities
    ]


def list_documents(world: World, type: str, numbers: range) -> list[dict]:
    """Pages (from 1) of the list of all entities of a type; each links to the next."""
    plural, found = PLURALS[type], []
    for number in numbers:
        members = [
            world.nth(type, n)
            for n in range((number - 1) * LINKS_PER_LIST, number * LINKS_PER_LIST + 1)
        ]
        members = [
            index for index in members if index < world.entities
        ]  # one more than this page shows, if there is one
        items = "".join(
            f'<li><a href="/{world.name(i)}">{world.name(i)}</a></li>'
            for i in members[:LINKS_PER_LIST]
        )
        more = (
            f'<p><a href="/{plural}-{number + 1}">more {plural}</a></p>'
            if len(members) > LINKS_PER_LIST
            else ""
        )
        page = (
            f'<!doctype html><html><head><meta charset="utf-8"><title>List of {plural} {number}</title></head>'
            f'<body><nav><a href="/">Home</a></nav><h1>List of {plural} {number}</h1><ul>{items}</ul>{more}</body></html>'
        )
        found.append(
            document(
                world,
                plural if number == 1 else f"{plural}-{number}",
                f"List of {plural} {number}",
                f"List of {plural}, part {number}.",
                page,
            )
        )
    return found


def documents(world: World, processes: int = 1) -> Iterator[dict]:
    """All pages of a world as documents for `data.index.build_index`: entity pages, then the lists, the home page, and a deep
    world's own pages.

    Args:
        processes: how many make them; the pages and their order are the same for any number.
    """
    from data.index import in_processes

    def ranges(start: int, stop: int, step: int) -> list[range]:
        return [range(at, min(at + step, stop)) for at in range(start, stop, step)]

    jobs = [
        functools.partial(entity_documents, world, indices)
        for indices in ranges(0, world.entities, PAGES_PER_JOB)
    ]
    for type in TYPES:
        members = sum(
            t == type and slot < world.entities % len(TYPE_OF_SLOT)
            for slot, t in enumerate(TYPE_OF_SLOT)
        ) + world.count(type)
        jobs += [
            functools.partial(list_documents, world, type, numbers)
            for numbers in ranges(1, 1 + -(-members // LINKS_PER_LIST), PAGES_PER_JOB)
        ]
    for chunk in in_processes(
        jobs, min(processes, len(jobs) // 20)
    ):  # starting a process takes as long as 1,000 pages
        yield from chunk
    home = "".join(f'<li><a href="/{PLURALS[type]}">{PLURALS[type]}</a></li>' for type in TYPES)
    page = (
        f'<!doctype html><html><head><meta charset="utf-8"><title>Home</title></head>'
        f"<body><h1>Home</h1><ul>{home}</ul></body></html>"
    )
    yield document(world, "", "Home", "The home page.", page)
    for path, title, description, page in deep.pages(world) if world.kind == "deep" else ():
        yield document(world, path, title, description, page)


def write_world(world: World, out: Path | str, processes: int = 1) -> Path:
    """Write `pages.db` and `facts.jsonl` of a world into the folder `out` and return the folder.

    A folder without `pages.db`, which comes last and whole, is no world: an interrupted one is written again.

    Raises:
        OSError, sqlite3.Error: the folder cannot be written.
    """
    from data.index import build_index

    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    (out / "pages.db").unlink(missing_ok=True)  # of another world, perhaps
    with open(out / "facts.jsonl", "w") as file:
        for index in range(world.entities):
            entity = world.entity(index)
            file.write(
                json.dumps(
                    {
                        "name": entity.name,
                        "type": entity.type,
                        "url": world.url(index),
                        "facts": entity.facts,
                    }
                )
                + "\n"
            )
    (out / "world.json").write_text(json.dumps(world.description()))
    with contextlib.closing(documents(world, processes)) as pages:
        build_index(pages, out / "pages.db")
    return out


def load_world(folder: Path | str) -> World:
    """The World that was written to `folder`.

    Raises:
        FileNotFoundError: no world there; the message says how to make one.
    """
    description = Path(folder) / "world.json"
    if not description.exists() or not (Path(folder) / "pages.db").exists():
        raise FileNotFoundError(
            f"no world at {folder}: make one with `python data/world.py --out {folder}`"
        )
    return World(**json.loads(description.read_text()))


def world_folder(meta_world: dict) -> Path:
    """Folder of the world a task was made from (`task.meta["world"]`), written on first use: a few seconds."""
    kind = f"-{meta_world['kind']}" if "kind" in meta_world else ""
    folder = WORLDS / ("{split}-{seed}-{entities}".format(**meta_world) + kind)
    if not (folder / "pages.db").exists():
        write_world(World(**meta_world), folder)
    return folder


def main():
    parser = argparse.ArgumentParser(
        description="Write a fictional world: pages, search index and facts."
    )
    parser.add_argument("--seed", type=int, default=7, help="decides every name and fact")
    parser.add_argument("--entities", type=int, default=500, help="number of entities (pages)")
    parser.add_argument(
        "--split", default="train", choices=SPLITS, help="worlds of different splits share no name"
    )
    parser.add_argument(
        "--kind",
        default="plain",
        choices=KINDS,
        help="deep: catalogues, notices, roads and a calendar besides",
    )
    parser.add_argument(
        "--processes",
        type=int,
        default=os.cpu_count(),
        help="how many make the pages of a large world; it is the same for any number",
    )
    parser.add_argument("--out", required=True, help="folder to write")
    args = parser.parse_args()
    try:
        write_world(
            World(args.seed, args.entities, args.split, args.kind), args.out, args.processes
        )
    except (OSError, ValueError, sqlite3.Error) as error:
        sys.exit(f"data/world.py: {error}")
    except KeyboardInterrupt:
        sys.exit(f"data/world.py: stopped; {args.out} holds no whole world")
    print(f"{args.entities} entities written to {args.out}")


if __name__ == "__main__":
    main()
