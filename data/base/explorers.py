"""Explorers of mixed skill: what the base model has read about how to use tools.

Most explorers act at random over valid moves: they search the wrong thing, open the wrong page,
stop too early or go round in circles; a minority behaves sensibly. So the base model writes valid
calls, can copy names and read a fact off a page, and solves few tasks.

In: worlds of the split "pretrain". Out: transcripts as token ids, with a mask on the explorer's own
tokens. Each explorer finds its world at addresses of its own, so that none can be learned by heart.
To try an idea, change `sensible_move` or `random_move`.
"""

import json
import random
import re
from dataclasses import dataclass
from string import ascii_lowercase

import numpy as np
from tqdm import tqdm

from context import Chat
from data.deep import pages as deep
from data.deep.solve import read_fact
from data.parts import OPERATIONS, RECORDS, RELATIONS, TYPES
from data.task import Task
from data.tasks import draw_task, shares_of
from data.world import World, page_html, world_folder
from rollout import RolloutArgs
from support.html_text import view_page
from tools import Search

Row = tuple[np.ndarray, np.ndarray]  # ids (T,) int32, and mask (T,) of the explorer's own tokens
Call = dict  # {"name": …, "arguments": {…}}
# The window of the transcripts that made the shipped models: 900 tokens before an action.
WINDOW = RolloutArgs(max_turns=6, max_context=996)


@dataclass
class Site:
    """A world as explorers meet it."""

    world: World
    search: Search
    pages: dict[str, str]  # path -> HTML
    types: dict[str, str]  # name -> type of the entity


def open_site(world: World, search_results: int = WINDOW.search_results) -> Site:
    """The site of a world, which is written on first use."""
    pages = {world.name(i): page_html(world, world.entity(i)) for i in range(world.entities)}
    if world.kind == "deep":
        pages |= {path: page for path, _, _, page in deep.pages(world)}
    types = {world.name(i): world.type(i) for i in range(world.entities)}
    search = Search(world_folder(world.description()) / "pages.db", search_results)
    return Site(world, search, pages, types)


def search_for(*queries: str) -> Call:
    return {"name": "search", "arguments": {"queries": list(queries)}}


def browse(url: str, **extra) -> Call:
    return {"name": "browse", "arguments": {"url": url, **extra}}


def compute(a: str, sign: str, b: str) -> Call:
    code = f"print(abs({a} - {b}))" if sign == "-" else f"print({a} {sign} {b})"
    return {"name": "python", "arguments": {"code": code}}


def fact_text(relation: str, name: str, value: str) -> str:
    return f"The {relation} of {name} is {value}."


def worked_out(call: Call) -> str:
    """What the code of `compute` prints."""
    a, sign, b = re.search(r"(\d+) ([-+*]) (\d+)", call["arguments"]["code"]).groups()
    values = {"+": int(a) + int(b), "-": abs(int(a) - int(b)), "*": int(a) * int(b)}
    return str(values[sign])


def call_text(call: Call) -> str:
    return f"<tool_call>{json.dumps(call, ensure_ascii=False)}</tool_call>"


def turn_text(thought: str, action: Call | str) -> str:
    """A turn as the policy would write it; an action that is no call is the answer."""
    is_answer = isinstance(action, str)
    said = f"<answer>{action}</answer>" if is_answer else call_text(action)
    return f"<think>{thought}</think>{said}"


def said_ids(chat: Chat, text: str) -> list[int]:
    """A turn as the policy would sample it, behind a generation prompt that may have opened the
    thought."""
    is_open = chat.opened and "</think>" not in chat.opened
    return chat.trusted(text.removeprefix("<think>") if is_open else text) + [chat.end_id]


def row_of(ids: list[int], is_own: list) -> Row:
    return np.array(ids, dtype=np.int32), np.array(is_own, dtype=bool)


