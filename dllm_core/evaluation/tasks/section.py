"""Any task, as a section of a recipe."""

from typing import Annotated

from pydantic import Field

from dllm_core.evaluation.tasks.addition import AdditionTask
from dllm_core.evaluation.tasks.sudoku import SudokuTask

AnyTask = Annotated[SudokuTask | AdditionTask, Field(discriminator="type")]
