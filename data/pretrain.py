"""The nano base model's recipe: a small Llama that stands in for a pretrained k-series model.

It is pretrained on pages and on transcripts of *explorers of mixed skill* in worlds of its own: names, worlds and question
templates are apart from those of train, dev and test. Most explorers act at random over valid moves: they search the wrong
thing, open the wrong page, stop too early or go round in circles; a minority behaves sensibly. So the base model writes
valid calls, can copy names and read a fact off a page, and solves few tasks: like a pretrained model, it has seen good
behaviour among much bad. Which behaviour pays is left to RL.

Stages: (1) a byte-level BPE tokenizer that cuts a name into the same tokens wherever it stands; (2) copy drills: random spans
that come again (induction heads appear within a few hundred steps); (3) transcripts, shuffled with drills, with loss on the
explorer's own tokens and on a sample of the others.

With `--deep_share` some transcripts are of walks through the catalogues of deep worlds, too long for the window: walkers of mixed
skill play them with the agent loop's own prompts under `--deep_manager` (summarize), and write notes when asked. A row is a segment.

In: nothing. Out: `data/nano/` (config, safetensors, tokenizer); the second command below goes on from it to what `data/nano-deep` is.
To try an idea, change `Explorer` or the sizes in `Args`.

    python data/pretrain.py                 # about an hour on two cores
    python data/pretrain.py --init data/nano --deep_share 0.75 --transcripts 3000 --drill_share 0.4 --learning_rate 1e-3 --minutes 40 --out nano-deep
"""

import json
import math
import os
import random
import re
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace

os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # before torch, as in train.py
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from tqdm import tqdm
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from context import CHATML, Chat, Trajectory
from data.deep import pages as deep
from data.deep.solve import NP, read_entries, read_fact
from data.tasks import OPERATIONS, SHARES, draw_task, form_of
from data.world import RELATIONS, TYPES, World, page_html, world_folder
from engine import keep_memory
from reward import correct
from rollout import RolloutArgs, finish_turn, next_prompt, take_results
from support.flags import parse_flags
from support.html_text import html_to_text, view_page
from tools import Browse, Python, Search


@dataclass
class Args:
    out: str = field(
        default=str(Path(__file__).resolve().parent / "nano"),
        metadata={"help": "folder to write the model to"},
    )
    seed: int = field(default=0, metadata={"help": "decides worlds, explorers, drills and weights"})
    worlds: int = field(default=16, metadata={"help": "number of pretraining worlds"})
    entities: int = field(default=300, metadata={"help": "entities in each of them"})
    transcripts: int = field(default=20000, metadata={"help": "explorer transcripts to write"})
    skilled_share: float = field(
        default=0.30, metadata={"help": "share of explorers that behave sensibly"}
    )
    deep_share: float = field(
        default=0.0,
        metadata={
            "help": "share of rows that are segments of walks through deep worlds' catalogues"
        },
    )
    deep_skilled_share: float = field(
        default=0.7,
        metadata={
            "help": "share of those walkers that behave sensibly: thirty right moves in a row take more of them"
        },
    )
    deep_entities: int = field(
        default=600,
        metadata={"help": "entities in each deep world; it has a catalogue for fifty of them"},
    )
    deep_manager: str = field(
        default="summarize", metadata={"help": "context manager of the walks: summarize or elide"}
    )
    deep_context: int = field(
        default=1024,
        metadata={"help": "window of the walks; the manager acts at three quarters of it"},
    )
    hidden: int = field(default=128, metadata={"help": "width of the model"})
    layers: int = field(default=4, metadata={"help": "number of layers"})
    heads: int = field(default=4, metadata={"help": "attention heads"})
    drill_share: float = field(
        default=0.1,
        metadata={"help": "share of drills among the batches after that, until the last fifth"},
    )
    drill_steps: int = field(
        default=800,
        metadata={"help": "optimizer steps on copy drills before the transcripts, at most"},
    )
    steps: int = field(default=6000, metadata={"help": "optimizer steps on transcripts"})
    batch_tokens: int = field(default=4096, metadata={"help": "tokens in one optimizer step"})
    learning_rate: float = field(
        default=1.5e-3, metadata={"help": "peak learning rate; cosine decay to a thirtieth of it"}
    )
    minutes: float = field(
        default=0.0,
        metadata={"help": "decay over this wall-clock time instead of `steps` (0: off)"},
    )
    init: str = field(
        default="",
        metadata={
            "help": "model folder to go on from, with its tokenizer, instead of starting anew"
        },
    )


# ----------------------------------------------------------------------------------------------------------- tokenizer

# Words, numbers and everything else are never in one token. A space belongs to the lower-case word beside it and never to a
# name or number (" of " in "mayor of Belin"), so those are cut alike after a space, a quote, a slash or a bracket.
PIECES = r" ?[a-z]+ (?=[A-Z0-9])| [a-z]+|[a-z]+|[A-Z][a-z]*|\d{1,3}|[^A-Za-z0-9]+?(?= [a-z])|[^A-Za-z0-9]+"
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
TAGS = [
    "<think>",
    "</think>",
    "<tool_call>",
    "</tool_call>",
    "<tool_response>",
    "</tool_response>",
    "<answer>",
    "</answer>",
]


def train_tokenizer(texts, vocabulary: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE with ChatML and tool tags; any text can be encoded and decodes to itself."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PIECES), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=vocabulary - len(SPECIAL) - len(TAGS),
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=["<|im_start|>"],
        clean_up_tokenization_spaces=False,
    )
    fast.add_tokens(TAGS)
    fast.chat_template = CHATML
    return fast