class Explorer:
    """Decides the turns of one task with a given skill.

    At each turn it makes the sensible move with probability `skill`, else a random valid one.
    Thoughts of both kinds look alike: a plan read off the question, then facts read off the last
    results, so that style gives nothing away. A move is (thought, action), as of `turn_text`.

    Args:
        task: what to find out.
        site: the world of the task.
        rng: decides every move.
        skill: probability of a sensible move.
        page_chars: of a page that one call of `browse` shows.
    """

    def __init__(
        self,
        task: Task,
        site: Site,
        rng: random.Random,
        skill: float,
        page_chars: int = WINDOW.page_chars,
    ):
        self.task, self.site, self.rng, self.skill = task, site, rng, skill
        self.page_chars = page_chars
        self.world = site.world.elsewhere(str(rng.random()))
        self.relations = task.meta.get("relations", [])
        # These names stand in the question.
        named = task.evidence[: 2 if task.family == "compute" else 1]
        self.names = [site.world.path(url) for url in named]
        self.seen_names, self.seen_urls, self.numbers = list(self.names), [], []
        self.facts: dict[tuple[str, str], str] = {}  # (name, relation) -> value, as read so far
        self.last_facts: list[tuple[str, str]] = []  # those of the last result
        self.first_hit = ""  # the first page that the last result with pages names
        self.last_call: Call | None = None
        self.computed: str | None = None  # what `python` printed last
        self.noted: set[str] = set()

    def plan(self) -> str:
        if self.task.family == "compute":
            relation, operation = self.relations
            one, other = self.names
            return f"{operation}: {relation} of {one}, {relation} of {other}."
        return f"{self.names[0]}: {', '.join(self.relations)}."

    def note(self, name: str, relation: str) -> str:
        return fact_text(relation, name, self.facts[name, relation])

    # ---------------------------------------------------------------------------------------- moves

    def move(self, turn: int) -> tuple[str, Call | str]:
        """What it does in turn `turn`, counted from 0: (thought, action)."""
        if self.rng.random() < self.skill:
            thought, action = self.sensible_move()
        else:
            thought, action = self.random_move()
            if self.last_call and self.rng.random() < 0.08:
                action = self.last_call  # round in circles
        return self.plan() if turn == 0 else thought or "Let me look.", action

    def sensible_move(self) -> tuple[str, Call | str]:
        """Note what was found, say what is left of the plan, and go on with that."""
        if self.task.family == "compute":
            return self.sensible_sum()
        value, left, notes = self.names[0], list(self.relations), []
        while left and (value, left[0]) in self.facts:
            notes.append(self.note(value, left[0]))
            value = self.facts[value, left.pop(0)]
        thought = " ".join(note for note in notes if note not in self.noted)
        self.noted.update(notes)
        if not left:
            return thought or notes[-1], value
        thought = f"{thought} {value}: {', '.join(left)}.".strip()
        url = self.world.address(value)
        if left[0] in RECORDS.get(self.site.types.get(value), {}) and url in self.seen_urls:
            return thought, browse(url, find=left[0])
        return thought, search_for(f"{left[0]} of {value}")

    def sensible_sum(self) -> tuple[str, Call | str]:
        relation, operation = self.relations
        if self.computed is not None:
            return f"It is {self.computed}.", self.computed
        known = [name for name in self.names if (name, relation) in self.facts]
        missing = [name for name in self.names if name not in known]
        thought = " ".join(self.note(name, relation) for name in known)
        if missing:
            queries = [f"{relation} of {name}" for name in missing]
            return f"{thought} {self.plan()}".strip(), search_for(*queries)
        a, b = (self.facts[name, relation] for name in self.names)
        return f"{thought} {operation}: {a}, {b}.", compute(a, OPERATIONS[operation], b)

    def random_move(self) -> tuple[str, Call | str]:
        """A valid move that follows no plan: some name at hand, some relation, any tool.

        Answers quote a fact, mostly a wrong one. A call does what the thought before it says, so
        that a name there decides which page is opened, and an operation there the sign.
        """
        rng = self.rng
        fact = rng.choice(self.last_facts) if self.last_facts else None
        if fact and rng.random() < 0.7:
            thought = self.note(*fact)
        else:
            thought = rng.choice(["Let me look.", "Not sure.", "Not found."])
        name = rng.choice(3 * self.names + self.seen_names[-4:])
        if rng.random() < 0.5:
            relation = rng.choice(self.relations)
        else:
            relation = rng.choice(list(RELATIONS[rng.choice(TYPES)]))
        roll = rng.random()
        if roll < 0.35 and fact:
            return self.note(*fact), self.facts[fact]
        if roll < 0.6 and self.seen_urls:
            url = self.first_hit if rng.random() < 0.7 else rng.choice(self.seen_urls[-3:])
            views = [{}, {"page": rng.randint(1, 4)}, {"links": True}] + 4 * [{"find": relation}]
            thought = f"{thought} {self.world.path(url)}: {relation}."
            return thought, browse(url, **rng.choice(views))
        if roll < 0.65 and len(self.numbers) >= 2:
            operation, (a, b) = rng.choice(sorted(OPERATIONS)), self.numbers[-2:]
            thought = f"{thought} {operation}: {a}, {b}."
            return thought, compute(a, OPERATIONS[operation], b)
        if rng.random() < 0.5:
            thought = f"{thought} {name}: {relation}."
        queries = [rng.choice([f"{relation} of {name}", f"{relation} of {name}", name, relation])]
        if rng.random() < 0.15:
            queries.append(f"{relation} of {rng.choice(self.names)}")
        return thought, search_for(*queries)

    # -------------------------------------------------------------------------------------- results

    def run(self, call: Call) -> str:
        """The result of a call, as the agent's tools would give it."""
        arguments = call["arguments"]
        if call["name"] == "search":
            return self.moved(self.site.search(**arguments))
        if call["name"] == "python":
            self.computed = worked_out(call)
            return self.computed
        url = arguments["url"]
        path = self.world.path(url)
        if path not in self.site.pages:
            return f"error 404 for {url}"
        page, find = arguments.get("page", 1), arguments.get("find")
        links = arguments.get("links", False)
        view = view_page(self.site.pages[path], url, page, find, links, self.page_chars)
        return self.moved(view)

    def moved(self, text: str) -> str:
        """A result with each address of the site where this explorer finds the page."""

        def move(url: re.Match) -> str:
            path = self.site.world.path(url[0])
            return url[0] if path is None else self.world.address(path)

        return re.sub(r"https?://\S+", move, text)

    def read(self, text: str) -> None:
        """Take in a tool result: names, URLs, numbers and facts that a reader would find in it."""
        types, self.last_facts = self.site.types, []
        for word in text.replace("/", " ").replace(".", " ").split():
            if word in types and word not in self.seen_names:
                self.seen_names.append(word)
            if word.isdigit() and len(word) == 3:
                self.numbers.append(word)
        title, hits = None, []
        for line in text.splitlines():
            if "http" in line:
                url = next(w for w in line.split() if w.startswith("http"))
                title = self.world.path(url)
                hits += [url] if title in types else []
            elif title in types:
                for relation in RELATIONS[types[title]]:
                    if value := read_fact(re.sub(r"^p\d+: ", "", line), title, relation):
                        self.facts[title, relation] = value
                        self.last_facts.append((title, relation))
        self.seen_urls += [url for url in dict.fromkeys(hits) if url not in self.seen_urls]
        self.first_hit = hits[0] if hits else self.first_hit

    def see(self, call: Call, result: str) -> None:
        """Take in the result of a call."""
        # A view by `find` does not repeat the URL: the reader remembers whose page it is.
        is_find = call["name"] == "browse" and "http" not in result
        self.read(f"{call['arguments']['url']}\n{result}" if is_find else result)
        self.last_call = call


