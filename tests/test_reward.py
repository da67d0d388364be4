import math
import random
import sys
from fractions import Fraction
from types import SimpleNamespace

import numpy as np
import pytest

from reward import (
    Reward,
    advantages,
    control_negatives,
    correct,
    gamma_decay,
    is_negative,
    penalised,
    reward,
    turn_rewards,
)
from support.user_code import UserCodeError, load_reward


def finished(status="answered", answer="Belin", truth="Belin", answer_type="name", turns=3):
    return SimpleNamespace(
        status=status,
        answer=answer,
        task=SimpleNamespace(id="t1", answer=truth, answer_type=answer_type),
        turns=[None] * turns,
    )


def test_gamma_table_of_the_paper():
    assert [round(x, 4) for x in gamma_decay(1, 5, 0.95)] == [0.8145, 0.8574, 0.9025, 0.95, 1.0]


@pytest.mark.parametrize("T", [1, 2, 7, 60])
def test_gamma_laws(T):
    values = gamma_decay(2.0, T, 0.9)
    assert len(values) == T and values[-1] == 2.0
    assert all(later == pytest.approx(earlier / 0.9) for earlier, later in zip(values, values[1:]))
    assert gamma_decay(2.0, T, 1.0) == [2.0] * T


def test_only_correct_trajectories_are_decayed():
    assert turn_rewards(Reward(-0.5, 0, False), 3, 0.9) == [-0.5] * 3
    assert turn_rewards(Reward(0.0, 0, True), 3, 0.9) == [0.0] * 3
    assert turn_rewards(Reward(1.0, 1, True), 2, 0.5) == [0.5, 1.0]
    assert turn_rewards(Reward(-1.0, 1, True), 2, 0.5) == [-1.0, -1.0]  # else length would pay


