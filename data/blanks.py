"""Questions from documents, without a language model: a statement of a page with a blank in it.

    sentence    which number, date, version or name completes a sentence of the page
    table       what stands in a column of a table, for a row
    definition  which entry of the page has this description

In: an index of any documents (data/index.py). Out: tasks that name the page and ask for the blank,
each through a funnel that needs no world:

    schema      fields and types are right, and the answer scores 1 under its own answer type
    leak        the answer stands in no question, title, address or id
    guess       no yes or no, no tiny number, no answer of one in ten of its kind, no common name
    unique      only one page has this title, and in all pages the blank has one filling
    reach       search finds the page for the question or its title, and browse shows the answer
    snippet     the first hit's snippet does not show it
    repeat      the same question again
    near        the same question in other words

Sentences that need their surroundings ("It returns 5 in this case.") are left out. Pages are read
in random order, as many as are needed. To try an idea, add a kind of blank to BLANKS.
"""

import functools
import hashlib
import html as html_module
import itertools
import random
import re
from collections import Counter, deque
from collections.abc import Iterator
from dataclasses import astuple, dataclass
from pathlib import Path
from urllib.parse import unquote

from lxml import etree
from tqdm import tqdm

from data.deep import funnel as worlds
from data.deep.funnel import STOP_WORDS, Funnel, items, stands_in, words_of
from data.index import open_index, search_index
from data.task import Task
from support.html_text import main_parts, parse, text_alone
from support.toolbox import open_index_tools
from support.words import index_words

# Elements that begin and end a text of their own, and those whose text is no statement.
HEADINGS = ("h1", "h2", "h3", "h4", "h5", "h6")
BLOCKS = set("p li dd dt td th div section article blockquote ul ol dl table tr body".split())
BLOCKS |= set(HEADINGS)
NO_STATEMENT = set("head pre nav header footer aside form button svg math".split())
CODE = ("code", "tt")  # in backticks, as browse shows them

