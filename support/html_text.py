"""A web page as text: its bytes decoded, its HTML cleaned, and the piece that the policy sees.

In: bytes or HTML, all of it hostile. Out: plain text, links, pieces, passages. Everything takes
time in proportion to the page: lxml parses it, and html2text gets elements and texts from the tree,
so that nothing reads the markup twice. To try an idea (another view of a page), change `view_page`;
what counts as the main part of a page is `main_parts`.
"""

import bisect
import codecs
import itertools
import re
from collections.abc import Iterator
from urllib.parse import urljoin

import html2text
from lxml import etree

DROPPED = {"title", "script", "style", "template", "iframe", "noembed", "noframes"}
# Elements that stand on lines of their own, of which html2text knows nothing.
LAYOUT = set(
    "section article aside header footer main nav figure figcaption form fieldset address details"
    " summary caption option textarea center".split()
)
LISTS, MAX_LISTS = {"ol", "ul", "blockquote"}, 10  # deeper ones are not indented further
LINE_OF_PRE = "\ue000"  # stands before each line of <pre>, so that its indentation is not stripped
MAX_ADDRESS, MAX_LINKS = 4000, 4_000_000  # characters of one link, and of all links of a page
ATTRIBUTES = ("href", "role", "content", "http-equiv")  # that are looked at
FEED_BYTES, MAX_DEPTH, TOO_DEEP = 65536, 200, 2000  # of a page is no page: the rest is not read
EXPONENT = re.compile(r"[-+−–]?(?:\d+|[a-z])(?:[-+/]\w+)?")
QUOTES = str.maketrans("‘’‚“”„", "'''\"\"\"")  # each for the key that people have
FOOTNOTE = re.compile(r"[\[(]?(?:\d{1,3}|[a-z*†‡§])(?:, ?\w{1,3})*[\])]?")


def decode_page(body: bytes, content_type: str = "") -> str:
    """Bytes as text, by byte order mark, header or the page's <meta>; else UTF-8 or cp1252."""
    for mark, name in (
        (codecs.BOM_UTF8, "utf-8-sig"),
        (codecs.BOM_UTF16_LE, "utf-16"),
        (codecs.BOM_UTF16_BE, "utf-16"),
    ):
        if body.startswith(mark):
            return body.decode(name, "replace")
    charset = r"charset\s{0,9}=\s{0,9}[\"']?([\w.:-]{1,40})"
    header = re.search(f"(?i){charset}", content_type)
    meta = re.search(f"(?i)<meta[^<>]{{0,200}}{charset}", body[:4096].decode("latin-1"))
    for found in filter(None, (header, meta)):
        try:
            codec = codecs.lookup(found.group(1)).name
            # No page is written in these, which are slow or odd.
            if codec not in ("punycode", "idna", "undefined") and "escape" not in codec:
                is_latin = codec in ("iso8859-1", "ascii")  # which on the web means cp1252
                return body.decode("cp1252" if is_latin else codec, "replace")
        except (LookupError, ValueError):  # unknown, or no encoding of text (base64, zip)
            continue
    try:
        return body.decode("utf-8")
    except UnicodeDecodeError as error:
        return body.decode("utf-8" if error.start > 1000 else "cp1252", "replace")


# ------------------------------------------------------------------------------- the page as a tree


def parse(page: str) -> etree._Element:
    """The tree of a page; an empty <html> if there is nothing in it."""
    target, markup = TreeTarget(), page.encode("utf-8", "replace")
    parser = etree.HTMLParser(target=target, encoding="utf-8", huge_tree=False)
    # In parts, because the parser cannot be stopped in one, and deep pages take it long.
    for at in range(0, len(markup), FEED_BYTES):
        parser.feed(markup[at : at + FEED_BYTES])
        if target.flattened > TOO_DEEP:
            return target.close()
    try:
        return parser.close()
    except etree.LxmlError:  # nothing in it
        return target.close()


