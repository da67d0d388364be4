"""The lines of trajectories.jsonl, and the page that report.py makes of runs.

The page is opened in a real Chromium, without a network, from a file. Where there is none, those
tests are skipped.

pytest tests/test_report.py
"""

import json
import re
import shutil

import numpy as np
import pytest
from conftest import ROOT

from context import Trajectory, Turn, add_turn, extend_segments
from data.task import Task
from evaluate import figures
from report import (
    behaviour_table,
    by_task,
    difference,
    flag_table,
    held_out,
    held_out_table,
    is_clear,
    main,
    metric,
    read_run,
    shown_difference,
    write_report,
)
from reward import Reward
from rollout import Group
from support.behaviour import behaviour_of
from support.curves import draw_curves
from support.page import Pieces, pack, parts_of
from support.run_folder import cut_lines
from support.trajectory_log import is_written, record_of, to_lines, update_records, without_texts
from train import rows_of

HOSTILE = [
    "</script><script>window.hit = 1</script>",
    "<!-- <script>",
    "<img src=x onerror='window.hit = 1'>",
    "one\u2028two\u2029three",
    "\u202eesrever\u2066",
    "__proto__",
    "length",
    "é 漢 🦔 \ud800",
    "w" * 20_000,
]


def played(chat, task: Task, index: int, texts: list[str], results: list[str], **ended):
    """A trajectory that said these texts; between two of them stands a search's result."""
    t = Trajectory(task, (0, 0, 7, index, 0), head_ids=chat.head(task.question), **ended)
    prompt = list(t.head_ids)
    for n, text in enumerate(texts):
        extend_segments(t.segments, prompt)
        ids = [*chat.trusted(text), chat.end_id]
        turn = Turn(ids, [-0.25] * len(ids), version=4, began=10.0 + 2 * n, generate_s=1.5)
        add_turn(t, turn)
        if n < len(results):
            turn.calls = [{"name": "search", "arguments": {"queries": ["Belin"]}}]
            turn.results, turn.tool_s = [results[n]], 0.25
            turn.observation_ids = chat.observation(turn.results, 64)
        prompt += ids + turn.observation_ids
    return t


CALL = '<think>Look.</think><tool_call>{"name": "search", "arguments": {"queries": ["Belin"]}}</tool_call>'


def group_of(chat, position: int, result: str, question: str = "Where is Belin?") -> Group:
    """Three attempts at a task: right, wrong, and with a format error."""
    task = Task(f"task-{position}", question, "Kor", family="hop" if position % 2 else "lookup")
    right = played(
        chat,
        task,
        0,
        [CALL, CALL, "<answer>Kor</answer>"],
        [result, result],
        status="answered",
        answer="Kor",
    )
    wrong = played(chat, task, 1, ["<answer>Mur</answer>"], [], status="answered", answer="Mur")
    bad = played(chat, task, 2, ["<think>x"], [], status="format_error", error="unclosed_tag")
    bad.memory["why"] = "a <think> tag has no partner"
    right.pages = ["http://w1.test/Belin"]
    return Group(position, 4, [right, wrong, bad])


REWARDS = [Reward(1.0, 1.0, parts={"correct": 1.0}), Reward(0.0, 0.0), Reward(-0.5, 0.0, False)]
CREDITS = [[0.9, 0.95, 1.0], [-0.25], [-0.75]]


def recorded(chat, step, groups, kept, credits, stale) -> list[dict]:
    """The records of an update, whose rows train.py makes."""
    rows = []
    for group, kept_of, by_turns in zip(groups, kept, credits):
        sound = [t for t in group.trajectories if t.status != "tool_fault"]
        for t, is_kept, by_turn in zip(sound, kept_of, by_turns):
            rows += rows_of(t, by_turn, step - 1, stale) if is_kept else []
    return update_records(step, groups, rows, [REWARDS] * len(groups), kept, credits, chat)


