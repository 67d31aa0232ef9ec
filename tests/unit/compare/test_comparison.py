"""A whole comparison of tiny models without a cluster: what it measures, keeps and refuses."""

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import small_text

from dllm_core.checkpoints.bundle import read_bundle
from dllm_core.config.overrides import apply_overrides
from dllm_core.decoding.config import DecodeConfig
from dllm_core.decoding.unmask import RandomPolicy
from dllm_core.errors import DataError
from dllm_core.evaluation.infill import SIDES, Filled
from dllm_core.noise.schedule import CosineSchedule
from dllm_core.noise.uniform import UniformProcess
from dllm_core.storage.store import LocalStore
from workflows.compare import measures
from workflows.compare.flow import Comparison
from workflows.compare.measures import Question, restored, two_holes
from workflows.compare.recipe import CompareRecipe
from workflows.compare.report import table_lines
from workflows.compare.speakers import Speaker
from workflows.compare.training import Entrant, train_entrant, trained
from workflows.console import Console
from workflows.fan_out import serially

MODELS = {
    "autoregressive": ["objective.type=autoregressive"],
    "masked_lm": ["objective.type=masked_lm"],
    "absorbing": [],
    "uniform": ["noise.process.type=uniform"],
    "hybrid": ["noise.process.type=hybrid"],
    "block_diffusion": ["objective.type=block_diffusion", "noise.block_length=8"],
}
SIZES = [
    *("learning.points=2", "learning.rows=4", "learning.draws=2", "repetition.share=0.5", "repetition.epochs=[1, 2]"),
    *("context.rows=4", "context.length=3", "flexibility.rows=4", "flexibility.lengths=[1, 3]"),
    "flexibility.regex='[A-Z ]+'",
    *(
        "generation.prompts=2",
        "generation.prompt_tokens=4",
        "generation.tokens=8",
        "generation.thresholds=[0.5, 1.0]",
        "generation.steps=[3]",
    ),
]


def comparison_of(root, models=MODELS, overrides=()) -> CompareRecipe:
    (root / "corpus").mkdir(exist_ok=True)
    (root / "corpus" / "a.txt").write_text(small_text())
    shared = {
        "seed": 7,
        "corpus": {"type": "text", "path": str(root / "corpus"), "document": "paragraph", "heldout_fraction": 0.2},
        "tokenizer": {"vocab_size": 300},
        "packing": {"seq_len": 32},
        "noise": "computed",
        "model": {"dim": 16, "layers": 1, "heads": 2, "ffn_dim": 16},
        "train": {"steps": 4, "batch_rows": 2, "log_every": 1, "warmup_steps": 1},
        "decode": {"block_length": 8, "steps_per_block": 8, "max_tokens": 8},
    }
    task = {"problem": {"type": "addition", "digits": 2}, "rows": 150, "problems": 3, "overrides": ["train.steps=2"]}
    values = {"name": "tiny", "storage": {"root": str(root / "out")}, "recipe": shared, "models": models, "task": task}
    return CompareRecipe.checked(apply_overrides(values, [*SIZES, *overrides]))


def compared(recipe: CompareRecipe, fan_out=serially) -> dict:
    store = LocalStore(Path(recipe.storage.root))
    said = Comparison(recipe, store, Console("json"), fan_out).run()
    folder = said["comparison"].removeprefix(f"{store.url}/")
    return json.loads(store.read(f"{folder}/comparison.json")) | {"folder": folder}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    recipe = comparison_of(tmp_path_factory.mktemp("comparison"))
    return recipe, compared(recipe)


def entrant_of(recipe: CompareRecipe, model: str) -> Entrant:
    """The run of a model on the whole text."""
    comparison = Comparison(recipe, LocalStore(Path(recipe.storage.root)), Console("json"), serially)
    [entrant] = [e for e in comparison.entrants() if (e.model, e.data) == (model, "text")]
    return entrant


