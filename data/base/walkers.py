"""Walkers: explorers whose walks through the catalogues of deep worlds are longer than the window.

They play with the agent loop's own prompts, and write notes when the context manager asks for them.
In: worlds of the split "pretrain" and kind "deep". Out: segments as token ids, with a mask on the
walker's own tokens. To try an idea, change `sensible_move`, `random_move` or `notes`.
"""

import random
import re
from types import SimpleNamespace

import numpy as np
from tqdm import tqdm

from context import Chat, Trajectory, Turn, add_turn
from data.base.explorers import (
    Call,
    Explorer,
    Row,
    Site,
    browse,
    open_site,
    row_of,
    said_ids,
    search_for,
    turn_text,
)
from data.deep.pages import COLOURS, RARE_COLOUR
from data.deep.solve import NP, read_entries
from data.task import Task
from data.tasks import draw_task, form_of
from data.world import World
from reward import correct
from rollout import RolloutArgs, next_prompt, read_turn, take_results

WORD = rf"\b(greatest|smallest|{'|'.join(COLOURS)}|{RARE_COLOUR})\b"  # what a question looks for
# The managers under which a base learns to walk. Segments under `elide` are three times as long as
# those under `summarize`, so it plays one walk in three.
WINDOWS = 2 * [RolloutArgs(context="summarize", max_context=1024, max_turns=99)] + [
    RolloutArgs(context="elide", max_context=2560, max_turns=99)
]
# Turns are only parsed here, so the tools need no more than to find every call well formed.
TOOLS = dict.fromkeys(("search", "browse"), SimpleNamespace(check=lambda arguments: None))


def listed(word: str, names: list[str]) -> str:
    """A walker's list: "list: gold Bel gold Kor."

    A name follows its word, as on the page, so finding one is to go on as it stands there; and it
    follows the name before it, so the list can be written again in the same order. Both are what
    induction heads do.
    """
    return "list: " + " ".join(f"{word} {name}" for name in names or ["none"]) + "."


