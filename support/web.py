"""Reading the web, all of which is hostile: bounded requests to checked addresses.

In: a URL that the policy wrote. Out: the HTML of the page. Sizes, times, types and redirects are
bounded. An address outside the embedded world must be public, and the connection goes to the very
address that was checked, so a name that changes its mind between check and use (DNS rebinding)
gains nothing. On the real web robots.txt is obeyed, and requests to one host keep their distance.
To try an idea (another kind of page, such as PDF), change `html_of`.
"""

import codecs
import concurrent.futures
import contextlib
import html
import importlib
import io
import ipaddress
import re
import socket
import ssl
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urljoin, urlsplit, urlunsplit

import requests
import requests.adapters
import urllib3

from support.html_text import MAX_ADDRESS, decode_page
from support.threads import in_thread

MAX_PAGE_BYTES = 2_000_000  # after decompression
MAX_REDIRECTS = 5
KEPT_PAGES, KEPT_CHARS = 512, 64 << 20  # pages in memory, those fetched last
CACHE_S = 7 * 86400  # how long pages and search results of the real web are kept on disk
ENCODINGS = ("", "identity", "gzip", "x-gzip", "deflate")
HEADERS = {
    "User-Agent": "nano-researcher",
    "Accept": "text/html,text/*;q=0.9,*/*;q=0.5",
    "Accept-Encoding": "gzip",
}
# What is_global of the `ipaddress` module lets through: protocols, tunnels, documentation, and the
# host of each machine at Azure.
NOT_PUBLIC = [
    ipaddress.ip_network(network)
    for network in (
        "192.0.0.0/24",
        "192.88.99.0/24",
        "2002::/16",
        "3fff::/20",
        "fec0::/10",
        "168.63.129.16/32",
    )
]
NAT64 = ipaddress.ip_network("64:ff9b::/96")  # IPv4 addresses in disguise


class ToolFault(Exception):
    """The environment failed (time-out, HTTP 500): shown to the policy, counted, never punished."""


class Refused(ValueError):
    """This address cannot be read, and the policy can know why: its own choice, not a fault."""


class Unavailable(OSError):
    """The server says that it cannot answer now, and perhaps when it can."""

    def __init__(self, message: str, wait_s: float):
        super().__init__(message)
        self.wait_s = wait_s


def plain_address(url: str) -> str:
    """One form of an address: host in small letters, what is not ASCII quoted, no fragment.

    Raises:
        ValueError: it is no address.
    """
    scheme, mark, rest = url.strip().partition("://")
    if not re.fullmatch(r"[A-Za-z][\w+.-]*", scheme) or not mark:
        raise ValueError(f"{url!r} is no address: it begins with http://, say")
    request = requests.PreparedRequest()  # which knows http only
    request.prepare_url("http://" + ("localhost" if rest.startswith("/") else "") + rest, None)
    scheme, parts = scheme.lower(), urlsplit(request.url)
    site = parts.netloc.removesuffix({"http": ":80", "https": ":443"}.get(scheme, "@"))
    path = "/" + parts.path.lstrip("/")  # requests sends one stroke only
    return urlunsplit((scheme, site, path, parts.query, ""))


def is_public(address: str) -> bool:
    """Whether an IP address belongs to the public internet."""
    ip = ipaddress.ip_address(address.split("%")[0])
    if ip in NAT64:
        return is_public(str(ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF)))
    special = ip.is_multicast or ip.is_reserved or any(ip in network for network in NOT_PUBLIC)
    return ip.is_global and not special


# ------------------------------------------------------------------------------ bounded connections


class TotalTimeout:
    """A socket whose time-out bounds all reads together.

    If it bounded each one alone, a server could drip bytes, headers or chunks for ever.
    """

    ends = None

    def settimeout(self, seconds: float | None) -> None:
        self.ends = None if seconds is None else time.monotonic() + seconds
        super().settimeout(seconds)

    def recv_into(self, *args, **kwargs) -> int:
        if self.ends is not None:
            super().settimeout(max(0.001, self.ends - time.monotonic()))
        return super().recv_into(*args, **kwargs)


class PlainSocket(TotalTimeout, socket.socket):
    pass


class TLSSocket(TotalTimeout, ssl.SSLSocket):
    pass


def addresses_of(host: str, port: int, timeout_s: float) -> list[tuple]:
    """What socket.getaddrinfo gives, but in time; no name server is asked about a number."""
    try:
        family = socket.AF_INET6 if ipaddress.ip_address(host).version == 6 else socket.AF_INET
        return [(family, socket.SOCK_STREAM, 0, "", (host, port))]
    except ValueError:
        lookup = in_thread(socket.getaddrinfo, host, port, 0, socket.SOCK_STREAM)
    try:
        return lookup.result(timeout=timeout_s)
    except concurrent.futures.TimeoutError:
        raise OSError("the name cannot be looked up in time") from None