def test_every_model_is_measured_on_every_axis(finished):
    _, result = finished
    for axis in ("learning", "context", "flexibility", "task"):
        assert set(result[axis]) == set(MODELS), axis
    assert set(result["repetition"]) == set(MODELS) - {"masked_lm"}
    assert set(result["generation"]["models"]) == set(MODELS)


def test_likelihoods_are_told_along_the_tokens_with_their_errors(finished):
    _, result = finished
    assert result["learning"]["masked_lm"] is None
    for points in filter(None, result["learning"].values()):
        assert [point["step"] for point in points] == [2, 4]
        assert points[1]["tokens"] > points[0]["tokens"] > 0
        assert all(point["likelihood"]["standard_error"] > 0 for point in points)
    for points in result["repetition"].values():
        assert [point["data"] for point in points] == ["small-001", "small-002"]
        assert points[0]["corpus_tokens"] == points[1]["corpus_tokens"]


def test_all_models_have_the_same_size_and_the_same_tokens(finished):
    _, result = finished
    for data in ("text", "task", "small-002"):
        runs = [run for run in result["runs"] if run["data"] == data]
        assert len({run["parameters"] for run in runs}) == 1
        assert len({run["corpus_tokens"] for run in runs}) == 1
        assert len({run["step"] for run in runs}) == 1


def test_losses_are_those_of_the_log_to_its_end(finished):
    recipe, result = finished
    for run in result["runs"]:
        tokens = [point["tokens"] for point in run["losses"]]
        assert tokens == sorted(set(tokens))
        assert run["losses"][-1] == {"tokens": run["tokens"], "loss": run["loss"]}
        log = LocalStore(Path(recipe.storage.root)).path(f"runs/{run['run']}/metrics.jsonl").read_text()
        assert len(run["losses"]) == min(50, len(log.splitlines()))


def test_a_hole_is_asked_for_from_the_sides_that_a_model_can_be_shown(finished):
    """A side is hidden by masks, which a model of replaced tokens alone has never seen."""
    _, result = finished
    expected = {"autoregressive": {"left"}, "block_diffusion": {"left"}, "uniform": {"both"}}
    for model, sides in result["context"].items():
        assert set(sides) == expected.get(model, set(SIDES)), model
        for side in sides.values():
            assert sum(part["accuracy"]["rows"] > 0 for part in side["by_distance"]) == (
                2 if side["side"] == "both" else 3
            )


def test_masked_diffusion_keeps_all_text_and_mends_none(finished):
    _, result = finished
    editing = result["flexibility"]["absorbing"]["editing"]
    assert (editing["kept"]["value"], editing["mended"]["value"]) == (1, 0)
    assert editing["right_after"] == editing["right_before"]
    assert result["flexibility"]["autoregressive"]["editing"] is None


def test_what_must_match_does_where_a_model_is_told_so(finished):
    recipe, result = finished
    for model, found in result["flexibility"].items():
        kept = found["constraint"]
        assert (kept is None) == (model in ("uniform", "hybrid"))
        if kept is None:
            continue
        assert (kept["regex"], kept["length"], kept["holes"]) == (recipe.flexibility.regex, 3, 4)
        assert kept["told"]["matches"]["value"] == 1
        assert kept["untold"]["matches"]["value"] < 1  # random weights know no letters
        assert kept["told"]["exact"]["value"] >= kept["untold"]["exact"]["value"]


