import itertools
import json
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from conftest import ROOT

from evaluate import bootstrap_interval, pass_at_k, summarise, wilson_interval
from rollout import Trajectory, Turn


@pytest.mark.parametrize("n", [1, 3, 6])
def test_pass_at_k_equals_counting_all_subsets(n):
    for c in range(n + 1):
        for k in range(1, n + 1):
            subsets = list(itertools.combinations([1] * c + [0] * (n - c), k))
            assert pass_at_k(n, c, k) == pytest.approx(sum(any(s) for s in subsets) / len(subsets))
    for bad in ((3, 1, 4), (3, 4, 1), (3, -1, 1), (3, 1, 0)):
        with pytest.raises(ValueError):
            pass_at_k(*bad)


def test_intervals():
    low, high = bootstrap_interval([0.0] * 70 + [1.0] * 30)
    assert 0.19 < low < 0.25 and 0.35 < high < 0.41
    assert bootstrap_interval([0.0] * 100)[1] > 0.03  # none of 100 solved does not prove zero
    low, high = wilson_interval(0.0, 10)
    assert low == 0 and high == pytest.approx(0.278, abs=1e-3)


def test_every_kind_of_failure_counts_as_wrong(dev_tasks):
    trajectories = []
    for task, status in itertools.product(dev_tasks[:4], ("answered", "format_error", "over_turns", "tool_fault")):
        t = Trajectory(task, (0,), status=status, answer=task.answer)
        t.turns = [Turn([], [], 0, calls=[{"name": "search", "arguments": {}}] * 2)]
        trajectories.append(t)
    result = summarise(trajectories, {"x": 1})
    assert result["pass@1"] == 0.25 and result["pass@k"]["4"] == 1.0 and result["n"] == 4 and result["avg@k"] == {"4": 0.25}
    assert result["format_error_rate"] == 0.25 and result["tool_calls"] == {"search": 2.0} and result["steps_mean"] == 1
    for key in ("pass@1_ci", "urls_mean", "by_family", "settings"):
        assert key in result


def run(*arguments):
    return subprocess.run([sys.executable, str(ROOT / "evaluate.py"), *map(str, arguments)], cwd=ROOT, capture_output=True, text=True, timeout=240)


def test_command_writes_the_json(tmp_path):
    done = run("--model", "nano", "--tasks", "data/dev.jsonl", "--limit", 4, "--samples", 2, "--json", tmp_path / "o.json")
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "o.json").read_text())
    assert result["n"] == 4 and result["samples"] == 2 and "Pass@1" in done.stdout and result["settings"]["temperature"] == 1.0


def test_a_served_model_through_the_api(tmp_path):
    """A stand-in server that searches once and then answers."""
    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            searched = len(body["messages"]) > 2
            text = "<answer>Nobody</answer>" if searched else '<tool_call>{"name": "search", "arguments": {"queries": ["mayor"]}}</tool_call>'
            reply = json.dumps({"choices": [{"message": {"content": text}}]}).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(reply)))
            self.end_headers()
            self.wfile.write(reply)

        def log_message(self, *_):
            pass
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url = "http://127.0.0.1:%d/v1" % server.server_address[1]
    done = run("--api", url, "--api_model", "m", "--tasks", "data/dev.jsonl", "--limit", 3, "--samples", 2, "--json", tmp_path / "o.json")
    server.shutdown()
    server.server_close()
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "o.json").read_text())
    assert result["status"] == {"answered": 6} and result["steps_mean"] == 2 and result["tool_calls"] == {"search": 1.0}
    done = run("--api", url, "--api_model", "m", "--tasks", "data/dev.jsonl", "--limit", 1)
    assert done.returncode != 0 and "failed" in done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize("arguments, words", [
    (["--model", "./nowhere"], "cannot load the model"), (["--tasks", "nowhere.jsonl"], "no task file"), (["--api", "http://127.0.0.1:9/v1"], "--api_model"),
    (["--samples", "0"], "--samples"), (["--baseline", "luck"], "--baseline")])
def test_bad_input_gives_one_line(arguments, words):
    done = run(*arguments)
    assert done.returncode != 0 and words in done.stderr and "Traceback" not in done.stderr
