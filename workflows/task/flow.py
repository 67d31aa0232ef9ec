"""The task verb: write a task's training problems, and a recipe that trains on them and is graded on the others.

dllm task sudoku my/sudoku --rows 20000
dllm run my/sudoku/recipe.yaml
"""

from collections.abc import Sequence
from typing import Any

import yaml

from dllm_core.config.overrides import apply_overrides
from dllm_core.data.tokenizer import TokenizerConfig
from dllm_core.errors import ConfigError, DataError
from dllm_core.evaluation.tasks.addition import AdditionTask
from dllm_core.evaluation.tasks.corpus import PROBLEMS_NAME, write_problems
from dllm_core.evaluation.tasks.problem import Problem
from dllm_core.evaluation.tasks.sudoku import SudokuTask
from dllm_core.storage.store import local_path
from workflows.recipe import Recipe

TASKS: dict[str, type[SudokuTask] | type[AdditionTask]] = {"addition": AdditionTask, "sudoku": SudokuTask}
RECIPE_NAME = "recipe.yaml"
_PAD_TO = 16  # positions that decoding pads a row to


def write_task(kind: str, out: str, rows: int, seed: int, overrides: Sequence[str]) -> dict[str, Any]:
    """`rows` problems of the training part, and a recipe, in the folder `out`.

    overrides: of the task's own fields, as `digits=4`. The recipe names the task as it was written, so what grades is
    what the corpus kept out. Raises ConfigError, and DataError where the folder cannot be written.
    """
    if kind not in TASKS:
        raise ConfigError("task", "unknown kind", kind, f"one of {', '.join(TASKS)}")
    task = TASKS[kind].checked(apply_overrides({"type": kind}, list(overrides)), kind)
    try:
        problems = task.problems("train", rows, seed=seed)
    except ConfigError as error:
        raise ConfigError("--rows", error.problem, rows, error.remedy) from error
    folder = local_path("OUT", out)
    recipe = {
        "name": kind,
        "seed": seed,
        **task_sections(str(folder / PROBLEMS_NAME), problems),
        "evaluate": {"tasks": [task.model_dump(mode="json")]},
        "serve": {"examples": [{"prompt": problems[0].prompt}]},
    }
    Recipe.checked(recipe)
    told = f"# {rows:,} problems of {kind} to train on; graded on problems that are kept out of them.\n"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_problems(folder / PROBLEMS_NAME, problems)
        (folder / RECIPE_NAME).write_text(told + yaml.safe_dump(recipe, sort_keys=False), encoding="utf-8")
    except OSError as error:
        raise DataError(str(folder), f"cannot be written ({error.strerror})") from error
    return {"task": task.model_dump(mode="json"), "problems": rows, "recipe": str(folder / RECIPE_NAME)}


def task_sections(path: str, problems: Sequence[Problem]) -> dict[str, Any]:
    """The sections of a recipe that make a corpus of problems: a byte a token, a problem a row, its answer learned."""
    prompt, answer = (max(len(getattr(p, part)) for p in problems) for part in ("prompt", "answer"))
    seq_len = -(-(prompt + answer + 1) // _PAD_TO) * _PAD_TO  # one more token ends an answer
    return {
        "corpus": {"type": "jsonl", "path": path, "record": {"type": "pair"}, "heldout_fraction": 0.05},
        "tokenizer": {"vocab_size": TokenizerConfig().smallest},
        "packing": {"type": "padded", "seq_len": seq_len, "learn_padding": True},
        "decode": {"max_tokens": seq_len - prompt},  # as far as a row of training: masks are counted
    }
