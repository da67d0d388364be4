"""Which tools a trajectory gets: those of tools.TOOLS, over the world or the corpus of its task.

In: flags, tasks. Out: `Toolbox.tools_for(trajectory)`, name -> tool. Worlds are written and opened
on first use; their pages are served on loopback.
"""

from pathlib import Path

import tools
from data.serve import start_server
from data.task import DEFAULTS
from data.world import world_folder
from support.search_services import WebSearch
from support.web import LiveWeb
from tools import Browse, Python, Search

CACHE = Path(__file__).resolve().parent.parent / "runs" / "cache"  # of the real web


def open_index_tools(
    db: Path | str, search_results: int = 2, page_chars: int = 400, service=None, web=None
) -> tuple[Search, Browse]:
    """Search and browse over one index, whose pages are served here.

    Args:
        db: the index; "" is the web alone.
        search_results, page_chars: how much they show.
        service, web: a `WebSearch` and a `LiveWeb`, or None.
    """
    hosts = start_server(db).hosts if db else {}
    return Search(db, search_results, service), Browse(hosts, web or False, page_chars)


class Toolbox:
    """Gives each trajectory its tools: search and browse of its task's world, and its own Python.

    Args:
        args: `RolloutArgs`; what concerns the tools is read.
        keeps: whether answers of the real web are kept on disk, with the queries.

    Raises:
        FileNotFoundError: the corpus has no index.
        ValueError: one line that says what to do: a service lacks its key or cannot be reached, a
            package is missing, or this machine has no sandbox.
    """

    def __init__(self, args, keeps: bool = True):
        self.args = args
        self.indexes: dict[str, tuple[Search, Browse]] = {}  # by world; "" is the corpus or the web
        self.sessions: dict[tuple, object] = {}  # of CPython, by trajectory key
        self.open_cpython = self.service = None
        if args.python == "cpython":
            from support import cpython_sandbox  # it needs Linux

            self.open_cpython = cpython_sandbox.opener(args.unsafe_python)
        self.others = [tool() for tool in tools.TOOLS if tool not in (Search, Browse, Python)]
        if args.search != "embedded":
            cache = CACHE / "search" if keeps else ""
            self.service = WebSearch(args.search, args.search_url, args.search_results, cache)
            self.service.probe()
        is_live = args.live or self.service
        self.web = LiveWeb(CACHE / "pages" if keeps else "") if is_live else None
        if args.corpus:
            self.open("", args.corpus)

    def isolation(self) -> str:
        """What confines the python tool, in words.

        Raises:
            ValueError: it cannot be started or confined.
        """
        if self.open_cpython is None:
            return "Monty, an interpreter without system calls"
        return self.open_cpython().describe()

    def open(self, key: str, db: Path | str) -> None:
        """Open an index, "" for the web alone, under its key in `indexes`."""
        sizes = (self.args.search_results, self.args.page_chars)
        self.indexes[key] = open_index_tools(db, *sizes, self.service, self.web)

    def prepare(self, tasks) -> None:
        """Open (and on first use write) the worlds of these tasks before the first rollout.

        Raises:
            ValueError: a task names no world and there is no corpus.
        """
        for task in tasks:
            self.index_of(task)

    def index_of(self, task) -> tuple[Search, Browse]:
        """Search and browse over the world of a task, or over the corpus."""
        world = task.meta.get("world", {})
        key = str(sorted((DEFAULTS | world).items())) if world else ""
        if key not in self.indexes:
            if not world and not self.service:
                raise ValueError(
                    f"task {task.id!r} names no world: give --corpus FILE.db (data/index.py makes "
                    "one), or a --search service"
                )
            self.open(key, world_folder(world) / "pages.db" if world else "")
        return self.indexes[key]

    def tools_for(self, trajectory) -> dict:
        """name -> tool, in the order of TOOLS."""
        search, browse = self.index_of(trajectory.task)
        made = (search, browse, self.python_for(trajectory), *self.others)
        by_name = {tool.name: tool for tool in made}
        return {tool.name: by_name[tool.name] for tool in tools.TOOLS}

    def python_for(self, trajectory):
        """The trajectory's session. Where it goes on elsewhere, CPython's repeats what has run."""
        if self.open_cpython is None:
            return Python(trajectory.memory)
        session = self.sessions.get(trajectory.key)
        if session is None or session.memory is not trajectory.memory:
            self.close(trajectory)
            session = self.sessions[trajectory.key] = self.open_cpython(trajectory.memory)
        return session

    def close(self, trajectory) -> None:
        """End the trajectory's process, if it has one; its memory stays."""
        if session := self.sessions.pop(trajectory.key, None):
            session.close()

    def close_all(self) -> None:
        for key in list(self.sessions):
            self.sessions.pop(key).close()
