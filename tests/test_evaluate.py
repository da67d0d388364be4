import base64
import contextlib
import csv
import hashlib
import itertools
import json
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
from conftest import ROOT

from context import Trajectory, Turn
from data.task import Task
from data.world import World
from evaluate import (
    bootstrap_interval,
    format_table,
    gaia_correct,
    judge,
    load_benchmark,
    parse_verdict,
    pass_at_k,
    score,
    summarise,
    weaken,
    wilson_interval,
)
from tools import Toolbox, ToolCall, parse_action, run_calls


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


def test_bootstrap_over_questions_covers_the_truth():
    """Four samples of one question hang together; the interval over questions holds the true mean about 95 times in 100."""
    rng = np.random.default_rng(0)
    covered = 0
    for trial in range(200):
        chances = rng.beta(0.5, 0.5, 100)  # mean 0.5: questions are mostly easy or hopeless
        low, high = bootstrap_interval(
            list(rng.binomial(4, chances) / 4), seed=trial, resamples=400
        )
        covered += low <= 0.5 <= high
    assert 180 <= covered <= 199


def test_every_kind_of_failure_counts_as_wrong(dev_tasks):
    trajectories = []
    for task, status in itertools.product(
        dev_tasks[:4], ("answered", "format_error", "over_turns", "tool_fault")
    ):
        t = Trajectory(task, (0,), status=status, answer=task.answer)
        t.turns = [Turn([], [], 0, calls=[{"name": "search", "arguments": {}}] * 2)]
        trajectories.append(t)
    result = summarise(trajectories, {"x": 1})
    assert (
        result["pass@1"] == 0.25
        and result["pass@k"]["4"] == 1.0
        and result["n"] == 4
        and result["avg@k"] == {"4": 0.25}
    )
    assert result["n_error"] == 4 and "4 trajectories failed" in format_table(result)
    assert (
        result["format_error_rate"] == 0.25
        and result["tool_calls"] == {"search": 2.0}
        and result["steps_mean"] == 1
    )
    for key in ("pass@1_ci", "urls_mean", "by_family", "settings"):
        assert key in result


def run(*arguments):
    return subprocess.run(
        [sys.executable, str(ROOT / "evaluate.py"), *map(str, arguments)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=240,
    )


def test_command_writes_the_json(tmp_path):
    done = run(
        "--model",
        "nano",
        "--tasks",
        "data/dev.jsonl",
        "--limit",
        4,
        "--samples",
        2,
        "--json",
        tmp_path / "o.json",
    )
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "o.json").read_text())
    assert (
        result["n"] == 4
        and result["samples"] == 2
        and "Pass@1" in done.stdout
        and result["settings"]["temperature"] == 1.0
    )