def write_run(folder, chat, results, steps=(1, 2, 3), scores=(1.0, 0.0, 0.0)):
    """The folder of a run, as train.py leaves it: a group for each of these results an update."""
    (folder / "checkpoint").mkdir(parents=True)
    shutil.copy(ROOT / "data/nano/tokenizer.json", folder / "checkpoint")
    lines = []
    for step in steps:
        groups = [group_of(chat, step * 10 + n, result) for n, result in enumerate(results)]
        count = len(groups)
        scored = ([[True, True, False]] * count, [CREDITS] * count)
        lines += to_lines(recorded(chat, step, groups, *scored, "keep"))
    (folder / "trajectories.jsonl").write_text("".join(lines))
    metrics = [
        {
            "step": step,
            "pass_rate": step / 10,
            "reward": 0.1,
            "entropy": float("nan"),
            "pass_rate_by_family": {"hop": 0.5},
            "reward_parts": {"correct": 0.3},
        }
        for step in steps
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(m) + "\n" for m in metrics))
    evaluation = {"split": "test", "n": 3, "pass@1": 1 / 3, "pass@1_ci": [0.1, 0.6]}
    tasks = {f"t{n}": score for n, score in enumerate(scores)}
    evaluations = [evaluation | {"step": step, "scores": tasks} for step in (0, 3)]
    (folder / "evaluations.jsonl").write_text("".join(json.dumps(e) + "\n" for e in evaluations))
    (folder / "config.json").write_text(json.dumps({"gamma": 0.95, "out": str(folder)}))
    return folder


# ------------------------------------------------------------------------------------- the lines


def test_a_line_holds_everything_that_is_known_of_a_trajectory(chat):
    group = group_of(chat, 3, "Belin is in Kor.")
    fault = Trajectory(group.trajectories[0].task, (0, 0, 7, 3, 0), status="tool_fault")
    group.trajectories.insert(1, fault)
    records = recorded(chat, 5, [group], [[True, False, True]], [CREDITS], "mask")
    right, failed, dropped, bad = map(json.loads, to_lines(records))
    assert (right["step"], right["group"], right["index"]) == (5, 3, 0)
    assert [turn["advantage"] for turn in right["turns"]] == [0.9, 0.95, 1.0]
    assert [turn["in_loss"] for turn in right["turns"]] == [True] * 3  # version 4 is update 5's
    assert right["turns"][0]["text"] == CALL + "<|im_end|>"
    assert right["turns"][0]["results"] == ["Belin is in Kor."]
    assert {turn["version"] for turn in right["turns"]} == {4}
    [segment] = right["segments"]
    original = group.trajectories[0].segments[0]
    assert segment["ids"] == original.ids and segment["turn_of"] == original.turn_of
    assert segment["logprobs"] == pytest.approx(original.logprobs, abs=1e-4)
    assert failed["reward"] is None and failed["kept"] is False and failed["turns"] == []
    assert dropped["kept"] is False and not dropped["turns"][0]["in_loss"]
    assert bad["error"] == "unclosed_tag" and "no partner" in bad["why"]
    assert (right["correct"], right["reward"], right["reward_parts"]) == (1.0, 1.0, {"correct": 1})


@pytest.mark.parametrize("stale, in_loss", [("mask", False), ("is", True), ("keep", True)])
def test_tokens_of_older_weights_are_in_the_loss_as_the_flag_says(chat, stale, in_loss):
    group = group_of(chat, 3, "r")
    records = recorded(chat, 6, [group], [[True] * 3], [CREDITS], stale)
    assert {turn["in_loss"] for record in records for turn in record["turns"]} == {in_loss}


def test_no_advantage_is_not_in_the_loss(chat):
    credits = [[0.0, 0.5, 0.0], [0.0], [0.0]]
    [group] = [group_of(chat, 3, "r")]
    right = recorded(chat, 5, [group], [[True] * 3], [credits], "mask")[0]
    assert [turn["in_loss"] for turn in right["turns"]] == [False, True, False]


@pytest.mark.parametrize("steps", [1, 7, 60, 100])
@pytest.mark.parametrize("most", [0, 1, 3, 60, 1000])
def test_at_most_so_many_updates_are_written_and_the_last_is_one(steps, most):
    written = [step for step in range(1, steps + 1) if is_written(step, steps, most)]
    assert len(written) <= most and (not most or written[-1] == steps)
    assert most < steps or len(written) == steps


