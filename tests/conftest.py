"""What many tests start from: a small corpus on disk, made by the real preprocessing without a cluster."""

import os
import socket
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, settings
from rados_gateway import Gateway, missing_programs, rados_gateway
from ranks import Ranks

from dllm_core.checkpoints.bundle import Lineage, write_bundle
from dllm_core.checkpoints.run_dir import RunDir
from dllm_core.data.manifest import CorpusManifest, read_tokenizer
from dllm_core.data.tokenizer import Tokenizer
from dllm_core.model.denoiser import Denoiser
from dllm_core.model.pretrained import weights_of, write_weights
from dllm_core.storage.store import LocalStore, open_store
from workflows.fan_out import serially
from workflows.preprocess.flow import Preprocessing, plan_corpus
from workflows.recipe import Recipe
from workflows.train.job import denoiser_config

COLOURS = ("RED", "GREEN", "BLUE", "WHITE", "BLACK")
SHAPES = ("CIRCLE", "SQUARE", "ARROW", "STAR", "HEART", "DIAMOND")


@dataclass(frozen=True)
class SmallCorpus:
    """A finished corpus and the recipe that made it."""

    recipe: Recipe
    store: LocalStore
    manifest: CorpusManifest
    tokenizer: Tokenizer


def draws(number: int) -> int:
    """So many random examples in `make test-long`, which sets DLLM_ALL_DRAWS, and a third in `make test`, drawn anew in
    each run: where an example is a batch of rows, drawn whole and one by one.
    """
    return number if os.environ.get("DLLM_ALL_DRAWS") else -(-number // 3)


def in_long(*cases: object) -> list[Any]:
    """Cases of a parametrized test that `make test-long` adds to those of `make test`."""
    return [pytest.param(case, marks=pytest.mark.long) for case in cases]


# How fast examples are drawn and tried says how busy the machine is, nothing about the project.
settings.register_profile("dllm", max_examples=draws(100), deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("dllm")


def free_port() -> int:
    """A port of loopback that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def small_text(paragraphs: int = 120) -> str:
    """Regular text that a tiny model learns something of: `HEAVY RED ARROW 17` and the like."""
    names = [f"{colour} {shape}" for colour in COLOURS for shape in SHAPES]
    blocks = []
    for i in range(paragraphs):
        lines = [f"{names[(7 * i + j) % len(names)]} {i}" for j in range(4)]
        blocks.append("\n".join(lines))
    return "\n\n".join(blocks) + "\n"


def small_recipe(root: Path, **sections: object) -> Recipe:
    """A recipe over `root/corpus` that trains in seconds."""
    values = {
        "name": "small",
        "seed": 7,
        "storage": {"root": str(root / "storage")},
        "corpus": {
            "type": "text",
            "path": str(root / "corpus"),
            "document": "paragraph",
            "unit_bytes": 1024,
            "heldout_fraction": 0.1,
        },
        "tokenizer": {"vocab_size": 300},
        "packing": {"seq_len": 32},
        "noise": {"epochs": 2},
        "model": {"dim": 32, "layers": 2, "heads": 2, "ffn_dim": 64},
        "train": {"steps": 6, "batch_rows": 8, "precision": "fp32", "log_every": 1, "warmup_steps": 2},
        "decode": {"max_tokens": 12, "block_length": 4, "steps_per_block": 4},
        "evaluate": {"rows": 32, "draws": 2, "prompts": 4},
    }
    for name, section in sections.items():
        old = values.get(name)
        values[name] = {**old, **section} if isinstance(old, dict) and isinstance(section, dict) else section
    return Recipe.checked(values)


def write_small_text(root: Path) -> None:
    """The corpus of `small_recipe`."""
    (root / "corpus").mkdir(parents=True, exist_ok=True)
    (root / "corpus" / "names.txt").write_text(small_text(), encoding="utf-8")


def write_small(root: Path) -> None:
    """What a command line is given: `root/small.yaml` and its corpus."""
    write_small_text(root)
    (root / "small.yaml").write_text(small_recipe(root).to_yaml(), encoding="utf-8")


def make_small_corpus(root: Path, **sections: object) -> SmallCorpus:
    """Write the text, run the real preprocessing in this process."""
    write_small_text(root)
    return preprocessed(small_recipe(root, **sections))


def preprocessed(recipe: Recipe) -> SmallCorpus:
    """The corpus of a recipe, made in this process."""
    store = open_store("storage.root", recipe.storage.root)
    assert isinstance(store, LocalStore)
    manifest = Preprocessing(plan_corpus(recipe, store), serially).run()
    return SmallCorpus(recipe, store, manifest, read_tokenizer(store, manifest))


@pytest.fixture(scope="session")
def small_corpus(tmp_path_factory: pytest.TempPathFactory) -> SmallCorpus:
    """One small corpus for the whole test run; read it only."""
    return make_small_corpus(tmp_path_factory.mktemp("small"))


@pytest.fixture(scope="session")
def small_bundle(small_corpus: SmallCorpus, tmp_path_factory: pytest.TempPathFactory) -> RunDir:
    """A run whose bundle holds random weights: what holds for them holds for trained ones. Read it only."""
    return make_small_bundle(small_corpus, tmp_path_factory.mktemp("bundle"))


def make_small_bundle(corpus: SmallCorpus, root: Path) -> RunDir:
    """A run in `root` with a bundle of random weights, for the objective and the noise of the corpus's recipe."""
    recipe, manifest, tokenizer = corpus.recipe, corpus.manifest, corpus.tokenizer
    run = RunDir(open_store("root", str(root)), "small-0123456789ab")
    torch.manual_seed(11)
    config = denoiser_config(recipe, manifest, tokenizer)
    weights = root / "weights" / "model.safetensors"
    write_weights(weights, weights_of(Denoiser(config)))
    run.store.put(run.key("recipe.yaml"), recipe.to_yaml().encode())
    write_bundle(
        run,
        weights=weights,
        config=config,
        tokenizer=tokenizer,
        process=manifest.process,
        objective=recipe.objective,
        block_length=manifest.block_length,
        steps=manifest.steps,
        decode=recipe.decode.model_dump(mode="json"),
        lineage=Lineage(
            run=run.name,
            recipe_sha256="0" * 64,
            corpus=manifest.fingerprint,
            manifest_sha256="0" * 64,
            checkpoint="step-00000000",
            checkpoint_sha256="0" * 64,
            step=0,
        ),
    )
    return run


def runs_by_kind(
    tmp_path_factory: pytest.TempPathFactory, sections: Mapping[str, dict[str, Any]]
) -> Callable[[str], tuple[SmallCorpus, RunDir]]:
    """The corpus and the run of a kind, made when it is first asked for. sections: of the recipe, by kind."""
    known: dict[str, tuple[SmallCorpus, RunDir]] = {}

    def of(kind: str) -> tuple[SmallCorpus, RunDir]:
        if kind not in known:
            corpus = make_small_corpus(tmp_path_factory.mktemp(kind), **sections[kind])
            known[kind] = corpus, make_small_bundle(corpus, corpus.store.root)
        return known[kind]

    return of


@pytest.fixture(scope="session")
def rados() -> Iterator[Gateway]:
    """A real S3 server for the whole test run, where its packages are installed."""
    if missing_programs():
        pytest.skip(missing_programs())
    with rados_gateway() as gateway:
        yield gateway


@pytest.fixture(scope="session")
def worlds() -> Iterator[Callable[[int], Ranks]]:
    """Processes that train together, by their number; started when they are first asked for, or when they are gone."""
    known: dict[int, Ranks] = {}

    def of(world_size: int) -> Ranks:
        if world_size not in known or not known[world_size].is_up:
            known[world_size] = Ranks(world_size)
        return known[world_size]

    yield of
    for world in known.values():
        world.close()


@pytest.fixture(scope="module")
def one_thread():
    """Torch on one thread for a whole file: bits and CPU time do not depend on the machine's cores."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
