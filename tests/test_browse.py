"""browse against hostile servers, addresses and pages, all on loopback; search services against
servers that answer in their shapes."""

import concurrent.futures
import gzip
import hashlib
import json
import os
import random
import shutil
import socket
import ssl
import struct
import subprocess
import sys
import threading
import time
import zlib
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from conftest import ROOT

from context import Trajectory
from data.task import Task
from rollout import RolloutArgs
from support.html_text import decode_page, html_to_text, links_of, split_pages, view_page
from support.search_services import SERVICES, WebSearch
from support.toolbox import Toolbox
from support.web import CACHE_S, LiveWeb, Refused, ToolFault, is_public
from tools import Browse, Search

# What html_to_text and links_of gave for the embedded pages when the base models were pretrained.
PAGES_PLAIN, TEXT_PLAIN, LINKS_PLAIN = 68, "2997954e4fecc9c1", "94e1fe33ae50e7e4"
PAGES_DEEP, TEXT_DEEP, LINKS_DEEP = 807, "09fadb468fb1b703", "3afea56e977929f7"


class Server(ThreadingHTTPServer):
    """Answers each path with a function (handler) -> None; remembers what was asked."""

    daemon_threads = True

    def __init__(self):
        self.answers, self.asked, self.headers = {}, [], []
        server = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                server.asked.append(self.path)
                server.headers.append(self.headers)
                length = int(self.headers.get("content-length") or 0)
                self.body = self.rfile.read(length)
                answer = server.answers.get(self.path.split("?")[0], (404, {}, b"nothing"))
                try:
                    if callable(answer):
                        answer(self)
                    else:
                        status, headers, body = answer
                        self.send_response(status)
                        for name, value in (
                            {"Content-Length": str(len(body)), "Content-Type": "text/html"}
                            | headers
                        ).items():
                            if value is not None:
                                self.send_header(name, value)
                        self.end_headers()
                        self.wfile.write(body)
                except OSError:
                    pass

            do_POST = do_GET

            def log_message(self, *_):
                pass

        super().__init__(("127.0.0.1", 0), Handler)
        threading.Thread(
            target=self.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True
        ).start()

    def handle_error(self, *_):
        pass


@pytest.fixture
def server():
    with Server() as server:
        yield server
        server.shutdown()


@pytest.fixture
def browse(server):
    """A browser of the embedded world w.test, which is `server`."""
    return Browse(
        {"w.test": "127.0.0.1:%d" % server.server_address[1]}, timeout_s=3, page_chars=1000
    )


@pytest.fixture
def web(server, monkeypatch):
    """`server` as the real web: every name leads to it, and its address counts as public."""
    lookups = []

    def getaddrinfo(host, port, *_, **__):
        lookups.append(host)
        return [
            (socket.AF_INET, socket.SOCK_STREAM, 6, "", ("127.0.0.1", server.server_address[1]))
        ]

    monkeypatch.setattr("socket.getaddrinfo", getaddrinfo)
    monkeypatch.setattr("support.web.is_public", lambda address: True)
    return lookups


# ---------------------------------------------------------------------------------------- addresses


@pytest.mark.parametrize(
    "url",
    [
        "file:///etc/passwd",
        "ftp://a.test/",
        "gopher://x/",
        "data:text/html,x",
        "javascript:alert(1)",
        "about:blank",
        "//x/",
        "http://",
        "http:///etc",
        "http://user:pw@a.test/",
        "http://[",
        "",
        "x",
        "http://user@127.0.0.1/",
        "http://127.0.0.1/",
        "http://localhost/",
        "http://[::1]/",
        "http://[::ffff:127.0.0.1]/",
        "http://0/",
        "http://0.0.0.0/",
        "http://127.1/",
        "http://2130706433/",
        "http://0x7f000001/",
        "http://0177.0.0.1/",
        "http://①②⑦.⓪.⓪.①/",
        "http://127.0.0.1./",
        "http://169.254.169.254/latest/",
        "http://[fd00:ec2::254]/",
        "http://100.100.100.200/",
        "http://10.0.0.1/",
        "http://172.16.0.1/",
        "http://192.168.1.1/",
        "http://[64:ff9b::10.0.0.1]/",
        "http://[2002:a00:1::]/",
        "http://224.0.0.1/",
        "http://[ff02::1]/",
        "http://255.255.255.255/",
        "http://[fe80::1%25lo]/",
        "http://a.test\\@127.0.0.1/",
        "http://127.0.0.1#@a.test/",
    ],
)
def test_addresses_that_are_refused(server, url):
    port = server.server_address[1]
    for address in (
        url,
        url.replace("127.0.0.1/", f"127.0.0.1:{port}/").replace("localhost/", f"localhost:{port}/"),
    ):
        try:
            assert Browse(live=True, timeout_s=1)(url=address).startswith("error ")
        except ToolFault:  # a name that nobody can resolve
            pass
    assert not server.asked


@pytest.mark.parametrize(
    "address, public",
    [
        ("3fff::1", False),
        ("8.8.8.8", True),
        ("2606:4700::1111", True),
        ("64:ff9b::8.8.8.8", True),
        ("127.0.0.1", False),
        ("10.1.2.3", False),
        ("100.64.0.1", False),
        ("192.0.0.8", False),
        ("192.88.99.1", False),
        ("224.0.0.1", False),
        ("240.0.0.1", False),
        ("0.0.0.0", False),
        ("169.254.169.254", False),
        ("198.18.0.1", False),
        ("::", False),
        ("::1", False),
        ("::ffff:8.8.8.8", False),
        ("::7f00:1", False),
        ("fec0::1", False),
        ("fd00::1", False),
        ("fe80::1%eth0", False),
        ("ff0e::1", False),
        ("2002:808:808::", False),
        ("2001:0:808:808::", False),
        ("64:ff9b::127.0.0.1", False),
        ("64:ff9b:1::808:808", False),
        ("2001:db8::1", False),
    ],
)
def test_which_addresses_are_public(address, public):
    assert is_public(address) is public


@pytest.mark.parametrize(
    "answers", [[["10.0.0.5"]], [["8.8.8.8", "127.0.0.1"]], [["127.0.0.1"], ["8.8.8.8"]]]
)
def test_names_that_lead_inside_are_refused(server, monkeypatch, answers):
    lookups = iter(answers)
    monkeypatch.setattr(
        "socket.getaddrinfo",
        lambda host, port, *_, **__: [
            (socket.AF_INET, socket.SOCK_STREAM, 6, "", (a, server.server_address[1]))
            for a in next(lookups)
        ],
    )
    assert "not public" in Browse(live=True, timeout_s=2)(url="http://rebinding.example/")
    assert not server.asked


