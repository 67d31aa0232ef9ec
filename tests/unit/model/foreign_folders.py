"""Small checkpoints in public layouts, names and shapes spelled out here, and a plain forward over those names."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

DIM, LAYERS, HEADS, FFN, ROWS = 32, 2, 4, 48, 40
LLADA = {
    **{"architectures": ["LLaDAModelLM"], "model_type": "llada", "d_model": DIM, "n_heads": HEADS, "n_layers": LAYERS},
    **{"n_kv_heads": HEADS, "mlp_hidden_size": FFN, "rope_theta": 5e5, "rms_norm_eps": 1e-5, "vocab_size": 37},
    **{"embedding_size": ROWS, "max_sequence_length": 64, "activation_type": "silu", "weight_tying": False},
    **{"mask_token_id": 36, "eos_token_id": 35, "pad_token_id": 34},
}
QWEN2 = {
    **{"model_type": "qwen2", "hidden_size": DIM, "num_attention_heads": HEADS, "num_hidden_layers": LAYERS},
    **{
        "num_key_value_heads": 2,
        "intermediate_size": FFN,
        "rope_theta": 1e6,
        "rms_norm_eps": 1e-6,
        "hidden_act": "silu",
    },
    **{"vocab_size": ROWS, "max_position_embeddings": 64, "tie_word_embeddings": False, "eos_token_id": 35},
    **{"use_sliding_window": False, "sliding_window": 4096, "rope_scaling": None},
}
DREAM = {**QWEN2, "model_type": "Dream", "architectures": ["DreamModel"], "mask_token_id": 36, "pad_token_id": 35}
EXPERTS = {
    **{"num_experts": 4, "num_experts_per_tok": 2, "expert_intermediate_size": 12, "dense_intermediate_size": FFN},
    **{"qk_layernorm": True, "moe_layer_freq": [0, 1], "moe_router_score_function": "softmax"},
}
LLADA_MOE = {**QWEN2, **EXPERTS, "model_type": "llada", "architectures": ["LLaDAMoEModelLM"], "mask_token_id": 36}
CONFIGS: dict[str, dict[str, Any]] = {
    "llada": LLADA,
    "llada, grouped": {**LLADA, "n_kv_heads": 2},
    "llada, tied": {**LLADA, "weight_tying": True, "embedding_size": None},
    "dream": DREAM,
    "llada_moe": LLADA_MOE,
    "qwen2": QWEN2,
    "qwen2, tied": {**QWEN2, "tie_word_embeddings": True},
    "qwen3": {**QWEN2, "model_type": "qwen3", "head_dim": 12, "attention_bias": False},
    "llama": {**QWEN2, "model_type": "llama", "num_key_value_heads": HEADS, "attention_bias": False},
    "llama of newer files": {
        **{name: value for name, value in QWEN2.items() if name not in ("rope_theta", "rope_scaling")},
        **{"model_type": "llama", "rope_parameters": {"rope_theta": 1e4, "rope_type": "default"}},
    },
}


def shapes_of(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Every tensor of a checkpoint, by its public name."""
    if "d_model" in config:
        return _llada_shapes(config)
    width = config.get("head_dim", DIM // HEADS)
    queries, keys = HEADS * width, config["num_key_value_heads"] * width
    shapes = {"model.embed_tokens.weight": (ROWS, DIM), "model.norm.weight": (DIM,)}
    if not config["tie_word_embeddings"]:
        shapes["lm_head.weight"] = (ROWS, DIM)
    for layer in range(LAYERS):
        at = f"model.layers.{layer}"
        shapes |= {f"{at}.input_layernorm.weight": (DIM,), f"{at}.post_attention_layernorm.weight": (DIM,)}
        for name, size in (("q", queries), ("k", keys), ("v", keys)):
            shapes[f"{at}.self_attn.{name}_proj.weight"] = (size, DIM)
            if config["model_type"] in ("qwen2", "Dream"):
                shapes[f"{at}.self_attn.{name}_proj.bias"] = (size,)
        shapes[f"{at}.self_attn.o_proj.weight"] = (DIM, queries)
        if config["model_type"] == "qwen3" or "num_experts" in config:
            shapes |= {f"{at}.self_attn.q_norm.weight": (width,), f"{at}.self_attn.k_norm.weight": (width,)}
        parts = {f"{at}.mlp": FFN}
        if "num_experts" in config and layer == 1:
            shapes[f"{at}.mlp.gate.weight"] = (4, DIM)
            parts = {f"{at}.mlp.experts.{expert}": 12 for expert in range(4)}
        for part, size in parts.items():
            shapes |= {f"{part}.gate_proj.weight": (size, DIM), f"{part}.up_proj.weight": (size, DIM)}
            shapes[f"{part}.down_proj.weight"] = (DIM, size)
    return shapes


def _llada_shapes(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    rows = config["embedding_size"] or config["vocab_size"]
    keys = config["n_kv_heads"] * DIM // HEADS
    shapes = {"model.transformer.wte.weight": (rows, DIM), "model.transformer.ln_f.weight": (DIM,)}
    if not config["weight_tying"]:
        shapes["model.transformer.ff_out.weight"] = (rows, DIM)
    for layer in range(LAYERS):
        at = f"model.transformer.blocks.{layer}"
        shapes |= {f"{at}.attn_norm.weight": (DIM,), f"{at}.ff_norm.weight": (DIM,), f"{at}.q_proj.weight": (DIM, DIM)}
        shapes |= {f"{at}.k_proj.weight": (keys, DIM), f"{at}.v_proj.weight": (keys, DIM)}
        shapes |= {f"{at}.attn_out.weight": (DIM, DIM), f"{at}.ff_out.weight": (DIM, FFN)}
        shapes |= {f"{at}.ff_proj.weight": (FFN, DIM), f"{at}.up_proj.weight": (FFN, DIM)}
    return shapes


def random_tensors(config: dict[str, Any], dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(len(json.dumps(config)))
    found = {}
    for name, shape in shapes_of(config).items():
        drawn = torch.randn(shape, generator=generator)
        found[name] = ((1 + 0.1 * drawn) if len(shape) == 1 else drawn * shape[-1] ** -0.5).to(dtype)
    return found


def write_folder(
    folder: Path, config: dict[str, Any], tensors: dict[str, torch.Tensor] | None = None, shards: int = 1
) -> Path:
    """A checkpoint's folder as the usual library writes it."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = random_tensors(config) if tensors is None else tensors
    (folder / "config.json").write_text(json.dumps(config, indent=1), encoding="utf-8")
    if shards == 1:
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
        return folder
    index = {}
    for shard in range(shards):
        file = f"model-{shard + 1:05}-of-{shards:05}.safetensors"
        names = sorted(tensors)[shard::shards]
        save_file({name: tensors[name] for name in names}, folder / file, {"format": "pt"})
        index |= dict.fromkeys(names, file)
    size = sum(tensor.nbytes for tensor in tensors.values())
    told = {"metadata": {"total_size": size}, "weight_map": index}
    (folder / "model.safetensors.index.json").write_text(json.dumps(told, indent=2), encoding="utf-8")
    return folder


def reference_logits(folder: Path, ids: list[int], *, is_causal: bool) -> torch.Tensor:
    """Logits [L V] of Qwen's and LLaDA's published equations in float64, a head and a token at a time."""
    config = json.loads((folder / "config.json").read_text())
    weights = {name: t.double() for path in folder.glob("*.safetensors") for name, t in load_file(path).items()}
    if "d_model" in config:
        weights = {_as_qwen(name): tensor for name, tensor in weights.items()}
    heads = config.get("num_attention_heads", config.get("n_heads"))
    groups = config.get("num_key_value_heads", config.get("n_kv_heads"))
    width, eps = config.get("head_dim", DIM // heads), config["rms_norm_eps"]
    theta = config.get("rope_theta") or config["rope_parameters"]["rope_theta"]

    def norm(x: torch.Tensor, name: str) -> torch.Tensor:
        return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * weights[name]

    def turned(x: torch.Tensor, position: int) -> torch.Tensor:
        half = width // 2
        out = x.clone()
        for i in range(half):
            angle = torch.tensor(position * theta ** (-2 * i / width), dtype=torch.float64)
            out[i] = x[i] * angle.cos() - x[i + half] * angle.sin()
            out[i + half] = x[i + half] * angle.cos() + x[i] * angle.sin()
        return out

    def swiglu(x: torch.Tensor, at: str) -> torch.Tensor:
        gate, up = (weights[f"{at}.{name}_proj.weight"] @ x for name in ("gate", "up"))
        return weights[f"{at}.down_proj.weight"] @ (gate * gate.sigmoid() * up)

    def feed_forward(x: torch.Tensor, at: str) -> torch.Tensor:
        if f"{at}.gate.weight" not in weights:
            return swiglu(x, at)
        chances = (weights[f"{at}.gate.weight"] @ x).softmax(0)
        best = chances.topk(config["num_experts_per_tok"]).indices.tolist()
        return sum(chances[expert] * swiglu(x, f"{at}.experts.{expert}") for expert in best)

    x = [weights["model.embed_tokens.weight"][token] for token in ids]
    for layer in range(LAYERS):
        at = f"model.layers.{layer}"
        projected: dict[str, list[list[torch.Tensor]]] = {"q": [], "k": [], "v": []}
        for position, token in enumerate(x):
            normed = norm(token, f"{at}.input_layernorm.weight")
            for name, rows in projected.items():
                flat = weights[f"{at}.self_attn.{name}_proj.weight"] @ normed
                flat = flat + weights.get(f"{at}.self_attn.{name}_proj.bias", torch.zeros(()))
                parts = list(flat.split(width))
                if name != "v":
                    key = f"{at}.self_attn.{name}_norm.weight"
                    parts = [turned(norm(part, key) if key in weights else part, position) for part in parts]
                rows.append(parts)
        for position in range(len(x)):
            seen = range(position + 1 if is_causal else len(x))
            outs = []
            for head in range(heads):
                own = head * groups // heads
                scores = [projected["q"][position][head] @ projected["k"][j][own] / width**0.5 for j in seen]
                law = torch.stack(scores).softmax(0)
                outs.append(sum(chance * projected["v"][j][own] for chance, j in zip(law, seen, strict=True)))
            x[position] = x[position] + weights[f"{at}.self_attn.o_proj.weight"] @ torch.cat(outs)
        x = [t + feed_forward(norm(t, f"{at}.post_attention_layernorm.weight"), f"{at}.mlp") for t in x]
    head = weights.get("lm_head.weight", weights["model.embed_tokens.weight"])
    return torch.stack([head @ norm(token, "model.norm.weight") for token in x])


_TOP = {"wte": "model.embed_tokens", "ln_f": "model.norm", "ff_out": "lm_head"}
_IN_BLOCK = {
    **{"attn_norm": "input_layernorm", "ff_norm": "post_attention_layernorm", "attn_out": "self_attn.o_proj"},
    **{"ff_proj": "mlp.gate_proj", "up_proj": "mlp.up_proj", "ff_out": "mlp.down_proj"},
}


def _as_qwen(name: str) -> str:
    parts = name.split(".")
    if parts[2] != "blocks":
        return f"{_TOP[parts[2]]}.weight"
    return f"model.layers.{parts[3]}.{_IN_BLOCK.get(parts[4], f'self_attn.{parts[4]}')}.weight"
