"""What `plan` says of a corpus is what a run then makes of it, whatever the sources hold beside their text."""

import gzip
import itertools
import json
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import small_recipe, small_text

from dllm_core.data.tokenizer import Tokenizer, TokenizerConfig
from dllm_core.errors import DataError
from dllm_core.storage.store import LocalStore
from workflows.console import Console
from workflows.fan_out import serially
from workflows.preprocess.flow import Preprocessing, plan_corpus
from workflows.preprocess.show import look_at_corpus
from workflows.preprocess.verbs import plan
from workflows.recipe import Recipe

TEXTS = small_text(400).split("\n\n")


def written(folder: Path, kind: str) -> dict:
    folder.mkdir()
    records = [{"text": text, "beside": "m" * 4 * len(text)} for text in TEXTS]
    if kind == "parquet":
        pq.write_table(pa.Table.from_pylist(records), folder / "a.parquet", row_group_size=100)
    elif kind in ("jsonl", "hub"):
        (folder / "a.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    else:
        text = "\n\n".join(TEXTS).encode()
        (folder / f"a.txt{kind}").write_bytes(gzip.compress(text) if kind == ".gz" else text)
        return {"type": "text", "path": str(folder), "document": "paragraph"}
    if kind == "hub":
        return {"type": "hub", "path": "json", "data_files": f"{folder}/*.jsonl"}
    return {"type": kind, "path": str(folder)}


def recipe_over(root: Path, *sources: dict, **sections: dict) -> Recipe:
    values = small_recipe(root).model_dump(mode="json")
    packing = {**values["packing"], **sections.get("packing", {})}
    corpus = {"type": "mixture", "sources": sources, "unit_bytes": 1 << 13, "heldout_fraction": 0.1}
    return Recipe.checked({**values, **sections, "corpus": corpus, "packing": packing})


@pytest.mark.parametrize(
    ("kinds", "weights", "packing"),
    [
        (["", ".gz"], [0.02, 3], {}),
        (["jsonl", "parquet"], [1, 1], {}),
        ([".gz"], [1], {"type": "padded", "seq_len": 128}),
    ],
)
@pytest.mark.parametrize("ids", [None, 1500])
def test_the_tokens_and_rows_of_a_plan_are_those_of_the_run(tmp_path, kinds, weights, packing, ids):
    sources = [{**written(tmp_path / f"in{i}", kind), "weight": weights[i]} for i, kind in enumerate(kinds)]
    sections = {"packing": packing}
    if ids is not None:
        given = Tokenizer.train(TEXTS, TokenizerConfig(vocab_size=ids))
        (tmp_path / "given.json").write_text(given.json_text, encoding="utf-8")
        sections["tokenizer"] = {"path": str(tmp_path / "given.json")}
    corpus = plan_corpus(recipe_over(tmp_path, *sources, **sections), LocalStore(tmp_path / "storage"))
    told, manifest = plan(corpus), Preprocessing(corpus, serially).run()
    assert told["tokens"] == pytest.approx(manifest.train.tokens + manifest.heldout.tokens, rel=0.1)
    assert told["rows"] == pytest.approx(manifest.train.rows + manifest.heldout.rows, rel=0.1)


def test_workers_that_find_no_unit_take_no_memory_and_save_no_time(tmp_path, monkeypatch):
    clock = itertools.count()
    monkeypatch.setattr(time, "perf_counter", lambda: next(clock))
    source, told = written(tmp_path / "in", ".gz"), {}
    for workers in (1, 16):
        recipe = recipe_over(tmp_path, source, placement={"preprocess": {"workers": workers}})
        told[workers] = plan(plan_corpus(recipe, LocalStore(tmp_path / "storage")))
        assert told[workers]["units"] == 1
    assert told[16]["seconds"] == told[1]["seconds"] > 4  # 3 s of start, one of training a tokenizer
    assert told[16]["memory_bytes"] == told[1]["memory_bytes"] > 8 * len("\n\n".join(TEXTS))  # of text, not of gzip
    two = recipe_over(tmp_path, source, source, placement={"preprocess": {"workers": 16}})
    assert plan(plan_corpus(two, LocalStore(tmp_path / "storage")))["memory_bytes"] == 2 * told[1]["memory_bytes"]


def test_a_corpus_without_text_is_told_with_its_path_and_why(tmp_path):
    (tmp_path / "a.txt").write_bytes("RED".encode("utf-16"))
    recipe = small_recipe(tmp_path)
    corpus = {"type": "text", "path": str(tmp_path / "a.txt")}
    recipe = Recipe.checked({**recipe.model_dump(mode="json"), "corpus": corpus})
    with pytest.raises(DataError, match=r"no text in its first units: .*UTF-8.*, got '.*a\.txt'"):
        plan(plan_corpus(recipe, LocalStore(tmp_path / "storage")))


def test_what_a_hub_does_not_tell_is_not_made_up(tmp_path, capsys):
    recipe = recipe_over(tmp_path, written(tmp_path / "in", "hub"))
    told = look_at_corpus("plan", plan_corpus(recipe, LocalStore(tmp_path / "storage")), Console("text"))
    assert told["tokens"] is told["rows"] is told["disk_bytes"] is told["seconds"] is None
    assert "output   not known: a hub" in capsys.readouterr().out
