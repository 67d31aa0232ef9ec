"""What a verb was pointed at: a recipe file or a run's folder, with overrides applied.

An override of a run may change how it is evaluated, decoded, served and placed; not what it is.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from dllm_core.checkpoints.bundle_manifest import FOLDER, MANIFEST_NAME
from dllm_core.checkpoints.run_dir import RunDir
from dllm_core.config.overrides import apply_overrides, parse_yaml
from dllm_core.data.manifest import has_manifest
from dllm_core.errors import ConfigError, DataError, DllmError
from dllm_core.storage.store import Store, open_store
from workflows.preprocess.flow import CorpusPlan, plan_corpus
from workflows.recipe import Recipe, StorageConfig, anchored, load_recipe
from workflows.train.job import RUN_FACTS

RECIPE_NAME = "recipe.yaml"
_ANOTHER_RUN = "start from a recipe file to make another run"


@dataclass(frozen=True)
class Target:
    """A recipe and the run that it makes."""

    recipe: Recipe
    run: RunDir
    plan: CorpusPlan

    @property
    def corpus(self) -> str:
        """Fingerprint of the run's corpus."""
        return self.plan.fingerprint


def is_run(target: str) -> bool:
    """Whether an argument names a run's folder rather than a recipe file."""
    if target.startswith("s3://"):
        return not target.endswith((".yaml", ".yml"))
    try:
        return Path(target).is_dir()
    except (OSError, ValueError):  # too long, no permission, a NUL: reading it as a recipe says so
        return False


def read_target_recipe(target: str, overrides: Sequence[str]) -> tuple[Recipe, RunDir | None]:
    """The recipe that an argument means, and the run if it names one. Opens no corpus."""
    if not is_run(target):
        return load_recipe(Path(target), overrides), None
    run = RunDir.at(target)
    key = run.key(RECIPE_NAME)
    if not run.store.exists(key):
        raise ConfigError(target, f"has no {RECIPE_NAME}", remedy="name a recipe file, or a folder below runs/")
    place = f"{run.url}/{RECIPE_NAME}"
    try:
        values = parse_yaml(run.store.read(key).decode("utf-8"), place)
    except UnicodeDecodeError:
        raise ConfigError(place, "is not text", remedy="start from a recipe file") from None
    old = Recipe.checked(values, RECIPE_NAME)
    new = anchored(Recipe.checked(apply_overrides(values, list(overrides))))
    if _identity(old) != _identity(new):
        raise ConfigError(", ".join(overrides), "would make another run than", run.name, _ANOTHER_RUN)
    return new.model_copy(update={"storage": StorageConfig(root=run.store.url)}), run


def _identity(recipe: Recipe) -> tuple[str, str, str]:
    """What makes a recipe another run's, its corpus's files apart."""
    return recipe.name, recipe.corpus_fingerprint([]), recipe.run_fingerprint("")


def open_target(target: str, overrides: Sequence[str]) -> Target:
    """Resolve an argument to a run; lists the corpus's files, so paths that do not exist are refused here.

    A run's folder keeps the corpus that the run was trained on, whatever became of the files that it was made from.
    """
    recipe, run = read_target_recipe(target, overrides)
    store = open_store("storage.root", recipe.storage.root)
    store.check_writable("storage.root")
    if run is not None:
        return Target(recipe, run, _own_corpus(recipe, run, overrides, store))
    plan = plan_corpus(recipe, store)
    return Target(recipe, RunDir(store, f"{recipe.name}-{recipe.run_fingerprint(plan.fingerprint)}"), plan)


def _own_corpus(recipe: Recipe, run: RunDir, overrides: Sequence[str], store: Store) -> CorpusPlan:
    """The corpus that a run was trained on: made from its files where they still make it, else as it stands."""
    own = _trained_on(run)
    is_said = any(word.startswith(("corpus.", "corpus=")) for word in overrides)  # then these files are meant
    kept = None if own is None or is_said or not has_manifest(store, own) else CorpusPlan(recipe, store, (), own)
    try:
        plan = plan_corpus(recipe, store)
    except DllmError:
        if kept is None:
            raise
        return kept
    if plan.fingerprint == own or run.name.endswith(f"-{recipe.run_fingerprint(plan.fingerprint)}"):
        return plan
    if is_said:
        raise ConfigError(", ".join(overrides), "would make another run than", run.name, _ANOTHER_RUN)
    if kept is None:
        problem = f"its files make the corpus {plan.fingerprint} now, and the one it was trained on is not in storage"
        raise DataError(run.url, problem, own, f"bring them back with their times, or {_ANOTHER_RUN}")
    return kept


def _trained_on(run: RunDir) -> str | None:
    """Fingerprint of the corpus that the run's training or, of one without a training, its bundle tells of."""
    facts, bundle = run.read_json(RUN_FACTS), run.read_json(f"{FOLDER}/{MANIFEST_NAME}")
    told = facts or (bundle and bundle["lineage"]) or {}
    corpus: str | None = told.get("corpus")
    return corpus


def find_run(target: str, overrides: Sequence[str]) -> tuple[Recipe, RunDir]:
    """The run that an argument means, for verbs that need its bundle and not its corpus."""
    recipe, run = read_target_recipe(target, overrides)
    if run is None:
        opened = open_target(target, overrides)
        recipe, run = opened.recipe, opened.run
    return recipe, run
