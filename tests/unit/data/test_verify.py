"""No damage passes `verify`, no whole corpus is accused, and `repair` gives the very bytes back."""

import json
import random
import shutil

import numpy as np
import pytest
from conftest import SmallCorpus, make_small_corpus

from dllm_core.config.fingerprint import seal, unseal
from dllm_core.data.build import to_arrow
from dllm_core.data.manifest import corpus_prefix
from dllm_core.data.shard import map_shard
from dllm_core.data.verify import Promise, ShardCheck, checks_of, verify_shard
from dllm_core.errors import DataError
from dllm_core.storage.store import LocalStore, sha256
from workflows.fan_out import serially
from workflows.preprocess.flow import CorpusPlan, Preprocessing, plan_corpus
from workflows.preprocess.verbs import plan, repair, verify


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> SmallCorpus:
    return make_small_corpus(tmp_path_factory.mktemp("whole"), corpus={"dedup": {}, "weight": 0.8})


@pytest.fixture
def copy(whole, tmp_path):
    """The corpus in a folder of its own: its plan, the folder, every file's bytes."""
    root = tmp_path / "storage"
    shutil.copytree(whole.store.root, root)
    found = plan_corpus(whole.recipe, LocalStore(root))
    folder = root / corpus_prefix(found.fingerprint)
    return found, folder, {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def problems(corpus: CorpusPlan) -> list[str]:
    try:
        return [problem.key for problem in verify(corpus, serially, lambda *told: None)]
    except DataError as error:
        return [error.place]


def test_a_whole_corpus_is_never_accused(copy):
    for _ in range(3):
        assert problems(copy[0]) == []


def test_every_flipped_bit_cut_end_swap_and_loss_is_found_by_its_file(copy):
    corpus, folder, files = copy
    rng = random.Random(0)
    checks = checks_of(corpus.job(), corpus.existing())
    keys = [check.shard.key if isinstance(check, ShardCheck) else check.key for check in checks]
    assert {key.split("/")[0] for key in keys} == {"tokens", "noise", "quarantine", "dedup"}
    paths = [folder / key for key in keys]
    for trial in range(60):
        path = rng.choice(paths)
        kind = ("flip", "cut", "swap", "delete", "double")[trial % 5]
        data = bytearray(files[path])
        if kind == "flip":
            data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        elif kind == "cut":
            del data[rng.randrange(len(data)) :]
        elif kind == "double":
            data = data + data
        elif kind == "swap":
            other = rng.choice([p for p in paths if p.parent == path.parent and files[p] != files[path]])
            data = bytearray(files[other])
        path.unlink()
        if kind != "delete":
            path.write_bytes(data)
        assert path.relative_to(folder).as_posix() in problems(corpus), kind
        path.write_bytes(files[path])
    assert problems(corpus) == []


def test_a_flipped_bit_in_the_manifest_its_tables_or_the_tokenizer_is_found(copy):
    corpus, folder, files = copy
    rng = random.Random(1)
    for path in [folder / "manifest.json", folder / "tokenizer.json", *folder.glob("manifest/*")]:
        for _ in range(15):
            data = bytearray(files[path])
            data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
            path.write_bytes(data)
            assert problems(corpus), path.name
        path.write_bytes(files[path])


def test_numbers_that_mean_nothing_are_found_though_every_sha256_is_right(copy):
    """A shard and a manifest that were both made wrong: an id outside the vocabulary, noise of another epoch."""
    corpus, folder, _ = copy
    job = corpus.job()
    manifest = corpus.existing()
    promise = Promise.of(manifest, 0)
    shard = manifest.train.shards[0]
    columns = {name: np.array(values) for name, values in map_shard(job.output, job.prefix, shard).items()}
    columns["ids"][0, 0] = 60_000
    data = to_arrow(columns, {})
    (folder / shard.key).write_bytes(data)
    wrong = shard.model_copy(update={"bytes": len(data), "sha256": sha256(data)})
    found = verify_shard(job, promise, ShardCheck(wrong, "receipts/any"))
    assert "60000" in found.what
    first, second = manifest.noise_epochs[0][1], manifest.noise_epochs[1][1]
    swapped = ShardCheck(second, "receipts/any", 0, manifest.train.shards[1], manifest.train.shards[0].rows)
    assert "is not the noise" in verify_shard(job, promise, swapped).what
    right = ShardCheck(first, "receipts/any", 0, manifest.train.shards[1], manifest.train.shards[0].rows)
    assert verify_shard(job, promise, right) is None


@pytest.mark.parametrize("is_there", [True, False])
def test_what_an_older_receipt_says_was_removed_is_counted(copy, is_there):
    corpus, folder, files = copy
    path = min(folder.glob("quarantine/unit-*"))
    receipt = folder / "receipts" / "tokens" / path.with_suffix(".json").name
    receipt.write_bytes(seal({**unseal(files[receipt]), "quarantine_sha256": None}))
    assert problems(corpus) == []
    path.write_bytes(files[path].split(b"\n", 1)[1]) if is_there else path.unlink()
    [problem] = verify(corpus, serially, lambda *told: None)
    removed = len(files[path].splitlines())
    told = f"holds {removed - 1} records, {removed} were" if is_there else f"is missing, with the {removed} records"
    assert problem.what.startswith(told)
    repair(corpus, serially, lambda *told: None)
    assert {path: path.read_bytes() for path in files} == files


@pytest.mark.parametrize("is_there", [True, False])
def test_a_receipt_that_alone_names_removed_records_is_missed(copy, is_there):
    corpus, folder, files = copy
    path = min(folder.glob("quarantine/unit-*"))
    receipt = folder / "receipts" / "tokens" / path.with_suffix(".json").name
    path.unlink()
    receipt.write_bytes(files[receipt][:-3]) if is_there else receipt.unlink()
    assert problems(corpus) == [f"receipts/tokens/{receipt.name}"]
    assert repair(corpus, serially, lambda *told: None)["tasks_run"] == 1
    assert {path: path.read_bytes() for path in files} == files


@pytest.mark.parametrize(
    "victims",
    [
        "tokens",
        "noise",
        "noise/epoch-001",
        "manifest.json",
        "manifest",
        "tokenizer.json",
        "dedup",
        "quarantine/u",
        "quarantine/s",
    ],
)
def test_repair_gives_the_very_bytes_back_and_runs_only_what_was_bad(copy, victims):
    corpus, folder, files = copy
    if victims == "noise/epoch-001":  # more noise is written than this recipe asks for
        noise = corpus.recipe.noise.model_copy(update={"epochs": 1})
        corpus = plan_corpus(corpus.recipe.model_copy(update={"noise": noise}), corpus.store)
    paths = [path for path in files if path.relative_to(folder).as_posix().startswith(victims)]
    assert paths
    for path in sorted(paths)[:2]:
        path.write_bytes(files[path][:-3])
    result = repair(corpus, serially, lambda *told: None)
    again = {path: path.read_bytes() for path in files}
    assert again == files
    assert problems(corpus) == []
    total = 2 * len(corpus.units()) + 2 * len(corpus.existing().train.shards)
    assert result["tasks_run"] < total


@pytest.mark.parametrize("has_shards", [True, False])
def test_a_run_that_goes_on_takes_no_other_tokenizer_than_that_of_its_shards(copy, has_shards):
    corpus, folder, files = copy
    (folder / "manifest.json").unlink()
    for path in sorted(folder.glob("receipts/tokens/*"))[: 1 if has_shards else None]:
        path.unlink()
    other = json.loads(files[folder / "tokenizer.json"])
    other["model"]["merges"].pop()
    (folder / "tokenizer.json").write_bytes(json.dumps(other).encode() if has_shards else b"\xff")
    problem = "is not the tokenizer of the shards" if has_shards else "is not UTF-8"
    with pytest.raises(DataError, match=rf"/tokenizer\.json: {problem}: run .*repair"):
        Preprocessing(corpus, serially).run()
    repair(corpus, serially, lambda *told: None)
    assert {path: path.read_bytes() for path in files} == files


def test_repair_of_a_whole_corpus_runs_nothing(copy):
    assert repair(copy[0], serially, lambda *told: None)["tasks_run"] == 0


def test_a_plan_writes_nothing_and_says_what_a_run_then_makes(whole, tmp_path):
    corpus = plan_corpus(whole.recipe, LocalStore(tmp_path / "new"))
    told = plan(corpus)
    assert not (tmp_path / "new" / "corpora").exists()
    manifest = Preprocessing(corpus, serially).run()
    assert told["units"] == manifest.units
    assert told["units_done"] == 0
    assert told["tokens"] == pytest.approx(manifest.train.tokens + manifest.heldout.tokens, rel=0.3)
    assert plan(corpus)["units_done"] == manifest.units


def test_a_manifest_with_a_seal_of_its_own_is_still_its_content(copy):
    _, folder, files = copy
    values = unseal(files[folder / "manifest.json"])
    assert seal(values) == files[folder / "manifest.json"]