def explore(
    explorer, task: Task, chat: Chat, args: RolloutArgs
) -> tuple[list[int], list[int], str | None]:
    """Play a task within the limits of the agent loop.

    Args:
        explorer: `move` gives its turns, `run` the result of a call, and `see` takes that in.

    Returns:
        (ids, mask with 1 on the explorer's own tokens, its answer if it gave one).
    """
    ids = chat.head(task.question)
    mask = [0] * len(ids)
    for turn in range(args.max_turns):
        thought, action = explorer.move(turn)
        said = said_ids(chat, turn_text(thought, action))
        ids += said
        mask += [1] * len(said)
        if isinstance(action, str):
            return ids, mask, action
        result = explorer.run(action)
        explorer.see(action, result)
        observation = chat.observation([result], args.observation_tokens)
        if len(ids) + len(observation) > args.max_context - args.max_new_tokens:
            break
        ids += observation
        mask += [0] * len(observation)
    return ids, mask, None


def draw_skill(rng: random.Random, skilled_share: float) -> float:
    """The probability of a sensible move: of so many explorers high, of the others low."""
    return 0.97 if rng.random() < skilled_share else rng.uniform(0.0, 0.12)


def random_frame(rng: random.Random) -> str:
    """A frame of a question that says nothing: what is asked for stands among random words, so that
    no word before it gives its place away."""
    before, after = (
        " ".join("".join(rng.choices(ascii_lowercase, k=rng.randint(2, 7))) for _ in range(count))
        for count in (rng.randint(0, 4), rng.randint(0, 2))
    )
    end = rng.choice([". ", "? ", ", ", " "])
    return f"{before.capitalize()} {{np}}{end}{after}".strip()


