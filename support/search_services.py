"""Search services of the web, each as plain data, and the one class that asks them.

In: queries. Out: hits (title, url, snippet), as the embedded search engine gives them. To use
another service, add a `Service` to SERVICES, and its name to `SearchEngine` in rollout.py.
"""

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

from support.threads import in_thread
from support.web import ToolFault, bounded_session, send_in_time, wait_of

RETRY_S = 0.5  # before a second request; then twice as long each time
TRIES = 4


@dataclass
class Service:
    """How a search service is asked and how it answers."""

    arguments: Callable[[str, int], dict]  # (query, k) -> the query string of a GET, JSON of a POST
    method: str = "GET"
    url: str = ""  # "" if everybody runs their own
    key_name: str = ""  # environment variable that holds the API key; "" if it needs none
    key_header: tuple[str, str] = ("", "")  # the header of the key, and its value around the key
    hits: Callable[[dict], list] = lambda answer: answer["results"]  # the answer -> its hits
    fields: tuple[str, str, str] = ("title", "url", "content")  # title, url and snippet of a hit


SERVICES = {
    "searxng": Service(lambda query, k: {"q": query, "format": "json"}),
    "brave": Service(
        lambda query, k: {"q": query[:400], "count": k},
        url="https://api.search.brave.com/res/v1/web/search",
        key_name="BRAVE_API_KEY",
        key_header=("X-Subscription-Token", "{}"),
        hits=lambda answer: answer.get("web", {"results": []})["results"],
        fields=("title", "url", "description"),
    ),
    "serper": Service(
        lambda query, k: {"q": query, "num": k},
        method="POST",
        url="https://google.serper.dev/search",
        key_name="SERPER_API_KEY",
        key_header=("X-API-KEY", "{}"),
        hits=lambda answer: answer["organic"],
        fields=("title", "link", "snippet"),
    ),
    "tavily": Service(
        lambda query, k: {"query": query, "max_results": k},
        method="POST",
        url="https://api.tavily.com/search",
        key_name="TAVILY_API_KEY",
        key_header=("Authorization", "Bearer {}"),
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
        self.url = url or self.service.url
        if name == "searxng" and url:
            self.url = url.rstrip("/").removesuffix("/search") + "/search"
        self.host = urlsplit(self.url).hostname
        if not re.match("https?://", self.url) or not self.host:
            where = "the address of a server: --search_url http://HOST:PORT"
            raise ValueError(f"search by {name} needs {where}")
        self.headers = {"Accept": "application/json"}
        if key_name := self.service.key_name:
            key = os.environ.get(key_name, "").strip()
            if not key:
                where = f"an API key in the environment variable {key_name}"
                raise ValueError(f"search by {name} needs {where}")
            header, value = self.service.key_header
            self.headers[header] = value.format(key)
        self.session = bounded_session(
            public=False,
            gap_s=gap_s,
            cache=cache,
            allowable_methods=("GET", "POST"),
            ignored_parameters=list(self.headers),  # so that no key is written to disk
            filter_fn=lambda reply: self.hits_in(reply) is not None,
        )

    def probe(self) -> None:
        """Find out now, at no cost, whether the service can be reached; ValueError if not."""
        parts = urlsplit(self.url)
        port = parts.port or {"http": 80, "https": 443}[parts.scheme]
        try:
            socket.create_connection((self.host, port), timeout=5).close()
        except OSError as error:
            problem = f"cannot reach {self.host} ({error.strerror or error})"
            raise ValueError(f"search by {self.name}: {problem}") from None

    def find(self, queries: list[str]) -> list[list[dict]]:
        """The hits of each query, asked side by side: dicts with title, url, snippet.

        Raises:
            ToolFault: no usable answer; the text names service and reason, never the key.
        """
        return [future.result() for future in [in_thread(self.ask, query) for query in queries]]

    def ask(self, query: str) -> list[dict]:
        """The hits of one query, after up to four requests; raises as `find` does."""
        query = query.encode("utf-8", "ignore").decode().strip()  # half a character finds nothing
        if not query:
            return []
        deadline = time.monotonic() + self.timeout_s
        place = "params" if self.service.method == "GET" else "json"
        arguments = {place: self.service.arguments(query, self.k)}
        request = requests.Request(self.service.method, self.url, self.headers, **arguments)
        for attempt in range(TRIES):
            wait, final = RETRY_S * 2**attempt, attempt == TRIES - 1
            try:
                reply = send_in_time(self.session, request.prepare(), deadline)
            except (requests.RequestException, urllib3.exceptions.HTTPError, OSError) as error:
                # Only the kind of the error: its text may hold the request.
                problem = f"cannot be reached, {type(error).__name__}"
            else:
                if (hits := self.hits_in(reply)) is not None:
                    return hits
                problem, wait = self.problem_of(reply.status_code), wait_of(reply, wait)
                final |= reply.status_code not in (200, 408, 429) and reply.status_code < 500
            if final or time.monotonic() + wait > deadline:
                raise ToolFault(f"search by {self.name}: {self.host}: {problem}")
            time.sleep(wait)
        raise AssertionError("unreachable")

    def problem_of(self, status: int) -> str:
        """What is wrong with an answer that has no hits, in words."""
        if status == 200:
            return "its answer is not a list of results in JSON"
        if status not in (401, 402, 403):
            return f"HTTP {status}"
        hint = 'is "json" among the formats in its settings.yml?'
        if self.service.key_name:
            hint = f"is {self.service.key_name} right?"
        return f"refused, HTTP {status} ({hint})"

    def hits_in(self, reply: requests.Response) -> list[dict] | None:
        """The hits of an answer in our words, plain text on one line each; None if it has none."""
        if reply.status_code != 200:
            return None
        try:
            found = self.service.hits(json.loads(reply.content))
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
