"""Reading the web, all of which is hostile: bounded requests to checked addresses.

In: a URL that the policy wrote. Out: the HTML of the page. Sizes, times, types and redirects are
bounded. An address outside the embedded world must be public, and the connection goes to the very
address that was checked, so a name that changes its mind between check and use (DNS rebinding)
gains nothing. On the real web robots.txt is obeyed, and requests to one host keep their distance.
To try an idea (another kind of page, such as PDF), change `html_of`.
"""

import codecs
import collections
import concurrent.futures
import html
import io
import ipaddress
import re
import socket
import ssl
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import SplitResult, urljoin, urlsplit, urlunsplit

import requests
import requests.adapters
import urllib3

from support.html_text import MAX_ADDRESS, decode_page

MAX_PAGE_BYTES = 2_000_000  # after decompression
MAX_REDIRECTS = 5
REDIRECTS = (301, 302, 303, 307, 308)
ENCODINGS = ("", "identity", "gzip", "x-gzip", "deflate")
HEADERS = {
    "User-Agent": "nano-researcher",
    "Accept": "text/html,text/*;q=0.9,*/*;q=0.5",
    "Accept-Encoding": "gzip",
}
MISSING = "the live web needs more packages: pip install requests-cache protego"
CACHE_S = 7 * 86400  # how long pages and search results of the real web are kept
RESOLVER = concurrent.futures.ThreadPoolExecutor(8, "resolver")


class ToolFault(Exception):
    """The environment failed (time-out, HTTP 500): shown to the policy, counted, never punished."""


class Refused(ValueError):
    """This address cannot be read, and the policy can know why: its own choice, not a fault."""


class Unavailable(OSError):
    """The server says that it cannot answer now, and perhaps when it can."""

    def __init__(self, message: str, wait_s: float):
        super().__init__(message)
        self.wait_s = wait_s


def is_public(address: str) -> bool:
    """Whether an IP address belongs to the public internet.

    `ipaddress.is_global` alone lets multicast and tunnels through.
    """
    ip = ipaddress.ip_address(address.split("%")[0])
    if ip.version == 6:
        if ip in ipaddress.ip_network("64:ff9b::/96"):  # NAT64: an IPv4 address in disguise
            return is_public(str(ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF)))
        if ip.ipv4_mapped or ip.sixtofour or ip.teredo or ip.is_site_local or int(ip) < 2**32:
            return False
        if ip in ipaddress.ip_network("3fff::/20"):  # for documentation only
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
    """What socket.getaddrinfo gives, but in time; no name server is asked about a number.

    Raises:
        OSError: no answer.
    """
    try:
        family = socket.AF_INET6 if ipaddress.ip_address(host).version == 6 else socket.AF_INET
        return [(family, socket.SOCK_STREAM, 0, "", (host, port))]
    except ValueError:
        lookup = RESOLVER.submit(socket.getaddrinfo, host, port, type=socket.SOCK_STREAM)
    try:
        return lookup.result(timeout=timeout_s)
    except concurrent.futures.TimeoutError:
        raise OSError("the name cannot be looked up in time") from None


class Connection:
    """Mixed into urllib3's connections: they go to the very addresses that were checked."""

    public = False  # whether an address must be public

    def _new_conn(self) -> PlainSocket:
        found = addresses_of(self.host, self.port, self.timeout)
        if self.public and not all(is_public(address[0]) for *_, address in found):
            raise Refused("this address is not public")
        problem = OSError("the name has no address")
        for family, kind, protocol, _, address in found:
            connected = PlainSocket(family, kind, protocol)
            connected.settimeout(self.timeout)
            try:
                connected.connect(address)
                connected.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            except OSError as error:
                connected.close()
                problem = error
                continue
            if self.public and not is_public(connected.getpeername()[0]):
                connected.close()
                raise Refused("this address is not public")
            return connected
        raise problem