def test_a_long_result_is_cut_and_resume_cuts_the_lines(chat, tmp_path):
    folder = write_run(tmp_path / "run", chat, ["r " * 50_000])
    path = folder / "trajectories.jsonl"
    assert path.stat().st_size < 100_000
    cut_lines(path, 2)
    assert {json.loads(line)["step"] for line in path.read_text().splitlines()} == {1, 2}


def test_a_public_benchmark_leaves_no_text(chat):
    [right, *_] = group_of(chat, 3, "Belin is in Kor.", "A secret question?").trajectories
    text = json.dumps(without_texts(record_of(right, chat), "c4n4ry"))
    assert not any(word in text for word in ("secret", "Belin", "Kor")) and "c4n4ry" in text


# ------------------------------------------------------------------------------------ statistics


def test_behaviours_are_counted(chat):
    right, wrong, bad = (
        behaviour_of(r | {"correct": 0.0})
        for r in (record_of(t, chat) for t in group_of(chat, 3, "error: no").trajectories)
    )
    assert right["turns"] == 3 and right["calls of search"] == 2 and right["queries"] == 2
    assert right["repeated queries"] == 1 and right["pages opened"] == 1
    assert right["errors of tools"] == 2 and right["words inside <think>"] == 2
    assert wrong["share answered"] == 1 and "calls of search" not in wrong
    assert bad["share with format error: unclosed_tag"] == 1 and bad["share answered"] == 0


def test_differences_are_paired_on_the_same_tasks():
    rng = np.random.default_rng(1)
    hard = rng.random(200) < 0.5
    a = {f"t{n}": float(x) for n, x in enumerate(hard)}
    b = {task: min(1.0, x + float(rng.random() < 0.1)) for task, x in a.items()}
    middle, low, high, tasks = difference(a, b, True)
    assert tasks == 200 and 0 < low < middle < high < 0.12
    other = {f"other {task}": x for task, x in b.items()}
    middle_apart, low_apart, high_apart, tasks = difference(a, other, True)
    assert tasks == 0 and middle_apart == pytest.approx(middle)
    assert high_apart - low_apart > 2 * (high - low)


def test_no_difference_seen_does_not_prove_that_there_is_none():
    same = {"a": 1.0, "b": 0.0}
    middle, low, high, tasks = difference(same, same, True)
    assert middle == 0 and low == -high < 0 and tasks == 2
    middle, low, high, tasks = difference({"a": 0.0}, {"b": 0.0}, True)
    assert middle == 0 and low == -high < 0 and tasks == 0


@pytest.mark.parametrize("b", [{"a": 130.0}, {"b": 130.0}, {"b": 130.0, "c": 130.0}])
def test_nothing_is_clear_where_nothing_varies(b):
    found = difference({"a": 100.0}, b, False)
    assert found[0] == 30 and not is_clear(found)
    assert shown_difference("tokens", found) == "+30.00"


def test_attempts_at_a_task_in_several_updates_count_as_one_task():
    behaviours = {step: [("t1", {"turns": step}), ("t2", {"turns": 5.0})] for step in (1, 3)}
    assert by_task(behaviours, [1, 3]) == {"turns": {"t1": 2.0, "t2": 5.0}}


def test_tables_name_what_differs_most_clearly_first(chat, tmp_path):
    one = read_run(write_run(tmp_path / "one", chat, ["r"] * 5))
    results = ["error: r"] * 4 + ["r"]
    two = read_run(write_run(tmp_path / "two", chat, results, scores=(1.0, 1.0, 1.0)))
    table = behaviour_table([one, two])
    assert table["rows"][0]["cells"][0] == "errors of tools" and table["rows"][0]["clear"]
    assert [row["cells"][0] for row in table["rows"] if row["clear"]] == ["errors of tools"]
    alone = behaviour_table([one])
    assert alone["head"][1:3] == ["updates 1 to 1", "updates 3 to 3"]
    rows = held_out_table([one, two])["rows"]
    assert rows[1]["cells"][-1].startswith("+66.7 points") and "paired" in rows[1]["cells"][-1]
    assert len(behaviour_table([one | {"behaviours": {1: one["behaviours"][1]}}])["head"]) == 2


