"""LoRA: adapters alone train and are kept, what they stand beside never changes, and the bundle is the two in one."""

import importlib.util
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from starts import Prepared, chats, imported_qwen, module_of, texts, values_of

from dllm_core.checkpoints.bundle import read_bundle
from dllm_core.checkpoints.run_dir import RunDir
from dllm_core.checkpoints.store import CheckpointStore
from dllm_core.errors import CheckpointError, ConfigError
from dllm_core.model.config import DenoiserConfig, ModelConfig
from dllm_core.model.denoiser import Denoiser
from dllm_core.model.pattern import CAUSAL, FULL
from dllm_core.training.backend import trained_weights
from dllm_core.training.lora import adapt, assign_adapters, merged
from dllm_core.training.start import LoraConfig
from workflows.console import Console
from workflows.recipe import resolved
from workflows.train.flow import checkpoint_bytes
from workflows.transfer.flow import export_checkpoint

QUIET = Console("json")
LORA = {"rank": 3, "alpha": 6}


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("adapters")


@pytest.fixture(scope="module")
def qwen(root) -> RunDir:
    return imported_qwen(root)


def adapted(root: Path, run: RunDir, name: str, **sections: object) -> Prepared:
    lora = {**LORA, **sections.pop("lora", {})}
    train = {"steps": 6, "checkpoint_every": 1, "learning_rate": 1e-2, "ema_decay": 0.5}
    given = {"objective": {"type": "autoregressive"}, "train": train, "name": name, **sections}
    return Prepared(values_of(root, texts(root / "text"), start={"run": run.url, "lora": lora}, **given))


def frozen_of(module: Denoiser) -> dict[str, torch.Tensor]:
    frozen = {name: p for name, p in module.named_parameters() if not p.requires_grad}
    return {name.replace(".base_layer", ""): p.detach().clone() for name, p in frozen.items()}


def tiny(**kind: object) -> Denoiser:
    model = ModelConfig(**{"dim": 16, "layers": 2, "heads": 2, "ffn_dim": 24, **kind})
    return Denoiser(DenoiserConfig(model=model, vocab_size=9, context_length=8, mask_id=0, eos_id=1, pad_id=2))


def test_at_first_adapters_change_no_bit_and_then_they_alone_change(root, qwen):
    prepared, bundle, ids = adapted(root, qwen, "first"), read_bundle(qwen), torch.arange(20)[None]
    module, base = module_of(prepared), bundle.denoiser().float()
    for pattern in (CAUSAL, FULL):
        with torch.no_grad():
            assert torch.equal(module(ids, pattern=pattern), base(ids, pattern=pattern))
    before = frozen_of(module)
    assert before.keys() == dict(base.named_parameters()).keys()
    first = {name: t.clone() for name, t in trained_weights(module).items()}
    seen = list[Denoiser]()
    prepared.session(seen.append).run()
    after = frozen_of(seen[0])
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    assert not any(torch.equal(tensor, first[name]) for name, tensor in trained_weights(seen[0]).items())


def test_a_checkpoint_holds_the_adapters_and_their_bytes_and_nothing_else(root, qwen):
    prepared = adapted(root, qwen, "bytes")
    prepared.session().run()
    recipe, files = prepared.recipe, CheckpointStore(prepared.run).at(6).files
    expected = {name: t.shape for name, t in trained_weights(module_of(prepared)).items()}
    number = recipe.start.lora.num_parameters(recipe.model)
    for name, size in (("model", 4), ("ema", 4), ("optimizer", 8)):
        tensors = load_file(files[f"{name}.safetensors"])
        assert {key.removeprefix("exp_avg.").removeprefix("exp_avg_sq.") for key in tensors} == expected.keys()
        assert sum(tensor.nbytes for tensor in tensors.values()) == size * number
    assert all(".lora_" in name for name in expected)
    assert checkpoint_bytes(recipe) == 16 * number * (recipe.train.keep_checkpoints + 1)
    assert number < recipe.model.num_parameters(recipe.tokenizer.vocab_size) / 5


@pytest.mark.parametrize(
    "kind",
    [
        {},
        {"heads": 4, "kv_heads": 2, "head_width": 6, "qkv_bias": True},
        {"experts": {"num_experts": 4, "expert_ffn_dim": 12, "first_dense_layers": 1}},
        {"experts": {"num_experts": 4, "expert_ffn_dim": 12, "num_shared_experts": 2}},
        {"time_conditioning": True},
    ],
)
@pytest.mark.parametrize("targets", [("qkv", "out", "gate_up", "down"), ("qkv",), ("down", "out")])
def test_the_number_of_weights_is_known_beforehand(kind, targets):
    module, config = tiny(**kind), LoraConfig(rank=2, targets=targets)
    adapt(module, config)
    trained = trained_weights(module)
    assert sum(tensor.numel() for tensor in trained.values()) == config.num_parameters(module.config.model)
    assert all(".lora_" in name for name in trained)


