"""What the evaluate stage writes beside the likelihood: the figures of the plain functions, or why there are none."""

import functools
import json
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator
from dataclasses import asdict

import numpy as np
import pytest
import torch
from conftest import SmallCorpus, make_small_bundle, make_small_corpus, preprocessed, runs_by_kind, small_recipe

from dllm_core.checkpoints.bundle import read_bundle
from dllm_core.checkpoints.run_dir import RunDir
from dllm_core.data.loader import split_rows
from dllm_core.decoding.engine import Engine
from dllm_core.errors import CheckpointError
from dllm_core.evaluation.calibration import score_calibration, summarize_calibration
from dllm_core.evaluation.config import EvaluateConfig
from dllm_core.evaluation.estimators import HeldoutRows
from dllm_core.evaluation.generation import measure_decoding
from dllm_core.evaluation.infill import (
    CausalFiller,
    EngineFiller,
    LeftFiller,
    score_infill,
    sides_seen,
    summarize_holes,
)
from dllm_core.evaluation.models import filler_of, writer_of
from dllm_core.evaluation.samples import Samples, measure_samples, openings
from dllm_core.evaluation.scorers import NGramModel
from dllm_core.evaluation.tasks.addition import AdditionTask
from dllm_core.evaluation.tasks.corpus import write_problems
from dllm_core.evaluation.tasks.measure import answer_problems
from dllm_core.evaluation.tasks.sudoku import SudokuTask
from dllm_core.model.pattern import CAUSAL, FULL, AttentionPattern
from workflows.compare.training import Entrant, train_entrant
from workflows.console import Console
from workflows.drawing import axes, grid, svg
from workflows.evaluate.flow import evaluate
from workflows.evaluate.show import lines, sections
from workflows.fan_out import serially
from workflows.pipeline.flow import Pipeline
from workflows.preprocess.flow import plan_corpus
from workflows.recipe import Recipe, load_recipe
from workflows.target import Target

ADDITION = {"type": "addition", "digits": 1, "test_share": 0.5, "split_seed": 3}
ALL = {
    "rows": 20,
    "draws": 1,
    "prompts": 0,
    "calibration": {"rows": 16, "rates": [0.3, 0.8]},
    "infill": {"rows": 12, "lengths": [1, 4, 29], "sides": ["both", "left", "right"]},
    "samples": {"rows": 10, "scorer": {"type": "ngram", "order": 2}},
    "tasks": [ADDITION, {"type": "sudoku"}],
    "problems": 9,
}
OFF: dict[str, object] = {name: {"rows": 0} for name in ("calibration", "infill", "samples")} | {"tasks": []}
NO_DECODER = "there is no decoder for such a model yet"
KINDS = {
    "masks": ({}, ("both", "left", "right")),
    "autoregressive": ({"objective": {"type": "autoregressive"}}, ("left",)),
    "blocks": ({"noise": {"block_length": 4, "epochs": 1}, "objective": {"type": "block_diffusion"}}, ("left",)),
    "timed": ({"model": {"time_conditioning": True}}, None),
    "masked_lm": ({"objective": {"type": "masked_lm"}}, None),
    "uniform": (
        {"noise": {"process": {"type": "uniform"}, "epochs": 1}, "decode": {"steps": 4}},
        ("both",),
    ),
    "isolated": ({"packing": {"type": "isolated", "seq_len": 32}}, ("both", "left", "right")),
}
EVERY_KIND = pytest.mark.parametrize("kind", KINDS)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """The corpus and the run of a kind, made once."""
    return runs_by_kind(tmp_path_factory, {kind: told[0] for kind, told in KINDS.items()})


@pytest.fixture(scope="module")
def learned(tmp_path_factory) -> tuple[SmallCorpus, RunDir]:
    """A run that restores some of what it is asked for."""
    options = {"steps": 100, "learning_rate": 1e-2, "ema_decay": 0.9, "checkpoint_every": 100}
    corpus = make_small_corpus(tmp_path_factory.mktemp("learned"), train=options)
    run = RunDir(corpus.store, "small-0123456789ab")
    train_entrant(0, Entrant("masks", "text", corpus.recipe, run, corpus.manifest.fingerprint))
    return corpus, run


