"""Flipped bits, cut, swapped, lost and doubled files of every kind: `verify` finds each, and so does who reads it."""

import random
import shutil
from collections import Counter
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from conftest import SmallCorpus, make_small_corpus
from survival import corpus_folder, hashes

from dllm_core.data.build import CorpusJob, decide, tokenize_unit
from dllm_core.data.loader import Loader, split_rows
from dllm_core.data.manifest import read_manifest, read_tokenizer
from dllm_core.data.receipts import SIGNATURES
from dllm_core.errors import DataError
from dllm_core.storage.store import LocalStore
from workflows.fan_out import serially
from workflows.preprocess.flow import CorpusPlan, Preprocessing, plan_corpus
from workflows.preprocess.verbs import verify

KINDS = {
    "tokens": "tokens/*.arrow",
    "noise": "noise/*/*.arrow",
    "signatures": "dedup/signatures-*.arrow",
    "decisions": "dedup/decisions-*.arrow",
    "tables of the manifest": "manifest/*.arrow",
    "manifest.json": "manifest.json",
    "tokenizer.json": "tokenizer.json",
}
HARMS = ("flip", "cut", "delete", "double", "swap")


@dataclass(frozen=True)
class Patient:
    """A finished corpus that may be damaged, and every file's bytes."""

    corpus: SmallCorpus
    plan: CorpusPlan
    folder: Path
    files: dict[Path, bytes]

    def of_kind(self, kind: str) -> list[Path]:
        """Files that hold something: a unit's shard of no rows is named by no manifest and read by nobody."""
        manifest = self.corpus.manifest
        named = {self.folder / shard.key for split in (manifest.train, manifest.heldout) for shard in split.shards}
        found = sorted(path for path in self.folder.glob(KINDS[kind]) if path in self.files)
        return [path for path in found if path in named] if kind == "tokens" else found

    def heal(self) -> None:
        for path, data in self.files.items():
            if not path.exists() or path.read_bytes() != data:
                path.write_bytes(data)


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> SmallCorpus:
    sections = {"corpus": {"unit_bytes": 3072, "dedup": {}}, "noise": {"epochs": 2}}
    return make_small_corpus(tmp_path_factory.mktemp("made"), **sections)


@pytest.fixture
def patient(made, tmp_path) -> Patient:
    shutil.copytree(made.store.root, tmp_path / "storage")
    store = LocalStore(tmp_path / "storage")
    folder = corpus_folder(store.root)
    files = {path: path.read_bytes() for kind in KINDS.values() for path in folder.glob(kind)}
    corpus = SmallCorpus(made.recipe, store, made.manifest, made.tokenizer)
    return Patient(corpus, plan_corpus(made.recipe, store), folder, files)


def accused(patient: Patient) -> set[str]:
    """The files that `verify` names, or the one that ends it."""
    try:
        return {problem.key for problem in verify(patient.plan, serially, lambda *told: None)}
    except DataError as error:
        return {error.place.removeprefix(f"{patient.folder}/"), error.problem}


def read_all(patient: Patient) -> None:
    """What training and evaluation read: manifest, tokenizer, every row with its noise, every held-out row."""
    manifest = read_manifest(patient.corpus.store, patient.plan.fingerprint)
    tokenizer = read_tokenizer(patient.corpus.store, manifest)
    loader = Loader.open(patient.corpus.store, manifest, tokenizer.mask_id)
    loader.batch(0, 2 * manifest.train.rows)
    split_rows(patient.corpus.store, manifest, manifest.heldout, np.arange(manifest.heldout.rows))


def link(patient: Patient) -> None:
    """What reads signatures."""
    job = patient.plan.job()
    units = patient.plan.units()
    receipts = [job.receipts.finished(SIGNATURES, unit.index) for unit in units]
    if None in receipts:
        raise DataError("receipts", "a file of another size is made again")
    decide(job, [receipt for receipt in receipts if receipt is not None])


def tokenize(patient: Patient) -> None:
    """What reads decisions."""
    job: CorpusJob = patient.plan.job()
    for unit in patient.plan.units():
        tokenize_unit(job, patient.corpus.tokenizer, unit)


