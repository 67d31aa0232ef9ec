"""The order of a comparison: corpora -> training runs -> measures -> comparison.json, table.md and report.html.

    dllm compare workflows/recipes/comparisons/objectives.yaml

What is done is not done again: corpora and runs by their receipts, measures by theirs.
"""

import json
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from rich.markup import escape

from dllm_core.checkpoints.run_dir import RunDir
from dllm_core.config.fingerprint import fingerprint
from dllm_core.data.manifest import CorpusManifest
from dllm_core.data.units import SourceFiles
from dllm_core.errors import DataError
from dllm_core.evaluation.tasks.corpus import PROBLEMS_NAME, problem_lines
from dllm_core.storage.store import Store, open_store
from workflows.compare.generation import generate
from workflows.compare.measures import Question, answer
from workflows.compare.recipe import TASK, TEXT, CompareRecipe, TaskConfig, small
from workflows.compare.report import report_page, table_lines
from workflows.compare.training import Entrant, losses, train_entrant, trained
from workflows.console import Console
from workflows.env import ray_cluster
from workflows.fan_out import FanOut, fan_out
from workflows.preprocess.flow import Preprocessing, plan_corpus
from workflows.recipe import Recipe
from workflows.task.flow import task_sections

FOLDER = "comparisons"


def compare(recipe: CompareRecipe, console: Console) -> dict[str, Any]:
    """Run what is missing; where the results lie, and the table."""
    store = open_store("storage.root", recipe.storage.root)
    store.check_writable("storage.root")
    placement = recipe.placement
    with ray_cluster(placement.workers, placement.workers * placement.gpus_per_worker):
        return Comparison(recipe, store, console, fan_out).run()


