"""Whether an answer is the truth: `correct`, which compares names, numbers, dates and lists.

In: a prediction, the truth, the answer's type. Out: 1.0 or 0.0. The comparison is exact after
normalisation, so that a guess with many answers in it does not score.
"""

import operator
import re
from fractions import Fraction

import regex

from support.words import fold

MAX_ANSWER_CHARS = 200
MONTHS = (
    "january february march april may june july august september october november december".split()
)
# A month is its name or its first three letters.
MONTH = rf"(?P<month>{'|'.join(f'{name[:3]}(?:{name[3:]})?' for name in MONTHS)}|sept)\.?"
WEEKDAY = r"(?:(?:mon|tues?|wed(?:nes)?|thu(?:rs?)?|fri|sat(?:ur)?|sun)(?:day|\.)?,?\s+)?"
DAY, YEAR = r"(?:the\s+)?(?P<day>\d{1,2})(?:st|nd|rd|th)?", r"(?P<year>\d{3,4})"
NAMED_MONTH = [  # 12 March 1990; March 12, 1990; 1990 March 12
    re.compile(rf"{WEEKDAY}(?:{DAY}[\s/-]+(?:of\s+)?)?{MONTH},?[\s/-]+(?:of\s+)?{YEAR}"),
    re.compile(rf"{WEEKDAY}{MONTH}[\s-]+{DAY},?[\s-]+{YEAR}"),
    re.compile(rf"{YEAR},?[\s-]+{MONTH}(?:[\s-]+{DAY})?"),
]
# 1990, 1990-03, 1990-03-12, 1990/03/12, 1990年3月12日; but 1990/03 may be a season.
YEAR_FIRST = re.compile(
    rf"{YEAR}(?:-(\d\d?)|([-/.])(\d\d?)\3(\d\d?)|[年년](?:\s*(\d\d?)[月월](?:\s*(\d\d?)[日일])?)?)?"
)
YEAR_LAST = re.compile(r"(\d\d?)([-/.])(\d\d?)\2(\d{4})")
GROUPED = re.compile(  # digits in groups: 12,345 or 12 345 or 12'345 or 1,23,456
    r"(?<![\d.,'])\d{1,3}(?:([, '])\d{3}(?:\1\d{3})*|(?:,\d\d)+,\d{3})(?![\d,'])"
)
NUMBER = re.compile(
    r"([-+]?)([$€£¥]?)\s*((?:\d+(?:\.\d+)?|\.\d+)(?:e[-+]?\d{1,3})?)"
    r"(\s*[^\d\s^.,][^\d^]{0,20}(?:\^[-\d]{1,3})?)?\s*"  # the unit
)
SCALES = {"dozen": 12, "hundred": 100, "thousand": 10**3, "lakh": 10**5, "million": 10**6}
SCALES |= {"crore": 10**7, "billion": 10**9, "trillion": 10**12}
# Words after a number that are not what it counts: they change it, or they add a second guess.
NO_UNIT = set(
    "and or no to not but nor except less more is was wrong percentage plus minus times point"
    " over by half halves third thirds quarter quarters squared cubed percent per cent mn mln"
    " mio mil mille millions millones milliard milliards mrd score gross lac lacs myriad"
    " permille bn billions tn trillions hundreds thousands dozens lakhs crores bps zero one two"
    " three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen"
    " seventeen eighteen nineteen twenty thirty forty fifty sixty seventy eighty ninety".split()
)
# Signs that are no punctuation: -5 and e^{-x}, .5, 1/2 and 3.5, <=5 and x<y, √2.
KEPT = (
    r"(?<!\w)-(?=\.?\d|\w\b)|(?<![\w.])\.(?=\d)|(?<=\d)[./:](?=\d)"
    r"|[<>=](?=[<>=]*\.?\d)|(?<=\w[<>=]*)[<>=](?=[<>=]*[\w-])|(?![<>=|~])\p{Sm}"
)
SEVERAL = re.compile(r"[,;|\n/、،]")  # signs between several answers


def ungrouped(text: str) -> str:
    """A folded text in which 12,345 and 12 345 are 12345."""
    return GROUPED.sub(lambda number: re.sub(r"\D", "", number.group()), text)


def normalize(text: str) -> str:
    """The text without what does not change its meaning: case, the encoding of accents,
    punctuation, a leading article and spacing. What does change it stays: the sign and the point of
    a number (-5, 3.5, 1/2), + # % ^ and currencies (C++, C#, 5%), and signs of mathematics (¬A, √2,
    x < y, e^{-x})."""
    text = re.sub(r"(?<=\d)\s*/\s*(?=\d)", "/", ungrouped(fold(text)))
    text = regex.sub(r"\s*((?![|~])\p{Sm})\s*", r"\1", text)
    # \w of the module `regex` takes the vowel signs of a word for a part of it.
    words = regex.sub(rf"(?!{KEPT})[^\w\s+#%^$€£¥°]", " ", text).split()
    return " ".join(words[1:] if len(words) > 1 and words[0] in ("the", "a", "an") else words)


