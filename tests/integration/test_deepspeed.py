"""DeepSpeed ZeRO on gloo takes the steps that plain PyTorch takes, at any stage and world size, and resumes exactly.

Nearly all time is the start of processes, so a process takes many trainings, one after the other.
"""

import gc
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
import yaml
from conftest import SmallCorpus, small_recipe
from ranks import Ranks
from safetensors.torch import load_file, save_file
from starts import Prepared, qwen2_folder, texts, values_of

from dllm_core.checkpoints.run_dir import RunDir
from dllm_core.checkpoints.store import CheckpointStore
from dllm_core.data.batch import Batch
from dllm_core.data.loader import Loader
from dllm_core.data.manifest import CorpusManifest, read_manifest
from dllm_core.errors import CheckpointError
from dllm_core.model.config import DenoiserConfig
from dllm_core.model.denoiser import Denoiser
from dllm_core.model.pretrained import weights_of
from dllm_core.model.tensor_file import TensorFile
from dllm_core.objective.diffusion import Diffusion
from dllm_core.objective.loss import DenoiserLike, LossSum, Objective
from dllm_core.storage.store import open_store
from dllm_core.training.backend import Backend, BackendKind, LocalBackend
from dllm_core.training.config import TrainConfig
from dllm_core.training.events import StepRecord
from dllm_core.training.loop import Trainer
from workflows.console import Console
from workflows.recipe import Recipe
from workflows.train.session import Silence, open_session
from workflows.transfer.flow import import_checkpoint

Worlds = Callable[[int], Ranks]
pytestmark = pytest.mark.timeout(900)  # one setup trains all: a minute, more where other work takes the cores


@dataclass(frozen=True)
class Job:
    """What a rank needs."""

    corpus_root: str
    fingerprint: str
    mask_ids: tuple[int, int, int]
    run_root: str
    run: str
    world_size: int
    train: TrainConfig
    local: bool = False
    poison: tuple[int, str] | None = None
    looks: bool = False
    recipe: str | None = None  # of a run's own session: what it starts from, its objective and its noise


class Looking:
    """An objective that is also asked without a gradient before each step, as one scores held-out rows."""

    def __init__(self, objective: Objective) -> None:
        self._objective, self.divisor = objective, objective.divisor
        self.pattern, self.passes = objective.pattern, objective.passes

    def loss(self, denoiser: DenoiserLike, batch: Batch) -> LossSum:
        with torch.no_grad():
            looked = self._objective.loss(denoiser, batch).nats
        loss = self._objective.loss(denoiser, batch)
        torch.testing.assert_close(looked, loss.nats.detach(), atol=1e-4, rtol=1e-5)
        return loss


class Poisoned:
    """An objective that at one of its calls has no finite gradient, or no finite loss: the other stays as it is."""

    def __init__(self, objective: Objective, poison: tuple[int, str] | None) -> None:
        self._objective, self._calls = objective, 0
        self._call, self._kind = poison or (-1, "")
        self.pattern, self.passes, self.divisor = objective.pattern, objective.passes, objective.divisor

    def loss(self, denoiser: DenoiserLike, batch: Batch) -> LossSum:
        loss = self._objective.loss(denoiser, batch)
        self._calls += 1
        if self._calls - 1 != self._call:
            return loss
        spoiled = loss.nats + 0 * torch.sqrt(0 * loss.nats) if self._kind == "gradient" else loss.nats + torch.inf
        return replace(loss, nats=spoiled)


class Quiet(Silence):
    """Keeps the records."""

    def __init__(self) -> None:
        self.records: list[StepRecord] = []

    def stepped(self, record: StepRecord) -> None:
        self.records.append(record)


def train_jobs(rank: int, jobs: list[Job]) -> None:
    """All that a process of a world does, in its order. It starts no other: a step would wait for that."""
    with patch("subprocess.Popen", side_effect=AssertionError("a training starts a process")):
        for job in jobs:
            train_job(rank, job)


def check_start(rank: int, root: Path) -> None:
    gc.freeze()  # `live_elements` would look through all that was imported, each time
    try:
        check_start_at_stage_3(rank, root)
    finally:
        gc.unfreeze()


