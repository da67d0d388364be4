"""Whether an answer is the truth: `correct`, which compares names, numbers, dates and lists.

In: a prediction, the truth, the answer's type. Out: 1.0 or 0.0. The comparison is exact after
normalisation, so that a guess with many answers in it does not score.
"""

import re
import unicodedata
from decimal import Decimal, InvalidOperation

MAX_ANSWER_CHARS = 200
MONTHS = (
    "january february march april may june july august september october november december".split()
)
# A month is its name or its first three letters.
MONTH = rf"({'|'.join(f'{name[:3]}(?:{name[3:]})?' for name in MONTHS)})\.?"
NUMBER = re.compile(
    r"([-+]?)([$€£¥]?)\s*((?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?(?:e[-+]?\d{1,3})?)\s*"
    r"([^\d\s^.,][^\d^]{0,20}(?:\^[-\d]{1,3})?)?"  # the unit
)


def fold(text: str) -> str:
    """One form for look-alike characters and cases. A raised digit becomes "^2" first, because NFKC
    alone would turn 10² into 102."""
    text = re.sub(r"[²³¹⁰⁴-⁹]+", lambda power: "^" + power.group(), text)
    return unicodedata.normalize("NFKC", text).casefold().replace("−", "-").strip()


def normalize(text: str) -> str:
    """The text without what does not change its meaning: case, the encoding of accents,
    punctuation, a leading article and spacing. What does change it stays: the sign and the point of
    a number (-5, 3.5), and + # % ^ and currencies (C++, C#, 5%)."""
    words = re.sub(r"(?!(?<!\w)-(?=\d)|(?<=\d)\.(?=\d))[^\w\s+#%^$€£¥°]", " ", fold(text)).split()
    return " ".join(words[1:] if len(words) > 1 and words[0] in ("the", "a", "an") else words)


def parse_number(text: str) -> tuple[Decimal, str] | None:
    """(value, unit) of a text that is a number, perhaps with a unit ("12 km", "$5"), else None."""
    match = NUMBER.fullmatch(fold(text).rstrip(". "))
    if match is None:
        return None
    sign, currency, digits, unit = match.groups()
    try:
        return Decimal(sign + digits.replace(",", "")), currency or (unit or "").strip()
    except InvalidOperation:
        return None


def parse_date(text: str) -> tuple[int, ...] | None:
    """(year,), (year, month) or (year, month, day) of a text that is one date, else None.

    Read are "1990-03-12", "12 March 1990", "Mar 12, 1990" and "1990".
    """
    text = fold(text).rstrip(". ")
    if iso := re.fullmatch(r"(\d{3,4})(?:-(\d{1,2}))?(?:-(\d{1,2}))?", text):
        date = tuple(int(part) for part in iso.groups() if part)
    else:
        day, year = r"(\d{1,2})(?:st|nd|rd|th)?", r"(\d{3,4})"
        if words := re.fullmatch(rf"(?:{day}\s+(?:of\s+)?)?{MONTH},?\s+{year}", text):
            day, name, year = words.groups()
        elif words := re.fullmatch(rf"{MONTH}\s+{day},?\s+{year}", text):
            name, day, year = words.groups()
        else:
            return None
        month = 1 + [month[:3] for month in MONTHS].index(name[:3])
        date = (int(year), month, int(day)) if day else (int(year), month)
    bounds = ((1, 9999), (1, 12), (1, 31))
    return date if all(low <= part <= high for part, (low, high) in zip(date, bounds)) else None


def same_items(prediction: str, truths: list[str]) -> bool:
    """Whether a text lists these items, in any order, and nothing else."""
    wanted = sorted(normalize(item) for item in truths)
    # An item may itself hold a comma or an "and" ("Paris, Texas"), so the separators are tried from
    # strict to loose.
    separators = (r"[;\n]", r"[,;\n]", r"[;\n]|,?\s+and\s+", r"[,;\n]|\band\b")
    splits = (re.split(separator, prediction) for separator in separators)
    return any(sorted(filter(None, map(normalize, items))) == wanted for items in splits)


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
    if not prediction or not prediction.strip() or len(prediction) > longest:
        return 0.0
    if answer_type == "list":
        items = truths if isinstance(answer, list) else re.split(r"[,;\n]", answer)
        return float(same_items(prediction, items))
    parse = {"number": parse_number, "date": parse_date}.get(answer_type)
    if parse and any(parse(truth) is not None for truth in truths):
        guess = parse(prediction)
        return float(guess is not None and any(guess == parse(truth) for truth in truths))
    # A name, or a "number" such as "about twenty" that cannot be read as one: text against text.
    if re.search(r"[,;|\n/]", prediction) and not any(
        re.search(r"[,;|\n/]", truth) for truth in truths
    ):
        return 0.0  # several guesses
    guess = normalize(prediction)
    return float(bool(guess) and any(guess == normalize(truth) for truth in truths))