class TreeTarget:
    """Builds the tree from what the parser finds, without scripts and with few attributes.

    lxml's own tree takes seconds for a tag with many attributes, and ends at 256 nested elements.
    """

    def __init__(self):
        self.builder, self.open = etree.TreeBuilder(), []
        self.dropped = self.flattened = 0  # open elements whose end the tree does not see

    def start(self, tag: str, attributes: dict) -> None:
        if self.dropped or tag in DROPPED or "headerlink" in attributes.get("class", "")[:99]:
            self.data(" ")
            self.dropped += 1
            return
        tag = tag if tag.isascii() and tag.isalnum() else "span"
        kept = {key: clean(attributes[key]) for key in ATTRIBUTES if key in attributes}
        self.builder.start(tag, kept)
        if len(self.open) < MAX_DEPTH:
            self.open.append(tag)
        else:  # closed at once, so that its text comes after it
            self.builder.end(tag)
            self.flattened += 1

    def end(self, tag: str) -> None:
        if self.dropped:
            self.dropped -= 1
        elif self.flattened:
            self.flattened -= 1
        else:
            self.builder.end(self.open.pop())

    def data(self, text: str) -> None:
        if not self.dropped:
            self.builder.data(clean(text))

    def close(self) -> etree._Element:
        while self.open:
            self.builder.end(self.open.pop())
        try:
            return self.builder.close()
        except etree.LxmlError:  # there is nothing in the page
            return etree.Element("html")


def clean(text: str) -> str:
    """Text without the control characters that no tree may hold."""
    return re.sub("[\x00-\x08\x0b\x0c\x0e-\x1f\ufffe\uffff]", " ", text)


def main_parts(tree: etree._Element) -> list[etree._Element]:
    """What the page marks as its main part, without the menus around it; in doubt the whole page.

    It is doubted if it holds nothing, or less than the paragraphs outside of it.
    """
    inside = "ancestor::*[self::main or @role='main']"
    parts = tree.xpath(f"//*[self::main or @role='main'][not({inside})]")
    held = sum(len("".join(part.itertext()).strip()) for part in parts)
    outside = sum(len(p.text or "") for p in tree.xpath(f"//p[not({inside})]")) if parts else 0
    return parts if held > outside else [tree]


def refresh_target(meta: etree._Element) -> str:
    """Where a <meta http-equiv="refresh"> leads to; "" for any other <meta>."""
    found = re.search(r"(?i)url\s*=\s*[\"']?([^\"'\s]+)", (meta.get("content") or "")[:2000])
    refresh = (meta.get("http-equiv") or "").strip().lower() == "refresh"
    return found.group(1) if refresh and found else ""


def start_of(element: etree._Element, pieces: int, length: int) -> str:
    """The text an element begins with, on one line; all of it for each would be too much."""
    return " ".join("".join(itertools.islice(element.itertext(), pieces))[:length].split())


def links_of(page: str, url: str) -> list[tuple[str, str]]:
    """The links of a page in order, each once: (address, label).

    Args:
        url: the page's own address, which relative links begin at unless its <base> says otherwise.
    """
    found, room, tree = {}, MAX_LINKS, parse(page)
    for element in tree.iter("base", "meta", "a"):
        href, label = element.get("href"), start_of(element, 200, 2000)
        if element.tag == "meta":
            href, label = refresh_target(element), "this page leads to"
        if not href or len(href) > MAX_ADDRESS or room < 0:
            continue
        try:
            address = urljoin(url, href.strip())
        except ValueError:  # no address at all: http://[
            continue
        if element.tag == "base":
            url = address
        elif (address, label) not in found:
            found[address, label] = None
            room -= len(address) + len(label)
    return list(found)


# --------------------------------------------------------------------------------- the tree as text


def html_to_text(page: str) -> str:
    """HTML as compact plain text: a line a paragraph, `a | b` a table row, no links, no scripts."""
    tree, writer = parse(page), TreeWriter()
    for part in main_parts(tree):
        writer.write(part)
    lines = []
    for line in writer.converter.finish().splitlines():
        text = line.strip().replace(LINE_OF_PRE, "").rstrip()
        if text and not re.fullmatch(r"[-| :>]+", text):
            nested = re.match(r"  ( +)(?:\* |\d+\. )", line)  # an item of a list inside a list
            lines.append(nested.group(1) + text if nested else text)
    if not lines:
        leads_to = next(filter(None, map(refresh_target, tree.iter("meta"))), "")
        return f"This page leads to {leads_to}" if leads_to else ""
    return "\n".join(lines)