def check_start_at_stage_3(rank: int, root: Path) -> None:
    """At stage 3 a module is made and filled with one part of it whole at a time, and equals one that was whole."""
    import deepspeed

    from dllm_core.training.deepspeed_backend import DeepSpeedBackend

    sizes = {"dim": 128, "layers": 12, "heads": 4, "ffn_dim": 384, "tie_embeddings": False, "time_conditioning": True}
    model = DenoiserConfig.checked(
        {"model": sizes, "vocab_size": 512, "context_length": 16, "mask_id": 0, "eos_id": 1, "pad_id": 2}
    )
    train, cpu, world_size = TrainConfig(zero_stage=3, batch_rows=2), torch.device("cpu"), 2
    torch.manual_seed(9)
    whole = Denoiser(model)
    largest = max(sum(p.numel() for p in part.parameters()) for part in [*whole.blocks, whole.embed, whole.time])
    total = sum(p.numel() for p in whole.parameters())
    expected = {name: tensor.clone() for name, tensor in weights_of(whole).items()}
    other = {name: tensor + 1 for name, tensor in expected.items()}
    save_file(other, root / f"other-{rank}.safetensors")
    before, init, held = live_elements(), deepspeed.zero.Init, list[int]()

    def cut(**given: Any) -> None:
        held.append(live_elements() - before)
        init(**given)

    class Watched(TensorFile):
        def __getitem__(self, name: str) -> torch.Tensor:
            tensor = super().__getitem__(name)
            held.append(live_elements() - before)
            return tensor

    deepspeed.zero.Init = cut
    try:
        torch.manual_seed(9)
        module = DeepSpeedBackend.new_denoiser(model, train, cpu)
    finally:
        deepspeed.zero.Init = init
    settings = {name: p.ds_shape for name, p in module.named_parameters()}
    assert settings == {name: t.shape for name, t in expected.items()}
    assert len(held) == model.model.layers + 4  # embedding, norm, head and times
    found = {name: joined(p) for name, p in module.named_parameters()}
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    del found
    file = Watched(root / f"other-{rank}.safetensors")
    DeepSpeedBackend.assign(module, file, "other")
    found = {name: joined(p) for name, p in module.named_parameters()}
    assert all(torch.equal(found[name], tensor) for name, tensor in other.items())
    assert len(held) == model.model.layers + 4 + len(other)
    assert max(held) <= total / world_size + 1.1 * largest < 0.85 * total
    with pytest.raises(CheckpointError, match=r"missing norm\.weight"):
        DeepSpeedBackend.assign(module, {n: t for n, t in other.items() if n != "norm.weight"}, "place")


def check_cpu_beside_gpus(rank: int) -> None:
    """DeepSpeed's import has found GPUs, and the model, which was given none, is trained where it is."""
    from deepspeed.accelerator import get_accelerator, set_accelerator
    from deepspeed.accelerator.cuda_accelerator import CUDA_Accelerator

    from dllm_core.training.deepspeed_backend import DeepSpeedBackend

    model = DenoiserConfig.checked(
        {"model": {"dim": 16, "layers": 1, "heads": 1}, "vocab_size": 9, "context_length": 4, "mask_id": 0}
        | {"eos_id": 1, "pad_id": 2}
    )
    for stage in (2, 3):
        set_accelerator(CUDA_Accelerator())
        train = TrainConfig(zero_stage=stage, batch_rows=1)
        backend = DeepSpeedBackend(DeepSpeedBackend.new_denoiser(model, train, torch.device("cpu")), train)
        backend.backward(backend.denoiser(torch.tensor([[3, 4, 5, 6]])).square().sum())
        assert backend.step(0.1) > 0
        assert get_accelerator().device_name() == backend.module.device.type == "cpu"


def live_elements() -> int:
    """Of all tensors that live in this process, each storage once."""
    storages = {
        t.untyped_storage().data_ptr(): t.untyped_storage().nbytes()
        for t in gc.get_objects()
        if issubclass(type(t), torch.Tensor)  # isinstance would ask objects for their class, and some warn
    }
    return sum(storages.values()) // 4


def joined(p: Any) -> torch.Tensor:
    """A parameter that was cut, from both ranks' parts."""
    parts = [torch.empty_like(p.ds_tensor) for _ in range(2)]
    torch.distributed.all_gather(parts, p.ds_tensor.contiguous())
    return torch.cat(parts)[: p.ds_numel].view(p.ds_shape)