def test_the_checked_address_is_the_one_connected_to(server, monkeypatch):
    """DNS rebinding: a connection asks once and uses the checked answer; the next asks anew."""
    checked, answers = [], iter(["203.0.113.7", "127.0.0.1", "127.0.0.1", "127.0.0.1"])
    monkeypatch.setattr(
        "socket.getaddrinfo",
        lambda host, port, *_, **__: [
            (socket.AF_INET, socket.SOCK_STREAM, 6, "", (next(answers), server.server_address[1]))
        ],
    )
    monkeypatch.setattr(
        "support.web.is_public", lambda address: checked.append(address) or address == "203.0.113.7"
    )
    dialled = []
    monkeypatch.setattr(
        "support.web.PlainSocket.connect",
        lambda self, address: (
            dialled.append(address[0]) or (_ for _ in ()).throw(OSError("stopped here"))
        ),
    )
    with pytest.raises((ToolFault, Refused)):
        Browse(live=LiveWeb(gap_s=0), timeout_s=2).reader.fetch("http://rebinding.example/")
    assert (
        dialled == ["203.0.113.7"] and checked == ["203.0.113.7", "127.0.0.1"] and not server.asked
    )


@pytest.mark.parametrize(
    "to, seen",
    [
        ("http://127.0.0.1/", "no such site"),
        ("file:///etc/passwd", "only http"),
        ("//169.254.169.254/", "no such site"),
        ("/loop", "too many redirects"),
        ("/fine", "arrived"),
        ("fine", "arrived"),
        ("http://[", "error"),
        ("http://u:p@w.test/fine", "only http"),
    ],
)
def test_redirects_are_checked_again(server, browse, to, seen):
    server.answers = {
        "/start": (302, {"Location": to}, b""),
        "/loop": (301, {"Location": "/loop"}, b""),
        "/fine": (200, {}, b"arrived"),
    }
    assert seen in browse(url="http://w.test/start")


def test_a_redirect_from_the_web_does_not_lead_inside(server, web, monkeypatch):
    server.answers = {
        "/": (302, {"Location": "http://inside.example/secret"}, b""),
        "/secret": (200, {}, b"the secret"),
    }
    monkeypatch.setattr("support.web.is_public", lambda address: web[-1] == "outside.example")
    assert "not public" in Browse(live=LiveWeb(gap_s=0), timeout_s=3)(url="http://outside.example/")
    assert "/secret" not in server.asked


def test_proxies_and_netrc_are_not_used(server, browse, monkeypatch, tmp_path):
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    (tmp_path / ".netrc").write_text("machine w.test login me password secret")
    monkeypatch.setenv("HOME", str(tmp_path))
    server.answers = {n: (200, {"Set-Cookie": "a=b"}, b"page") for n in ("/", "/2")}
    for url in ("http://w.test/", "http://w.test/2"):
        assert "page" in browse(url=url)
    for headers in server.headers:
        assert "authorization" not in headers and "cookie" not in headers


# --------------------------------------------------------------------------------- size, time, type


def drip(handler):
    handler.send_response(200)
    handler.send_header("Content-Type", "text/html")
    handler.end_headers()
    for _ in range(100):
        handler.wfile.write(b"<p>drop</p>")
        handler.wfile.flush()
        time.sleep(0.1)


def drip_headers(handler):
    handler.wfile.write(b"HTTP/1.1 200 OK\r\n")
    for _ in range(100):
        handler.wfile.write(b"X-a: y\r\n")
        handler.wfile.flush()
        time.sleep(0.1)


def endless_continue(handler):
    for _ in range(2000):
        handler.wfile.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        time.sleep(0.002)


def endless_trailers(handler):
    handler.wfile.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\n")
    for _ in range(2000):
        handler.wfile.write(b"X-a: y\r\n")
        time.sleep(0.002)


def endless_chunks(handler):
    handler.wfile.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
    while True:
        handler.wfile.write(b"3\r\nabc\r\n")
        time.sleep(0.002)


def hang(handler):
    time.sleep(4)


def reset(handler):
    handler.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    handler.connection.close()


def endless(handler):
    handler.send_response(200)
    handler.end_headers()
    while True:
        handler.wfile.write(b"<p>more and more</p>" * 3000)


def many_headers(handler):
    handler.wfile.write(b"HTTP/1.1 200 OK\r\n" + b"X-a: y\r\n" * 5000 + b"\r\nbody")


BOMB = zlib.compressobj(9, zlib.DEFLATED, 31)
BOMB = b"".join([BOMB.compress(bytes(1 << 20)) for _ in range(100)]) + BOMB.flush()


@pytest.mark.parametrize(
    "answer, seen",
    [
        (drip, "drop"),
        (drip_headers, None),
        (hang, None),
        (endless_continue, None),
        (endless_trailers, "abc"),
        (endless_chunks, "the page was cut"),
        (reset, None),
        (endless, "the page was cut"),
        (many_headers, None),
        ((200, {"Content-Encoding": "gzip"}, BOMB), None),
        ((200, {"Content-Encoding": "gzip"}, gzip.compress(b"unzipped")), "unzipped"),
        ((200, {"Content-Encoding": "deflate"}, zlib.compress(b"unzipped")), "unzipped"),
        ((200, {"Content-Encoding": "gzip"}, gzip.compress(gzip.compress(b"twice"))), None),
        ((200, {"Content-Encoding": "gzip, gzip"}, b"x"), "compressed as"),
        ((200, {"Content-Encoding": "br"}, b"x"), "compressed as"),
        ((200, {"Content-Encoding": "gzip"}, b"not gzip"), None),
        ((200, {"Content-Length": "1000"}, b"<p>short</p>"), "short"),
        (lambda h: h.wfile.write(b"\0\xff garbage"), None),
        (lambda h: h.wfile.write(b"HTTP/1.1 999999999999 \r\n\r\n"), None),
    ],
)
def test_hostile_servers_are_bounded(server, answer, seen):
    browse = Browse({"w.test": "127.0.0.1:%d" % server.server_address[1]}, timeout_s=1.0)
    server.answers = {"/": answer}
    started = time.monotonic()
    try:
        text = browse.reader.fetch("http://w.test/").html
    except Refused as error:
        text = str(error)
    except ToolFault as fault:
        text = f"fault {fault}"
        assert "\n" not in text and len(text) < 200
    assert time.monotonic() - started < 3.5  # a wall against "for ever": the limit is 1 s
    assert len(text) < 2_100_000
    assert seen is None or seen in text


