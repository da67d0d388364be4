"""Check tasks: keep the good ones, and the rejects with their reasons.

The stages and what each of them rejects are in data/deep/funnel.py. One more is here, with --model:
    pass@n     a task that the named policy never or always solves in --pass_n attempts (slow)

In: a task file, a user's own too. Out: the good tasks, and the rejects with stage and reason.
Without --world the stages that need pages are left out. To try an idea, add a stage to the funnel.

    python data/validate.py --tasks in.jsonl --world DIR --out good.jsonl --rejects rejects.jsonl
"""

import sqlite3
import sys
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from transformers.hf_argparser import HfArg

from data.deep.funnel import STAGES, Funnel
from data.task import Task, save_lines, save_tasks
from evaluate import open_policy
from rollout import AgentLoop, RolloutArgs, play
from support.answers import correct
from support.checks import at_least
from support.evaluation import make_trajectories
from support.flags import parse_flags, try_files
from support.toolbox import Toolbox


@dataclass
class Args:
    tasks: str = HfArg(help="task file to check (JSON lines)")
    out: str = HfArg(help="file for the good tasks")
    rejects: str = HfArg(help="file for the rejected ones, with stage and reason")
    world: str = HfArg(default="", help="folder of the tasks' world (data/world.py)")
    skip: list[str] = HfArg(
        default_factory=list, metadata={"choices": list(STAGES)}, help="stages to leave out"
    )
    model: str = HfArg(default="", help="policy of the Pass@N stage: nano or a checkpoint folder")
    pass_n: int = HfArg(default=4, help="attempts at each task in the Pass@N stage")
    max_turns: int = HfArg(default=8, help="model steps of one attempt")


def pass_window(tasks: list[Task], funnel: Funnel, args: Args) -> list[Task]:
    """Pass@N: keep what the policy solves sometimes. Plays `pass_n` trajectories a task."""
    corpus = str(Path(args.world) / "pages.db") if args.world else ""
    rollout_args = RolloutArgs(max_turns=args.max_turns, corpus=corpus)
    _, chat, engine = open_policy(args.model, rollout_args)
    loop = AgentLoop(engine, chat, Toolbox(rollout_args), rollout_args, lockstep=True)
    solved = Counter(
        t.task.id
        for t in play(loop, make_trajectories(tasks, args.pass_n, seed=0))
        if t.status == "answered" and correct(t.answer, t.task.answer, t.task.answer_type)
    )
    funnel.looked["pass@n"] = len(tasks)
    kept = []
    for task in tasks:
        count = solved[task.id]
        if 0 < count < args.pass_n:
            kept.append(task)
        else:
            reason = f"{args.model} solved it in {count} of {args.pass_n} attempts"
            funnel.reject("pass@n", reason, asdict(task))
    return kept


def main():
    (args,) = parse_flags((Args,), __doc__)
    try:
        funnel = Funnel(args.world, [name for name in STAGES if name not in args.skip])
        at_least(args, 1, "max_turns")
        if args.model and args.pass_n < 2:
            raise ValueError("--pass_n must be at least 2: of one attempt none is solved sometimes")
        tasks = funnel.read_tasks(args.tasks)
        try_files(args.out, args.rejects)
        good = [task for task in tasks if funnel.check(task)]
        if args.model and good:
            good = pass_window(good, funnel, args)
        save_tasks(good, args.out)
        save_lines(funnel.rejects, args.rejects)
    except (OSError, ValueError, sqlite3.Error) as error:
        sys.exit(f"data/validate.py: {error}")
    except KeyboardInterrupt:
        sys.exit("data/validate.py: stopped; no task was written")
    print(funnel.table())
    total = len(good) + len(funnel.rejects)
    print(f"kept {len(good)} of {total} tasks; the others are in {args.rejects}")


if __name__ == "__main__":
    main()
