"""Drills: rows of random text in which only the rule that is to be learned decides the next token.

In: a random generator. Out: ids (B, T) and labels (B, T), with -100 where nothing can be known. To
try an idea, write a generator of chunks like `plans` and give it to `text_drill`.
"""

import itertools
import random
from collections.abc import Iterator

import numpy as np
import torch

from context import Chat
from data.base.explorers import (
    browse,
    call_text,
    compute,
    fact_text,
    random_frame,
    search_for,
    turn_text,
    worked_out,
)
from data.base.walkers import listed
from data.deep.pages import COLOURS, RARE_COLOUR
from data.parts import ALL_RELATIONS, FRAMES, OPERATIONS, TYPES
from data.tasks import noun_phrase
from data.world import World

Drill = tuple[torch.Tensor, torch.Tensor]  # ids (B, T), labels (B, T)
Fact = tuple[str, str, str]  # relation, name, value
Chunk = list[tuple[str, bool]]  # pieces of text, and whether there is loss on their tokens
# What stands around the parts of a record. "*" and "#" are left to the layouts of test worlds.
SIGNS = list("-+=~/|>()!:;,.?%&")


def copy_drill(rng: np.random.Generator, vocabulary: int, rows: int, length: int) -> Drill:
    """Random spans of random tokens that come again in random order; loss on every token of a span
    seen before."""
    ids, labels = [], []
    for _ in range(rows):
        sizes = range(rng.integers(4, 24))
        spans = [rng.integers(0, vocabulary, rng.integers(2, 12)).tolist() for _ in sizes]
        seen, row_ids, row_labels = set(), [], []
        while len(row_ids) < length:
            k = rng.integers(len(spans))
            row_ids += spans[k]
            # The first token of a span cannot be known.
            row_labels += [-100, *spans[k][1:]] if k in seen else [-100] * len(spans[k])
            seen.add(k)
        ids.append(row_ids[:length])
        labels.append(row_labels[:length])
    return torch.tensor(ids), torch.tensor(labels)


def fact_drill(rng: np.random.Generator, chat: Chat, rows: int, length: int) -> Drill:
    """Facts about a few names, then the same facts again in random order; loss on the second
    mention's value.

    Only the name *and* the relation together say which value it is: this is what reading a fact off
    a page takes. Names are random pairs of tokens, so that the circuit is learned and not the
    names.
    """
    encode = chat.untrusted
    in_sentence = [encode(f" {relation} of A")[:-1] for relation in ALL_RELATIONS]
    in_table = [encode(relation) for relation in ALL_RELATIONS]
    the, dot = encode("The"), encode(".")
    is_, bar = encode("A is A")[1:-1], encode("A| A")[1:-1]

    def few_tokens() -> list[int]:
        return rng.integers(0, len(chat.tokenizer), rng.integers(3)).tolist()

    def random_pair() -> list[int]:
        return rng.integers(270, len(chat.tokenizer), 2).tolist()

    ids, labels = [], []
    for _ in range(rows):
        names = [random_pair() for _ in range(rng.integers(2, 6))]
        kinds = rng.choice(len(ALL_RELATIONS), rng.integers(2, 5), replace=False)
        facts = {}
        for n, k in itertools.product(range(len(names)), kinds):
            is_new = rng.random() < 0.7
            facts[n, k] = random_pair() if is_new else names[rng.integers(len(names))]
        text, order = [], list(facts)
        if rng.random() < 0.5:
            rng.shuffle(order)
        is_table = len(names) == 2 and rng.random() < 0.5
        # Tables have a bar. Other layouts have other signs, so those of a row are drawn, too.
        before, between = few_tokens(), few_tokens()
        if rng.random() < 0.3:
            before, between = [], bar
        for n, k in order:
            if not is_table:
                text += the + in_sentence[k] + names[n] + is_ + facts[n, k] + dot
            elif n == 0:  # the rows of a table have no name in them, so it is one entity's
                text += before + in_table[k] + between + facts[n, k] + dot
        learned = [-100] * len(text)
        while len(text) < length:
            n, k = list(facts)[rng.integers(len(facts))]
            if is_table and n == 1:
                continue
            asked = the + in_sentence[k] + names[n] + is_
            text += asked + facts[n, k] + dot
            learned += [-100] * len(asked) + facts[n, k] + [-100] * len(dot)
        ids.append(text[:length])
        labels.append(learned[:length])
    return torch.tensor(ids), torch.tensor(labels)


def text_drill(
    source, rng: np.random.Generator, chat: Chat, world: World, rows: int, length: int
) -> Drill:
    """Rows of text; what goes beyond the length is cut.

    Args:
        source: `plans`, `sums`, `visits` or `walks`, a generator of chunks for each row.
    """
    ids, labels = [], []
    for _ in range(rows):
        chunks, row_ids, row_labels = source(rng, world), [], []
        while len(row_ids) < length:
            for text, is_learned in next(chunks):
                new = chat.trusted(text)
                row_ids += new
                row_labels += new if is_learned else [-100] * len(new)
        ids.append(row_ids[:length])
        labels.append(row_labels[:length])
    return torch.tensor(ids), torch.tensor(labels)


