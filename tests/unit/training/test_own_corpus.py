"""A run's folder means the corpus that its weights were trained on, whatever became of the files or of an override."""

import os
import shutil
from pathlib import Path

import pytest
from starts import Prepared, texts, values_of

from dllm_core.checkpoints.bundle import read_bundle
from dllm_core.data.manifest import corpus_prefix
from dllm_core.data.tokenizer import Tokenizer
from dllm_core.errors import ConfigError, DataError
from workflows.evaluate.flow import evaluate
from workflows.fan_out import serially
from workflows.pipeline.bundle import make_bundle
from workflows.preprocess.flow import Preprocessing, plan_corpus
from workflows.preprocess.verbs import verify
from workflows.target import open_target
from workflows.train.job import RUN_FACTS

SMALL = {"model": {"dim": 32, "layers": 1, "heads": 2, "ffn_dim": 64}, "tokenizer": {"vocab_size": 300}}


@pytest.fixture
def prepared(tmp_path) -> Prepared:
    """A trained run with its bundle; its text is in `tmp_path/text`."""
    prepared = Prepared(values_of(tmp_path, texts(tmp_path / "text"), **SMALL))
    prepared.trained(steps=2)
    return prepared


def add_text(folder: Path) -> None:
    (folder / "more.txt").write_text("\n\n".join(f"quite other words {i * i}" for i in range(200)))


def touch(folder: Path) -> None:
    os.utime(folder / "names.txt", (1, 1))


@pytest.mark.parametrize("is_told", ["by its bundle", "by its training"])
@pytest.mark.parametrize("change", [add_text, touch, shutil.rmtree])
def test_a_run_keeps_its_corpus_whatever_becomes_of_the_files(prepared, tmp_path, change, is_told):
    run, tokenizer = prepared.run, read_bundle(prepared.run).manifest.tokenizer_sha256
    if is_told == "by its training":
        run.write_json(RUN_FACTS, {"corpus": prepared.corpus})
        shutil.rmtree(run.store.path(run.key("bundle")))
    change(tmp_path / "text")
    target = open_target(run.url, ["decode.max_tokens=8"])
    assert target.corpus == prepared.corpus
    assert target.plan.existing() == prepared.manifest
    assert verify(target.plan, serially, lambda *told: None) == []
    make_bundle(target.recipe, target.run, target.corpus, pytest.fail)
    assert read_bundle(run).manifest.tokenizer_sha256 == tokenizer
    with pytest.raises(DataError, match="nothing of it can be made"):
        Preprocessing(target.plan, serially).run()


def test_other_files_are_refused_and_moved_ones_are_not(prepared, tmp_path):
    (tmp_path / "other").mkdir()
    add_text(tmp_path / "other")
    with pytest.raises(ConfigError, match=f"^corpus.path=.*: would make another run than, got '{prepared.run.name}'"):
        open_target(prepared.run.url, [f"corpus.path={tmp_path / 'other'}"])
    with pytest.raises(DataError, match="no such file or folder"):
        open_target(prepared.run.url, [f"corpus.path={tmp_path / 'nowhere'}"])
    (tmp_path / "text").rename(tmp_path / "moved")
    assert open_target(prepared.run.url, [f"corpus.path={tmp_path / 'moved'}"]).plan.units()


def test_a_run_whose_corpus_can_not_be_had_is_refused(prepared, tmp_path):
    folder = prepared.run.store.path(corpus_prefix(prepared.corpus))
    shutil.rmtree(folder)
    assert open_target(prepared.run.url, []).corpus == prepared.corpus  # its files still make it
    add_text(tmp_path / "text")
    with pytest.raises(DataError, match=f"is not in storage, got '{prepared.corpus}': bring them back"):
        open_target(prepared.run.url, [])


def test_a_bundle_is_never_made_with_other_rows_than_its_weights_saw(prepared, tmp_path):
    add_text(tmp_path / "text")
    other = Preprocessing(plan_corpus(prepared.recipe, prepared.run.store), serially).run()
    with pytest.raises(DataError, match=f"its rows are {other.rows_digest} and the checkpoint of step 2"):
        make_bundle(prepared.recipe, prepared.run, other.fingerprint, pytest.fail)
    train = prepared.recipe.train.model_copy(update={"accept_corpus": other.rows_digest})
    accepted = prepared.recipe.model_copy(update={"train": train})
    assert make_bundle(accepted, prepared.run, other.fingerprint, pytest.fail).corpus == other.fingerprint


def test_a_bundle_is_not_measured_on_rows_of_another_tokenizer(prepared, monkeypatch):
    """As another release of the library trains one: the corpus has its old name, and its ids mean other text."""
    train, folder = Tokenizer.train, prepared.run.store.path(corpus_prefix(prepared.corpus))
    shutil.rmtree(folder)
    monkeypatch.setattr(Tokenizer, "train", lambda texts, config: train([text[::-1] for text in texts], config))
    assert (
        Preprocessing(plan_corpus(prepared.recipe, prepared.run.store), serially).run().fingerprint == prepared.corpus
    )
    with pytest.raises(DataError, match=f"^{folder}: was made anew, with another tokenizer than that of .*/bundle"):
        evaluate(prepared.recipe, prepared.run, serially, lambda *told: None)
