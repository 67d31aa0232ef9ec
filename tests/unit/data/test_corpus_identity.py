"""A corpus is one text, cut into tokens by one tokenizer, and what says otherwise is refused or another corpus."""

import os
import shutil
from functools import partial

import numpy as np
import pytest
from conftest import COLOURS, make_small_corpus, small_recipe, small_text, write_small_text

from dllm_core.config.fingerprint import fingerprint
from dllm_core.data.build import to_arrow
from dllm_core.data.manifest import corpus_prefix, write_manifest
from dllm_core.data.shard import map_with_metadata
from dllm_core.data.tokenizer import Tokenizer, TokenizerConfig
from dllm_core.errors import DataError
from dllm_core.storage.store import LocalStore, sha256
from workflows.fan_out import serially
from workflows.preprocess.flow import CorpusPlan, Preprocessing, plan_corpus
from workflows.preprocess.verbs import repair, verify
from workflows.recipe import Recipe

SECTION = TokenizerConfig(vocab_size=320)
FIRST, OTHER = (Tokenizer.train([text], SECTION) for text in (small_text(), small_text()[::-1]))


def quiet(*told: object) -> None:
    """Nobody looks."""


@pytest.fixture
def planned(tmp_path):
    """How a corpus with the tokenizer at `tmp_path/given.json` is planned; it is made already."""
    (tmp_path / "given.json").write_text(FIRST.json_text)
    corpus = make_small_corpus(tmp_path, tokenizer={"path": str(tmp_path / "given.json"), "vocab_size": 320})
    return partial(plan_corpus, corpus.recipe, corpus.store)


def copy_of(plan: CorpusPlan):
    return plan.store.path(f"{corpus_prefix(plan.fingerprint)}/tokenizer.json")


def test_a_given_tokenizer_that_was_replaced_is_refused_and_its_copy_is_not_made_of_it(planned, tmp_path):
    plan, given = planned(), tmp_path / "given.json"
    whole = copy_of(plan).read_bytes()
    given.write_text(OTHER.json_text)
    copy_of(plan).write_bytes(whole[:-3])
    with pytest.raises(DataError, match=r"^tokenizer\.path: is no longer the tokenizer that made .*/corpora/") as told:
        planned()
    assert "another name" in told.value.remedy
    given.unlink()
    assert planned().fingerprint == plan.fingerprint  # its copy is all that a corpus needs
    given.write_text(FIRST.json_text)
    repair(planned(), serially, quiet)
    assert copy_of(plan).read_bytes() == whole
    assert verify(planned(), serially, quiet) == []


