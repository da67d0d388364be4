"""A seeded, fictional web: nothing in it can be known by heart, so answers have to be looked up.

`World(seed, entities, split)` is a *function* of its arguments: `world.entity(i)` computes the i-th
entity (its name, type and facts) from random numbers keyed by (seed, i), so a world of 100,000
entities takes no more memory than one of 500. `page_html` writes an entity's page: navigation, a
lead whose sentences are also the page's meta description (what a search engine shows as the
snippet), a history with stale facts, and records that need `browse`. Its style decides the hosts
(data/sites.py) and layouts of its pages. A world of kind "deep" has catalogues, contradicting
notices, roads and a calendar besides (data/deep/pages.py), for questions that take many pages.

In: a seed. Out: a folder with `pages.db` (full-text index and HTML, see data/index.py),
`facts.jsonl` (the ground truth) and `world.json` (the arguments). To try an idea, add a relation to
data/parts.py or a form of records to LAYOUTS.

    python data/world.py --seed 7 --entities 500 --out data/worlds/w7
"""

import contextlib
import copy
import errno
import functools
import html
import json
import os
import random
import sqlite3
import sys
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from transformers.hf_argparser import HfArg

from data.deep import pages as deep
from data.index import build_index, in_processes, open_index
from data.parts import (
    FIRST_SYLLABLES,
    LAST_SYLLABLES,
    LEAD,
    MIDDLE_SYLLABLES,
    PLURALS,
    RECORDS,
    RELATIONS,
    SYLLABLES,
    TYPES,
    html_page,
)
from data.sites import COMPOSED, SEEN, UNSEEN, draw_sites
from data.task import DEFAULTS, SPLITS, Kind, Split, Style, check_world, parse_object
from support.flags import parse_flags
from support.html_text import html_to_text


@dataclass
class Args:
    out: str = HfArg(help="folder to write")
    seed: int = HfArg(default=7, help="decides every name and fact")
    entities: int = HfArg(default=500, help="number of entities (pages)")
    split: Split = HfArg(default="train", help="worlds of different splits share no name")
    kind: Kind = HfArg(default="plain", help="deep: catalogues, notices, roads, calendar besides")
    style: Style = HfArg(
        default="varied",
        help="single: one host and one layout; varied: hosts and layouts of the forms that "
        "training has; unseen-hosts, unseen-layouts: forms that training has not",
    )
    host: list[str] = HfArg(
        default_factory=list,
        help="hosts to spread the pages over, each with a folder if you like, such as kor.test or "
        "kor.test/maps (default: drawn from the seed)",
    )
    processes: int = HfArg(default=os.cpu_count() or 1, help="how many make a large world's pages")


# People are what most relations point at, so a third of the entities are people.
TYPE_OF_SLOT = "person city person company country river person book city festival".split()
SLOTS = {type: [k for k, t in enumerate(TYPE_OF_SLOT) if t == type] for type in TYPES}
WORLDS = Path(__file__).resolve().parent / "worlds"
LONGEST_DEEP_SITE = 12
LINKS_PER_LIST = 40
PAGES_PER_JOB = 200  # what a process makes at a time


@dataclass
class Entity:
    index: int
    name: str
    type: str
    facts: dict[str, str]  # relation -> value as it stands on the page
    targets: dict[str, int]  # relation -> index of the entity it points at, where it does