class Walker(Explorer):
    """Walks a catalogue from page to page.

    The sensible way: find the keeper, search its catalogue, follow "Next:", say in each thought
    what was found so far (the entries of a rare colour, the best price, a count), and answer where
    the catalogue ends; the notes say which catalogue it is and what was found. The random way:
    answer early, follow another link, go round in circles, take in a wrong entry, forget entries,
    write useless notes.
    """

    def __init__(self, task: Task, site: Site, rng: random.Random, skill: float):
        super().__init__(task, site, rng, skill)
        self.form = form_of(task)  # list, extreme or count
        owner = re.search(rf"catalogue of ({NP})|({NP})'s catalogue", task.question)
        *relation, name = re.findall(r"(?<=the )\w+(?= of)|\w+$", owner.group(1) or owner.group(2))
        self.names, self.seen_names = [name], [name]
        self.relation = relation[0] if relation else None
        self.keeper = None if relation else name
        self.word = re.search(WORD, task.question).group(1)
        self.catalogue_url, self.next_url, self.ended = None, None, False
        self.entries: list[tuple[str, str, int]] = []  # of the page in front
        self.found: list[tuple[str, int]] = []  # names with prices
        self.count, self.has_news, self.last_result = 0, False, ""

    def state(self) -> str:
        """What was found so far."""
        if self.form == "count":
            return f"{self.word}: {self.count}."
        if self.form == "extreme":
            best = f"{self.found[0][0]} {self.found[0][1]}" if self.found else "none"
            return f"{self.word}: {best}."
        return listed(self.word, [name for name, _ in self.found])

    def goal(self) -> str:
        return f"{self.keeper}: catalogue, {self.word}."

    def plan(self) -> str:
        if self.keeper is None:
            return f"{self.names[0]}: {self.relation}, catalogue, {self.word}."
        hop = f"{self.note(self.names[0], self.relation)} " if self.relation else ""
        return hop + self.goal()

    def has_begun(self) -> bool:
        return bool(self.found or self.count or self.next_url or self.ended)

    def take_in(self) -> bool:
        """Add what the page in front says to what was found; whether it adds anything."""
        before = self.state()
        for name, colour, price in self.entries:
            if self.form == "extreme":
                best = self.found[0][1] if self.found else None
                if best is None or (price > best if self.word == "greatest" else price < best):
                    self.found = [(name, price)]
            elif colour == self.word:
                self.count += 1
                self.found += [(name, price)] if name not in dict(self.found) else []
        self.entries = []
        return self.state() != before

    def answer(self) -> str:
        if self.form == "count":
            return str(self.count)
        return ", ".join(name for name, _ in self.found) or self.rng.choice(self.seen_names)

    def sensible_move(self) -> tuple[str, Call | str]:
        if self.keeper is None:
            self.keeper = self.facts.get((self.names[0], self.relation))
        if self.keeper is None:
            return self.plan(), search_for(f"{self.relation} of {self.names[0]}")
        self.has_news = self.take_in()
        thought = self.state() if self.has_begun() else self.plan()
        if self.ended:
            return thought, self.answer()
        if url := self.next_url or self.catalogue_url:
            return thought, browse(url)
        return thought, search_for(f"catalogue of {self.keeper}")

    def random_move(self) -> tuple[str, Call | str]:
        rng = self.rng
        if self.entries and rng.random() < 0.4:  # the wrong entry
            name, _, price = rng.choice(self.entries)
            self.found = [*self.found, (name, price)][-4:]
            self.count += rng.randint(0, 2)
        if rng.random() < 0.3:
            self.take_in()
        if self.found and rng.random() < 0.3:  # forgets
            self.found = rng.sample(self.found, len(self.found) - 1)
        thought = rng.choice([self.state(), self.state(), self.plan(), "Let me look.", "Not sure."])
        roll, urls = rng.random(), self.seen_urls[-9:]
        if roll < 0.35 and (self.found or self.count):
            return thought, self.answer()
        if roll < 0.65 and urls:
            url = rng.choice(urls)
            views = [{}, {}, {"page": 2}, {"links": True}, {"find": self.word}]
            return thought, browse(url, **rng.choice(views))
        if roll < 0.75 and self.last_call:
            return thought, self.last_call  # round in circles
        first = f"catalogue of {rng.choice(self.seen_names)}"
        second = f"{self.relation or 'catalogue'} of {self.names[0]}"
        return thought, search_for(rng.choice([first, second]))

    def notes(self) -> str:
        """What to keep. The page in front is not among it: its result comes after the notes."""
        rng = self.rng
        self.seen_urls = re.findall(r"https?://\S+", self.last_result)
        self.catalogue_url = self.catalogue_url if self.catalogue_url in self.seen_urls else None
        where = self.plan() if self.keeper is None else self.goal()
        if rng.random() < self.skill:
            return f"{self.state()} {where}" if self.has_begun() else where
        if rng.random() < 0.5:
            self.found = rng.sample(self.found, rng.randint(0, len(self.found)))
            self.count = rng.randint(0, self.count)
        useless = ["Not sure.", "Let me look.", f"{rng.choice(self.seen_names)}: {self.word}."]
        return rng.choice([f"{self.state()} {where}", where, self.state(), *useless])

    def read(self, text: str) -> None:
        super().read(text)
        self.last_result = text
        # Only a page counts: a search snippet may show some entry of another page.
        page = text if text.startswith("http") else ""
        urls = re.findall(r"https?://\S+", text)
        self.seen_urls += [url for url in urls if url not in self.seen_urls]
        catalogue = self.world.address(f"{self.keeper}-catalogue")
        if self.keeper and catalogue in urls:
            self.catalogue_url = catalogue
        self.entries = read_entries(page)
        following = re.search(r"Next: (\S+)", page)
        self.next_url = following.group(1) if following else None
        self.ended = "catalogue ends here" in page

    def walk(self, chat: Chat, args: RolloutArgs) -> tuple[list[Row], bool]:
        """Play under a context manager.

        Returns:
            Some segments (the first one, the last one, and two between, one of them where something
            was found), and whether the answer was right.
        """
        news: set[int] = set()  # segments in which something was found
        trajectory = Trajectory(self.task, (0,), head_ids=chat.head(self.task.question))
        while trajectory.status == "running" and next_prompt(trajectory, chat, args):
            call, self.has_news = None, False
            if len(trajectory.turns) in trajectory.memory.get("notes_turns", []):
                text = self.notes()
            else:
                is_sensible = self.rng.random() < self.skill
                thought, call = self.sensible_move() if is_sensible else self.random_move()
                text = turn_text(thought if trajectory.turns else self.plan(), call)
            news |= {len(trajectory.segments) - 1} if self.has_news else set()
            ids = said_ids(chat, text)
            turn = Turn(ids, [0.0] * len(ids), 0)
            add_turn(trajectory, turn)
            if read_turn(trajectory, chat, TOOLS):
                take_results(trajectory, [(self.run(call), False)])
                turn.observation_ids = chat.observation(turn.results, args.observation_tokens)
                self.read(turn.results[0])
                self.last_call = call
        segments = trajectory.segments
        if len(segments) > 4:
            between, last = range(1, len(segments) - 1), len(segments) - 1
            with_news = self.rng.choice([k for k in between if k in news] or between)
            segments = [segments[k] for k in sorted({0, last, with_news, self.rng.choice(between)})]
        rows = [row_of(s.ids, [turn >= 0 for turn in s.turn_of]) for s in segments]
        return rows, bool(correct(trajectory.answer, self.task.answer, self.task.answer_type))