@pytest.mark.parametrize("model", ["uniform", "hybrid"])
@pytest.mark.parametrize("broken", [0.1, 0.9, 0.99])
def test_text_is_mended_by_the_law_of_a_token_given_all_that_is_shown(finished, model, broken):
    """Bayes by enumeration: the law that the denoiser tells is given the others alone."""
    recipe, _ = finished
    speaker = Speaker(read_bundle(entrant_of(recipe, model).run), torch.device("cpu"), 0, DecodeConfig())
    vocabulary, mask_id = speaker.bundle.config.vocab_size, speaker.mask_id
    text = np.array([i for i in range(vocabulary) if i != mask_id])
    shown = np.random.default_rng(0).choice(text, (3, 32))
    with torch.inference_mode():
        logits = speaker.denoiser(torch.from_numpy(shown)).double().numpy()
        given = restored(speaker, shown, np.ones(shown.shape, bool), broken)
    prior = np.exp(logits[..., text])
    of_shown = np.where(np.eye(len(text), dtype=bool), 1 - broken, broken / (len(text) - 1))
    joint = prior * of_shown[np.searchsorted(text, shown)]
    assert np.array_equal(given, text[joint.argmax(-1)])
    assert not np.array_equal(given, text[prior.argmax(-1)])  # what is shown counts


def test_an_isolated_document_is_mended_as_it_would_be_alone(finished):
    recipe, _ = finished
    speaker = Speaker(read_bundle(entrant_of(recipe, "uniform").run), torch.device("cpu"), 0, DecodeConfig())
    shown, real = np.random.default_rng(1).integers(20, 200, (4, 32)), np.ones((4, 32), bool)
    half = slice(None, 16)
    with torch.inference_mode():
        alone = restored(speaker, shown[:, half], real[:, half], 0.999)
        joined = restored(speaker, shown, real, 0.999)[:, half]
        apart = restored(speaker, shown, real, 0.999, np.repeat([[1, 2]], 16, axis=1).repeat(4, 0).astype(np.int32))
    assert np.array_equal(apart[:, half], alone)
    assert not np.array_equal(joined, alone), "what stands beside a document would change it"


def test_a_model_that_is_told_t_mends_at_the_time_at_which_so_much_is_noise(finished):
    recipe, _ = finished
    run = entrant_of(recipe, "uniform").run
    bundle, told = read_bundle(run), []
    timed = bundle.config.model.model_copy(update={"time_conditioning": True})
    noise = UniformProcess(mask_id=0, vocab_size=300, schedule=CosineSchedule())
    said = SimpleNamespace(process=noise, config=bundle.config.model_copy(update={"model": timed}))

    def denoiser(ids, real, t):
        told.extend(t.tolist())
        return torch.zeros(*ids.shape, bundle.config.vocab_size)

    speaker = SimpleNamespace(
        bundle=said, objective=None, device=torch.device("cpu"), denoiser=denoiser, mask_id=bundle.config.mask_id
    )
    restored(speaker, np.full((3, 32), 5), np.ones((3, 32), bool), 0.1)
    np.testing.assert_allclose(1 - CosineSchedule().alpha(np.array(told)), 0.1, atol=1e-6)


def test_the_tables_have_a_line_for_each_model_and_no_figure_that_is_none(finished):
    recipe, result = finished
    lines = table_lines(result)
    for model in MODELS:
        assert sum(line.startswith(f"| {model} |") for line in lines) >= 5
    assert not any("nan" in line or "None" in line for line in lines)
    page = LocalStore(Path(recipe.storage.root)).read(f"{result['folder']}/report.html").decode()
    assert page.count("<svg") == 3
    assert all(model in page for model in MODELS)


def test_a_second_run_asks_nothing_and_says_the_same(finished):
    recipe, result = finished

    def refuse(function, items, **how):
        assert not items, f"{function} was asked again"
        return []

    again = compared(recipe, refuse)
    assert again == result


def test_another_measure_is_taken_of_the_same_runs(finished):
    recipe, result = finished
    asked = []

    def watch(function, items, **how):
        asked.extend(items)
        return serially(function, items, **how)

    changed = recipe.model_copy(update={"context": recipe.context.model_copy(update={"length": 2})})
    again = compared(changed, watch)
    assert {question.measure for question in asked} == {"context"}
    assert again["learning"] == result["learning"]
    assert again["context"] != result["context"]
    assert again["folder"] != result["folder"]


