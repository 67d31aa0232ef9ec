"""Families of public checkpoints: what their config.json means, and what their tensors are called.

| family | attention | logits at i | names |
|---|---|---|---|
| llada | full | token i | OLMo's |
| dream | full | token i + 1 | Qwen2's |
| llada_moe | full | token i | Qwen's with experts |
| llada2_moe | blocks | token i | its own; queries, keys and values are one matrix |
| qwen2, qwen3, llama | causal | token i + 1 | Qwen's |

A field that would change what is computed and is not known here is refused: a model that runs and is wrong costs more
than one that does not load. Sources: the modeling files beside the published weights.
"""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from dllm_core.errors import CheckpointError, ConfigError
from dllm_core.model.config import ModelConfig


@dataclass(frozen=True)
class Fields:
    """A config.json; errors name the field and its value."""

    place: str
    values: dict[str, Any]

    def get(self, name: str, default: Any) -> Any:
        """A field, `default` where it is missing or null."""
        found = self.values.get(name)
        return default if found is None else found

    def need(self, name: str) -> Any:
        """A field that must be there."""
        if self.values.get(name) is None:
            raise CheckpointError(f"{self.place}: {name}", "is missing")
        return self.values[name]

    def whole(self, name: str) -> int:
        """A number that must be there, at least 1."""
        found = self.need(name)
        if not isinstance(found, int) or isinstance(found, bool) or found < 1:
            raise CheckpointError(f"{self.place}: {name}", "must be a whole number above 0", found)
        return found

    def only(self, **allowed: Any) -> None:
        """Refuse fields that are there with a value other than the one that is supported, or null."""
        for name, value in allowed.items():
            found = self.values.get(name)
            if found is not None and found != value:
                raise CheckpointError(
                    f"{self.place}: {name}", "is not supported", found, f"only {json.dumps(value)} is"
                )

    def rope(self) -> float:
        """rope_theta, which newer files keep in `rope_parameters`, some in `rope_scaling`.

        Scaled positions are refused, and so are two values: which one counts depends on who reads the file.
        """
        said = [self.values.get("rope_theta")]
        for name in ("rope_scaling", "rope_parameters"):
            scaling = self.values.get(name) or {}
            if scaling and scaling.get("rope_type", scaling.get("type")) != "default":
                raise CheckpointError(f"{self.place}: {name}", "is not supported", scaling, "only null is")
            said.append(scaling.get("rope_theta"))
        found = sorted({float(theta) for theta in said if theta is not None})
        if len(found) > 1:
            remedy = "keep the one that the weights were trained with"
            raise CheckpointError(f"{self.place}: rope_theta", "is there more than once", found, remedy)
        return found[0] if found else float(self.need("rope_theta"))

    def rope_fraction(self, default: float | None) -> Any:
        """partial_rotary_factor, which newer files keep in `rope_parameters`; None: one of them must say it."""
        found = (self.values.get("rope_parameters") or {}).get("partial_rotary_factor")
        found = self.get("partial_rotary_factor", default) if found is None else found
        return self.need("partial_rotary_factor") if found is None else found


@dataclass(frozen=True)
class Names:
    """A family's tensors. `block` has a place for the layer's number, `expert` one for the expert's."""

    embed: str
    norm: str
    head: str
    block: str
    norm1: str
    norm2: str
    qkv: tuple[str, ...]
    out: str
    ffn: tuple[str, str, str]
    qk_norm: tuple[str, str] = ("", "")
    router: str = ""
    selection_bias: str = ""
    expert: str = ""
    shared: str = ""


@dataclass(frozen=True)
class Family:
    """What is done with a model_type. is_causal and in_blocks: how its checkpoints were trained to see."""

    name: str
    model_types: tuple[str, ...]
    names: Names
    model: Callable[[Fields], dict[str, Any]]
    context: str = "max_position_embeddings"
    rows: str = "vocab_size"
    architectures: tuple[str, ...] = ()
    is_causal: bool = False
    in_blocks: bool = False


@dataclass(frozen=True)
class Place:
    """Where a foreign tensor stands in one of ours: in rows start to start + shape[0], of one expert or of all."""

    foreign: str
    ours: str
    shape: tuple[int, ...]
    start: int = 0
    expert: int | None = None
    is_optional: bool = False

    def within(self, tensor: Any) -> Any:
        """Its part of our tensor, a view."""
        tensor = tensor if self.expert is None else tensor[self.expert]
        return tensor[self.start : self.start + self.shape[0]]


