"""A web page as text: its bytes decoded, its HTML cleaned, and the piece that the policy sees.

In: bytes or HTML, all of it hostile. Out: plain text, links, pieces, passages. Everything takes
time in proportion to the page: lxml parses it, and html2text gets elements and texts from the tree,
so that nothing reads the markup twice. To try an idea (another view of a page), change `view_page`;
what counts as the main part of a page is `main_parts`.
"""

import bisect
import codecs
import contextlib
import itertools
import re
from collections.abc import Iterator
from urllib.parse import urljoin

import html2text
from lxml import etree

from support.words import across, fold_words

DROPPED = ("title", "script", "style", "template", "iframe", "noembed", "noframes")
# Elements that stand on lines of their own, of which html2text knows nothing.
LAYOUT = set(
    "section article aside header footer main nav figure figcaption form fieldset address details"
    " summary caption option textarea center legend dialog search".split()
)
LISTS, MAX_LISTS = {"ol", "ul", "blockquote"}, 10  # deeper ones are not indented further
MAX_ELEMENTS = 100_000  # a page of more gets its text a line each, without any layout
LINE_OF_PRE = "\ue000"  # stands before each line of <pre>, so that its indentation is not stripped
LINE_BREAK = re.compile("[\n\x0b\x0c\x1c-\x1e\x85\u2028\u2029]")  # as str.splitlines
MAX_ADDRESS, MAX_LINKS = 4000, 4_000_000  # characters of one link, and of all links of a page,
LINK_CHARS = 200  # where each link counts for so many more
EXPONENT = re.compile(r"[-+−–]?\s?(?:\d+(?:\.\d+)?[A-Za-z]?|[A-Za-zα-ω])(?:\s?[-+/−–]\s?\w+)?")
FOOTNOTE = re.compile(r"[\[(]?(?:\d{1,3}|[a-z*†‡§])(?:, ?\w{1,3})*[\])]?")
RULE = re.compile(r"[-| :>]+")  # a line of a table, or an empty quotation
NESTED_ITEM = re.compile(r"  ( +)(?:\* |\d+\. )")  # of a list inside a list
SENTENCE_END = re.compile(r"\n|\. ")
CHARSET = r"charset\s{0,9}=\s{0,9}[\"']?([\w.:-]{1,40})"
WIDER = {  # what the web means by the names of smaller encodings
    "iso8859-1": "cp1252",
    "ascii": "cp1252",
    "iso8859-9": "cp1254",
    "gb2312": "gb18030",
    "gbk": "gb18030",
    "shift_jis": "cp932",
    "euc_kr": "cp949",
    "big5": "big5hkscs",
}
MARKS = {  # byte order marks
    codecs.BOM_UTF8: "utf-8-sig",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}


def decode_page(body: bytes, content_type: str = "") -> str:
    """Bytes as text, by byte order mark, header or the page's <meta>; else UTF-8 or cp1252."""
    for mark, name in MARKS.items():
        if body.startswith(mark):
            return body.decode(name, "replace")
    header = re.search(f"(?i){CHARSET}", content_type)
    meta = re.search(f"(?i)<meta[^<>]{{0,200}}{CHARSET}", body[:4096].decode("latin-1"))
    for found in filter(None, (header, meta)):
        try:
            codec = codecs.lookup(found.group(1)).name
            if re.search("punycode|idna|undefined|escape", codec):  # slow or odd, never of a page
                continue
            if found is meta and codec.startswith("utf-16"):  # then it could not be read
                continue
            return body.decode(WIDER.get(codec, codec), "replace")
        except (LookupError, ValueError):  # unknown, or no encoding of text (base64, zip)
            continue
    try:
        return body.decode("utf-8")
    except UnicodeDecodeError as error:
        return body.decode("utf-8" if error.start > 1000 else "cp1252", "replace")


# ------------------------------------------------------------------------------- the page as a tree


def parse(page: str) -> etree._Element:
    """The tree of a page; an empty <html> if there is nothing in it.

    What is nested deeper than 2,048 elements is no page: lxml does not read the rest.
    """
    parser = etree.HTMLParser(
        encoding="utf-8", huge_tree=True, remove_comments=True, remove_pis=True
    )
    page = re.sub("(?i)</(?:body|html)\\s*>", "", page)  # lxml would not read what follows
    tree = etree.fromstring(page.encode("utf-8", "replace"), parser)
    return etree.Element("html") if tree is None else tree


def text_alone(tree: etree._Element) -> etree._Element:
    """The tree without what is not its text: title, scripts, marks of headings. It is changed."""
    marks = "//*[contains(concat(' ', normalize-space(@class), ' '), ' headerlink ')]"
    for element in [*tree.iter(*DROPPED), *tree.xpath(marks)]:
        element.clear(keep_tail=True)
        element.tag, element.text = "dropped", " "
    etree.strip_tags(tree, "dropped")  # joins the space with the text around it
    return tree


