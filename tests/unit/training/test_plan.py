"""What `dllm plan` says before training: counts are those of the real model, and laws that hold for all sizes."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import small_text
from hypothesis import given, settings
from hypothesis import strategies as st

from dllm_core.data.tokenizer import Tokenizer, TokenizerConfig
from dllm_core.model.config import DenoiserConfig, ModelConfig
from dllm_core.model.denoiser import Denoiser
from dllm_core.model.pattern import FULL, AttentionPattern
from dllm_core.noise.process import AbsorbingNoise, HybridNoise, UniformNoise
from dllm_core.objective.config import DiffusionConfig
from dllm_core.objective.diffusion import Diffusion
from dllm_core.training.config import CHECKPOINT_BYTES, TrainConfig
from dllm_core.training.plan import (
    Forward,
    at_stage,
    best_interval,
    block_bytes,
    device_memory,
    forward_memory,
    lost_share,
    pace,
    saving,
)
from workflows.cli import run_command_line
from workflows.recipe import load_recipe
from workflows.train.dry_run import FakeRows, _alone, _rehearsed, _reset_peak_allocated
from workflows.train.flow import checkpoint_bytes
from workflows.train.plan import denoiser_of, objective_of

QUICKSTART = "workflows/recipes/quickstart.yaml"


def denoiser_config(**sizes: object) -> DenoiserConfig:
    model = ModelConfig(**{"dim": 64, "layers": 3, "heads": 4, "ffn_dim": 176, **sizes})
    return DenoiserConfig(model=model, vocab_size=300, context_length=32, mask_id=0, eos_id=1, pad_id=2)


def kept_by_a_real_forward(config: DenoiserConfig, rows: int, bf16: bool, is_checkpointed: bool) -> int:
    """Bytes that autograd keeps of all blocks, on real tensors."""
    denoiser = Denoiser(config)
    denoiser.checkpoints_blocks = is_checkpointed
    ids = torch.randint(3, config.vocab_size, (rows, config.context_length))
    weights = {p.untyped_storage().data_ptr() for p in denoiser.parameters()}
    found: dict[int, tuple[int, torch.Tensor]] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            found[storage.data_ptr()] = storage.nbytes(), tensor
        return tensor

    read = torch.zeros_like(ids, dtype=torch.bool)
    read[0, 0] = True  # the head as good as left out
    with (
        torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
        torch.autocast("cpu", dtype=torch.bfloat16, enabled=bf16),
    ):
        t = torch.rand(ids.shape) if config.model.time_conditioning else None
        denoiser(ids, torch.ones_like(ids, dtype=torch.bool), read, t=t)
    return sum(size for size, _ in found.values())


@pytest.mark.parametrize("bf16", [False, True], ids=["fp32", "bf16"])
@pytest.mark.parametrize(
    "sizes",
    [
        {},
        {"kv_heads": 2, "qk_norm": False},
        {"layers": 1},
        {"time_conditioning": True},
        {"experts": {"num_experts": 4, "expert_ffn_dim": 32, "num_shared_experts": 1}},
        {"experts": {"num_experts": 16, "expert_ffn_dim": 32, "first_dense_layers": 1, "router": "sigmoid"}},
    ],
    ids=["plain", "grouped", "one", "timed", "experts", "many"],
)
def test_activations_are_what_a_real_forward_keeps(sizes, bf16):
    config = denoiser_config(**sizes)
    real = kept_by_a_real_forward(config, 4, bf16, is_checkpointed=False)
    told, _ = forward_memory(config, FULL, Forward(4, 32, bf16), is_checkpointed=False)
    few = 60_000 if bf16 else 10_000  # ids, rotations, and the head at one position with its copy of weights
    more = 0.02 * real if "time_conditioning" in sizes else 0  # the last norm's share, of which one position is read
    assert -more <= real - told <= few
    assert told > 10 * few


def test_with_checkpointing_the_inputs_of_blocks_are_kept_and_one_block_besides():
    config = denoiser_config(layers=6)
    real = kept_by_a_real_forward(config, 4, False, is_checkpointed=True)
    told, _ = forward_memory(config, FULL, Forward(4, 32, False), is_checkpointed=True)
    one = block_bytes(config, 0, 4, 32, False)
    assert 0 <= real - (told - one) <= 10_000
    whole, _ = forward_memory(config, FULL, Forward(4, 32, False), is_checkpointed=False)
    assert whole == 6 * one


def test_a_clean_half_doubles_what_a_block_keeps():
    config = denoiser_config()
    blocks = AttentionPattern("block_diffusion", 8)
    plain, _ = forward_memory(config, FULL, Forward(4, 32, False), is_checkpointed=False)
    both, _ = forward_memory(config, blocks, Forward(4, 32, False), is_checkpointed=False)
    assert 1.9 * plain < both < 2.6 * plain  # scores grow with the square


sizes_of = st.fixed_dictionaries(
    {"dim": st.sampled_from([32, 64]), "layers": st.integers(1, 4), "tie_embeddings": st.booleans()}
)


@settings(max_examples=10, deadline=None)
@given(sizes=sizes_of, workers=st.sampled_from([1, 2, 8, 512]), offload=st.sampled_from(["none", "optimizer"]))
def test_a_higher_stage_and_more_workers_never_keep_more_of_what_is_cut(sizes, workers, offload):
    config = denoiser_config(**sizes)
    parameters = sum(p.numel() for p in Denoiser(config).parameters())
    assert config.model.num_parameters(config.vocab_size) == parameters
    train = TrainConfig(zero_stage=1, offload=offload)
    forward = Forward(2, 32, False)
    told = [
        device_memory(at_stage(train, stage), config, FULL, forward, stage=stage, workers=workers) for stage in range(4)
    ]
    more = [
        device_memory(at_stage(train, stage), config, FULL, forward, stage=stage, workers=2 * workers)
        for stage in range(4)
    ]
    for stage in range(4):
        assert more[stage].total <= told[stage].total
        assert told[stage].activations == told[0].activations
        assert (told[stage].offloaded > 0) == (offload == "optimizer" and stage > 0)
    assert told[0].weights == told[1].weights == told[2].weights == 4 * parameters
    assert told[0].optimizer == 8 * parameters
    assert told[3].average == 4 * -(-parameters // workers)
    assert told[3].weights == 4 * (-(-parameters // workers) + parameters)  # its part, and all gathered for a forward
    if workers > 2:  # with one, a copy to update costs more than cutting saves
        assert told[1].total < told[0].total


@pytest.mark.parametrize("write", [1.0, 60.0, 1200.0])
@pytest.mark.parametrize("between", [3600.0, 86400.0])
def test_no_other_interval_loses_less(write, between):
    best = best_interval(write, between)
    every = best * np.geomspace(0.2, 5, 400)
    lost = [lost_share(float(one), write, between, 0.0) for one in every]
    assert lost_share(best, write, between, 0.0) <= min(lost) + 1e-4
    assert 0 < min(lost) < 1


def test_a_checkpoint_is_as_large_as_the_trainer_writes_and_time_is_the_mfu_backwards():
    config = denoiser_config()
    parameters = config.model.num_parameters(config.vocab_size)
    saved = saving(config, workers=4, mtbf_hours=1000, bytes_per_second=1e9)
    assert saved.bytes == CHECKPOINT_BYTES * parameters
    assert saved.write_seconds == saved.bytes / 1e9
    train = TrainConfig(batch_rows=8, steps=10)
    timed = pace(train, config, FULL, passes=1, workers=4, device_flops=1e12, mfu=0.5)
    per_token = config.model.flops_per_token(config.vocab_size, 32)
    assert timed.step_flops == 8 * 32 * per_token
    assert timed.seconds == pytest.approx(10 * timed.step_flops / (4 * 1e12 * 0.5))


def planned(capsys, *words: str) -> tuple[int, dict, str]:
    capsys.readouterr()
    code = run_command_line(["plan", QUICKSTART, *words, "--output", "json"])
    out, err = capsys.readouterr()
    return code, json.loads(out.splitlines()[-1]), err


def test_a_hundred_billion_parameters_are_planned_in_no_time(capsys):
    sizes = [
        "model.dim=12288",
        "model.layers=64",
        "model.heads=96",
        "model.ffn_dim=32768",
        "tokenizer.vocab_size=128000",
    ]
    words = ["packing.seq_len=4096", "train.batch_rows=1024", "train.micro_rows=1", "train.precision=bf16"]
    rented = ["--workers", "512", "--device-tflops", "990", "--mfu", "0.4", "--device-memory-gb", "80"]
    code, told, _ = planned(capsys, *sizes, *words, *rented)
    assert code == 0
    assert 100e9 < told["parameters"] < 140e9
    assert told["memory"]["0"]["total"] > 16 * told["parameters"]
    assert told["memory"]["3"]["weights"] < 5e9
    assert told["device_rate"] == "as stated"
    faster = planned(capsys, *sizes, *words, "--workers", "512", "--tokens-per-second", "2000")[1]
    assert faster["tokens_per_s"] == pytest.approx(512 * 2000)
    assert told["checkpoint"]["bytes"] == 16 * told["parameters"]
    assert run_command_line(["plan", QUICKSTART, *sizes, *words, *rented]) == 0
    shown = capsys.readouterr().out
    assert "too much" in shown
    assert "lost to failures" in shown


@pytest.mark.parametrize("mtbf_hours", [50_000, 1])
def test_time_with_failures_is_what_is_left_for_work_of_it(capsys, mtbf_hours):
    words = ["train.seconds=null", "train.steps=300000000", "--workers", "8", "--device-tflops", "1"]
    words += ["--mtbf-hours", str(mtbf_hours), "--storage-gb-per-second", "0.01"]
    told = planned(capsys, *words)[1]
    days, lost = told["seconds"] / 86400, told["checkpoint"]["lost"]
    assert run_command_line(["plan", QUICKSTART, *words]) == 0
    shown = capsys.readouterr().out
    assert f"{days:,.1f} days, {days / (1 - lost):,.1f} days with failures" in shown


@pytest.mark.parametrize(
    ("budget", "steps", "seconds"),
    [
        (["train.steps=6000", "train.seconds=180"], 1758, 1758 * 0.1024),  # 32 x 64 tokens a step
        (["train.steps=1000", "train.seconds=180"], 1000, 102.4),
        (["train.steps=6000", "train.seconds=null"], 6000, 614.4),
        (["train.steps=6000", "train.seconds=0.01"], 1, 0.1024),
    ],
)
def test_a_training_ends_with_its_steps_or_its_seconds_whichever_are_over_first(capsys, budget, steps, seconds):
    words = [*budget, "--workers", "2", "--tokens-per-second", "10000"]
    told = planned(capsys, *words)[1]
    assert (told["steps"], told["tokens"]) == (steps, steps * 2048)
    assert told["seconds"] == pytest.approx(seconds)
    assert run_command_line(["plan", QUICKSTART, *words]) == 0
    assert ("until train.seconds are over" in capsys.readouterr().out) == (steps in (1758, 1))


@pytest.mark.parametrize("mtbf_hours", ["1e-4", "1e-9"])
def test_where_no_save_is_ever_done_it_takes_for_ever(capsys, mtbf_hours):
    words = ["--workers", "8", "--device-tflops", "1", "--storage-gb-per-second", "0.01", "--mtbf-hours", mtbf_hours]
    assert planned(capsys, *words)[1]["checkpoint"]["lost"] == 1
    assert run_command_line(["plan", QUICKSTART, *words]) == 0
    assert "never with failures" in capsys.readouterr().out


def test_logits_are_counted_where_the_objective_asks_for_them(capsys):
    words = ["--device-tflops", "1", "noise.block_length=null"]
    logits = {
        kind: planned(capsys, *words, f"objective={{type: {kind}}}")[1]["memory"]["0"]["logits"]
        for kind in ("diffusion", "autoregressive", "masked_lm")
    }
    noisy = planned(capsys, *words, "objective={type: diffusion}", "noise.process.type=uniform")[1]
    weights = 2 * 1024 * 128  # autocast's copy of the head's
    assert noisy["memory"]["0"]["logits"] == logits["autoregressive"]
    assert logits["autoregressive"] - weights == pytest.approx(2 * (logits["diffusion"] - weights), rel=0.01)
    assert logits["masked_lm"] < logits["diffusion"]
    assert noisy["precision"] == "bfloat16"  # another machine is meant


def test_a_given_tokenizer_has_as_many_rows_as_it_has_ids(capsys, tmp_path):
    trained = Tokenizer.train([small_text()], TokenizerConfig(vocab_size=700))
    given = tmp_path / "tokenizer.json"
    given.write_text(trained.json_text, encoding="utf-8")
    words = ["--device-tflops", "1", "model.tie_embeddings=false"]
    said, found = (
        planned(capsys, *words, *section)[1]
        for section in ([f"tokenizer.vocab_size={trained.vocab_size}"], [f"tokenizer={{path: {given}}}"])
    )
    assert found == said
    recipe = load_recipe(Path(QUICKSTART), [f"tokenizer={{path: {given}}}"])
    assert checkpoint_bytes(recipe) == 3 * CHECKPOINT_BYTES * recipe.model.num_parameters(trained.vocab_size)
    given.unlink()  # what was made with it holds a copy, and goes on; a plan has none
    assert checkpoint_bytes(recipe) > 0
    code, _, err = planned(capsys, *words, f"tokenizer={{path: {given}}}")
    assert (code, err.count("\n"), "tokenizer.path: cannot be read" in err) == (3, 1, True)


@pytest.mark.parametrize("rows", [8, None])
def test_a_mask_and_its_complement_are_held_together(capsys, rows):
    words = ["--device-tflops", "1", "train.precision=fp32", f"train.micro_rows={'null' if rows is None else rows}"]
    plain, both = (
        planned(capsys, *words, f"objective.complementary={asked}")[1]["memory"]["2"] for asked in ("false", "true")
    )
    assert {name: both[name] / plain[name] for name in ("activations", "logits", "weights")} == {
        "activations": 2,
        "logits": 2,
        "weights": 1,
    }


def test_a_warm_up_in_blocks_takes_their_memory_and_no_time(capsys):
    """[xt ; x0] is twice as long as the rows that come after."""
    rows, warm, blocks = (
        planned(capsys, "--device-tflops", "1", *words)[1]
        for words in (
            (),
            ("objective.block_warmup=[{block_length: 64, steps: 2}, {block_length: 4, steps: 2}]",),
            ("objective={type: block_diffusion}", "noise.block_length=4"),
        )
    )
    assert warm["memory"] == blocks["memory"]
    assert warm["memory"]["2"]["activations"] > 1.9 * rows["memory"]["2"]["activations"]
    assert warm["step_seconds"] == rows["step_seconds"]


@pytest.mark.parametrize(
    ("words", "passes"),
    [
        ([], [FULL] * 4),
        (["objective.block_warmup=[{block_length: 64, steps: 9}]"], [FULL] * 4),
        (
            ["objective.block_warmup=[{block_length: 64, steps: 9}, {block_length: 4, steps: 9}]"],
            [AttentionPattern("block_diffusion", 4)] * 2 + [FULL] * 2,
        ),
        (
            [
                "objective={type: block_diffusion, block_warmup: [{block_length: 64, steps: 9}]}",
                "noise.block_length=8",
            ],
            [AttentionPattern("block_diffusion", 8)] * 4,
        ),
    ],
)
def test_a_dry_run_measures_the_memory_of_a_warm_up_and_the_time_of_what_comes_after(words, passes):
    recipe = load_recipe(Path(QUICKSTART), words)
    model, asked = denoiser_of(recipe), []
    objective = objective_of(_rehearsed(recipe), model, torch.device("cpu"), 4)
    rows = FakeRows(recipe.noise.process.bind(0, 1024), 1024, 64, recipe.noise.block_length)

    def noted(ids, *, read, pattern, **more):
        asked.append(pattern)
        assert ids.shape[1] == 64 * (2 if pattern.has_clean_half else 1)
        return torch.zeros(int(read.sum()), 1024)

    for step in range(4):
        objective.loss(noted, rows.batch(4 * step, 4))
    assert asked == passes


def test_a_forward_is_no_larger_than_a_worker_s_share(capsys):
    assert planned(capsys, "train.micro_rows=16", "--workers", "8")[1]["rows_of_a_forward"] == 4


@pytest.mark.parametrize("kind", [AbsorbingNoise(), UniformNoise(), HybridNoise()], ids=lambda kind: kind.type)
@pytest.mark.parametrize("steps", [1, 4, 1000])
def test_made_up_rows_of_a_chain_stand_at_its_times_and_have_a_loss(kind, steps):
    process, denoiser = kind.bind(0, 300), Denoiser(denoiser_config())
    batch = FakeRows(process, 300, 32, None, steps).batch(0, 16)
    assert batch.t.min() > 0
    assert np.allclose(batch.t * steps, np.round(batch.t * steps), rtol=1e-6)
    objective = Diffusion(DiffusionConfig(), process, torch.device("cpu"), steps=steps)
    assert objective.loss(denoiser, batch).nats.isfinite()


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["--workers", "0"], "--workers: must be above 0, got 0"),
        (["--workers", "5"], "--workers: must divide train.batch_rows=32, got 5"),
        (["--mfu", "2"], "--mfu: is a share of the device's rate, at most 1, got 2.0"),
        (["--device-tflops", "nan"], "--device-tflops: must be above 0"),
        (["train.zero_stage=9"], "train.zero_stage: must be less than or equal to 3"),
    ],
)
def test_a_mistake_is_one_line(capsys, words, line):
    code, told, err = planned(capsys, *words)
    assert (code, err.startswith(f"dllm: {line}"), err.count("\n")) == (2, True, 1), err
    assert told["exit_code"] == 2


def test_a_dry_run_on_a_gpu_counts_what_is_allocated_from_then_on_and_has_its_workers_backend(monkeypatch):
    memory, asked = {"now": 5, "peak": 800}, []
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: memory["now"])
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: memory.update(peak=memory["now"]))
    assert _reset_peak_allocated(torch.device("cuda", 0)) == memory["peak"] == 5
    monkeypatch.setattr(torch.distributed, "init_process_group", lambda backend, **options: asked.append(backend))
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR"):  # which it sets for good
        monkeypatch.setenv(name, "0")
    monkeypatch.setattr(torch.distributed, "destroy_process_group", lambda: None)
    with _alone("nccl"):
        assert asked == ["nccl"]
