"""An autoregressive model becomes one of diffusion without forgetting: shifted logits, growing blocks, noisy masks."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from starts import Prepared, imported_qwen, module_of, texts, values_of

from dllm_core.checkpoints.bundle import read_bundle
from dllm_core.checkpoints.run_dir import JsonLines, RunDir
from dllm_core.checkpoints.store import CheckpointStore
from dllm_core.data.batch import Batch
from dllm_core.errors import ConfigError
from dllm_core.model.foreign import read_foreign
from dllm_core.model.pattern import CAUSAL
from dllm_core.model.pretrained import weights_of
from dllm_core.noise.absorbing import AbsorbingProcess
from dllm_core.objective.config import BlockDiffusionConfig
from dllm_core.objective.diffusion import Diffusion
from dllm_core.training.mask_noise import MaskNoise, row_noise
from dllm_core.training.start import MaskNoiseConfig
from workflows.console import Console
from workflows.recipe import resolved
from workflows.train.session import METRICS
from workflows.transfer.flow import export_checkpoint, import_checkpoint

QUIET, CPU = Console("json"), torch.device("cpu")
WARMUP = [{"block_length": 1, "steps": 2}, {"block_length": 4, "steps": 2}, {"block_length": 32, "steps": 1}]


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("conversion")


@pytest.fixture(scope="module")
def qwen(root) -> RunDir:
    return imported_qwen(root)


def converted(root: Path, run: RunDir, **sections: object) -> Prepared:
    start = {"run": run.url, "mask_noise": {"std": 0.5, "steps": 3}}
    given = {"start": start, "objective": {"block_warmup": WARMUP}, "train": {"steps": 8, "checkpoint_every": 1}}
    return Prepared(values_of(root, texts(root / "text"), **{**given, **sections}))


def test_in_blocks_of_one_mask_a_converted_model_pays_what_the_autoregressive_one_did(root, qwen):
    denoiser = module_of(converted(root, qwen, name="law")).eval()
    assert denoiser.config.model.shifted
    before = read_foreign(root / "qwen", mask_id="new").float()  # as it was imported: in bf16
    mask_id = before.config.mask_id
    x0 = torch.randint(3, 290, (3, 20), generator=torch.Generator().manual_seed(0))
    process = AbsorbingProcess(mask_id=mask_id)
    objective = Diffusion(BlockDiffusionConfig(), process, CPU, block_length=1)
    ones = {"loss_mask": np.ones(x0.shape, bool), "counters": np.arange(3)}
    noised = Batch(x0=x0.numpy(), xt=np.full(x0.shape, mask_id), t=np.ones(x0.shape, np.float32), **ones)
    with torch.inference_mode():
        told = before(x0, pattern=CAUSAL)[:, :-1]  # of token i + 1, after the tokens up to i
        first = before(torch.full((1, 1), mask_id), pattern=CAUSAL)  # nothing but a mask stands before the first
        logits = torch.cat([first.expand(3, -1, -1), told], dim=1)
        logits[..., mask_id] = -torch.inf
        wanted = -logits.double().log_softmax(-1).gather(-1, x0[..., None]).sum()
        loss = objective.loss(denoiser, noised)
    assert float(loss.nats) == pytest.approx(float(wanted), rel=1e-6)
    assert float(loss.bound_nats) == pytest.approx(float(wanted), rel=1e-6)
    unshifted = module_of(converted(root, qwen, name="law", model={"shifted": False})).eval()
    with torch.inference_mode():
        assert abs(float(objective.loss(unshifted, noised).nats) - float(wanted)) > 1


def test_a_conversion_is_shifted_unless_it_is_said_not_to_be_and_nothing_else_is(root, qwen):
    def shifted(run: RunDir, **sections: object) -> bool:
        return resolved(values_of(root, texts(root / "text"), start={"run": run.url}, **sections)).model.shifted

    model = {"tokenizer": {"vocab_size": 300}, "model": {"dim": 32, "layers": 2, "heads": 2, "ffn_dim": 64}}
    autoregressive = {"objective": {"type": "autoregressive"}}
    own = Prepared(values_of(root, texts(root / "text"), **model, **autoregressive, name="own")).trained(steps=1)
    for run in (own, qwen):
        assert shifted(run)
        assert shifted(run, objective={"type": "block_diffusion"}, noise={"block_length": 4})
        assert not shifted(run, model={"shifted": False})
    assert not shifted(own, **autoregressive)
    plain = Prepared(values_of(root, texts(root / "text"), **model, name="plain")).trained(steps=1)
    assert not shifted(plain)
    with pytest.raises(ConfigError, match=r"model\.shifted: is False in the run that it starts from"):
        shifted(plain, model={"shifted": True})


@pytest.mark.usefixtures("one_thread")
def test_a_conversion_killed_at_any_step_ends_with_the_same_bits_and_micro_batches_with_the_same_losses(root, qwen):
    def losses(prepared: Prepared) -> list[float]:
        return [record["loss"] for record in JsonLines(prepared.run, METRICS).read()]

    def newest(prepared: Prepared) -> dict[str, torch.Tensor]:
        files = CheckpointStore(prepared.run).at(8).files
        return {f"{name}/{key}": t for name, path in files.items() for key, t in load_file(path).items()}

    whole = converted(root, qwen, name="whole")
    whole.session().run()
    wanted = newest(whole)
    stopped = converted(root, qwen, name="stopped")
    for step in range(1, 9):
        assert stopped.session(stops=True).run().step == step
    found = newest(stopped)
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in wanted.items())
    assert losses(stopped) == losses(whole)
    cut = converted(root, qwen, name="cut")
    cut.session(micro_rows=1).run()
    assert losses(cut) == pytest.approx(losses(whole), rel=1e-5)
    checkpointed = converted(root, qwen, name="checkpointed")
    checkpointed.session(activation_checkpointing=True).run()
    assert losses(checkpointed) == pytest.approx(losses(whole), rel=1e-5)


class Read:
    """What the blocks of a denoiser were given, call by call."""

    def __init__(self, module) -> None:
        self.embedded: list[torch.Tensor] = []
        module.blocks[0].register_forward_pre_hook(lambda block, given: self.embedded.append(given[0].detach().clone()))


class Nothing:
    """An objective that asks the denoiser for [xt] and [xt ; x0]."""

    pattern, passes = Diffusion(BlockDiffusionConfig(), AbsorbingProcess(mask_id=0), CPU, block_length=4).pattern, 1

    def loss(self, denoiser, batch: Batch):
        xt, x0 = torch.from_numpy(batch.xt), torch.from_numpy(batch.x0)
        denoiser(xt)
        return denoiser(torch.cat([xt, x0], dim=1), pattern=self.pattern)

    def divisor(self, batch: Batch) -> float:
        return 1.0


def test_mask_noise_is_at_masks_alone_falls_to_nothing_and_knows_no_company(root, qwen):
    module = module_of(converted(root, qwen, name="noise", start={"run": qwen.url}))
    mask_id, rows, read = module.config.mask_id, 4, Read(module)
    objective = MaskNoise(Nothing(), module, MaskNoiseConfig(std=0.5, steps=4), seed=3, batch_rows=rows)
    drawn = np.random.default_rng(0)
    x0 = drawn.integers(3, 290, (rows, 16))
    xt = np.where(drawn.random(x0.shape) < 0.5, mask_id, x0)
    plain = module.embed(torch.from_numpy(xt)).detach()
    spread = []
    for step in range(6):
        counters = np.arange(step * rows, (step + 1) * rows)
        ones = {"t": np.ones(x0.shape, np.float32), "loss_mask": np.ones(x0.shape, bool)}
        batch = Batch(x0=x0, xt=xt, counters=counters, **ones)
        read.embedded.clear()
        objective.loss(module, batch)
        alone, both = read.embedded
        noise = alone - plain
        assert torch.equal(both[:, :16], alone)
        assert torch.equal(both[:, 16:], module.embed(torch.from_numpy(x0)))
        assert not noise[torch.from_numpy(xt != mask_id)].any()
        spread.append(float(noise[torch.from_numpy(xt == mask_id)].std()))
        parts = []
        for part in batch.parts(1):
            read.embedded.clear()
            objective.loss(module, part)
            parts.append(read.embedded[0])
        assert torch.equal(torch.cat(parts), alone)
        read.embedded.clear()
        module(torch.from_numpy(xt))
        assert torch.equal(read.embedded[0], plain)  # whoever else asks meets no noise
    assert spread[:4] == pytest.approx([0.5, 0.375, 0.25, 0.125], rel=0.1)
    assert spread[4:] == [0, 0]


def test_noise_is_of_what_the_first_block_reads_and_every_row_has_its_own(root, qwen):
    first, again = row_noise(3, np.array([5, 6]), 8, 32, CPU), row_noise(3, np.array([6]), 8, 32, CPU)
    assert torch.equal(first[1:], again)
    assert not torch.equal(first[0], first[1])
    assert not torch.equal(first[0, 0], first[0, 1])
    assert not torch.equal(row_noise(4, np.array([6]), 8, 32, CPU), again)
    sizes = {"dim": 32, "layers": 1, "heads": 2, "ffn_dim": 64}
    tied = Prepared(values_of(root, texts(root / "text"), model=sizes, tokenizer={"vocab_size": 300}, name="tied"))
    module = module_of(tied)
    assert module.config.model.tie_embeddings
    read = Read(module)
    objective = MaskNoise(Nothing(), module, MaskNoiseConfig(std=0.5, steps=4), seed=3, batch_rows=4)
    masks = np.full((4, 16), module.config.mask_id)
    ones = {"t": np.ones(masks.shape, np.float32), "loss_mask": np.ones(masks.shape, bool), "counters": np.arange(4)}
    objective.loss(module, Batch(x0=masks, xt=masks, **ones))
    plain = module.embed(torch.from_numpy(masks)).detach() * 32**0.5
    assert float((read.embedded[0] - plain).std()) == pytest.approx(0.5, rel=0.1)


@pytest.mark.parametrize(
    ("sections", "problem"),
    [
        (
            {"objective": {"type": "autoregressive"}},
            r"start\.mask_noise: is for .* this is autoregressive",
        ),
        ({"noise": {"process": {"type": "uniform"}}}, r"start\.mask_noise: .*process\.type=uniform shows no masks"),
        ({"start": {"mask_noise": {"std": 0}}}, r"start\.mask_noise\.std: must be greater than 0"),
    ],
)
def test_mask_noise_without_masks_is_refused(root, qwen, sections, problem):
    start = {"run": qwen.url, "mask_noise": {"std": 1.0, "steps": 5}, **sections.pop("start", {})}
    with pytest.raises(ConfigError, match=problem):
        resolved(values_of(root, texts(root / "text"), start=start, **sections))


def test_a_qwen2_that_became_diffusion_goes_out_as_dream_and_comes_back(root, qwen):
    words = ["mask_id=302", f"storage.root={root / 'storage'}"]  # an id that config.json does not know
    spare = RunDir.at(import_checkpoint(str(root / "qwen"), "spare", words, QUIET)["run"])
    run, out = converted(root, spare, name="dream").trained(), root / "dream"
    assert export_checkpoint(run.url, str(out), QUIET)["family"] == "dream"
    told = json.loads((out / "config.json").read_text())
    mask_id = read_bundle(run).config.mask_id
    assert (told["model_type"], told["architectures"], told["mask_token_id"]) == ("Dream", ["DreamModel"], mask_id)
    words = [f"storage.root={root / 'storage'}"]
    back = read_bundle(RunDir.at(import_checkpoint(str(out), "back", words, QUIET)["run"]))
    assert back.manifest.objective.type == "diffusion"
    assert back.config.model == read_bundle(run).config.model
    ours, ids = read_bundle(run).denoiser(), torch.arange(20)[None]
    ours.load_state_dict({name: t.bfloat16().float() for name, t in weights_of(ours).items()}, strict=False)
    theirs = back.denoiser().float()
    with torch.inference_mode():
        assert torch.equal(theirs(ids), ours(ids))


def test_what_no_public_format_holds_is_refused_at_the_export(root, qwen):
    blocks = {"objective": {"type": "block_diffusion"}, "noise": {"block_length": 4}}
    with pytest.raises(ConfigError, match=r"no public format holds such a model"):
        export_checkpoint(converted(root, qwen, name="blocks", **blocks).trained().url, str(root / "blocks"), QUIET)