def test_a_run_under_way_shows_the_split_that_was_asked_last(chat, tmp_path):
    run = read_run(write_run(tmp_path / "one", chat, ["r"]))
    assert held_out(run)[-1]["split"] == "test" and not held_out(run | {"evaluations": []})
    run["evaluations"].pop()  # the one at its end
    run["evaluations"] += [
        run["evaluations"][0] | {"split": "dev", "step": step} for step in (1, 2)
    ]
    assert [(e["split"], e["step"]) for e in held_out(run)] == [("dev", 1), ("dev", 2)]


def test_what_is_no_flag_is_none_in_the_table(chat, tmp_path):
    runs = [read_run(write_run(tmp_path / name, chat, ["r"])) for name in ("one", "two")]
    for number, run in enumerate(runs):
        run["config"] |= {"gamma": number, "commit": f"c{number}", "packages": {"torch": number}}
    assert [row["cells"][0] for row in flag_table(runs)["rows"]] == ["--gamma", "commit"]


def test_a_part_of_the_reward_that_nobody_had_is_zero(chat, tmp_path):
    metrics = write_run(tmp_path / "one", chat, ["r"]) / "metrics.jsonl"
    first, second, third = map(json.loads, metrics.read_text().splitlines())
    lines = [first, second | {"reward_parts": {}}, third]
    metrics.write_text("".join(json.dumps(line) + "\n" for line in lines))
    run = read_run(tmp_path / "one")
    assert metric("reward_parts", "correct")(run) == [[1, 0.3], [2, 0.0], [3, 0.3]]
    assert metric("pass_rate_by_family", "other")(run) == []
    assert metric("reward_parts", "of another run")(run) == []


def test_attempts_that_the_environment_failed_do_not_vary(chat):
    group = group_of(chat, 3, "r")
    group.trajectories[0].status = "tool_fault"
    records = recorded(chat, 5, [group], [[False, True, True]], [CREDITS], "mask")
    for record in records[1:]:
        record["reward"] = 1.0
    pack(records, Pieces(chat.tokenizer.backend_tokenizer))
    assert records[0]["reward"] is None and "variance 0.00" in records[0]["about"]


def test_one_update_and_a_part_with_a_dollar_are_drawn(tmp_path):
    metrics = {"step": 1, "pass_rate": 0.0, "turns": 3.0, "entropy": 0.1, "reward": 0.0}
    (tmp_path / "metrics.jsonl").write_text(json.dumps(metrics | {"reward_parts": {"$a_$": 1.0}}))
    found = figures([[0.0]] * 11, 0) | {"step": 0, "split": "test"}  # none of eleven is right
    (tmp_path / "evaluations.jsonl").write_text(json.dumps(found))
    draw_curves(tmp_path)
    assert (tmp_path / "curves.png").stat().st_size > 10_000


# ------------------------------------------------------------------------------ tokens as texts


def test_pieces_join_to_the_text_also_where_tokens_share_a_character(chat):
    pieces = Pieces(chat.tokenizer.backend_tokenizer)
    for text in ("Belin: é 漢字 🦔🦔 end", "\u202ex", " two  blanks", "<think>a</think>"):
        ids = chat.trusted(text)
        places = pieces.places(ids)
        assert len(places) == len(ids)
        assert "".join(pieces.texts[place] for place in places) == chat.text_of(ids)


def test_parts_of_a_turn():
    def kinds(*texts):
        return [(kind, "".join(texts[a:b])) for kind, a, b in parts_of(list(texts))]

    assert kinds("<think>", "a", "</think>", "<answer>b", "</answer>", "<|im_end|>") == [
        ("think", "<think>a</think>"),
        ("answer", "<answer>b</answer><|im_end|>"),
    ]
    assert kinds("x ", "<tool_call>", "{}") == [("", "x "), ("call", "<tool_call>{}")]
    assert kinds("so", "</think>") == [("", "so</think>")]
    assert kinds() == []


# ------------------------------------------------------------------------------------- the page


