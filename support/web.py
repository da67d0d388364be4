"""Reading the web, all of which is hostile: bounded connections to checked addresses, HTML as text, and `browse`.

In: a URL that the policy wrote. Out: a piece of the page's text, its links, or the passages with a word. Sizes, times, types
and redirects are bounded; an address outside the embedded world must be public, and the connection goes to the very address
that was checked, so a name that changes its mind between check and use (DNS rebinding) gains nothing. On the real web
robots.txt is obeyed and requests to one host keep their distance.
To try an idea (another view of a page), change `view_page`.
"""

import codecs
import collections
import concurrent.futures
import functools
import hashlib
import html
import http.client
import ipaddress
import itertools
import os
import re
import socket
import ssl
import threading
import time
import urllib.robotparser
import zlib
from collections.abc import Iterable, Iterator
from email.message import Message
from pathlib import Path
from urllib.parse import urljoin, urlsplit

import html2text
import requests

MAX_PAGE_BYTES = 2_000_000  # after decompression
USER_AGENT = "nano-researcher"


class ToolFault(Exception):
    """The environment failed (time-out, HTTP 500): shown to the policy, counted, never punished."""


class Pace:
    """Keeps `gap_s` seconds between two requests to one host, over all threads of this process."""

    def __init__(self, gap_s: float):
        self.gap_s, self.next, self.lock = gap_s, {}, threading.Lock()

    def wait(self, host: str, deadline: float, gap_s: float = 0.0) -> None:
        """Wait for our turn.

        Raises:
            ToolFault: it would come after the deadline.
        """
        with self.lock:
            now = time.monotonic()
            turn = max(now, self.next.get(host, 0.0))
            if turn > deadline:
                raise ToolFault(f"too many requests to {host} at once")
            self.next[host] = turn + max(self.gap_s, gap_s)
        time.sleep(turn - now)


class DiskCache:
    """Texts by key in a folder, for `days` days: a group of trajectories sees the same web, and no request is paid twice."""

    def __init__(self, folder: Path | str, days: float = 7.0):
        self.folder, self.seconds = Path(folder), days * 86400
        self.folder.mkdir(parents=True, exist_ok=True)

    def path(self, key: str) -> Path:
        return self.folder / hashlib.sha256(key.encode("utf-8", "replace")).hexdigest()[:40]

    def get(self, key: str) -> str | None:
        path = self.path(key)
        try:
            return (
                path.read_text(encoding="utf-8")
                if time.time() - path.stat().st_mtime < self.seconds
                else None
            )
        except (OSError, ValueError):
            return None

    def put(self, key: str, text: str) -> None:
        partial = self.path(key).with_suffix(f".{os.getpid()}.{threading.get_ident()}.partial")
        try:  # a full disk must not end the run
            partial.write_text(text, encoding="utf-8", errors="replace")
            os.replace(partial, self.path(key))
        except OSError:
            partial.unlink(missing_ok=True)


def retry_after(header: str | None, otherwise: float) -> float:
    """Seconds that a server asks us to wait, if it says so in seconds."""
    return float(header) if header and re.fullmatch(r"\d{1,6}", header.strip()) else otherwise


def read_limited(chunks: Iterable[bytes], limit: int, deadline: float) -> Iterator[bytes]:
    """Pass on at most `limit` bytes before the deadline; what comes after is cut off."""
    for chunk in chunks:
        yield chunk[:limit]
        limit -= len(chunk)
        if limit <= 0 or time.monotonic() > deadline:
            return


# ---------------------------------------------------------------------------------------------------------- HTML to text