def test_the_bundle_is_the_merged_model_and_needs_no_adapters(root, qwen):
    prepared = adapted(root, qwen, "merged")
    run, ids = prepared.trained(), torch.arange(20)[None]
    bundle, module = read_bundle(run), module_of(prepared)
    assign_adapters(module, load_file(CheckpointStore(run).at(6).files["ema.safetensors"]), "ema")
    base = read_bundle(qwen).denoiser().float()
    with torch.no_grad():
        told, adapters = bundle.denoiser()(ids, pattern=CAUSAL), module(ids, pattern=CAUSAL)
        assert float((adapters - base(ids, pattern=CAUSAL)).abs().max()) > 1e-2
        torch.testing.assert_close(told, adapters, atol=1e-5, rtol=0)
    stored = load_file(bundle.folder / "model.safetensors")
    assert stored.keys() == load_file(read_bundle(qwen).folder / "model.safetensors").keys()
    assert torch.equal(stored["embed.weight"], base.embed.weight)
    assert export_checkpoint(run.url, str(root / "out"), QUIET)["family"] == "qwen2"


@pytest.mark.usefixtures("one_thread")
def test_a_training_of_adapters_that_is_killed_at_any_step_ends_with_the_same_bits(root, qwen):
    sections = {"objective": {"block_warmup": [{"block_length": 4, "steps": 3}]}}  # and it is a conversion

    def newest(prepared: Prepared) -> dict[str, torch.Tensor]:
        files = CheckpointStore(prepared.run).at(6).files
        return {f"{name}/{key}": t for name, path in files.items() for key, t in load_file(path).items()}

    whole, stopped = (adapted(root, qwen, name, **sections) for name in ("whole", "stopped"))
    whole.session().run()
    for step in range(1, 7):
        assert stopped.session(stops=True).run().step == step
    wanted, found = newest(whole), newest(stopped)
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in wanted.items())


def test_adapters_of_another_shape_or_model_are_refused(root, qwen):
    module = module_of(adapted(root, qwen, "shapes"))
    adapters = {name: t.clone() for name, t in trained_weights(module).items()}
    narrow = {name: t[:, :1] for name, t in adapters.items()}
    for other in (narrow, dict(list(adapters.items())[1:])):
        with pytest.raises(CheckpointError, match="holds other adapters than the recipe's"):
            assign_adapters(module, other, "step-1")
    with pytest.raises(CheckpointError, match="belong to another model"):
        merged({"norm.weight": torch.ones(3)}, adapters, LoraConfig(rank=3))
    mixture = tiny(experts={"num_experts": 4, "expert_ffn_dim": 12})
    with pytest.raises(ConfigError, match=r"start\.lora\.targets: the model has no such matrices, got \['down'\]"):
        adapt(mixture, LoraConfig(targets=("down",)))


def test_adapters_that_are_read_are_put_where_the_model_is():
    module = tiny()
    adapt(module, LoraConfig(rank=2))
    read = {name: torch.ones(tensor.shape) for name, tensor in trained_weights(module).items()}
    assign_adapters(module, read, "step-1")
    assert all(torch.equal(tensor, read[name]) for name, tensor in trained_weights(module).items())
    assign_adapters(module.to("meta"), read, "step-1")
    assert {tensor.device.type for tensor in module.parameters()} == {"meta"}


def test_without_the_library_the_extra_is_named_before_anything_starts(root, qwen, monkeypatch):
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "peft" else found(name, *rest))
    line = r"^start\.lora: needs peft, which is not installed: pip install 'dllm\[lora\]'$"
    with pytest.raises(ConfigError, match=line):
        adapted(root, qwen, "missing")
    with pytest.raises(ConfigError, match=line):
        adapt(read_bundle(qwen).denoiser(), LoraConfig())


@pytest.mark.parametrize(
    ("lora", "problem"),
    [
        ({"targets": ["head"]}, r"start\.lora\.targets\.0: must be 'qkv', 'out', 'gate_up' or 'down', got 'head'"),
        ({"targets": ["qkv", "qkv"]}, r"start\.lora\.targets: names a matrix twice"),
        ({"targets": []}, r"start\.lora\.targets: "),
        ({"rank": 0}, r"start\.lora\.rank: must be greater"),
        ({"dropout": 0.1}, r"start\.lora\.dropout: unknown name"),
    ],
)
def test_adapters_that_mean_nothing_are_refused(root, qwen, lora, problem):
    with pytest.raises(ConfigError, match=problem):
        adapted(root, qwen, "nothing", lora=lora)


def test_new_markers_need_rows_that_adapters_do_not_train(root, qwen):
    start = {"run": qwen.url, "lora": LORA}
    values = values_of(root, chats(root / "chats"), start=start, tokenizer={"chat": {}}, name="markers")
    with pytest.raises(ConfigError, match=r"start\.lora: trains no rows, and 4 are new.*tokenizer\.chat"):
        resolved(values)
