"""Sums: all of them, each once, in one part, and graded by adding."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dllm_core.errors import ConfigError
from dllm_core.evaluation.tasks.addition import AdditionTask
from dllm_core.evaluation.tasks.problem import Grade, Problem

tasks = st.builds(
    AdditionTask,
    digits=st.integers(1, 8),
    first_digit=st.sampled_from(["most_significant", "least_significant"]),
    test_share=st.sampled_from([0.1, 0.5]),
    split_seed=st.integers(0, 5),
)


def numbers(problem: Problem) -> tuple[int, int]:
    left, _, right = problem.prompt.removesuffix("=").partition("+")
    assert problem.prompt == f"{int(left)}+{int(right)}="
    return int(left), int(right)


@given(tasks, st.integers(0, 1 << 40))
def test_problems_are_different_sums_that_are_right(task, seed):
    for part in ("train", "test"):
        problems = task.problems(part, 3, seed=seed)
        assert len({problem.prompt for problem in problems}) == 3
        for problem in problems:
            a, b = numbers(problem)
            assert max(a, b) < 10**task.digits
            reading = problem.answer if task.first_digit == "most_significant" else "".join(reversed(problem.answer))
            assert reading == str(a + b)
            assert task.grade(problem, problem.answer) == Grade(True, len(problem.answer), len(problem.answer))
        assert task.problems(part, 2, seed=seed) == problems[:2]


@pytest.mark.parametrize("split_seed", [0, 1])
def test_all_sums_of_one_digit_are_there_once_and_both_orders_in_one_part(split_seed):
    task = AdditionTask(digits=1, test_share=0.3, split_seed=split_seed)
    parts = {}
    for part in ("train", "test"):
        with pytest.raises(ConfigError, match=rf"the {part} part holds \d+ problems, got 101") as error:
            task.problems(part, 101, seed=0)
        count = int(str(error.value).split("holds ")[1].split()[0])
        parts[part] = {numbers(problem) for problem in task.problems(part, count, seed=0)}
        assert len(parts[part]) == count
        assert parts[part] == {numbers(problem) for problem in task.problems(part, count, seed=1)}
    assert parts["train"] | parts["test"] == {(a, b) for a in range(10) for b in range(10)}
    for pairs in parts.values():
        assert {(b, a) for a, b in pairs} == pairs
    assert not parts["train"] & parts["test"]
    assert 10 < len(parts["test"]) < 55


def test_parts_have_their_share_and_do_not_depend_on_the_seed_of_the_order():
    task = AdditionTask(digits=2, test_share=0.2)
    test = {numbers(p) for seed in (1, 2) for p in task.problems("test", 1000, seed=seed)}
    train = {numbers(p) for seed in (3, 4) for p in task.problems("train", 5000, seed=seed)}
    assert not test & train
    with pytest.raises(ConfigError, match="test part holds") as error:
        task.problems("test", 10_000, seed=0)
    assert abs(int(str(error.value).split("holds ")[1].split()[0]) / 10_000 - 0.2) < 0.03


def test_numbers_are_uniform_and_in_random_order():
    task = AdditionTask(digits=3, test_share=0.5)
    pairs = np.array([numbers(problem) for problem in task.problems("train", 4000, seed=1)])
    assert (abs(np.histogram(pairs[:, 0], 10, (0, 1000))[0] - 400) < 100).all()
    assert (abs(np.histogram(pairs[:, 1], 10, (0, 1000))[0] - 400) < 100).all()
    assert abs(np.corrcoef(pairs.T)[0, 1]) < 0.07
    assert abs(np.corrcoef(pairs[:-1, 0], pairs[1:, 0])[0, 1]) < 0.07


@pytest.mark.parametrize(
    ("answer", "grade"),
    [
        ("46", Grade(True, 2, 2)),
        ("64", Grade(False, 0, 2)),
        ("47", Grade(False, 1, 2)),
        ("46 ", Grade(False, 2, 2)),
        ("046", Grade(False, 0, 2)),
        ("4", Grade(False, 1, 2)),
        ("", Grade(False, 0, 2)),
    ],
)
def test_grades_of_12_and_34(answer, grade):
    assert AdditionTask().grade(Problem("12+34=", "ignored"), answer) == grade


def test_a_reversed_answer_is_right_where_it_is_asked_for():
    task = AdditionTask(first_digit="least_significant")
    assert task.grade(Problem("12+34=", ""), "64").is_correct
    assert not task.grade(Problem("12+34=", ""), "46").is_correct
    assert task.grade(Problem("95+5=", ""), "001").is_correct
