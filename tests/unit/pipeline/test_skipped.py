"""A stage that is skipped leaves what it once wrote, whatever became of that since."""

import pytest
from conftest import SmallCorpus

from dllm_core.checkpoints.run_dir import RunDir
from dllm_core.errors import DataError
from dllm_core.storage.store import LocalStore
from workflows.console import Console
from workflows.pipeline import flow
from workflows.pipeline.flow import Pipeline
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