@pytest.mark.parametrize(("dedup", "others"), [(None, 2), ({}, 0)])
def test_what_is_written_to_while_it_is_read_makes_no_corpus_of_what_was_listed(tmp_path, dedup, others):
    recipe = small_recipe(tmp_path, corpus={"dedup": dedup, "unit_bytes": 4096})
    folder, store = tmp_path / "corpus", LocalStore(tmp_path / "storage")
    write_small_text(tmp_path)
    for number in range(others):
        (folder / f"other-{number}.txt").write_text(small_text())
    times, whole = {path: path.stat().st_mtime_ns for path in sorted(folder.iterdir())}, small_text()
    paths = list(times)
    (folder / "untouched.txt").write_text(whole[::-1])
    fresh = Preprocessing(plan_corpus(recipe, LocalStore(tmp_path / "fresh")), serially).run()
    plan = plan_corpus(recipe, store)
    for path in paths:
        path.write_text(whole[: len(whole) // 3 : -1])
    told = f"^corpus.path: was changed while it was read{', as were 2 others' if others else ''}, got '{paths[0].name}'"
    with pytest.raises(DataError, match=told):
        Preprocessing(plan, serially).run()
    assert not plan.is_made
    for path, time in times.items():  # brought back: nothing of what was read in between is left
        path.write_text(whole)
        os.utime(path, ns=(time, time))
    again = plan_corpus(recipe, store)
    assert again.fingerprint == plan.fingerprint
    manifest = Preprocessing(again, serially).run()
    assert manifest == fresh  # nor of what it decided about the other file: its duplicates, the tokenizer
    (folder / "new.txt").write_text("what comes to it later is of the next one")
    assert Preprocessing(again, serially).run() == manifest


def test_a_lost_copy_is_not_made_of_another_tokenizer_than_the_shards_were(planned, tmp_path):
    plan = planned()
    for name in ("tokenizer.json", "manifest.json"):
        plan.store.delete(f"{corpus_prefix(plan.fingerprint)}/{name}")
    (tmp_path / "given.json").write_text(OTHER.json_text)
    for make in (Preprocessing(planned(), serially).run, partial(repair, planned(), serially, quiet)):
        with pytest.raises(DataError, match=r"tokenizer\.json: was lost, and the one made in its place is not that of"):
            make()
    assert not plan.is_made


def test_a_shard_of_another_tokenizer_is_found_though_every_sha256_is_right(planned):
    plan = planned()
    manifest = plan.existing()
    first = manifest.train.shards[0]
    views, metadata = map_with_metadata(plan.store, corpus_prefix(plan.fingerprint), first)
    data = to_arrow(
        {name: np.array(view) for name, view in views.items()}, metadata | {"tokenizer_sha256": OTHER.digest}
    )
    plan.store.put(f"{corpus_prefix(plan.fingerprint)}/{first.key}", data)
    wrong = first.model_copy(update={"bytes": len(data), "sha256": sha256(data)})
    shards = {"shards": (wrong, *manifest.train.shards[1:])}
    write_manifest(plan.store, manifest.model_copy(update={"train": manifest.train.model_copy(update=shards)}))
    [problem] = verify(plan, serially, quiet)
    assert (problem.key, problem.what) == (first.key, "was made by another tokenizer than the manifest's")


@pytest.mark.parametrize("place", ["placement.preprocess.workers", "tokenizer.json"])
def test_a_check_that_is_lost_ends_a_repair_and_takes_nothing_back(planned, place):
    def losing(function, items, **options):
        raise DataError(place, "a task with the tokenizer was lost 4 times", remedy="run again")

    plan = planned()
    files = {path: path.stat().st_mtime_ns for path in plan.store.root.rglob("*") if path.is_file()}
    with pytest.raises(DataError, match="was lost 4 times"):
        repair(plan, losing, quiet)
    assert {path: path.stat().st_mtime_ns for path in plan.store.root.rglob("*") if path.is_file()} == files


def mixture(root, *names: str) -> CorpusPlan:
    """Of folders, one weight for each."""
    sources = [
        {"type": "text", "path": str(root / name), "weight": weight}
        for name, weight in zip(names, (0.5, 4), strict=False)
    ]
    sections = small_recipe(root).model_dump(mode="json") | {"corpus": {"type": "mixture", "sources": sources}}
    return plan_corpus(Recipe.checked(sections), LocalStore(root / "storage"))


def test_a_file_that_moves_to_a_source_of_another_weight_makes_another_corpus(tmp_path):
    for folder, names in (("left", "ab"), ("right", "c")):
        (tmp_path / folder).mkdir()
        for name in names:
            (tmp_path / folder / f"{name}.txt").write_text(COLOURS[0])
    before = mixture(tmp_path, "left", "right").fingerprint
    assert mixture(tmp_path, "left", "right").fingerprint == before
    shutil.move(tmp_path / "left" / "b.txt", tmp_path / "right" / "b.txt")
    assert mixture(tmp_path, "left", "right").fingerprint != before


def test_the_fingerprint_of_one_source_is_that_of_its_files_in_one_list(tmp_path):
    """Corpora that were made stay found."""
    (tmp_path / "corpus").mkdir()
    (tmp_path / "corpus" / "a.txt").write_text("text")
    plan = plan_corpus(small_recipe(tmp_path), LocalStore(tmp_path / "storage"))
    recipe, [files] = plan.recipe, [files.files for files in plan.listed]
    identity = {
        "seed": recipe.seed,
        "corpus": recipe.corpus.model_dump(mode="json", exclude={"max_bad_fraction", "path"}),
        "tokenizer": recipe.tokenizer,
        "packing": recipe.packing,
        "noise": recipe.noise.model_dump(mode="json", exclude={"epochs", "steps"}),
        "sources": [[file.key, file.size, file.stamp] for file in files],
    }
    assert plan.fingerprint == fingerprint(identity)


def test_what_was_made_of_a_changed_file_is_taken_back_too_where_another_file_ends_the_run(planned, tmp_path):
    texts = {tmp_path / "corpus" / name: text for name, text in (("a.txt", "as listed"), ("z.txt", "the last"))}
    for path, text in texts.items():
        path.write_text(text)
        os.utime(path, ns=(1, 1))
    recipe, store = planned().recipe, LocalStore(tmp_path / "other")
    fresh = Preprocessing(plan_corpus(recipe, LocalStore(tmp_path / "fresh")), serially).run()
    plan = plan_corpus(recipe, store)
    first, last = texts
    first.write_text("something else")
    last.unlink()
    with pytest.raises(DataError, match=r"was changed while it was read, as were 1 others, got 'a\.txt'"):
        Preprocessing(plan, serially).run()
    for path, text in texts.items():
        path.write_text(text)
        os.utime(path, ns=(1, 1))
    assert Preprocessing(plan_corpus(recipe, store), serially).run() == fresh
