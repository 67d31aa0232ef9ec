"""The serve stage of a pipeline: start the endpoint, ask it the recipe's examples, stop it."""

from typing import Any

from dllm_core.checkpoints.run_dir import RunDir
from workflows.console import StageBar
from workflows.recipe import Recipe
from workflows.serve.app import start, stop
from workflows.serve.flow import args_of, ask


def demonstrate(recipe: Recipe, run: RunDir, bar: StageBar) -> list[dict[str, Any]]:
    """The endpoint's answers to the examples, each with its cost."""
    bar.update("starting the endpoint")
    # For its own questions: on this machine, without keys, and without the models that are served beside it later.
    alone: dict[str, Any] = {"host": "127.0.0.1", "keys_file": None, "models": {}, "models_file": None}
    asked = recipe.model_copy(update={"serve": recipe.serve.model_copy(update=alone)})
    url = start(args_of(asked, run))
    answers = []
    try:
        for number, example in enumerate(recipe.serve.examples):
            bar.update(f"asking {url}", number, len(recipe.serve.examples))
            body = example.model_dump(mode="json", exclude_none=True) | {"seed": recipe.seed}
            answer = ask(url, run.name, body)
            choice, usage = answer["choices"][0], answer["usage"]
            answers.append(
                {
                    "prompt": example.prompt,
                    "suffix": example.suffix,
                    "text": choice["text"],
                    "finish_reason": choice["finish_reason"],
                    "num_tokens": usage["completion_tokens"],
                    "num_calls": usage["diffusion"]["num_calls"],
                    "tokens_per_call": usage["diffusion"]["tokens_per_call"],
                    "policy": usage["diffusion"]["policy"],
                }
            )
    finally:
        bar.update("stopping the endpoint")
        stop()
    return answers
