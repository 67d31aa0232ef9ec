"""A stage that is skipped leaves what it once wrote, whatever became of that since."""

from types import SimpleNamespace

import pytest
from conftest import SmallCorpus, make_small_bundle

from dllm_core.checkpoints.bundle_manifest import read_manifest
from dllm_core.checkpoints.run_dir import JsonLines, RunDir
from dllm_core.checkpoints.store import CheckpointStore, TrainPosition
from dllm_core.errors import DataError
from dllm_core.storage.store import LocalStore
from workflows.console import Console
from workflows.pipeline import flow
from workflows.pipeline.bundle import bundle_inputs
from workflows.pipeline.flow import Pipeline
from workflows.pipeline.receipts import Receipts
from workflows.target import Target

FIGURES = {"nelbo": None, "unigram_entropy": 2.5, "decoding": None, "standard_error": None, "tasks": []}
FIGURES |= dict.fromkeys(("calibration", "infill", "samples"))


def test_figures_that_are_gone_or_of_a_killed_evaluation_are_written_again(
    small_corpus: SmallCorpus, tmp_path, monkeypatch
):
    run, evaluations = RunDir(LocalStore(tmp_path), "run-0123456789ab"), list[str]()
    run.write_json("bundle/bundle.json", {"decode": {}})
    monkeypatch.setattr(flow, "evaluate", lambda *_: evaluations.append("one") or dict(FIGURES))
    monkeypatch.setattr(Pipeline, "_cluster", lambda _: None)
    with Pipeline(Target(small_corpus.recipe, run, None), Console("json")) as pipeline:
        for damage in (lambda: None, lambda: run.write_json("evaluation.json", {**FIGURES, "unigram_entropy": 9.9})):
            damage()
            assert pipeline.evaluate() == run.read_json("evaluation.json") == FIGURES
        run.store.delete(run.key("evaluation.json"))
        assert pipeline.evaluate() == run.read_json("evaluation.json") == FIGURES
        run.store.put(run.key("evaluation.json"), b"{")
        with pytest.raises(DataError, match="is not JSON: delete it and run again"):
            pipeline.evaluate()
    assert evaluations == ["one"]


@pytest.mark.parametrize("lost", ["model.safetensors", "tokenizer.json", "bundle.json"])
def test_a_bundle_of_which_a_file_is_gone_or_cut_is_made_again(small_corpus: SmallCorpus, tmp_path, monkeypatch, lost):
    run, recipe, made = make_small_bundle(small_corpus, tmp_path), small_corpus.recipe, list[int]()
    lineage = read_manifest(run)[0].lineage
    Receipts(run).write("bundle", bundle_inputs(recipe, run, 0), lineage.model_dump(mode="json"))
    key = run.key(f"bundle/{lost}")
    whole = run.store.read(key)

    def make(*_):
        made.append(1)
        run.store.put(key, whole)
        return lineage

    monkeypatch.setattr(flow, "make_bundle", make)
    with Pipeline(Target(recipe, run, SimpleNamespace(fingerprint="corpus")), Console("json")) as pipeline:
        for damage in (lambda: None, lambda: run.store.delete(key), lambda: run.store.put(key, whole[:-1])):
            damage()
            assert pipeline.bundle() == lineage.model_dump(mode="json")
            assert run.store.read(key) == whole
    assert made == [1, 1]


def test_a_training_that_was_ended_behind_its_last_save_tells_what_it_was(
    small_corpus: SmallCorpus, tmp_path, monkeypatch
):
    run = RunDir(LocalStore(tmp_path), "run-0123456789ab")
    (tmp_path / "model").write_bytes(b"weights")
    CheckpointStore(run).save(TrainPosition(step=6, tokens_seen=960), {"model.safetensors": tmp_path / "model"})
    for step, loss in ((4, 3.5), (6, 2.5)):
        JsonLines(run, "metrics.jsonl").append({"step": step, "tokens": 160 * step, "loss": loss})
    monkeypatch.setattr(flow, "train", lambda *_: None)  # it is at its end, so no rank takes a step
    monkeypatch.setattr(Pipeline, "_cluster", lambda _: None)
    with Pipeline(Target(small_corpus.recipe, run, SimpleNamespace(fingerprint="corpus")), Console("json")) as pipeline:
        monkeypatch.setattr(pipeline, "_check_room", lambda needed: None)
        told = pipeline.train()
        assert {name: told[name] for name in ("step", "tokens", "loss")} == {"step": 6, "tokens": 960, "loss": 2.5}
        assert pipeline.train() == told
