"""Where the pages of a fictional web stand: hosts and paths of every form.

A *site* is an address without its scheme, with * where the page's own name goes: "kor.test/maps/*".
In: a random generator. Out: sites. To try an idea, add a form to HOSTS or PATHS: L becomes a
letter, W a made-up word, N a number.
"""

import functools
import random
import re
import zlib

from data.parts import LAST_SYLLABLES
from data.task import SPLITS

SEEN, UNSEEN = "seen", "unseen"  # the unseen forms stand in test worlds only
COMPOSED = "composed"  # put together at random, for pretraining; the unseen ones are not among them
HOSTS = {
    SEEN: "LN W W WN W-N W-W W.W LN.W W-N.W W.W-W N.W".split(),
    UNSEEN: "NW W-W-W W.W.W W-N-W L.N-W LNLN WNW".split(),
}
PATHS = {
    SEEN: "* * * * L/* N/* W/* W-W/* L/N/* W/W/* W/L/N/* */L */N W/*/W *.W".split(),
    UNSEEN: "*.html W/*.html N-W/* W.N/* L/*/N WN/W/L/* N/*/W-W".split(),
}


def compose(joints: list[str], has_page: bool, unseen: list[str]) -> list[str]:
    """Random forms of one to four parts with these joints between, without those of `unseen`; one
    part may be the page."""
    rng, forms = random.Random(0), []
    for _ in range(400):
        parts = rng.choices("LWN", k=rng.randint(1, 4))
        if has_page:
            parts[rng.randrange(len(parts))] = "*"
        forms.append(parts[0] + "".join(rng.choice(joints) + part for part in parts[1:]))
    return [form for form in forms if form not in unseen]


HOSTS[COMPOSED] = compose(["", "-", "."], False, HOSTS[UNSEEN])
PATHS[COMPOSED] = compose(["", "-", ".", "/", "/", "/"], True, PATHS[UNSEEN])
ENDINGS = ("test", "test", "test", "example")  # no real site can have these names
LETTERS = "abcdefghijklmnopqrstuvwxyz"


def fill(form: str, rng: random.Random) -> str:
    """A form with its letters, words and numbers drawn."""

    def draw(kind: re.Match) -> str:
        if kind[0] == "L":
            return rng.choice(LETTERS)
        if kind[0] == "N":
            return str(rng.randrange(10 ** rng.randint(1, 5)))
        if rng.random() < 0.25:
            return "".join(rng.choices(LETTERS, k=rng.randint(2, 6)))
        return "".join(rng.choices(LAST_SYLLABLES, k=rng.choice((1, 1, 2))))

    return re.sub("[LWN]", draw, form)


def draw_host(rng: random.Random, split: str, forms: str) -> str:
    """A host; splits share none. In pretraining it may end in any word, since nobody asks there."""
    host = ""
    while zlib.crc32(host.encode()) % len(SPLITS) != SPLITS.index(split) or not host:
        ending = "W" if split == "pretrain" and rng.random() < 0.2 else rng.choice(ENDINGS)
        host = fill(f"{rng.choice(HOSTS[forms])}.", rng) + fill(ending, rng)
    return host


@functools.lru_cache(maxsize=1024)
def draw_sites(key: str, split: str, forms: str, longest: int | None = None) -> list[str]:
    """Two to four sites.

    Args:
        key: decides the draws.
        forms: SEEN, UNSEEN or COMPOSED.
        longest: characters of a site, if it is to be short; one more after 500 that were too long.
    """
    sites: list[str] = []
    rng, too_long = random.Random(key), 0
    wanted = rng.randint(2, 4)
    while len(sites) < wanted:
        site = f"{draw_host(rng, split, forms)}/{fill(rng.choice(PATHS[forms]), rng)}"
        if longest and len(site) > longest + too_long // 500:
            too_long += 1
        elif site not in sites:
            sites.append(site)
    return sites