ENDS = r"(?<=[.!?])(?<!\be\.g\.)(?<!\bi\.e\.)(?<!\betc\.)(?<!\bvs\.)(?<!\b[A-Z]\.)\s+(?=[A-Z`\"“(])"
SENTENCE_END = re.compile(ENDS)
SEPARATOR = re.compile(r"\s+[—–|·-]\s+")  # between a page's title and the name of its site
# Pages of which the sentences are no statements about their subject.
NO_PROSE = re.compile(
    r"(?i)\b(?:change ?log|release notes?|what.s new|licen[cs]es?|copyright|bibliography"
    r"|acknowledg\w+)\b|\brelease \d|^(?:general |module )?index$|^(?:table of )?contents$|^search$"
)
# Words that point out of a sentence, at its beginning and anywhere.
POINTS_BACK = re.compile(
    r"(?:it|its|this|that|these|those|they|their|he|she|his|her|such|then|here|there|otherwise|also"
    r"|however|therefore|thus|hence|additionally|furthermore|moreover|instead|but|and|or|so|note"
    r"|see|similarly|again|finally|first|second|next|both|neither|another|one|some|others|likewise"
    r"|conversely|still|even|as|by contrast|if so|for example|for instance|in addition"
    r"|in (?:this|that|these|those|such|either|both)|please|notice|remember"
    r"|(?:if|when|since|unless|although|while|because)\b[^,]*, (?:it|they|he|she)"
    r"|(?:if|when|unless) (?:not )?\w+,)(?!\w)",
    re.IGNORECASE,
)
POINTS_OUT = re.compile(
    r"\b(?:this|these|those|that case|above|below|following|follows|previous|previously|preceding"
    r"|latter|former|examples?|here|we|our|us|I|figure|table|section|chapter|appendix|listing"
    r"|tutorial|respectively|same|aforementioned|see|consult|refer|(?:found|described) in"
    r"|documented|discussed|used instead)\b",
    re.IGNORECASE,
)
IS_CODE = re.compile(
    r"[{}<>=;|\\^_$\[\]]|::|\.\.\.|…|->|\w\(|https?:|(?<!\.\w)[\w`)]\. [a-z]"
)  # outside of backticks
NAMED = re.compile(r"`|(?<=[a-z,] )[A-Z]")  # a sentence without an entry has to name something
MONTHS = "January|February|March|April|May|June|July|August|September|October|November|December"
# Kind -> (answer type, what the question calls it, pattern with the answer as its only group).
BLANKS = {
    "date": (
        "date",
        "date",
        rf"\b((?:\d{{1,2}} )?(?:{MONTHS})(?: \d{{1,2}},)? \d{{4}}|\d{{4}}-\d\d-\d\d)\b(?!-)",
    ),
    "year": (
        "date",
        "year",
        r"\b(?:in|since|until|before|after|from|by|of|year) ((?:1[6-9]|20)\d\d)(?![\w%-]|[.,]\d)",
    ),
    "version": (
        "name",
        "version number",
        r"\b(?:[Vv]ersions?|[Rr]eleases?|[A-Z][A-Za-z]+) (\d+(?:\.\d+){1,3})(?!\.?[\w+*-])",
    ),
    "number": (
        "number",
        "number",
        r"(?:\b(?!(?:version|release|and|or|to) )[a-z]+ "
        r"|(?<!and )(?<!or )(?<!, )\b(?:RFC|PEP|ISO) |\()"
        r"`?(-?\d{1,3}(?:,\d{3})+|-?(?!0\d)\d+(?:\.\d+)?%?)`?"
        r"(?![\w%:/*+^°-]|[.,]\d|,? (?:and |or |to )?(?:RFC |PEP )?`?-?\d)",
    ),
    "name": (
        "name",
        "name",
        r"(?<![\w`])[a-z]+,? ([A-Z][a-zé]{2,}(?: (?:van |von |de |der )?[A-Z][a-zé]{2,}){0,3})"
        r"(?=[ ,.)])(?! [A-Z\d])",
    ),
    # Not one of a list, in which only the order says which is meant.
    "identifier": (
        "name",
        "name",
        r"(?<!`)[\w)],? (?<!` and )(?<!` or )(?<!`, and )(?<!`, or )"
        r"`([A-Za-z_][\w.]{3,})(?:\(\))?`(?!,? (?:and |or )?`)(?![\w/:*])",
    ),
}
CELL = re.compile(r"`?(-?\d[\d,]*(?:\.\d+)?%?|[A-Za-z_][\w.+-]*\w)`?")  # graded as it stands
# What may stand before an entry's name: "class datetime.date".
KEYWORD = re.compile(r"(?:(?:class|type|exception|static|abstract|async|coroutine|struct|enum) )+")
LINE_MARK = re.compile(r"(?:#{1,6}|[-*+]|\d+\.)\s+")  # of a heading or an item in Markdown
NOTICE = re.compile(r"(?i)(?:note|tip|warning|caution|important|see also):?")  # no heading
ENTRY = re.compile(r"[A-Za-z_][\w.-]*(?: [\w.-]+){0,2}")
MANY_PAGES = 50  # words that stand on so many pages say nothing about one of them
TRIES = 20  # blanks of a page that are looked at before the next page's turn
WITHOUT_WORDS = re.compile(r"\b(?:True|False|None|NULL|true|false|null)\b")


@dataclass(frozen=True)
class Statement:
    """A sentence, a cell or a description, with what it stands under.

    heading: the nearest one before it, "" if that is the page's own.
    entry: of a definition list: its term; of a table: the row; else "".
    text: of a cell "column: cell", of a description "description: term".
    """

    form: str
    heading: str
    entry: str
    text: str


@dataclass(frozen=True)
class Blank:
    """A statement with a blank: the answer, perhaps in backticks, between `before` and `after`."""

    statement: Statement
    kind: str
    before: str
    answer: str
    after: str


# --------------------------------------------------------------------------------------- statements


def text_of(element: etree._Element) -> str:
    """All text of an element on one line."""
    walk = etree.iterwalk(element, events=("start", "end"))
    parts = [inline(event, part) for event, part in walk if (event, part) != ("end", element)]
    return " ".join("".join(parts).split())


def inline(event: str, element: etree._Element) -> str:
    """What an element adds to the line that it stands in, where it starts and where it ends."""
    mark = "`" if element.tag in CODE else "^" if element.tag in ("sup", "sub") else ""
    if event == "start":
        return mark + (element.text or "")
    space = " " if element.tag in BLOCKS else ""
    if element.tag == "br":  # between the terms of one entry
        space = ", " if next(element.iterancestors("dt"), None) is not None else " "
    return mark.replace("^", "") + space + (element.tail or "")