class Comparison:
    """One comparison over a store."""

    def __init__(self, recipe: CompareRecipe, store: Store, console: Console, fan_out: FanOut) -> None:
        self._recipe, self._store, self._console, self._fan_out = recipe, store, console, fan_out
        self._manifests: dict[str, CorpusManifest] = {}
        self._tasks: dict[int, dict[str, Any]] = {}
        self._listed: dict[str, tuple[SourceFiles, ...]] = {}

    def run(self) -> dict[str, Any]:
        """All of it, in order."""
        entrants = self.entrants()
        self._check_same_text(entrants)
        self._train(entrants)
        measured = self._measure(entrants)
        name = f"{self._recipe.name}-{fingerprint(self._identity(entrants))}"
        result = {"name": name, "recipe": self._recipe.model_dump(mode="json", exclude={"storage"}), **measured}
        result["runs"] = [self._about(entrant) for entrant in entrants]
        folder = f"{FOLDER}/{name}"
        self._store.put(f"{folder}/comparison.json", json.dumps(result, indent=1, ensure_ascii=False).encode() + b"\n")
        lines = table_lines(result)
        self._store.put(f"{folder}/table.md", ("\n".join(lines) + "\n").encode())
        self._store.put(f"{folder}/report.html", report_page(result, f"{self._store.url}/{folder}"))
        self._console.print("\n" + escape("\n".join(lines)) + "\n")
        self._console.done("report", escape(f"{self._store.url}/{folder}/report.html"))
        return {"comparison": f"{self._store.url}/{folder}", "models": list(self._recipe.models)}

    def entrants(self) -> list[Entrant]:
        """Every run that there will be, its corpus made."""
        entrants = []
        with self._console.stage("corpora") as bar:
            for model in self._recipe.models:
                entrants.append(self._entrant(model, TEXT, self._recipe.recipe_of(model, self._kept()), bar.update))
            if self._recipe.repetition is not None:
                for model in self._recipe.models:
                    if _has_likelihood(self._recipe.recipe_of(model)):
                        entrants += self._repeated(model, bar.update)
            if self._recipe.task is not None:
                for model in self._recipe.models:
                    entrants.append(self._entrant(model, TASK, self._task_recipe(model), bar.update))
        made = {entrant.corpus for entrant in entrants}
        self._console.done("corpora", f"{len(made)} for {len(entrants)} runs of {len(self._recipe.models)} models")
        return entrants

    def _kept(self) -> list[str]:
        """A checkpoint for each point of the learning curve; both fields are no part of a run's identity."""
        steps, points = (
            self._recipe.recipe_of(next(iter(self._recipe.models))).train.steps,
            self._recipe.learning.points,
        )
        return [f"train.checkpoint_every={-(-steps // points)}", f"train.keep_checkpoints={points}"]

    def _repeated(self, model: str, on_progress: Callable[..., None]) -> list[Entrant]:
        section = self._recipe.repetition
        assert section is not None
        share = [f"corpus.weight={section.share}", "train.keep_checkpoints=1"]
        plan = self._recipe.recipe_of(model, share)
        rows = self._corpus(plan, on_progress).train.rows
        found = []
        for epochs in section.epochs:
            steps = max(1, round(epochs * rows / plan.train.batch_rows))
            recipe = self._recipe.recipe_of(model, [*share, f"train.steps={steps}", f"train.checkpoint_every={steps}"])
            found.append(self._entrant(model, small(epochs), recipe, on_progress))
        return found

    def _task_recipe(self, model: str) -> Recipe:
        """The task's problems as a corpus of pairs instead of the text."""
        section, seed = self._recipe.task, self._recipe.recipe_of(model).seed
        assert section is not None
        if seed not in self._tasks:
            self._tasks[seed] = self._task_sections(section, seed)
        return self._recipe.recipe_of(model, [*section.overrides, "train.keep_checkpoints=1"], self._tasks[seed])

    def _task_sections(self, section: TaskConfig, seed: int) -> dict[str, Any]:
        """Of a recipe, over the problems that this writes down."""
        problems = section.problem.problems("train", section.rows, seed=seed)
        key = f"tasks/{section.problem.type}-{fingerprint([section.problem, section.rows, seed])}/{PROBLEMS_NAME}"
        if not self._store.exists(key):
            self._store.put(key, problem_lines(problems).encode())
        return task_sections(f"{self._store.url}/{key}", problems)

    def _entrant(self, model: str, data: str, recipe: Recipe, on_progress: Callable[..., None]) -> Entrant:
        manifest = self._corpus(recipe, on_progress)
        run = RunDir(self._store, f"{recipe.name}-{data}-{recipe.run_fingerprint(manifest.fingerprint)}")
        return Entrant(model, data, recipe, run, manifest.fingerprint)

    def _corpus(self, recipe: Recipe, on_progress: Callable[..., None]) -> CorpusManifest:
        sources = fingerprint(recipe.corpus)
        plan = plan_corpus(recipe, self._store, self._listed.get(sources))
        self._listed[sources] = plan.listed
        if plan.fingerprint not in self._manifests:
            found = plan.existing()
            self._manifests[plan.fingerprint] = found or Preprocessing(plan, self._fan_out, on_progress).run()
        return self._manifests[plan.fingerprint]

    def _check_same_text(self, entrants: Sequence[Entrant]) -> None:
        """Noise sets corpora apart; the tokens of one data set must not."""
        for data in {entrant.data for entrant in entrants}:
            manifests = [self._manifests[e.corpus] for e in entrants if e.data == data]
            shards = {tuple(shard.sha256 for shard in (*m.train.shards, *m.heldout.shards)) for m in manifests}
            if len(shards) > 1:
                remedy = "let models differ in noise, model, objective, train and decode alone"
                raise DataError("models", "were given different texts", data, remedy)

    def _train(self, entrants: Sequence[Entrant]) -> None:
        missing = [entrant for entrant in entrants if trained(entrant) is None]
        if not missing:
            self._console.skipped("train", f"{len(entrants)} runs")
            return
        missing.sort(key=lambda entrant: -entrant.num_tokens)
        placement, begun = self._recipe.placement, time.monotonic()
        with self._console.stage("train") as bar:
            bar.update(f"{len(missing)} runs", 0, len(missing))
            self._fan_out(
                partial(train_entrant, placement.gpus_per_worker),
                missing,
                workers=placement.workers,
                demand=placement.demand,
                on_done=lambda done, result: bar.update(f"{done} of {len(missing)} runs", done, len(missing)),
            )
        self._console.done("train", f"{len(missing)} runs", time.monotonic() - begun)

    def _measure(self, entrants: Sequence[Entrant]) -> dict[str, Any]:
        """Each measure of each model; generation last and alone, because it is timed."""
        questions = self._questions(entrants)
        result: dict[str, Any] = {}
        missing = []
        for question in questions:
            found = self._read(question)
            result.setdefault(question.measure, {})[question.model] = found
            if found is None:
                missing.append(question)
        of_all = self._question("generation", "all", [e for e in entrants if e.data == TEXT])
        generation = self._read(of_all)
        if not missing and generation is not None:
            self._console.skipped("measure", f"{len(questions) + 1} measures")
            return {**_unwrapped(result), "generation": generation["value"]}
        placement, begun = self._recipe.placement, time.monotonic()
        with self._console.stage("measure") as bar:
            bar.update("likelihood, context, flexibility, task", 0, len(missing) + 1)
            answers = self._fan_out(
                answer,
                missing,
                workers=placement.workers,
                demand=placement.demand,
                on_done=lambda done, result: bar.update(f"{done} of {len(missing) + 1}", done, len(missing) + 1),
            )
            for question, value in zip(missing, answers, strict=True):
                result[question.measure][question.model] = self._written(question, value)
            if generation is None:
                bar.update("generation, one model after the other", len(missing), len(missing) + 1)
                [value] = self._fan_out(generate, [of_all], workers=1, demand=placement.demand)
                generation = self._written(of_all, value)
        self._console.done("measure", f"{len(missing) + 1} measures", time.monotonic() - begun)
        return {**_unwrapped(result), "generation": generation["value"]}

    def _questions(self, entrants: Sequence[Entrant]) -> list[Question]:
        found = []
        for model in self._recipe.models:
            own = [entrant for entrant in entrants if entrant.model == model]
            text, task = ([e for e in own if e.data == data] for data in (TEXT, TASK))
            repeated = [entrant for entrant in own if entrant.data not in {TEXT, TASK}]
            found += [self._question(name, model, text) for name in ("learning", "context", "flexibility")]
            if repeated:
                found.append(self._question("repetition", model, repeated))
            if task:
                found.append(self._question("task", model, task))
        return found

    def _question(self, measure: str, model: str, entrants: Sequence[Entrant]) -> Question:
        return Question(measure, model, tuple(entrants), self._recipe)

    def _key(self, question: Question) -> str:
        """Where an answer is kept: named by all that it depends on."""
        section = "learning" if question.measure == "repetition" else question.measure
        runs = [[entrant.inputs, entrant.recipe.decode] for entrant in question.entrants]
        inputs = fingerprint(
            [question.measure, runs, getattr(self._recipe, section), self._recipe.recipe.get("seed", 0)]
        )
        return f"{FOLDER}/measures/{question.measure}-{question.model}-{inputs}.json"

    def _read(self, question: Question) -> dict[str, Any] | None:
        key = self._key(question)
        if not self._store.exists(key):
            return None
        found: dict[str, Any] = json.loads(self._store.read(key))
        return found

    def _written(self, question: Question, value: Any) -> dict[str, Any]:
        kept = {"measure": question.measure, "model": question.model, "value": value}
        self._store.put(self._key(question), json.dumps(kept).encode())
        return kept

    def _identity(self, entrants: Sequence[Entrant]) -> list[Any]:
        return [self._recipe.fingerprint, [entrant.run.name for entrant in entrants]]

    def _about(self, entrant: Entrant) -> dict[str, Any]:
        manifest = self._manifests[entrant.corpus]
        parameters = entrant.recipe.model.num_parameters(manifest.vocab_size)
        own = {"model": entrant.model, "data": entrant.data, "run": entrant.run.name, "parameters": parameters}
        return {**own, "corpus_tokens": manifest.train.tokens, **(trained(entrant) or {}), "losses": losses(entrant)}


def _has_likelihood(recipe: Recipe) -> bool:
    return recipe.objective.type != "masked_lm"


def _unwrapped(result: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Values without what they were kept with."""
    return {name: {model: kept["value"] for model, kept in models.items()} for name, models in result.items()}
