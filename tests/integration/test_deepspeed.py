"""DeepSpeed ZeRO on gloo takes the very steps that plain PyTorch takes, at any world size, and resumes exactly."""

import os
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from conftest import SmallCorpus, small_recipe
from safetensors.torch import load_file

from dllm_core.checkpoints.run_dir import RunDir
from dllm_core.checkpoints.store import CheckpointStore
from dllm_core.data.batch import Batch
from dllm_core.data.loader import Loader
from dllm_core.data.manifest import read_manifest
from dllm_core.model.config import DenoiserConfig
from dllm_core.model.denoiser import Denoiser
from dllm_core.model.pretrained import assign_weights
from dllm_core.objective.diffusion import Diffusion
from dllm_core.objective.loss import DenoiserLike, LossSum, Objective
from dllm_core.storage.store import open_store
from dllm_core.training.backend import Backend, LocalBackend
from dllm_core.training.config import TrainConfig
from dllm_core.training.events import StepRecord
from dllm_core.training.loop import Trainer


@dataclass(frozen=True)
class Job:
    """What a spawned rank needs."""

    corpus_root: str
    fingerprint: str
    mask_ids: tuple[int, int, int]
    run_root: str
    run: str
    world_size: int
    train: TrainConfig
    local: bool = False
    poisoned_step: int | None = None


class Poisoned:
    """An objective whose loss is finite and whose gradient is not, at one of its calls, on the last rank."""

    def __init__(self, objective: Objective, call: int | None) -> None:
        self._objective, self._call, self._calls = objective, call, 0
        self.pattern = objective.pattern

    def loss(self, denoiser: DenoiserLike, batch: Batch) -> LossSum:
        loss = self._objective.loss(denoiser, batch)
        self._calls += 1
        if self._calls - 1 != self._call:
            return loss
        return replace(loss, nats=loss.nats + 0 * torch.sqrt(0 * loss.nats))


class Quiet:
    """Keeps the records."""

    def __init__(self) -> None:
        self.records: list[StepRecord] = []

    def started(self, step: int, seconds: float) -> None:
        pass

    def stepped(self, record: StepRecord) -> None:
        self.records.append(record)

    def saved(self, step: int) -> None:
        pass

    def skipped(self, step: int) -> None:
        pass


def train_rank(rank: int, job: Job) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(3)
    store = open_store("root", job.corpus_root)
    manifest = read_manifest(store, job.fingerprint)
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
    module = Denoiser(config)
    checkpoints = CheckpointStore(RunDir(open_store("root", job.run_root), job.run))
    newest = checkpoints.newest(lambda error: pytest.fail(str(error)))
    if newest is not None:
        assign_weights(module, load_file(newest.files["model.safetensors"]), "checkpoint")
    backend: Backend
    if job.local:
        backend = LocalBackend(module, job.train)
    else:
        from dllm_core.training.deepspeed_backend import DeepSpeedBackend

        os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(job.world_size), MASTER_ADDR="127.0.0.1")
        torch.distributed.init_process_group(
            "gloo", init_method=f"file://{job.run_root}/{job.run}.rendezvous", rank=rank, world_size=job.world_size
        )
        backend = DeepSpeedBackend(module, job.train)
    trainer = Trainer(
        job.train,
        backend,
        Poisoned(
            Diffusion(recipe.objective, manifest.process.bind(mask_id, manifest.vocab_size), torch.device("cpu")),
            job.poisoned_step if rank == job.world_size - 1 else None,
        ),
        Loader.open(store, manifest, mask_id),
        checkpoints,
        Quiet(),
        samples_per_epoch=manifest.train.rows,
    )
    if newest is not None:
        trainer.resume(newest)
    trainer.run()
    if not job.local:
        torch.distributed.destroy_process_group()
        # DeepSpeed keeps the group's threads; at the interpreter's own end they sometimes abort the process
        # ("terminate called without an active exception"), after all work is done.
        os._exit(0)


def train(
    corpus: SmallCorpus,
    root: Path,
    name: str,
    *,
    world_size: int = 1,
    local: bool = False,
    poisoned_step: int | None = None,
    **fields: object,
):
    """Run `world_size` real processes; the tensors of the last checkpoint."""
    values = {**corpus.recipe.train.model_dump(), **fields}
    tokenizer = corpus.tokenizer
    job = Job(
        corpus_root=corpus.recipe.storage.root,
        fingerprint=corpus.manifest.fingerprint,
        mask_ids=(tokenizer.mask_id, tokenizer.eos_id, tokenizer.pad_id),
        run_root=str(root),
        run=name,
        world_size=world_size,
        train=TrainConfig.checked(values),
        local=local,
        poisoned_step=poisoned_step,
    )
    (root / f"{name}.rendezvous").unlink(missing_ok=True)
    if local:
        train_rank(0, job)
    else:
        torch.multiprocessing.spawn(train_rank, (job,), nprocs=world_size, join=True)
    newest = CheckpointStore(RunDir(open_store("root", str(root)), name)).newest(lambda error: None)
    assert newest is not None
    return {part: load_file(newest.files[f"{part}.safetensors"]) for part in ("model", "ema", "optimizer")}


def assert_same(left: dict[str, dict[str, torch.Tensor]], right: dict[str, dict[str, torch.Tensor]], atol: float):
    for part in ("model", "ema", "optimizer"):
        assert left[part].keys() == right[part].keys()
        for name, tensor in left[part].items():
            torch.testing.assert_close(right[part][name], tensor, atol=atol, rtol=0, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize(
    ("world_size", "zero_stage"),
    [
        (2, 2),
        pytest.param(1, 0, marks=pytest.mark.long),
        pytest.param(1, 2, marks=pytest.mark.long),
        pytest.param(2, 0, marks=pytest.mark.long),
        pytest.param(2, 1, marks=pytest.mark.long),
    ],
)
def test_zero_takes_the_steps_of_plain_pytorch_at_any_world_size(small_corpus, tmp_path, world_size, zero_stage):
    reference = train(small_corpus, tmp_path, "reference", local=True)
    zero = train(small_corpus, tmp_path, "zero", world_size=world_size, zero_stage=zero_stage)
    assert_same(reference, zero, atol=1e-5)


@pytest.mark.parametrize(("world_size", "zero_stage"), [(2, 2), pytest.param(2, 0, marks=pytest.mark.long)])
def test_a_gradient_that_is_no_number_on_one_rank_is_skipped_by_all(small_corpus, tmp_path, world_size, zero_stage):
    reference = train(small_corpus, tmp_path, "reference", local=True, poisoned_step=2)
    zero = train(small_corpus, tmp_path, "zero", world_size=world_size, zero_stage=zero_stage, poisoned_step=2)
    assert all(tensor.isfinite().all() for part in zero.values() for tensor in part.values())
    assert_same(reference, zero, atol=1e-5)


def test_a_run_that_stops_and_goes_on_at_another_world_size_ends_where_an_uninterrupted_one_does(
    small_corpus, tmp_path
):
    whole = train(small_corpus, tmp_path, "whole", world_size=2, steps=6, checkpoint_every=3)
    halves = tmp_path / "halves"
    halves.mkdir()
    prefix = tmp_path / "runs" / "whole" / "checkpoints" / "step-00000003"
    (halves / "runs" / "again" / "checkpoints").mkdir(parents=True)
    prefix.rename(halves / "runs" / "again" / "checkpoints" / prefix.name)
    again = train(small_corpus, halves, "again", world_size=1, steps=6)
    assert_same(whole, again, atol=1e-5)