@pytest.mark.parametrize(
    "prediction, truth, kind",
    [
        ("Belin", "Belin", "name"),
        (" the belin. ", "Belin", "name"),
        ("BELIN", ["Other", "Belin"], "name"),
        ("\nBelin \n", "Belin", "name"),
        ("Ｂelin", "Belin", "name"),
        ("1024", "1,024", "number"),
        ("1,024.0", "1024", "number"),
        ("-3", "−3", "number"),
        ("265,252,859,812,191,058,636,308,480,000,000", f"{math.factorial(30)}", "number"),
        (".5", "0.5", "number"),
        ("-.5 km", "-0.5 km", "number"),
        ("Answer: ...5", "Answer: 5", "name"),
        ("1e30", "1" + "0" * 30, "number"),
        ("12 km", "12 km", "number"),
        ("12 March 1990", "1990-03-12", "date"),
        ("March 12th, 1990", "1990-3-12", "date"),
        ("1990", "1990", "date"),
        ("$5", "$5", "number"),
        ("-$5.00", "-$5", "number"),
        ("5 m²", "5 m^2", "number"),
        ("50 %", "50%", "number"),
        ("about twenty", "About twenty", "number"),
        ("Mar 12, 1990", "1990-03-12", "date"),
        ("１９９０", "1990", "date"),
        ("Sept. 1990", "Sept. 1990", "date"),
        ("circa 1990", "circa 1990", "date"),
        ("circa 1990", ["1990", "circa 1990"], "date"),
        ("Twelve.", ["12", "twelve"], "number"),
        ("12.0", ["twelve", "12"], "number"),
        ("C++", "c++", "name"),
        ("♥", "♥", "name"),
        ("x<y", "x < y.", "name"),
        ("¬A∧B", "¬A ∧ B", "name"),
        ("A+B", "A + B", "name"),
        ("P=NP", "P = NP", "name"),
        ("> Belin", "Belin", "name"),
        ("-5", "−5", "name"),
        ("Paris, Texas", "Paris, Texas", "name"),
        ("x" * 300, "x" * 300, "name"),
        ("Cafe\u0301", "Café", "name"),
        ("Rome; Paris, Texas", ["Paris, Texas", "Rome"], "list"),
        ("Trinidad and Tobago, Rome", ["Rome", "Trinidad and Tobago"], "list"),
        ("B, A and C", ["A", "B", "C"], "list"),
        ("a;b", "b, a", "list"),
        ("Oslo, Bergen", "Bergen\nOslo\n", "list"),
        # Marks that are optional, and the ways to write one letter.
        ("مُحَمَّد", "محمد", "name"),
        ("محمـــد", "محمد", "name"),
        ("مُحَمَّد، علي", ["محمد", "علي"], "list"),
        ("מֹשֶׁה", "משה", "name"),
        ("İstanbul", "Istanbul", "name"),
        ("I\u0307stanbul", "istanbul", "name"),
        ("Straße", "STRASSE", "name"),
        ("दिन", "दिन", "name"),
        ("か\u3099", "が", "name"),
        ("O’Brien", "O'Brien", "name"),
        ("Be\xadlin", "Belin", "name"),
        ("½", "1/2", "name"),
        ("1½", "1 1/2", "name"),
        ("1 / 2", "1/2", "name"),
        # Customary spellings of lists.
        ("北京、上海、广州", ["北京", "上海", "广州"], "list"),
        ("北京、上海和广州", "广州、北京、上海", "list"),
        ("Oslo, Bergen & Bodo", ["Oslo", "Bergen", "Bodo"], "list"),
        ("Oslo & Bergen", ["Bergen", "Oslo"], "list"),
        ("1. Oslo\n2. Bergen", ["Oslo", "Bergen"], "list"),
        ("(1) Oslo\n(2) Bergen", ["Oslo", "Bergen"], "list"),
        ("- Oslo\n- Bergen", ["Oslo", "Bergen"], "list"),
        ("• Oslo • Bergen", ["Oslo", "Bergen"], "list"),
        ("1. FC Köln\n2. Bundesliga", ["1. FC Köln", "2. Bundesliga"], "list"),
        ("Simon & Garfunkel; Oslo", ["Oslo", "Simon & Garfunkel"], "list"),
        ("Oslo / Bergen", ["Oslo", "Bergen"], "list"),
        ('["Oslo", "Bergen"]', ["Oslo", "Bergen"], "list"),
        ("1,024, 2,048", ["1024", "2048"], "list"),
        ("100,200,300", ["100", "200", "300"], "list"),
        # Of numbers.
        ("12\u202f345", "12345", "number"),
        ("12 345.5", "12,345.5", "number"),
        ("12'345", "12345", "number"),
        ("12,34,567", "1234567", "number"),
        ("42 people", "42", "number"),
        ("42 square miles", "42", "number"),
        ("1,024", "1024", "name"),
        ("12\u202f345", "12345", "name"),
        ("5 million", "5,000,000", "number"),
        ("5.2 million people", "5200000", "number"),
        ("Mon, 12 Mar 1990", "1990-03-12", "date"),
        ("Thur. March 12, 1990", "1990-03-12", "date"),
        ("1990 March 12", "12 March 1990", "date"),
        ("1990-Mar-12", "12 March 1990", "date"),
        ("12/Mar/1990", "1990-03-12", "date"),
        ("12th March of 1990", "1990-03-12", "date"),
        ("2 hundred thousand", "200000", "number"),
        ("5 hundred people", "500", "number"),
        ("$5 million", "$5,000,000", "number"),
        ("5 percent", "5%", "number"),
        ("5 per cent", "5%", "number"),
        # Of dates.
        ("1990/03/12", "1990-03-12", "date"),
        ("1990.3.12", "1990-03-12", "date"),
        ("the 12th of March 1990", "1990-03-12", "date"),
        ("Monday, March 12, 1990", "1990-03-12", "date"),
        ("Monday 12 March 1990", "1990-03-12", "date"),
        ("on March the 12th, 1990", "12 March 1990", "date"),
        ("12-Mar-1990", "1990-03-12", "date"),
        ("Sept 3, 1990", "1990-09-03", "date"),
        ("1990年3月12日", "1990-03-12", "date"),
        ("1990년 3월 12일", "1990-03-12", "date"),
        ("13/04/1990", "1990-04-13", "date"),
        ("04/13/1990", "1990-04-13", "date"),
        ("04.04.1990", "1990-04-04", "date"),
    ],
)
def test_right_answers(prediction, truth, kind):
    assert correct(prediction, truth, kind) == 1.0