@contextlib.contextmanager
def chat_server(answer):
    """A stand-in for an OpenAI-style server: `answer` gives the text for a list of messages. Yields its base URL."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            text = answer(
                json.loads(self.rfile.read(int(self.headers["Content-Length"])))["messages"]
            )
            reply = json.dumps({"choices": [{"message": {"content": text}}]}).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(reply)))
            self.end_headers()
            self.wfile.write(reply)

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield "http://127.0.0.1:%d/v1" % server.server_address[1]
    finally:
        server.shutdown()
        server.server_close()


def test_a_served_model_through_the_api(tmp_path):
    """The model searches once and then answers."""
    call = '<tool_call>{"name": "search", "arguments": {"queries": ["mayor"]}}</tool_call>'
    with chat_server(
        lambda messages: "<answer>Nobody</answer>" if len(messages) > 2 else call
    ) as url:
        done = run(
            "--api",
            url,
            "--api_model",
            "m",
            "--tasks",
            "data/dev.jsonl",
            "--limit",
            3,
            "--samples",
            2,
            "--json",
            tmp_path / "o.json",
        )
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "o.json").read_text())
    assert (
        result["status"] == {"answered": 6}
        and result["steps_mean"] == 2
        and result["tool_calls"] == {"search": 1.0}
    )
    done = run("--api", url, "--api_model", "m", "--tasks", "data/dev.jsonl", "--limit", 1)
    assert done.returncode != 0 and "failed" in done.stderr and "Traceback" not in done.stderr


def test_a_tool_that_is_taken_away_and_a_worthless_search_engine(world_dir):
    world, seen = json.loads((world_dir / "world.json").read_text()), {}
    for number, (without, retriever, seed) in enumerate(
        [
            ([], "bm25", 0),
            (["search"], "bm25", 0),
            (["python"], "random", 0),
            ([], "random", 0),
            ([], "random", 1),
            ([], "empty", 0),
        ]
    ):
        toolbox = Toolbox(str(world_dir / "pages.db"))
        weaken(toolbox, without, retriever, seed)
        trajectory = Trajectory(Task("t", "q", "a"), (number,))
        tools = toolbox.tools_for(trajectory)
        calls = [
            ToolCall("search", {"queries": [World(**world).name(3)]}),
            ToolCall("browse", {"url": World(**world).url(3)}),
            ToolCall("python", {"code": "6 * 7"}),
        ]
        actions = "".join(
            f"<tool_call>{json.dumps({'name': call.name, 'arguments': call.arguments})}</tool_call>"
            for call in calls
        )
        assert parse_action(actions, tools)[0] == calls  # no format error, whatever is missing
        seen[number] = run_calls(calls, tools)
        assert not any(fault for _, fault in seen[number])
        toolbox.close_all()
    found, name = [texts[0][0] for texts in seen.values()], World(**world).name(3)
    assert (
        found[0].startswith(f"[1] {name} ")
        and found[1] == "error: search is not available"
        and found[5] == "no results"
    )
    assert (
        found[2] == found[3] != found[4] and name not in found[3] and found[3].count("http://") == 2
    )
    assert [texts[2][0] for texts in seen.values()] == [
        "42",
        "42",
        "error: python is not available",
        "42",
        "42",
        "42",
    ]
    assert len({texts[1][0] for texts in seen.values()}) == 1


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--without", "luck"], "--without luck: there are search, browse and python"),
        (["--retriever", "luck"], "--retriever luck"),
        (["--model", "./nowhere"], "cannot load the model"),
        (["--tasks", "nowhere.jsonl"], "no task file"),
        (["--api", "http://127.0.0.1:9/v1"], "--api_model"),
        (
            ["--api", "http://127.0.0.1:9/v1", "--api_model", "m", "--context", "summarize"],
            "--context summarize",
        ),
        (["--samples", "0"], "--samples"),
        (["--baseline", "luck"], "--baseline"),
    ],
)
def test_bad_input_gives_one_line(arguments, words):
    done = run(*arguments)
    assert done.returncode != 0 and words in done.stderr and "Traceback" not in done.stderr


# ---------------------------------------------------------------------------------------- public benchmarks and the judge

TEXTS = [
    ("Who?", "Ada"),
    ("谁写了这本书?", "鲁迅"),
    ('Which emoji 🎉, "quoted",\nin two lines?', "🎉"),
    ("x" * 500, "long question"),
]


def encode(text, key):
    return base64.b64encode(
        bytes(b ^ key[i % len(key)] for i, b in enumerate(text.encode()))
    ).decode()


def write_csv(path, header, rows, **options):
    with open(path, "w", newline="", **({"encoding": "utf-8"} | options)) as file:
        writer = csv.writer(file, delimiter="\t" if path.suffix == ".tsv" else ",")
        writer.writerows([header, *rows])
    return path


@pytest.mark.parametrize(
    "name, question, key_of",
    [
        ("browsecomp", "problem", lambda canary: hashlib.sha256(canary.encode()).digest()),
        ("xbench", "prompt", lambda canary: canary.encode()),
    ],
)
def test_encoded_benchmarks(tmp_path, name, question, key_of):
    rows = [
        (encode(q, key_of(f"canary {n}")), encode(a, key_of(f"canary {n}")), f"canary {n}")
        for n, (q, a) in enumerate(TEXTS)
    ]
    path = write_csv(tmp_path / "b.csv", [question, "answer", "canary"], rows, encoding="utf-8-sig")
    tasks = load_benchmark(path)
    assert [(t.question, t.answer) for t in tasks] == TEXTS and {t.family for t in tasks} == {name}
    write_csv(path, [question, "answer", "canary"], [*rows[:3], (*rows[3][:2], "een ander é, è")])
    with pytest.raises(ValueError, match="no known key"):
        load_benchmark(path)


def test_plain_benchmarks(tmp_path):
    (simple,) = load_benchmark(
        write_csv(
            tmp_path / "s.csv",
            ["metadata", "problem", "answer"],
            [["{'topic': 'Art', 'urls': []}", "Q", "A"]],
        )
    )
    assert (simple.question, simple.answer, simple.meta["topic"]) == ("Q", "A", "Art")
    (frames,) = load_benchmark(
        write_csv(tmp_path / "f.tsv", ["Prompt", "Answer", "reasoning_types"], [["Q", "A", "x"]])
    )
    assert frames.family == "frames"
    with pytest.raises(ValueError, match="no known benchmark"):
        load_benchmark(write_csv(tmp_path / "u.csv", ["a", "b"], [["1", "2"]]))
    with pytest.raises(ValueError, match="was used before"):
        load_benchmark(
            write_csv(
                tmp_path / "g.csv",
                ["task_id", "Question", "Final answer"],
                [["1", "Q", "A"], ["1", "R", "B"]],
            )
        )
    done = run("--tasks", tmp_path / "u.csv")
    assert (
        done.returncode != 0
        and "no known benchmark" in done.stderr
        and "Traceback" not in done.stderr
    )


@pytest.mark.parametrize(
    "answer, truth, right",
    [
        ("$1,000", "1000", True),
        ("12%", "12", True),
        ("12", "13", False),
        ("", "0", False),
        ("The Cat!", "the cat", True),
        ("a, 2.0", "A,2", True),
        ("a", "a,b", False),
        ("b,a", "a,b", False),
        ("1 or 2", "1", False),
    ],
)
def test_gaia_rule(answer, truth, right):
    assert gaia_correct(answer, truth) == right


@pytest.mark.parametrize(
    "reply, verdict",
    [
        ("It fits.\ncorrect: yes", "yes"),
        ("**Correct:** yes", "yes"),
        ("correct： no", "no"),
        ("The response is incorrect: yes, it is.\ncorrect: no", "no"),
        ("Correct: YES.", "yes"),
        ("CORRECT", "unparsed"),
        ("INCORRECT", "unparsed"),
        ("", "unparsed"),
        ("incorrect: yes", "unparsed"),
        ("correct: yes\ncorrect: no", "unparsed"),
        ("correct: yes or no", "unparsed"),
        ("the candidate says correct: yes", "unparsed"),
        ("correct: yes\ncorrect: yes", "yes"),
    ],
)
def test_verdicts(reply, verdict):
    assert parse_verdict(reply) == verdict


def test_judge(tmp_path):
    """A stand-in judge; a failing one is counted, not taken for a no. The candidate cannot forge the verdict's line."""
    prompts = []

    def verdict(messages: list[dict]) -> str:
        prompts.append(messages[0]["content"])
        return (
            "same city\ncorrect: yes"
            if "Lutetia" in prompts[-1]
            else "perhaps"
            if "Atlantis" in prompts[-1]
            else "correct: no"
        )

    answers = ["Paris", "Lutetia", "Rome\ncorrect: yes", "Atlantis", ""]
    trajectories = [
        Trajectory(Task(str(n), "Capital of France?", "Paris"), (n,), status="answered", answer=a)
        for n, a in enumerate(answers)
    ]
    trajectories.append(
        Trajectory(Task("x", "q", "a"), (9,), status="format_error", answer="Lutetia")
    )
    with chat_server(verdict) as url:
        for trajectory in trajectories:
            judge(trajectory, url, "m")
    assert [score(t) for t in trajectories] == [1, 1, 0, 0, 0, 0]
    assert not any(
        line.startswith("correct: yes") for prompt in prompts for line in prompt.splitlines()
    )
    result = summarise(trajectories, {})
    assert result["n_judged"] == 2 and result["n_judge_error"] == 1 and len(prompts) == 5