@pytest.fixture(scope="module")
def browser():
    """A headless Chromium; the tests with it are skipped where there is none."""
    api = pytest.importorskip("playwright.sync_api", reason="pip install playwright")
    path = shutil.which("chromium") or shutil.which("google-chrome")
    if not path:
        pytest.skip("apt-get install chromium")
    with api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def report(tmp_path_factory, chat):
    """The page of two runs; the second one's results are hostile."""
    folder = tmp_path_factory.mktemp("runs")
    write_run(folder / "plain", chat, ["Belin is in Kor.", "Belin lies in Kor."])
    write_run(folder / "hostile", chat, HOSTILE)
    write_report([folder / "plain", folder / "hostile"], folder / "report.html")
    return folder / "report.html"


@pytest.fixture
def page(browser, report):
    """The page, opened without a network; a test fails if its console says anything."""
    context = browser.new_context(offline=True)
    page, complaints = context.new_page(), []
    page.on("console", lambda message: complaints.append(message.text))
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on("request", lambda r: r.url.startswith("file:") or complaints.append(r.url))
    page.goto(report.as_uri())
    page.wait_for_selector("#detail .card")
    yield page
    context.close()
    assert complaints == []


def until(page, expression: str) -> None:
    """Wait until an expression is true (the page's own policy forbids wait_for_function's way)."""
    for _ in range(400):
        if page.evaluate(expression):
            return
        page.wait_for_timeout(25)
    raise AssertionError(f"{expression} is never true; the address is {at(page)}")


def at(page) -> str:
    return page.evaluate("location.hash")


def test_a_click_on_a_point_shows_the_groups_of_that_update(page):
    figure = page.locator("figure", has_text="Pass@1 on training tasks")
    figure.locator("circle[data-run='1'][data-step='3']").click()
    until(page, "location.hash.startsWith('#hostile/3/')")
    figure.locator("circle[data-run='0'][data-step='2']").dispatch_event("click")
    until(page, "location.hash.startsWith('#plain/2/')")
    names = page.locator("#list button[data-name]").evaluate_all(
        "all => all.map(b => b.dataset.name)"
    )
    assert names == ["2/20.0", "2/20.1", "2/20.2", "2/21.0", "2/21.1", "2/21.2"]
    assert page.locator("#update").input_value() == "2"
    assert page.locator("#trajectories").is_visible()


def test_hover_shows_the_values_of_all_runs(page):
    figure = page.locator("figure", has_text="Pass@1 on training tasks")
    figure.locator("svg").hover()
    tip = page.locator("#tip").inner_text()
    assert "update 2" in tip and "plain  20%" in tip and "hostile  20%" in tip


def test_a_trajectory_shows_its_turns_and_its_tokens(page):
    page.evaluate("go(3, ['30.0'], 0)")
    until(page, "location.hash === '#plain/3/30.0'")
    detail = page.locator("#detail").inner_text()
    for words in ("✓ answer: Kor", "truth: Kor", "weights 4", "decode 1.50 s", "tools 0.25 s"):
        assert words in detail
    assert "advantage +0.900" in detail and "result of search" in detail
    colours = "all => all.map(e => e.getAttribute('style'))"
    tokens = page.locator("#detail .card").first.locator(".token")
    assert all("--good" in style for style in tokens.evaluate_all(colours))
    page.keyboard.press("c")
    assert all("--odd" in style for style in tokens.evaluate_all(colours))
    page.keyboard.press("v")
    shown = page.locator("#detail .text").inner_text()
    assert "Where is Belin?" in shown and "<answer>Kor</answer>" in shown
    page.evaluate("go(3, ['30.2'], 0)")
    page.wait_for_selector("text=format_error: unclosed_tag: a <think> tag has no partner")
    assert "dropped as a negative" in page.locator("#detail").inner_text()


def test_filters_and_search_change_what_is_shown(page):
    page.select_option("#run", "0")
    until(page, "location.hash.startsWith('#plain')")
    count = page.locator("#count")
    assert count.inner_text() == "6 of 6 trajectories"
    for id, value, words in (
        ("status", "format_error", "2 of 6"),
        ("family", "hop", "3 of 6"),
        ("reward", "correct", "2 of 6"),
        ("reward", "not correct", "4 of 6"),
        ("reward", "below zero", "2 of 6"),
        ("reward", "dropped", "2 of 6"),
    ):
        page.select_option(f"#{id}", value)
        assert count.inner_text().startswith(words), (id, value)
        assert page.locator("#list button[data-name]").count() == int(words[0])
        page.select_option(f"#{id}", "")
    page.fill("#search", "LIES in kor")
    assert count.inner_text() == "1 of 6 trajectories"
    page.check("#everywhere")
    until(page, "document.getElementById('count').textContent.startsWith('3 of 18')")
    page.fill("#search", "nowhere to be found")
    assert count.inner_text() == "0 of 18 trajectories"