@pytest.mark.parametrize(
    "prediction, truth, kind",
    [
        ("", "Belin", "name"),
        (None, "Belin", "name"),
        ("  ", "Belin", "name"),
        ("...", "Belin", "name"),
        ("Belin, Kor", "Belin", "name"),
        ("Belin or Kor", "Belin", "name"),
        ("Belin Kor Tal", "Belin", "name"),
        ("not Belin", "Belin", "name"),
        ("Beli", "Belin", "name"),
        ("Belin" * 100, "Belin", "name"),
        ("Belin\nKor", "Belin", "name"),
        ("Belin/Kor", "Belin", "name"),
        ("the", "Belin", "name"),
        ("1", "21", "number"),
        ("21", "1", "number"),
        ("-21", "21", "number"),
        ("21 22", "21", "number"),
        ("21, 22", "21", "number"),
        ("21 km", "21 m", "number"),
        ("2.1", "21", "number"),
        (f"{math.factorial(30) + 1}", f"{math.factorial(30)}", "number"),
        ("twenty", "20", "number"),
        ("13", ["12", "twelve"], "number"),
        ("12 twelve", ["12", "twelve"], "number"),
        ("12, twelve", ["12", "twelve"], "number"),
        ("1e999999", "1", "number"),
        ("", "0", "number"),
        ("10²", "102", "number"),
        ("5²", "52", "name"),
        ("C", "C++", "name"),
        ("A ∧ B", "A ∨ B", "name"),
        ("2", "√2", "name"),
        ("x < y", "x > y", "name"),
        ("x >= 5", "x <= 5", "name"),
        ("B", "A + B", "name"),
        ("e^{x}", "e^{-x}", "name"),
        ("x", "-x", "name"),
        ("♥", "♠", "name"),
        ("!", "?", "name"),
        ("∞", "0", "number"),
        ("C#", "C++", "name"),
        ("5", "-5", "name"),
        ("5", "5%", "name"),
        ("35", "3.5", "name"),
        (".5", "5", "name"),
        ("-.5", "5", "name"),
        (".5", "5", "number"),
        ("£5", "$5", "number"),
        ("21 or 22", "21", "number"),
        ("not 21", "21", "number"),
        ("21 km or 22 km", "21 km", "number"),
        ("5.000", "5000", "number"),
        ("m 21", "21", "number"),
        ("not 1990", "1990", "date"),
        ("3 1990", "1990-03", "date"),
        ("yes and no", "yes", "name"),
        ("yes no", "yes", "name"),
        ("Belin (not Kor)", "Belin", "name"),
        ("Bel\u200bin", "Belin", "name"),
        ("<answer>Belin", "Belin x", "name"),
        ("A and B and C", ["A", "B"], "list"),
        ("A" + ", A" * 50, ["A"], "list"),
        ("1990-03-13", "1990-03-12", "date"),
        ("1990", "1990-03-12", "date"),
        ("1990-13-12", "1990-12-13", "date"),
        ("1990 1991", "1990", "date"),
        ("A, B, C, D", ["A", "B", "C"], "list"),
        ("A, B", ["A", "B", "C"], "list"),
        ("A, A, B", ["A", "B"], "list"),
        ("", ["A"], "list"),
        ("दान", "दिन", "name"),
        ("बाल", "बोल", "name"),
        ("मीत", "मात", "name"),
        ("กา", "กี", "name"),
        ("résumé", "resume", "name"),
        ("1 2", "1/2", "name"),
        ("1 2", "1/2", "number"),
        ("1 2", "½", "name"),
        ("11/2", "1½", "name"),
        ("100、200", "100200", "name"),
        ("Oslo, Bergen & Bodo", ["Oslo", "Bergen"], "list"),
        ("1.5, 2.5", ["5", "6"], "list"),
        ("1. Oslo\n2. Bergen\n3. Bodo", ["Oslo", "Bergen"], "list"),
        ("5 million", "5", "number"),
        ("5", "5 million", "number"),
        ("5 m", "5", "number"),
        ("5k", "5", "number"),
        ("5 mn", "5", "number"),
        ("5万人", "5", "number"),
        ("5 लाख", "5", "number"),
        ("5%", "5", "number"),
        ("5 percent", "5", "number"),
        ("5 dozen", "5", "number"),
        ("5 halves", "5", "number"),
        ("42 people", "42 km", "number"),
        ("42Sikgok", "42", "number"),
        ("5 quadrillion", "5", "number"),
        ("5 hundredths", "5", "number"),
        ("5 is wrong", "5", "number"),
        ("42 no", "42", "number"),
        ("2 hundred thousand", "200", "number"),
        ("<5", ">5", "name"),
        ("≤5", "≥5", "number"),
        ("2=3", "2≠3", "name"),
        ("42", "42 km", "number"),
        ("21 twenty", "21", "number"),
        ("21 or more", "21", "number"),
        ("12.345", "12345", "number"),
        ("1234 567", "1234567", "number"),
        ("03/04/1990", "1990-03-04", "date"),
        ("03/04/1990", "1990-04-03", "date"),
        ("3.4.1990", "1990-04-03", "date"),
        ("13/14/1990", "1990-13-14", "date"),
        ("1990/91", "1990-91", "date"),
        ("12 March 1990 or 13 March 1990", "1990-03-12", "date"),
    ],
)
def test_wrong_answers_and_spam(prediction, truth, kind):
    assert correct(prediction, truth, kind) == 0.0