def places(family: Family, model: ModelConfig, rows: int) -> Iterator[Place]:
    """Every tensor of a checkpoint with so many rows of embeddings, in the order of ours."""
    names, dim, width = family.names, model.dim, model.head_dim
    yield Place(names.embed, "embed.weight", (rows, dim))
    kv, attention = model.num_kv_heads * width, model.heads * width
    for layer in range(model.layers):
        ours, theirs = f"blocks.{layer}", names.block.format(layer)
        yield Place(f"{theirs}.{names.norm1}.weight", f"{ours}.norm1.weight", (dim,))
        parts = (attention, kv, kv) if len(names.qkv) == 3 else (model.qkv_dim,)
        for kind, tail in (("weight", (dim,)), ("bias", ())) if model.qkv_bias else (("weight", (dim,)),):
            start = 0
            for name, size in zip(names.qkv, parts, strict=True):
                yield Place(f"{theirs}.{name}.{kind}", f"{ours}.attention.qkv.{kind}", (size, *tail), start)
                start += size
        yield Place(f"{theirs}.{names.out}.weight", f"{ours}.attention.out.weight", (dim, attention))
        if model.qk_norm:
            for name, which in zip(names.qk_norm, ("q_norm", "k_norm"), strict=True):
                yield Place(f"{theirs}.{name}.weight", f"{ours}.attention.{which}.weight", (width,))
        yield Place(f"{theirs}.{names.norm2}.weight", f"{ours}.norm2.weight", (dim,))
        if model.has_experts(layer):
            yield from _mixture(names, theirs, f"{ours}.ffn", model)
        else:
            yield from _swiglu([f"{theirs}.{name}" for name in names.ffn], f"{ours}.ffn", dim, model.ffn_dim)
    yield Place(names.norm, "norm.weight", (dim,))
    tied = model.tie_embeddings
    yield Place(names.head, "embed.weight" if tied else "head.weight", (rows, dim), is_optional=tied)


def _swiglu(theirs: list[str], ours: str, dim: int, width: int, expert: int | None = None) -> Iterator[Place]:
    gate, up, down = (f"{name}.weight" for name in theirs)
    kind = ".weight" if expert is None else ""
    yield Place(gate, f"{ours}.gate_up{kind}", (width, dim), 0, expert)
    yield Place(up, f"{ours}.gate_up{kind}", (width, dim), width, expert)
    yield Place(down, f"{ours}.down{kind}", (dim, width), 0, expert)


def _mixture(names: Names, theirs: str, ours: str, model: ModelConfig) -> Iterator[Place]:
    own = model.experts
    assert own is not None
    yield Place(f"{theirs}.{names.router}", f"{ours}.router.weight", (own.num_experts, model.dim))
    if own.selection_bias:
        yield Place(f"{theirs}.{names.selection_bias}", f"{ours}.router.selection_bias", (own.num_experts,))
    for number in range(own.num_experts):
        parts = [f"{theirs}.{names.expert.format(number)}.{name}" for name in ("gate_proj", "up_proj", "down_proj")]
        yield from _swiglu(parts, ours, model.dim, own.expert_ffn_dim, number)
    if own.num_shared_experts:
        parts = [f"{theirs}.{names.shared}.{name}" for name in ("gate_proj", "up_proj", "down_proj")]
        yield from _swiglu(parts, f"{ours}.shared", model.dim, own.shared_ffn_dim)


def _llada(fields: Fields) -> dict[str, Any]:
    fields.only(activation_type="silu", block_type="llama", block_group_size=1, rope=True, alibi=False)
    fields.only(layer_norm_type="rms", attention_layer_norm=False, input_emb_norm=False, scale_logits=False)
    fields.only(include_bias=False, bias_for_layer_norm=False, layer_norm_with_affine=True, multi_query_attention=False)
    dim, heads = fields.whole("d_model"), fields.whole("n_heads")
    return {
        "dim": dim,
        "layers": fields.whole("n_layers"),
        "heads": heads,
        "kv_heads": fields.get("n_kv_heads", heads),
        "ffn_dim": fields.get("mlp_hidden_size", fields.get("mlp_ratio", 4) * dim),
        "rope_theta": fields.rope(),
        "norm_eps": fields.need("rms_norm_eps"),
        "qkv_bias": fields.get("include_qkv_bias", False),
        "tie_embeddings": fields.get("weight_tying", False),
    }