BLOCK_TAG = re.compile(r"(?ai)(<!--|-->|</?(?:script|style|title)(?![a-z0-9-])[^<>]{0,2000}>)")
BLOCK_END = {"script": "/script", "style": "/style", "title": "/title", "!--": "-->"}
QUOTED_TAG = re.compile(
    r"""<(/?[a-zA-Z][a-zA-Z0-9]*)(?![a-zA-Z0-9])(?:[^<>"']|"[^"<]{0,4000}"|'[^'<]{0,4000}')+>"""
)
BARE_TAG = re.compile(r"<(/?)([a-zA-Z][a-zA-Z0-9]*)>")
# A script that visible_html left, or other raw text, whose end is hard to find; a number of a character that is none
ONLY_HTML_PARSER = re.compile(
    r"(?ai)<(?:script|style|title|textarea|iframe|noembed|noframes|noscript|plaintext|xmp)>|"
    r"&#(?!(?:[0-9]+|x[0-9a-f]+)[^0-9a-f])"
)
UNSEEN_TAGS = {
    "a",
    "b",
    "em",
    "i",
    "img",
    "strong",
    "u",
    "html",
    "meta",
    "span",
    "nav",
    "main",
    "section",
    "article",
}  # by html2text, as we use it
MARKDOWN = re.compile(
    r"[\\+-]|\d\."
)  # html2text puts a backslash into some texts with these, and into no other
LINK = re.compile(
    r"""(?i)<a\s(?:[^<>]{0,500}?\s)?href\s{0,9}=\s{0,9}("[^"<>]{0,4000}"|'[^'<>]{0,4000}'|[^\s"'<>]{1,4000})[^<>]{0,4000}>"""
)


def visible_html(page: str) -> str:
    """The page without scripts, styles, title and comments, each tag bare (`<td>`).

    Takes time in proportion to the page, whatever it contains; html.parser, given the same page, searches for the end of each
    broken tag and quote up to the end of the page.
    """
    kept, inside = [], ""  # inside: the element that is being skipped
    pieces = BLOCK_TAG.split(page)  # text, tag, text, tag, ..., text
    for text, tag in zip(pieces[::2], [*pieces[1::2], "-->"]):
        name = re.match(r"<?(/?[a-z]+|!?-->?)", tag.lower()).group(1)
        if not inside:
            kept.append(text)
            if name in BLOCK_END:
                inside = name
                kept.append("" if name == "!--" else " ")
        elif name == BLOCK_END[inside]:
            inside = ""
    page = QUOTED_TAG.sub(r"<\1>", "".join(kept))
    page = re.sub(
        r"<(/?[a-zA-Z][a-zA-Z0-9]*)(?![a-zA-Z0-9])[^<>]+>",
        r"<\1>",
        re.sub(r"<[!?][^<>]*>", "", page),
    )
    return re.sub(r"<(?!/?[a-zA-Z][a-zA-Z0-9]*>)", "&lt;", page)