def tokenizer_corpus(args: Args):
    """Pages, questions, calls and every number: what the tokenizer's merges are learned from."""
    rng = random.Random(f"tokenizer-{args.seed}")
    for number in range(1000):
        yield f"{number} {number} " * 20
    for seed in range(100, 100 + min(args.worlds, 6)):
        world = World(seed, args.entities, "pretrain")
        for index in range(args.entities):
            yield html_to_text(page_html(world, world.entity(index)))
        for _ in range(300):
            family, hops = rng.choice(list(SHARES["pretrain"]))
            task = draw_task(world, family, hops, rng, rng.random() < 0.3)
            yield f"{task.question} http://{world.host}/{world.name(0)} "
            yield '{"name": "search", "arguments": {"queries": ["mayor of Kor", "river of Bel"]}}{"name": "search", "arguments": {"queries": ["mayor'
            yield '{"name": "browse", "arguments": {"url": "http://w1.test/Kor", "find": "mayor"}}{"name": "browse", "arguments": {"url": "http://w1.test/Kor", "page": 2}}'
            yield '{"name": "browse", "arguments": {"url": "http://w1.test/Kor", "links": true}}{"name": "python", "arguments": {"code": "print(abs(384 - 127))"}}'
            yield "Answer the question. Think inside then call tools or give the answer.\n Tools Call name arguments End list of str url page find links code"
            yield "p1: p2: p3: not found error (page 1 of 3) (page 2 of 4) no results old result removed system user assistant Let me look. Not sure. Not found."


# ----------------------------------------------------------------------------------------------------------- explorers


class Explorer:
    """Plays one task with a given skill and writes the transcript down as token ids.

    At each turn it makes the sensible move with probability `skill`, else a random valid one. Thoughts of both kinds look
    alike: a plan read off the question, then facts read off the last results, so that style gives nothing away.
    """

    def __init__(
        self,
        task,
        world: World,
        search: Search,
        chat: Chat,
        rng: random.Random,
        skill: float,
        pages: dict[str, str],
    ):
        self.task, self.world, self.search, self.chat, self.rng, self.skill, self.pages = (
            task,
            world,
            search,
            chat,
            rng,
            skill,
            pages,
        )
        self.relations = task.meta["relations"]
        self.names = [
            url.rsplit("/", 1)[1] for url in task.evidence[: 1 if task.family != "compute" else 2]
        ]  # in the question
        self.seen_names, self.seen_urls, self.numbers = list(self.names), [], []
        self.facts: dict[
            tuple[str, str], str
        ] = {}  # (name, relation) -> value, as read in results so far
        self.last_facts: list[tuple[str, str]] = []  # those of the last result
        self.computed = None
        self.noted: set[str] = set()

    def plan(self) -> str:
        if self.task.family == "compute":
            return f"{self.relations[1]}: {self.relations[0]} of {self.names[0]}, {self.relations[0]} of {self.names[1]}."
        return f"{self.names[0]}: {', '.join(self.relations)}."

    def note(self, name: str, relation: str) -> str:
        return f"The {relation} of {name} is {self.facts[name, relation]}."

    # --- moves: each returns (thought, action as text, function that runs it)
    def do_search(self, queries: list[str]):
        return json.dumps(
            {"name": "search", "arguments": {"queries": queries}}
        ), lambda: self.search(queries=queries)

    def do_browse(self, arguments: dict):
        def run():
            page = self.pages.get(arguments["url"])
            return (
                view_page(
                    page,
                    arguments["url"],
                    arguments.get("page", 1),
                    arguments.get("find"),
                    arguments.get("links", False),
                )
                if page
                else f"error 404 for {arguments['url']}"
            )

        return json.dumps({"name": "browse", "arguments": arguments}), run

    def do_python(self, a: str, b: str, sign: str):
        def run():
            value = {"+": int(a) + int(b), "-": int(a) - int(b), "*": int(a) * int(b)}[sign]
            self.computed = str(abs(value) if sign == "-" else value)
            return self.computed

        code = f"print(abs({a} - {b}))" if sign == "-" else f"print({a} {sign} {b})"
        return json.dumps({"name": "python", "arguments": {"code": code}}), run

    def sensible_move(self):
        """(thought, call or None, answer or None): note what was found, say what is left of the plan, and go on with that."""
        if self.task.family == "compute":
            relation, operation = self.relations
            if self.computed is not None:
                return f"It is {self.computed}.", None, self.computed
            missing = [n for n in self.names if (n, relation) not in self.facts]
            thought = " ".join(
                self.note(name, relation) for name in self.names if name not in missing
            )
            if missing:
                return (
                    f"{thought} {self.plan()}".strip(),
                    self.do_search([f"{relation} of {name}" for name in missing]),
                    None,
                )
            numbers = [self.facts[name, relation] for name in self.names]
            return (
                f"{thought} {operation}: {', '.join(numbers)}.",
                self.do_python(*numbers, OPERATIONS[operation]),
                None,
            )
        value, left, notes = self.names[0], list(self.relations), []
        while left and (value, left[0]) in self.facts:
            notes.append(self.note(value, left[0]))
            value = self.facts[value, left.pop(0)]
        thought = " ".join(note for note in notes if note not in self.noted)
        self.noted.update(notes)
        if not left:
            return thought or notes[-1], None, value
        thought = f"{thought} {value}: {', '.join(left)}.".strip()
        type = self.world_type.get(value)
        deep = (
            any(r == left[0] and where == "deep" for r, _, where in RELATIONS[type])
            if type
            else False
        )
        url = f"http://{self.world.host}/{value}"
        if deep and url in self.seen_urls:
            return thought, self.do_browse({"url": url, "find": left[0]}), None
        return thought, self.do_search([f"{left[0]} of {value}"]), None

    def random_move(self):
        """A valid move that follows no plan: some name at hand, some relation, any tool. Answers quote a fact, mostly a wrong one."""
        rng = self.rng
        fact = rng.choice(self.last_facts) if self.last_facts else None
        thought = (
            self.note(*fact)
            if fact and rng.random() < 0.7
            else rng.choice(["Let me look.", "Not sure.", "Not found."])
        )
        name = rng.choice(3 * self.names + self.seen_names[-4:])
        relation = (
            rng.choice(self.relations)
            if rng.random() < 0.5
            else rng.choice(RELATIONS[rng.choice(TYPES)])[0]
        )
        if rng.random() < 0.5:
            thought = f"{thought} {name}: {relation}."
        roll = rng.random()
        if roll < 0.35 and fact:
            return self.note(*fact), None, self.facts[fact]
        if roll < 0.6 and self.seen_urls:
            url = rng.choice(self.seen_urls[-3:])
            extra = rng.choice(
                [{}, {"page": rng.randint(1, 4)}, {"links": True}] + 4 * [{"find": relation}]
            )
            return thought, self.do_browse({"url": url, **extra}), None
        if roll < 0.65 and len(self.numbers) >= 2:
            return thought, self.do_python(*self.numbers[-2:], rng.choice("+-*")), None
        queries = [rng.choice([f"{relation} of {name}", f"{relation} of {name}", name, relation])]
        if rng.random() < 0.15:
            queries.append(f"{relation} of {rng.choice(self.names)}")
        return thought, self.do_search(queries), None

    def read(self, text: str) -> None:
        """Take in a tool result: names, URLs, numbers and facts that a reader would find in it."""
        self.last_facts = []
        for word in text.replace("/", " ").replace(".", " ").split():
            if word in self.world_type and word not in self.seen_names:
                self.seen_names.append(word)
            if word.isdigit() and len(word) == 3:
                self.numbers.append(word)
        title = None
        for line in text.splitlines():
            if "http" in line:
                url = next(w for w in line.split() if w.startswith("http"))
                title = url.rsplit("/", 1)[-1]
                if title in self.world_type and url not in self.seen_urls:
                    self.seen_urls.append(url)
                continue
            if title in self.world_type:
                for relation, _, _ in RELATIONS[self.world_type[title]]:
                    value = read_fact(line.split(": ", 1)[-1], title, relation)
                    if value:
                        self.facts[title, relation] = value
                        self.last_facts.append((title, relation))

    def play(self, max_turns: int = 6, max_tokens: int = 900) -> tuple[list[int], list[int], bool]:
        """Returns (ids, mask with 1 on the explorer's own tokens, whether the answer was right)."""
        chat, rng = self.chat, self.rng
        ids = chat.head(self.task.question)
        mask = [0] * len(ids)
        last_call = None
        for turn in range(max_turns):
            if rng.random() < self.skill:
                thought, call, answer = self.sensible_move()
            else:
                thought, call, answer = self.random_move()
                if last_call and rng.random() < 0.08:
                    call, answer = last_call, None  # round in circles
            if turn == 0:
                thought = self.plan()
            action = f"<think>{thought or 'Let me look.'}</think>"
            action += (
                f"<answer>{answer}</answer>"
                if answer is not None
                else f"<tool_call>{call[0]}</tool_call>"
            )
            action_ids = chat.trusted(action) + [chat.end_id]
            ids += action_ids
            mask += [1] * len(action_ids)
            if answer is not None:
                return ids, mask, answer == self.task.answer
            result = call[1]()
            self.last_url = None
            if call[0].startswith('{"name": "browse"') and "http" not in result:
                # view_page with `find` does not repeat the URL: remember whose page it is
                result_for_reader = json.loads(call[0])["arguments"]["url"] + "\n" + result
            else:
                result_for_reader = result
            self.read(result_for_reader)
            observation = chat.observation([result], 192)
            if len(ids) + len(observation) > max_tokens:
                return ids, mask, False
            ids += observation
            mask += [0] * len(observation)
            last_call = call
        return ids, mask, False


