"""One form of words: what is the same word to a reader is the same text after `fold`.

In: text. Out: its form, or the words of it for a search index or a query. Answers, `find` and
search compare words in this form only. To cut the words of another script, change SCRIPTS.
"""

import bisect
import itertools
import re
import unicodedata

import regex

# Scripts that put no spaces between words, or hang endings on them: each letter is a word to the
# index, and a query asks for two of them side by side.
SCRIPTS = r"[\p{Han}\p{Hiragana}\p{Katakana}ー\p{Hangul}\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}]"
UNSPACED = rf"{SCRIPTS}\p{{M}}*+"
SPACED = rf"[\w--{SCRIPTS}]++"  # \w of this module takes marks for a part of their word
WORDS = regex.compile(rf"{UNSPACED}|{SPACED}", regex.V1)
RUNS = regex.compile(rf"(?:{UNSPACED})++|{SPACED}", regex.V1)
# Vowel points of Hebrew and Arabic, which are optional, and the stroke that stretches a word.
POINTS = (
    r"[[\u0591-\u05c7\u0610-\u061a\u064b-\u0652\u0656-\u065f\u0670\u06d6-\u06ed]&&\p{M}]|\u0640"
)
POINTS = regex.compile(POINTS, regex.V1)
PILE = regex.compile(r"(\p{M}{30})\p{M}+")  # unicodedata takes quadratic time for it
RAISED, FRACTION = regex.compile("[²³¹⁰⁴-⁹]+"), regex.compile(r"(?<=\d)(?=[¼-¾⅐-⅞])")
ACCENTS = regex.compile("[\u0300-\u036f]+")
SAME = str.maketrans("‘’‚ʻʼ“”„«»‐‑‒–—−⁄", "'''''\"\"\"\"\"------/", "\xad")


def fold(text: str) -> str:
    """One form for look-alike characters, for cases and for the ways to write an accent.

    NFKC alone would turn 10² into 102 and 1½ into 11/2. A raised digit becomes "^2" before it.
    """
    if text.isascii():
        return text.lower()
    text = PILE.sub(r"\1", text).replace("´", "'")  # NFKC would make it a space and an accent
    text = RAISED.sub(r"^\g<0>", FRACTION.sub(" ", text))
    text = unicodedata.normalize("NFKC", text).casefold()
    text = unicodedata.normalize("NFKC", text).translate(SAME)
    return POINTS.sub("", text).replace("i\u0307", "i")  # İ is i, not i with two dots


def without_accents(text: str) -> str:
    folded = fold(text)
    if folded.isascii():
        return folded
    return unicodedata.normalize("NFC", ACCENTS.sub("", unicodedata.normalize("NFD", folded)))


def fold_words(text: str, form=fold) -> tuple[str, list[int], list[int]]:
    """A text whose words are folded and have one space between them, where its words begin, and
    where they begin in the text. A fold may change the length of a word: ß becomes ss."""
    words = text.split()
    forms = {word: form(word) for word in set(words)}
    words = [forms[word] for word in words]
    in_folded = list(itertools.accumulate((len(word) + 1 for word in words), initial=0))
    in_text = [word.start() for word in re.finditer(r"\S+", text)] + [len(text) + 1]
    return " ".join(words), in_folded, in_text


def across(at: int, here: list[int], there: list[int]) -> int:
    """The place in one text of a place in another one, of which the words begin here and there."""
    word = max(0, bisect.bisect_right(here, at, hi=len(here) - 1) - 1)
    length, length_there = (places[word + 1] - places[word] for places in (here, there))
    return there[word] + (at - here[word]) * length_there // length


def index_words(text: str) -> str:
    """The words of a text for an index, with spaces between them. Accents do not count."""
    return " ".join(WORDS.findall(without_accents(text)))


def query_words(query: str) -> list[str]:
    """The words of a query, each once, and two neighbours of a script without spaces as one."""
    found = []
    for run in RUNS.findall(without_accents(query)):
        letters = WORDS.findall(run)
        found += [" ".join(pair) for pair in itertools.pairwise(letters)] or letters
    return list(dict.fromkeys(found))