def html_to_text(page: str) -> str:
    """HTML as compact plain text: one line a paragraph, `a | b` for a table row, no links, no pictures, no scripts."""
    # Where a page marks its main part, the menus around it are left out, and so are the paragraph signs beside headings.
    if main := re.search(r"""(?i)<main\b|<[a-z]+\b[^<>]*\srole=["']?main\b""", page):
        page = re.split(
            r"(?i)</main>|<footer\b|<div class=\"(?:sphinxsidebar|related|footer)\"",
            page[main.start() :],
            maxsplit=1,
        )[0]
    page = re.sub(r"""(?i)<a\s[^<>]*class=["']?headerlink\b[^<>]*>[^<]*</a>""", "", page)
    page = re.sub(r"\s{50,}", lambda run: "\n" if "\n" in run.group() else " ", visible_html(page))
    converter = html2text.HTML2Text(bodywidth=0)
    converter.ignore_links = converter.ignore_images = converter.ignore_emphasis = True
    room, deadline = 2 * len(page) + 100_000, time.monotonic() + 10.0

    def write(piece: str) -> None:
        nonlocal room
        room -= len(piece)
        if room < 0:  # a thousand nested lists are indented by two thousand spaces
            raise OverflowError
        converter.outtextf(piece)

    converter.out = write
    try:
        at, step = (
            0,
            len(page) + 1 if len(page) < 65536 else 16384,
        )  # some steps of html2text are quadratic in a stretch of text
        # Bare tags and text are all that is left, so html2text gets them one by one without html.parser, which takes several times
        # as long to find them; it is left to read character references, and pages that have what only it knows how to read.
        whole = ONLY_HTML_PARSER.search(page)
        for tag in itertools.chain(() if whole else BARE_TAG.finditer(page), (None,)):
            start, end = tag.span() if tag else (len(page), len(page))
            while at < start:
                to = min(start, at - at % step + step)
                if whole or "&" in page[at:to] or converter.rawdata:
                    to = end if to == start else to  # the tag ends a reference without a semicolon
                    converter.feed(page[at:to])
                else:  # entity_char: there is nothing to escape, do not look for it
                    converter.handle_data(
                        page[at:to], entity_char=not MARKDOWN.search(page, at, to)
                    )
                at = to
            if time.monotonic() > deadline:
                raise OverflowError
            if tag and at == start:
                name = tag[2].lower()
                if converter.rawdata:
                    converter.feed(tag[0])
                elif name in UNSEEN_TAGS:
                    converter.current_tag, converter.lastWasList = name, False
                else:
                    converter.handle_tag(name, {}, start=not tag[1])
                at = end
        text = converter.finish()
    except (
        Exception
    ):  # too much, or a bug of html2text on a hostile page: fall back to dropping the tags
        text = html.unescape(re.sub(r"<[^<>]*>", " ", re.sub(r"[0-9]{20,}", "", page)))
    lines = (line.strip() for line in text.splitlines())
    return "\n".join(line for line in lines if line and not re.fullmatch(r"[-| :]+", line))


def links_of(page: str, url: str) -> list[tuple[str, str]]:
    """The links of a page in order, each once: (address, label)."""
    found = {}
    for link in LINK.finditer(page):
        label = re.split(r"(?i)</a\s{0,9}>|<a\s", page[link.end() : link.end() + 2000], maxsplit=1)[
            0
        ]
        try:
            address = urljoin(url, html.unescape(link.group(1).strip("\"'")).strip())
        except ValueError:  # no address at all: http://[
            continue
        found[address, " ".join(html.unescape(re.sub(r"<[^<>]*>", "", label)).split())] = None
    return list(found)


def split_pages(text: str, page_chars: int) -> list[str]:
    """Cut text into pieces of at most `page_chars` characters, at line ends or sentence ends where there are any."""
    pages, start = [], 0
    while len(text) - start > page_chars:
        cut = (
            max(
                text.rfind("\n", start, start + page_chars),
                text.rfind(". ", start, start + page_chars) + 1,
            )
            - start
        )
        cut = cut if cut > page_chars // 2 else page_chars
        pages.append(text[start : start + cut].strip())
        start += cut
        while start < len(text) and text[start].isspace():
            start += 1
    return pages + [text[start:]]


def view_page(
    page: str,
    url: str,
    page_number: int = 1,
    find: str | None = None,
    links: bool = False,
    page_chars: int = 400,
    text: str | None = None,
) -> str:
    """What the policy sees of a page: one piece of its text, the passages with a word, or its links.

    Args:
        page: HTML.
        url: address of the page, to complete relative links and to head the text.
        page_number: which piece, from 1.
        find: show only lines and sentences that contain this, ignoring case, each with the number of its piece.
        links: show numbered links instead of text; a link has the same number on every piece of the list.
        page_chars: size of a piece in characters.
        text: html_to_text(page), if it is there already.
    """
    if links:
        text = (
            "\n".join(
                f"[{n}] {label} {href}"
                for n, (href, label) in enumerate(links_of(page, url), start=1)
            )
            or "no links"
        )
    elif text is None:
        text = html_to_text(page)
    pieces = split_pages(text, page_chars)
    if find:
        passages = []
        for number, piece in enumerate(pieces, start=1):
            for passage in re.split(r"\n|(?<=\.) ", piece):
                if find.casefold() in passage.casefold():
                    passages.append(f"p{number}: {passage.strip()}")
        return "\n".join(passages)[:page_chars] or "Not found."
    if page_number > len(pieces):
        return f"{url} has only {len(pieces)} pages"
    return f"{url} (page {page_number} of {len(pieces)})\n{pieces[page_number - 1]}"