class BoundedAdapter(requests.adapters.HTTPAdapter):
    """Reads each answer whole, at most MAX_PAGE_BYTES of it and within the time-out of the request.

    So whatever stands between us and the network (a cache) sees only small, finished answers. One
    that was cut has the header X-Cut.
    """

    def __init__(self, public: bool):
        self.public = public
        super().__init__(pool_maxsize=64)

    def init_poolmanager(self, *args, **kwargs) -> None:
        context = urllib3.util.ssl_.create_urllib3_context()
        context.sslsocket_class = TLSSocket
        super().init_poolmanager(*args, ssl_context=context, **kwargs)
        self.poolmanager.pool_classes_by_scheme = {
            pool.scheme: type("Pool", (pool,), {"ConnectionCls": self.connection(pool)})
            for pool in (urllib3.HTTPConnectionPool, urllib3.HTTPSConnectionPool)
        }

    def connection(self, pool: type) -> type:
        return type("Checked", (Connection, pool.ConnectionCls), {"public": self.public})

    def send(self, request, stream=False, timeout=None, **kwargs) -> requests.Response:
        """One request.

        Args:
            timeout: seconds for all of it.

        Raises:
            Refused: an address that is not public, or an encoding that we did not ask for.
            requests.RequestException, urllib3.exceptions.HTTPError, OSError: no answer.
        """
        deadline = time.monotonic() + timeout
        reply = super().send(request, True, urllib3.Timeout(total=timeout), **kwargs)
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


def send_in_time(session: requests.Session, request, deadline: float) -> requests.Response:
    """One request of a bounded session that ends at the deadline; redirects are the caller's."""
    left = max(0.001, deadline - time.monotonic())
    return session.send(request, timeout=left, allow_redirects=False)


def bounded_session(public: bool, cache: Path | str = "", **cache_options) -> requests.Session:
    """A session without cookies, proxies and passwords, which may keep answers on disk.

    Args:
        public: only addresses of the public internet can be reached.
        cache: folder to keep answers in for CACHE_S seconds; "" keeps none.

    Raises:
        ValueError: requests-cache is missing.
    """
    session = requests.Session()
    if cache:
        try:
            import requests_cache
        except ImportError:
            raise ValueError(MISSING) from None
        session = requests_cache.CachedSession(
            str(cache),
            backend="filesystem",
            serializer="json",
            expire_after=CACHE_S,
            allowable_codes=(200, *REDIRECTS),
            **cache_options,
        )
    session.trust_env = False
    adapter = BoundedAdapter(public)
    session.mount("http://", adapter)
    session.mount("https://", adapter)
    return session


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
        self.pages, self.size, self.lock = collections.OrderedDict(), 0, threading.Lock()

    def read(self, url: str) -> Page:
        """A page, from memory if it was read before; raises as `fetch` does."""
        with self.lock:
            kept = self.pages.get(url)
        if kept is None:
            kept = self.fetch(url)
            with self.lock:
                if url not in self.pages:
                    self.pages[url], self.size = kept, self.size + len(kept.html)
                while len(self.pages) > 512 or self.size > 64 << 20:
                    self.size -= len(self.pages.popitem(last=False)[1].html)
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
                return self.follow(url, deadline)
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

    def follow(self, url: str, deadline: float) -> Page:
        """One try to read a page, over redirects that are each checked like the first address."""
        target = url
        for _ in range(MAX_REDIRECTS + 1):
            reply = self.get(target, url, deadline)
            location = reply.headers.get("Location")
            if reply.status_code in REDIRECTS and location:
                location = location.encode("latin-1", "replace").decode("utf-8", "replace")
                target = urljoin(target, location)
                continue
            if reply.status_code >= 500 or reply.status_code == 429:
                raise Unavailable(f"HTTP {reply.status_code}", wait_of(reply, 0.1))
            if reply.status_code >= 400:
                raise Refused(f"{reply.status_code} for {url}")
            return Page(html_of(reply, url), target)
        raise Refused(f"too many redirects for {url}")

    def get(self, target: str, url: str, deadline: float) -> requests.Response:
        """One request for a page, to the embedded world or to the real web."""
        request = checked_request(target, url)
        parts = urlsplit(request.url)
        if parts.hostname in self.hosts:
            where = ("http", self.hosts[parts.hostname], parts.path or "/", parts.query, "")
            request.url, request.headers["Host"] = urlunsplit(where), parts.hostname
            return send_in_time(self.embedded, request, deadline)
        if not self.web:
            raise Refused(f"no such site: {url}")
        return self.web.get(request, url, deadline)