def main_parts(tree: etree._Element) -> list[etree._Element]:
    """What the page marks as its main part, without the menus around it; in doubt the whole page.

    It is doubted if it holds nothing, or less than the paragraphs outside of it.
    """
    if not tree.xpath("boolean(//main | //*[@role='main'])"):
        return [tree]
    parts, held, outside = [], 0, 0
    walk = etree.iterwalk(tree, events=("start",))
    for _, element in walk:
        if element.tag == "main" or element.get("role") == "main":
            parts.append(element)
            held += len("".join(element.itertext()).strip())
            walk.skip_subtree()
        elif element.tag == "p":
            outside += len(element.text or "")
    return parts if held > outside else [tree]


def refresh_target(meta: etree._Element) -> str:
    """Where a <meta http-equiv="refresh"> leads to; "" for any other <meta>."""
    content = (meta.get("content") or "")[:2000]
    found = re.search(r"(?i)(?:[;,]\s*(?:url\s*=)?|url\s*=)\s*[\"']?([^\"'\s]+)", content)
    refresh = (meta.get("http-equiv") or "").strip().lower() == "refresh"
    return found.group(1) if refresh and found else ""


def start_of(element: etree._Element, steps: int) -> str:
    """The text an element begins with; all of it for each of many would be too much."""
    walk = itertools.islice(etree.iterwalk(element, events=("start", "end")), steps)
    text = lambda event, e: e.text if event == "start" else e.tail if e is not element else ""
    return "".join(text(*step) or "" for step in walk)


def title_and_description(tree: etree._Element) -> tuple[str, str]:
    """What a page says of itself in its head, each on one line; "" if it does not."""
    title, told = tree.find(".//title"), tree.xpath("//meta[@name='description']/@content")
    texts = ("" if title is None else start_of(title, 9), "".join(told[:1]))
    return tuple(" ".join(text[:2000].split()) for text in texts)


def links_of(page: str, url: str) -> list[tuple[str, str]]:
    """The links of a page at `url` in order, each once: (address, label)."""
    found, room, tree = {}, MAX_LINKS, text_alone(parse(page))
    for base in tree.xpath("(//base[@href])[1]/@href"):  # it holds for the whole page
        with contextlib.suppress(ValueError):
            url = urljoin(url, base[:MAX_ADDRESS].strip())
    for element in tree.iter("meta", "a", "area"):
        href = refresh_target(element) if element.tag == "meta" else element.get("href")
        if not href or len(href) > MAX_ADDRESS:
            continue
        try:
            address = urljoin(url, href.strip())
        except ValueError:  # no address at all: http://[
            continue
        label = "this page leads to" if element.tag == "meta" else start_of(element, 400)
        found[address, " ".join(label[:2000].split())] = None
        room -= len(address) + len(label) + LINK_CHARS
        if room < 0:
            break
    return list(found)


# --------------------------------------------------------------------------------- the tree as text


def html_to_text(page: str) -> str:
    """HTML as compact plain text: a line a paragraph, `a | b` a table row, no links, no scripts."""
    return tree_to_text(parse(page))


def tree_to_text(tree: etree._Element) -> str:
    """The text of a parsed page, which is changed on the way."""
    tree, converter = text_alone(tree), html2text.HTML2Text(bodywidth=0)
    converter.ignore_links = converter.ignore_images = converter.ignore_emphasis = True
    parts = main_parts(tree)
    if tree.xpath("count(//*)") > MAX_ELEMENTS:  # html2text would take seconds
        texts = "\n".join(text for part in parts for text in part.itertext())
        return "\n".join(filter(None, map(str.strip, texts.splitlines())))
    for part in parts:
        write_tree(part, converter)
    lines = []
    for line in converter.finish().splitlines():
        text = line.strip().replace(LINE_OF_PRE, "").rstrip()
        if text and not RULE.fullmatch(text):
            nested = NESTED_ITEM.match(line)
            lines.append(nested.group(1) + text if nested else text)
    if not lines:
        leads_to = next(filter(None, map(refresh_target, tree.iter("meta"))), "")
        return f"This page leads to {leads_to}" if leads_to else ""
    return "\n".join(lines)


def write_tree(root: etree._Element, converter: html2text.HTML2Text) -> None:
    """Hand the elements and texts of a tree to html2text, in the place of its own parser."""
    open_pre = open_lists = 0
    written = ""  # the text written last
    closings = []  # what follows each open <sup>
    for event, element in etree.iterwalk(root, events=("start", "end")):
        tag, opens = element.tag, event == "start"
        text = (element.text if opens else element.tail) or ""
        if opens:
            open_pre += tag == "pre"
            open_lists += tag in LISTS
            if tag == "sup":
                opening, closing = around_superscript(element, written)
                closings.append(closing)
                text = opening + text
            if tag == "pre" and text and text[0] != "\n":
                text = LINE_OF_PRE + text
        elif tag == "sup":
            text = closings.pop() + text
        # html2text is to see neither <head> nor <abbr>, nor lists in many lists.
        if tag not in ("head", "abbr") and (tag not in LISTS or open_lists <= MAX_LISTS):
            seen = "div" if tag in LAYOUT else tag
            start = {"start": element.get("start", "1")[:9]} if tag == "ol" else {}
            if not (seen in ("p", "div") and converter.split_next_td):
                converter.handle_tag(seen, start, opens)
            elif not opens:  # html2text ignores these in the cells of a table: words would touch
                converter.handle_data(" ", True)
        if not opens:
            open_pre -= tag == "pre"
            open_lists -= tag in LISTS
        if text and (opens or element is not root):
            written = LINE_BREAK.sub("\n" + LINE_OF_PRE, text) if open_pre else text
            converter.handle_data(written, True)  # True: no backslashes, this is no Markdown


