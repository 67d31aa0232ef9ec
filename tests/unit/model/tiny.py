"""Denoisers of a few hundred weights, and rows of documents and padding, that the model's laws are tried on."""

from dataclasses import dataclass

import torch
from hypothesis import strategies as st

from dllm_core.model.config import DenoiserConfig, ModelConfig
from dllm_core.model.denoiser import Denoiser

VOCABULARY = 19


def new_denoiser(seed: int = 0, **sizes: object) -> Denoiser:
    model = ModelConfig(**{"dim": 16, "layers": 2, "heads": 2, "ffn_dim": 24, **sizes})
    config = DenoiserConfig(model=model, vocab_size=VOCABULARY, context_length=32, mask_id=0, eos_id=1, pad_id=2)
    torch.manual_seed(seed)
    return Denoiser(config).eval()


def timed_denoiser(seed: int = 0, **sizes: object) -> Denoiser:
    """A time-conditioned one that has learned something of t: at first t changes nothing."""
    denoiser = new_denoiser(seed, time_conditioning=True, **sizes)
    torch.nn.init.normal_(denoiser.time.modulation.weight, std=0.05)
    return denoiser


def mixed_denoiser(seed: int = 0, **sizes: object) -> Denoiser:
    """One with all that foreign models have: queries in groups, biases, heads that turn in part, experts in groups."""
    experts = {"num_experts": 4, "expert_ffn_dim": 12, "num_groups": 2, "first_dense_layers": 1, "router": "sigmoid"}
    kinds = {"heads": 4, "kv_heads": 2, "head_width": 8, "rope_fraction": 0.5, "qkv_bias": True}
    experts |= {"num_shared_experts": 1, "selection_bias": True, "routed_scaling": 1.5}
    denoiser = new_denoiser(seed, **{**kinds, "experts": experts, **sizes})
    torch.nn.init.normal_(denoiser.blocks[1].ffn.router.selection_bias, std=0.1)
    for block in denoiser.blocks:
        torch.nn.init.normal_(block.attention.qkv.bias, std=0.5)
    return denoiser


def ids_of(*shape: int, seed: int = 1) -> torch.Tensor:
    return torch.randint(0, VOCABULARY, shape, generator=torch.Generator().manual_seed(seed))


def times_of(*shape: int, seed: int = 1) -> torch.Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed))


def same(left: torch.Tensor, right: torch.Tensor, atol: float = 2e-5) -> None:
    """Alike but for rounding."""
    torch.testing.assert_close(left, right, atol=atol, rtol=1e-4)


def closely(left: torch.Tensor, right: torch.Tensor) -> None:
    """Alike to 1e-5, of logits of about unit size."""
    torch.testing.assert_close(left, right, atol=1e-5, rtol=0)


@dataclass(frozen=True)
class Layout:
    """Rows of `width` tokens. documents: (row, begin, end) of each; isolation: what a denoiser is told of them."""

    width: int
    documents: tuple[tuple[int, int, int], ...]
    isolation: dict[str, torch.Tensor]

    @property
    def num_rows(self) -> int:
        return self.documents[-1][0] + 1


@st.composite
def layouts(draw: st.DrawFn) -> Layout:
    """One to three rows: padding, documents, padding; told by segments, by is_real or by both."""
    told = draw(st.sampled_from(["nothing", "segments", "padding", "both", "padding in a document's segment"]))
    documents, labels = [], []
    one = told in ("nothing", "padding")
    for row in range(draw(st.integers(1, 3))):
        lengths = draw(st.lists(st.integers(1, 9), min_size=1, max_size=1 if one else 4))
        labels.append([0] * (0 if told == "nothing" else draw(st.integers(0, 3))))
        for i, length in enumerate(lengths):
            documents.append((row, len(labels[-1]), len(labels[-1]) + length))
            labels[-1] += [i + 1] * length
    width = max(map(len, labels)) + draw(st.integers(0, 3))
    if told == "nothing":
        width = min(map(len, labels))
        documents = [(row, 0, width) for row in range(len(labels))]
    segment_ids = torch.tensor([row[:width] + [max(row) + 1] * (width - len(row)) for row in labels])
    is_real = torch.zeros_like(segment_ids, dtype=torch.bool)
    for row, begin, end in documents:
        is_real[row, begin:end] = True
    if told == "padding in a document's segment":
        segment_ids = segment_ids.clamp(min=1).minimum(torch.tensor([[max(row)] for row in labels]))
    isolation = {"is_real": is_real, "segment_ids": segment_ids}
    kept = {"nothing": (), "segments": ("segment_ids",), "padding": ("is_real",)}.get(told, tuple(isolation))
    return Layout(width, tuple(documents), {name: isolation[name] for name in kept})