class TreeWriter:
    """Hands the elements and texts of a tree to html2text, in the place of its own parser."""

    def __init__(self):
        self.converter = html2text.HTML2Text(bodywidth=0)
        self.converter.ignore_links = self.converter.ignore_images = True
        self.converter.ignore_emphasis = True
        self.open_pre = self.open_lists = 0
        self.text, self.closings = "", []  # the text written last; what comes after each open <sup>

    def write(self, root: etree._Element) -> None:
        for event, element in etree.iterwalk(root, events=("start", "end")):
            if event == "start":
                self.start(element)
                continue
            self.end(element)
            if element is not root:
                self.write_text(element.tail)

    def write_text(self, text: str | None) -> None:
        if text:
            self.text = text.replace("\n", "\n" + LINE_OF_PRE) if self.open_pre else text
            self.converter.handle_data(self.text, True)  # True: no backslashes, this is no Markdown

    def start(self, element: etree._Element) -> None:
        self.open_pre += element.tag == "pre"
        self.open_lists += element.tag in LISTS
        if tag := self.shown(element.tag):
            self.converter.handle_starttag(tag, [])
        if element.tag == "sup":
            opening, closing = around_superscript(element, self.text)
            self.write_text(opening)
            self.closings.append(closing)
        at_line_start = element.tag == "pre" and element.text and element.text[0] != "\n"
        self.write_text(LINE_OF_PRE + element.text if at_line_start else element.text)

    def end(self, element: etree._Element) -> None:
        if element.tag == "sup":
            self.write_text(self.closings.pop())
        if tag := self.shown(element.tag):
            self.converter.handle_endtag(tag)
        self.open_pre -= element.tag == "pre"
        self.open_lists -= element.tag in LISTS

    def shown(self, tag: str) -> str:
        """The tag as html2text is to see it; "" if it is not to see it."""
        if tag in ("head", "abbr") or (tag in LISTS and self.open_lists > MAX_LISTS):
            return ""
        return "div" if tag in LAYOUT else tag


def around_superscript(sup: etree._Element, before: str) -> tuple[str, str]:
    """What stands around a <sup>: 10^6 for a power, Oslo [3] for a footnote, 2nd as it is."""
    mark = start_of(sup, 8, 40)
    linked = len(sup) > 0 and sup[0].tag == "a"
    if EXPONENT.fullmatch(mark) and not linked and re.search(r"(?<!\w)\w{1,3}$|\)$", before[-9:]):
        return "^", ""
    if FOOTNOTE.fullmatch(mark) or (linked and mark):
        return (" ", "") if mark[0] in "[(" else (" [", "]")
    return "", ""


# ----------------------------------------------------------------------------- what the policy sees


def piece_starts(text: str, page_chars: int) -> list[int]:
    """Where pieces of at most `page_chars` characters begin: with a line or sentence if they can."""
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


def fold(text: str) -> str:
    """Text as `find` compares it: no case, one kind of quotation mark, one kind of space."""
    return " ".join(f"|{text}|".casefold().translate(QUOTES).split())[1:-1]


def passages_with(wanted: str, text: str, page_chars: int) -> Iterator[str]:
    """The lines and sentences of a text that contain `wanted`, each with the number of its piece.

    The whole text is searched, so what is wanted may lie on the end of a line, sentence or piece.
    """
    passages, numbers = [], []
    starts = piece_starts(text, page_chars)
    for number, (start, end) in enumerate(itertools.pairwise([*starts, len(text)]), start=1):
        found = re.split(r"(?<=\n)|(?<=\. )", text[start:end])
        passages += found
        numbers += [number] * len(found)
    folded = [fold(passage).lstrip() for passage in passages]
    ends = list(itertools.accumulate(map(len, folded)))
    folded, wanted = "".join(folded), fold(wanted).strip()
    at, shown = folded.find(wanted), -1
    while at >= 0:
        first = bisect.bisect_right(ends, at)
        last = bisect.bisect_left(ends, at + len(wanted))
        if last > shown:
            whole = "".join(passages[first : last + 1]).strip()
            yield f"p{numbers[first]}: {whole}".replace("\n", " ")
        shown = last
        at = folded.find(wanted, max(at + len(wanted), ends[last] - len(wanted) + 1))


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
        found, room = [], page_chars
        for passage in passages_with(find, text, page_chars):
            found.append(passage)
            room -= len(passage) + 1
            if room < 0:
                break
        return "\n".join(found)[:page_chars] or "Not found."
    pieces = split_pages(text, page_chars)
    if page_number > len(pieces):
        return f"{url} has only {len(pieces)} pages"
    return f"{url} (page {page_number} of {len(pieces)})\n{pieces[page_number - 1]}"