def test_hostile_texts_stay_text(page):
    for n, text in enumerate(HOSTILE):
        page.evaluate(f"go(2, ['{20 + n}.0'], 1)")
        until(page, f"location.hash === '#hostile/2/{20 + n}.0'")
        shown = page.locator("#detail .card").first.locator(".part").last.inner_text()
        start = re.split("[\u2028\u202e\ud800]", text)[0][:1000]
        assert start in shown, text[:40]
    for mark in ("⟨U+2028⟩", "⟨U+202E⟩"):
        page.fill("#search", "")
        assert mark in page.evaluate(f"visible({json.dumps(''.join(HOSTILE[:5]))})")
    assert page.evaluate("window.hit") is None
    assert page.locator("#detail img, #detail script").count() == 0
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")


def test_a_megabyte_in_one_line_is_clipped_and_shown_on_demand(page):
    page.evaluate("go(2, ['20.0'], 1)")
    width = "document.documentElement.scrollWidth <= innerWidth"
    page.evaluate("document.body.append(clipped('w'.repeat(1e6)))")
    button = page.get_by_role("button", name="all 1000000")
    assert page.evaluate("document.body.lastChild.textContent.length") < 4000
    button.click()
    assert page.evaluate("document.body.lastChild.textContent.length") == 1_000_000
    assert page.evaluate(width.replace("<= innerWidth", "> 0"))


def test_everything_is_reached_by_keyboard_and_the_address_keeps_the_place(page, report):
    page.evaluate("go(2, [], 0)")
    until(page, "location.hash === '#plain/2/20.0'")
    page.keyboard.press("j")
    until(page, "location.hash === '#plain/2/20.1'")
    page.keyboard.press("b")
    until(page, "location.hash === '#plain/2/20.1%2B20.0'")
    assert page.locator("#detail h3").count() == 2
    page.keyboard.press("k")
    until(page, "location.hash === '#plain/2/20.0'")
    page.keyboard.press("ArrowRight")
    until(page, "location.hash === '#plain/3/30.0'")
    page.keyboard.press("/")
    page.keyboard.type("jc")  # in the field these are letters
    assert page.locator("#search").input_value() == "jc" and at(page) == "#plain/3/30.0"
    page.locator("figure svg").first.focus()
    page.keyboard.press("ArrowLeft")
    assert page.locator("#tip").is_visible()
    page.keyboard.press("Enter")
    until(page, "location.hash !== '#plain/3/30.0'")
    page.goto(report.as_uri() + "#hostile/2/21.1+21.2")
    page.reload()
    page.wait_for_selector("#detail .card")
    assert page.locator("#detail h3").count() == 2
    assert page.locator("#list [aria-current=true]").count() == 2


def test_the_timeline_has_a_row_a_slot(page):
    page.evaluate("go(2, [], 0)")
    page.locator("#slots summary").click()
    bars = page.locator("#slots svg path[stroke='var(--decode)']")
    bars.first.wait_for(state="attached")  # it is drawn after the click
    assert bars.count() == 2 * (3 + 1 + 1)
    page.locator("#slots svg g").last.dispatch_event("click")
    until(page, "location.hash.startsWith('#plain/2/2')")


