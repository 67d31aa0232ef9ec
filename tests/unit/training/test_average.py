"""The mean of checkpoints is the mean, whatever their number, and a bundle tells what it was made of."""

import pytest
import torch
from conftest import SmallCorpus
from safetensors.torch import load_file, save_file

from dllm_core.checkpoints.bundle import read_bundle
from dllm_core.checkpoints.run_dir import JsonLines, RunDir
from dllm_core.checkpoints.store import CheckpointStore, TrainPosition
from dllm_core.errors import CheckpointError, ConfigError
from dllm_core.model.denoiser import Denoiser
from dllm_core.model.pretrained import weights_of
from dllm_core.storage.store import LocalStore
from dllm_core.training.average import average_weights
from dllm_core.training.config import TrainConfig
from workflows.console import Console
from workflows.pipeline.bundle import bundle_inputs, make_bundle
from workflows.pipeline.flow import Pipeline
from workflows.preprocess.flow import CorpusPlan
from workflows.target import Target
from workflows.train.job import denoiser_config

SHAPES = {"b.weight": (3, 5), "a": (7,), "scale": (), "none": (0, 4), "c": (2, 3, 1)}


def written(path, seed: int, shapes=SHAPES):
    torch.manual_seed(seed)
    tensors = {name: torch.randn(shape) * 10**seed for name, shape in shapes.items()}
    save_file(tensors, path)
    return tensors


@pytest.mark.parametrize("number", [1, 2, 5])
def test_it_is_the_mean_of_each_tensor_to_the_last_bit(tmp_path, number):
    files = [tmp_path / f"{k}.safetensors" for k in range(number)]
    tensors = [written(file, seed) for seed, file in enumerate(files)]
    average_weights(files, tmp_path / "mean.safetensors")
    found = load_file(tmp_path / "mean.safetensors")
    assert found.keys() == SHAPES.keys()
    for name, shape in SHAPES.items():
        exact = torch.stack([each[name].double() for each in tensors]).mean(0)
        assert found[name].shape == torch.Size(shape)
        assert torch.equal(found[name], exact.float())


@pytest.mark.parametrize("shapes", [{**SHAPES, "more": (2,)}, {**SHAPES, "a": (8,)}, {"a": (7,)}])
def test_checkpoints_of_another_model_are_refused_by_name(tmp_path, shapes):
    files = [tmp_path / "one.safetensors", tmp_path / "two.safetensors"]
    written(files[0], 0)
    written(files[1], 1, shapes)
    with pytest.raises(CheckpointError, match=r"two\.safetensors: holds other tensors than .*one\.safetensors"):
        average_weights(files, tmp_path / "mean.safetensors")


@pytest.fixture
def trained(small_corpus: SmallCorpus, tmp_path):
    """A run with checkpoints at steps 10, 20 and 30 whose averaged weights are random, and their weights."""
    run = RunDir(LocalStore(small_corpus.store.root), f"{tmp_path.name}-0123456789ab")
    run.store.put(run.key("recipe.yaml"), small_corpus.recipe.to_yaml().encode())
    config = denoiser_config(small_corpus.recipe, small_corpus.manifest, small_corpus.tokenizer)
    weights = {}
    for step, heldout in ((10, 3.0), (20, None), (30, 3.5)):
        torch.manual_seed(step)
        weights[step] = weights_of(Denoiser(config))
        file = tmp_path / "ema.safetensors"
        save_file(weights[step], file)
        CheckpointStore(run).save(TrainPosition(step=step), {file.name: file}, heldout)
    return run, weights


@pytest.mark.parametrize(("number", "steps"), [(1, [30]), (2, [30, 20]), (3, [30, 20, 10]), (4, [30, 20, 10])])
def test_a_bundle_holds_the_mean_of_the_newest_and_names_them(small_corpus, trained, number, steps):
    holds_the_mean(small_corpus, trained, steps, average_checkpoints=number)


@pytest.mark.parametrize(("number", "steps"), [(1, [10]), (2, [10, 30]), (3, [10, 30, 20])])
def test_the_best_are_those_of_the_least_heldout_nats_and_what_has_no_score_is_last(
    small_corpus, trained, number, steps
):
    holds_the_mean(small_corpus, trained, steps, average_checkpoints=number, average_from="best")


