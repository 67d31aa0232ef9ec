"""Bundles of every objective through the evaluate stage, its report and the verbs that decode: figures or a no."""

import functools
import json
import math

import numpy as np
import pytest
import torch
from conftest import make_small_bundle, make_small_corpus, runs_by_kind, small_text
from hypothesis import given
from hypothesis import strategies as st
from sentence_pieces import sentence_pieces

from dllm_core.checkpoints.bundle import read_bundle
from dllm_core.checkpoints.run_dir import RunDir
from dllm_core.data.loader import documents_of, split_rows
from dllm_core.data.tokenizer import Tokenizer, TokenizerConfig
from dllm_core.decoding.engine import Engine
from dllm_core.errors import ConfigError
from dllm_core.estimate import ratio
from dllm_core.evaluation.config import EvaluateConfig
from dllm_core.evaluation.estimators import ExactNLL, HeldoutRows
from dllm_core.evaluation.likelihood import score_rows
from workflows.console import Console
from workflows.evaluate.flow import evaluate
from workflows.fan_out import serially
from workflows.generate.asked import Asked
from workflows.generate.flow import Generator
from workflows.pipeline.flow import _about_evaluation
from workflows.pipeline.report import _loss_curve, write_report
from workflows.preprocess.flow import plan_corpus
from workflows.preprocess.inspect import inspect
from workflows.recipe import Recipe
from workflows.serve.flow import serve_forever

UNIFORM = {"noise": {"process": {"type": "uniform"}, "epochs": 1}, "decode": {"steps": 8}}
BLOCKS = {"noise": {"block_length": 4, "epochs": 1}, "objective": {"type": "block_diffusion"}}
KINDS = {
    "masks": ({}, "exact-count", None),
    "chain": ({"noise": {"steps": 8, "epochs": 1}}, "stratified-time", None),
    "timed": ({"model": {"time_conditioning": True}}, "stratified-time", "model.time_conditioning: "),
    "uniform": (UNIFORM, "stratified-time", None),
    "hybrid": (
        {"noise": {"process": {"type": "hybrid", "p_u": 0.4}, "epochs": 1}, "decode": {"steps": 8}},
        "stratified-time",
        None,
    ),
    "blocks": ({**BLOCKS, "packing": {"type": "isolated", "seq_len": 32}}, "exact-count", None),
    "autoregressive": ({"objective": {"type": "autoregressive"}}, "exact", None),
    "masked_lm": ({"objective": {"type": "masked_lm"}}, None, "objective.type: "),
}  # fmt: skip
EVERY_KIND = pytest.mark.parametrize("kind", KINDS)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """The corpus and the run of a kind, made once."""
    return runs_by_kind(tmp_path_factory, {kind: told[0] for kind, told in KINDS.items()})


@pytest.fixture(scope="module")
def figures(made):
    """Of a kind, as its recipe asks for them; measured once, read them only."""
    return functools.cache(lambda kind: evaluated(made(kind)[0].recipe, made(kind)[1]))


def evaluated(recipe: Recipe, run: RunDir, **section: object) -> dict:
    asked = EvaluateConfig.checked({**recipe.evaluate.model_dump(), **section})
    changed = recipe.model_copy(update={"evaluate": asked})
    return json.loads(json.dumps(evaluate(changed, run, serially, lambda *told: None)))


