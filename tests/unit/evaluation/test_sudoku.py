"""All grids, all puzzles: counts that are known from elsewhere, one solution each, and no puzzle in both parts."""

import itertools

import numpy as np
import pytest
from conftest import draws
from hypothesis import given, settings
from hypothesis import strategies as st

from dllm_core.errors import ConfigError
from dllm_core.evaluation.tasks.problem import Problem
from dllm_core.evaluation.tasks.sudoku import SudokuTask, all_grids, num_solutions, relabelling_classes

SETS = np.arange(1 << 16)
CLUES = np.array([cells.bit_count() for cells in SETS.tolist()])


def solve(cells: list[int]) -> list[list[int]]:
    """Every completion, by trying: knows rows, columns and boxes, and nothing of the product's grids."""
    if 0 not in cells:
        return [cells]
    at = cells.index(0)
    row, column = divmod(at, 4)
    same = [i for i in range(16) if i // 4 == row or i % 4 == column or (i // 8, i % 4 // 2) == (row // 2, column // 2)]
    options = {1, 2, 3, 4} - {cells[i] for i in same}
    return [found for digit in sorted(options) for found in solve([*cells[:at], digit, *cells[at + 1 :]])]


def cells_of(prompt: str) -> list[int]:
    assert prompt.endswith("=")
    return [0 if cell == "." else int(cell) for cell in prompt[:-1]]


def test_the_grids_are_all_288_that_a_solver_finds_in_an_empty_one():
    assert all_grids().tolist() == solve([0] * 16)
    assert len(all_grids()) == 288


def test_twelve_classes_of_24_renamings_each():
    classes = relabelling_classes()
    assert np.bincount(classes).tolist() == [24] * 12
    grids = {tuple(grid): int(name) for grid, name in zip(all_grids().tolist(), classes, strict=True)}
    for names in itertools.permutations((1, 2, 3, 4)):
        for grid, name in grids.items():
            assert grids[tuple(names[cell - 1] for cell in grid)] == name


@pytest.fixture(scope="module")
def is_puzzle() -> np.ndarray:
    """[12 65536]: which sets of cells leave one solution, for one grid of each class; renaming changes none."""
    first = np.unique(relabelling_classes(), return_index=True)[1]
    parts = np.array_split(SETS, 16)
    return np.stack([np.concatenate([num_solutions(np.full(len(p), g), p) == 1 for p in parts]) for g in first])


def test_counts_are_those_that_are_known(is_puzzle):
    """By clues: OEIS A109252; of them minimal, where no clue can be left out: Sudopedia, "Shi Doku"."""
    by_clues = [24 * int(is_puzzle[:, clues == CLUES].sum()) for clues in range(17)]
    assert by_clues[:4] == [0, 0, 0, 0]
    assert by_clues[4:10] == [25_728, 284_160, 1_041_408, 2_141_184, 2_961_024, 2_958_336]
    assert by_clues[10:] == [2_204_928, 1_239_552, 522_624, 161_280, 34_560, 4_608, 288]
    assert sum(by_clues) == 13_579_680
    needs_all = is_puzzle.copy()
    for cell in range(16):
        has = SETS >> cell & 1 == 1
        needs_all[:, has] &= ~is_puzzle[:, SETS[has] & ~(1 << cell)]
    minimal = 24 * np.bincount(CLUES[np.nonzero(needs_all)[1]], minlength=17)
    assert {clues: int(n) for clues, n in enumerate(minimal) if n} == {4: 25_728, 5: 58_368, 6: 1_536}


@settings(max_examples=draws(60), deadline=None)
@given(st.integers(0, 287), st.integers(0, (1 << 16) - 1))
def test_solutions_are_counted_as_trying_all_counts_them(grid, shown):
    clues = [int(cell) if shown >> i & 1 else 0 for i, cell in enumerate(all_grids()[grid])]
    assert num_solutions(np.array([grid]), np.array([shown]))[0] == len(solve(clues))


@pytest.mark.parametrize("part", ["train", "test"])
def test_problems_are_different_puzzles_with_one_solution_and_the_wanted_clues(part):
    task = SudokuTask(min_clues=5, max_clues=9)
    problems = task.problems(part, 400, seed=3)
    assert len({problem.prompt for problem in problems}) == 400
    for problem in problems:
        cells = cells_of(problem.prompt)
        assert 5 <= sum(cell > 0 for cell in cells) <= 9
        assert ["".join(map(str, found)) for found in solve(cells)] == [problem.answer]
        assert (problem.prompt + problem.answer).isascii()


def class_of(answer: str) -> int:
    names = {digit: str(i) for i, digit in enumerate(answer[:4])}
    return hash("".join(names[digit] for digit in answer))


@pytest.mark.parametrize("split_seed", [0, 1, 2])
@pytest.mark.parametrize("test_classes", [1, 2, 6])
def test_no_grid_of_one_part_is_a_renaming_of_one_in_the_other(test_classes, split_seed):
    task = SudokuTask(test_classes=test_classes, split_seed=split_seed)
    train = {class_of(p.answer) for seed in (1, 2) for p in task.problems("train", 300, seed=seed)}
    test = {class_of(p.answer) for seed in (1, 2) for p in task.problems("test", 300, seed=seed)}
    assert not train & test
    assert (len(train), len(test)) == (12 - test_classes, test_classes)


def test_every_puzzle_is_as_likely(is_puzzle):
    """Of 4 and 5 clues, each class of grids and each number of clues comes as often as there are such puzzles."""
    task = SudokuTask(min_clues=4, max_clues=5, test_classes=1)
    problems = task.problems("train", 3000, seed=5)
    number = np.array([sum(cell > 0 for cell in cells_of(problem.prompt)) for problem in problems])
    counted = [sum(is_puzzle[:, clues == CLUES].sum(1)) for clues in (4, 5)]
    share = counted[0] / sum(counted)
    assert abs((number == 4).mean() - share) < 0.02
    assert len({problem.answer for problem in problems}) == 264


def test_the_same_seed_gives_the_same_in_order_and_a_longer_list_goes_on():
    task = SudokuTask()
    assert task.problems("train", 300, seed=1)[:50] == task.problems("train", 50, seed=1)
    assert task.problems("train", 50, seed=1) != task.problems("train", 50, seed=2)
    assert task.problems("test", 0, seed=1) == []


def test_more_than_there_are_is_refused():
    few = SudokuTask(min_clues=4, max_clues=4, test_classes=1)
    with pytest.raises(ConfigError, match=r"test part holds \d+ problems, got 9000: ask for fewer"):
        few.problems("test", 9000, seed=1)
    with pytest.raises(ConfigError, match="min_clues: must be at most max_clues=5"):
        SudokuTask.checked({"min_clues": 6, "max_clues": 5})


@pytest.mark.parametrize("clues", [1, 4, 8])
def test_any_completion_that_keeps_the_clues_is_right_and_nothing_else(clues):
    """Puzzles with many solutions too: one clue leaves 72."""
    task, rng = SudokuTask(), np.random.default_rng(clues)
    for _ in range(15):
        grid = all_grids()[rng.integers(288)].tolist()
        shown = set(rng.choice(16, clues, replace=False).tolist())
        cells = [cell if i in shown else 0 for i, cell in enumerate(grid)]
        text = "".join(map(str, cells)).replace("0", ".")
        problem = Problem(text + "=", "".join(map(str, grid)))
        solutions = {"".join(map(str, found)) for found in solve(cells)}
        for other in rng.choice(all_grids(), 40):
            answer = "".join(map(str, other))
            assert task.grade(problem, answer).is_correct == (answer in solutions)
        for answer in solutions:
            grade = task.grade(problem, answer)
            assert grade.is_correct
            assert grade.right == grade.asked == 16 - clues
            blank = next(i for i in range(16) if i not in shown)
            changed = answer[:blank] + str(int(answer[blank]) % 4 + 1) + answer[blank + 1 :]
            blanks = sorted(set(range(16)) - shown)
            agree = max(sum(solution[i] == changed[i] for i in blanks) for solution in solutions)
            assert task.grade(problem, changed).right == agree
            assert not task.grade(problem, changed).is_correct
            for wrong in (answer + "1", answer[:-1], " " + answer, "", answer.replace("1", "x"), "²" * 16):
                assert not task.grade(problem, wrong).is_correct


def test_cells_are_counted_at_blanks_alone():
    [problem] = SudokuTask().problems("train", 1, seed=8)
    cells = cells_of(problem.prompt)
    copied = problem.prompt[:-1]
    grade = SudokuTask().grade(problem, copied)
    assert (grade.right, grade.asked) == (0, cells.count(0))
    half = problem.answer[:8] + "." * 8
    assert SudokuTask().grade(problem, half).right == cells[:8].count(0)