def asked(recipe: Recipe, **section: object) -> Recipe:
    return recipe.model_copy(update={"evaluate": EvaluateConfig.checked({**ALL, **section})})


def measured(recipe: Recipe, run: RunDir, **section: object) -> dict:
    found = evaluate(asked(recipe, **section), run, serially, lambda *told: None)
    assert found == json.loads(json.dumps(found)), "a receipt gives the same back"
    return found


@pytest.fixture(scope="module")
def figures(made):
    """Of a kind, all of them; measured once, read them only."""
    return functools.cache(lambda kind: measured(made(kind)[0].recipe, made(kind)[1]))


def leaves(value: object, path: str = "") -> Iterator[tuple[str, object]]:
    if isinstance(value, dict | list):
        for name, part in value.items() if isinstance(value, dict) else enumerate(value):
            yield from leaves(part, f"{path}.{name}")
    else:
        yield path, value


def heldout(corpus: SmallCorpus, count: int, of: int = 20) -> HeldoutRows:
    """The rows that a measure of `count` rows takes out of `of` scored ones."""
    scored = np.linspace(0, corpus.manifest.heldout.rows - 1, min(of, corpus.manifest.heldout.rows)).astype(np.int64)
    ids = scored[np.linspace(0, len(scored) - 1, min(count, len(scored))).astype(np.int64)]
    return HeldoutRows.of(split_rows(corpus.store, corpus.manifest, corpus.manifest.heldout, ids), ids)


@EVERY_KIND
def test_a_model_is_measured_in_what_it_can_do_and_says_what_it_cannot(figures, kind):
    (_, sides), result = KINDS[kind], figures(kind)
    if kind == "uniform":
        assert result["calibration"] == {"not_measured": "noise.process.type=uniform: calibration is of masks"}
    else:
        assert [one["rate"] for one in result["calibration"]["by_rate"]] == [0.3, 0.8]
        assert sum(b["tokens"] for b in result["calibration"]["by_rate"][0]["bins"]) > 0
    addition, sudoku = result["tasks"]
    assert addition["task"] == {**ADDITION, "first_digit": "most_significant"}
    if sides is None:
        for figures in (result["infill"], result["samples"], addition, sudoku):
            assert figures["not_measured"].endswith(f": {NO_DECODER}")
    else:
        assert {(one["length"], one["side"]) for one in result["infill"]["holes"]} == {
            (length, side) for length in (1, 4) for side in sides
        }
        why = {(one["length"], one["side"]): one["why"] for one in result["infill"]["left_out"]}
        assert why.keys() == {(n, s) for n in (1, 4, 29) for s in ("both", "left", "right")} - {
            (n, s) for n in (1, 4) for s in sides
        }
        for side in ("both", "left", "right"):
            assert why[29, side] == ("no row has room" if side in sides else f"it sees {sides[0]} only")
        assert {one["over"] for one in result["infill"]["gains"]} == (
            set(sides) - {"both"} if "both" in sides else set()
        )
        assert result["samples"]["model"]["samples"] == result["samples"]["heldout"]["samples"] > 0
        assert addition["exact"]["rows"] == addition["problems"] == 9
        assert sudoku["not_measured"] == "a problem takes 34 tokens, the context holds 32"
    told = dict(lines(result))
    assert told.keys() == {"calibration", "infill", "samples", "addition", "sudoku"}
    assert all(
        "\n" not in line and ("not measured" in line) != ("±" in line or "95 %" in line) for line in told.values()
    )
    page = "".join(sections(result))
    assert ("Not measured: noise.process.type=uniform: calibration is of masks" in page) == (kind == "uniform")
    assert "src=" not in page
    assert page.count("<svg") == (kind != "uniform") + (sides is not None)


