"""Requests to an OpenAI-style endpoint: `ask`, with one deadline for whatever the server does.

`requests` only bounds the wait for each read, and a server that drips bytes never ends. So requests
run in threads that are left behind at their deadline and that no exit waits for.

In: a URL and a request. Out: the text of the reply, or one line that says what went wrong.
"""

import json
import os
import time
from concurrent.futures import FIRST_COMPLETED, TimeoutError, wait

import requests
from requests.adapters import HTTPAdapter
from tqdm import tqdm
from urllib3.util import Retry

from support.threads import in_thread

MAX_REPLY_BYTES = 4 << 20


def probe(url: str) -> None:
    """Raise a ValueError of one line if no server answers at this URL; any answer will do."""
    address = f"{url.rstrip('/')}/models"
    try:
        in_thread(lambda: requests.get(address, timeout=10, stream=True).close()).result(15)
    except (requests.RequestException, TimeoutError) as error:
        raise ValueError(f"the server at {url} failed: {error or 'no answer'}") from None


def ask(url: str, body: dict, deadline_s: float = 600.0) -> str:
    """The text of a chat completion. A busy or unreachable server is asked again.

    Args:
        url: the endpoint's base, such as http://127.0.0.1:8000/v1.
        body: the request: model, messages and the like.
        deadline_s: seconds for the whole of it, repeated requests included.

    Raises:
        ValueError: there was no answer, or none that can be read; one line.
    """
    start, key = time.monotonic(), os.environ.get("OPENAI_API_KEY", "").strip()
    if not (key.isascii() and key.isprintable()):  # the error of `requests` would show it
        raise ValueError("OPENAI_API_KEY has a character that no header may have")
    again = [429, *range(500, 600)]  # busy, or failed for a moment
    retries = Retry(
        3, allowed_methods=None, status_forcelist=again, backoff_factor=0.5, raise_on_status=False
    )

    def post() -> bytearray:
        with requests.Session() as session:
            session.mount("http://", HTTPAdapter(max_retries=retries))
            session.mount("https://", HTTPAdapter(max_retries=retries))
            reply = session.post(
                f"{url.rstrip('/')}/chat/completions",
                json=body,
                headers={"Authorization": f"Bearer {key}"} if key else {},
                timeout=deadline_s,
                stream=True,
            )
            reply.raise_for_status()
            data = bytearray()
            for chunk in reply.iter_content(4096):
                data += chunk
                if len(data) > MAX_REPLY_BYTES or time.monotonic() > start + deadline_s:
                    raise ValueError("the reply has no end")
            return data

    try:
        reply = json.loads(in_thread(post).result(deadline_s))
        text = reply["choices"][0]["message"].get("content") or ""
    except TimeoutError:
        raise ValueError(f"{url} gave no whole answer within {deadline_s:g} s") from None
    except requests.RequestException as error:
        raise ValueError(str(error)) from None
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        text = None
    if not isinstance(text, str):
        raise ValueError(f"{url} sent no chat completion")
    return text


def side_by_side(function, items: list, threads: int, label: str) -> None:
    """function(item) for each item, in threads that no exit of the process waits for."""
    waiting, running = list(reversed(items)), set()
    with tqdm(total=len(items), desc=label, mininterval=1, disable=None) as bar:
        while waiting or running:
            while waiting and len(running) < threads:
                running.add(in_thread(function, waiting.pop()))
            done, running = wait(running, return_when=FIRST_COMPLETED)
            for future in done:
                future.result()  # raises what the function has raised
                bar.update()