def listed(word: str, names: list[str]) -> str:
    """A walker's list: "list: gold Bel gold Kor." A name follows its word, as on the page, so finding one is to go on as it stands there;
    and it follows the name before it, so the list can be written again in the same order (both are induction)."""
    return "list: " + " ".join(f"{word} {name}" for name in names or ["none"]) + "."


class Walker(Explorer):
    """Walks a catalogue from page to page, too long for the window, and writes notes when the context manager asks for them.

    The sensible way: find the keeper, search its catalogue, follow "Next:", say in each thought what was found so far (the
    entries of a rare colour, the best price, a count), answer where the catalogue ends; the notes say which catalogue and what was found.
    The random way: answer early, follow another link, go round in circles, take in a wrong entry, forget entries, write useless notes.
    """

    def __init__(
        self,
        task,
        world: World,
        search: Search,
        chat: Chat,
        rng: random.Random,
        skill: float,
        pages: dict[str, str],
    ):
        self.task, self.world, self.search, self.chat, self.rng, self.skill, self.pages = (
            task,
            world,
            search,
            chat,
            rng,
            skill,
            pages,
        )
        self.form = form_of(task)  # list, extreme or count
        owner = re.search(rf"catalogue of ({NP})|({NP})'s catalogue", task.question)
        *relation, name = re.findall(r"(?<=the )\w+(?= of)|\w+$", owner.group(1) or owner.group(2))
        self.names, self.relation = [name], relation[0] if relation else None
        self.word = re.search(
            rf"\b(greatest|smallest|{'|'.join([*deep.COLOURS, deep.RARE_COLOUR])})\b", task.question
        ).group(1)
        self.seen_names, self.seen_urls, self.numbers, self.facts, self.last_facts = (
            [name],
            [],
            [],
            {},
            [],
        )
        self.keeper = None if relation else name
        self.catalogue_url, self.next_url, self.ended, self.entries = (
            None,
            None,
            False,
            [],
        )  # entries: of the page in front
        self.found: list[tuple[str, int]] = []  # names with prices
        self.count = 0
        self.last_call, self.last_result = None, ""

    def state(self) -> str:
        """What was found so far."""
        if self.form == "count":
            return f"{self.word}: {self.count}."
        if self.form == "extreme":
            return (
                f"{self.word}: {self.found[0][0]} {self.found[0][1]}."
                if self.found
                else f"{self.word}: none."
            )
        return listed(self.word, [name for name, _ in self.found])

    def plan(self) -> str:
        if self.keeper is None:
            return f"{self.names[0]}: {self.relation}, catalogue, {self.word}."
        hop = f"{self.note(self.names[0], self.relation)} " if self.relation else ""
        return f"{hop}{self.keeper}: catalogue, {self.word}."

    def take_in(self) -> bool:
        """Add what the page in front says to what was found; whether it adds anything."""
        before = self.state()
        for name, colour, price in self.entries:
            if self.form == "extreme":
                better = (
                    not self.found
                    or (price > self.found[0][1]) == (self.word == "greatest")
                    and price != self.found[0][1]
                )
                self.found = [(name, price)] if better else self.found
            elif colour == self.word:
                self.count += 1
                self.found += [(name, price)] if name not in dict(self.found) else []
        self.entries = []
        return self.state() != before

    def answer(self) -> str:
        if self.form == "count":
            return str(self.count)
        return ", ".join(name for name, _ in self.found) or self.rng.choice(self.seen_names)

    def sensible_move(self):
        if self.keeper is None and (self.names[0], self.relation) in self.facts:
            self.keeper = self.facts[self.names[0], self.relation]
        if self.keeper is None:
            return self.plan(), self.do_search([f"{self.relation} of {self.names[0]}"]), None
        self.news = self.take_in()
        thought = (
            self.state() if self.found or self.count or self.next_url or self.ended else self.plan()
        )
        if self.ended:
            return thought, None, self.answer()
        if self.next_url or self.catalogue_url:
            return thought, self.do_browse({"url": self.next_url or self.catalogue_url}), None
        return thought, self.do_search([f"catalogue of {self.keeper}"]), None

    def random_move(self):
        rng = self.rng
        if self.entries and rng.random() < 0.4:  # the wrong entry
            name, _, price = rng.choice(self.entries)
            self.found, self.count = (
                [*self.found, (name, price)][-4:],
                self.count + rng.randint(0, 2),
            )
        if rng.random() < 0.3:
            self.take_in()
        if self.found and rng.random() < 0.3:  # forgets
            self.found = rng.sample(self.found, len(self.found) - 1)
        thought = rng.choice([self.state(), self.state(), self.plan(), "Let me look.", "Not sure."])
        roll, urls = rng.random(), self.seen_urls[-9:]
        if roll < 0.35 and (self.found or self.count):
            return thought, None, self.answer()
        if roll < 0.65 and urls:
            return (
                thought,
                self.do_browse(
                    {
                        "url": rng.choice(urls),
                        **rng.choice([{}, {}, {"page": 2}, {"links": True}, {"find": self.word}]),
                    }
                ),
                None,
            )
        if roll < 0.75 and self.last_call:
            return thought, self.last_call, None  # round in circles
        query = rng.choice(
            [
                f"catalogue of {rng.choice(self.seen_names)}",
                f"{self.relation or 'catalogue'} of {self.names[0]}",
            ]
        )
        return thought, self.do_search([query]), None

    def notes(self) -> str:
        """What to keep. The page in front is not among it: its result comes after the notes."""
        rng = self.rng
        self.seen_urls = re.findall(r"https?://\S+", self.last_result)
        self.catalogue_url = self.catalogue_url if self.catalogue_url in self.seen_urls else None
        where = self.plan() if self.keeper is None else f"{self.keeper}: catalogue, {self.word}."
        if rng.random() < self.skill:
            return (
                f"{self.state()} {where}"
                if self.found or self.count or self.next_url or self.ended
                else where
            )
        if rng.random() < 0.5:
            self.found, self.count = (
                rng.sample(self.found, rng.randint(0, len(self.found))),
                rng.randint(0, self.count),
            )
        return rng.choice(
            [
                f"{self.state()} {where}",
                where,
                self.state(),
                "Not sure.",
                "Let me look.",
                f"{rng.choice(self.seen_names)}: {self.word}.",
            ]
        )

    def read(self, text: str) -> None:
        super().read(text)
        self.last_result = text
        page = (
            text if text.startswith("http") else ""
        )  # a search snippet may show some entry of another page
        urls = re.findall(r"https?://\S+", text)
        self.seen_urls += [url for url in urls if url not in self.seen_urls]
        if self.keeper and (url := f"http://{self.world.host}/{self.keeper}-catalogue") in urls:
            self.catalogue_url = url
        self.entries = read_entries(page)
        following = re.search(r"Next: (\S+)", page)
        self.next_url = following.group(1) if following else None
        self.ended = "catalogue ends here" in page

    def play(self, args: RolloutArgs) -> tuple[list[tuple[list[int], list[int]]], bool]:
        """Returns (ids, mask with 1 on the walker's own tokens) of some segments, and whether the answer was right: the first one, the
        last one, and two between, one of them where something was found."""
        news: set[int] = set()  # segments in which something was found
        trajectory = Trajectory(self.task, (0,), head_ids=self.chat.head(self.task.question))
        tools = dict.fromkeys(
            ("search", "browse"), SimpleNamespace(check=lambda arguments: None)
        )  # turns are only parsed by finish_turn
        while trajectory.status == "running" and next_prompt(trajectory, self.chat, args):
            call, self.news = None, False
            if len(trajectory.turns) in trajectory.memory.get("notes_turns", []):
                action = self.notes()
            else:
                thought, call, answer = (
                    self.sensible_move() if self.rng.random() < self.skill else self.random_move()
                )
                thought = thought if trajectory.turns else self.plan()
                action = f"<think>{thought}</think>" + (
                    f"<tool_call>{call[0]}</tool_call>"
                    if answer is None
                    else f"<answer>{answer}</answer>"
                )
            news |= {len(trajectory.segments) - 1} if self.news else set()
            ids = self.chat.trusted(action) + [self.chat.end_id]
            if finish_turn(trajectory, ids, [0.0] * len(ids), 0, self.chat, tools):
                take_results(trajectory, [(call[1](), False)], self.chat, args)
                self.read(trajectory.turns[-1].results[0])
                self.last_call = call
        segments = trajectory.segments
        if len(segments) > 4:
            between = range(1, len(segments) - 1)
            chosen = {
                0,
                len(segments) - 1,
                self.rng.choice([k for k in between if k in news] or between),
                self.rng.choice(between),
            }
            segments = [segments[k] for k in sorted(chosen)]
        is_right = bool(correct(trajectory.answer, self.task.answer, self.task.answer_type))
        return [
            (segment.ids, [int(turn >= 0) for turn in segment.turn_of]) for segment in segments
        ], is_right


