"""What fictional worlds are made of: syllables, types and relations of entities, question frames,
page frames.

In: nothing. Out: tables and HTML helpers that data/world.py, data/sites.py, data/tasks.py and
data/deep/ share. To try an idea, add a relation to LEAD or RECORDS, or a question form to FRAMES.
"""

import itertools
import random


def _syllables(seed: int, count: int) -> list[str]:
    """Distinct consonant-vowel-consonant syllables: a name is read off three letters at a time."""
    all_of_them = itertools.product("bdfghklmnprstvz", "aeiou", "klmnrst")
    return random.Random(seed).sample(["".join(letters) for letters in all_of_them], count)


SYLLABLES = 200  # of each kind; a multiple of the number of splits
FIRST_SYLLABLES = [s.capitalize() for s in _syllables(1, SYLLABLES)]
MIDDLE_SYLLABLES = LAST_SYLLABLES = _syllables(2, SYLLABLES)

# type -> relation -> type of its value. LEAD facts show in the snippets of a search.
LEAD = {
    "country": {"capital": "city", "president": "person", "area": "number"},
    "city": {"mayor": "person", "river": "river", "population": "number"},
    "person": {"birthplace": "city", "employer": "company", "height": "number"},
    "company": {"headquarters": "city", "founder": "person", "staff": "number"},
    "river": {"mouth": "city", "source": "country", "length": "number"},
    "book": {"author": "person", "publisher": "company", "chapters": "number"},
    "festival": {"venue": "city", "sponsor": "company", "attendance": "number"},
}
# These stand only in the records of a page and in no snippet, so that they need `browse`.
RECORDS = {
    "country": {"poet": "person", "independence": "year"},
    "city": {"architect": "person", "foundation": "year"},
    "person": {"teacher": "person", "birth": "year"},
    "company": {"auditor": "company", "opening": "year"},
    "river": {"explorer": "person", "depth": "number"},
    "book": {"translator": "person", "printing": "year"},
    "festival": {"organizer": "person", "opening": "year"},
}
TYPES = list(LEAD)
RELATIONS = {type: LEAD[type] | RECORDS[type] for type in TYPES}
ALL_RELATIONS = sorted({relation for type in TYPES for relation in RELATIONS[type]})
PLURALS = {type: type[:-1] + "ies" if type[-1] == "y" else type + "s" for type in TYPES}
OPERATIONS = {"sum": "+", "difference": "-", "product": "*"}

# {np} is a noun phrase such as "the mayor of the capital of Norland". The splits share no frame.
_FRAMES = {
    "pretrain": "Find {np}. | Look up {np}. | Please find {np}. | I need {np}. | I want to know "
    "{np}. | Give me {np}. | Which is {np}? | Search for {np}. | Could you find {np}? | My "
    "question: {np}? | We want {np}. | Who or what is {np}? | Answer this: {np}? | What "
    "do they call {np}? | Find out {np} for me. | It is about {np}. What is it? | {np}? | "
    "Can anyone say what {np} is? | Say {np}, please. | We would like to hear {np}. | "
    "Name the answer: {np}. | You should report {np}. | Tell us {np}.",
    "train": "What is {np}? | Tell me {np}. | Can you name {np}? | Do you know {np}? | I would "
    "like {np}.",
    "dev": "Say what {np} is. | Let me know {np}. | What could {np} be?",
    "test": "Name {np}. | Report {np}. | Which answer fits {np}? | Can you tell me {np}? | State "
    "{np}, please.",
}
FRAMES = {split: frames.split(" | ") for split, frames in _FRAMES.items()}


def number_relation(type: str) -> str:
    """The relation of a type whose value is a number that shows in a search snippet."""
    return next(relation for relation, kind in LEAD[type].items() if kind == "number")


def html_page(title: str, body: str, head: str = "") -> str:
    """A whole HTML page."""
    return (
        f'<!doctype html><html><head><meta charset="utf-8"><title>{title}</title>{head}</head>'
        f"<body>{body}</body></html>"
    )