READERS = {"signatures": link, "decisions": tokenize}


def harm(patient: Patient, kind: str, how: str, rng: random.Random) -> list[Path]:
    """Damage one file, or two by a swap; which."""
    paths = patient.of_kind(kind)
    victim = rng.choice(paths)
    data = bytearray(patient.files[victim])
    if how == "flip":
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        victim.write_bytes(data)
    elif how == "cut":
        victim.write_bytes(data[: rng.randrange(len(data))])
    elif how == "delete":
        victim.unlink()
    elif how == "double":
        victim.write_bytes(data + data)
    else:
        others = [path for path in paths if patient.files[path] != data]
        if not others:
            return []
        other = rng.choice(others)
        victim.write_bytes(patient.files[other])
        other.write_bytes(data)
        return [victim, other]
    return [victim]


def examine(patient: Patient, plan: list[tuple[str, str]], seed: int) -> Counter[tuple[str, str]]:
    """Do each (kind, harm) alone and look whether it is found, by whom it must be; how many of each were done."""
    rng, done = random.Random(seed), Counter()
    for kind, how in plan:
        victims = harm(patient, kind, how, rng)
        if not victims:
            continue
        found = accused(patient)
        for victim in victims:
            name = victim.relative_to(patient.folder).as_posix()
            is_named = name in found or any(name in word for word in found)
            assert is_named or (kind == "tables of the manifest" and "manifest.json" in found), (kind, how, found)
        with pytest.raises(DataError):
            READERS.get(kind, read_all)(patient)
        done[kind, how] += 1
        patient.heal()
    return done


def test_no_damage_passes_verify_nor_who_reads_the_file(patient):
    shards = ["tokens", "noise", "signatures", "decisions"]
    plan = [(kind, how) for kind in KINDS for how in HARMS]
    plan += [(kind, "flip") for kind in [*KINDS] * 8] + [(kind, "cut") for kind in shards * 4]
    done = examine(patient, plan, seed=1)
    assert sum(n for (_, how), n in done.items() if how == "flip") >= 60
    assert sum(n for (_, how), n in done.items() if how == "cut") >= 20
    assert accused(patient) == set()
    for reader in (read_all, link, tokenize):
        reader(patient)


def test_a_flipped_bit_in_a_receipt_makes_its_task_run_again_and_never_a_wrong_manifest(patient):
    rng, expected = random.Random(3), hashes(patient.folder)
    plan_of = partial(plan_corpus, patient.corpus.recipe, patient.corpus.store)
    for kind in ("signatures", "decisions", "tokens", "noise"):
        for _ in range(6):
            receipt = rng.choice(sorted((patient.folder / "receipts" / kind).rglob("*.json")))
            data = bytearray(receipt.read_bytes())
            data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
            receipt.write_bytes(data)
            (patient.folder / "manifest.json").unlink()
            Preprocessing(plan_of(), serially).run()
            assert hashes(patient.folder).items() >= {k: v for k, v in expected.items() if "receipts" not in k}.items()


@pytest.mark.long
@pytest.mark.timeout(1200)
def test_a_thousand_flips_and_two_hundred_cuts_are_all_found_and_a_hundred_clean_runs_accuse_nobody(patient):
    kinds = list(KINDS)
    plan = [(kinds[i % len(kinds)], "flip") for i in range(1000)] + [(kinds[i % len(kinds)], "cut") for i in range(200)]
    plan += [(kind, how) for kind in kinds for how in ("delete", "double", "swap") for _ in range(5)]
    done = examine(patient, plan, seed=2)
    clean = sum(accused(patient) == set() for _ in range(100))
    for reader in map(partial, [read_all] * 20 + [link, tokenize]):
        reader(patient)
    total = {how: sum(n for (_, h), n in done.items() if h == how) for how in HARMS}
    print(f"\ndamage over {len(kinds)} kinds of file: {total}, all found by verify and by the reader; ", end="")
    print(f"{100 - clean} false alarms in 100 clean runs")
    assert clean == 100