@EVERY_KIND
def test_no_figure_depends_on_how_work_is_cut_up(made, figures, kind):
    corpus, run = made(kind)
    assert asked(corpus.recipe).evaluate.batch_rows > 1
    whole, parts = (dict(leaves(found)) for found in (figures(kind), measured(corpus.recipe, run, batch_rows=1)))
    assert whole.keys() == parts.keys()
    for path, value in whole.items():
        assert parts[path] == (pytest.approx(value, rel=1e-5) if isinstance(value, float) else value), path


def test_what_is_not_asked_for_is_null_and_costs_no_line(made):
    corpus, run = made("masks")
    result = measured(corpus.recipe, run, **OFF)
    assert [result[name] for name in OFF] == [None, None, None, []]
    assert list(lines(result)) == sections(result) == []


@pytest.mark.parametrize(
    ("kind", "pattern"),
    [("masks", FULL), ("autoregressive", CAUSAL), ("blocks", AttentionPattern("block_diffusion", 4)), ("timed", FULL)],
)
def test_confidence_is_asked_for_in_the_pass_that_a_model_was_trained_in(made, figures, kind, pattern):
    corpus, run = made(kind)
    bundle = read_bundle(run)
    scores = score_calibration(
        bundle.denoiser(),
        bundle.process,
        heldout(corpus, 16),
        rate=0.8,
        seed=7,
        device=torch.device("cpu"),
        pattern=pattern,
        is_timed=kind == "timed",
    )
    expected, found = summarize_calibration(scores), figures(kind)["calibration"]["by_rate"][1]
    assert found["tokens"] == expected.tokens
    for name in ("accuracy", "confidence", "expected_error", "brier"):
        estimate = getattr(expected, name)
        assert found[name]["value"] == pytest.approx(estimate.value, rel=1e-5)
        assert found[name]["standard_error"] == pytest.approx(estimate.standard_error, rel=1e-4)


def test_holes_are_those_of_the_plain_function_and_the_gain_is_of_both_sides(learned):
    """Filled greedily, however hot the recipe decodes."""
    corpus, run = learned
    hot = corpus.recipe.model_copy(update={"decode": corpus.recipe.decode.model_copy(update={"temperature": 1.0})})
    result, bundle = measured(hot, run, **{**OFF, "infill": ALL["infill"]})["infill"], read_bundle(run)
    assert result["decode"]["temperature"] == 0
    filler = filler_of(bundle, corpus.recipe.decode, seed=7)
    never = corpus.tokenizer.special_ids
    scores = score_infill(
        filler, heldout(corpus, 12), lengths=[1, 4], sides=["both", "left", "right"], seed=7, never=never
    )
    for one, found in zip(scores, result["holes"], strict=True):
        expected = summarize_holes(one)
        assert (found["length"], found["side"]) == (one.length, one.side)
        assert found["token"]["value"] == expected.token.value
        assert found["exact"]["high"] == expected.exact.high
        assert found["tokens_per_call"]["standard_error"] == expected.tokens_per_call.standard_error
    token = {(one["length"], one["side"]): one["token"]["value"] for one in result["holes"]}
    for gain in result["gains"]:
        difference = token[gain["length"], "both"] - token[gain["length"], gain["over"]]
        assert gain["token"]["value"] == pytest.approx(difference, abs=1e-12)
    assert len(set(token.values())) > 2, "sides and lengths differ"


