"""What trainings that start from a run are tried on: tiny Qwen2 folders, small recipes, sessions in this process."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import small_text
from safetensors.torch import save_file

from dllm_core.checkpoints.run_dir import RunDir
from dllm_core.data.manifest import CorpusManifest, read_manifest
from dllm_core.data.tokenizer import Tokenizer, TokenizerConfig
from dllm_core.model.denoiser import Denoiser
from dllm_core.storage.store import open_store
from dllm_core.training.backend import LocalBackend
from dllm_core.training.config import TrainConfig
from dllm_core.training.loop import Trainer
from workflows.console import Console
from workflows.fan_out import serially
from workflows.pipeline.bundle import make_bundle
from workflows.preprocess.flow import Preprocessing, plan_corpus
from workflows.recipe import Recipe, resolved
from workflows.train.session import MetricsLog, open_session
from workflows.transfer.flow import import_checkpoint

DIM, LAYERS, HEADS, GROUPS, FFN = 32, 2, 4, 2, 48


def qwen2_folder(folder: Path, *, padded: int = 7, dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> Path:
    """A tiny autoregressive checkpoint with random weights, a tokenizer without a mask, and rows that are no token."""
    folder.mkdir(parents=True)
    tokenizer = Tokenizer.train([small_text()], TokenizerConfig(vocab_size=300, mask_token="<|spare|>"))
    (folder / "tokenizer.json").write_text(tokenizer.json_text, encoding="utf-8")
    rows, width = tokenizer.vocab_size + padded, DIM // HEADS
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (rows, DIM), "lm_head.weight": (rows, DIM)}
    for layer in range(LAYERS):
        at = f"model.layers.{layer}"
        for name, size in (("q", HEADS), ("k", GROUPS), ("v", GROUPS)):
            shapes |= {f"{at}.self_attn.{name}_proj.{kind}": (size * width, DIM) for kind in ("weight",)}
            shapes[f"{at}.self_attn.{name}_proj.bias"] = (size * width,)
        shapes |= {f"{at}.self_attn.o_proj.weight": (DIM, DIM), f"{at}.mlp.down_proj.weight": (DIM, FFN)}
        shapes |= {f"{at}.mlp.{name}_proj.weight": (FFN, DIM) for name in ("gate", "up")}
        shapes |= {f"{at}.{name}_layernorm.weight": (DIM,) for name in ("input", "post_attention")}
    shapes["model.norm.weight"] = (DIM,)
    drawn, tensors = torch.Generator().manual_seed(seed), {}
    for name, shape in shapes.items():
        values = torch.randn(shape, generator=drawn)
        tensors[name] = (1 + 0.1 * values if len(shape) == 1 else values * shape[-1] ** -0.5).to(dtype)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    config = {"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"], "hidden_size": DIM, "vocab_size": rows}
    config |= {"num_attention_heads": HEADS, "num_key_value_heads": GROUPS, "num_hidden_layers": LAYERS}
    config |= {"intermediate_size": FFN, "rope_theta": 1e4, "rms_norm_eps": 1e-6, "hidden_act": "silu"}
    config |= {"max_position_embeddings": 64, "tie_word_embeddings": False, "eos_token_id": tokenizer.eos_id}
    (folder / "config.json").write_text(json.dumps(config))
    added = {str(token["id"]): token for token in json.loads(tokenizer.json_text)["added_tokens"]}
    (folder / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": added}))
    return folder


def imported_qwen(root: Path) -> RunDir:
    """An imported autoregressive run in bf16 below `root`, with a row for a mask."""
    folder = qwen2_folder(root / "qwen")
    words = ["mask_id=new", f"storage.root={root / 'storage'}"]
    return RunDir.at(import_checkpoint(str(folder), "qwen", words, Console("json"))["run"])


def chats(folder: Path) -> dict[str, Any]:
    """Conversations, and the section of a corpus of them."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = []
    for number, block in enumerate(small_text().split("\n\n")):
        told = [{"role": "user", "content": f"NAME {number}"}, {"role": "assistant", "content": block.splitlines()[0]}]
        lines.append(json.dumps({"messages": told}))
    (folder / "chats.jsonl").write_text("\n".join(lines) + "\n")
    return {"type": "jsonl", "path": str(folder), "record": {"type": "chat"}, "heldout_fraction": 0.1}


def texts(folder: Path) -> dict[str, Any]:
    """Plain text, and the section of a corpus of it."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "names.txt").write_text(small_text(), encoding="utf-8")
    return {"type": "text", "path": str(folder), "document": "paragraph", "heldout_fraction": 0.1}


def values_of(root: Path, corpus: dict[str, Any], **sections: Any) -> dict[str, Any]:
    """A recipe as a user writes it: no model, no tokenizer."""
    train = {"steps": 4, "batch_rows": 4, "precision": "fp32", "log_every": 1, "warmup_steps": 0}
    train |= {"ema_decay": 0, "checkpoint_every": 2, "heldout_every": None, **sections.pop("train", {})}
    values = {"name": "more", "seed": 5, "storage": {"root": str(root / "storage")}, "corpus": corpus, "train": train}
    decode = {"max_tokens": 12, "block_length": 4, "steps_per_block": 4}
    evaluate = {"rows": 16, "draws": 2, "prompts": 2, "calibration": {"rows": 0}, "infill": {"rows": 0}}
    return {**values, "packing": {"seq_len": 32}, "decode": decode, "evaluate": evaluate, **sections}


class Prepared:
    """A recipe with its corpus made, whose run is trained in this process."""

    def __init__(self, values: dict[str, Any]) -> None:
        self.recipe: Recipe = resolved(values)
        store = open_store("storage.root", self.recipe.storage.root)
        plan = plan_corpus(self.recipe, store)
        self.manifest: CorpusManifest = plan.existing() or Preprocessing(plan, serially).run()
        self.corpus = plan.fingerprint
        self.run = RunDir(store, f"{self.recipe.name}-{self.recipe.run_fingerprint(plan.fingerprint)}")
        self.run.store.put(self.run.key("recipe.yaml"), self.recipe.to_yaml().encode())

    def session(
        self, seen: Callable[[Denoiser], None] = lambda module: None, stops: bool = False, **train: Any
    ) -> Trainer:
        """A trainer at the newest checkpoint. seen: is shown the module before training has it; stops: after a step."""
        config = self.recipe.train.model_copy(update=train)

        class Shown(LocalBackend):
            def __init__(self, module: Denoiser, config: TrainConfig) -> None:
                seen(module)
                super().__init__(module, config)

        return open_session(
            self.recipe.model_copy(update={"train": config}),
            self.run,
            read_manifest(self.run.store, self.corpus),
            torch.device("cpu"),
            backend=Shown,
            events_of=lambda step: MetricsLog(self.run, step),
            on_damage=lambda error: pytest.fail(str(error)),
            should_stop=lambda: stops,
        )

    def trained(self, **train: Any) -> RunDir:
        """The run, trained to the end, with its bundle."""
        self.session(**train).run()
        make_bundle(self.recipe, self.run, self.corpus, pytest.fail)
        return self.run


def module_of(prepared: Prepared) -> Denoiser:
    """The denoiser that a session of it would train."""
    seen = list[Denoiser]()
    prepared.session(seen.append)
    return seen[0]