def parse_number(text: str) -> tuple[Fraction, str] | None:
    """(value, unit) of a text that is a number, perhaps with a unit ("12 km", "$5"), else None. A
    unit that stands apart from the number begins with a space.
    """
    match = NUMBER.fullmatch(ungrouped(fold(text).strip()).rstrip(". "))
    if match is None:
        return None
    sign, currency, digits, unit = match.groups(default="")
    words, apart = unit.split(), unit[:1].isspace()
    scale = 1
    while words and words[0] in SCALES:
        scale, apart = scale * SCALES[words.pop(0)], True
    try:
        value = Fraction(sign + digits) * scale  # exact; Decimal would round to 28 digits
    except ValueError:  # more digits than Python reads
        return None
    unit = " " * bool(apart and words) + " ".join(words)
    return value, currency + ("%" if unit.strip() in ("percent", "per cent") else unit)


def same_number(guess: tuple[Fraction, str], truth: tuple[Fraction, str]) -> bool:
    """Whether value and unit are equal. "42 people" is 42, too; "5 k" may be 5,000 and is not 5."""
    is_counted = re.fullmatch("(?!.*(?:illi|ths?$))( [a-z]{2,}){1,2}", guess[1])
    is_counted = is_counted and not NO_UNIT & set(guess[1].split())
    is_same_unit = guess[1].split() == truth[1].split() or (is_counted and not truth[1])
    return guess[0] == truth[0] and bool(is_same_unit)


def parse_date(text: str) -> tuple[int, ...] | None:
    """(year,), (year, month) or (year, month, day) of a text that is one date, else None.

    Read are "1990-03-12", "12 March 1990", "Mar 12, 1990", "1990" and other customary forms, but
    not 03/04/1990, which may be in March or in April.
    """
    text = re.sub(r"^(?:on|in)\s+", "", fold(text).strip().rstrip(". "))
    names = [name[:3] for name in MONTHS]
    found = set()
    if match := YEAR_FIRST.fullmatch(text):
        found.add(tuple(int(part) for part in match.groups() if part and part.isdecimal()))
    for match in filter(None, (form.fullmatch(text) for form in NAMED_MONTH)):
        day, month, year = match.group("day", "month", "year")
        found.add((int(year), 1 + names.index(month[:3]), *([int(day)] if day else [])))
    if match := YEAR_LAST.fullmatch(text):
        one, _, other, year = match.groups()
        found |= {(int(year), int(one), int(other)), (int(year), int(other), int(one))}
    bounds = ((1, 9999), (1, 12), (1, 31))
    found = [d for d in found if all(low <= part <= high for part, (low, high) in zip(d, bounds))]
    return found[0] if len(found) == 1 else None


def same_items(prediction: str, truths: list[str]) -> bool:
    """Whether a text lists these items, in any order, and nothing else."""
    wanted = sorted(normalize(item) for item in truths)
    text = fold(prediction)
    # An item may itself hold a comma, an "and" or a number ("Paris, Texas"), so the separators are
    # tried from strict to loose, with and without numbers or strokes before the items.
    marks = (r"[;\n]", r",(?!\d)|[;\n、،|]", r"[,;\n、،|/·•]")
    ands = ("", r"|,?\s+and\s+|\s*&\s*", r"|\band\b|&|和|及")
    for separator in (mark + word for word in ands for mark in marks):
        items = re.split(separator, text)
        bare = [re.sub(r"^\s*(?:\(?\d{1,3}[.)]|[-*•])\s+", "", item) for item in items]
        if wanted in (sorted(filter(None, map(normalize, form))) for form in (items, bare)):
            return True
    return False


def correct(prediction: str | None, answer: str | list[str], answer_type: str) -> float:
    """1.0 if the prediction is the answer, else 0.0.

    Args:
        prediction: what the policy answered; None if it did not.
        answer: the truth. For "list" it is all of the items; for other types a list gives aliases,
            any of which counts.
        answer_type: "name", "number", "date" or "list".

    Raises:
        ValueError: an unknown answer type.
    """
    if answer_type not in ("name", "number", "date", "list"):
        raise ValueError(f"unknown answer type {answer_type!r}: use name, number, date or list")
    truths = answer if isinstance(answer, list) else [answer]
    longest = max(MAX_ANSWER_CHARS * (5 if answer_type == "list" else 1), 2 * sum(map(len, truths)))
    prediction = (prediction or "").strip()
    if not prediction or len(prediction) > longest:
        return 0.0
    if answer_type == "list":
        if isinstance(answer, str):
            truths = [item for item in re.split(r"[,;\n、،]", answer) if item.strip()]
        return float(same_items(prediction, truths))
    parse = {"number": parse_number, "date": parse_date}.get(answer_type)
    if parse:
        guess, same = parse(prediction), same_number if answer_type == "number" else operator.eq
        values = [parse(truth) for truth in truths]
        if guess and any(value and same(guess, value) for value in values):
            return 1.0
        truths = [truth for truth, value in zip(truths, values) if not value]
    # A name, or a "number" such as "about twenty" that cannot be read as one: text against text.
    several = [bool(SEVERAL.search(ungrouped(fold(text)))) for text in (prediction, *truths)]
    if several[0] and not any(several[1:]):
        return 0.0
    form = normalize if normalize(prediction) else fold  # a sign alone, such as ♥
    return float(any(form(prediction) == form(truth.strip()) for truth in truths))