def table_rows(table: etree._Element) -> list[list[etree._Element]]:
    return [row.xpath("td | th") for row in table.iter("tr")]


def is_data(table: etree._Element) -> bool:
    """Whether a table has a row of column names, and as many cells in each other row."""
    rows = table_rows(table)
    widths = {len(row) for row in rows}
    is_named = len(rows) > 2 and all(cell.tag == "th" for cell in rows[0])
    return is_named and len(widths) == 1 and 1 < len(rows[0]) < 9 and not table.xpath(".//table")


def cells(table: etree._Element, heading: str) -> Iterator[Statement]:
    """Each cell beside the first of its row."""
    columns, *rows = [[text_of(cell) for cell in row] for row in table_rows(table)]
    for row, below in itertools.zip_longest(rows, rows[1:], fillvalue="-"):
        if not below[0]:  # a row of several lines: its name stands for all of them
            continue
        for column, cell in zip(columns[1:], row[1:]):
            if column and cell and 1 < len(row[0]) < 60 and len(row[0].split()) < 6:
                yield Statement("table", heading, row[0], f"{column}: {cell}")


def name_of(term: str) -> str:
    """The name that a term declares: `datetime.date` of "class datetime.date(year, month, day)"."""
    name, bracket, _ = term.replace("`", "").partition("(")
    name = KEYWORD.sub("", name).strip(" ,")
    return name.split()[-1].lstrip("*&") if bracket and name else name


def sentences(text: str, heading: str, entry: str, is_first: bool) -> Iterator[Statement]:
    """The sentences of a paragraph; the first one under an entry describes it."""
    found = SENTENCE_END.split(text)
    for sentence in found:
        yield Statement("sentence", heading, entry, sentence)
    if is_first and entry:
        yield Statement("definition", heading, "", f"{found[0]}: {entry}")


def statements(tree: etree._Element) -> Iterator[Statement]:
    """All statements of a page, in its order; the tree is changed."""
    heading, terms, words, is_first = "", [], [], False
    for part in main_parts(text_alone(tree)):
        walk = etree.iterwalk(part, events=("start", "end"))
        for event, element in walk:
            tag, starts = element.tag, event == "start"
            if tag in BLOCKS:
                text, words = " ".join("".join(words).split()), []
                if tag in HEADINGS and not starts:
                    if not NOTICE.fullmatch(text):
                        heading = "" if tag == "h1" else text
                elif tag == "dt" and not starts and terms:
                    names = [*terms[-1].split(", "), name_of(text)] if is_first else [name_of(text)]
                    terms[-1] = ", ".join(dict.fromkeys(names))
                    is_first = True
                    yield Statement("entry", heading, "", terms[-1])
                elif text:
                    yield from sentences(text, heading, terms[-1] if terms else "", is_first)
                    is_first = False
                if tag == "dl":
                    terms = [*terms, ""] if starts else terms[:-1]
            is_table = tag == "table" and element.find(".//th") is not None  # not of a layout
            if starts and is_table and is_data(element):
                yield from cells(element, heading)
            if is_table or tag in NO_STATEMENT or element.get("role") == "navigation":
                walk.skip_subtree()
                words.append("" if starts else element.tail or "")
            else:
                words.append(inline(event, element))


# ------------------------------------------------------------------------------------------- blanks


def named_by(statement: Statement) -> str:
    """The entry that a statement stands under, or that it describes."""
    is_description = statement.form == "definition"
    return statement.text.rpartition(": ")[2] if is_description else statement.entry


def is_clear(statement: Statement) -> bool:
    """Whether a sentence can be understood where only its page, heading and entry are named."""
    text, entry = statement.text, statement.entry
    prose = re.sub(r"`[^`]*`", "`", text)
    is_whole = re.match(r"[A-Z`]", text) and text.endswith(".") and 40 <= len(text) <= 300
    is_even = text.count("(") == text.count(")") and text.count("`") % 2 == 0
    points = POINTS_BACK.match(text) or POINTS_OUT.search(prose) or IS_CODE.search(prose)
    named = entry and len(entry) < 80 or NAMED.search(text)
    return bool(is_whole and is_even and not points and named and len(prose.split()) > 6)


