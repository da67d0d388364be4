"""Search services of the web, each as plain data, and the one class that asks them.

In: queries. Out: hits (title, url, snippet), as the embedded search engine gives them. To use
another service, add a `Service` to SERVICES.
"""

import concurrent.futures
import html
import json
import os
import re
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

import requests
import urllib3

from support.web import Pace, ToolFault, bounded_session, wait_of

RETRY_S = 0.5  # before a second request; then twice as long each time
TRIES = 4


@dataclass
class Service:
    """How a search service is asked and how it answers."""

    url: str  # "" if everybody runs their own
    key_name: str  # environment variable that holds the API key; "" if it needs none
    key_header: tuple[str, str]  # the header that carries the key, and its value around the key
    method: str
    arguments: Callable[[str, int], dict]  # (query, k) -> the query string of a GET, JSON of a POST
    hits: Callable[[dict], list]  # the answer -> its list of hits
    fields: tuple[str, str, str]  # names of title, url and snippet in a hit


SERVICES = {
    "searxng": Service(
        url="",
        key_name="",
        key_header=("", ""),
        method="GET",
        arguments=lambda query, k: {"q": query, "format": "json"},
        hits=lambda answer: answer["results"],
        fields=("title", "url", "content"),
    ),
    "brave": Service(
        url="https://api.search.brave.com/res/v1/web/search",
        key_name="BRAVE_API_KEY",
        key_header=("X-Subscription-Token", "{}"),
        method="GET",
        arguments=lambda query, k: {"q": query[:400], "count": k},
        hits=lambda answer: answer.get("web", {"results": []})["results"],
        fields=("title", "url", "description"),
    ),
    "serper": Service(
        url="https://google.serper.dev/search",
        key_name="SERPER_API_KEY",
        key_header=("X-API-KEY", "{}"),
        method="POST",
        arguments=lambda query, k: {"q": query, "num": k},
        hits=lambda answer: answer["organic"],
        fields=("title", "link", "snippet"),
    ),
    "tavily": Service(
        url="https://api.tavily.com/search",
        key_name="TAVILY_API_KEY",
        key_header=("Authorization", "Bearer {}"),
        method="POST",
        arguments=lambda query, k: {"query": query, "max_results": k},
        hits=lambda answer: answer["results"],
        fields=("title", "url", "content"),
    ),
}


class WebSearch:
    """Asks one service.

    Args:
        name: a key of SERVICES.
        url: its address, if it is not the service's own (searxng needs one).
        k: hits a query.
        cache: folder where answers are kept; "" keeps none.
        timeout_s: limit for one query with its retries, in seconds.
        gap_s: seconds between two requests, over all trajectories of this process.

    Raises:
        ValueError: unknown service, no key in the environment, no address, or a package is missing.
    """

    def __init__(
        self,
        name: str,
        url: str = "",
        k: int = 5,
        cache: Path | str = "",
        timeout_s: float = 20.0,
        gap_s: float = 0.2,
    ):
        if name not in SERVICES:
            raise ValueError(f"no search service {name!r}: choose embedded, {', '.join(SERVICES)}")
        self.name, self.service, self.k, self.timeout_s = name, SERVICES[name], k, timeout_s
        self.url, self.pace = url or self.service.url, Pace(gap_s)
        if name == "searxng" and self.url and not self.url.rstrip("/").endswith("/search"):
            self.url = self.url.rstrip("/") + "/search"
        parts = urlsplit(self.url)
        self.host, self.port = (
            parts.hostname,
            parts.port or (443 if parts.scheme == "https" else 80),
        )
        if parts.scheme not in ("http", "https") or not self.host:
            where = "the address of a server: --search_url http://HOST:PORT"
            raise ValueError(f"search by {name} needs {where}")
        key_name, (header, value) = self.service.key_name, self.service.key_header
        key = os.environ.get(key_name, "").strip() if key_name else ""
        if key_name and not key:
            where = f"an API key in the environment variable {key_name}"
            raise ValueError(f"search by {name} needs {where}")
        self.headers = {"Accept": "application/json"} | ({header: value.format(key)} if key else {})
        self.session = bounded_session(
            public=False,
            cache=cache,
            allowable_methods=("GET", "POST"),
            ignored_parameters=list(self.headers),  # so that no key is written to disk
            filter_fn=lambda reply: self.hits_in(reply) is not None,
        )

    def probe(self) -> None:
        """Find out now, at no cost, whether the service can be reached.

        Raises:
            ValueError: it cannot.
        """
        try:
            socket.create_connection((self.host, self.port), timeout=5).close()
        except OSError as error:
            reason = error.strerror or error
            raise ValueError(
                f"search by {self.name}: cannot reach {self.host} ({reason})"
            ) from None

    def find(self, queries: list[str]) -> list[list[dict]]:
        """The hits of each query, asked side by side: dicts with title, url, snippet.

        Raises:
            ToolFault: no usable answer; the text names service and reason, never the key.
        """
        with concurrent.futures.ThreadPoolExecutor(len(queries)) as pool:
            return list(pool.map(self.ask, queries))

    def ask(self, query: str) -> list[dict]:
        """The hits of one query, after up to four requests; raises as `find` does."""
        deadline, problem = time.monotonic() + self.timeout_s, "no answer"
        place = "params" if self.service.method == "GET" else "json"
        arguments = {place: self.service.arguments(query, self.k)}
        for attempt in range(TRIES):
            wait = RETRY_S * 2**attempt
            try:
                self.pace.wait(self.host, deadline)
                request = requests.Request(self.service.method, self.url, self.headers, **arguments)
                left = max(0.001, deadline - time.monotonic())
                reply = self.session.send(request.prepare(), timeout=left, allow_redirects=False)
            except (requests.RequestException, urllib3.exceptions.HTTPError, OSError) as error:
                # Only the kind of the error: its text may hold the request.
                problem = f"cannot be reached, {type(error).__name__}"
            else:
                if (hits := self.hits_in(reply)) is not None:
                    return hits
                problem, wait = f"HTTP {reply.status_code}", wait_of(reply, wait)
                if reply.status_code in (401, 402, 403):
                    hint = f"is {self.service.key_name} right?"
                    if not self.service.key_name:
                        hint = 'is "json" among the formats in its settings.yml?'
                    problem = f"refused, {problem} ({hint})"
                if reply.status_code == 200:
                    problem = "its answer is not a list of results in JSON"
                elif 300 <= reply.status_code < 500 and reply.status_code not in (408, 429):
                    break
            if time.monotonic() + wait > deadline:
                break
            time.sleep(wait)
        raise ToolFault(f"search by {self.name}: {self.host}: {problem}")

    def hits_in(self, reply: requests.Response) -> list[dict] | None:
        """The hits of an answer in our words, plain text on one line each; None if it has none."""
        try:
            found = (
                self.service.hits(json.loads(reply.content)) if reply.status_code == 200 else None
            )
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            return None
        if not isinstance(found, list):
            return None
        hits = []
        for hit in [hit for hit in found if isinstance(hit, dict)][: self.k]:
            title, url, snippet = (str(hit.get(field) or "") for field in self.service.fields)
            url = "".join(url.split())[:2000]
            hits.append({"title": plain(title, 200), "url": url, "snippet": plain(snippet, 500)})
        return hits


def plain(text: str, limit: int) -> str:
    """Text without the tags and references that services put into titles and snippets."""
    return " ".join(html.unescape(re.sub(r"</?\w+[^<>]{0,100}>", "", text)).split())[:limit]
