"""The embedded web: pages and search of one index over HTTP on loopback, for `browse` to read.

In: an index (data/world.py or data/index.py writes one). Out: GET /path gives the page, and
GET /search?q=…&k=… gives JSON. URLs inside a corpus keep their own scheme and host name
(http://w7.test/Belin). `Browse(hosts=…)` maps that name to this server, so tasks do not depend on
ports, and says both in the headers Host and X-Forwarded-Proto. A browser on this machine opens
/https://alpha.test/x. To try an idea (slow pages, errors), change `PageHandler`.

    python data/serve.py --world data/worlds/w7 --port 8000
"""

import contextlib
import html
import json
import socketserver
import sqlite3
import sys
import threading
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from transformers.hf_argparser import HfArg

from data.index import open_index, page_html_of, search_index, sites_of
from support.flags import parse_flags


@dataclass
class Args:
    world: str = HfArg(default="", help="folder written by data/world.py; or give --db")
    db: str = HfArg(default="", help="index written by data/index.py")
    port: int = HfArg(default=8000, help="port on 127.0.0.1 (0: any free one)")


HTML = "text/html; charset=utf-8"
LOOPBACK = ("localhost", "127.0.0.1", "::1")


class PageHandler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"  # keep-alive: one connection for many pages
    disable_nagle_algorithm = True
    timeout = 60  # an idle connection gives its thread back

    def setup(self) -> None:
        """Each client has a connection to the index of its own: a slow search holds up nobody."""
        self.index = open_index(self.server.db)
        super().setup()

    def finish(self) -> None:
        self.index.close()
        super().finish()

    def do_GET(self) -> None:
        parts = urlsplit(self.path)
        try:
            host = urlsplit(f"//{self.headers['Host'] or 'localhost'}").hostname
        except ValueError:
            host = None
        if host not in LOOPBACK and host not in self.server.hosts:
            # A web site whose name leads here (DNS rebinding) must not read what is served here.
            self.reply(421, b"<html><body>this host is not served here</body></html>")
        elif page := self.page(host):
            self.reply(200, page.encode("utf-8", "replace"))
        elif parts.path == "/search":
            query = parse_qs(parts.query)
            k = query.get("k", ["5"])[0]
            count = min(int(k[:9]), 50) if k.isascii() and k.isdigit() else 5
            hits = search_index(self.index, query.get("q", [""])[0], count)
            self.reply(200, json.dumps(hits).encode(), "application/json")
        elif parts.path == "/":  # a corpus without a home page needs a way in
            self.reply(200, self.list_of_pages().encode("utf-8", "replace"))
        else:
            self.reply(404, b"<html><body>no such page</body></html>")

    def page(self, host: str) -> str | None:
        """The HTML of the page that is asked for; None if there is none."""
        scheme = self.headers["X-Forwarded-Proto"] or "http"
        addresses = [f"{scheme}://{self.headers['Host']}{self.path}"]
        if host in LOOPBACK:
            addresses += [self.path[1:], self.server.base_url + self.path]
        for address in addresses:
            for form in dict.fromkeys((address, unquote(address))):
                with contextlib.suppress(ValueError):  # no address at all
                    if page := page_html_of(self.index, form):
                        return page
        return None

    def list_of_pages(self) -> str:
        links = "".join(
            f'<li><a href="/{html.escape(str(url))}">{html.escape(str(title))}</a></li>'
            for url, title in self.index.execute("select url, title from pages limit 100")
        )
        return f"<html><body><h1>{html.escape(self.server.host)}</h1><ul>{links}</ul></body></html>"

    def reply(self, status: int, body: bytes, kind: str = HTML) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_) -> None:
        pass


class PageServer(ThreadingHTTPServer):
    """Serves the index `db` on a port of loopback.

    Raises:
        OSError, OverflowError, ValueError, sqlite3.Error: there is no such index, or the port is
            not free.
    """

    daemon_threads, request_queue_size = True, 256

    def __init__(self, db: Path | str, port: int = 0):
        self.db = db
        with contextlib.closing(open_index(db)) as index:
            sites = sites_of(index)
        super().__init__(("127.0.0.1", port), PageHandler)
        here = "127.0.0.1:%d" % self.server_address[1]
        self.hosts = {urlsplit(site).hostname or "": here for site in sites}
        self.base_url, self.host = sites[0], next(iter(self.hosts))

    def server_bind(self) -> None:
        """Leave out HTTPServer's reverse lookup, which can stall where there is no name server."""
        socketserver.TCPServer.server_bind(self)

    def handle_error(self, request, client_address) -> None:
        pass  # a client that hangs up is no news


def start_server(db: Path | str) -> PageServer:
    """Serve an index from a background thread on a free port of loopback.

    Returns:
        The server: `.hosts` maps each host name of the corpus to where it really listens, and
        `.host` is the first of them. It ends with the process.
    """
    server = PageServer(db)
    threading.Thread(target=server.serve_forever, name=f"serve {server.host}", daemon=True).start()
    return server


def main():
    (args,) = parse_flags((Args,), __doc__)
    if bool(args.world) == bool(args.db):
        sys.exit("data/serve.py: give --world DIR or --db FILE (see --help)")
    try:
        server = PageServer(args.db or Path(args.world) / "pages.db", args.port)
    except (OSError, ValueError, sqlite3.Error, OverflowError) as error:
        sys.exit(f"data/serve.py: {error}")
    address = f"http://127.0.0.1:{server.server_address[1]}/"
    print(f"{address} serves {', '.join(list(server.hosts)[:9])} (Ctrl-C ends it)", flush=True)
    with contextlib.suppress(KeyboardInterrupt):
        server.serve_forever()


if __name__ == "__main__":
    main()