def train_job(rank: int, job: Job) -> None:
    torch.manual_seed(3)
    store = open_store("root", job.corpus_root)
    manifest = read_manifest(store, job.fingerprint)
    if job.recipe is not None:
        train_session(rank, job, manifest)
        return
    mask_id, eos_id, pad_id = job.mask_ids
    recipe = small_recipe(Path(job.run_root))
    config = DenoiserConfig(
        model=recipe.model,
        vocab_size=manifest.vocab_size,
        context_length=manifest.seq_len,
        mask_id=mask_id,
        eos_id=eos_id,
        pad_id=pad_id,
    )
    kind = kind_of(job)
    module = kind.new_denoiser(config, job.train, torch.device("cpu"))
    module.register_buffer("noted", torch.tensor([1.0, 2.0, 3.0]))  # what is no parameter is kept too
    checkpoints = CheckpointStore(RunDir(open_store("root", job.run_root), job.run))
    newest = checkpoints.newest(lambda error: pytest.fail(str(error)))
    if newest is not None:
        kind.assign(module, TensorFile(newest.files["model.safetensors"]), "checkpoint")
    backend: Backend = kind(module, job.train)
    if not job.local:
        check_settings(backend._engine, job.train)
        check_shares(backend, {**weights_of(Denoiser(config)), "noted": torch.tensor([4.0, 5.0, 6.0])})
    told = Quiet()
    process = manifest.process.bind(mask_id, manifest.vocab_size)
    objective: Objective = Diffusion(recipe.objective, process, torch.device("cpu"))
    if job.looks:
        objective = Looking(objective)
    trainer = Trainer(
        job.train,
        backend,
        Poisoned(objective, job.poison if rank == job.world_size - 1 else None),
        Loader.open(store, manifest, mask_id),
        checkpoints,
        told,
        samples_per_epoch=manifest.train.rows,
    )
    if newest is not None:
        trainer.resume(newest)
    trainer.run()
    if rank == 0:
        Path(job.run_root, f"{job.run}.losses").write_text(json.dumps([record.loss for record in told.records]))


def kind_of(job: Job) -> BackendKind:
    """DeepSpeed takes seconds to import."""
    if job.local:
        return LocalBackend
    from dllm_core.training.deepspeed_backend import DeepSpeedBackend

    return DeepSpeedBackend


def train_session(rank: int, job: Job, manifest: CorpusManifest) -> None:
    """As a worker does it, from the recipe."""
    told = Quiet()
    recipe = Recipe.checked(yaml.safe_load(job.recipe or "")).model_copy(update={"train": job.train})
    trainer = open_session(
        recipe,
        RunDir(open_store("root", job.corpus_root), job.run),
        manifest,
        torch.device("cpu"),
        backend=kind_of(job),
        events_of=lambda step: told,
        on_damage=lambda error: pytest.fail(str(error)),
    )
    trainer.run()
    if rank == 0:
        Path(job.corpus_root, f"{job.run}.losses").write_text(json.dumps([record.loss for record in told.records]))


def check_settings(engine: Any, config: TrainConfig) -> None:
    """What no figure tells on a CPU, where what is offloaded stays where it was."""
    assert int(engine.zero_optimization_stage()) == config.zero_stage
    assert (engine.zero_offload_optimizer() is not None) == (config.offload != "none")
    assert (engine.zero_offload_param() is not None) == (config.offload == "parameters")
    assert engine.module.checkpoints_blocks == config.activation_checkpointing
    assert (engine.module.embed.weight.numel() == 0) == (config.zero_stage == 3)  # nothing of it is left but its part


def check_shares(backend: Backend, whole: dict[str, torch.Tensor]) -> None:
    """Every weight is on one rank alone, and whole again once gathered."""
    gathered = backend.gather(backend.scatter(whole))
    assert gathered.keys() == (whole.keys() if backend.rank == 0 else set())
    assert all(torch.equal(tensor, whole[name]) for name, tensor in gathered.items())
    shares = backend.scatter(whole)
    assert {n: t.shape for n, t in backend.shard().items()} == {n: t.shape for n, t in shares.items()}
    [held] = backend.sum_over_ranks([float(sum(t.numel() for t in shares.values()))])
    total = sum(t.numel() for t in whole.values())
    assert total <= held < total + len(whole) * backend.world_size  # the last part of each is filled up


def job_of(
    corpus: SmallCorpus,
    root: Path,
    name: str,
    *,
    world_size: int = 1,
    local: bool = False,
    poison: tuple[int, str] | None = None,
    looks: bool = False,
    **fields: object,
) -> Job:
    tokenizer = corpus.tokenizer
    return Job(
        corpus_root=corpus.recipe.storage.root,
        fingerprint=corpus.manifest.fingerprint,
        mask_ids=(tokenizer.mask_id, tokenizer.eos_id, tokenizer.pad_id),
        run_root=str(root),
        run=name,
        world_size=world_size,
        train=TrainConfig.checked({**corpus.recipe.train.model_dump(), **fields}),
        local=local,
        poison=poison,
        looks=looks,
    )