def test_name_servers_that_hang(server, browse, monkeypatch):
    """They hold up neither the embedded pages, which need none, nor a call past its deadline."""
    hanging = threading.Event()
    monkeypatch.setattr("socket.getaddrinfo", lambda *_, **__: hanging.wait(20) and [])
    server.answers = {"/": (200, {}, b"embedded")}
    live = Browse(live=LiveWeb(gap_s=0), timeout_s=0.5)
    started = time.monotonic()
    with concurrent.futures.ThreadPoolExecutor(9) as pool:
        calls = [pool.submit(live, url=f"http://{n}.example/") for n in range(9)]
        assert "embedded" in browse(url="http://w.test/")
        for call in calls:
            with pytest.raises(ToolFault, match="cannot be reached"):
                call.result()
    assert time.monotonic() - started < 5
    hanging.set()


@pytest.mark.parametrize(
    "status, fault",
    [(404, False), (403, False), (410, False), (500, True), (503, True), (429, True)],
)
def test_status(server, browse, status, fault):
    server.answers = {"/": (status, {"Retry-After": "0"}, b"x")}
    if fault:
        with pytest.raises(ToolFault, match=f"HTTP {status}"):
            browse(url="http://w.test/")
        assert len(server.asked) == 3
    else:
        assert (
            browse(url="http://w.test/") == f"error {status} for http://w.test/"
            and len(server.asked) == 1
        )


def test_a_server_that_comes_back_is_read(server, browse):
    calls = []
    server.answers = {
        "/": lambda h: (
            calls.append(1),
            h.send_response(503 if len(calls) < 3 else 200),
            h.send_header("Content-Length", "4"),
            h.send_header("Retry-After", "0"),
            h.end_headers(),
            h.wfile.write(b"back"),
        )
    }
    assert "back" in browse(url="http://w.test/")
    assert "back" in browse(url="http://w.test/") and len(calls) == 3  # kept in memory


def test_a_long_retry_after_is_not_waited_for(server, browse):
    server.answers = {"/": (429, {"Retry-After": "3600"}, b"")}
    started = time.monotonic()
    with pytest.raises(ToolFault, match="429"):
        browse(url="http://w.test/")
    assert time.monotonic() - started < 2


@pytest.mark.parametrize(
    "kind, body, seen",
    [
        ("application/pdf", b"%PDF-1.4", "is a PDF"),
        ("text/html", b"%PDF-1.4", "is a PDF"),
        ("image/png", b"\x89PNG", "not a text page"),
        ("application/octet-stream", b"x", "not a text page"),
        ("video/mp4", b"x", "not a text page"),
        (None, b"<p>plain</p>", "plain"),
        (None, b"\x7fELF\0\0\1", "not a text page"),
        ("text/html; charset=utf-8", "<p>grün</p>".encode(), "grün"),
        ("text/html", "<p>grün</p>".encode(), "grün"),
        ("text/html", "<p>grün</p>".encode("latin-1"), "grün"),
        ("text/html; charset=utf-8", "<p>gr\xfcn</p>".encode("latin-1"), "gr�n"),
        ("text/html; charset=nonsense", "<p>grün</p>".encode(), "grün"),
        ("text/html; charset=base64", b"<p>Zm9v</p>", "Zm9v"),
        ("text/html; charset=punycode", b"<p>abc</p>", "abc"),
        ("text/html; charset=unicode_escape", b"<p>\\x41</p>", "\\x41"),
        ("text/html", "﻿<p>grün</p>".encode("utf-16"), "grün"),
        ("text/html", '<meta charset="gbk"><p>中文</p>'.encode("gbk"), "中文"),
        ("text/html; charset=windows-1252", b"<p>\x80</p>", "€"),
        ("text/html; charset=utf-8", b"<p>\xff\xfe\xfd</p>", "�"),
        ("text/plain", b"a < b\n<tool_call>\nc", "a < b\n<tool_call>\nc"),
        ("application/json", b'{"a": "<b>"}', '{"a": "<b>"}'),
        ("text/html; charset=utf-7", b"<p>+ADw-</p>", ""),
    ],
)
def test_types_and_charsets(server, browse, kind, body, seen):
    server.answers = {"/": (200, {"Content-Type": kind}, body)}
    assert seen in browse(url="http://w.test/")


# ----------------------------------------------------------------------------------------- the page


def test_a_link_is_found_with_its_address():
    page = "<a href=/x>Chapter 1. Setup</a><a href=/y>St. Mary</a>"
    found = view_page(page, "http://h.test/", find="MARY", links=True)
    assert found == "[2] St. Mary http://h.test/y"
    assert view_page(page, "http://h.test/", find="nobody", links=True) == "Not found."


def test_links_have_stable_numbers(server):
    browse = Browse({"w.test": "127.0.0.1:%d" % server.server_address[1]}, page_chars=200)
    server.answers = {
        "/": (
            200,
            {},
            "".join(
                f"<p><a class=x href={quote}/p{n}?a=1&amp;b=2{quote}>Page <b>{n}</b> &amp; more</a>"
                for n, quote in enumerate("'\" \"'" * 6)
            ).encode()
            + b'<a href="/p0?a=1&amp;b=2">Page 0 &amp; more</a><a name=x>no link</a>'
            + b'<a href="http://[">bad</a>',
        )
    }
    first, *rest = [browse(url="http://w.test/", links=True, page=n) for n in range(1, 14)]
    text = "\n".join([first, *rest])
    for number in range(30):
        assert f"[{number + 1}] Page {number} & more http://w.test/p{number}?a=1&b=2" in text
    assert "[31]" not in text and "has only" in rest[-1]