def around_superscript(sup: etree._Element, before: str) -> tuple[str, str]:
    """What stands around a <sup>: 10^6 for a power, Oslo [3] for a footnote, 2nd as it is."""
    mark = " ".join(start_of(sup, 16)[:40].split())
    linked = len(sup) > 0 and sup[0].tag == "a"
    if EXPONENT.fullmatch(mark) and not linked and re.search(r"(?<!\w)\w{1,3}$|\)$", before[-9:]):
        return "^", ""
    if FOOTNOTE.fullmatch(mark) or (linked and mark):
        return (" ", "") if mark[0] in "[(" else (" [", "]")
    return "", ""


# ----------------------------------------------------------------------------- what the policy sees


def piece_starts(text: str, page_chars: int) -> list[int]:
    """Where pieces of at most `page_chars` characters begin: with a line or sentence if any."""
    starts, start = [0], 0
    while len(text) - start > page_chars:
        end = start + page_chars
        cut = max(text.rfind("\n", start, end), text.rfind(". ", start, end) + 1) - start
        start += cut if cut > page_chars // 2 else page_chars
        while start < len(text) and text[start].isspace():
            start += 1
        starts.append(start)
    return starts


def split_pages(text: str, page_chars: int) -> list[str]:
    """Cut text into pieces of at most `page_chars` characters."""
    starts = piece_starts(text, page_chars)
    pieces = [text[start:end].strip() for start, end in itertools.pairwise(starts)]
    return pieces + [text[starts[-1] :]]


def passages_with(wanted: str, text: str, page_chars: int) -> Iterator[str]:
    """The lines and sentences of a text that contain `wanted`, each with the number of its piece.

    The whole text is searched, so what is wanted may lie on the end of a line, sentence or piece.
    """
    folded, in_folded, in_text = fold_words(text)
    wanted, start, end = fold_words(wanted)[0], 0, 0
    if not wanted or (at := folded.find(wanted)) < 0:
        return
    starts = piece_starts(text, page_chars) + [len(text)]
    while at >= 0:
        first, last = (across(i, in_folded, in_text) for i in (at, at + len(wanted) - 1))
        if last >= end:
            number, of_last = (
                bisect.bisect_right(starts, i, hi=len(starts) - 1) for i in (first, last)
            )
            lines, sentences = text.rfind("\n", start, first), text.rfind(". ", start, first)
            start = max(start, starts[number - 1], lines + 1, sentences + 2 * (sentences >= 0))
            boundary = SENTENCE_END.search(text, last, starts[of_last])
            end = boundary.end() if boundary else starts[of_last]
            shown = fold_words(text[start:end].strip("#*: \n"))[0]
            if shown == wanted.rstrip(": "):  # a heading or term: what it names is next
                limit = min(end + page_chars, len(text))
                boundary = SENTENCE_END.search(text, end, limit)
                end = boundary.end() if boundary else limit
            yield f"p{number}: {text[start:end].strip()}".replace("\n", " ")
        at = folded.find(wanted, max(at + 1, across(end, in_text, in_folded) - len(wanted) + 1))


def view_page(
    page: str,
    url: str,
    page_number: int = 1,
    find: str | None = None,
    links: bool = False,
    page_chars: int = 400,
    text: str | None = None,
) -> str:
    """What the policy sees of a page: a piece of its text, the passages with a word, or its links.

    Args:
        page: HTML.
        url: address of the page, to complete relative links and to head the text.
        page_number: which piece, from 1.
        find: show only lines and sentences that contain this, ignoring case, each with the number
            of its piece.
        links: show numbered links instead of text; a link has the same number on every piece.
        page_chars: size of a piece in characters.
        text: html_to_text(page), if it is there already.
    """
    if links:
        numbered = enumerate(links_of(page, url), start=1)
        text = "\n".join(f"[{n}] {label} {href}" for n, (href, label) in numbered) or "no links"
    elif text is None:
        text = html_to_text(page)
    if find and find.strip():
        found = passages_with(find, text, page_chars)
        if links:  # a link is a line, with its address
            wanted = fold_words(find)[0]
            found = (line for line in text.split("\n") if wanted in fold_words(line)[0])
        return "\n".join(itertools.islice(found, page_chars))[:page_chars] or "Not found."
    pieces = split_pages(text, page_chars)
    if page_number > len(pieces):
        return f"{url} has only {len(pieces)} pages"
    return f"{url} (page {page_number} of {len(pieces)})\n{pieces[page_number - 1]}"