# -------------------------------------------------------------------------------------------------------------- browse


class Refused(ValueError):
    """This address cannot be read, and the policy can know why: its own choice, not a fault."""


class Unavailable(OSError):
    """The server says that it cannot answer now."""

    def __init__(self, message: str, wait_s: float):
        super().__init__(message)
        self.wait_s = wait_s


class WithDeadline:
    """A socket whose reads all end at one moment: a time-out for each read lets a server drip bytes for ever."""

    deadline = float("inf")

    def recv_into(self, *args, **kwargs):
        self.settimeout(max(0.001, self.deadline - time.monotonic()))
        return super().recv_into(*args, **kwargs)


class PlainSocket(WithDeadline, socket.socket):
    pass


class TLSSocket(WithDeadline, ssl.SSLSocket):
    pass


@functools.cache
def tls_context() -> ssl.SSLContext:
    context = ssl.create_default_context(cafile=requests.certs.where())
    context.sslsocket_class = TLSSocket
    return context


def is_public(address: str) -> bool:
    """Whether an IP address belongs to the public internet. `ipaddress.is_global` alone lets multicast and tunnels through."""
    ip = ipaddress.ip_address(address.split("%")[0])
    if ip.version == 6:
        if ip in ipaddress.ip_network("64:ff9b::/96"):  # NAT64: an IPv4 address in disguise
            return is_public(str(ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF)))
        if ip.ipv4_mapped or ip.sixtofour or ip.teredo or ip.is_site_local or int(ip) < 2**32:
            return False
    elif ip in ipaddress.ip_network("192.0.0.0/24") or ip in ipaddress.ip_network("192.88.99.0/24"):
        return False
    return ip.is_global and not (
        ip.is_multicast
        or ip.is_reserved
        or ip.is_unspecified
        or ip.is_loopback
        or ip.is_link_local
        or ip.is_private
    )


def connect(host: str, port: int, deadline: float, public: bool) -> PlainSocket:
    """A connection to `host`. The name is looked up once and the address that was checked is the one connected to, so a
    name server that answers differently the next time (DNS rebinding) gains nothing.

    Args:
        public: refuse unless every address of the name is public.

    Raises:
        Refused: an address is not public. OSError: no connection.
    """
    lookup = RESOLVER.submit(
        socket.getaddrinfo, host, port, type=socket.SOCK_STREAM
    )  # getaddrinfo knows no time-out
    found = lookup.result(timeout=max(0.001, deadline - time.monotonic()))
    if public and not all(is_public(sockaddr[0]) for *_, sockaddr in found):
        raise Refused("this address is not public")
    problem = OSError("the name has no address")
    for family, kind, protocol, _, sockaddr in found:
        plain = PlainSocket(family, kind, protocol)
        plain.settimeout(max(0.001, deadline - time.monotonic()))
        try:
            plain.connect(sockaddr)
            plain.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            return plain
        except OSError as error:
            plain.close()
            problem = error
    raise problem


RESOLVER = concurrent.futures.ThreadPoolExecutor(8, "resolver")


def decompress(chunks: Iterable[bytes], encoding: str) -> Iterator[bytes]:
    """The body in pieces of at most 64 KiB, however far one compressed byte expands.

    Raises:
        Refused: an encoding that we did not ask for. OSError: broken data.
    """
    if encoding in ("", "identity"):
        yield from chunks
        return
    if encoding not in ("gzip", "x-gzip", "deflate"):
        raise Refused(f"the page is compressed as {encoding[:40]!r}")
    unzip, first = zlib.decompressobj(47), True  # 47: a gzip or a zlib header
    for chunk in chunks:
        try:
            if first and encoding == "deflate" and chunk[:1] != b"\x78":
                unzip = zlib.decompressobj(-15)  # what some servers send as deflate
            first = False
            while chunk:
                yield unzip.decompress(chunk, 65536)
                chunk = unzip.unconsumed_tail
        except zlib.error as error:
            raise OSError(f"broken {encoding}") from error


