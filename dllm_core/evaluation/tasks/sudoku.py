"""4x4 sudoku (Shi Doku): all 288 grids and all 13,579,680 puzzles with one solution, none of them stored.

A puzzle is a grid and a set of cells that are shown: of the 288 x 2^16 such pairs those count that fit one grid alone.
Cell c is bit c of a set; cells run row by row.
"""

import itertools
from collections.abc import Iterator
from functools import cache
from typing import Literal, Self

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, model_validator

from dllm_core.config.base import FieldProblem, Frozen
from dllm_core.data.order import SampleOrder
from dllm_core.estimate import measure_seed
from dllm_core.evaluation.tasks.problem import Grade, Part, Problem, first_of
from dllm_core.seeding import Ints

NUM_CELLS = 16
BLANK = "."
_SETS = 1 << NUM_CELLS
_CHUNK = 4096
_NUM_SHOWN = np.array([cells.bit_count() for cells in range(_SETS)])
_UNITS = tuple(
    tuple(cells)
    for i in range(4)
    for cells in (
        range(4 * i, 4 * i + 4),
        range(i, 16, 4),
        [8 * (i // 2) + 2 * (i % 2) + offset for offset in (0, 1, 4, 5)],
    )
)


@cache
def all_grids() -> NDArray[np.uint8]:
    """[288 16], digits 1 to 4, in lexicographic order: rows that are permutations, kept where columns and boxes are."""
    rows = np.array(list(itertools.permutations((1, 2, 3, 4))), np.uint8)
    four = np.array(list(itertools.product(range(len(rows)), repeat=4)))
    grids = rows[four].reshape(-1, NUM_CELLS)
    is_grid = np.ones(len(grids), bool)
    for unit in _UNITS:
        is_grid &= np.bitwise_or.reduce(1 << grids[:, unit], axis=1) == 0b11110
    kept: NDArray[np.uint8] = grids[is_grid]
    return kept


@cache
def relabelling_classes() -> Ints:
    """[288]: grids that a renaming of the digits makes equal have one number, 0 to 11."""
    grids = all_grids()
    names = np.zeros((len(grids), 5), np.uint8)
    # The first row holds every digit once: renamed to 1, 2, 3, 4.
    np.put_along_axis(names, grids[:, :4].astype(np.int64), np.arange(1, 5, dtype=np.uint8)[None], axis=1)
    renamed = np.take_along_axis(names, grids.astype(np.int64), axis=1)
    return np.unique(renamed, axis=0, return_inverse=True)[1].ravel()


@cache
def _agreements() -> NDArray[np.uint16]:
    """[288 288]: the set of cells in which two grids are equal."""
    grids = all_grids()
    bits = np.uint16(1) << np.arange(NUM_CELLS, dtype=np.uint16)
    agreements: NDArray[np.uint16] = ((grids[:, None] == grids[None]) * bits).sum(-1, dtype=np.uint16)
    return agreements


def num_solutions(grids: Ints, shown: Ints) -> Ints:
    """How many grids agree with grid [n] on its shown cells [n] (sets): 1 for a puzzle."""
    agreement = _agreements()[grids]
    found: Ints = ((agreement & shown.astype(np.uint16)[:, None]) == shown[:, None]).sum(1)
    return found


class SudokuTask(Frozen):
    """`1..4.2......3...=1324...`: 16 cells, `.` for a blank, and the grid.

    Every puzzle with one solution and so many clues is as likely. Grids that are renamings of each other are in one
    part: `test_classes` of their 12 classes are kept for testing, as the task's own `split_seed` says. Turned and
    mirrored grids are not kept apart: with them there are two classes only, and one would never be trained on.
    """

    type: Literal["sudoku"] = "sudoku"
    min_clues: int = Field(4, ge=4, lt=NUM_CELLS, description="no puzzle with 3 has one solution")
    max_clues: int = Field(10, ge=4, lt=NUM_CELLS)
    test_classes: int = Field(2, ge=1, le=11)
    split_seed: int = Field(0, ge=0, lt=1 << 63)

    @model_validator(mode="after")
    def _some_number_fits(self) -> Self:
        if self.min_clues > self.max_clues:
            raise FieldProblem("min_clues", f"must be at most max_clues={self.max_clues}", self.min_clues)
        return self

    def problems(self, part: Part, count: int, *, seed: int) -> list[Problem]:
        """As `Task.problems`; about one candidate in three is taken with 4 to 10 clues."""
        return first_of(self._in_order(part, seed), count, part)

    def _in_order(self, part: Part, seed: int) -> Iterator[Problem]:
        candidates = self._grids(part)
        order = SampleOrder(measure_seed(seed, "sudoku"), len(candidates) * _SETS)
        for start in range(0, order.num_samples, _CHUNK):
            place, shown = np.divmod(order.sample(0, np.arange(start, min(start + _CHUNK, order.num_samples))), _SETS)
            clues = _NUM_SHOWN[shown]
            fits = (clues >= self.min_clues) & (clues <= self.max_clues)
            grids, shown = candidates[place[fits]], shown[fits]
            is_puzzle = num_solutions(grids, shown) == 1
            yield from map(_written, grids[is_puzzle].tolist(), shown[is_puzzle].tolist())

    def _grids(self, part: Part) -> Ints:
        order = SampleOrder(measure_seed(self.split_seed, "sudoku split"), 12)
        for_test = order.sample(0, np.arange(self.test_classes))
        return np.flatnonzero(np.isin(relabelling_classes(), for_test) == (part == "test"))

    def grade(self, problem: Problem, answer: str) -> Grade:
        """Any grid that keeps the clues is right. right of asked: blanks filled as in the nearest such grid."""
        clues = np.array([0 if cell == BLANK else int(cell) for cell in problem.prompt.removesuffix("=")])
        given = np.zeros(NUM_CELLS, np.int64)
        for place, cell in enumerate(answer[:NUM_CELLS]):
            given[place] = int(cell) if cell in ("1", "2", "3", "4") else 0
        grids = all_grids()
        solutions = grids[((grids == clues) | (clues == 0)).all(1)]
        is_same = solutions == given
        right = int(is_same[:, clues == 0].sum(1).max())
        is_correct = len(answer) == NUM_CELLS and bool(is_same.all(1).any())
        return Grade(is_correct, right, int((clues == 0).sum()))


def _written(grid: int, shown: int) -> Problem:
    cells = all_grids()[grid].tolist()
    clues = [str(cell) if shown >> place & 1 else BLANK for place, cell in enumerate(cells)]
    return Problem("".join(clues) + "=", "".join(map(str, cells)))