def holds_the_mean(small_corpus, trained, steps, **fields):
    run, weights = trained
    train = small_corpus.recipe.train.model_copy(update=fields)
    recipe = small_corpus.recipe.model_copy(update={"train": train})
    lineage = make_bundle(recipe, run, small_corpus.manifest.fingerprint, pytest.fail)
    assert lineage.checkpoint == "+".join(f"step-{step:08d}" for step in steps)
    assert lineage.step == max(steps)
    held = weights_of(read_bundle(run).denoiser())
    for name, tensor in held.items():
        exact = torch.stack([weights[step][name].detach().double() for step in steps]).mean(0)
        assert torch.equal(tensor, exact.float())


def test_a_damaged_checkpoint_is_passed_over(small_corpus, trained):
    run, _ = trained
    run.store.path(run.key("checkpoints/step-00000030/ema.safetensors")).write_bytes(b"damaged")
    train = small_corpus.recipe.train.model_copy(update={"average_checkpoints": 2})
    recipe = small_corpus.recipe.model_copy(update={"train": train})
    refused = []
    lineage = make_bundle(recipe, run, small_corpus.manifest.fingerprint, refused.append)
    assert (lineage.checkpoint, lineage.step) == ("step-00000020+step-00000010", 20)
    assert [error.place.split("/")[-2] for error in refused] == ["step-00000030"]


def test_a_bundle_is_made_anew_for_another_number_and_receipts_of_one_stay(small_corpus, trained):
    run, _ = trained
    inputs = set()
    for number in (1, 2, 3):
        train = small_corpus.recipe.train.model_copy(update={"average_checkpoints": number})
        inputs.add(bundle_inputs(small_corpus.recipe.model_copy(update={"train": train}), run, 30))
    train = small_corpus.recipe.train.model_copy(update={"average_from": "best"})
    inputs.add(bundle_inputs(small_corpus.recipe.model_copy(update={"train": train}), run, 30))
    assert len(inputs) == 4
    assert bundle_inputs(small_corpus.recipe, run, 30) in inputs


def test_no_more_are_averaged_than_are_kept():
    assert TrainConfig(average_checkpoints=3, keep_checkpoints=3).identity == TrainConfig().identity
    with pytest.raises(ConfigError, match=r"^train\.average_checkpoints: must be <= train\.keep_checkpoints=2, got 3$"):
        TrainConfig.checked({"average_checkpoints": 3}, "train")
    assert TrainConfig(average_checkpoints=3, average_from="best")  # the best are kept besides
    with pytest.raises(ConfigError, match=r"^train\.average_from: needs held-out scores: train\.heldout_every is null"):
        TrainConfig.checked({"average_from": "best", "heldout_every": None}, "train")


@pytest.fixture
def stage(small_corpus, trained):
    """The bundle stage with another number of checkpoints: what it reports."""
    run, _ = trained

    def bundled(number: int) -> dict:
        train = small_corpus.recipe.train.model_copy(update={"average_checkpoints": number, "keep_checkpoints": 3})
        recipe = small_corpus.recipe.model_copy(update={"train": train})
        plan = CorpusPlan(recipe, small_corpus.store, (), small_corpus.manifest.fingerprint)
        with Pipeline(Target(recipe, run, plan), Console("json")) as pipeline:
            return pipeline.bundle()

    return bundled


def test_an_older_checkpoint_in_the_place_of_a_damaged_one_is_told_until_that_is_whole(trained, stage, capsys):
    run, _ = trained
    damaged = run.store.path(run.key("checkpoints/step-00000030/ema.safetensors"))
    whole = damaged.read_bytes()
    damaged.write_bytes(b"damaged")
    for _ in range(2):
        assert stage(1)["step"] == 20
        assert "passed over, the bundle is of step-00000020: " in capsys.readouterr().err
    events = [event["event"] for event in JsonLines(run, "events.jsonl").read()]
    assert events == ["checkpoint_refused", "done"] * 2
    damaged.write_bytes(whole)
    assert stage(1)["step"] == 30


def test_a_bundle_that_a_kill_left_half_written_is_made_again(trained, stage, monkeypatch):
    run, _ = trained
    stage(1)
    put = LocalStore.put

    def killed(store, key, data):
        if key == run.key("bundle/bundle.json"):
            raise KeyboardInterrupt
        put(store, key, data)

    monkeypatch.setattr(LocalStore, "put", killed)
    with pytest.raises(KeyboardInterrupt):
        stage(2)
    monkeypatch.undo()
    with pytest.raises(CheckpointError, match="does not match its sha256"):
        read_bundle(run)
    assert stage(1)["checkpoint"] == read_bundle(run).manifest.lineage.checkpoint == "step-00000030"