def decode_page(body: bytes, content_type: str) -> str:
    """Text of a page: by its byte order mark, the header, its own <meta>, or UTF-8 if it is that, else windows-1252."""
    for mark, name in (
        (codecs.BOM_UTF8, "utf-8-sig"),
        (codecs.BOM_UTF16_LE, "utf-16"),
        (codecs.BOM_UTF16_BE, "utf-16"),
    ):
        if body.startswith(mark):
            return body.decode(name, "replace")
    header = re.search(r"charset\s{0,9}=\s{0,9}[\"']?([\w.:-]{1,40})", content_type, re.IGNORECASE)
    meta = re.search(
        rb"<meta[^<>]{0,200}charset\s{0,9}=\s{0,9}[\"']?([\w.:-]{1,40})", body[:4096], re.IGNORECASE
    )
    for name in filter(
        None, (header and header.group(1), meta and meta.group(1).decode("ascii", "ignore"))
    ):
        try:
            codec = codecs.lookup(name).name
            if (
                codec not in ("punycode", "idna", "undefined") and "escape" not in codec
            ):  # slow or odd ones that no page is written in
                return body.decode(
                    "cp1252" if codec in ("iso8859-1", "ascii") else codec, "replace"
                )
        except (LookupError, ValueError):  # unknown, or no encoding of text (base64, zip)
            continue
    try:
        return body.decode("utf-8")
    except UnicodeDecodeError as error:
        return body.decode("utf-8" if error.start > 1000 else "cp1252", "replace")