class LiveWeb:
    """The real web: public addresses only, robots.txt obeyed.

    Args:
        cache: folder where pages are kept; "" keeps none.
        gap_s: seconds between two requests to one host.

    Raises:
        ValueError: a package that only the live web needs is missing.
    """

    def __init__(self, cache: Path | str = "", gap_s: float = 1.0):
        try:
            import protego
        except ImportError:
            raise ValueError(MISSING) from None
        self.parse_robots = protego.Protego.parse
        self.session, self.pace = bounded_session(True, cache), Pace(gap_s)
        self.robots = {}  # site -> its rules

    def get(self, request, url: str, deadline: float) -> requests.Response:
        """One request for a page.

        Raises:
            Refused: robots.txt forbids the address. OSError: it cannot be read now.
        """
        parts = urlsplit(request.url)
        site = f"{parts.scheme}://{parts.netloc}"
        if site not in self.robots:
            self.robots[site] = self.parse_robots(self.read_robots(f"{site}/robots.txt", deadline))
        rules = self.robots[site]
        if not rules.can_fetch(request.url, HEADERS["User-Agent"]):
            raise Refused(f"robots.txt of this site forbids {url}")
        return self.send(request, deadline, rules.crawl_delay(HEADERS["User-Agent"]) or 0.0)

    def read_robots(self, robots_url: str, deadline: float) -> str:
        """RFC 9309: what is absent forbids nothing, what cannot be reached means not now."""
        for _ in range(MAX_REDIRECTS + 1):
            reply = self.send(checked_request(robots_url, robots_url), deadline)
            if reply.status_code not in REDIRECTS or not reply.headers.get("Location"):
                break
            robots_url = urljoin(robots_url, reply.headers["Location"])
        if reply.status_code >= 500 or reply.status_code == 429:
            raise Unavailable(f"robots.txt: HTTP {reply.status_code}", wait_of(reply, 0.1))
        return decode_page(reply.content[:500_000]) if reply.status_code == 200 else ""

    def send(self, request, deadline: float, gap_s: float = 0.0) -> requests.Response:
        """One request, in its turn if it is not in the cache."""
        cache = getattr(self.session, "cache", None)
        if not cache or not cache.contains(request=request):
            self.pace.wait(urlsplit(request.url).netloc, deadline, min(5.0, gap_s))
        return send_in_time(self.session, request, deadline)


def checked_request(target: str, url: str) -> requests.PreparedRequest:
    """A request as requests understands the address, which is what the caller decides by.

    Raises:
        Refused: an address of another kind, or with a user name. ValueError: no address at all.
    """
    check_address(urlsplit(target), url)
    request = requests.Request("GET", target, HEADERS).prepare()
    check_address(urlsplit(request.url), url)
    return request


def check_address(parts: SplitResult, url: str) -> None:
    named = parts.hostname and not parts.username and not parts.password
    if parts.scheme not in ("http", "https") or not named or len(parts.geturl()) > MAX_ADDRESS:
        raise Refused(f"only http and https addresses without a user name can be opened: {url}")


def html_of(reply: requests.Response, url: str) -> str:
    """The HTML of an answer; plain text is wrapped in <pre>.

    Raises:
        Refused: it is no text.
    """
    content_type, body = reply.headers.get("Content-Type", "text/html").lower(), reply.content
    kind = content_type.split(";")[0].strip()
    if kind == "application/pdf" or body.startswith(b"%PDF-"):
        raise Refused(f"{url} is a PDF, which cannot be read here")
    is_text = kind.startswith("text/") or re.fullmatch(r"application/(xhtml\+xml|json|xml)", kind)
    wide = "utf-16" in content_type or body[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
    if not is_text or (b"\0" in body[:512].strip(b"\xff\xfe\0") and not wide):
        raise Refused(f"{url} is not a text page ({kind[:60]})")
    text = decode_page(body, content_type)
    if "html" not in kind and "xml" not in kind:
        text = f"<pre>{html.escape(text, quote=False)}</pre>"
    return text + "\n<p>[the page was cut here]</p>" * ("X-Cut" in reply.headers)
