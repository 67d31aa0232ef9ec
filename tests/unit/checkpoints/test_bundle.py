"""A bundle gives back the very model that was written, and no damaged file of it is ever loaded."""

import shutil
from pathlib import Path

import pytest
import torch
from conftest import SmallCorpus, draws
from hypothesis import given, settings
from hypothesis import strategies as st
from s3_server import s3_server

from dllm_core.checkpoints.bundle import Lineage, ModelBundle, read_bundle, write_bundle
from dllm_core.checkpoints.bundle_manifest import read_manifest
from dllm_core.checkpoints.run_dir import RunDir
from dllm_core.config.fingerprint import seal
from dllm_core.errors import CheckpointError
from dllm_core.model.config import DenoiserConfig, ModelConfig
from dllm_core.model.denoiser import Denoiser
from dllm_core.model.pretrained import weights_of, write_weights
from dllm_core.noise.process import AbsorbingNoise
from dllm_core.noise.schedule import CosineSchedule
from dllm_core.storage.s3 import S3Store
from dllm_core.storage.store import LocalStore

FILES = ("model.safetensors", "config.json", "tokenizer.json")
NOISE = AbsorbingNoise(schedule=CosineSchedule())
LINEAGE = Lineage(
    run="small",
    recipe_sha256="a",
    corpus="b",
    manifest_sha256="c",
    checkpoint="step-00000009",
    checkpoint_sha256="d",
    step=9,
)


@pytest.fixture(scope="module")
def denoiser(small_corpus) -> Denoiser:
    torch.manual_seed(5)
    tokenizer = small_corpus.tokenizer
    return Denoiser(
        DenoiserConfig(
            model=ModelConfig(dim=16, layers=2, heads=2, ffn_dim=24),
            vocab_size=tokenizer.vocab_size,
            context_length=32,
            mask_id=tokenizer.mask_id,
            eos_id=tokenizer.eos_id,
            pad_id=tokenizer.pad_id,
        )
    ).eval()


def write(run: RunDir, corpus: SmallCorpus, denoiser: Denoiser, scratch: Path) -> None:
    write_weights(scratch / "weights", weights_of(denoiser))
    write_bundle(
        run,
        weights=scratch / "weights",
        config=denoiser.config,
        tokenizer=corpus.tokenizer,
        process=NOISE,
        decode={"block_length": 4},
        lineage=LINEAGE,
    )


@pytest.fixture(scope="module")
def written(small_corpus, denoiser, tmp_path_factory) -> Path:
    """The root of a whole bundle; read it only."""
    root = tmp_path_factory.mktemp("bundle")
    write(RunDir(LocalStore(root), "small"), small_corpus, denoiser, tmp_path_factory.mktemp("scratch"))
    return root


@pytest.fixture(scope="module")
def copies(written, tmp_path_factory):
    """A function that gives a run with a bundle that may be damaged, and its folder."""

    def copy() -> tuple[RunDir, Path]:
        root = tmp_path_factory.mktemp("copy") / "root"
        shutil.copytree(written, root)
        return RunDir(LocalStore(root), "small"), root / "runs" / "small" / "bundle"

    return copy


def assert_is_what_was_written(bundle: ModelBundle, corpus: SmallCorpus, denoiser: Denoiser) -> None:
    ids = torch.randint(0, denoiser.config.vocab_size, (3, 32), generator=torch.Generator().manual_seed(0))
    again = bundle.denoiser()
    with torch.inference_mode():
        assert torch.equal(again(ids), denoiser(ids))
    assert again.config == denoiser.config
    assert not again.training
    tokenizer = bundle.tokenizer()
    assert tokenizer.digest == corpus.tokenizer.digest
    assert tokenizer.encode("HEAVY RED ARROW 17") == corpus.tokenizer.encode("HEAVY RED ARROW 17")
    assert bundle.process == NOISE.bind(corpus.tokenizer.mask_id, corpus.manifest.vocab_size)
    assert (bundle.manifest.decode, bundle.manifest.lineage) == ({"block_length": 4}, LINEAGE)


def test_a_bundle_gives_bit_equal_logits(small_corpus, denoiser, written):
    assert_is_what_was_written(read_bundle(RunDir(LocalStore(written), "small")), small_corpus, denoiser)


def test_a_bundle_on_s3_gives_bit_equal_logits_and_a_new_one_in_its_place_is_seen(small_corpus, tmp_path, denoiser):
    with s3_server(tmp_path / "cache") as server:
        run = RunDir(S3Store(server.new_bucket(), "root"), "small")
        for _ in range(2):
            write(run, small_corpus, denoiser, tmp_path)
            for _ in range(2):  # the second time from the cache
                assert_is_what_was_written(read_bundle(run), small_corpus, denoiser)
            denoiser = Denoiser(denoiser.config).eval()


