import random
from types import SimpleNamespace

import pytest

from reward import (
    Reward,
    advantages,
    control_negatives,
    correct,
    gamma_decay,
    load_reward,
    reward,
    step_rewards,
)


def finished(status="answered", answer="Belin", truth="Belin", answer_type="name", turns=3):
    return SimpleNamespace(
        status=status,
        answer=answer,
        task=SimpleNamespace(answer=truth, answer_type=answer_type),
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
    assert step_rewards(Reward(-0.5, 0, False), 3, 0.9) == [-0.5] * 3
    assert step_rewards(Reward(0.0, 0, True), 3, 0.9) == [0.0] * 3
    assert step_rewards(Reward(1.0, 1, True), 2, 0.5) == [0.5, 1.0]


@pytest.mark.parametrize(
    "prediction, truth, kind",
    [
        ("Belin", "Belin", "name"),
        (" the belin. ", "Belin", "name"),
        ("BELIN", ["Other", "Belin"], "name"),
        ("Ｂelin", "Belin", "name"),
        ("1024", "1,024", "number"),
        ("1,024.0", "1024", "number"),
        ("-3", "−3", "number"),
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
        ("C++", "c++", "name"),
        ("-5", "−5", "name"),
        ("Paris, Texas", "Paris, Texas", "name"),
        ("x" * 300, "x" * 300, "name"),
        ("Cafe\u0301", "Café", "name"),
        ("Rome; Paris, Texas", ["Paris, Texas", "Rome"], "list"),
        ("Trinidad and Tobago, Rome", ["Rome", "Trinidad and Tobago"], "list"),
        ("B, A and C", ["A", "B", "C"], "list"),
        ("a;b", "b, a", "list"),
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
        ("twenty", "20", "number"),
        ("1e999999", "1", "number"),
        ("", "0", "number"),
        ("10²", "102", "number"),
        ("5²", "52", "name"),
        ("C", "C++", "name"),
        ("C#", "C++", "name"),
        ("5", "-5", "name"),
        ("5", "5%", "name"),
        ("35", "3.5", "name"),
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
    assert outcome.total == -0.5 and outcome.correct == 0 and not outcome.format_ok


def test_tool_fault_is_no_format_failure():
    outcome = reward(finished("tool_fault"))
    assert outcome.total == 0 and outcome.format_ok


def test_leave_one_out_by_hand():
    result = advantages([[1.0], [0.0], [0.0], [-0.5]])
    assert result == [[1.0 - (-0.5 / 3)], [0.0 - 0.5 / 3], [0.0 - 0.5 / 3], [-0.5 - 1 / 3]]


def test_advantage_laws():
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
        assert advantages([group[0]] * 4) == [[0.0] * T] * 4  # all equal: no gradient
    assert advantages([[1.0, 1.0]]) == [[0.0, 0.0]]  # alone in its group


def test_longer_correct_trajectory_gets_less_than_a_shorter_one():
    short, long = advantages([gamma_decay(1, 2, 0.9), gamma_decay(1, 5, 0.9)])
    assert min(short) > 0 > max(long[:-1]) and long[-1] == 0


def test_negative_control():
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


def test_reward_from_a_file(tmp_path):
    (tmp_path / "mine.py").write_text(
        "def short(trajectory):\n    return 1.0 / len(trajectory.turns)\n"
    )
    outcome = load_reward(f"{tmp_path}/mine.py:short")(finished(turns=4))
    assert outcome.total == 0.25 and outcome.correct == 1.0
    (tmp_path / "broken.py").write_text(
        "def nan(t):\n    return float('nan')\ndef none(t):\n    pass\n"
    )
    for name in ("nan", "none"):
        with pytest.raises(ValueError, match="finite number"):
            load_reward(f"{tmp_path}/broken.py:{name}")(
                SimpleNamespace(task=SimpleNamespace(id="t1"))
            )
    for spec, words in [
        ("nowhere.py:f", "no file"),
        (f"{tmp_path}/mine.py:absent", "no function"),
        ("mine", "file.py:function"),
    ]:
        with pytest.raises(ValueError, match=words):
            load_reward(spec)