def write_walks(args: Args, chat: Chat, rows: int) -> tuple[list, list]:
    """At least this many segments of walks over all pretraining worlds, and 40 of skilled walkers in one more, for `report`."""
    rng = random.Random(f"walkers-{args.seed}")
    rollout_args = RolloutArgs(
        context=args.deep_manager, max_context=args.deep_context, max_turns=99
    )
    walks, held_out, right, count = [], [], 0, 0
    progress = tqdm(total=rows, desc="walkers", unit="segment", mininterval=5)
    for number in range(args.worlds + 1):
        world = World(100 + number, args.deep_entities, "pretrain", "deep")
        search = Search(world_folder(world.description()) / "pages.db")
        pages = {world.url(i): page_html(world, world.entity(i)) for i in range(args.deep_entities)}
        pages |= {f"http://{world.host}/{path}": page for path, _, _, page in deep.pages(world)}
        Explorer.world_type = {world.name(i): world.type(i) for i in range(args.deep_entities)}

        def walk(skill: float) -> tuple[list, bool]:
            draw = lambda: draw_task(
                world, "collection", 1 if rng.random() < 0.85 else 2, rng, rng.random() < 0.25
            )
            task = draw()
            # A total is for `python`; of the rest mostly lists: to compare or count over two hundred entries takes more than this size of model.
            while form_of(task) == "total" or (form_of(task) != "list" and rng.random() < 0.8):
                task = draw()
            segments, is_right = Walker(task, world, search, chat, rng, skill, pages).play(
                rollout_args
            )
            return [
                (np.array(ids, dtype=np.int16), np.array(mask, dtype=bool))
                for ids, mask in segments
            ], is_right

        while number == args.worlds and len(held_out) < 40:
            held_out += walk(1.0)[0]
        while len(walks) < rows * min(1, (number + 1) / args.worlds):
            segments, is_right = walk(
                0.995 if rng.random() < args.deep_skilled_share else rng.uniform(0.0, 0.7)
            )
            walks += segments
            right, count = right + is_right, count + 1
            progress.update(len(segments))
    progress.close()
    print(
        f"walkers were right on {right / count:.1%} of {count} tasks; {np.mean([len(i) for i, _ in walks]):.0f} tokens a segment"
    )
    return walks, held_out