@settings(max_examples=draws(40), deadline=None)
@given(name=st.sampled_from(FILES), at=st.integers(0, 10**9), bit=st.integers(0, 7), cut=st.booleans())
def test_a_flipped_bit_and_a_cut_off_end_are_refused_by_name(copies, name, at, bit, cut):
    run, folder = copies()
    data = bytearray((folder / name).read_bytes())
    at %= len(data)
    if cut:
        del data[at:]
    else:
        data[at] ^= 1 << bit
    (folder / name).write_bytes(data)
    with pytest.raises(CheckpointError, match=f"bundle/{name}"):
        read_bundle(run)


@pytest.mark.parametrize("name", FILES)
def test_a_missing_file_is_refused_by_name(copies, name):
    run, folder = copies()
    (folder / name).unlink()
    with pytest.raises(CheckpointError, match=f"bundle/{name}"):
        read_bundle(run)


def test_files_of_two_bundles_are_never_mixed(copies, small_corpus, denoiser, tmp_path):
    run, folder = copies()
    old = (folder / "model.safetensors").read_bytes()
    torch.manual_seed(6)
    write(run, small_corpus, Denoiser(denoiser.config), tmp_path)
    (folder / "model.safetensors").write_bytes(old)
    with pytest.raises(CheckpointError, match=r"bundle/model\.safetensors"):
        read_bundle(run)


def test_a_bundle_that_is_written_anew_is_another_where_it_answers_otherwise_alone(copies):
    """`dllm run RUN decode...` beside an endpoint of that run: a replica that starts later has what gateways know."""
    run, folder = copies()
    before = read_bundle(run)
    values = before.manifest.model_dump(mode="json")
    for field, value, is_same in (
        ("decode", {"block_length": 8}, True),
        ("lineage", {**values["lineage"], "recipe_sha256": "e"}, True),
        ("block_length", 4, False),
        ("files", {**values["files"], "model.safetensors": {"bytes": 1, "sha256": "f"}}, False),
    ):
        (folder / "bundle.json").write_bytes(seal({**values, field: value}))
        assert (read_manifest(run)[0].digest == before.digest) == is_same, field


def test_a_bundle_without_a_manifest_does_not_exist(copies):
    run, folder = copies()
    (folder / "bundle.json").unlink()
    with pytest.raises(CheckpointError, match="there is no bundle"):
        read_bundle(run)


def test_a_manifest_that_was_cut_off_is_refused_by_name(copies):
    run, folder = copies()
    whole = (folder / "bundle.json").read_bytes()
    for length in [*range(0, len(whole), 19), len(whole) - 2, len(whole) - 1]:
        (folder / "bundle.json").write_bytes(whole[:length])
        with pytest.raises(CheckpointError, match=r"bundle/bundle\.json"):
            read_bundle(run)


def test_a_bundle_that_was_killed_while_written_does_not_exist(tmp_path, small_corpus, denoiser):
    class KilledError(BaseException):
        """Stands for the end of the process."""

    class KilledStore(LocalStore):
        """Dies before the manifest."""

        def put(self, key: str, data: bytes) -> None:
            raise KilledError

    with pytest.raises(KilledError):
        write(RunDir(KilledStore(tmp_path), "small"), small_corpus, denoiser, tmp_path)
    assert (tmp_path / "runs" / "small" / "bundle" / "model.safetensors").exists()
    with pytest.raises(CheckpointError, match="there is no bundle"):
        read_bundle(RunDir(LocalStore(tmp_path), "small"))


def test_a_damaged_copy_in_the_local_cache_is_fetched_again(small_corpus, denoiser, tmp_path):
    """The object on S3 is whole: neither the cached copy of it nor the gathered folder may be taken for it."""
    with s3_server(tmp_path) as server:
        run = RunDir(S3Store(server.new_bucket(), ""), "small")
        write(run, small_corpus, denoiser, tmp_path)
        first = read_bundle(run)
        expected = (first.folder / "model.safetensors").read_bytes()
        copies = {copy.stat().st_ino: copy for copy in (*tmp_path.rglob("objects/*"), *tmp_path.rglob("bundles/*/*"))}
        assert len(copies) == 3  # what is gathered are links, which take no room
        for copy in copies.values():
            data = bytearray(copy.read_bytes())
            data[len(data) // 2] ^= 64
            copy.write_bytes(data)
        assert (read_bundle(run).folder / "model.safetensors").read_bytes() == expected