def plans(rng: np.random.Generator, world: World) -> Iterator[Chunk]:
    """Plans made from questions and worked off in thoughts alone: a fact is noted, the plan gets
    shorter, the next query follows from it. Each chunk is a whole plan, with names and relations
    drawn at random.

    "Kor: mayor, teacher." and "The mayor of Kor is Bel." give "The mayor of Kor is Bel. Bel:
    teacher." and the query "teacher of Bel"; two numbers give the sum to compute.
    """
    while True:
        yield sum_plan(rng, world) if rng.random() < 0.4 else hop_plan(rng, world)


def random_name(rng: np.random.Generator, world: World) -> str:
    return world.name(int(rng.integers(world.entities)))


def random_value(rng: np.random.Generator, world: World) -> str:
    """A name, a number of three digits, or a year."""
    if rng.random() < 0.6:
        return random_name(rng, world)
    low, high = (100, 1000) if rng.random() < 0.6 else (1500, 2000)
    return str(rng.integers(low, high))


def hit(rng: np.random.Generator, place: World, number: int, name: str, fact: Fact | None) -> str:
    """A result of a search as the tool shows it: a page with this fact among others."""
    facts = [fact] if fact else []
    for relation in rng.choice(ALL_RELATIONS, rng.integers(0, 4), replace=False):
        if not fact or relation != fact[0]:
            facts.append((relation, name, random_value(rng, place)))
    texts = [fact_text(*facts[n]) for n in rng.permutation(len(facts))]
    lead = " ".join([f"{name} is a {rng.choice(TYPES)}.", *texts])
    return f"[{number}] {name} {place.address(name)}\n{lead}\n"


def response(rng: np.random.Generator, world: World, facts: list[Fact]) -> tuple[str, bool]:
    """The result of a search for these facts: half of the time hits of each query, mostly the right
    page first, else nothing but facts, so that more of a plan fits into a row."""
    text = ""
    if rng.random() < 0.5:
        place = world.elsewhere(str(rng.random()))
        for n, (relation, name, value) in enumerate(facts):
            heading = f"{relation} of {name}:\n" if len(facts) > 1 else ""
            other = facts[n - 1] if len(facts) > 1 and rng.random() < 0.5 else None
            others_name = other[1] if other else random_name(rng, world)
            pages = [(name, (relation, name, value)), (others_name, other)]
            order = pages if rng.random() < 0.75 else pages[::-1]
            text += heading + "".join(hit(rng, place, n, *page) for n, page in enumerate(order, 1))
    else:
        others = [
            (rng.choice(ALL_RELATIONS), random_name(rng, world), random_value(rng, world))
            for _ in range(rng.integers(0, 3))
        ]
        text = " ".join(rng.permutation([fact_text(*fact) for fact in facts + others]))
    return f"<tool_response>{text.strip()}</tool_response>", False


def ask(rng: np.random.Generator, phrase: str) -> tuple[str, bool]:
    """A question, half of the time in a frame of random words."""
    frame = str(rng.choice(FRAMES["pretrain"]))
    if rng.random() < 0.5:
        frame = random_frame(random.Random(str(rng.random())))
    return frame.format(np=phrase) + "\n", False


def sum_plan(rng: np.random.Generator, world: World) -> Chunk:
    operation, relation = rng.choice(sorted(OPERATIONS)), rng.choice(ALL_RELATIONS)
    names, possessive = [random_name(rng, world) for _ in range(2)], rng.random() < 0.4
    one, other = (noun_phrase(name, [relation], possessive) for name in names)
    numbers = [str(rng.integers(100, 1000)) for _ in range(2)]
    queries = [f"{relation} of {name}" for name in names]
    facts = [(relation, name, number) for name, number in zip(names, numbers)]
    said = " ".join(fact_text(*fact) for fact in facts)
    plan = f"{operation}: {', '.join(queries)}."
    return [
        ask(rng, f"the {operation} of {one} and {other}"),
        (f"<think>{plan}</think>", True),
        (call_text(search_for(*queries)), True),
        response(rng, world, facts),
        *working_out(said, operation, numbers, is_plan=True),
    ]


def working_out(said: str, operation: str, numbers: list[str], is_plan: bool) -> Chunk:
    """A thought with two numbers and an operation, the call that works it out, and its answer.

    Args:
        said: the facts that the numbers are from, or "".
        is_plan: there is loss on the whole thought, not only on numbers out of facts.
    """
    call = compute(numbers[0], OPERATIONS[operation], numbers[1])
    result = worked_out(call)
    return [
        (f"<think>{said} {operation}: " if said else f"<think>{operation}: ", is_plan),
        (f"{', '.join(numbers)}.</think>", bool(said)),
        (call_text(call), True),
        (f"<tool_response>{result}</tool_response>", False),
        (turn_text(f"It is {result}.", result), True),
    ]