def result_of(root: Path, name: str, last: int = 10):
    """The tensors of a run's last checkpoint, and the losses of its last steps."""
    newest = CheckpointStore(RunDir(open_store("root", str(root)), name)).newest(lambda error: None)
    assert newest is not None
    found = {part: load_file(newest.files[f"{part}.safetensors"]) for part in ("model", "ema", "optimizer")}
    losses = json.loads((root / f"{name}.losses").read_text())
    return {**found, "losses": {str(-k): torch.tensor(losses[-k]) for k in range(1, min(len(losses), last) + 1)}}


def conversion(root: Path, **start: object) -> Callable[..., Job]:
    """Jobs that make diffusion of a checkpoint that was autoregressive, in growing blocks, its masks noisy at first."""
    root = root / ("adapters" if start else "whole")
    words = ["mask_id=new", f"storage.root={root / 'storage'}"]
    run = import_checkpoint(str(qwen2_folder(root / "qwen")), "qwen", words, Console("json"))["run"]
    warmup = [{"block_length": 1, "steps": 2}, {"block_length": 4, "steps": 2}]
    start = {"run": run, "mask_noise": {"std": 0.5, "steps": 3}, **start}
    given = {"start": start, "objective": {"block_warmup": warmup}}
    prepared = Prepared(values_of(root, texts(root / "text"), **given, train={"steps": 6, "checkpoint_every": 99}))

    def job(name: str, world_size: int = 2, *, local: bool = False, **fields: object) -> Job:
        return Job(
            corpus_root=str(root / "storage"),
            fingerprint=prepared.corpus,
            mask_ids=(0, 0, 0),
            run_root=str(root / "storage"),
            run=name,
            world_size=world_size,
            train=TrainConfig.checked({**prepared.recipe.train.model_dump(), **fields}),
            local=local,
            recipe=prepared.recipe.to_yaml(),
        )

    return job


def train(worlds: Worlds, corpus: SmallCorpus, root: Path, runs: dict[str, dict[str, Any]], **fields: Any) -> None:
    """Train the runs, by name, in one world; `fields` are those of all."""
    jobs = [job_of(corpus, root, name, **{**fields, **run}) for name, run in runs.items()]
    worlds(jobs[0].world_size).run(train_jobs, jobs)


def train_plain(corpus: SmallCorpus, root: Path, **fields: Any) -> dict[str, dict[str, torch.Tensor]]:
    """The tensors of a run of plain PyTorch in this process."""
    train_job(0, job_of(corpus, root, "plain", local=True, **fields))
    return result_of(root, "plain")


def assert_same(left: dict[str, dict[str, torch.Tensor]], right: dict[str, dict[str, torch.Tensor]], atol: float):
    for part in ("model", "ema", "optimizer", "losses"):
        assert left[part].keys() == right[part].keys()
        for name, tensor in left[part].items():
            torch.testing.assert_close(right[part][name], tensor, atol=atol, rtol=0, msg=lambda m, n=name: f"{n}: {m}")