@pytest.mark.parametrize("kind", ["masks", "autoregressive", "blocks", "isolated"])
def test_text_is_judged_by_a_law_of_the_training_rows_beside_the_text_that_it_goes_on_from(made, figures, kind):
    corpus, run = made(kind)
    result, bundle, manifest = figures(kind)["samples"], read_bundle(run), corpus.manifest
    train = split_rows(corpus.store, manifest, manifest.train, np.arange(manifest.train.rows))
    scorer = NGramModel.fit(
        train.x0,
        train.is_real,
        order=2,
        vocab_size=300,
        never={bundle.config.mask_id},
        segment_ids=train.segment_ids,
    )
    assert result["scorer"] == scorer.name
    assert f"{manifest.train.tokens} tokens" in scorer.name
    prompts, texts = openings(heldout(corpus, 10), 12, context=32, end_id=bundle.config.eos_id)
    hot = corpus.recipe.decode.model_copy(update={"temperature": 1.0})
    answers = [answer.tokens for answer in writer_of(bundle, hot).write(prompts, 12, seed=7)]
    for part, name in ((answers, "model"), (texts, "heldout")):
        expected = measure_samples(Samples.of(prompts, part), scorer)
        assert result[name]["perplexity"]["value"] == pytest.approx(expected.perplexity.value)
        assert result[name]["perplexity"]["standard_error"] == pytest.approx(expected.perplexity.standard_error)
        assert result[name]["entropy"]["value"] == pytest.approx(expected.entropy.value)
    assert result["decode"]["temperature"] == 1.0
    assert result["model"]["perplexity"]["value"] > 3 * result["heldout"]["perplexity"]["value"], "random weights"


def test_an_autoregressive_run_may_be_the_scorer_and_one_that_does_not_fit_is_refused_before_training(made):
    (corpus, run), (_, other) = made("masks"), made("autoregressive")
    fit = {"rows": 4, "scorer": {"type": "autoregressive", "run": other.url}}
    result = measured(corpus.recipe, run, **{**OFF, "samples": fit})
    assert result["samples"]["scorer"] == f"autoregressive {other.name}, step 0"
    misfit = {"rows": 4, "scorer": {"type": "autoregressive", "run": run.url}}
    recipe = asked(corpus.recipe, samples=misfit)
    untrained = RunDir(corpus.store, "small-000000000000")
    with (
        Pipeline(Target(recipe, untrained, plan_corpus(recipe, corpus.store)), Console("json")) as pipeline,
        pytest.raises(CheckpointError, match="is no autoregressive model"),
    ):
        pipeline.run()
    assert untrained.read_json("stages/train.json") is None


def test_a_scorer_s_run_is_written_out_from_where_one_stands(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "r.yaml").write_text("corpus: {type: text, path: t}\n", encoding="ascii")
    scorer = "evaluate.samples.scorer={type: autoregressive, run: runs/a}"
    recipe = load_recipe(tmp_path / "r.yaml", [scorer])
    assert recipe.evaluate.samples.scorer.run == str(tmp_path / "runs" / "a")


def test_problems_are_of_the_test_part_and_answered_as_it_is_served(made, figures):
    corpus, run = made("masks")
    found, bundle = figures("masks")["tasks"][0], read_bundle(run)
    task = AdditionTask.checked(ADDITION)
    problems = task.problems("test", 9, seed=7)
    writer = writer_of(bundle, corpus.recipe.decode)
    answered = answer_problems(writer, bundle.tokenizer(), task, problems, rooms=[3] * 9, seed=7)
    expected = [
        {"prompt": problem.prompt, "answer": one.text, "is_correct": one.grade.is_correct}
        for problem, one in zip(problems, answered, strict=True)
    ]
    assert found["examples"] == expected[:4]
    assert found["pieces"]["value"] == sum(a.grade.right for a in answered) / sum(a.grade.asked for a in answered)
    more = measured(corpus.recipe, run, **{**OFF, "tasks": [ADDITION]}, problems=60)["tasks"][0]
    assert more["not_measured"].startswith("the test part holds ")


def test_a_filler_sees_the_sides_that_are_told(made):
    for kind, filler in (
        ("masks", EngineFiller),
        ("autoregressive", CausalFiller),
        ("blocks", LeftFiller),
        ("uniform", EngineFiller),
    ):
        bundle = read_bundle(made(kind)[1])
        found = filler_of(bundle, made(kind)[0].recipe.decode, seed=0)
        assert isinstance(found, filler)
        assert found.sides == sides_seen(bundle.manifest.objective, bundle.manifest.process)


