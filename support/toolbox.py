"""Which tools a trajectory gets: those of tools.TOOLS, over the world or the corpus of its task.

In: flags, tasks. Out: `Toolbox.tools_for(trajectory)`, name -> tool. Worlds are written and opened
on first use; their pages are served on loopback.
"""

from pathlib import Path

import tools
from data.serve import start_server
from data.world import world_folder
from support.search_services import WebSearch
from support.web import LiveWeb
from tools import Browse, Python, Search

CACHE = Path(__file__).resolve().parent.parent / "runs" / "cache"  # of the real web


class Toolbox:
    """Gives each trajectory its tools: search and browse of its task's world, and its own Python.

    Args:
        corpus: index (data/index.py) for tasks that name no world; "" if there are none.
        live: let browse open public addresses of the real web.
        search_results, page_chars: how much search and browse show.
        search, search_url: "embedded", or a search service of the web (support/search_services.py)
            and its address; browse then opens the real web as well.
        python, unsafe_python: "monty", or "cpython" with or without its sandbox.

    Raises:
        FileNotFoundError: the corpus has no index.
        ValueError: one line that says what to do: a service lacks its key or cannot be reached, a
            package is missing, or this machine has no sandbox.
    """

    def __init__(
        self,
        corpus: str = "",
        live: bool = False,
        search_results: int = 2,
        page_chars: int = 400,
        search: str = "embedded",
        search_url: str = "",
        unsafe_python: bool = False,
        python: str = "monty",
    ):
        self.corpus, self.search_results, self.page_chars = corpus, search_results, page_chars
        self.shared: dict[str, tuple[Search, Browse]] = {}  # by index file; "" is the web alone
        self.sessions: dict[tuple, object] = {}  # of CPython, by trajectory key
        self.open_cpython = None
        if python == "cpython":
            from support import cpython_sandbox  # it needs Linux

            self.open_cpython = cpython_sandbox.opener(unsafe_python)
        self.others = [tool() for tool in tools.TOOLS if tool not in (Search, Browse, Python)]
        self.service = None
        if search != "embedded":
            self.service = WebSearch(search, search_url, search_results, CACHE / "search")
            self.service.probe()
        self.web = LiveWeb(CACHE / "pages") if live or self.service else None
        if corpus:
            self.open(corpus)

    def isolation(self) -> str:
        """What confines the python tool, in words.

        Raises:
            ValueError: it cannot be started or confined.
        """
        if self.open_cpython is None:
            return "Monty, an interpreter without system calls"
        return self.open_cpython().describe()

    def open(self, db: Path | str) -> tuple[Search, Browse]:
        """Search and browse over one index, whose pages are served here; "" is the web alone."""
        if str(db) not in self.shared:
            hosts = start_server(db).hosts if db else {}
            search = Search(db, self.search_results, self.service)
            self.shared[str(db)] = search, Browse(hosts, self.web or False, self.page_chars)
        return self.shared[str(db)]

    def prepare(self, tasks) -> None:
        """Open (and on first use write) the worlds of these tasks before the first rollout.

        Raises:
            ValueError: a task names no world and there is no corpus.
        """
        for task in tasks:
            self.index_of(task)

    def index_of(self, task) -> tuple[Search, Browse]:
        world = task.meta.get("world")
        if world:
            return self.open(world_folder(world) / "pages.db")
        if not self.corpus and not self.service:
            raise ValueError(
                f"task {task.id!r} names no world: give --corpus FILE.db (data/index.py makes one)"
            )
        return self.open(self.corpus)

    def tools_for(self, trajectory) -> dict:
        """name -> tool, in the order of TOOLS."""
        search, browse = self.index_of(trajectory.task)
        made = (search, browse, self.python_for(trajectory), *self.others)
        by_name = {tool.name: tool for tool in made}
        return {tool.name: by_name[tool.name] for tool in tools.TOOLS}

    def python_for(self, trajectory):
        """The trajectory's session; CPython's begins anew where a trajectory goes on elsewhere."""
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


def open_toolbox(args) -> Toolbox:
    """The tools that the flags (`RolloutArgs`) ask for; raises as `Toolbox` does."""
    names = ("corpus", "live", "search_results", "page_chars", "search", "search_url")
    names += ("python", "unsafe_python")
    return Toolbox(**{name: getattr(args, name) for name in names})