def write_transcripts(args: Args, chat: Chat) -> list[tuple[np.ndarray, np.ndarray]]:
    """Explorer transcripts over all pretraining worlds; prints how often they were right."""
    rng = random.Random(f"explorers-{args.seed}")
    transcripts, right, by_family = [], 0, {}
    per_world = args.transcripts // args.worlds
    progress = tqdm(
        total=per_world * args.worlds, desc="explorers", unit="transcript", mininterval=5
    )
    for seed in range(100, 100 + args.worlds):
        folder = world_folder({"seed": seed, "entities": args.entities, "split": "pretrain"})
        world = World(seed, args.entities, "pretrain")
        search = Search(folder / "pages.db")
        pages = {world.url(i): page_html(world, world.entity(i)) for i in range(args.entities)}
        Explorer.world_type = {world.name(i): world.type(i) for i in range(args.entities)}
        families, weights = zip(*SHARES["pretrain"].items())
        for _ in range(per_world):
            family, hops = rng.choices(families, weights)[0]
            task = draw_task(world, family, hops, rng, rng.random() < 0.25)
            skill = 0.97 if rng.random() < args.skilled_share else rng.uniform(0.0, 0.12)
            ids, mask, correct = Explorer(task, world, search, chat, rng, skill, pages).play()
            transcripts.append((np.array(ids, dtype=np.int16), np.array(mask, dtype=bool)))
            right += correct
            count = by_family.setdefault((family, hops), [0, 0])
            count[0] += correct
            count[1] += 1
            progress.update()
    progress.close()
    print(
        f"explorers were right on {right / len(transcripts):.1%} of {len(transcripts)} tasks;",
        f"{np.mean([len(i) for i, _ in transcripts]):.0f} tokens a transcript;",
        {f"{f}{h}": f"{c / n:.0%}" for (f, h), (c, n) in sorted(by_family.items())},
    )
    return transcripts


# ------------------------------------------------------------------------------------------------------------ training