def write_transcripts(
    chat: Chat,
    seed: int,
    worlds: int,
    entities: int,
    number: int,
    skilled_share: float,
    args: RolloutArgs = WINDOW,
    families=(),
    any_frame: float = 0.0,
) -> list[Row]:
    """Explorer transcripts over all pretraining worlds; prints how often they were right.

    Args:
        seed: decides tasks and moves.
        worlds: how many worlds there are.
        entities: how many entities each has.
        number: how many transcripts to write.
        skilled_share: share of explorers that behave sensibly.
        args: limits of the explorers, as of the agent loop.
        families: of their tasks (default: all that the shipped training tasks have).
        any_frame: share of the questions that stand in a frame of random words.
    """
    rng = random.Random(f"explorers-{seed}")
    transcripts, right_by_family = [], {}
    per_world = number // worlds
    progress = tqdm(total=per_world * worlds, desc="explorers", unit="transcript", mininterval=5)
    for world_seed in range(100, 100 + worlds):
        world = World(world_seed, entities, "pretrain", style="varied")
        site = open_site(world, args.search_results)
        kinds, weights = zip(*shares_of(world, families, ()).items())
        for _ in range(per_world):
            family, hops = rng.choices(kinds, weights)[0]
            frame = random_frame(rng) if any_frame and rng.random() < any_frame else ""
            task = draw_task(world, family, hops, rng, rng.random() < 0.4, frame)
            skill = draw_skill(rng, skilled_share)
            explorer = Explorer(task, site, rng, skill, args.page_chars)
            ids, mask, answer = explore(explorer, task, chat, args)
            transcripts.append(row_of(ids, mask))
            right_by_family.setdefault(f"{family}{hops}", []).append(answer == task.answer)
            progress.update()
    progress.close()
    right = sum(map(sum, right_by_family.values()))
    print(
        f"explorers were right on {right / len(transcripts):.1%} of {len(transcripts)} tasks;",
        f"{np.mean([len(ids) for ids, _ in transcripts]):.0f} tokens a transcript;",
        {name: f"{np.mean(hits):.0%}" for name, hits in sorted(right_by_family.items())},
    )
    return transcripts


def write_visits(chat: Chat, style: str, number: int) -> list[Row]:
    """Transcripts of sensible explorers who open pages, in eight worlds of this style."""
    rng, rows = random.Random(f"visits-{style}"), []
    for seed in range(92, 100):
        site = open_site(World(seed, 60, "pretrain", style=style))
        for _ in range(number // 8):
            task = draw_task(site.world, "browse", 1, rng)
            ids, mask, _ = explore(Explorer(task, site, rng, 1.0), task, chat, WINDOW)
            rows.append(row_of(ids, mask))
    return rows