def test_the_cost_of_decoding_is_that_of_answers_to_whole_prompts(tmp_path):
    """A padded row's first quarter may be half a question, or a whole one with its answer and the filler behind it."""
    problems = SudokuTask().problems("train", 60, seed=3) + AdditionTask(digits=1).problems("train", 60, seed=3)
    (tmp_path / "corpus").mkdir()
    write_problems(tmp_path / "corpus" / "train.jsonl", problems)
    path = str(tmp_path / "corpus" / "train.jsonl")
    sections = {
        "corpus": {"type": "jsonl", "path": path, "record": {"type": "pair"}, "heldout_fraction": 0.2},
        "packing": {"type": "padded", "seq_len": 40},
    }
    values = small_recipe(tmp_path).model_dump(mode="json") | sections
    corpus = preprocessed(Recipe.checked(values))
    run = make_small_bundle(corpus, corpus.store.root)
    rows = heldout(corpus, 4, of=32)
    prompts = [
        ids[real & ~counted].tolist() for ids, real, counted in zip(rows.x0, rows.is_real, rows.counted, strict=True)
    ]
    assert len({len(prompt) for prompt in prompts}) > 1
    told = evaluate(corpus.recipe, run, serially, lambda *told: None)["decoding"]
    expected = measure_decoding(Engine(read_bundle(run)), prompts, corpus.recipe.decode, context=40, seed=7)
    assert {name: told[name] for name in asdict(expected)} == asdict(expected)
    assert told["prompts"] == 4


def rows_of(x0, counted, segments=None) -> HeldoutRows:
    x0 = np.array(x0)
    real = x0 > 0
    return HeldoutRows(x0, np.array(counted, bool) & real, np.arange(len(x0)), real, segments)


def test_an_opening_is_a_prompt_or_a_quarter_and_what_the_text_says_behind_it():
    x0 = [[5, 6, 7, 8, 5, 6, 7, 2], [5, 6, 7, 8, 5, 2, 7, 8], [5, 6, 7, 8, 9, 9, 0, 0], [0] * 8]
    plain = openings(rows_of(x0, np.ones((4, 8))), 4, context=8, end_id=2)
    assert plain == ([[5, 6], [5, 6], [5]], [[7, 8, 5, 6], [7, 8, 5], [6, 7, 8, 9]])
    prompted = rows_of(x0, np.arange(8) >= np.array([[3], [1], [9], [0]]))
    assert openings(prompted, 4, context=8, end_id=2) == ([[5, 6, 7], [5]], [[8, 5, 6, 7], [6, 7, 8, 5]])
    assert openings(prompted, 6, context=8, end_id=2) == ([[5]], [[6, 7, 8, 5]]), "no room behind a long prompt"
    segments = np.array([[0, 0, 0, 0, 1, 1, 1, 1]] * 4, np.int32)
    isolated = openings(rows_of(x0, np.ones((4, 8)), segments), 5, context=8, end_id=2)
    assert isolated == ([[5], [5], [5]], [[6, 7, 8], [6, 7, 8], [6, 7, 8]]), "another document is not its text"


def test_a_plot_is_the_same_bytes_and_whole_by_itself():
    def drawn() -> str:
        figure, [axis, _] = axes(1, 2, 2.0)
        axis.errorbar([1, 2], [3, 4], yerr=[0.1, 0.2], fmt="o")
        return svg(figure, "a < b")

    page = drawn()
    assert drawn() == page
    root = ElementTree.fromstring(page)
    assert root.attrib["aria-label"] == "a < b"
    ids = {part.attrib["id"] for part in root.iter() if "id" in part.attrib}
    used = {value[1:] for part in root.iter() for name, value in part.attrib.items() if name.endswith("href")}
    assert used <= ids, "what is pointed at is there"
    assert not [name for name in ids if name.startswith(("axes_", "patch_", "figure_"))]


def test_a_table_escapes_and_a_short_row_is_filled():
    assert grid(["a", "b", "c"], [["<", "2", "3"], ["x", "why not"]]) == (
        "<table><tr><th>a</th><th>b</th><th>c</th></tr><tr><td>&lt;</td><td>2</td><td colspan=1>3</td></tr>"
        "<tr><td>x</td><td colspan=2>why not</td></tr></table>"
    )