class Connection:
    """Mixed into urllib3's connections: they go to the very addresses that were checked."""

    public = False  # whether an address must be public

    def _new_conn(self) -> PlainSocket:
        ends = time.monotonic() + self.timeout  # for the name and all of its addresses
        found = addresses_of(self.host, self.port, self.timeout)
        if self.public and not all(is_public(address[0]) for *_, address in found):
            raise Refused("this address is not public")
        problem = OSError("the name has no address")
        for family, kind, protocol, _, address in found:
            connected = PlainSocket(family, kind, protocol)
            connected.settimeout(max(0.001, ends - time.monotonic()))
            try:
                connected.connect(address)
                connected.settimeout(max(0.001, ends - time.monotonic()))
                connected.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                return connected
            except OSError as error:
                connected.close()
                problem = error
        raise problem


class BoundedAdapter(requests.adapters.HTTPAdapter):
    """Reads each answer whole, at most MAX_PAGE_BYTES of it and within the time-out of the request.

    So a cache behind it sees only small, finished answers. One that was cut has the header X-Cut.

    Args:
        public: only addresses of the public internet can be reached.
        gap_s: seconds between two requests to one host, over all threads of this process.
    """

    def __init__(self, public: bool, gap_s: float):
        self.public, self.gap_s = public, gap_s
        self.longer_gaps = {}  # host -> seconds, where its robots.txt asks for more
        self.next, self.lock = {}, threading.Lock()  # host -> when the next request may begin
        super().__init__(pool_maxsize=64)

    def init_poolmanager(self, *args, **kwargs) -> None:
        context = urllib3.util.ssl_.create_urllib3_context()
        context.sslsocket_class = TLSSocket
        super().init_poolmanager(*args, ssl_context=context, **kwargs)
        self.poolmanager.pool_classes_by_scheme = {
            "http": self.pool_class(urllib3.HTTPConnectionPool),
            "https": self.pool_class(urllib3.HTTPSConnectionPool),
        }

    def pool_class(self, pool: type) -> type:
        kind = type("Checked", (Connection, pool.ConnectionCls), {"public": self.public})
        return type("CheckedPool", (pool,), {"ConnectionCls": kind})

    def wait_for_turn(self, host: str, timeout_s: float) -> None:
        """Wait until the host may be asked again; raise ToolFault if that takes too long."""
        with self.lock:
            now = time.monotonic()
            turn = max(now, self.next.get(host, 0.0))
            if turn > now + timeout_s:
                raise ToolFault(f"too many requests to {host} at once")
            self.next[host] = turn + self.longer_gaps.get(host, self.gap_s)
        time.sleep(turn - now)

    def send(self, request, stream=False, timeout=None, **kwargs) -> requests.Response:
        """One request, with `timeout` seconds for all of it.

        Raises:
            Refused: an address that is not public, or an encoding that we did not ask for.
            ToolFault: too many others wait for this host.
            requests.RequestException, urllib3.exceptions.HTTPError, OSError: no answer.
        """
        deadline = time.monotonic() + timeout
        self.wait_for_turn(urlsplit(request.url).netloc, timeout)
        left = urllib3.Timeout(total=max(0.001, deadline - time.monotonic()))
        reply = super().send(request, True, left, **kwargs)
        encoding = reply.headers.pop("Content-Encoding", "").strip().lower()
        if encoding not in ENCODINGS:
            reply.close()
            raise Refused(f"the page is compressed as {encoding[:40]!r}")
        body = bytearray()
        try:
            while chunk := reply.raw.read1(65536, decode_content=True):
                body += chunk
                if len(body) >= MAX_PAGE_BYTES or time.monotonic() >= deadline:
                    raise OSError("too much")
        except (urllib3.exceptions.HTTPError, OSError):
            reply.close()
            if not body:
                raise
            reply.headers["X-Cut"] = "1"
        body = io.BytesIO(body[:MAX_PAGE_BYTES])
        reply.raw = urllib3.HTTPResponse(body, status=reply.status_code, preload_content=False)
        return reply


def optional(package: str):
    """A package that only the live web needs; ValueError if it is missing."""
    try:
        return importlib.import_module(package)
    except ImportError:
        missing = "the live web needs more packages: pip install requests-cache protego"
        raise ValueError(missing) from None