def draw_walk(world: World, rng: random.Random) -> Task:
    """A question about a catalogue, mostly for a list.

    A total is for `python`, and to compare or count over two hundred entries takes more than this
    size of model.
    """
    while True:
        level = 1 if rng.random() < 0.85 else 2
        task = draw_task(world, "collection", level, rng, rng.random() < 0.25)
        form = form_of(task)
        if form == "list" or (form != "total" and rng.random() >= 0.8):
            return task


def write_walks(
    chat: Chat,
    seed: int,
    worlds: int,
    entities: int,
    rows: int,
    skilled_share: float,
) -> tuple[list[Row], list[Row]]:
    """Segments of walks over deep pretraining worlds; prints how often the walkers were right.

    Args:
        seed: decides tasks and moves.
        worlds: how many worlds there are, and one more for what is held out.
        entities: how many entities each has; one in fifty keeps a catalogue.
        rows: how many segments to write, at least.
        skilled_share: share of walkers that behave sensibly.

    Returns:
        The segments, and about 40 of skilled walkers in a world of their own.
    """
    rng = random.Random(f"walkers-{seed}")
    walks, held_out, right = [], [], []
    progress = tqdm(total=rows, desc="walkers", unit="segment", mininterval=5)
    for number in range(worlds):
        site = open_site(World(100 + number, entities, "pretrain", "deep", "varied"))
        while len(walks) < rows * min(1, (number + 1) / worlds):
            skill = 0.995 if rng.random() < skilled_share else rng.uniform(0.0, 0.7)
            walker = Walker(draw_walk(site.world, rng), site, rng, skill)
            segments, is_right = walker.walk(chat, rng.choice(WINDOWS))
            walks += segments
            right.append(is_right)
            progress.update(len(segments))
    progress.close()
    site = open_site(World(100 + worlds, entities, "pretrain", "deep", "varied"))
    while len(held_out) < 40:
        walker = Walker(draw_walk(site.world, rng), site, rng, 1.0)
        held_out += walker.walk(chat, rng.choice(WINDOWS))[0]
    length = np.mean([len(ids) for ids, _ in walks])
    print(
        f"walkers were right on {np.mean(right):.1%} of {len(right)} tasks; "
        f"{length:.0f} tokens a segment"
    )
    return walks, held_out