WORLD_2 = {
    **{f"zero-{stage}": {"zero_stage": stage} for stage in range(4)},
    **{f"zero-{stage}-micro": {"zero_stage": stage, "micro_rows": 1} for stage in (0, 3)},
    "zero-1-offload": {"zero_stage": 1, "offload": "optimizer"},
    "zero-2-looks": {"zero_stage": 2, "looks": True, "micro_rows": 2},
    "zero-3-looks-all": {"zero_stage": 3, "looks": True, "offload": "parameters", "activation_checkpointing": True},
}
WORLD_1 = {f"one-zero-{stage}": {"zero_stage": stage} for stage in range(4)}
MORE: dict[str, dict[str, object]] = {  # each at both world sizes
    **{f"micro-{stage}": {"zero_stage": stage, "micro_rows": 2} for stage in range(4)},
    **{f"offload-{stage}": {"zero_stage": stage, "offload": "optimizer"} for stage in (1, 2, 3)},
    **{f"offload-micro-{stage}": {"zero_stage": stage, "offload": "optimizer", "micro_rows": 2} for stage in (1, 2, 3)},
    **{f"checkpointing-{stage}": {"zero_stage": stage, "activation_checkpointing": True} for stage in range(4)},
    **{f"looks-{stage}": {"zero_stage": stage, "looks": True} for stage in range(4)},
    "parameters": {"zero_stage": 3, "offload": "parameters"},
    "parameters-micro": {"zero_stage": 3, "offload": "parameters", "micro_rows": 1},
    "all": {"zero_stage": 3, "offload": "parameters", "micro_rows": 2, "activation_checkpointing": True},
}
# At step 3, by the loss or the gradient of the last rank; with micro-batches of one row, four a step, by the third.
GRADIENT, LOSS, MICRO = {"poison": (3, "gradient")}, {"poison": (3, "loss")}, {"poison": (14, "loss"), "micro_rows": 1}
POISONED: dict[str, dict[str, object]] = {
    **{f"gradient-{stage}": {"zero_stage": stage, **GRADIENT} for stage in (1, 3)},
    **{f"micro-{stage}": {"zero_stage": stage, **MICRO} for stage in (0, 2)},
    "loss-3": {"zero_stage": 3, **LOSS},
    "micro-offload": {"zero_stage": 2, "offload": "optimizer", **MICRO},
}
MORE_POISONED: dict[str, dict[str, object]] = {
    **{f"gradient-{stage}": {"zero_stage": stage, **GRADIENT} for stage in (0, 2)},
    **{f"micro-{stage}": {"zero_stage": stage, **MICRO} for stage in (1, 3)},
    "gradient-offload": {"zero_stage": 2, "offload": "optimizer", **GRADIENT},
    "micro-parameters": {"zero_stage": 3, "offload": "parameters", **MICRO},
}
STEPS, LONG_STEPS, SKIPPED_STEPS = 12, 20, 6
CONVERTED: dict[str, dict[str, object]] = {
    "converted-2": {"zero_stage": 2},
    "converted-micro": {"zero_stage": 3, "micro_rows": 1, "activation_checkpointing": True},
}
ADAPTED = {name.replace("converted", "adapted"): fields for name, fields in CONVERTED.items()}


@pytest.fixture(scope="module")
def runs(small_corpus, tmp_path_factory, worlds) -> Path:
    """A folder with every run, and a relay: ZeRO 3 on two ranks, from its step 4 ZeRO 1 on one, from 8 back again."""
    root = tmp_path_factory.mktemp("zero")

    def jobs(world_size: int, runs: dict[str, dict[str, object]], **fields: object) -> list[Job]:
        given = {"world_size": world_size, "steps": STEPS, **fields}
        return [job_of(small_corpus, root, name, **{**given, **run}) for name, run in runs.items()]

    def relay(step: int, giver: str, taker: str) -> None:
        source, target = (root / "runs" / run / "checkpoints" / f"step-{step:08d}" for run in (giver, taker))
        shutil.copytree(source, target)

    one, two = worlds(1), worlds(2)
    often = {"checkpoint_every": 4, "keep_checkpoints": 9}
    two.run(check_start, root)
    two.begin(train_jobs, jobs(2, {"first": {"zero_stage": 3, **often}}))
    converted, adapted = conversion(root), conversion(root, lora={"rank": 3})
    one.begin(train_jobs, [converted("converted", 1, local=True), adapted("adapted", 1, local=True)])
    train_jobs(0, jobs(1, {"plain": {}, "plain-skipped": {"steps": SKIPPED_STEPS, **LOSS}}, local=True))
    one.join()
    two.join()
    relay(4, "first", "second")
    one.begin(train_jobs, jobs(1, {"second": {"zero_stage": 1, **often}, **WORLD_1}))
    skipped = {name: {**fields, "steps": SKIPPED_STEPS} for name, fields in POISONED.items()}
    started = [converted(name, **fields) for name, fields in CONVERTED.items()]
    started += [adapted(name, **fields) for name, fields in ADAPTED.items()]
    two.run(train_jobs, jobs(2, {**WORLD_2, **skipped}) + started)
    one.join()
    relay(8, "second", "third")
    two.run(train_jobs, jobs(2, {"third": {"zero_stage": 3, "offload": "parameters"}}))
    return root


@pytest.mark.parametrize("name", [*WORLD_2, *WORLD_1])
def test_zero_takes_the_steps_of_plain_pytorch_at_any_stage_and_world_size(runs, name):
    assert_same(result_of(runs, "plain"), result_of(runs, name), atol=1e-5)


@pytest.mark.parametrize("name", CONVERTED)
def test_a_conversion_starts_from_the_same_weights_and_takes_the_same_steps_however_it_is_cut(runs, name):
    storage = runs / "whole" / "storage"
    assert_same(result_of(storage, "converted"), result_of(storage, name), atol=1e-5)