CONTRAST = """() => {
  const canvas = document.createElement("canvas").getContext("2d", { willReadFrequently: true });
  const over = (under, colour) => {
    canvas.fillStyle = `rgb(${under})`; canvas.fillRect(0, 0, 1, 1);
    canvas.fillStyle = colour; canvas.fillRect(0, 0, 1, 1);
    return [...canvas.getImageData(0, 0, 1, 1).data].slice(0, 3);
  };
  const light = rgb => rgb.map(c => c / 255).map(c => c <= .04045 ? c / 12.92 : ((c + .055) / 1.055) ** 2.4)
    .reduce((sum, c, k) => sum + c * [.2126, .7152, .0722][k], 0);
  const worst = [9, ""];
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walker.nextNode()) {
    const node = walker.currentNode.parentElement;
    if (!walker.currentNode.data.trim() || !node.checkVisibility() || node.closest("script, svg, option")) continue;
    const above = [];
    for (let e = node; e; e = e.parentElement) above.unshift(getComputedStyle(e).backgroundColor);
    const back = above.reduce(over, [255, 255, 255]);
    const [a, b] = [light(back), light(over(back, getComputedStyle(node).color))];
    const ratio = (Math.max(a, b) + .05) / (Math.min(a, b) + .05);
    if (ratio < worst[0]) [worst[0], worst[1]] = [ratio, walker.currentNode.data.slice(0, 60)];
  }
  return worst;
}"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 1280])
def test_it_is_readable_in_the_dark_and_on_a_phone(page, scheme, width):
    page.emulate_media(color_scheme=scheme)
    page.set_viewport_size({"width": width, "height": 800})
    for name in ("30.0", "30.2"):
        page.evaluate(f"go(3, ['{name}'], 0)")
        until(page, f"location.hash === '#plain/3/{name}'")
        ratio, text = page.evaluate(CONTRAST)
        assert ratio >= 4.5, text  # WCAG AA
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")


# ------------------------------------------------------------------------------------ the command


def test_the_command_writes_one_file_that_asks_for_nothing(chat, tmp_path, run_here):
    write_run(tmp_path / "a" / "run", chat, HOSTILE[:4])
    write_run(tmp_path / "b" / "run", chat, ["plain"])
    (tmp_path / "a" / "run" / "checkpoint" / "tokenizer.json").unlink()  # then no tokens are shown
    out = tmp_path / "page.html"
    done = run_here("report.py", tmp_path / "a" / "run", tmp_path / "b" / "run", "--out", out)
    assert done.returncode == 0 and str(out) in done.stdout, done.stderr
    text = out.read_text(encoding="utf-8")
    assert text.count("</script>") == 2 and "<!--" not in text
    assert not re.search(r"""(src|href)=|@import|url\(""", text)
    data = json.loads(text.split('id="data">')[1].split("</script>")[0])
    assert len({run["name"] for run in data["runs"]}) == 2


DAMAGED = [
    ("metrics.jsonl", '{"step": 2}\n[1, 2]\n{"step": 3, "rew'),
    ("evaluations.jsonl", '{"step": 2, "split": "test", "pass@1": NaN, "pass@1_ci": null}\n'),
    ("trajectories.jsonl", '{"step": 1, "turns": [1]}\n'),
    ("config.json", "[1]"),
]


@pytest.mark.parametrize("name, text", DAMAGED)
def test_damaged_logs_are_said_in_one_line_or_left_out(chat, tmp_path, run_here, name, text):
    write_run(tmp_path / "run", chat, ["r"])
    with open(tmp_path / "run" / name, "a" if name == "metrics.jsonl" else "w") as file:
        file.write(text)
    done = run_here(main, tmp_path / "run", "--out", tmp_path / "page.html")
    assert len(done.stderr.splitlines()) == done.returncode and "Traceback" not in done.stderr
    if done.returncode == 0:
        page = (tmp_path / "page.html").read_text(encoding="utf-8")
        assert "NaN" not in page.split('id="data">')[1].split("</script>")[0]


@pytest.mark.parametrize("damage", ["absent", "empty", "older"])
def test_a_folder_without_a_run_is_said_in_one_line(chat, tmp_path, run_here, damage):
    folder = tmp_path / "run"
    if damage != "absent":
        write_run(folder, chat, ["r"])
    if damage == "empty":
        (folder / "metrics.jsonl").write_text("{")
    if damage == "older":  # its lines were made for people alone
        (folder / "trajectories.jsonl").write_text('{"step": 1, "turns": 3, "text": "x"}\n')
        (folder / "evaluations.jsonl").unlink()
    done = run_here(main, folder, "--out", tmp_path / "page.html")
    if damage == "older":
        assert done.returncode == 0 and (tmp_path / "page.html").exists()
        return
    assert done.returncode == 1 and done.stderr.startswith("report.py: ")
    assert len(done.stderr.splitlines()) == 1
