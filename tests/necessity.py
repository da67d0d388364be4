"""What a policy owes to each tool: its Pass@1 with all tools, without each of them, and with a
search engine that is worthless.

In: the flags of evaluate.py, passed on. Out: a table. Each row is one evaluation with the same
tasks, seeds and prompt.

    python tests/necessity.py --model runs/NAME/checkpoint --samples 4 [--json FILE]
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

EVALUATE = Path(__file__).resolve().parent.parent / "evaluate.py"
CONDITIONS = {
    "all tools": [],
    "no search": ["--without", "search"],
    "no browse": ["--without", "browse"],
    "no python": ["--without", "python"],
    "random pages found": ["--retriever", "random"],
    "nothing found": ["--retriever", "empty"],
}


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--json", default="", help="file for the figures of all rows")
    args, flags = parser.parse_known_args()
    results = {}
    heads = f"{'':20s} {'Pass@1':>7s}  {'95% interval':15s} {'steps':>5s} {'format errors':>13s}"
    print(f"{heads}  calls a trajectory")
    for name, condition in CONDITIONS.items():
        with tempfile.NamedTemporaryFile(suffix=".json") as file:
            done = subprocess.run(
                [sys.executable, str(EVALUATE), *flags, *condition, "--json", file.name],
                capture_output=True,
                text=True,
            )
            if done.returncode:
                sys.exit(done.stderr or f"tests/necessity.py: evaluate.py failed for: {name}")
            result = results[name] = json.load(open(file.name))
        low, high = result["pass@1_ci"]
        calls = ", ".join(f"{tool} {count:.2f}" for tool, count in result["tool_calls"].items())
        row = f"{name:20s} {result['pass@1']:7.1%}  {f'{low:.1%} to {high:.1%}':15s}"
        row += f" {result['steps_mean']:5.2f} {result['format_error_rate']:13.1%}  {calls}"
        print(row, flush=True)
    if args.json:
        Path(args.json).write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