def test_unknown_answer_type_is_refused():
    with pytest.raises(ValueError, match="unknown answer type"):
        correct("a", "a", "poem")


@pytest.mark.parametrize("status", ["format_error", "over_context", "over_turns"])
def test_format_failure_is_penalised_and_correctness_not_looked_at(status):
    outcome = reward(finished(status))  # its answer would be right
    assert outcome == Reward(0.0, 0.0, False, {})  # how much it costs is the trainer's business
    outcome = penalised(outcome, 0.3)
    assert outcome == Reward(-0.3, 0.0, False, {"format": -0.3})


def test_the_penalty_holds_whatever_a_reward_function_gave():
    assert penalised(Reward(5.0, 1.0, False, {"pages": 2.0}), 0.5) == Reward(
        -0.5, 0.0, False, {"pages": 2.0, "format": -0.5}
    )
    fine = Reward(0.25, 1.0, True, {"pages": 2.0})
    assert penalised(fine, 0.5) == fine


def test_tool_fault_is_no_format_failure():
    outcome = reward(finished("tool_fault"))
    assert outcome.total == 0 and outcome.format_ok


def test_our_baseline_leave_one_out_by_hand():
    result = advantages([[1.0], [0.0], [0.0], [-0.5]])
    by_hand = [1.0 - (-0.5 / 3), 0.0 - 0.5 / 3, 0.0 - 0.5 / 3, -0.5 - 1 / 3]
    assert [steps[0] for steps in result] == pytest.approx(by_hand)


