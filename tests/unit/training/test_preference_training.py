"""A small model learns to prefer, from its own start, the same after a restart, and is then what its start was."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import in_long
from preferences import preferences, write_lines
from safetensors.torch import load_file
from starts import Prepared, texts, values_of

from dllm_core.checkpoints.bundle import read_bundle
from dllm_core.checkpoints.run_dir import JsonLines, RunDir
from dllm_core.checkpoints.store import CheckpointStore
from dllm_core.data.batch import Batch
from dllm_core.data.loader import all_rows
from dllm_core.errors import ConfigError
from dllm_core.model.denoiser import Denoiser
from dllm_core.model.pattern import training_pattern
from dllm_core.objective.config import BlockDiffusionConfig, DiffusionConfig, PreferenceConfig
from dllm_core.objective.preference import Margins, Preference
from workflows.console import Console
from workflows.evaluate.flow import evaluate
from workflows.fan_out import serially
from workflows.generate.asked import Asked
from workflows.generate.flow import Generator
from workflows.pipeline.flow import _about_training
from workflows.recipe import resolved
from workflows.train.flow import _check_checkpoint
from workflows.train.session import METRICS

CPU = torch.device("cpu")
SIZES = {"tokenizer": {"vocab_size": 300}, "model": {"dim": 32, "layers": 2, "heads": 2, "ffn_dim": 64}}
ROWS = {"batch_rows": 16, "checkpoint_every": 30, "log_every": 10}
KINDS = {"rows": None, "blocks": 4}


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("preferences")


def answers(root: Path) -> dict[str, Any]:
    """Either colour of a pair, as often: what a model has read before it is told which is better."""
    rng = np.random.default_rng(1)
    pairs = preferences(seed=1)
    write_lines(
        root / "answers", [{"prompt": p["prompt"], "answer": p[rng.choice(["chosen", "rejected"])]} for p in pairs]
    )
    return {"type": "jsonl", "path": str(root / "answers"), "record": {"type": "pair"}, "heldout_fraction": 0.1}


def compared(root: Path) -> dict[str, Any]:
    write_lines(root / "pairs", preferences())
    return {"type": "jsonl", "path": str(root / "pairs"), "record": {"type": "preference"}, "heldout_fraction": 0.1}


@pytest.fixture(scope="module")
def started(root):
    """A trained run of a kind, made once."""
    known: dict[str, RunDir] = {}

    def of(kind: str) -> RunDir:
        if kind not in known:
            sections = {**SIZES, "noise": {"block_length": KINDS[kind]}, "packing": {"type": "padded", "seq_len": 48}}
            sections["objective"] = {"type": "diffusion" if KINDS[kind] is None else "block_diffusion"}
            train = {**ROWS, "steps": 240, "learning_rate": 3e-3, "warmup_steps": 10, "checkpoint_every": 240}
            known[kind] = Prepared(
                values_of(root, answers(root), **sections, train=train, name=f"read-{kind}")
            ).trained()
        return known[kind]

    return of


def tuned_values(root: Path, run: RunDir, kind: str, **train: Any) -> dict[str, Any]:
    return values_of(
        root,
        compared(root),
        name=f"tuned-{kind}",
        start={"run": run.url},
        packing={"type": "pairs", "seq_len": 48},
        noise={"block_length": KINDS[kind], "epochs": 0},
        objective={"type": "preference", "beta": 0.5},
        train={**ROWS, "steps": 60, "learning_rate": 3e-4, "warmup_steps": 5, "heldout_every": 20, **train},
    )


def heldout(prepared: Prepared) -> Batch:
    split = prepared.manifest.heldout
    rows = all_rows(prepared.run.store, prepared.manifest, split, np.arange(split.rows))
    return Batch(
        x0=rows.x0,
        xt=rows.x0,
        t=np.ones(rows.x0.shape, np.float32),
        loss_mask=rows.is_learned,
        counters=np.arange(len(rows.x0)),
        segment_ids=rows.segment_ids,
        is_real=rows.is_real,
    )


def judged(policy: RunDir, reference: RunDir, prepared: Prepared, kind: str) -> Margins:
    """Of held-out pairs, by 64 draws that no training saw."""
    bundle = read_bundle(policy)
    config, mask_id = PreferenceConfig(draws=64), bundle.config.mask_id
    judge = Preference(config, read_bundle(reference).denoiser("cpu"), mask_id, CPU, seed=99, block_length=KINDS[kind])
    with torch.no_grad():
        return judge.margins(bundle.denoiser("cpu"), heldout(prepared))


@pytest.mark.parametrize("kind", ["rows", pytest.param("blocks", marks=pytest.mark.long)])
def test_a_model_learns_to_prefer_and_forgets_little(root, started, kind):
    run = started(kind)
    prepared = Prepared(tuned_values(root, run, kind))
    tuned = prepared.trained()
    before, after = (judged(policy, run, prepared, kind) for policy in (run, tuned))
    batch = heldout(prepared)
    tokens = int((batch.loss_mask & (batch.segment_ids == 1)).sum())
    accuracy, margin = float((after.gain > 0).float().mean()), float(after.gain.mean())
    chosen = [float(one.chosen_nats.sum()) / tokens for one in (before, after)]
    print(f"{kind}: {len(after.gain)} held-out pairs, reward accuracy {accuracy:.3f}, margin {margin:.3f} nats,")
    print(f"    NELBO of the chosen answers {chosen[0]:.3f} before, {chosen[1]:.3f} after, nats a token")
    assert before.gain.abs().max() < 1e-5
    assert accuracy > 0.9
    assert margin > 0.5
    assert chosen[1] < chosen[0] + 0.4
    records = JsonLines(prepared.run, METRICS).read()
    assert records[0]["loss"] == pytest.approx(np.log(2), abs=0.05)
    assert records[-1]["loss"] < records[0]["loss"] - 0.1
    told = [record["preference"] for record in records]
    assert told[-1]["accuracy"] > max(0.9, told[0]["accuracy"])
    for record, one in zip(records, told, strict=True):  # -log sigmoid is convex: Jensen's inequality
        assert record["loss"] >= np.log1p(np.exp(-one["margin"])) - 1e-5
    assert records[-1]["heldout"]["nats"] == pytest.approx(chosen[1], abs=0.3)  # of chosen answers, as they are scored
    assert _about_training({**records[-1], "step": 60}, prepared.recipe).endswith("a pair")


@pytest.mark.long
def test_a_share_of_the_chosen_answers_own_nats_keeps_them_likely(root, started):
    run, chosen = started("rows"), []
    for weight in (0.0, 0.5):
        values = tuned_values(root, run, "rows", learning_rate=1e-3, heldout_every=None)
        values |= {"name": "held", "objective": {**values["objective"], "sft_weight": weight}}
        prepared = Prepared(values)
        after = judged(prepared.trained(), run, prepared, "rows")
        assert float((after.gain > 0).float().mean()) > 0.9
        chosen.append(float(after.chosen_nats.mean()))
    assert chosen[1] < chosen[0] - 0.2


def test_restarts_change_nothing_and_micro_batches_only_rounding(root, started):
    run = started("rows")
    steps = {"steps": 12, "checkpoint_every": 4, "heldout_every": None, "final_lr_fraction": 1.0}
    values = tuned_values(root, run, "rows", **steps)

    def weights_after(name: str, *sessions: dict[str, Any]) -> dict[str, torch.Tensor]:
        prepared = Prepared({**values, "name": name})
        for train in sessions:
            prepared.session(**train).run()
        return load_file(CheckpointStore(prepared.run).at(12).files["model.safetensors"])

    whole = weights_after("whole", {})
    parts = weights_after("parts", {"steps": 4}, {"steps": 8}, {})
    assert all(torch.equal(tensor, whole[name]) for name, tensor in parts.items())
    start = load_file(read_bundle(run).folder / "model.safetensors")
    for name, tensor in weights_after("cut", {"micro_rows": 4}).items():
        moved = float((whole[name] - start[name]).abs().max())
        torch.testing.assert_close(tensor, whole[name], rtol=0, atol=1e-2 * moved)


@pytest.mark.parametrize("kind", ["rows", *in_long("blocks")])
def test_what_was_tuned_is_scored_decoded_and_measured_as_its_start(root, started, kind):
    run = started(kind)
    prepared = Prepared({**tuned_values(root, run, kind, steps=2, checkpoint_every=2), "name": "served"})
    tuned = prepared.trained()
    said, before = read_bundle(tuned).manifest, read_bundle(run).manifest
    assert said.objective == (DiffusionConfig() if kind == "rows" else BlockDiffusionConfig())
    assert (said.objective.type, said.block_length, said.process) == (
        before.objective.type,
        before.block_length,
        before.process,
    )
    figures = evaluate(prepared.recipe, tuned, serially, lambda *told: None)
    batch = heldout(prepared)
    of_chosen = batch.loss_mask & (batch.segment_ids == 1)
    assert figures["estimator"] == "exact-count"
    assert figures["conventions"] == {"tokens": "learned", "end_tokens": "counted", "conditioned_on": "prompts"}
    assert 0 < figures["tokens"] <= of_chosen.sum()
    assert figures["decoding"]["tokens_per_call"] > 0
    assert Generator(prepared.recipe, tuned, Console("json")).one(Asked(prompt="CIRCLE 3: "), None)["num_tokens"] > 0


def test_only_diffusions_of_masks_are_tuned_and_in_their_own_blocks(root, started):
    values = tuned_values(root, started("rows"), "blocks")
    with pytest.raises(
        ConfigError, match=r"^noise\.block_length: must be null, as in the run .*noise\.block_length=null"
    ):
        resolved(values)
    with pytest.raises(ConfigError, match=r"^noise\.block_length: must be 4, as in the run"):
        resolved(tuned_values(root, started("blocks"), "rows"))
    plain = {**SIZES, "objective": {"type": "autoregressive"}, "packing": {"seq_len": 48}, "name": "causal"}
    causal = Prepared(values_of(root, texts(root / "text"), **plain, train={"steps": 2})).trained()
    with pytest.raises(ConfigError, match=r"^objective\.type: tunes diffusions of masks, and .* is autoregressive"):
        resolved(tuned_values(root, causal, "rows"))


def test_a_resume_without_the_start_is_refused_before_workers_start(root, started, tmp_path):
    copy = tmp_path / "storage" / "runs" / started("rows").name
    shutil.copytree(started("rows").store.root / "runs" / copy.name, copy)
    prepared = Prepared(
        {**tuned_values(root, RunDir.at(str(copy)), "rows", steps=4, checkpoint_every=2), "name": "gone"}
    )
    prepared.session(steps=2).run()
    _check_checkpoint(prepared.recipe, prepared.run, prepared.corpus)
    shutil.rmtree(copy)
    with pytest.raises(ConfigError, match=r"^start\.run: no run to start from"):
        _check_checkpoint(prepared.recipe, prepared.run, prepared.corpus)


@pytest.mark.parametrize("kind", KINDS)
def test_the_reference_is_the_start_whatever_was_learned_since(root, started, kind):
    prepared = Prepared({**tuned_values(root, started(kind), kind, steps=4, checkpoint_every=2), "name": "kept"})
    prepared.session(steps=2).run()
    seen: list[Denoiser] = []
    trainer = prepared.session(seen.append)
    reference = trainer._objective._reference
    assert trainer._objective.pattern == training_pattern(KINDS[kind])
    stored = load_file(read_bundle(started(kind)).folder / "model.safetensors")
    assert all(torch.equal(p, stored[name]) for name, p in reference.named_parameters())
    assert not any(p.requires_grad for p in reference.parameters())
    assert any(not torch.equal(p, stored[name]) for name, p in seen[0].named_parameters())