def copy_drill(
    rng: np.random.Generator, vocabulary: int, rows: int, length: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Random spans of random tokens that come again in random order; loss on every token of a span seen before.

    Returns: ids (B, T), labels (B, T) with -100 where there is nothing to copy.
    """
    ids = np.zeros((rows, length), dtype=np.int64)
    labels = np.full((rows, length), -100, dtype=np.int64)
    for row in range(rows):
        spans = [
            rng.integers(0, vocabulary, rng.integers(2, 12)) for _ in range(rng.integers(4, 24))
        ]
        seen, position = set(), 0
        while position < length:
            k = rng.integers(len(spans))
            span = spans[k][: length - position]
            ids[row, position : position + len(span)] = span
            if k in seen:
                labels[row, position + 1 : position + len(span)] = span[
                    1:
                ]  # the first token of a span cannot be known
            seen.add(k)
            position += len(span)
    return torch.from_numpy(ids), torch.from_numpy(labels)


def fact_drill(
    rng: np.random.Generator, chat: Chat, rows: int, length: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Facts about a few names, then the same facts again in random order; loss on the second mention's value.

    Only the name *and* the relation together say which value it is: this is what reading a fact off a page takes.
    Names are random pairs of tokens, so that the circuit is learned and not the names.

    Returns: ids (B, T), labels (B, T) as `copy_drill`.
    """
    if not hasattr(fact_drill, "pieces"):
        fact_drill.pieces = (
            [
                (chat.untrusted(f" {r} of A")[:-1], chat.untrusted(r))
                for r in sorted({r for t in TYPES for r, _, _ in RELATIONS[t]})
            ],
            chat.untrusted("The"),
            chat.untrusted("A is A")[1:-1],
            chat.untrusted("."),
            chat.untrusted("A| A")[1:-1],
        )
    relations, the, is_, dot, bar = fact_drill.pieces
    ids = np.zeros((rows, length), dtype=np.int64)
    labels = np.full((rows, length), -100, dtype=np.int64)
    for row in range(rows):
        random_pair = lambda: rng.integers(270, len(chat.tokenizer), 2).tolist()
        names = [random_pair() for _ in range(rng.integers(2, 6))]
        kinds = [
            relations[k] for k in rng.choice(len(relations), rng.integers(2, 5), replace=False)
        ]
        facts = {
            (n, k): random_pair() if rng.random() < 0.7 else names[rng.integers(len(names))]
            for n in range(len(names))
            for k in range(len(kinds))
        }
        text, where = [], []
        first_round = list(facts)
        if rng.random() < 0.5:
            rng.shuffle(first_round)
        table = len(names) == 2 and rng.random() < 0.5  # rows of a table: no name in them
        for n, k in first_round:
            if not (table and n == 1):
                text += (
                    kinds[k][1] + bar + facts[n, k] + dot
                    if table
                    else the + kinds[k][0] + names[n] + is_ + facts[n, k] + dot
                )
        while len(text) < length:
            n, k = list(facts)[rng.integers(len(facts))]
            if table and n == 1:
                continue
            text += the + kinds[k][0] + names[n] + is_
            where.append(len(text))
            text += facts[n, k] + dot
        ids[row] = text[:length]
        for position in where:
            labels[row, position : position + 2] = ids[row, position : position + 2]
    return torch.from_numpy(ids), torch.from_numpy(labels)


def written_rows(chat: Chat, rows: int, length: int, fill) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows of drill text. fill(write, is_full) writes one row: write(text, learn) appends to it, with loss on its tokens or
    without, until is_full(); what goes beyond the length is cut.

    Returns: ids (B, T), labels (B, T) as `copy_drill`.
    """
    ids, labels = (
        np.zeros((rows, length), dtype=np.int64),
        np.full((rows, length), -100, dtype=np.int64),
    )
    for row in range(rows):
        row_ids, row_labels = [], []

        def write(text: str, learn: bool) -> None:
            new = chat.trusted(text)
            row_ids.extend(new)
            row_labels.extend(new if learn else [-100] * len(new))

        fill(write, lambda: len(row_ids) >= length)
        ids[row], labels[row] = row_ids[:length], row_labels[:length]
    return torch.from_numpy(ids), torch.from_numpy(labels)


def plan_drill(
    rng: np.random.Generator, chat: Chat, world: World, rows: int, length: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Plans worked off in thoughts alone: a fact is noted, the plan gets shorter, the next query follows from it.

    "Kor: mayor, teacher." and "The mayor of Kor is Bel." give "The mayor of Kor is Bel. Bel: teacher." and the query "teacher
    of Bel"; two numbers give the sum to compute. Names and relations are drawn at random, so that the rule is learned.

    Returns: ids (B, T), labels (B, T) as `copy_drill`.
    """
    relations = sorted({r for t in TYPES for r, _, _ in RELATIONS[t]})
    name = lambda: world.name(int(rng.integers(world.entities)))
    value = lambda: name() if rng.random() < 0.6 else str(rng.integers(100, 1000))

    def fill(write, is_full) -> None:
        def results(facts: list[str]) -> None:
            others = [
                f"The {rng.choice(relations)} of {name()} is {value()}."
                for _ in range(rng.integers(0, 3))
            ]
            write(
                "<tool_response>" + " ".join(rng.permutation(facts + others)) + "</tool_response>",
                False,
            )

        while not is_full():
            if rng.random() < 0.3:
                operation, relation, names, numbers = (
                    rng.choice(sorted(OPERATIONS)),
                    rng.choice(relations),
                    [name(), name()],
                    [str(rng.integers(100, 1000)) for _ in range(2)],
                )
                write(
                    f"<think>{operation}: {relation} of {names[0]}, {relation} of {names[1]}.</think>",
                    False,
                )
                write(
                    f'<tool_call>{{"name": "search", "arguments": {{"queries": ["{relation} of {names[0]}", "{relation} of {names[1]}"]}}}}</tool_call>',
                    True,
                )
                facts = [f"The {relation} of {n} is {v}." for n, v in zip(names, numbers)]
                results(facts)
                a, b, sign = *numbers, OPERATIONS[operation]
                code = f"print(abs({a} - {b}))" if sign == "-" else f"print({a} {sign} {b})"
                write(
                    f'<think>{" ".join(facts)} {operation}: {a}, {b}.</think><tool_call>{{"name": "python", "arguments": {{"code": "{code}"}}}}</tool_call>',
                    True,
                )
                continue
            subject, left = name(), list(rng.choice(relations, rng.integers(1, 5)))
            write(f"<think>{subject}: {', '.join(left)}.</think>", False)
            while left:
                write(
                    f'<tool_call>{{"name": "search", "arguments": {{"queries": ["{left[0]} of {subject}"]}}}}</tool_call>',
                    True,
                )
                found = name() if len(left) > 1 else value()
                fact = f"The {left.pop(0)} of {subject} is {found}."
                results([fact])
                subject = found
                write(
                    f"<think>{fact} {subject}: {', '.join(left)}.</think>"
                    if left
                    else f"<think>{fact}</think><answer>{found}</answer>",
                    True,
                )

    return written_rows(chat, rows, length, fill)


def walk_drill(
    rng: np.random.Generator, chat: Chat, world: World, rows: int, length: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Walks in small: notes, then pages of one to four entries; each thought says what was found so far, each call follows "Next:".

    A real page of seven entries rarely has one that is looked for, so on real walks alone the rule is learned slowly.

    Returns: ids (B, T), labels (B, T) as `copy_drill`.
    """
    name = lambda: world.name(int(rng.integers(world.entities)))
    colours = [*deep.COLOURS, deep.RARE_COLOUR]

    def fill(write, is_full) -> None:
        while not is_full():
            host, extreme = f"http://w{rng.integers(100, 400)}.test", rng.random() < 0.1
            word = (
                rng.choice(["greatest", "smallest"])
                if extreme
                else deep.RARE_COLOUR
                if rng.random() < 0.7
                else rng.choice(colours)
            )
            found = (
                [f"{name()} {rng.integers(100, 1000)}"]
                if extreme
                else [name() for _ in range(rng.integers(0, 4))]
            )
            state = lambda: f"{word}: {found[0]}." if extreme else listed(word, found)
            write(f"\nNotes: {state()} {name()}: catalogue, {word}.", False)
            while not is_full() and len(found) < 6 and rng.random() < 0.95:
                colour = lambda: (
                    word if not extreme and rng.random() < 0.25 else rng.choice(colours)
                )
                entries = [
                    (name(), colour(), int(rng.integers(100, 1000)))
                    for _ in range(rng.integers(1, 5))
                ]
                following, ends = name(), rng.random() < 0.25
                write(
                    "<tool_response>"
                    + "".join(f"{c} {n} {p} {host}/{n}\n" for n, c, p in entries)
                    + ("The catalogue ends here." if ends else f"Next: {host}/{following}")
                    + "</tool_response>",
                    False,
                )
                if extreme:
                    found = [
                        (max if word == "greatest" else min)(
                            [*found, *(f"{n} {p}" for n, _, p in entries)],
                            key=lambda item: item.split()[1],
                        )
                    ]
                else:
                    found += [n for n, c, _ in entries if c == word]
                if ends:
                    write(
                        f"<think>{state()}</think><answer>{', '.join(item.split()[0] for item in found) or following}</answer>",
                        True,
                    )
                    break
                write(
                    f'<think>{state()}</think><tool_call>{{"name": "browse", "arguments": {{"url": "{host}/{following}"}}}}</tool_call>',
                    True,
                )

    return written_rows(chat, rows, length, fill)


def pad(
    batch: list[tuple[np.ndarray, np.ndarray]], rng: np.random.Generator
) -> tuple[torch.Tensor, torch.Tensor]:
    """Right-padded ids (B, T) and labels (B, T): the explorer's tokens and a tenth of the others."""
    length = max(len(ids) for ids, _ in batch)
    ids = np.zeros((len(batch), length), dtype=np.int64)
    labels = np.full((len(batch), length), -100, dtype=np.int64)
    for row, (row_ids, mask) in enumerate(batch):
        ids[row, : len(row_ids)] = row_ids
        keep = mask | (rng.random(len(row_ids)) < 0.1)
        labels[row, : len(row_ids)] = np.where(keep, row_ids, -100)
    return torch.from_numpy(ids), torch.from_numpy(labels)


def build_induction(model: LlamaForCausalLM) -> None:
    """Start the first two layers as an induction circuit (Olsson et al. 2022, arXiv:2209.11895) instead of waiting for one.

    From random weights copying appears only after millions of tokens, more than two cores can spend. So:

    Layer 0, head j looks d = 1, 2, 4, 5 tokens back: from biases alone the rotary score of a query at m and a key at n is
    sum_i A^2 cos(phi_i + (m - n) theta_i), which peaks at m - n = d for phi_i = -d theta_i (Llama's rotate_half layout). It
    writes a projection of the token it sees into a subspace of its own, U_j.
    Layer 1, head 0 matches the last two tokens: query (0, 1 back) against key (1, 2 back), and copies the token it finds.
    Layer 1, head 1 matches a fact: in "The mayor of Bel in is Kor" the value finds the name's end 2 back and the relation 5
    back; where the fact is asked for, the token before the value finds them 1 and 4 back.
    The matches use only the slow rotary dimensions, which hardly turn over a few hundred tokens. The rest is random, and
    everything is trained.
    """
    config = model.config
    width, heads = config.hidden_size, config.num_attention_heads
    size = width // heads
    theta = config.rope_parameters["rope_theta"] ** (-torch.arange(0, size, 2) / size)
    with torch.no_grad():
        model.model.embed_tokens.weight.normal_(
            0, width**-0.5
        )  # tied: also the scale of the logits
        first, second = model.model.layers[0].self_attn, model.model.layers[1].self_attn
        shared = torch.linalg.qr(torch.randn(width, size))[
            0
        ].T  # (size, width): what of a token is passed on
        subspaces = torch.linalg.qr(torch.randn(width, width))[0].view(
            width, heads, size
        )  # U_j = subspaces[:, j]
        pairs = torch.arange(6)
        for head, distance in enumerate((1, 2, 4, 5)):
            span = slice(head * size, (head + 1) * size)
            for projection, angle in ((first.k_proj, 0.0), (first.q_proj, distance)):
                bias = torch.zeros(size)
                bias[pairs] = 7.0 * torch.cos(angle * theta[pairs])
                bias[pairs + size // 2] = -7.0 * torch.sin(angle * theta[pairs])
                projection.bias[span] = bias
                projection.weight[span] *= 0.1
            first.v_proj.weight[span] = 0.3 * shared
            first.o_proj.weight[:, span] = 0.7 * subspaces[:, head]
        slow = torch.cat([torch.arange(size // 2)[5:], torch.arange(size // 2)[5:] + size // 2])
        read = torch.zeros(size, size)
        read[slow] = torch.linalg.qr(torch.randn(size, len(slow)))[0].T
        seen = lambda head: (
            read @ subspaces[:, head].T
        )  # (size, width): reads what the head of layer 0 saw
        for head, (query, key) in enumerate(
            ((read @ shared + seen(0), seen(0) + seen(1)), (seen(0) + seen(2), seen(1) + seen(3)))
        ):
            span = slice(head * size, (head + 1) * size)
            second.q_proj.weight[span], second.k_proj.weight[span] = 1.5 * query, 1.5 * key
            copied = torch.linalg.qr(torch.randn(width, size))[0].T
            second.v_proj.weight[span], second.o_proj.weight[:, span] = 0.5 * copied, copied.T


def loss_of(
    model: LlamaForCausalLM, ids: torch.Tensor, labels: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Mean cross-entropy, plus predictions and targets at the labelled positions (logits are computed there only)."""
    hidden = model.model(input_ids=ids[:, :-1], use_cache=False).last_hidden_state  # (B, T-1, D)
    targets = labels[:, 1:]
    keep = targets >= 0
    logits = model.lm_head(hidden[keep])  # (tokens in the loss, V)
    return (
        torch.nn.functional.cross_entropy(logits, targets[keep]),
        logits.argmax(-1),
        targets[keep],
    )


def main():
    (args,) = parse_flags((Args,), __doc__)
    if not 0 <= args.deep_share < 1:
        sys.exit("data/pretrain.py: --deep_share must be at least 0 and below 1")
    keep_memory()
    torch.manual_seed(args.seed)
    out = Path(args.out)
    tokenizer = (
        PreTrainedTokenizerFast.from_pretrained(args.init)
        if args.init
        else train_tokenizer(tokenizer_corpus(args), 2560)
    )
    tokenizer.save_pretrained(out)
    chat = Chat(tokenizer, [Search.signature, Browse.signature, Python.signature])
    transcripts = write_transcripts(args, chat)
    walks, held_out_walks = (
        write_walks(args, chat, round(len(transcripts) * args.deep_share / (1 - args.deep_share)))
        if args.deep_share
        else ([], [])
    )

    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=args.hidden,
            intermediate_size=3 * args.hidden,
            num_hidden_layers=args.layers,
            num_attention_heads=args.heads,
            num_key_value_heads=args.heads,
            max_position_embeddings=4096,
            attention_bias=True,
            rope_parameters={"rope_type": "default", "rope_theta": 1e6},
            tie_word_embeddings=True,
            eos_token_id=chat.end_id,
            pad_token_id=tokenizer.pad_token_id,
            bos_token_id=None,
            attn_implementation="sdpa",
        )
    )
    if args.init:
        model = LlamaForCausalLM.from_pretrained(args.init, dtype=torch.float32)
    else:
        build_induction(model)
    print(
        f"{model.num_parameters():,} parameters, vocabulary {len(tokenizer)}, prompt {len(chat.before_question)} tokens"
    )
    decay = [p for p in model.parameters() if p.dim() > 1]
    optimizer = torch.optim.AdamW(
        [
            {"params": decay, "weight_decay": 0.05},
            {"params": [p for p in model.parameters() if p.dim() <= 1], "weight_decay": 0.0},
        ],
        lr=args.learning_rate,
        betas=(0.9, 0.98),
    )
    rng = np.random.default_rng(args.seed)
    held_out, transcripts = transcripts[-200:], transcripts[:-200] + walks
    # rows of like length share a batch; the batches come in random order
    order = np.argsort([len(ids) + rng.random() for ids, _ in transcripts], kind="stable")
    batches, batch = [], []
    for index in order:
        batch.append(index)
        if len(batch) * len(transcripts[index][0]) >= args.batch_tokens:
            batches.append(batch)
            batch = []
    drill_world = World(100 + args.worlds, 5000, "pretrain")
    total = args.drill_steps + args.steps
    start, tokens, queue, average = time.time(), 0, [], {}
    learned = bool(args.init)
    progress = tqdm(range(total), desc="pretrain", mininterval=5)
    for step in progress:
        done = (time.time() - start) / 60 / args.minutes if args.minutes else step / total
        if done >= 1:
            break
        warm = min(1.0, (step + 1) / 100)
        for group in optimizer.param_groups:
            group["lr"] = (
                args.learning_rate
                * warm
                * (1 / 30 + (1 - 1 / 30) * 0.5 * (1 + math.cos(math.pi * done)))
            )
        # First drills until facts are copied, then transcripts with some drills among them.
        learned = learned or average.get("facts copied", 0) > 0.9 or step >= args.drill_steps
        if not learned or (done < 0.8 and rng.random() < args.drill_share):
            name = (
                "walks"
                if walks and learned and rng.random() < 0.5
                else "plans"
                if learned and rng.random() < 0.7
                else "facts"
                if rng.random() < 0.8
                else "spans"
            )
        else:
            name = "transcripts"
        if name == "spans":
            ids, labels = copy_drill(rng, len(tokenizer), args.batch_tokens // 256, 256)
        elif name == "plans":
            ids, labels = plan_drill(rng, chat, drill_world, args.batch_tokens // 256, 256)
        elif name == "walks":
            ids, labels = walk_drill(rng, chat, drill_world, args.batch_tokens // 256, 256)
        elif name == "facts":
            ids, labels = fact_drill(rng, chat, args.batch_tokens // 256, 256)
        else:
            if not queue:
                queue = [batches[i] for i in rng.permutation(len(batches))]
            ids, labels = pad([transcripts[i] for i in queue.pop()], rng)
        loss, predicted, targets = loss_of(model, ids, labels)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        tokens += ids.numel()
        average[name] = 0.95 * average.get(name, loss.item()) + 0.05 * loss.item()
        if name != "transcripts":
            hit = (predicted == targets).float().mean().item()
            average[f"{name} copied"] = 0.9 * average.get(f"{name} copied", hit) + 0.1 * hit
        progress.set_postfix(
            {k: f"{v:.3f}" for k, v in average.items()} | {"M tokens": f"{tokens / 1e6:.1f}"}
        )
        if step % 200 == 199 and step < total - 1:
            report(
                model, held_out, held_out_walks, chat, step, tokens, time.time() - start, average
            )
            model.save_pretrained(out)
    model.save_pretrained(out)
    report(model, held_out, held_out_walks, chat, step, tokens, time.time() - start, average)


@torch.no_grad()
def report(
    model, held_out, walks, chat, step: int, tokens: int, seconds: float, average: dict
) -> None:
    """Loss on held-out explorers' tokens, and how well values are copied: facts out of results into thoughts, and in the walks the
    next page's address, found names, and whole turns of notes (each token the likeliest one, given the right ones before it)."""

    def tokens_of(row) -> tuple[float, list[tuple[str, str, bool, bool]]]:
        """Loss, and (token before, token, whether it was predicted, whether the turn ends here) of the explorer's own tokens."""
        ids, mask = torch.from_numpy(row[0].astype(np.int64))[None], row[1]
        loss, predicted, targets = loss_of(
            model, ids, torch.where(torch.from_numpy(mask)[None], ids, -100)
        )
        text = chat.tokenizer.convert_ids_to_tokens(targets.tolist())
        return loss.item(), list(
            zip(
                [""] + text,
                text,
                (predicted == targets).tolist(),
                (targets == chat.end_id).tolist(),
            )
        )

    def share(hits: list[bool]) -> str:
        return f"{np.mean(hits):.1%} of {len(hits)}" if hits else "0"

    losses, tokens_seen = zip(*[tokens_of(row) for row in held_out])
    facts = [hit for row in tokens_seen for before, _, hit, _ in row if before == "ĠisĠ"]
    line = f"held-out loss {np.mean(losses):.3f} | fact copied {share(facts)}"
    if walks:
        losses, tokens_seen = zip(*[tokens_of(row) for row in walks])
        urls = [hit for row in tokens_seen for before, _, hit, _ in row if before == "/"]
        names = [
            hit
            for row in tokens_seen
            for before, token, hit, _ in row
            if before.endswith("Ġ") and token[0].isupper()
        ]
        turns, whole, notes = [], True, []
        for row in tokens_seen:
            kind = "notes"
            for _, token, hit, ends in row:
                whole, kind = whole and hit, "turn" if token == "<think>" else kind
                if ends:
                    (notes if kind == "notes" else turns).append(whole)
                    whole, kind = True, "notes"
        line += (
            f" | walks: loss {np.mean(losses):.3f}, next page {share(urls)}, names {share(names)}, "
            f"whole turns {share(turns)}, whole notes {share(notes)}"
        )
    tqdm.write(
        f"step {step} {seconds / 60:.1f} min {tokens / 1e6:.1f}M tokens | {line} | { ({k: round(v, 3) for k, v in average.items()}) }",
        file=sys.stdout,
    )
    sys.stdout.flush()


if __name__ == "__main__":
    main()