def test_our_advantages_obey_their_laws():
    rng = random.Random(0)
    for _ in range(50):
        T = rng.randint(1, 6)
        group = [
            gamma_decay(1, T, 0.9) if rng.random() < 0.5 else [0.0] * T
            for _ in range(rng.randint(2, 8))
        ]
        result = advantages(group)
        for i in range(T):  # equal lengths: each step has mean zero
            assert sum(steps[i] for steps in result) == pytest.approx(0)
        equal = gamma_decay(rng.random(), T, 0.95)
        for count in range(2, 17):  # to the last bit, so that there is no gradient
            assert advantages([equal] * count) == [[0.0] * T] * count
    assert advantages([[1.0, 1.0]]) == [[0.0, 0.0]]  # alone in its group
    assert advantages([[1.0, 1.0], [0.5]], "none") == [[1.0, 1.0], [0.5]]


def test_our_baseline_a_longer_correct_trajectory_gets_less_than_a_shorter_one():
    short, long = advantages([gamma_decay(1, 2, 0.9), gamma_decay(1, 5, 0.9)])
    assert min(short) > 0 > max(long[:-1]) and long[-1] == 0


def test_our_negative_control():
    right, wrong, bad = Reward(1, 1, True), Reward(0, 0, True), Reward(-0.5, 0, False)
    assert control_negatives([right, wrong, wrong, wrong, bad], 2) == [
        True,
        True,
        False,
        False,
        True,
    ]  # format failures first
    assert control_negatives([wrong, wrong, bad, bad], 2) == [
        True,
        True,
        True,
        False,
    ]  # no positive: one of those below the mean stays
    assert control_negatives([right, wrong, wrong], float("inf")) == [True] * 3
    for kept in (control_negatives([right] * 4 + [wrong] * n, 0) for n in range(5)):
        assert all(kept[:4])  # positives are never dropped


def test_our_definition_of_a_negative_is_a_reward_below_the_mean():
    right, wrong, bad = Reward(1, 1), Reward(0, 0), Reward(-0.5, 0, False)
    assert [is_negative(r, [right, wrong, bad]) for r in (right, wrong, bad)] == [False, True, True]
    assert not is_negative(wrong, [wrong, bad])
    equal = [Reward(0.1, 1)] * 3  # 0.1 + 0.1 + 0.1 is a little more than 0.3
    assert not any(is_negative(r, equal) for r in equal) and all(control_negatives(equal, 0))


def test_reward_from_a_file(tmp_path):
    mine = tmp_path / "mine.py"
    mine.write_text("def short(trajectory):\n    return 1.0 / len(trajectory.turns)\n")
    for spec in (f"{mine}:short", str(mine)):  # the only function of the file need not be named
        outcome = load_reward(spec)(finished(turns=4))
        assert outcome == Reward(0.25, 1.0, True, {"short": 0.25})
    (tmp_path / "odd.py").write_text(
        "from reward import Reward\ndef f(t): return Reward(1, 1, 'yes', {'\\ud800': 1})\n"
    )
    assert load_reward(f"{tmp_path}/odd.py:f")(finished()) == Reward(1.0, 1.0, True, {"?": 1.0})
    (tmp_path / "two.py").write_text("def f(t): pass\ndef g(t): pass\n")
    (tmp_path / "none.py").write_text("from math import *\nx = 1\n")
    (tmp_path / "quits.py").write_text("raise SystemExit('bye')\n")
    (tmp_path / "wrong.py").write_text("def f(t):\n  return (\n")
    for spec, words in [
        ("nowhere.py:f", "no file 'nowhere.py'"),
        (f"{mine}:absent", "no function 'absent'"),
        ("mine", "file.py:function"),
        (f"{tmp_path}/two.py", r"name the function.*\(it defines f, g\)"),
        (f"{tmp_path}/none.py", r"name the function.*\(it defines none\)"),
        (f"{tmp_path}/quits.py:f", r"does not run \(SystemExit: bye\)"),
        (f"{tmp_path}/wrong.py:f", "does not run .SyntaxError"),
    ]:
        with pytest.raises(ValueError, match=words) as error:
            load_reward(spec)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "value, total",
    [
        (np.float32(0.5), 0.5),
        (np.int64(1), 1.0),
        (np.bool_(True), 1.0),
        (True, 1.0),
        (-3, -3.0),
        (Fraction(1, 4), 0.25),
        (Reward(np.float64(2), 1, True, {"a": np.int8(3)}), 2.0),
    ],
)
def test_any_real_number_is_a_reward(tmp_path, value, total):
    outcome = constant_reward(tmp_path, value)(finished())
    assert outcome.total == total and outcome.format_ok
    assert all(type(x) is float for x in (outcome.total, outcome.correct, *outcome.parts.values()))