def _hugging_face(fields: Fields) -> dict[str, Any]:
    """What all but LLaDA say in the same words."""
    fields.only(hidden_act="silu", use_sliding_window=False, mlp_bias=False, clip_qkv=None)
    kinds = set(fields.get("layer_types", ["full_attention"]))
    if kinds != {"full_attention"}:
        raise CheckpointError(f"{fields.place}: layer_types", "is not supported", sorted(kinds), "only full_attention")
    dim, heads = fields.whole("hidden_size"), fields.whole("num_attention_heads")
    head_dim = fields.get("head_dim", dim // heads)
    return {
        "dim": dim,
        "layers": fields.whole("num_hidden_layers"),
        "heads": heads,
        "kv_heads": fields.get("num_key_value_heads", heads),
        "head_width": None if head_dim * heads == dim else head_dim,
        "rope_theta": fields.rope(),
        "norm_eps": fields.need("rms_norm_eps"),
        "tie_embeddings": fields.get("tie_word_embeddings", False),
    }


def _qwen2(fields: Fields) -> dict[str, Any]:
    return {**_hugging_face(fields), "ffn_dim": fields.need("intermediate_size"), "qkv_bias": True, "shifted": True}


def _qwen3(fields: Fields) -> dict[str, Any]:
    return {**_llama(fields), "qk_norm": True}


def _llama(fields: Fields) -> dict[str, Any]:
    fields.only(attention_bias=False)
    return {**_hugging_face(fields), "ffn_dim": fields.need("intermediate_size"), "shifted": True}


def _llada_moe(fields: Fields) -> dict[str, Any]:
    fields.only(attention_bias=False, shared_expert_intermediate_size=0, moe_router_score_function="softmax")
    fields.only(moe_router_enable_expert_bias=False, router_num_group=1, router_topk_group=1)
    # The published code reads neither: it never normalises, whatever the file says, and others do what it says.
    fields.only(norm_topk_prob=False, routed_scaling_factor=1)
    layers = fields.whole("num_hidden_layers")
    frequency = fields.get("moe_layer_freq", [1] * layers)
    first = frequency.index(1) if 1 in frequency else layers
    if frequency != [0] * first + [1] * (layers - first) or first == layers:
        remedy = "only dense layers before all others are"
        raise CheckpointError(f"{fields.place}: moe_layer_freq", "is not supported", frequency, remedy)
    experts = {
        "num_experts": fields.need("num_experts"),
        "experts_per_token": fields.need("num_experts_per_tok"),
        "expert_ffn_dim": fields.need("expert_intermediate_size"),
        "first_dense_layers": first,
        "router": "softmax",
        "normalise": False,
    }
    return {
        **_hugging_face(fields),
        "ffn_dim": fields.get("dense_intermediate_size", fields.get("intermediate_size", 8)),
        "qk_norm": fields.get("qk_layernorm", True),
        "rope_fraction": fields.rope_fraction(1.0),
        "experts": experts,
    }


def _llada2(fields: Fields) -> dict[str, Any]:
    fields.only(use_bias=False, norm_head=False, use_qk_norm=True, score_function="sigmoid", norm_topk_prob=True)
    fields.only(attention_bias=False, moe_shared_expert_intermediate_size=fields.get("moe_intermediate_size", None))
    # What is missing is 8, 4, 2.5 and half of a head to the published code, and 1 to others: so it must be said.
    experts = {
        "num_experts": fields.need("num_experts"),
        "experts_per_token": fields.need("num_experts_per_tok"),
        "expert_ffn_dim": fields.need("moe_intermediate_size"),
        "num_shared_experts": fields.get("num_shared_experts", 0),
        "first_dense_layers": fields.get("first_k_dense_replace", 0),
        "router": "sigmoid",
        "num_groups": fields.need("n_group"),
        "groups_per_token": fields.need("topk_group"),
        "routed_scaling": fields.need("routed_scaling_factor"),
        "selection_bias": fields.get("moe_router_enable_expert_bias", True),
    }
    return {
        **_hugging_face(fields),
        "ffn_dim": fields.need("intermediate_size"),
        "qkv_bias": fields.get("use_qkv_bias", False),
        "qk_norm": True,
        "rope_fraction": fields.rope_fraction(None),
        "experts": experts,
    }


_OF_LLADA = Names(
    embed="model.transformer.wte.weight",
    norm="model.transformer.ln_f.weight",
    head="model.transformer.ff_out.weight",
    block="model.transformer.blocks.{}",
    norm1="attn_norm",
    norm2="ff_norm",
    qkv=("q_proj", "k_proj", "v_proj"),
    out="attn_out",
    ffn=("ff_proj", "up_proj", "ff_out"),
)
_OF_QWEN = Names(
    embed="model.embed_tokens.weight",
    norm="model.norm.weight",
    head="lm_head.weight",
    block="model.layers.{}",
    norm1="input_layernorm",
    norm2="post_attention_layernorm",
    qkv=("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    out="self_attn.o_proj",
    ffn=("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"),
    qk_norm=("self_attn.q_norm", "self_attn.k_norm"),
    router="mlp.gate.weight",
    expert="mlp.experts.{}",
)
_OF_LLADA2 = Names(
    embed="model.word_embeddings.weight",
    norm="model.norm.weight",
    head="lm_head.weight",
    block="model.layers.{}",
    norm1="input_layernorm",
    norm2="post_attention_layernorm",
    qkv=("attention.query_key_value",),
    out="attention.dense",
    ffn=("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"),
    qk_norm=("attention.query_layernorm", "attention.key_layernorm"),
    router="mlp.gate.weight",
    selection_bias="mlp.gate.expert_bias",
    expert="mlp.experts.{}",
    shared="mlp.shared_experts",
)
LLADA = Family("llada", ("llada",), _OF_LLADA, _llada, context="max_sequence_length", rows="embedding_size")
FAMILIES = (
    # Published LLaDA-MoE checkpoints call themselves `llada` too; their architecture tells.
    Family("llada_moe", ("llada_moe", "lladamoe"), _OF_QWEN, _llada_moe, architectures=("LLaDAMoEModel",)),
    LLADA,
    Family("dream", ("Dream",), _OF_QWEN, _qwen2),
    Family("llada2_moe", ("llada2_moe",), _OF_LLADA2, _llada2, in_blocks=True),
    Family("qwen2", ("qwen2",), _OF_QWEN, _qwen2, is_causal=True),
    Family("qwen3", ("qwen3",), _OF_QWEN, _qwen3, is_causal=True),
    Family("llama", ("llama",), _OF_QWEN, _llama, is_causal=True),
)


def family_of(fields: Fields) -> Family:
    """The family of a config.json. Raises CheckpointError for one that is not known."""
    model_type, architectures = fields.need("model_type"), fields.get("architectures", [])
    fields.only(quantization_config=None)
    for family in FAMILIES:
        if any(name.startswith(family.architectures) for name in architectures if family.architectures):
            return family
    for family in FAMILIES:
        if model_type in family.model_types:
            return family
    known = ", ".join(dict.fromkeys(name for family in FAMILIES for name in family.model_types))
    raise CheckpointError(f"{fields.place}: model_type", "is not known", model_type, f"known are {known}")


def family_named(name: str) -> Family:
    """The family that a layout names. Raises CheckpointError for one that is not known."""
    for family in FAMILIES:
        if family.name == name:
            return family
    raise CheckpointError("family", "is not known", name, f"known are {', '.join(family.name for family in FAMILIES)}")


def model_of(family: Family, fields: Fields) -> ModelConfig:
    """The sizes of a checkpoint's denoiser. Raises CheckpointError for what this one cannot compute."""
    if family.is_causal:
        fields.only(is_causal=True)  # false: an encoder, whose positions see all others
    said = {"qk_norm": False, "scale_embeddings": False, **family.model(fields)}
    if said["kv_heads"] == said["heads"]:
        said["kv_heads"] = None
    try:
        return ModelConfig.checked(said)
    except ConfigError as error:
        raise CheckpointError(f"{fields.place}: as model.{error.place}", error.problem, error.value) from error