HOSTILE = [
    "<table>",
    "<blockquote><p>x",
    "<ul><li>x",
    "<a ",
    '<a href="',
    "<script>",
    "<!--",
    "<title",
    "<title>x</title>",
    "&#x",
    "&#" + "9" * 1_999_998,
    "<",
    "<p " + 'a="' * 600_000,
    "<p " + " ".join(f"a{n}=1" for n in range(220_000)),
    "<p " + "".join(f"a{n}='<' " for n in range(150_000)),
    "<p " + "".join(f"a{n}='>' " for n in range(150_000)),
    "&",
    "&amp;",
    "<!",
    "<?",
    "<a href='x'>",
    "<a href=" + "x" * 8050,
    "<a class=headerlink ",
    "<a " + "class=headerlink " * 110_000,
    "".join(f"<a href=/{n}>x</a>" for n in range(100_000)),
    "<base href='/" + "y" * 3000 + "/'>" + "<a href=x>y</a>" * 120_000,
    "<base href=/a/><a href=b>",
    "</p>",
    "<div>",
    "<b>",
    "<b></b>",
    "<p>x",
    "<br>",
    "<td>x",
    "<div>" * 180_000 + "</b>" * 180_000,
    "<b>" * 180_000 + "</div>" * 180_000,
    "<ul><li>" * 120 + "<li>x" * 380_000,
    "<ul><li>" * 100 + "<pre>" + "x\n" * 900_000,
    "<a href=x><div>" * 120 + "word " * 390_000,
    "<sup>" * 240 + "w " * 900_000,
    "<sup>3</sup>x",
    "<a\n",
    " ",
    "\n",
    "<pre>",
    "<pre>\n",
    "x",
    "x ",
    "a. ",
    "a<br>",
    "<ol><li>",
    "<dl><dd>",
    "<abbr>x<b></b>",
    "<q>x</q>",
    "<main>x</main>",
    "<main>",
    "<svg><title>",
    "<style>a{}",
    "]]>",
    "<![CDATA[",
    "<a " + "href " * 390_000,
    "<meta http-equiv=refresh content='0;url=x'>",
    "<title<a href='x'><a href=/",
    "<a href='x'><![CDATA[<main>",
    "<div title=main role=main>",
    "\u0327\u0301",
    "e\u0327\u0301 ",
    "ßß. ",
    "北",
    "½",
]