class Browse:
    """Reads web pages over HTTP.

    Args:
        hosts: an /etc/hosts for the embedded world: {"w7.test": "127.0.0.1:8123"}; the only non-public addresses that can be
            reached. URLs in task files do not depend on ports.
        live: allow public addresses of the real web too.
        page_chars: characters of one piece of a page.
        timeout_s: limit for one page with its redirects and retries, in seconds.
        cache: where pages of the real web are kept.
        gap_s: seconds between two requests to one host of the real web.
    """

    name, signature = "browse", "browse(url, page or find or links)"

    def __init__(
        self,
        hosts: dict[str, str] | None = None,
        live: bool = False,
        page_chars: int = 400,
        timeout_s: float = 10.0,
        cache: DiskCache | None = None,
        gap_s: float = 1.0,
    ):
        self.hosts, self.live, self.page_chars, self.timeout_s, self.cache, self.pace = (
            hosts or {},
            live,
            page_chars,
            timeout_s,
            cache,
            Pace(gap_s),
        )
        self.pages, self.size, self.lock = (
            collections.OrderedDict(),
            0,
            threading.Lock(),
        )  # url -> [HTML, its text or None]
        self.idle: dict[str, list[http.client.HTTPConnection]] = collections.defaultdict(
            list
        )  # open connections to `hosts`
        self.robots: dict[str, urllib.robotparser.RobotFileParser] = {}

    def check(self, arguments: dict) -> str | None:
        kinds = {"url": str, "page": int, "find": str, "links": bool}
        unknown = set(arguments) - set(kinds)
        if unknown or "url" not in arguments:
            return "browse takes 'url' and, if wanted, one of 'page', 'find', 'links'"
        for key, value in arguments.items():
            if not isinstance(value, kinds[key]) or (kinds[key] is int and isinstance(value, bool)):
                return f"browse: {key!r} must be of type {kinds[key].__name__}"
        return None if arguments.get("page", 1) >= 1 else "browse: 'page' counts from 1"

    def __call__(
        self, url: str, page: int = 1, find: str | None = None, links: bool = False
    ) -> str:
        with self.lock:
            kept = self.pages.get(url)
        if kept is None:
            try:
                kept = [self.fetch(url), None]
            except Refused as error:
                return f"error {error}"
            with self.lock:
                if url not in self.pages:
                    self.pages[url], self.size = kept, self.size + len(kept[0])
                while len(self.pages) > 512 or self.size > 64 << 20:
                    self.size -= len(self.pages.popitem(last=False)[1][0])
        if not links and kept[1] is None:
            kept[1] = html_to_text(kept[0])
        return view_page(kept[0], url, page, find, links, self.page_chars, kept[1])

    def fetch(self, url: str) -> str:
        """The HTML of a page; plain text is wrapped in <pre>.

        Raises:
            Refused: what the policy got wrong or can see itself (no such page, not public, no text).
            ToolFault: the server cannot be reached or answers with a 429 or 5xx, after three tries.
        """
        deadline = time.monotonic() + self.timeout_s
        if self.cache and (kept := self.cache.get(f"page {url}")) is not None:
            return kept
        for attempt in range(3):
            try:
                page, from_web = self.follow(url, deadline)
                if self.cache and from_web:
                    self.cache.put(f"page {url}", page)
                return page
            except Refused:
                raise
            except (
                ValueError
            ) as error:  # from urlsplit, requests, idna, or a certificate that is not the site's
                raise Refused(f"{error}: {url}") from None
            except (OSError, http.client.HTTPException) as error:
                self.idle.clear()  # a server closes connections that were idle for long: all of them, so a retry needs a new one
                wait = getattr(error, "wait_s", 0.1 * 2**attempt)
                if attempt == 2 or time.monotonic() + wait > deadline:
                    raise ToolFault(
                        f"{url} cannot be reached ({error if isinstance(error, Unavailable) else type(error).__name__})"
                    ) from None
                time.sleep(wait)
        raise AssertionError("unreachable")

    def follow(self, url: str, deadline: float) -> tuple[str, bool]:
        """One try to read a page, over up to five redirects, each checked like the first address: (HTML, whether from the real web)."""
        target, from_web = url, False
        for _ in range(6):
            parts = urlsplit(target)
            if (
                parts.scheme not in ("http", "https")
                or not parts.hostname
                or parts.username
                or parts.password
            ):
                raise Refused(
                    f"only http and https addresses without a user name can be opened: {url}"
                )
            embedded = parts.hostname in self.hosts
            if not embedded and not self.live:
                raise Refused(f"no such site: {url}")
            if not embedded:
                from_web = True
                self.ask_robots(target, url, deadline)
            status, headers, body = self.get(target, deadline)
            if status in (301, 302, 303, 307, 308) and headers.get("location"):
                target = urljoin(
                    target,
                    headers["location"].encode("latin-1", "replace").decode("utf-8", "replace"),
                )
                continue
            if status >= 500 or status == 429:
                raise Unavailable(f"HTTP {status}", retry_after(headers.get("retry-after"), 0.1))
            if status >= 400:
                raise Refused(f"{status} for {url}")
            content_type = headers.get("content-type", "text/html").lower()
            kind = content_type.split(";")[0].strip()
            if kind == "application/pdf" or body.startswith(b"%PDF-"):
                raise Refused(f"{url} is a PDF, which cannot be read here")
            if (
                not (
                    kind.startswith("text/")
                    or kind in ("application/xhtml+xml", "application/json", "application/xml")
                )
                or b"\0" in body[:512].strip(b"\xff\xfe\0")
                and "utf-16" not in content_type
                and body[:2] not in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
            ):
                raise Refused(f"{url} is not a text page ({kind[:60]})")
            text = decode_page(body, content_type)
            is_html = "html" in kind or "xml" in kind
            return text if is_html else f"<pre>{html.escape(text, quote=False)}</pre>", from_web
        raise Refused(f"too many redirects for {url}")

    def get(self, url: str, deadline: float) -> tuple[int, Message, bytes]:
        """One request: (status, headers, body). Bodies end at MAX_PAGE_BYTES, and at the deadline if something came until then."""
        parts = urlsplit(
            requests.Request("GET", url).prepare().url
        )  # percent-encodes and checks the address
        path = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
        embedded = self.hosts.get(urlsplit(url).hostname)
        try:
            connection = self.idle[embedded].pop() if embedded else None
        except IndexError:
            connection = None
        if embedded and not connection:
            connection = http.client.HTTPConnection(*embedded.split(":"))
            connection.sock = connect(connection.host, connection.port, deadline, public=False)
        elif not embedded:
            port = parts.port or (443 if parts.scheme == "https" else 80)
            connection = http.client.HTTPConnection(parts.hostname, port)
            connection.sock = connect(parts.hostname, port, deadline, public=True)
            if parts.scheme == "https":
                connection.sock.settimeout(max(0.001, deadline - time.monotonic()))
                connection.sock = tls_context().wrap_socket(
                    connection.sock, server_hostname=parts.hostname
                )
        whole = False
        try:
            connection.sock.deadline = deadline
            host = parts.hostname if embedded else parts.netloc
            connection.request(
                "GET",
                path,
                headers={
                    "Host": host,
                    "User-Agent": USER_AGENT,
                    "Accept": "text/html,text/*;q=0.9,*/*;q=0.5",
                    "Accept-Encoding": "gzip",
                },
            )
            reply = connection.getresponse()
            body = bytearray()
            try:
                chunks = iter(lambda: reply.read1(65536), b"")
                for chunk in read_limited(
                    decompress(chunks, reply.headers.get("content-encoding", "").strip().lower()),
                    MAX_PAGE_BYTES,
                    deadline,
                ):
                    body += chunk
                whole = (
                    len(body) < MAX_PAGE_BYTES and time.monotonic() < deadline and not reply.length
                )
            except (OSError, http.client.HTTPException):
                if not body:
                    raise
            if not whole and reply.status == 200:
                body += b"\n<p>[the page was cut here]</p>"
            if embedded and whole and not reply.will_close:
                reply.close()  # only the reply: the connection is free for the next request
                self.idle[embedded].append(connection)
                connection = None
            return reply.status, reply.headers, bytes(body)
        finally:
            if connection:
                connection.close()

    def ask_robots(self, target: str, url: str, deadline: float) -> None:
        """Wait for our turn with this host, and read its robots.txt once (RFC 9309: absent means allowed, unreachable means not now).

        Raises:
            Refused: robots.txt forbids the address. OSError: robots.txt cannot be read now.
        """
        site = "{0.scheme}://{0.netloc}".format(urlsplit(target))
        if site not in self.robots:
            parser, robots_url = urllib.robotparser.RobotFileParser(), f"{site}/robots.txt"
            for _ in range(6):
                self.pace.wait(urlsplit(site).netloc, deadline)
                status, headers, body = self.get(robots_url, deadline)
                if status not in (301, 302, 303, 307, 308) or not headers.get("location"):
                    break
                robots_url = urljoin(robots_url, headers["location"])
                if (
                    urlsplit(robots_url).scheme not in ("http", "https")
                    or urlsplit(robots_url).hostname in self.hosts
                ):
                    break
            if status >= 500 or status == 429:
                raise Unavailable(
                    f"robots.txt: HTTP {status}", retry_after(headers.get("retry-after"), 0.1)
                )
            parser.parse(
                body[:500_000].decode("utf-8", "replace").splitlines() if status == 200 else []
            )
            self.robots[site] = parser
        if not self.robots[site].can_fetch(USER_AGENT, target):
            raise Refused(f"robots.txt of this site forbids {url}")
        self.pace.wait(
            urlsplit(site).netloc,
            deadline,
            min(5.0, float(self.robots[site].crawl_delay(USER_AGENT) or 0)),
        )
