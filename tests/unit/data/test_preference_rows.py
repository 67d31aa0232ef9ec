"""A corpus of preferences through the real preprocessing: rows, noise, held-out rows, verify, inspect, refusals."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import SmallCorpus
from preferences import preference_recipe, preprocessed, write_lines

from dllm_core.data.loader import Loader, all_rows, split_rows
from dllm_core.errors import ConfigError
from dllm_core.evaluation.estimators import HeldoutRows
from workflows.console import Console
from workflows.fan_out import serially
from workflows.preprocess.flow import plan_corpus
from workflows.preprocess.inspect import inspect
from workflows.preprocess.verbs import plan, verify
from workflows.recipe import Recipe

TOO_LONG, SAME = 5, 2
FIELDS = {"prompt_field": "ask", "chosen_field": "good", "rejected_field": "bad"}


def records() -> list[dict[str, str]]:
    """Pairs of which some do not fit a row and two have no better answer."""
    usual = [{"ask": f"is it {i}?", "good": f"it is {i}", "bad": f"no {i % 7}" + "!" * (i % 3)} for i in range(150)]
    long = [{"ask": f"long {i}", "good": "x", "bad": "?! " * 60} for i in range(TOO_LONG)]
    return [*usual, *long, *({"ask": f"same {i}", "good": "x", "bad": "x"} for i in range(SAME))]


def made(root: Path, **sections: Any) -> SmallCorpus:
    write_lines(root / "in", records())
    corpus = {"max_bad_fraction": 0.05, **sections.pop("corpus", {})}
    return preprocessed(preference_recipe(root, root / "in", record=FIELDS, corpus=corpus, **sections))


def answers(corpus: SmallCorpus, rows: Any) -> set[tuple[str, str, str]]:
    """(prompt, chosen, rejected) of rows as they are stored."""
    found = set()
    for ids, learned, segments in zip(rows.x0, rows.is_learned, rows.segment_ids, strict=True):
        prompts = {corpus.tokenizer.decode(ids[(segments == k) & ~learned].tolist()) for k in (1, 2)}
        assert len(prompts) == 1
        found.add((*prompts, *(corpus.tokenizer.decode(ids[(segments == k) & learned].tolist()) for k in (1, 2))))
    return found


@pytest.mark.parametrize("block", [None, 4])
def test_every_preference_is_a_row_whose_prompts_are_never_noised(tmp_path, block):
    corpus = made(tmp_path, noise={"block_length": block})
    count = corpus.manifest.accounting
    count.check("corpus")
    assert count.filtered == {"packing.too_long": TOO_LONG}
    assert count.quarantined == {"'good' and 'bad' are the same": SAME}
    splits = corpus.manifest.train, corpus.manifest.heldout
    rows = [all_rows(corpus.store, corpus.manifest, split, np.arange(split.rows)) for split in splits]
    told = [(record["ask"], record["good"], record["bad"]) for record in records()[: -TOO_LONG - SAME]]
    train, heldout = (answers(corpus, part) for part in rows)
    assert train | heldout == set(told)
    assert (len(train), len(heldout)) == tuple(split.rows for split in splits)
    for part in rows:  # behind each answer its end token, which is learned; no filler is
        ends = part.x0 == corpus.tokenizer.eos_id
        assert (ends & part.is_learned).sum(1).tolist() == [2] * len(part.x0)
    stored = Loader.open(corpus.store, corpus.manifest, corpus.tokenizer.mask_id).batch(0, 64)
    assert (stored.xt != stored.x0).any()
    assert not ((stored.xt != stored.x0) & ~stored.loss_mask).any()
    unwritten = corpus.manifest.model_copy(update={"noise_epochs": ()})
    computed = Loader.open(corpus.store, unwritten, corpus.tokenizer.mask_id).batch(0, 64)
    assert np.array_equal(stored.xt, computed.xt)
    assert np.array_equal(stored.t, computed.t)


def test_of_held_out_pairs_the_chosen_answers_count(tmp_path):
    corpus = made(tmp_path)
    ids = np.arange(corpus.manifest.heldout.rows)
    scored = HeldoutRows.of(split_rows(corpus.store, corpus.manifest, corpus.manifest.heldout, ids), ids)
    stored = all_rows(corpus.store, corpus.manifest, corpus.manifest.heldout, ids)
    assert np.array_equal(scored.counted, stored.is_learned & (stored.segment_ids == 1))
    assert np.array_equal(scored.is_real, stored.segment_ids == 1)
    assert scored.counted.any(1).all()


def test_duplicates_are_those_of_prompt_and_both_answers(tmp_path):
    twice = [*records()[:40], *records()[:10]]
    turned = [{**record, "good": record["bad"], "bad": record["good"]} for record in records()[:7]]
    write_lines(tmp_path / "in", [*twice, *turned])
    recipe = preference_recipe(tmp_path, tmp_path / "in", record=FIELDS, corpus={"dedup": {"near": None}})
    assert preprocessed(recipe).manifest.accounting.duplicates == {"exact": 10}


def test_all_pairs_of_a_prompt_are_on_one_side(tmp_path):
    pairs = [{"ask": f"is it {i % 30}?", "good": f"it is {i}", "bad": "no"} for i in range(150)]
    write_lines(tmp_path / "in", pairs)
    corpus = preprocessed(preference_recipe(tmp_path, tmp_path / "in", record=FIELDS))
    splits = corpus.manifest.train, corpus.manifest.heldout
    rows = [all_rows(corpus.store, corpus.manifest, split, np.arange(split.rows)) for split in splits]
    train, heldout = ({prompt for prompt, *_ in answers(corpus, part)} for part in rows)
    assert (len(train) + len(heldout), len(train & heldout)) == (30, 0)


def test_verify_plan_and_inspect_know_such_a_corpus(tmp_path):
    corpus = made(tmp_path)
    found = plan_corpus(corpus.recipe, corpus.store)
    assert verify(found, serially, lambda *told: None) == []
    shown = inspect(found, Console("json"))
    assert len(shown["rows"]) == 4
    assert corpus.store.read(shown["report"].removeprefix(f"{corpus.store.url}/")).startswith(b"<!doctype html>")
    assert plan(found)["units"] == corpus.manifest.units
    for shard in corpus.manifest.train.shards[:1]:
        path = corpus.store.root / "corpora" / corpus.manifest.fingerprint / shard.key
        path.write_bytes(path.read_bytes()[:-1] + b"!")
    [problem] = verify(found, serially, lambda *told: None)
    assert problem.key == corpus.manifest.train.shards[0].key


REFUSED = [
    ({"packing": {"type": "isolated"}}, r"^packing\.type: does not go with objective\.type=preference"),
    ({"objective": {"type": "diffusion"}}, r"^packing\.type: does not go with objective\.type=diffusion"),
    ({"corpus": {"record": {"type": "pair"}}}, r"^corpus\.record\.type: does not go with objective\.type=preference"),
    ({"noise": {"process": {"type": "uniform"}}}, r"^noise\.process\.type: objective\.type=preference draws masks"),
    ({"start": None}, r"^start: objective\.type=preference tunes the weights of a run.*start\.run="),
    ({"noise": {"steps": 8}}, r"^noise\.steps: objective\.type=preference"),
    ({"model": {"time_conditioning": True}}, r"^model\.time_conditioning: "),
    ({"record": {"conversations": True}}, r"^tokenizer\.chat: missing"),
]


@pytest.mark.parametrize(("sections", "told"), REFUSED, ids=[told for _, told in REFUSED])
def test_what_does_not_go_with_preferences_is_refused_in_a_line(tmp_path, sections, told):
    with pytest.raises(ConfigError, match=told) as refused:
        preference_recipe(tmp_path, tmp_path, **sections)
    assert "\n" not in str(refused.value)


def test_preferences_are_learned_from_in_no_other_way(tmp_path):
    plain = preference_recipe(tmp_path, tmp_path).model_dump(mode="json")
    plain |= {"objective": {"type": "diffusion"}, "packing": {"type": "padded"}}
    with pytest.raises(ConfigError, match=r"^corpus\.record\.type: does not go with objective\.type=diffusion"):
        Recipe.checked(plain)