@pytest.mark.parametrize("name", ADAPTED)
def test_adapters_take_the_same_steps_however_the_frozen_weights_are_cut(runs, name):
    storage = runs / "adapters" / "storage"
    found = result_of(storage, name)
    assert_same(result_of(storage, "adapted"), found, atol=1e-5)
    assert all(".lora_" in key for key in found["model"])


@pytest.mark.parametrize("name", POISONED)
def test_a_step_that_is_no_number_on_one_rank_is_skipped_by_all(runs, name):
    found = result_of(runs, name)
    assert all(tensor.isfinite().all() for part in found.values() for tensor in part.values())
    assert_same(result_of(runs, "plain-skipped"), found, atol=1e-5)


@pytest.mark.parametrize(("name", "last"), [("first", 10), ("second", STEPS - 4), ("third", STEPS - 8)])
def test_a_run_that_goes_on_at_another_stage_and_world_size_ends_where_an_uninterrupted_one_does(runs, name, last):
    assert_same(result_of(runs, "plain", last), result_of(runs, name, last), atol=1e-5)


def test_a_model_on_the_cpu_is_trained_there_on_a_machine_with_gpus_too(worlds):
    worlds(1).run(check_cpu_beside_gpus)


@pytest.mark.long
@pytest.mark.parametrize("world_size", [1, 2])
def test_every_combination_takes_the_same_steps(worlds, small_corpus, tmp_path, world_size):
    plain = train_plain(small_corpus, tmp_path, steps=LONG_STEPS)
    train(worlds, small_corpus, tmp_path, MORE, world_size=world_size, steps=LONG_STEPS)
    for name in MORE:
        assert_same(plain, result_of(tmp_path, name), atol=1e-5)


@pytest.mark.long
def test_every_step_that_is_no_number_on_one_rank_is_skipped_by_all(worlds, small_corpus, tmp_path):
    plain = train_plain(small_corpus, tmp_path, steps=SKIPPED_STEPS, **LOSS)
    train(worlds, small_corpus, tmp_path, MORE_POISONED, world_size=2, steps=SKIPPED_STEPS)
    for name in MORE_POISONED:
        assert_same(plain, result_of(tmp_path, name), atol=1e-5)


@pytest.mark.long
@pytest.mark.parametrize("start", [{}, {"lora": {"rank": 3}}], ids=["whole", "adapters"])
def test_a_conversion_takes_the_same_steps_at_other_stages_too(worlds, tmp_path, start):
    job = conversion(tmp_path, **start)
    worlds(1).run(train_jobs, [job("plain", 1, local=True)])
    worlds(2).run(train_jobs, [job(f"stage-{stage}", zero_stage=stage) for stage in (0, 1, 3)])
    [storage] = tmp_path.glob("*/storage")
    for stage in (0, 1, 3):
        assert_same(result_of(storage, "plain"), result_of(storage, f"stage-{stage}"), atol=1e-5)


@pytest.mark.long
def test_parts_that_do_not_divide_evenly_are_filled_up_and_cut_again(worlds, small_corpus, tmp_path):
    fields = {"batch_rows": 9, "steps": 10}
    plain = train_plain(small_corpus, tmp_path, **fields)
    train(worlds, small_corpus, tmp_path, {"three": {"zero_stage": 3}}, world_size=3, **fields)
    assert_same(plain, result_of(tmp_path, "three"), atol=1e-5)


@pytest.mark.long
def test_in_bf16_stages_differ_by_no_more_than_rounding_does(worlds, small_corpus, tmp_path):
    runs = {"whole": {"zero_stage": 0}, "cut": {"zero_stage": 3}, "micro": {"zero_stage": 3, "micro_rows": 1}}
    train(worlds, small_corpus, tmp_path, runs, world_size=2, precision="bf16", steps=LONG_STEPS)
    whole = result_of(tmp_path, "whole")
    for name in ("cut", "micro"):
        assert_same(whole, result_of(tmp_path, name), atol=1e-2)


@pytest.mark.long
def test_compiled_blocks_take_the_same_steps(worlds, small_corpus, tmp_path):
    plain = train_plain(small_corpus, tmp_path, steps=10)
    runs = {f"compiled-{stage}": {"zero_stage": stage, "compile": True} for stage in (2, 3)}
    train(worlds, small_corpus, tmp_path, runs, steps=10)
    for name in runs:
        assert_same(plain, result_of(tmp_path, name), atol=1e-4)