def test_a_run_that_is_there_is_asked_as_the_recipe_decodes_now(finished):
    recipe, _ = finished
    before = entrant_of(recipe, "absorbing")
    decode = before.recipe.decode.model_copy(update={"policy": RandomPolicy(), "steps_per_block": 1})
    now = replace(before, recipe=before.recipe.model_copy(update={"decode": decode}))
    asked = [measures.answer(Question("task", "absorbing", (one,), recipe)) for one in (before, now)]
    slow, fast = (answered["tokens_per_call"]["value"] for answered in asked)
    assert fast > 1 >= slow


def test_a_bundle_is_made_anew_of_another_number_of_checkpoints(finished):
    recipe, _ = finished
    before = entrant_of(recipe, "uniform")
    averaged = before.recipe.train.model_copy(update={"average_checkpoints": 2})
    now = replace(before, recipe=before.recipe.model_copy(update={"train": averaged}))
    assert trained(before) is not None
    assert trained(now) is None
    seconds = train_entrant(0, now)["seconds"]
    assert read_bundle(now.run).manifest.lineage.checkpoint.count("+") == 1
    assert trained(before) is None
    assert train_entrant(0, before)["seconds"] == seconds == trained(before)["seconds"]  # no step is taken again
    assert "+" not in read_bundle(before.run).manifest.lineage.checkpoint


def test_models_that_read_different_texts_are_no_comparison(tmp_path):
    models = {"one": [], "other": ["packing.seq_len=16", "decode.max_tokens=8"]}
    recipe = comparison_of(tmp_path, models, ["repetition=null", "task=null"])
    with pytest.raises(DataError, match="different texts"):
        compared(recipe)


class Oracle:
    """Fills every hole with its truth, and remembers what it was shown."""

    sides = SIDES

    def __init__(self) -> None:
        self.seen: list = []

    def fill(self, holes, side):
        self.seen.append((side, holes))
        return [Filled(hole.truth, 1) for hole in holes]


def test_the_second_of_two_holes_is_filled_given_the_first(finished):
    entrant, oracle = entrant_of(finished[0], "absorbing"), Oracle()
    found = two_holes(entrant, oracle, rows=4, length=3)
    assert found["exact"]["value"] == found["token"]["value"] == 1
    (side, firsts), (_, seconds) = oracle.seen
    assert side == "both"
    for first, second in zip(firsts, seconds, strict=True):
        at = len(first.before) + len(first.truth)
        given = np.concatenate([first.before, first.truth, first.after])
        assert np.array_equal(second.before[:at], given[:at])  # the first hole's answer is there
        start = len(second.before)
        assert (given[start : start + 3] == 0).sum() == 3  # while it was asked, the second was masked: id 0
        assert np.array_equal(np.delete(given, np.s_[start : start + 3]), np.concatenate([second.before, second.after]))


def test_two_holes_of_a_row_are_of_one_document(finished, monkeypatch):
    """A row of 10 tokens of a document and 22 of another: of the first half's holes some are in either."""
    ids, real = np.arange(24), np.ones((24, 32), bool)
    x0 = np.random.default_rng(2).integers(20, 200, real.shape)
    segments = np.repeat([[1] * 10 + [2] * 22], len(ids), axis=0)
    rows = SimpleNamespace(x0=x0, is_learned=real, is_real=real, segment_ids=segments)
    monkeypatch.setattr(measures, "heldout_rows", lambda *_: (ids, rows))
    monkeypatch.setattr(measures, "_documents_of", lambda *_: None)
    oracle = Oracle()
    assert two_holes(entrant_of(finished[0], "absorbing"), oracle, rows=24, length=3)["exact"]["value"] == 1
    _, (_, seconds) = oracle.seen
    assert 0 < len(seconds) < len(ids)
    for hole in seconds:
        assert np.array_equal(np.concatenate([hole.before, hole.truth, hole.after]), x0[hole.row_id, 10:])