@EVERY_KIND
def test_a_bundle_is_scored_as_it_was_trained_and_decoded_where_it_can_be(made, figures, kind):
    (corpus, _), (_, estimator, refusal) = made(kind), KINDS[kind]
    result = figures(kind)
    heldout = corpus.manifest.heldout
    assert result["estimator"] == estimator
    assert result["rows"] == heldout.rows
    assert result["tokens"] == heldout.tokens
    assert result["conventions"] == {"tokens": "real", "end_tokens": "counted", "conditioned_on": "nothing"}
    assert (result["decoding"] is None) == (refusal is not None)
    if refusal is None:
        told = {
            "autoregressive": (None, None, "(token by token)"),
            **dict.fromkeys(("uniform", "hybrid"), ({"type": "ancestral", "steps": 8}, None, "(ancestral 8)")),
        }
        plain = ({"type": "threshold", "threshold": 0.9}, 4, "(threshold 0.9)")
        policy, length, words = told.get(kind, plain)
        assert (result["decoding"]["policy"], result["decoding"]["block_length"]) == (policy, length)
        assert _about_evaluation(result).endswith(words)
        assert result["decoding"]["tokens_per_call"] == 1 or kind != "autoregressive"
    if estimator is None:
        assert [result[name] for name in ("nelbo", "standard_error", "gain", "bits_per_byte", "draws")] == [
            None
        ] * 4 + [0]
        assert "no likelihood" in _about_evaluation(result)
        return
    above = 1.5 if kind not in ("uniform", "hybrid") else 15  # tied random weights trust what they are shown
    assert math.log(300) - 1.5 < result["nelbo"] < math.log(300) + above  # random weights over 300 ids
    assert result["gain"] == result["unigram_entropy"] - result["nelbo"]
    assert result["bits_per_byte"] == pytest.approx(
        result["nelbo"] * result["tokens"] / math.log(2) / result["bytes"], rel=1e-9
    )
    assert (result["draws"], result["monte_carlo_error"] == 0) == ((1, True) if estimator == "exact" else (2, False))
    assert f"{result['nelbo']:.3f}" in _about_evaluation(result)


@EVERY_KIND
def test_figures_do_not_depend_on_how_rows_are_batched(made, figures, kind):
    corpus, run = made(kind)
    whole, parts = figures(kind), evaluated(corpus.recipe, run, batch_rows=7)
    assert corpus.recipe.evaluate.batch_rows > 7
    for name, value in whole.items():
        assert parts[name] == (pytest.approx(value, rel=1e-6) if isinstance(value, float) else value), name


def test_draws_end_at_the_target(made):
    corpus, run = made("uniform")
    alone = {"draws": 30, "prompts": 0, "calibration": {"rows": 0}, "infill": {"rows": 0}}
    many = evaluated(corpus.recipe, run, **alone)
    target = 3 * many["monte_carlo_error"]
    some = evaluated(corpus.recipe, run, **alone, target_error=target)
    assert some["draws"] < many["draws"] == 30
    assert some["monte_carlo_error"] <= target
    assert abs(some["nelbo"] - many["nelbo"]) < 5 * target


@EVERY_KIND
def test_what_has_no_decoder_is_refused_in_one_line_before_anything_starts(made, kind):
    (corpus, run), (_, _, refusal) = made(kind), KINDS[kind]
    recipe, bundle = corpus.recipe, read_bundle(run)
    if refusal is None:
        assert Generator(recipe, run, Console("json")).one(Asked(prompt="RED"), None)["num_tokens"] > 0
        return
    for verb in (
        lambda: Generator(recipe, run, Console("json")).one(Asked(prompt="RED"), None),
        lambda: serve_forever(recipe, run, Console("json"), lambda other: (recipe, run)),
        lambda: Engine(bundle),
    ):
        with pytest.raises(ConfigError, match=f"^{refusal}there is no decoder for such a model yet") as refused:
            verb()
        assert refused.value.exit_code == 2
        assert "\n" not in str(refused.value)


@EVERY_KIND
def test_a_report_shows_noise_as_it_is_and_says_what_there_is_not(made, figures, kind):
    corpus, run = made(kind)
    run.write_json("evaluation.json", figures(kind))
    write_report(corpus.recipe, run)
    page = run.store.read(run.key("report.html")).decode()
    assert "src=" not in page
    assert "Calibration: how often" in page
    assert page.count("<svg") == 1 + ("ECE by chance alone" in page) + ("both sides are better by" in page)
    assert ("There is no decoder for such a model yet" in page) == (KINDS[kind][2] is not None)
    assert ("token by token" in page) == (kind == "autoregressive")
    assert ("class=swapped>" in page) == (kind in ("uniform", "hybrid"))
    forward, _ = page.split("The reverse: one decode")
    assert ("class=open>" in forward) == (kind != "uniform")
    assert ("a masked language model bounds none" in page) == (kind == "masked_lm")


def test_a_held_out_figure_above_all_of_the_training_is_in_the_plot():
    """Of an overfitted model; matplotlib names a tick's text beside its shape."""
    records = [{"tokens": 1e4 * (i + 1), "bound": max(1.0, 6 - 0.3 * i), "loss": 1.0} for i in range(60)]
    evaluation = {"unigram_entropy": 5.2, "nelbo": 8.0, "standard_error": 0.5, "estimator": "exact"}
    plot = _loss_curve(records, evaluation)
    assert "<!-- 8 -->" in plot
    assert "<!-- 10 -->" not in plot