def blanks_of(statement: Statement) -> Iterator[Blank]:
    """The blanks that a statement offers."""
    text = statement.text
    if statement.form == "definition":
        description, _, entry = text.rpartition(": ")
        if ENTRY.fullmatch(entry) and 40 <= len(description) <= 300:
            points = POINTS_BACK.match(description) or POINTS_OUT.search(description)
            if not points and not IS_CODE.search(re.sub(r"`[^`]*`", "`", description)):
                yield Blank(statement, "definition", f"{description}: ", entry, "")
    elif statement.form == "table":
        column, _, cell = text.partition(": ")
        if (match := CELL.fullmatch(cell)) and len(column) < 40:
            is_number = re.fullmatch(r"-?[\d,]*\.?\d+%?", match.group(1))
            kind = "number in a table" if is_number else "name in a table"
            yield Blank(statement, kind, text[: -len(cell)], match.group(1), "")
    elif is_clear(statement):
        for kind, (_, _, pattern) in BLANKS.items():
            for match in re.finditer(pattern, text):
                answer, (start, end) = match.group(1), match.span(1)
                if text[:start].count("`") % 2 == 1:
                    start, end = start - 1, text.index("`", end) + 1
                code = text[start:end].replace("()", "").strip("`")
                if code == answer and start > 0 and not WITHOUT_WORDS.fullmatch(answer):
                    yield Blank(statement, kind, text[:start], answer, text[end:])


def question_of(blank: Blank, title: str) -> str:
    heading = blank.statement.heading
    heading = "" if index_words(heading) == index_words(title) else heading
    place = f'On the page "{title}"' + f', under "{heading}"' * bool(heading)
    entry = blank.statement.entry
    if blank.kind == "definition":
        return f'{place}, which entry has the description "{blank.before[:-2]}"?'
    if blank.statement.form == "table":
        return f'{place}, what does the table give as the "{blank.before[:-2]}" of "{entry}"?'
    place += f', in the entry "{entry}"' * bool(entry)
    sentence = f"{blank.before}___{blank.after}"
    return f'{place}, which {BLANKS[blank.kind][1]} completes the sentence: "{sentence}"?'


def task_of(blank: Blank, title: str, url: str, split: str) -> Task:
    """The blank as a task; what its stages need of it stands in `meta`."""
    question, answer = question_of(blank, title), blank.answer
    form, in_table = blank.statement.form, blank.kind == "number in a table"
    answer_type = BLANKS[blank.kind][0] if form == "sentence" else "number" if in_table else "name"
    is_dotted = form == "definition" and re.fullmatch(r"\w+(?:\.\w+)+", answer)
    return Task(
        id=hashlib.sha256(question.encode()).hexdigest()[:12],
        question=question,
        answer=[answer, answer.rpartition(".")[2]] if is_dotted else answer,
        answer_type=answer_type,
        family=form,
        split=split,
        hops=1,
        evidence=[url],
        meta={
            "template": blank.kind,
            "title": title,
            "entry": blank.statement.entry,
            "before": blank.before,
            "after": blank.after,
        },
    )


# -------------------------------------------------------------------------------------------- pages


class Pages:
    """The pages of an index: their titles, and their statements when they are asked for.

    Args:
        db: path of the index.

    Raises:
        FileNotFoundError, ValueError: there is none, or it is no index.
    """

    def __init__(self, db: Path | str):
        self.index = open_index(db)
        self.search, self.browse = open_index_tools(db)
        page = "select address, url, title from pages order by id desc"
        rows = self.index.execute(page).fetchall()
        self.urls = {address: url for address, url, _ in rows}
        self.titles = without_site({address: title for address, _, title in rows})
        self.named = Counter(self.titles.values())
        self.statements = functools.lru_cache(maxsize=1024)(self.statements)

    def statements(self, address: str) -> list[Statement]:
        page = "select text, html from pages left join html using (id) where address = ?"
        rows = self.index.execute(page, (address,))
        trees = [parse(html or page_of(text)) for text, html in rows]
        return [statement for tree in trees for statement in statements(tree)]

    def with_phrases(self, phrases: list[str], most: int) -> list[str]:
        """Addresses of at most so many pages in which each of the phrases stands."""
        words = filter(None, map(index_words, phrases))
        query = " AND ".join(f'text : "{phrase}"' for phrase in words) or '""'
        page = (
            "select address from words join pages on id = words.rowid where words match ? limit ?"
        )
        return [address for (address,) in self.index.execute(page, (query, most))]