def bounded_session(
    public: bool, gap_s: float = 0.0, cache: Path | str = "", **cache_options
) -> requests.Session:
    """A session without cookies, proxies and passwords; `public` and `gap_s` as in BoundedAdapter.

    Args:
        cache: folder to keep answers in for CACHE_S seconds; "" keeps none.
        cache_options: which answers it keeps, in the words of requests-cache.
    """
    session = requests.Session()
    if cache:
        session = optional("requests_cache").CachedSession(
            str(cache),
            backend="filesystem",
            serializer="json",
            expire_after=CACHE_S,
            allowable_codes=(200, *requests.models.REDIRECT_STATI),
            **cache_options,
        )
        for file in Path(cache).glob("*.json"):
            with contextlib.suppress(FileNotFoundError):  # another process was faster
                if file.stat().st_mtime < time.time() - CACHE_S:
                    file.unlink()
    session.trust_env = False
    adapter = BoundedAdapter(public, gap_s)
    session.mount("http://", adapter)
    session.mount("https://", adapter)
    return session


def send_in_time(session: requests.Session, request, deadline: float) -> requests.Response:
    """One request of a bounded session that ends at the deadline; redirects are the caller's."""
    left = max(0.001, deadline - time.monotonic())
    return session.send(request, timeout=left, allow_redirects=False)


def wait_of(reply: requests.Response, otherwise: float) -> float:
    """Seconds that a server asks us to wait, if it says so in seconds."""
    asked = reply.headers.get("Retry-After", "").strip()
    return float(asked) if re.fullmatch(r"\d{1,6}", asked) else otherwise


# ------------------------------------------------------------------------------------------- browse


@dataclass
class Page:
    """A page that was read; `url` is where it was found after redirects."""

    html: str
    url: str
    text: str | None = None  # html_to_text(html), once it was asked for


class WebReader:
    """Reads pages of the embedded world and, if allowed, of the real web.

    Args:
        hosts: an /etc/hosts for the embedded world: {"w7.test": "127.0.0.1:8123"}; the only
            addresses that are not public and can be reached.
        web: the real web; None if it is not to be reached.
        timeout_s: limit for one page with its redirects and retries, in seconds.
    """

    def __init__(self, hosts: dict[str, str], web: "LiveWeb | None", timeout_s: float):
        self.hosts, self.web, self.timeout_s = hosts, web, timeout_s
        self.embedded = bounded_session(public=False)
        self.pages, self.lock = {}, threading.Lock()
        self.kept_chars = 0

    def read(self, url: str) -> Page:
        """A page, from memory if it was read before; raises as `fetch` does."""
        kept = self.pages.get(url)
        if kept is None:
            kept = self.fetch(url)
            with self.lock:
                if url not in self.pages:
                    self.pages[url] = kept
                    self.kept_chars += len(kept.html)
                while len(self.pages) > KEPT_PAGES or self.kept_chars > KEPT_CHARS:
                    self.kept_chars -= len(self.pages.pop(next(iter(self.pages))).html)
        return kept

    def fetch(self, url: str) -> Page:
        """A page, in up to three tries.

        Raises:
            Refused: what the policy got wrong or can see itself (no such page, not public).
            ToolFault: the server cannot be reached, or says 429 or 5xx each time.
        """
        deadline = time.monotonic() + self.timeout_s
        for attempt in range(3):
            try:
                reply, found_at = follow(self.get, url, deadline)
                if reply.status_code >= 400:
                    raise Refused(f"{reply.status_code} for {url}")
                return Page(html_of(reply, url), found_at)
            except Refused:
                raise
            except (OSError, urllib3.exceptions.HTTPError, ValueError) as error:
                if isinstance(error, ValueError) or "CERTIFICATE_VERIFY_FAILED" in str(error):
                    raise Refused(f"{error}: {url}") from None  # from urlsplit, requests or idna
                wait = getattr(error, "wait_s", 0.1 * 2**attempt)
                if attempt == 2 or time.monotonic() + wait > deadline:
                    reason = error if isinstance(error, Unavailable) else type(error).__name__
                    raise ToolFault(f"{url} cannot be reached ({reason})") from None
                time.sleep(wait)
        raise AssertionError("unreachable")

    def get(self, target: str, url: str, deadline: float) -> requests.Response:
        """One request for a page, to the embedded world or to the real web."""
        if request := self.embedded_request(target):
            return send_in_time(self.embedded, request, deadline)
        request = checked_request(target, url)
        if not self.web:
            raise Refused(f"no such site: {url}")
        return self.web.get(request, url, deadline)

    def embedded_request(self, target: str) -> requests.PreparedRequest | None:
        """What asks the page server for an address of the embedded world; None for any other."""
        try:
            parts = urlsplit(plain_address(target))
        except ValueError:
            return None
        if parts.hostname not in self.hosts or "@" in parts.netloc or len(target) > MAX_ADDRESS:
            return None
        where = ("http", self.hosts[parts.hostname], parts.path or "/", parts.query, "")
        told = {"Host": parts.netloc, "X-Forwarded-Proto": parts.scheme}
        return requests.Request("GET", urlunsplit(where), HEADERS | told).prepare()