def hop_plan(rng: np.random.Generator, world: World) -> Chunk:
    subject = random_name(rng, world)
    left = list(rng.choice(ALL_RELATIONS, rng.integers(1, 5)))
    pieces = [ask(rng, noun_phrase(subject, left, rng.random() < 0.4))]
    thought = f"{subject}: {', '.join(left)}."
    while left:
        relation = left.pop(0)
        pieces.append((f"<think>{thought}</think>", True))
        pieces.append((call_text(search_for(f"{relation} of {subject}")), True))
        value = random_name(rng, world) if left else random_value(rng, world)
        pieces.append(response(rng, world, [(relation, subject, value)]))
        fact, subject = fact_text(relation, subject, value), value
        thought = f"{fact} {subject}: {', '.join(left)}."
    return [*pieces, (turn_text(fact, subject), True)]


def sums(rng: np.random.Generator, world: World) -> Iterator[Chunk]:
    """Sums alone, with and without the facts that the numbers are from."""
    while True:
        operation, relation = rng.choice(sorted(OPERATIONS)), rng.choice(ALL_RELATIONS)
        numbers = [str(rng.integers(100, 1000)) for _ in range(2)]
        facts = [fact_text(relation, random_name(rng, world), number) for number in numbers]
        said = " ".join(facts) if rng.random() < 0.5 else ""
        yield working_out(said, operation, numbers, is_plan=False)


def visits(rng: np.random.Generator, world: World) -> Iterator[Chunk]:
    """Results of a search, the call that opens one of them, mostly the first, and the answer read
    off its record: an address is to be copied, whatever its form, and a value found, whatever signs
    stand around it. No host comes twice."""
    while True:
        place, relation = world.elsewhere(str(rng.random())), str(rng.choice(ALL_RELATIONS))
        names = [random_name(rng, world) for _ in range(rng.integers(1, 4))]
        hits = "".join(hit(rng, place, n, name, None) for n, name in enumerate(names, start=1))
        name = names[0] if rng.random() < 0.9 else str(rng.choice(names))
        # The name stands in many places by then, and its address in one of them.
        asked = turn_text(f"{name}: {relation}.", search_for(f"{relation} of {name}"))
        said = f"{asked}<tool_response>{hits}</tool_response><think>{name}: {relation}.</think>"
        value = random_value(rng, world)
        fact = fact_text(relation, name, value)
        before, between = ("".join(rng.choice(SIGNS, rng.integers(4))) for _ in range(2))
        record = f"{before} {relation}{between} {value}".strip()
        record = fact if rng.random() < 0.2 else record
        yield [
            (said, False),
            (call_text(browse(place.address(name), find=relation)), True),
            (f"<tool_response>p{rng.integers(1, 5)}: {record}</tool_response>", False),
            (turn_text(fact, value), True),
        ]


def walks(rng: np.random.Generator, world: World) -> Iterator[Chunk]:
    """Walks in small: notes, then pages of one to four entries, a chunk each. Each thought says
    what was found so far, each call follows "Next:".

    A real page of seven entries rarely has one that is looked for, so on real walks alone the rule
    is learned slowly.
    """
    while True:
        place, is_extreme = world.elsewhere(str(rng.random())), rng.random() < 0.1
        if is_extreme:
            word = rng.choice(["greatest", "smallest"])
            found = [f"{random_name(rng, world)} {rng.integers(100, 1000)}"]
        else:
            word = RARE_COLOUR if rng.random() < 0.7 else rng.choice([*COLOURS, RARE_COLOUR])
            found = [random_name(rng, world) for _ in range(rng.integers(0, 4))]
        state = f"{word}: {found[0]}." if is_extreme else listed(word, found)
        yield [(f"\nNotes: {state} {random_name(rng, world)}: catalogue, {word}.", False)]
        is_last = False
        while not is_last and len(found) < 6 and rng.random() < 0.95:
            entries = random_entries(rng, world, None if is_extreme else word)
            following, is_last = random_name(rng, world), rng.random() < 0.25
            page = "".join(f"{c} {n} {p} {place.address(n)}\n" for n, c, p in entries)
            page += "The catalogue ends here." if is_last else f"Next: {place.address(following)}"
            if is_extreme:
                prices = [*found, *(f"{name} {price}" for name, _, price in entries)]
                choose = max if word == "greatest" else min
                found = [choose(prices, key=lambda item: item.split()[1])]
                state = f"{word}: {found[0]}."
            else:
                found += [name for name, colour, _ in entries if colour == word]
                state = listed(word, found)
            answer = ", ".join(item.split()[0] for item in found) or following
            action = answer if is_last else browse(place.address(following))
            response = f"<tool_response>{page}</tool_response>"
            yield [(response, False), (turn_text(state, action), True)]


def random_entries(
    rng: np.random.Generator, world: World, wanted: str | None
) -> list[tuple[str, str, int]]:
    """(name, colour, price) of one to four entries, a wanted colour more often than others."""
    entries = []
    for _ in range(rng.integers(1, 5)):
        name = random_name(rng, world)
        is_wanted = wanted is not None and rng.random() < 0.25
        colour = wanted if is_wanted else rng.choice([*COLOURS, RARE_COLOUR])
        entries.append((name, colour, int(rng.integers(100, 1000))))
    return entries