def without_site(titles: dict[str, str]) -> dict[str, str]:
    """Titles without the name of the site, which is the first or last part of many of them."""
    parts = {address: SEPARATOR.split(title) for address, title in titles.items()}
    ends = Counter(end for part in parts.values() if part[1:] for end in {part[0], part[-1]})
    sites = {end for end, count in ends.items() if count > max(2, 0.2 * len(titles))}
    short = {}
    for address, title in titles.items():
        first, last = parts[address][0], parts[address][-1]
        if first in sites - {title}:
            title = title.removeprefix(first).strip(" —–|·-")
        if last in sites - {title}:
            title = title.removesuffix(last).strip(" —–|·-")
        short[address] = title
    return short


def page_of(text: str) -> str:
    """A text, or Markdown, as HTML. Without blank lines each line is a paragraph."""
    lines = re.sub(r"(?ms)^```.*?^```", "", text).splitlines()
    is_wrapped = any(not line.strip() for line in lines)
    page = []
    for line in map(str.strip, lines):
        line, mark = LINE_MARK.sub("", line), (LINE_MARK.match(line) or [""])[0].strip()
        inside = re.sub("`([^`]+)`", r"<code>\1</code>", html_module.escape(line, quote=False))
        if mark.startswith("#"):
            page.append(f"<h{len(mark)}>{inside}</h{len(mark)}>")
        else:
            page.append(f"<p>{inside}" if mark or not line or not is_wrapped else inside)
    return f"<html><body>{' '.join(page)}</body></html>"


# ------------------------------------------------------------------------------------------- stages


def leak(task: Task, funnel: Funnel) -> str | None:
    # A number counts also where a unit hangs on it: 128MB.
    places = [task.question, unquote(task.evidence[0]), task.id]
    for item in items(task.answer):
        digits = re.escape(item.strip("%"))
        is_shown = re.search(rf"(?<![\d.]){digits}(?!\.?\d)", " ".join(places[:2]))
        if any(stands_in(item, place) for place in places) or (item[0].isdigit() and is_shown):
            return "the answer stands in the question, the title, the address or the id"
    return None