class World:
    """A fictional world as a function of its seed.

    Args:
        seed: an integer; decides every name and fact.
        entities: how many entities the world has, 20 to a million (a deep one has 300 or more).
        split: one of SPLITS; worlds of different splits share no entity name.
        kind: "plain", or "deep" for the pages of data/deep/pages.py besides; names and facts are
            the same.
        style: one of STYLES: which forms of addresses and layouts its pages have.
        hosts: where the pages stand, such as "kor.test" or "kor.test/maps"; by default the style
            and the seed decide.

    Raises:
        ValueError: an argument is of another type or out of range.
    """

    def __init__(
        self,
        seed: int,
        entities: int,
        split: str = "train",
        kind: str = "plain",
        style: str = "single",
        hosts: Sequence[str] = (),
    ):
        self.seed, self.entities, self.split, self.kind = seed, entities, split, kind
        self.style, self.hosts = style, list(hosts)
        check_world(self.description())
        self.settle(f"sites-{seed}-{split}")
        # Names have two syllables while they suffice, three in large worlds. An affine
        # permutation scatters the numbers of the names; a step that is coprime with how many
        # names there are visits each once.
        self.syllables = 2 if entities * len(SPLITS) <= SYLLABLES**2 // 2 else 3
        self.name_space = SYLLABLES**self.syllables // len(SPLITS)
        rng = random.Random(f"names-{seed}-{split}")
        self.name_offset = rng.randrange(self.name_space)
        self.name_step = 0
        while not (self.name_step % 2 and self.name_step % 3 and self.name_step % 5):
            self.name_step = rng.randrange(1, self.name_space)

    def description(self) -> dict:
        """The arguments that make this world again, without those that are as by default."""
        arguments = {"seed": self.seed, "entities": self.entities, "split": self.split}
        others = {"kind": self.kind, "style": self.style, "hosts": self.hosts}
        return arguments | {key: v for key, v in others.items() if v != DEFAULTS[key]}

    def settle(self, key: str) -> None:
        """Choose the sites of the pages (see data/sites.py) by a key."""
        forms = COMPOSED if self.split == "pretrain" else SEEN
        forms = UNSEEN if self.style == "unseen-hosts" else forms
        # A page of a deep world's catalogue has eight addresses and is to fit into one view.
        longest = LONGEST_DEEP_SITE if self.kind == "deep" else None
        if self.hosts:
            self.sites = [f"{host}/*" for host in self.hosts]
        elif self.style == "single":
            self.sites = [f"w{self.seed}.test/*"]
        else:
            self.sites = draw_sites(f"{key}-{self.style}", self.split, forms, longest)
        self.host = self.sites[0].split("/")[0]  # of the home page

    def elsewhere(self, key: str) -> "World":
        """The same world at other addresses, chosen by a key."""
        other = copy.copy(self)
        other.settle(key)
        return other

    def name(self, index: int) -> str:
        """The name of an entity, unique in the world."""
        number = (self.name_offset + index * self.name_step) % self.name_space
        number, last = divmod(number, SYLLABLES // len(SPLITS))
        middle = ""
        if self.syllables == 3:
            number, place = divmod(number, SYLLABLES)
            middle = MIDDLE_SYLLABLES[place]
        # Every split uses every syllable, but a pair (first, last) belongs to one split: the sum
        # of their numbers modulo 4 says which.
        last = last * len(SPLITS) + (SPLITS.index(self.split) - number) % len(SPLITS)
        return FIRST_SYLLABLES[number] + middle + LAST_SYLLABLES[last]

    def type(self, index: int) -> str:
        return TYPE_OF_SLOT[index % len(TYPE_OF_SLOT)]

    def address(self, path: str) -> str:
        """The address of a page.

        Args:
            path: what the page is called within the world: an entity's name, "cities-2"; "" is the
                home page.
        """
        if not path:
            return f"http://{self.host}/"
        site = self.sites[zlib.crc32(path.encode()) % len(self.sites)]
        return f"http://{site.replace('*', path)}"

    def url(self, index: int) -> str:
        return self.address(self.name(index))

    def path(self, url: str) -> str | None:
        """The inverse of `address`; None if the address is none of this world's."""
        for site in self.sites:
            before, after = site.split("*")
            path = url.removeprefix(f"http://{before}").removesuffix(after)
            if path and "/" not in path and self.address(path) == url:
                return path
        return "" if url == self.address("") else None

    def link(self, path: str, label: str = "") -> str:
        """A link to a page; our addresses and labels hold nothing that has to be escaped."""
        return f'<a href="{self.address(path)}">{label or path}</a>'

    def random_entity(self, type: str, rng: random.Random) -> int:
        """Index of a random entity of this type."""
        full_rounds = self.entities // len(TYPE_OF_SLOT)
        return rng.randrange(full_rounds) * len(TYPE_OF_SLOT) + rng.choice(SLOTS[type])

    def random_value(self, kind: str, rng: random.Random) -> tuple[str, int | None]:
        """A value for a relation of LEAD or RECORDS, and the entity that it names, if any."""
        if kind == "number":
            return str(rng.randint(100, 999)), None
        if kind == "year":
            return str(rng.randint(1500, 1999)), None
        target = self.random_entity(kind, rng)
        return self.name(target), target

    def count(self, type: str) -> int:
        """Entities of this type that `nth` counts: those in full rounds of TYPE_OF_SLOT."""
        return self.entities // len(TYPE_OF_SLOT) * len(SLOTS[type])

    def nth(self, type: str, number: int) -> int:
        """Index of the number-th entity (from 0) of this type."""
        rounds, slot = divmod(number, len(SLOTS[type]))
        return rounds * len(TYPE_OF_SLOT) + SLOTS[type][slot]

    def position(self, index: int) -> int | None:
        """The inverse of `nth`: its number among its type; None in the last, broken round."""
        slots = SLOTS[self.type(index)]
        number = index // len(TYPE_OF_SLOT) * len(slots) + slots.index(index % len(TYPE_OF_SLOT))
        return number if number < self.count(self.type(index)) else None

    def entity(self, index: int) -> Entity:
        """The entity with this index: a pure function of (seed, split, index)."""
        rng = random.Random(f"facts-{self.seed}-{self.split}-{index}")
        facts, targets = {}, {}
        for relation, kind in RELATIONS[self.type(index)].items():
            facts[relation], target = self.random_value(kind, rng)
            if target is not None:
                targets[relation] = target
        return Entity(index, self.name(index), self.type(index), facts, targets)


# -------------------------------------------------------------------------------------------- pages

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


def lead_sentences(entity: Entity, shown: dict[str, str]) -> str:
    """The sentences at the top of an entity's page, which are also its meta description.

    Args:
        shown: relation -> its value as it is written here; on the page names are links.
    """
    relations = list(LEAD[entity.type])
    random.Random(f"lead-{entity.name}").shuffle(relations)
    facts = [f" The {relation} of {entity.name} is {shown[relation]}." for relation in relations]
    return f"{entity.name} is a {entity.type}." + "".join(facts)


# The forms in which the records stand on a page: around all of them, and around each. Training sees
# the first four.
LAYOUTS = {
    "table": ("<table>{}</table>", "<tr><td>{0}</td><td>{1}</td></tr>"),
    "box": ('<table class="infobox">{}</table>', "<tr><td>{0}</td><td>{1}</td></tr>"),
    "definitions": ("<dl>{}</dl>", "<dt>{0}</dt><dd>{1}</dd>"),
    "sentences": ("<p>{}</p>", "The {0} of {2} is {1}. "),
    "bullets": ("<ul>{}</ul>", "<li>{0}: {1}</li>"),
    "headings": ("{}", "<h3>{0}</h3><p>{1}</p>"),
}


def draw_layout(world: World, index: int) -> tuple[str, bool]:
    """The form of an entity's records, and whether the lead comes last on its page."""
    if world.style == "single":
        return "table", False
    rng = random.Random(f"layout-{world.seed}-{world.split}-{index}")
    forms = list(LAYOUTS)[4:] if world.style == "unseen-layouts" else list(LAYOUTS)[:4]
    return rng.choice(forms), rng.random() < 0.5


def page_html(world: World, entity: Entity) -> str:
    """The HTML page of an entity."""
    rng, link = random.Random(f"page-{world.seed}-{entity.index}"), world.link
    shown = entity.facts | {relation: link(entity.facts[relation]) for relation in entity.targets}

    def filler(count: int) -> str:
        others = [link(world.name(rng.randrange(world.entities))) for _ in range(2 * count)]
        return " ".join(rng.choice(FILLER).format(*others[2 * i : 2 * i + 2]) for i in range(count))

    stale, kind = rng.choice(list(LEAD[entity.type].items()))
    stale_value, target = world.random_value(kind, rng)
    stale_value = stale_value if target is None else link(stale_value)
    form, lead_is_last = draw_layout(world, entity.index)
    around, each = LAYOUTS[form]
    records = "".join(each.format(r, shown[r], entity.name) for r in RECORDS[entity.type])
    records = f"<h2>Records</h2>{around.format(records)}"
    sections = [
        f"<p>{lead_sentences(entity, shown)}</p>",
        f"<h2>Stories</h2><p>{filler(5)}</p><p>{filler(4)}</p><h2>History</h2>"
        f"<p>Long ago the {stale} was {stale_value}. {filler(6)}</p><p>{filler(5)}</p>",
        records,
    ]
    if lead_is_last:
        sections.append(sections.pop(0))
    if form == "box":
        sections.insert(0, sections.pop(sections.index(records)))
    # Names and numbers are our own letters and digits: only the meta attribute needs escaping.
    return html_page(
        entity.name,
        f"<nav>{link('', 'Home')} {link(PLURALS[entity.type])}</nav><h1>{entity.name}</h1>"
        f"{''.join(sections)}<p>{filler(3)}</p>"
        f"{deep.sections(world, entity) if world.kind == 'deep' else ''}",
        f'<meta name="description" content="{html.escape(lead_sentences(entity, entity.facts))}">',
    )


def document(world: World, path: str, title: str, description: str, page: str) -> dict:
    """A page as data.index.build_index wants it."""
    return {
        "url": world.address(path),
        "title": title,
        "description": description,
        "text": html_to_text(page),
        "html": page,
    }


def entity_documents(world: World, indices: range) -> list[dict]:
    """The pages of these entities."""
    return [
        document(world, e.name, e.name, lead_sentences(e, e.facts), page_html(world, e))
        for e in map(world.entity, indices)
    ]


def list_documents(world: World, type: str, numbers: range) -> list[dict]:
    """Pages (from 1) of the list of all entities of a type; each links to the next."""
    plural, found = PLURALS[type], []
    for number in numbers:
        places = range((number - 1) * LINKS_PER_LIST, number * LINKS_PER_LIST + 1)
        # One more than this page shows says whether there is another page.
        members = [i for i in (world.nth(type, place) for place in places) if i < world.entities]
        items = "".join(f"<li>{world.link(world.name(i))}</li>" for i in members[:LINKS_PER_LIST])
        is_last = len(members) <= LINKS_PER_LIST
        path = plural if number == 1 else f"{plural}-{number}"
        following = world.link(f"{plural}-{number + 1}", f"more {plural}")
        more = "" if is_last else f"<p>{following}</p>"
        title = f"List of {plural} {number}"
        page = html_page(
            title, f"<nav>{world.link('', 'Home')}</nav><h1>{title}</h1><ul>{items}</ul>{more}"
        )
        found.append(document(world, path, title, f"List of {plural}, part {number}.", page))
    return found


def documents(world: World, processes: int = 1) -> Iterator[dict]:
    """All pages of a world as documents for `build_index`: entity pages, then the lists, the home
    page, and a deep world's own pages.

    Args:
        processes: how many make them; the pages and their order are the same for any number.
    """
    jobs = [
        functools.partial(entity_documents, world, range(world.entities)[at : at + PAGES_PER_JOB])
        for at in range(0, world.entities, PAGES_PER_JOB)
    ]
    for type in TYPES:
        members = sum(len(range(slot, world.entities, len(TYPE_OF_SLOT))) for slot in SLOTS[type])
        numbers = range(1, 1 + -(-members // LINKS_PER_LIST))
        jobs += [
            functools.partial(list_documents, world, type, numbers[at : at + PAGES_PER_JOB])
            for at in range(0, len(numbers), PAGES_PER_JOB)
        ]
    # Starting a process takes as long as 1,000 pages.
    for made in in_processes(jobs, min(processes, len(jobs) // 20)):
        yield from made
    home = "".join(f"<li>{world.link(PLURALS[type])}</li>" for type in TYPES)
    page = html_page("Home", f"<h1>Home</h1><ul>{home}</ul>")
    yield document(world, "", "Home", "The home page.", page)
    for page in deep.pages(world) if world.kind == "deep" else ():
        yield document(world, *page)


# -------------------------------------------------------------------------------------------- files


def write_world(world: World, out: Path | str, processes: int = 1) -> Path:
    """Write `pages.db` and `facts.jsonl` of a world into the folder `out` and return the folder.

    A folder without `pages.db`, which comes last and whole, is no world: an interrupted one is
    written again.

    Raises:
        OSError, sqlite3.Error: the folder cannot be written.
    """
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    (out / "pages.db").unlink(missing_ok=True)  # of another world, perhaps
    with open(out / "facts.jsonl", "w") as file:
        for index in range(world.entities):
            entity = world.entity(index)
            record = {"name": entity.name, "type": entity.type, "url": world.url(index)}
            file.write(json.dumps(record | {"facts": entity.facts}) + "\n")
    (out / "world.json").write_text(json.dumps(world.description()))
    with contextlib.closing(documents(world, processes)) as pages:
        build_index(pages, out / "pages.db")
    return out


def load_world(folder: Path | str) -> World:
    """The World that was written to `folder`.

    Raises:
        FileNotFoundError: no world there; the message says how to make one.
        ValueError: its description is damaged.
    """
    description = Path(folder) / "world.json"
    if not description.exists() or not (Path(folder) / "pages.db").exists():
        raise FileNotFoundError(
            f"no world at {folder}: make one with `python data/world.py --out {folder}`"
        )
    try:
        arguments = parse_object(description.read_bytes())
        check_world(arguments)
    except ValueError as error:
        raise ValueError(f"{description}: {error}") from None
    return World(**arguments)


def world_folder(arguments: dict) -> Path:
    """Folder of the world a task was made from (`task.meta["world"]`), written on first use.

    Writing takes a few seconds. Where the checkout is read-only, worlds are kept in the folder
    that the environment variable NANO_RESEARCHER_CACHE names, or in ~/.cache/nano-researcher.

    Raises:
        OSError, sqlite3.Error: no folder can be written.
        ValueError: these are no arguments of a world.
    """
    check_world(arguments)
    world = World(**arguments)
    name = f"{world.split}-{world.seed}-{world.entities}"
    for key, value in list(world.description().items())[3:]:
        name += f"-{value if key != 'hosts' else zlib.crc32(repr(value).encode())}"
    cache = os.environ.get("NANO_RESEARCHER_CACHE") or Path.home() / ".cache" / "nano-researcher"
    folders = [WORLDS / name, Path(cache) / "worlds" / name]
    for folder in folders:
        with contextlib.suppress(FileNotFoundError, ValueError):  # none, or of an earlier version
            open_index(folder / "pages.db").close()
            return folder
    try:
        return write_world(world, folders[0])
    except OSError as error:
        if error.errno not in (errno.EACCES, errno.EPERM, errno.EROFS):
            raise
        return write_world(world, folders[1])


def main():
    (args,) = parse_flags((Args,), __doc__)
    try:
        world = World(args.seed, args.entities, args.split, args.kind, args.style, args.host)
        write_world(world, args.out, args.processes)
    except (OSError, ValueError, sqlite3.Error) as error:
        sys.exit(f"data/world.py: {error}")
    except KeyboardInterrupt:
        sys.exit(f"data/world.py: stopped; {args.out} holds no whole world")
    print(f"{args.entities} entities written to {args.out}")


if __name__ == "__main__":
    main()
