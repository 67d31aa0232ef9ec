"""A corpus of preferences: two colours of which the better one stands earlier in an order, for any shape and number."""

import json
from pathlib import Path
from typing import Any

import numpy as np
from conftest import COLOURS, SHAPES, SmallCorpus, small_recipe

from dllm_core.data.manifest import read_tokenizer
from dllm_core.storage.store import LocalStore, open_store
from workflows.fan_out import serially
from workflows.preprocess.flow import Preprocessing, plan_corpus
from workflows.recipe import Recipe


def preferences(number: int = 400, seed: int = 0) -> list[dict[str, str]]:
    """Of two different colours the one that stands earlier in `COLOURS` is chosen."""
    rng = np.random.default_rng(seed)
    found = []
    for i in range(number):
        better, worse = sorted(rng.choice(len(COLOURS), 2, replace=False).tolist())
        prompt = f"{SHAPES[rng.integers(len(SHAPES))]} {i}: "
        found.append({"prompt": prompt, "chosen": COLOURS[better], "rejected": COLOURS[worse]})
    return found


def write_lines(folder: Path, records: list[dict[str, Any]]) -> None:
    """One file of JSON lines."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "a.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")


def jsonl_recipe(root: Path, folder: Path, record: dict[str, Any], **sections: Any) -> Recipe:
    """`small_recipe` over a folder of JSON lines."""
    values = small_recipe(root).model_dump(mode="json")
    corpus = {"type": "jsonl", "path": str(folder), "record": record, "heldout_fraction": 0.1, "unit_bytes": 4096}
    values["corpus"] = {**corpus, **sections.pop("corpus", {})}
    for name, section in sections.items():
        old = values[name] or {}
        is_other_kind = section is None or section.get("type", old.get("type")) != old.get("type")
        values[name] = section if is_other_kind else {**old, **section}
    return Recipe.checked(values)


def preference_recipe(root: Path, folder: Path, **sections: Any) -> Recipe:
    """A recipe that tunes by the preferences in a folder."""
    record = {"type": "preference", **sections.pop("record", {})}
    own = {"packing": {"type": "pairs", "seq_len": 48}, "objective": {"type": "preference"}}
    sections = {"start": {"run": "runs/before"}, **sections}
    told = {name: {**section, **sections.pop(name, {})} for name, section in own.items()}
    return jsonl_recipe(root, folder, record, **told, **sections)


def preprocessed(recipe: Recipe) -> SmallCorpus:
    """The real preprocessing in this process."""
    store = open_store("storage.root", recipe.storage.root)
    assert isinstance(store, LocalStore)
    manifest = Preprocessing(plan_corpus(recipe, store), serially).run()
    return SmallCorpus(recipe, store, manifest, read_tokenizer(store, manifest))
