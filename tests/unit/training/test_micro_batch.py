"""Laws of micro-batches: a batch's gradient and sums do not tell how it was cut, and `auto` takes the fastest cut."""

from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import draws
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from small import LINEAR, MASK, TEXT, batch_of, diffusion, every_objective, new_denoiser, rows_at

from dllm_core.checkpoints.run_dir import RunDir
from dllm_core.checkpoints.store import CheckpointStore
from dllm_core.data.batch import Batch
from dllm_core.errors import ConfigError, DataError
from dllm_core.model.denoiser import Denoiser
from dllm_core.model.pattern import AttentionPattern
from dllm_core.storage.store import LocalStore
from dllm_core.training import loop
from dllm_core.training.backend import LocalBackend, new_optimizer, new_state, prepare, resolve_precision
from dllm_core.training.config import TrainConfig
from dllm_core.training.loop import _measured_peak
from dllm_core.training.micro_batch import accumulated, chosen_micro_rows, fastest_micro_rows, room_beside_trials
from dllm_core.training.plan import Forward, device_memory
from workflows.train.session import Silence, open_session

pytestmark = pytest.mark.usefixtures("one_thread")
OBJECTIVES = every_objective()
CONFIG = TrainConfig(precision="fp32")


def some_batch(seed: int, rows: int, length: int = 8) -> Batch:
    """Rows of unequal numbers of counted and noised tokens, some of none."""
    rng = np.random.default_rng(seed)
    x0 = rng.choice(TEXT, (rows, length))
    t = rng.integers(1, 4, (rows, length // 2)).repeat(2, axis=1).astype(np.float32) / 4
    xt = np.where(rng.random(x0.shape) < t * rng.random((rows, 1)), MASK, x0)
    counted = rng.random(x0.shape) < rng.random((rows, 1)) * 1.3
    counted[0] = False
    return batch_of(x0, xt, t, loss_mask=counted)


def gradient_of(objective, batch: Batch, micro_rows: int | None) -> tuple[dict[str, torch.Tensor], list[float]]:
    backend = LocalBackend(new_denoiser(), CONFIG)
    sums = accumulated(backend, objective, batch, micro_rows)
    backend.backward(sums.nats / max(sums.divisor, 1.0))
    found = {name: p.grad for name, p in backend.module.named_parameters() if p.grad is not None}
    return found, [float(sums.nats.detach()), float(sums.bound_nats), sums.num_tokens, sums.divisor]


@pytest.mark.parametrize("name", OBJECTIVES)
def test_the_gradient_of_a_batch_does_not_tell_how_it_was_cut(name):
    batch = some_batch(5, 8)
    whole, sums = gradient_of(OBJECTIVES[name], batch, None)
    for micro_rows in (1, 2, 4):
        found, others = gradient_of(OBJECTIVES[name], batch, micro_rows)
        assert others == pytest.approx(sums, rel=1e-5, nan_ok=True)
        assert found.keys() == whole.keys()
        for parameter, gradient in whole.items():
            torch.testing.assert_close(found[parameter], gradient, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("name", OBJECTIVES)
@settings(max_examples=draws(10), deadline=None)
@given(seed=st.integers(0, 999), rows=st.integers(1, 6))
def test_the_divisor_is_told_before_the_loss_and_is_the_losses_own(name, seed, rows):
    objective, batch = OBJECTIVES[name], some_batch(seed, rows)
    assert objective.divisor(batch) == objective.loss(new_denoiser(), batch).divisor
    parts = [objective.divisor(rows_at(batch, slice(k, k + 1))) for k in range(rows)]
    assert sum(parts) == objective.divisor(batch)


@given(st.integers(1, 9), st.none() | st.integers(1, 12))
def test_parts_are_the_batch_row_by_row(rows, micro_rows):
    batch = some_batch(0, rows)
    parts = batch.parts(micro_rows)
    assert all(len(part.x0) == (micro_rows or rows) for part in parts[:-1])
    for field in ("x0", "xt", "t", "loss_mask", "counters"):
        joined = np.concatenate([getattr(part, field) for part in parts])
        assert np.array_equal(joined, getattr(batch, field))
    assert all(part.is_real is part.segment_ids is None for part in parts)


class Costly:
    """An objective whose loss takes the time that a table says for its number of rows, or more memory than there is."""

    def __init__(self, seconds: dict[int, float]) -> None:
        self.seconds, self.now, self.asked = seconds, 0.0, []
        self._objective = diffusion(LINEAR)
        self.pattern = self._objective.pattern

    def loss(self, denoiser: Denoiser, batch: Batch):
        rows = len(batch.x0)
        self.asked.append(rows)
        if rows not in self.seconds:
            raise torch.OutOfMemoryError("no room")
        self.now += self.seconds[rows]
        return self._objective.loss(denoiser, batch)

    def clock(self) -> float:
        return self.now


@pytest.mark.parametrize(
    ("rows", "seconds", "fastest"),
    [
        (8, {1: 1, 2: 2, 4: 4, 8: 8}, 8),  # all alike: the largest
        (8, {1: 1, 2: 1.5, 4: 2, 8: 8}, 4),
        (8, {1: 1, 2: 4, 4: 8, 8: 16}, 1),
        (8, {1: 1, 2: 2, 4: 3.9, 8: 8.1}, 8),  # by less than 5 % in a row's time
        (12, {1: 1, 2: 2, 4: 4, 12: 6}, 12),  # 8 does not divide it
        (8, {1: 1, 2: 1.5}, 2),  # 4 do not fit
        (1, {1: 1}, 1),
    ],
)
def test_auto_takes_the_largest_of_the_fastest_that_fit_and_leaves_the_model_as_it_was(rows, seconds, fastest):
    costly, module = Costly(seconds), new_denoiser()
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    assert fastest_micro_rows(CONFIG, module, costly, some_batch(1, rows), costly.clock) == fastest
    assert all(torch.equal(tensor, before[name]) for name, tensor in module.state_dict().items())
    assert all(p.grad is None for p in module.parameters())
    assert set(costly.asked) <= {1, 2, 4, 8, 12}
    too_large = [rows for rows in costly.asked if rows not in seconds]
    assert len(too_large) <= 1  # not tried twice, nor what is larger still


def test_where_not_one_row_fits_that_is_said_in_one_line():
    costly = Costly({})
    with pytest.raises(DataError, match=r"^train\.micro_rows: not one row fits .*activation_checkpointing"):
        fastest_micro_rows(CONFIG, new_denoiser(), costly, some_batch(1, 4), costly.clock)


@pytest.mark.parametrize(("stage", "offload"), [(0, "none"), (1, "none"), (2, "none"), (2, "optimizer")])
@pytest.mark.parametrize("workers", [1, 8])
def test_trials_and_the_room_beside_them_are_what_training_takes(stage, offload, workers):
    config, module = TrainConfig(zero_stage=stage, offload=offload), new_denoiser()
    forward = Forward(1, 8, bf16=False)
    planned = device_memory(config, module.config, AttentionPattern("full"), forward, stage=stage, workers=workers)
    trial = planned.activations + planned.logits + 8 * sum(p.numel() for p in module.parameters())
    assert max(trial, planned.total) == trial + room_beside_trials(config, module, workers)


class Queue:
    """A device on which a product takes a tenth of a second, and a clock that moves while it is waited for."""

    def __init__(self) -> None:
        self.now = self.end = 0.0
        cuda = SimpleNamespace(synchronize=lambda device: setattr(self, "now", max(self.now, self.end)))
        drawn = SimpleNamespace(manual_seed=lambda seed: None)
        self.torch = SimpleNamespace(cuda=cuda, Generator=lambda device: drawn, randn=lambda *size, **options: self)

    def to(self, dtype: torch.dtype) -> "Queue":
        return self

    def __matmul__(self, other: "Queue") -> None:
        self.end = max(self.now, self.end) + 0.1


def test_products_that_were_asked_for_before_the_clock_are_no_part_of_a_gpus_rate(monkeypatch):
    queue = Queue()
    monkeypatch.setattr(loop, "torch", queue.torch)
    monkeypatch.setattr(loop.time, "perf_counter", lambda: queue.now)
    rate = _measured_peak.__wrapped__(torch.float32, torch.device("cuda", 0), 1)
    assert rate == pytest.approx(2 * 8192**3 / 0.1)


@pytest.mark.parametrize(("major", "found"), [(7, torch.float32), (8, torch.bfloat16)])
def test_bf16_that_a_gpu_emulates_is_not_chosen(monkeypatch, major, found):
    for name, part in {
        "is_available": lambda: True,
        "current_device": lambda: 0,
        "get_device_properties": lambda device: SimpleNamespace(major=major),
        "_check_bf16_tensor_supported": lambda device: True,
    }.items():
        monkeypatch.setattr(torch.cuda, name, part)
    assert resolve_precision("auto", torch.device("cuda", 0)) is found


def test_a_number_is_taken_and_only_auto_is_measured():
    batches = SimpleNamespace(batch=lambda *_: some_batch(1, 4))
    for micro_rows in (None, 1, 2):
        config = TrainConfig(micro_rows=micro_rows)
        assert chosen_micro_rows(config, new_denoiser().config, new_denoiser, Costly({}), batches) == micro_rows
    auto = TrainConfig(micro_rows="auto", batch_rows=4, precision="fp32")
    assert chosen_micro_rows(auto, new_denoiser().config, new_denoiser, diffusion(LINEAR), batches) in {1, 2, 4}


@pytest.mark.parametrize(("widest", "held"), [(None, 1), (AttentionPattern("block_diffusion", 4), 1), (None, 4)])
@pytest.mark.parametrize(("room", "fitting"), [(None, 8), (0.999, 4), (0.0, 0)])
def test_of_a_model_that_no_rank_holds_a_part_is_timed_and_what_fits_is_reckoned(room, fitting, widest, held):
    part = new_denoiser()
    model = part.config.model_copy(update={"model": part.config.model.model_copy(update={"layers": 40})})
    config = TrainConfig(micro_rows="auto", batch_rows=8, precision="fp32", zero_stage=3)
    costly = Costly({rows: 1 for rows in (1, 2, 4, 8)})  # the more, the better
    batches = SimpleNamespace(batch=lambda *_: some_batch(1, 8))

    def needed(rows: int) -> int:
        forward = Forward(held * rows, model.context_length, bf16=False, read_share=1.0)
        return device_memory(config, model, widest or costly.pattern, forward, stage=3, workers=1).total

    device_bytes = None if room is None else int(room * needed(8))
    given = {"device_bytes": device_bytes, "clock": costly.clock, "widest": widest, "held": held}
    asked = partial(chosen_micro_rows, config, model, lambda: part, costly, batches, **given)
    assert needed(4) < 0.999 * needed(8)
    if not fitting:
        with pytest.raises(DataError, match="not one row fits"):
            asked()
        return
    assert asked() == fitting
    assert max(costly.asked) == fitting


def kept_for_the_backward(module: Denoiser, batch: Batch) -> int:
    """Elements of activations, weights left out."""
    weights = {p.data_ptr() for p in module.parameters()}
    kept = []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(0 if tensor.data_ptr() in weights else tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        diffusion(LINEAR).loss(module, batch)
    return sum(kept)


def test_checkpointed_blocks_keep_less_and_give_the_very_bits():
    batch, gradients = some_batch(2, 4), []
    for is_on in (False, True):
        module = new_denoiser(layers=4)
        prepare(module, TrainConfig(activation_checkpointing=is_on))
        diffusion(LINEAR).loss(module, batch).nats.backward()
        gradients.append([p.grad for p in module.parameters()])
    assert all(torch.equal(*pair) for pair in zip(*gradients, strict=True))
    plain, checkpointed = new_denoiser(layers=4), new_denoiser(layers=4)
    prepare(checkpointed, TrainConfig(activation_checkpointing=True))
    assert kept_for_the_backward(checkpointed, batch) < kept_for_the_backward(plain, batch) / 3


def test_the_optimizer_is_fused_and_decays_matrices_alone():
    optimizer = new_optimizer(new_denoiser(), CONFIG)
    assert optimizer.defaults["fused"] is True
    decays = {group["weight_decay"]: {p.ndim for p in group["params"]} for group in optimizer.param_groups}
    assert decays == {CONFIG.weight_decay: {2}, 0.0: {1}}


def test_a_state_that_was_given_is_gone_on_from_by_both_kernels():
    results = []
    for fused in (True, False):  # ours, and torch's plain one as its reference
        module = new_denoiser()
        optimizer = new_optimizer(module, CONFIG)
        for group in optimizer.param_groups:
            group["fused"] = fused
        for p in module.parameters():
            p.grad = torch.ones_like(p)
            new_state(optimizer, p, 7, {"exp_avg": torch.full_like(p, 0.5), "exp_avg_sq": torch.full_like(p, 2.0)})
        optimizer.step()
        assert {float(state["step"]) for state in optimizer.state.values()} == {8.0}
        results.append(torch.cat([p.detach().flatten() for p in module.parameters()]))
    torch.testing.assert_close(*results, atol=1e-7, rtol=1e-6)


@pytest.mark.parametrize(("device", "variable", "language"), [("cpu", "CXX", r"C\+\+"), ("cuda", "CC", "C")])
def test_without_a_compiler_compiling_is_refused_in_one_line(monkeypatch, device, variable, language):
    monkeypatch.setenv(variable, "no-such-compiler")
    monkeypatch.setattr(Denoiser, "device", torch.device(device))
    problem = rf"^train\.compile: needs a {language} compiler .* no no-such-compiler, got True: install .* {variable},"
    with pytest.raises(ConfigError, match=problem):
        prepare(new_denoiser(), TrainConfig(compile=True))


def test_blocks_alone_are_compiled_once_and_keep_their_names():
    plain, compiled = new_denoiser(), new_denoiser()
    for _ in range(2):
        prepare(compiled, TrainConfig(compile=True))
    calls = [block._compiled_call_impl for block in compiled.blocks]
    assert None not in calls
    prepare(compiled, TrainConfig(compile=True))
    assert calls == [block._compiled_call_impl for block in compiled.blocks]
    assert compiled.head._compiled_call_impl is compiled._compiled_call_impl is None
    assert list(compiled.state_dict()) == list(plain.state_dict())
    prepare(plain, TrainConfig())
    assert all(block._compiled_call_impl is None for block in plain.blocks)


@pytest.mark.long
def test_all_blocks_and_all_numbers_of_read_positions_share_one_compiled_graph():
    from torch._dynamo.utils import counters

    counters.clear()
    compiled, plain = (
        LocalBackend(new_denoiser(layers=4), CONFIG.model_copy(update={"compile": c})) for c in (True, False)
    )
    for seed in range(5):
        for backend in (compiled, plain):
            sums = diffusion(LINEAR).loss(backend.denoiser, some_batch(seed, 4))
            backend.backward(sums.nats / sums.divisor)
            backend.step(1e-3)
    assert counters["stats"]["unique_graphs"] == 1
    assert not counters["graph_break"]
    for name, tensor in plain.shard().items():
        torch.testing.assert_close(compiled.shard()[name], tensor, atol=1e-5, rtol=0)


def test_a_session_measures_and_takes_the_steps_of_a_whole_batch(small_corpus, tmp_path):
    found = []
    for micro_rows in (None, "auto", 2):
        train = small_corpus.recipe.train.model_copy(update={"micro_rows": micro_rows})
        recipe = small_corpus.recipe.model_copy(update={"train": train})
        run = RunDir(LocalStore(small_corpus.store.root), f"{tmp_path.name}-{micro_rows}")
        session = open_session(
            recipe,
            run,
            small_corpus.manifest,
            torch.device("cpu"),
            backend=LocalBackend,
            events_of=lambda step: Silence(),
            on_damage=lambda error: pytest.fail(str(error)),
        )
        assert session.run().step == 6
        newest = CheckpointStore(run).newest(lambda error: pytest.fail(str(error)))
        found.append(torch.cat([t.flatten() for t in load_file(newest.files["model.safetensors"]).values()]))
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], atol=1e-5, rtol=0)