@pytest.mark.parametrize("kind", ["masks", "uniform", "hybrid", "blocks"])
def test_inspect_marks_replaced_tokens_and_masks(made, kind):
    corpus, _ = made(kind)
    shown = inspect(plan_corpus(corpus.recipe, corpus.store), Console("json"))
    page = corpus.store.read(shown["report"].removeprefix(f"{corpus.store.url}/")).decode()
    assert ("class=swapped>" in page) == (kind in ("uniform", "hybrid"))
    assert ("class=open>" in page) == (kind != "uniform")


@given(st.lists(st.text(max_size=40), max_size=6))
def test_the_bytes_of_a_texts_tokens_are_its_own(texts):
    lengths = BYTE_LEVEL.byte_lengths()
    for text in texts:
        assert lengths[BYTE_LEVEL.encode(text)].sum() == len(text.encode())
    assert not lengths[sorted(BYTE_LEVEL.special_ids)].any()


@pytest.mark.parametrize("text", ["the cat sat on the mat", "the \u00e9 cat \u2603  sat", "rat"])
def test_of_words_with_their_spaces_and_bytes_between_them_too(text):
    """But for the space before the first word."""
    tokenizer = sentence_pieces("the cat sat on the mat and ran ")
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert tokenizer.byte_lengths()[ids].sum() == len(text.encode()) + 1


BYTE_LEVEL = Tokenizer.train(["né naïve, a naïve äpfel " * 9, "日本語のテキスト"], TokenizerConfig(vocab_size=300))


def test_the_error_is_of_documents_where_rows_are_pieces_of_them(tmp_path):
    """Files of many rows end to end: rows of one file are alike, so few files prove little."""
    (tmp_path / "corpus").mkdir()
    for number in range(40):
        (tmp_path / "corpus" / f"{number}.txt").write_text(f"{small_text(1 + number % 7)} {number}", encoding="ascii")
    sections = {"corpus": {"document": "file", "heldout_fraction": 0.3}, "objective": {"type": "autoregressive"}}
    corpus = make_small_corpus(tmp_path, **sections)
    run = make_small_bundle(corpus, corpus.store.root)
    manifest, eos_id = corpus.manifest, corpus.tokenizer.eos_id
    rows = np.arange(manifest.heldout.rows)
    tokens = split_rows(corpus.store, manifest, manifest.heldout, rows)
    ends = tokens.x0.ravel() == eos_id
    of_tokens = (np.cumsum(ends) - ends).reshape(tokens.x0.shape)
    middle = of_tokens[:, manifest.seq_len // 2]
    assert len(rows) > 2 * len(np.unique(middle)) > 8
    for some in (rows, rows[::3], rows[[0, 1, len(rows) - 1]], rows[:1], rows[:0]):
        found = documents_of(corpus.store, manifest, manifest.heldout, some, eos_id)
        assert np.array_equal(np.diff(found) > 0, np.diff(middle[some]) > 0)
    result = evaluated(corpus.recipe, run, prompts=0, rows=len(rows), draws=1)
    heldout = HeldoutRows.of(tokens, rows)
    [nats] = [
        score_rows(
            read_bundle(run).denoiser(),
            ExactNLL(corpus.tokenizer.mask_id, torch.device("cpu")),
            heldout,
            seed=7,
            draws=1,
        )
    ]
    expected = ratio(nats.nats, nats.tokens, middle)
    assert result["nelbo"] == pytest.approx(expected.value, rel=1e-6)
    assert result["standard_error"] == pytest.approx(expected.standard_error, rel=1e-4)
    assert result["calibration"]["by_rate"][1]["brier"]["rows"] == expected.rows
    assert result["infill"]["holes"][0]["token"]["rows"] <= expected.rows


def test_bytes_are_those_of_the_held_out_text_without_end_tokens(made, figures):
    corpus, _ = made("masks")
    rows = split_rows(corpus.store, corpus.manifest, corpus.manifest.heldout, np.arange(corpus.manifest.heldout.rows))
    text = corpus.tokenizer.decode(rows.x0[rows.is_real].tolist())
    assert figures("masks")["bytes"] == len(text.encode())