def guess(task: Task, funnel: Funnel) -> str | None:
    # A name that many pages have, such as that of the documents' own subject.
    most = max(MANY_PAGES, len(funnel.pages.titles) // 10)
    is_name = task.answer_type == "name" and not items(task.answer)[0][0].isdigit()
    if is_name and len(funnel.pages.with_phrases(items(task.answer)[:1], most)) == most:
        return "the answer is a name that many pages have"
    parts = re.findall(r"[a-z]+", items(task.answer)[-1].lower())
    if task.family == "definition" and set(parts) <= words_of(task.meta["before"]):
        return "all words of the entry stand in its description"
    return worlds.guess(task, funnel)


def unique(task: Task, funnel: Funnel) -> str | None:
    pages, meta = funnel.pages, task.meta
    if pages.named[meta["title"]] > 1:
        return f"{pages.named[meta['title']]} pages have this title"
    before, after = meta["before"], meta["after"]
    sides = [
        *meta["entry"].split(", "),
        before.removesuffix(": ") if task.family != "sentence" else before,
        after,
    ]
    addresses = pages.with_phrases(sides, MANY_PAGES)
    if len(addresses) == MANY_PAGES:
        return "the words around the blank stand on many pages"
    found = {
        (address, text[len(before) : len(text) - len(after)].casefold())
        for address in addresses
        for form, _, entry, text in map(astuple, pages.statements(address))
        if (form, entry) == (task.family, meta["entry"])
        if text.startswith(before) and text.endswith(after)
    }
    if len(found) != 1:
        fillings = {filling for _, filling in found}
        return f"{len(fillings)} fillings on {len(found)} pages fit the blank"
    return None


def reach(task: Task, funnel: Funnel) -> str | None:
    pages, meta, url = funnel.pages, task.meta, task.evidence[0]
    found = pages.search(queries=[task.question, meta["title"]])
    if f" {url}\n" not in found + "\n":
        return "search finds the page neither by the question nor by its title"
    phrases = [meta["entry"], " ".join(meta["before"].split()[-6:]).removesuffix(":")]
    phrases += [" ".join(meta["after"].split()[:6])]
    for phrase in filter(None, phrases):
        shown = pages.browse(url, find=phrase)
        numbers = [int(number) for number in re.findall(r"(?m)^p(\d+): ", shown)[:1]]
        pieces = [pages.browse(url, page=n) for m in numbers for n in (m, m - 1) if n > 0]
        if any(stands_in(item, text) for item in items(task.answer) for text in (shown, *pieces)):
            return None
    return "browse shows the answer to none of the question's words"


def snippet(task: Task, funnel: Funnel) -> str | None:
    words = [word for word in re.findall(r"\w+", task.question) if word.lower() not in STOP_WORDS]
    for query in (task.question, " ".join(words), task.meta["title"]):
        hits = search_index(funnel.pages.index, query, 1)
        if any(stands_in(item, hit["snippet"]) for hit in hits for item in items(task.answer)):
            return "the first hit's snippet shows the answer"
    return None


STAGES = {
    "schema": worlds.schema,
    "leak": leak,
    "guess": guess,
    "unique": unique,
    "reach": reach,
    "snippet": snippet,
    "repeat": worlds.repeat,
    "near": worlds.near,
}


# ------------------------------------------------------------------------------------------- choice


def draw_tasks(
    addresses: list[str], number: int, split: str, funnel: Funnel, rng: random.Random
) -> list[Task]:
    """Go round the pages, and keep one task of each at a time, until there are `number`.

    Of a page's blanks those of a kind that was seldom kept come first.
    """
    tasks, kept, left, waiting = [], Counter(), {}, deque(addresses)
    bar = tqdm(total=number, desc=f"{split} tasks", unit="task", leave=False, disable=None)
    while waiting and len(tasks) < number:
        address = waiting.popleft()
        title, url = funnel.pages.titles[address], funnel.pages.urls[address]
        if address not in left:
            found = [] if NO_PROSE.search(title) else funnel.pages.statements(address)
            entries = Counter(each.text for each in found if each.form == "entry")
            found = [each for each in found if entries[named_by(each)] < 2]
            left[address] = [blank for statement in found for blank in blanks_of(statement)]
            rng.shuffle(left[address])
        blanks = left[address]
        blanks.sort(key=lambda blank: -kept[blank.kind])
        for _ in range(min(TRIES, len(blanks))):
            blank = blanks.pop()
            task = task_of(blank, title, url, split)
            if funnel.check(task):
                kept[blank.kind] += 1
                tasks.append(task)
                bar.update()
                # Another blank of this statement would show the answer of this one.
                blanks[:] = [each for each in blanks if each.statement != blank.statement]
                break
        if blanks:
            waiting.append(address)
    bar.close()
    return tasks


def tasks_from_pages(
    db: Path | str, number: int, test_share: float, seed: int
) -> tuple[list[Task], list[Task], Funnel]:
    """Tasks from the pages of an index; those for training and those for the test share no page.

    Args:
        db: path of the index.
        number: how many tasks for training; a share `test_share` of that many for the test.
        test_share: share of the pages that are kept for the test, from 0 to below 1.
        seed: decides every draw.

    Returns:
        The tasks for training, those for the test, and the funnel with its counts and rejects.

    Raises:
        FileNotFoundError, ValueError: no index, no pages, or fewer tasks than were asked for.
    """
    if number < 1 or not 0 <= test_share < 1:
        raise ValueError("--number is 1 or more, --test_share at least 0 and below 1")
    pages, rng = Pages(db), random.Random(f"blanks-{seed}")
    addresses = sorted(pages.titles)
    if not addresses:
        raise ValueError(f"{db} has no pages")
    rng.shuffle(addresses)
    held_out = round(test_share * len(addresses))
    parts = {"train": (addresses[held_out:], number)}
    parts["test"] = (addresses[:held_out], round(test_share * number))
    funnel = Funnel(functions=STAGES, pages=pages)
    made = {split: draw_tasks(*part, split, funnel, rng) for split, part in parts.items()}
    for split, (of, wanted) in parts.items():
        if len(made[split]) < wanted:
            count = f"only {len(made[split])} of {wanted} {split} tasks"
            raise ValueError(
                f"{count} can be made from {len(of)} pages: lower --number, or index more pages"
            )
    return made["train"], made["test"], funnel