def follow(get, url: str, deadline: float) -> tuple[requests.Response, str]:
    """The answer for an address, and where it was found, over redirects that are each checked.

    `get(target, url, deadline)` makes one request. HTTP 429 and 5xx raise Unavailable.
    """
    target = url
    for _ in range(MAX_REDIRECTS + 1):
        reply = get(target, url, deadline)
        location = requests.sessions.SessionRedirectMixin().get_redirect_target(reply)
        if location is None:
            if reply.status_code >= 500 or reply.status_code == 429:
                problem = f"HTTP {reply.status_code} for {target}"[:100]
                raise Unavailable(problem, wait_of(reply, 0.1))
            return reply, target
        target = urljoin(target, location)
    raise Refused(f"too many redirects for {url}")


class LiveWeb:
    """The real web: public addresses only, robots.txt obeyed.

    Args:
        cache: folder where pages are kept; "" keeps none.
        gap_s: seconds between two requests to one host.
    """

    def __init__(self, cache: Path | str = "", gap_s: float = 1.0):
        self.parse_robots = optional("protego").Protego.parse
        is_whole = lambda reply: "X-Cut" not in reply.headers
        self.session = bounded_session(True, gap_s, cache, filter_fn=is_whole)
        self.gap_s = gap_s
        self.robots = {}  # site -> its rules

    def get(self, request, url: str, deadline: float) -> requests.Response:
        """One request for a page; Refused if robots.txt forbids it, OSError if it is not read."""
        parts = urlsplit(request.url)
        site = f"{parts.scheme}://{parts.netloc}"
        if site not in self.robots:
            self.robots[site] = self.read_robots(site, parts.netloc, deadline)
        if not self.robots[site].can_fetch(request.url, HEADERS["User-Agent"]):
            raise Refused(f"robots.txt of this site forbids {url}")
        return send_in_time(self.session, request, deadline)

    def read_robots(self, site: str, host: str, deadline: float):
        """RFC 9309: what is absent forbids nothing, what cannot be reached means not now."""
        get = lambda target, url, deadline: send_in_time(
            self.session, checked_request(target, url), deadline
        )
        reply, _ = follow(get, f"{site}/robots.txt", deadline)
        text = decode_page(reply.content[:500_000]) if reply.status_code == 200 else ""
        rules = self.parse_robots(text)
        gap_s = min(5.0, rules.crawl_delay(HEADERS["User-Agent"]) or 0.0)
        self.session.get_adapter(site).longer_gaps[host] = max(self.gap_s, gap_s)
        return rules


def checked_request(target: str, url: str) -> requests.PreparedRequest:
    """A request as requests understands the address, which is what the caller decides by."""
    request = requests.Request("GET", target, HEADERS).prepare()
    parts = urlsplit(request.url)
    named = parts.hostname and not parts.username and not parts.password
    if parts.scheme not in ("http", "https") or not named or len(request.url) > MAX_ADDRESS:
        raise Refused(f"only http and https addresses without a user name can be opened: {url}")
    return request


def html_of(reply: requests.Response, url: str) -> str:
    """The HTML of an answer; plain text is wrapped in <pre>, and what is no text is Refused."""
    content_type, body = reply.headers.get("Content-Type", "text/html").lower(), reply.content
    kind = content_type.split(";")[0].strip()
    if kind == "application/pdf" or body.startswith(b"%PDF-"):
        raise Refused(f"{url} is a PDF, which cannot be read here")
    is_text = kind.startswith("text/") or re.fullmatch(r"application/(xhtml\+xml|json|xml)", kind)
    wide = "utf-16" in content_type or body[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
    if not is_text or (b"\0" in body[:512].strip(b"\xff\xfe\0") and not wide):
        raise Refused(f"{url} is not a text page ({kind[:60]})")
    text = decode_page(body, content_type)
    is_html = "html" in kind or ("xml" in kind and re.search(r"(?i)<html[\s>]", text[:2000]))
    if not is_html:  # of a feed in XML, say, an HTML parser would drop the texts
        text = f"<pre>{html.escape(text, quote=False)}</pre>"
    return text + "\n<p>[the page was cut here]</p>" * ("X-Cut" in reply.headers)