class Odd:
    def __float__(self):
        return 1 / 0


@pytest.mark.parametrize(
    "value",
    [float("nan"), float("inf"), np.float32("nan"), 10**400, 10**5000, None, "1", b"1", 1j, [1.0]]
    + [Reward(float("nan"), 0), Reward(0, None), Reward(0, 0, True, {"a": 10**400})]
    + [Reward(0, 0, True, [1]), Reward(0, 0, True, 5), np.zeros(2), Odd()],
    ids=lambda value: type(value).__name__,
)
def test_anything_else_is_refused_in_one_line(tmp_path, value):
    with pytest.raises(ValueError, match="gave .* for task t1: a finite number") as error:
        constant_reward(tmp_path, value)(finished())
    assert "\n" not in str(error.value) and len(str(error.value)) < 400


def constant_reward(folder, value):
    """The function that --reward loads from a file whose function returns this value."""
    (folder / "constant.py").write_text("def constant(trajectory):\n    return constant.value\n")
    load = load_reward(f"{folder}/constant.py")
    sys.modules["user_code"].constant.value = value
    return load


@pytest.mark.parametrize("group", [[0.0, 0.0, -0.5, -0.5, -0.5], [1.0, 0.0, 0.0, -0.5]])
def test_an_infinite_ratio_keeps_all_negatives(group):
    """Also in a group without a positive, where infinity times zero is no number."""
    rewards = [Reward(total, float(total > 0), total >= 0) for total in group]
    assert all(control_negatives(rewards, float("inf")))


@pytest.mark.parametrize("status", ["format_error", "over_context", "over_turns"])
def test_a_users_reward_is_not_asked_about_format_failures(tmp_path, status):
    (tmp_path / "mine.py").write_text("def f(trajectory):\n    return 1 / 0\n")
    outcome = load_reward(f"{tmp_path}/mine.py:f")(finished(status))
    assert penalised(outcome, 0.5) == Reward(-0.5, 0.0, False, {"format": -0.5})
    with pytest.raises(UserCodeError, match="failed on task .*ZeroDivisionError"):
        load_reward(f"{tmp_path}/mine.py:f")(finished())


def test_a_reward_file_is_loaded_as_python_runs_it(tmp_path):
    """It imports modules beside it, also late; its dataclasses may postpone their annotations."""
    (tmp_path / "helper_one.py").write_text("HALF = 0.5\n")
    (tmp_path / "helper_two.py").write_text("QUARTER = 0.25\n")
    (tmp_path / "mine.py").write_text("""from __future__ import annotations
from dataclasses import dataclass
from helper_one import HALF
from reward import Reward, reward

@dataclass
class Parts:
    half: float = HALF

def _private(trajectory):
    return 0

def graded(trajectory):
    from helper_two import QUARTER
    return Reward(reward(trajectory).total * Parts().half, 1.0, True, {"quarter": QUARTER})
""")
    for spec in (f"{tmp_path}/mine.py:graded", f"{tmp_path}/mine.py"):
        outcome = load_reward(spec)(finished())
        assert outcome == Reward(0.5, 1.0, True, {"quarter": 0.25})