def at_the_limit(shape):
    return (shape * (2_000_000 // len(shape.encode())))[:2_000_000]


def read_hostile(page):
    text = html_to_text(page)
    for arguments in (
        {"links": True},
        {"find": "x"},
        {"find": "zzz " * 100_000},
        {"find": text[:1_000_000] + "z"},
        {"page_number": 3},
    ):
        assert len(view_page(page, "http://w.test/", page_chars=400, text=text, **arguments)) < 1000
    view_page(page, "http://w.test/", find="x", page_chars=10_000_000, text=text)


@pytest.mark.parametrize("number", range(len(HOSTILE)))
def test_hostile_pages_take_bounded_time(number, full):
    """At the limit of 2 MB with --full, else at a tenth of it; what is quadratic takes minutes."""
    page = at_the_limit(HOSTILE[number]) if full else at_the_limit(HOSTILE[number])[:200_000]
    started = time.process_time()
    read_hostile(page)
    assert time.process_time() - started < (12 if full else 6)  # of seven views


def test_nothing_is_lost_of_a_page_of_very_many_elements():
    text = html_to_text(
        "<p>menu</p><main>" + "<p>x</p>" * 120_000 + "<p>the <b>last</b> word</main>"
    )
    assert text.startswith("x\nx\n") and text.endswith("\nx\nthe\nlast\nword")
    assert view_page("", "", find="The last  word", text=text).endswith("the last word")


def test_a_hostile_page_takes_bounded_memory():
    """The shape that takes most at 2 MB, in a process of its own."""
    code = """import resource, sys
sys.path.insert(0, sys.argv[1])
from support.html_text import html_to_text
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
html_to_text("<p>x" * 500_000)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) >> 10)"""
    done = subprocess.run([sys.executable, "-c", code, ROOT], capture_output=True, text=True)
    assert int(done.stdout) < 600, done.stderr  # MiB


def test_any_character_may_stand_anywhere():
    for number in [*range(0x300), *range(0x2000, 0x2100), 0xD7FF, 0xE000, 0xFFFE, 0xFFFF, 0x10FFFF]:
        for form in ("{}", "<a href='{}'>x</a>", "<{}b>", "<b{}>", "<b {}>", "<a{}:b>"):
            for character in (chr(number), f"&#{number};"):
                page = "before " + form.format(character) + " after"
                assert "before" in html_to_text(page)
                links_of(page, "http://w.test/")


def test_mutated_pages(world_dir):
    """1,000 pages with random damage: text comes out, of bounded length."""
    from data.world import load_world, page_html

    world, rng = load_world(world_dir), random.Random(1)
    pieces = [
        "<",
        ">",
        "</",
        "<!--",
        "-->",
        "<script>",
        "</script>",
        '"',
        "'",
        "&#0;",
        "&#xD800;",
        "<table>",
        "</td>",
        "<a href=",
        "\0",
        "\ud800",
        "</body>",
        "<pre>",
        "<tool_call>",
        "<|im_end|>",
        "=",
        "<ul>",
        "‮",
    ]
    originals = [page_html(world, world.entity(n)) for n in range(10)]
    for number in range(1000):
        page = originals[number % 10][:1500]
        for _ in range(rng.randint(1, 8)):
            at, end = sorted(rng.randrange(len(page) + 1) for _ in range(2))
            page = (
                page[:at] + rng.choice(pieces) * rng.randint(1, 4) + page[at:],
                page[:at] + page[min(end, at + 30) :],
                page[:at] + page[at:end][:200] * 2 + page[at:],
            )[rng.randrange(3)]
        text = html_to_text(page)
        assert isinstance(text, str) and len(text) <= 3 * len(page) + 1000
        for arguments in ({"links": True}, {"find": "the"}, {"page_number": rng.randint(1, 9)}):
            assert len(view_page(page, "http://w.test/x", text=text, **arguments)) <= 600


def test_connections_that_the_server_has_closed_meanwhile(world_dir, monkeypatch):
    """After a long pause (an update of a large model) they are; that is no fault to be seen."""
    from data.serve import PageHandler, start_server
    from data.world import load_world

    monkeypatch.setattr(PageHandler, "timeout", 0.1)
    server, world = start_server(world_dir / "pages.db"), load_world(world_dir)
    browse = Browse(server.hosts)
    for n in range(3):
        assert f"{world.url(n)} (page 1" in browse(url=world.url(n))
        time.sleep(0.3)


def test_the_text_of_the_embedded_pages_does_not_change(world_dir, deep_dir):
    """The base models were pretrained on this text, so a change of it needs new base models."""
    from data.index import open_index

    for folder, pages, text_sum, links_sum in (
        (world_dir, PAGES_PLAIN, TEXT_PLAIN, LINKS_PLAIN),
        (deep_dir, PAGES_DEEP, TEXT_DEEP, LINKS_DEEP),
    ):
        rows = open_index(folder / "pages.db").execute("select url, html from html order by url")
        rows = rows.fetchall()
        text = "\0".join(html_to_text(page) for _, page in rows)
        links = json.dumps([links_of(page, url) for url, page in rows])
        assert len(rows) == pages
        assert hashlib.sha256(text.encode()).hexdigest()[:16] == text_sum
        assert hashlib.sha256(links.encode()).hexdigest()[:16] == links_sum


@pytest.mark.parametrize(
    "page, text",
    [
        (
            "<main><p>Intro.</p><blockquote><p>Words.</p><footer>Someone</footer></blockquote>"
            "<p>The answer is Marlow.</p></main>",
            "Intro.\n> Words.\n> Someone\nThe answer is Marlow.",
        ),
        ("<p>Menu</p><main></main><main><p>Real: Marlow.</p></main>", "Real: Marlow."),
        ("<p>before</p><!-- <main> --><script>'<main>'</script><p>after", "before\nafter"),
        (
            "<main>Skip</main><p>A whole article stands outside of it.",
            "Skip\nA whole article stands outside of it.",
        ),
        ("10<sup>6</sup>, 2<sup>10</sup>, 10<sup>-6</sup> m<sup>2</sup>", "10^6, 2^10, 10^-6 m^2"),
        ("in 1921<sup>3</sup>, Oslo<sup><a href=#a>[4]</a></sup>", "in 1921 [3], Oslo [4]"),
        ("2<sup>nd</sup>, H<sub>2</sub>O, Acme<sup>TM</sup>", "2nd, H2O, AcmeTM"),
        (
            "10<sup>2.5</sup> 2<sup>31 − 1</sup> 2<sup>N</sup>, x<sup>1,2</sup>",
            "10^2.5 2^31 − 1 2^N, x [1,2]",
        ),
        ("<table><tr><td>k<td><p>12</p><p>34</p><td></table><p>after", "k| 12 34 |\nafter"),
        ("<pre>a\n|   +-- b</pre>", "a\n|   +-- b"),
        ("<fieldset><legend>Size</legend>Big</fieldset>", "Size\nBig"),
        ("Oslo<sup><a href=#a>a</a><sup>nd</sup> b</sup> y", "Oslo [and b] y"),
        ("<pre>one\x1b[1m\x0c  two</pre><p>10<sup>\x0c6</sup> \x0c", "one\x1b[1m\n  two\n10^ 6"),
        ("<p>1986. A great year</p><p>- item</p><p>a \\* b", "1986. A great year\n- item\na \\* b"),
        (
            "<pre>def f(x):\n    if x:\n        return 1\n\n    return 2</pre><p>after",
            "def f(x):\n    if x:\n        return 1\n    return 2\nafter",
        ),
        ("<ul><li>a<ul><li>b<ul><li>c</ul></ul><li>d</ul>", "* a\n  * b\n    * c\n* d"),
        ("<meta http-equiv=refresh content='0; url=/next'>", "This page leads to /next"),
        ("<section>one</section><section>two</section>", "one\ntwo"),
        ("<div>" * 1000 + "deep" + "</div>" * 1000 + "<p>after", "deep\nafter"),
        ("<p>" + "é中😀" * 50_000, "é中😀" * 50_000),
    ],
)
def test_what_text_is_made_of(page, text):
    assert html_to_text(page) == text


def test_where_links_lead(server, browse):
    server.answers = {
        "/guide": (301, {"Location": "/guide/"}, b""),
        "/guide/": (200, {}, b'<a href="step1.html">one</a>'),
        "/based": (200, {}, b'<base href="/lib/v2/"><a href="api.html">API</a>'),
        "/moved": (200, {}, b'<meta http-equiv="refresh" content="0; URL=\'/new\'">'),
    }
    assert "one http://w.test/guide/step1.html" in browse(url="http://w.test/guide", links=True)
    assert "http://w.test/lib/v2/api.html" in browse(url="http://w.test/based", links=True)
    assert "http://w.test/new" in browse(url="http://w.test/moved", links=True)
    assert "/new" in browse(url="http://w.test/moved")


def test_find_searches_the_whole_text():
    text = html_to_text(
        "<p>The lamp was kept by Dr. Mina Vold in Oslo. St. Ives and No. 14 are far<br>away. "
        + "It’s the word of a phrase that ends. " * 40
        + "<p>Strasse with a needle"
    )
    find = lambda words: view_page("", "", find=words, text=text, page_chars=400)
    assert find("Dr. Mina Vold") == "p1: The lamp was kept by Dr. Mina Vold in Oslo."
    assert find("no. 14") == "p1: Ives and No. 14 are far"
    assert find("far away") == "p1: 14 are far away."
    assert find("it's the word").startswith("p1: It’s the word of a phrase that ends.\np1: ")
    assert find("STRASSE") == "p5: Strasse with a needle"
    assert find("zebra") == "Not found." and find("\u0640") == "Not found."
    view = lambda words, text: view_page("", "", find=words, text=text)
    assert view("Strasse", "Eins. Die Goethestraße hier. Zwei.") == "p1: Die Goethestraße hier."
    assert view("straße 7", "Eins ßßß ist. Die STRASSE  7. Zwei.") == "p1: Die STRASSE  7."
    assert view("résumé", "A re\u0301sume\u0301. B") == "p1: A re\u0301sume\u0301."
    assert view("1990-1995", "In 1990–1995. B") == "p1: In 1990–1995."
    assert view("IZMIR", "In İzmir. B") == "p1: In İzmir." and "İ" in view("i\u0307z", "In İzmir.")
    assert view("محمد", "قال مُحَمَّد. B") == "p1: قال مُحَمَّد."
    assert view("10^6", "10⁶ m. B") == "p1: 10⁶ m." and view("106", "10⁶ m. B") == "Not found."
    pieces = split_pages(text, 400)
    over = pieces[0][-12:] + " " + pieces[1][:12]  # it lies on the cut
    assert find(over).startswith("p1: ") and pieces[1][:12] in find(over)
    letters = "".join(chr(97 + n * n % 26) for n in range(1000))  # one word, cut in the middle
    assert view_page("", "", find=letters[390:410], text=letters).startswith("p1: ")


@pytest.mark.parametrize(
    "page, words, seen",
    [
        ("<dl><dt>Mayor<dd>Kor Bel<dt>River<dd>Lis</dl>", "mayor", "p1: Mayor Kor Bel"),
        ("<h3>The mayor:</h3><p>Kor is. Bel was.", "the  Mayor:", "p1: ### The mayor: Kor is."),
        ("<ul><li>mayor<li>river</ul>", "river", "p1: * river"),
        ("<p>mayor</p><p>mayor</p><p>Kor", "mayor", "p1: mayor mayor"),
        (f"<h2>mayor</h2><p>{'k' * 9999}", "mayor", f"p1: ## mayor {'k' * 387}"),
        ("<p>mayors</p><p>Kor", "mayor", "p1: mayors"),
    ],
)
def test_find_shows_what_a_heading_or_a_term_names(page, words, seen):
    assert view_page(page, "", find=words) == seen


@pytest.mark.parametrize("mark", ["utf-8-sig", "utf-16"])
def test_bytes_are_decoded_in_one_way(mark):
    assert decode_page("grün".encode(mark)) == "grün"
    assert decode_page('<meta charset="windows-1252">Málaga'.encode("cp1252")).endswith("Málaga")
    for name, codec, text in (("gb2312", "gb18030", "朱镕基"), ("shift_jis", "cp932", "①㈱髙")):
        assert decode_page(text.encode(codec), f"text/html; charset={name}") == text
    assert decode_page(b'<meta charset="utf-16">plain').endswith("plain")


def test_scripts_and_attributes_do_not_show():
    page = (
        '<title>t</title><p title="a > b">x<script>var a = "<p>no</p>";</script>y'
        "<!-- <p>no --></p><style>p{}</style><b class='a>b'>z</b> 1 < 2"
    )
    assert html_to_text(page) == "x y\nz 1 < 2"


def test_split_pages_skips_nothing_but_spaces():
    for text in (
        "",
        "a",
        "a" * 1000,
        " a" * 700,
        "\n".join("word " * n for n in range(60)),
        "x. " * 500 + "\n" * 500 + "y",
    ):
        pieces = split_pages(text, 100)
        assert max(map(len, pieces)) <= 100 and "".join("".join(pieces).split()) == "".join(
            text.split()
        )


# ------------------------------------------------------------------------------------- the real web


def test_robots_txt_is_obeyed(server, web):
    server.answers = {
        "/robots.txt": (
            200,
            {"Content-Type": "text/plain"},
            b"User-agent: *\nDisallow: /private\n",
        ),
        "/private/a": (200, {}, b"secret"),
        "/open": (200, {}, b"welcome"),
        "/jump": (302, {"Location": "/private/a"}, b""),
    }
    browse = Browse(live=LiveWeb(gap_s=0), timeout_s=3)
    assert "welcome" in browse(url="http://site.example/open")
    assert "robots.txt of this site forbids" in browse(url="http://site.example/private/a")
    assert "robots.txt of this site forbids" in browse(url="http://site.example/jump")
    assert server.asked.count("/robots.txt") == 1 and "/private/a" not in server.asked
    assert (
        server.headers[0]["User-Agent"] == "nano-researcher"
        and server.headers[0]["Host"] == "site.example"
    )


def test_without_robots_txt_all_is_allowed_and_a_broken_one_is_a_fault(server, web):
    server.answers = {"/open": (200, {}, b"welcome")}
    assert "welcome" in Browse(live=LiveWeb(gap_s=0), timeout_s=3)(url="http://site.example/open")
    server.answers["/robots.txt"] = (500, {"Retry-After": "0"}, b"")
    with pytest.raises(ToolFault, match="robots.txt"):
        Browse(live=LiveWeb(gap_s=0), timeout_s=3)(url="http://other.example/open")


def test_robots_and_pauses_are_for_the_real_web_only(server, browse):
    server.answers = {f"/{n}": (200, {}, b"page") for n in range(20)}
    started = time.monotonic()
    assert all("page" in browse(url=f"http://w.test/{n}") for n in range(20))
    assert "/robots.txt" not in server.asked and time.monotonic() - started < 10


def test_requests_to_one_host_keep_their_distance(server, web):
    server.answers = {f"/{n}": (200, {}, b"page") for n in range(3)}
    browse, times = Browse(live=LiveWeb(gap_s=0.2), timeout_s=9), []
    server.answers |= {
        f"/{n}": lambda h: (
            times.append(time.monotonic()),
            h.send_response(200),
            h.end_headers(),
            h.wfile.write(b"x"),
        )
        for n in range(3)
    }
    for n in range(3):
        browse(url=f"http://site.example/{n}")
    assert all(after - before > 0.15 for before, after in zip(times, times[1:]))


def test_pages_of_the_real_web_are_kept_on_disk(server, web, tmp_path):
    server.answers = {"/": (200, {}, b"first"), "/bad": (404, {}, b"")}
    make = lambda: Browse(live=LiveWeb(tmp_path, gap_s=0), timeout_s=3)
    assert "first" in make()(url="http://site.example/")
    server.answers["/"] = (200, {}, b"second")
    assert "first" in make()(url="http://site.example/")  # another process sees the same page
    assert list(tmp_path.glob("*.json"))
    make()(url="http://site.example/bad")
    server.answers["/bad"] = (200, {}, b"good now")
    assert "good now" in make()(url="http://site.example/bad")  # errors are not kept


def test_pages_that_have_expired_leave_the_disk(web, tmp_path):
    for name, age_s in (("old", CACHE_S + 60), ("new", 60)):
        (tmp_path / f"{name}.json").write_text("{}")
        os.utime(tmp_path / f"{name}.json", times=(0, time.time() - age_s))
    LiveWeb(tmp_path)
    assert [path.name for path in tmp_path.glob("*.json")] == ["new.json"]


def test_redirects_are_kept_on_disk_and_a_crawl_delay_is_for_requests_alone(server, web, tmp_path):
    server.answers = {
        "/robots.txt": (200, {"Content-Type": "text/plain"}, b"User-agent: *\nCrawl-delay: 0.3\n"),
        "/old": (301, {"Location": "/new"}, b""),
        "/new": (200, {}, b"moved here"),
    }
    times = []
    for _ in range(2):
        started = time.monotonic()
        page = Browse(live=LiveWeb(tmp_path, gap_s=0), timeout_s=9).reader.read(
            "http://site.example/old"
        )
        times.append(time.monotonic() - started)
        assert page.url == "http://site.example/new" and "moved here" in page.html
    assert server.asked == ["/robots.txt", "/old", "/new"]
    assert times[0] > 0.25 > times[1]


def test_four_processes_share_one_cache(server, web, tmp_path):
    """Rollout workers write the same folder at once."""
    code = """import socket, sys
sys.path.insert(0, sys.argv[1])
from concurrent.futures import ThreadPoolExecutor
from support import web
address = ("127.0.0.1", int(sys.argv[3]))
socket.getaddrinfo = lambda *_, **__: [(socket.AF_INET, socket.SOCK_STREAM, 6, "", address)]
web.is_public = lambda address: True
reader = web.WebReader({}, web.LiveWeb(sys.argv[2], gap_s=0), 20)
with ThreadPoolExecutor(4) as pool:
    pages = list(pool.map(reader.fetch, [f"http://site.example/{n % 10}" for n in range(40)]))
print(sum(page.html == "page" for page in pages))"""
    server.answers = {f"/{n}": (200, {}, b"page") for n in range(10)}
    command = [sys.executable, "-c", code, ROOT, tmp_path, str(server.server_address[1])]
    workers = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(4)]
    assert [worker.communicate(timeout=60)[0].strip() for worker in workers] == ["40"] * 4
    assert len(server.asked) < 4 * 40


# --------------------------------------------------------------------------------- search providers

# Answers made by hand after the services' documentation; none was recorded from a live service.
DOCUMENTED = {
    "searxng": {
        "query": "q",
        "number_of_results": 2,
        "results": [
            {
                "url": "http://a.example/",
                "title": "First",
                "content": "About the first.",
                "engine": "x",
                "score": 1.0,
            },
            {"url": "http://b.example/", "title": "Second", "content": None},
        ],
        "answers": [],
        "suggestions": [],
    },
    "brave": {
        "type": "search",
        "query": {"original": "q"},
        "web": {
            "type": "search",
            "results": [
                {
                    "title": "First",
                    "url": "http://a.example/",
                    "description": "About the <strong>first</strong>.",
                    "age": "2 days",
                },
                {"title": "Second", "url": "http://b.example/"},
            ],
        },
    },
    "serper": {
        "searchParameters": {"q": "q"},
        "organic": [
            {
                "title": "First",
                "link": "http://a.example/",
                "snippet": "About the first.",
                "position": 1,
            },
            {"title": "Second", "link": "http://b.example/", "position": 2},
        ],
        "credits": 1,
    },
    "tavily": {
        "query": "q",
        "answer": None,
        "results": [
            {
                "title": "First",
                "url": "http://a.example/",
                "content": "About the first.",
                "score": 0.9,
                "raw_content": None,
            },
            {"title": "Second", "url": "http://b.example/", "content": ""},
        ],
        "response_time": 1.1,
    },
}
KEY_HEADER = {
    "searxng": None,
    "brave": "x-subscription-token",
    "serper": "x-api-key",
    "tavily": "authorization",
}


@pytest.fixture(params=list(SERVICES))
def provider(request, server, monkeypatch):
    monkeypatch.setattr("support.search_services.RETRY_S", 0.02)
    for each in SERVICES.values():
        if each.key_name:
            monkeypatch.setenv(each.key_name, "k-123-secret")
    url = f"http://127.0.0.1:{server.server_address[1]}"
    return request.param, url if request.param == "searxng" else url + "/search", server


def answer_with(server, *replies):
    """The server gives these replies in turn, then the last one again."""
    state = iter(replies)
    last = [None]

    def answer(handler):
        last[0] = next(state, last[0])
        status, headers, body = last[0]
        handler.send_response(status)
        for name, value in ({"Content-Length": str(len(body))} | headers).items():
            handler.send_header(name, value)
        handler.end_headers()
        handler.wfile.write(body)

    server.answers = {"/search": answer}


def test_provider_answers(provider, tmp_path):
    name, url, server = provider
    answer_with(server, (200, {}, json.dumps(DOCUMENTED[name]).encode()))
    search = Search("", service=WebSearch(name, url, k=2, gap_s=0, cache=tmp_path))
    assert search.check({"queries": ["q"]}) is None and search.name == "search"
    text = search(queries=["who is first?"])
    assert text == "[1] First http://a.example/\nAbout the first.\n[2] Second http://b.example/\n"
    assert (
        search(queries=["who is first?"]) == text and len(server.asked) == 1
    )  # the second time from disk
    if KEY_HEADER[name]:
        assert (
            "k-123-secret" in server.headers[0][KEY_HEADER[name]] and "k-123" not in server.asked[0]
        )
    assert "k-123" not in "".join(
        path.read_bytes().decode("latin-1") for path in tmp_path.rglob("*") if path.is_file()
    )


@pytest.mark.parametrize(
    "bad, tries, seen",
    [
        ((500, {}, b""), 4, "HTTP 500"),
        ((429, {"Retry-After": "0"}, b"slow down"), 4, "HTTP 429"),
        ((429, {"Retry-After": "9999"}, b""), 1, "HTTP 429"),
        ((401, {}, b"k-123-secret is wrong"), 1, "refused, HTTP 401"),
        ((400, {}, b""), 1, "HTTP 400"),
        ((200, {}, b"<html>"), 4, "not a list of results"),
        ((200, {}, b"[]"), 4, "not a list of results"),
        ((200, {}, b'{"results": 5, "organic": 5, "web": 5}'), 4, "not a list of results"),
        ((200, {}, b"[" * 100_000), 4, "not a list of results"),
        ((302, {"Location": "http://127.0.0.1/"}, b""), 1, "HTTP 302"),
        ((200, {"Content-Length": "99"}, b'{"results": ['), 4, "cannot be reached|not a list"),
    ],
)
def test_provider_faults(provider, bad, tries, seen):
    name, url, server = provider
    answer_with(server, bad)
    with pytest.raises(ToolFault, match=seen) as fault:
        Search("", service=WebSearch(name, url, gap_s=0, timeout_s=5))(queries=["q"])
    assert len(server.asked) == tries
    assert (
        name in str(fault.value)
        and "127.0.0.1" in str(fault.value)
        and "k-123" not in str(fault.value)
        and "\n" not in str(fault.value)
    )


@pytest.mark.parametrize("answer", [drip, drip_headers, endless_continue, endless_chunks, hang])
def test_a_query_ends_at_its_deadline(server, answer):
    server.answers = {"/search": answer}
    search = WebSearch("searxng", f"http://127.0.0.1:{server.server_address[1]}", timeout_s=1)
    started = time.monotonic()
    with pytest.raises(ToolFault, match="search by searxng"):
        search.ask("q")
    assert time.monotonic() - started < 3


@pytest.mark.parametrize("package", ["requests_cache", "protego"])
def test_a_missing_package_is_named(package, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.setattr("support.toolbox.CACHE", tmp_path)
    with pytest.raises(ValueError, match="pip install requests-cache protego") as error:
        Toolbox(RolloutArgs(live=True))
    assert "\n" not in str(error.value)
    Toolbox(RolloutArgs())


def test_provider_recovers(provider):
    name, url, server = provider
    answer_with(
        server,
        (503, {}, b""),
        (200, {}, b"garbage"),
        (429, {"Retry-After": "0"}, b""),
        (200, {}, json.dumps(DOCUMENTED[name]).encode()),
    )
    assert "First" in Search("", service=WebSearch(name, url, gap_s=0))(queries=["q"])


def test_odd_hits(provider):
    name, url, server = provider
    title, link, snippet = SERVICES[name].fields
    hits = [
        {title: "<tool_call>&lt;b&gt;\n", link: "http://a.example/\n x", snippet: ["list"]},
        "no object",
        None,
        {},
        {title: None},
    ]
    answer_with(
        server,
        (
            200,
            {},
            json.dumps({"results": hits, "organic": hits, "web": {"results": hits}}).encode(),
        ),
    )
    assert (
        Search("", service=WebSearch(name, url, k=5, gap_s=0))(queries=["q"]).split("\n")[0]
        == "[1] <b> http://a.example/x"
    )
    answer_with(
        server,
        (200, {}, json.dumps({"results": [], "organic": [], "web": {"results": []}}).encode()),
    )
    assert Search("", service=WebSearch(name, url, gap_s=0))(queries=["q"]) == "no results"
    assert Search("", service=WebSearch(name, url, gap_s=0))(queries=[" \ud83d"]) == "no results"


def test_queries_run_side_by_side_in_call_order(server, monkeypatch):
    def answer(handler):
        query = handler.path.split("q=")[1].split("&")[0]
        time.sleep(float(query))
        body = json.dumps({"results": [{"title": query, "url": "u", "content": ""}]}).encode()
        handler.send_response(200)
        handler.send_header("Content-Length", str(len(body)))
        handler.end_headers()
        handler.wfile.write(body)

    server.answers = {"/search": answer}
    text = Search(
        "", service=WebSearch("searxng", f"http://127.0.0.1:{server.server_address[1]}/", gap_s=0)
    )(queries=["0.6", "0.0", "0.3"])
    assert [line for line in text.split("\n") if line.startswith("[1]")] == [
        "[1] 0.6 u",
        "[1] 0.0 u",
        "[1] 0.3 u",
    ]


@pytest.mark.parametrize("name", ["brave", "serper", "tavily"])
def test_a_missing_key_is_named(name, monkeypatch):
    monkeypatch.delenv(SERVICES[name].key_name, raising=False)
    with pytest.raises(ValueError, match=SERVICES[name].key_name):
        Toolbox(RolloutArgs(search=name))


def test_an_unreachable_service_is_named_at_the_start(monkeypatch, tmp_path):
    monkeypatch.setattr("support.toolbox.CACHE", tmp_path)
    monkeypatch.setenv("BRAVE_API_KEY", "k-123-secret")

    def unreachable(*_, **__):
        raise socket.gaierror(-3, "Temporary failure in name resolution")

    monkeypatch.setattr("socket.create_connection", unreachable)
    with pytest.raises(ValueError, match="cannot reach api.search.brave.com") as error:
        Toolbox(RolloutArgs(search="brave"))
    assert "\n" not in str(error.value) and "k-123" not in str(error.value)
    for arguments, words in (
        (dict(search="searxng"), "--search_url"),
        (dict(search="nonsense"), "choose embedded, searxng, brave"),
    ):
        with pytest.raises(ValueError, match=words):
            Toolbox(RolloutArgs(**arguments))


def test_a_task_without_a_world_uses_the_web(server, monkeypatch, tmp_path):

    monkeypatch.setattr("support.toolbox.CACHE", tmp_path)
    answer_with(server, (200, {}, json.dumps(DOCUMENTED["searxng"]).encode()))
    toolbox = Toolbox(
        RolloutArgs(search="searxng", search_url=f"http://127.0.0.1:{server.server_address[1]}")
    )
    own = toolbox.tools_for(Trajectory(Task("t", "q", "a"), (1,)))
    assert "First" in own["search"](queries=["q"]) and own["browse"].reader.web
    assert "not public" in own["browse"](url=f"http://127.0.0.1:{server.server_address[1]}/")


@pytest.mark.skipif(
    not shutil.which("openssl"), reason="needs the openssl command to make a certificate"
)
def test_https_checks_the_name_on_the_pinned_address(web, monkeypatch, tmp_path):
    subprocess.run(
        [
            "openssl",
            "req",
            "-x509",
            "-newkey",
            "rsa:2048",
            "-nodes",
            "-keyout",
            tmp_path / "key",
            "-out",
            tmp_path / "cert",
            "-days",
            "2",
            "-subj",
            "/CN=secure.example",
            "-addext",
            "subjectAltName=DNS:secure.example",
        ],
        check=True,
        capture_output=True,
    )
    with Server() as secure:
        own = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        own.load_cert_chain(tmp_path / "cert", tmp_path / "key")
        secure.socket = own.wrap_socket(
            secure.socket, server_side=True, do_handshake_on_connect=False
        )
        secure.answers = {"/": (200, {}, b"over TLS"), "/drip": drip}
        monkeypatch.setattr(
            "socket.getaddrinfo",
            lambda *_, **__: [
                (socket.AF_INET, socket.SOCK_STREAM, 6, "", ("127.0.0.1", secure.server_address[1]))
            ],
        )
        assert "CERTIFICATE_VERIFY_FAILED" in Browse(live=LiveWeb(gap_s=0), timeout_s=3)(
            url="https://secure.example/"
        )  # signed by nobody known
        monkeypatch.setattr("requests.adapters.DEFAULT_CA_BUNDLE_PATH", str(tmp_path / "cert"))
        browse = Browse(live=LiveWeb(gap_s=0), timeout_s=3)
        assert "over TLS" in browse(url="https://secure.example/")
        assert "CERTIFICATE_VERIFY_FAILED" in browse(url="https://other.example/")  # another name
        started, hurried = time.monotonic(), Browse(live=LiveWeb(gap_s=0), timeout_s=1)
        assert "the page was cut" in hurried.reader.fetch("https://secure.example/drip").html
        assert time.monotonic() - started < 3
        secure.shutdown()


@pytest.mark.parametrize(
    "page, text",
    [
        ("<html><body><p>x</p></body></html>Marlow <p>more</p>", "x\nMarlow\nmore"),
        ("<p class='x headerlink-off'>Marlow</p>", "Marlow"),
        ("<ol start=5><li>e<li>f</ol>", "5. e\n6. f"),
    ],
)
def test_nothing_is_lost_of_odd_pages(page, text):
    assert html_to_text(page).strip() == text


@pytest.mark.parametrize(
    "page, addresses",
    [
        ("<a href=x><base href=/lib/><base href=/no/><a href=y>", ["lib/x", "lib/y"]),
        ("<meta http-equiv=refresh content='0;/next'>", ["next"]),
        ("<map><area href=z></map>", ["a/z"]),
    ],
)
def test_links_lead_where_a_browser_goes(page, addresses):
    found = [address for address, _ in links_of(page, "http://h.test/a/")]
    assert found == [f"http://h.test/{address}" for address in addresses]
