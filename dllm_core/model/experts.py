"""Mixture of experts: a router chooses a few small feed-forward networks for every token. arXiv:1701.06538.

Tokens are sorted by expert, so that each expert is one matrix product over all of its tokens; what a token gets is
summed in the order of its choice, so that its bits do not depend on who else is in the batch.
"""

from collections.abc import Callable
from typing import Self

import torch
from torch import Tensor, nn
from torch.nn import functional

from dllm_core.model.config import ExpertsConfig, ModelConfig
from dllm_core.model.layers import SwiGLU, draw, pad_rows, product


class Router(nn.Module):
    """Which experts a token meets, and how much each counts. In fp32, whatever the model's type: near ties decide."""

    def __init__(self, dim: int, config: ExpertsConfig) -> None:
        super().__init__()
        self.config = config
        self.weight = nn.Parameter(torch.empty(config.num_experts, dim))
        draw(self.weight, dim**-0.5)
        if config.selection_bias:  # a buffer: balancing moves it, no gradient does. arXiv:2408.15664
            self.register_buffer("selection_bias", torch.zeros(config.num_experts))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Moved with the model, and never rounded with it: some tokens would meet other experts."""

        def moved(tensor: Tensor) -> Tensor:
            found = fn(tensor)
            return found if found.dtype.itemsize >= tensor.dtype.itemsize else tensor.to(found.device)

        result: Self = super()._apply(moved, recurse)  # type: ignore[no-untyped-call]
        return result

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens [n D] -> chosen experts int64 [n k], and their weights fp32 [n k]."""
        own = self.config
        with torch.autocast(x.device.type, enabled=False):
            logits = product(x.float(), self.weight.float())
        # In fp64: a CPU's fp32 sigmoid has other last bits where an array ends, and no row may know where it stands.
        scores = logits.double().sigmoid().float() if own.router == "sigmoid" else logits.softmax(-1)
        ranked = scores.detach()
        if own.selection_bias:
            ranked = ranked + self.get_buffer("selection_bias").float()
        chosen = _eligible(ranked, own).topk(own.experts_per_token, dim=-1).indices
        weights = scores.gather(-1, chosen)
        if own.normalise and own.experts_per_token > 1:
            weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
        return chosen, weights * own.routed_scaling


def _eligible(ranked: Tensor, config: ExpertsConfig) -> Tensor:
    """Scores [n E] with those of left-out groups at -inf; a group is worth its two best experts together."""
    if config.groups_per_token == config.num_groups:
        return ranked
    groups = ranked.view(len(ranked), config.num_groups, -1)
    worth = groups.topk(min(2, groups.shape[-1]), dim=-1).values.sum(-1)
    best = worth.topk(config.groups_per_token, dim=-1).indices
    is_out = torch.ones_like(worth, dtype=torch.bool).scatter_(-1, best, False)
    return groups.masked_fill(is_out[..., None], -torch.inf).view(ranked.shape)


class MixtureOfExperts(nn.Module):
    """sum_e weight_e down_e(silu(gate_e(x)) * up_e(x)) over a token's experts, + what all tokens share."""

    def __init__(self, model: ModelConfig, config: ExpertsConfig) -> None:
        super().__init__()
        # Of tensors without numbers nobody can count who is chosen: a plan takes the tokens for evenly spread.
        self.assumes_even = False
        dim, width, scale = model.dim, config.expert_ffn_dim, (2 * model.layers) ** -0.5
        self.router = Router(dim, config)
        self.gate_up = nn.Parameter(torch.empty(config.num_experts, 2 * width, dim))
        self.down = nn.Parameter(torch.empty(config.num_experts, dim, width))
        draw(self.gate_up, dim**-0.5)
        draw(self.down, scale * width**-0.5)
        self.shared = SwiGLU(dim, config.shared_ffn_dim, scale) if config.num_shared_experts else None

    def forward(self, x: Tensor) -> Tensor:
        """[B L D] -> [B L D]."""
        tokens = x.flatten(0, 1)
        chosen, weights = self.router(tokens)
        order = chosen.flatten().argsort(stable=True)
        counts = self._counts(chosen)
        sorted_tokens = tokens[order // chosen.shape[1]]
        # unbind, not an index an expert: the backward of that would add a gradient of all experts for each.
        parts = [
            _expert(part, gate_up, down)
            for part, gate_up, down in zip(
                torch.split(sorted_tokens, counts), self.gate_up.unbind(0), self.down.unbind(0), strict=True
            )
            if len(part)
        ]
        met = torch.cat(parts)[order.argsort()].view(*chosen.shape, -1)
        mixed: Tensor = (met * weights[..., None].to(met.dtype)).sum(1).view(x.shape)
        if self.shared is not None:
            mixed = mixed + self.shared(x)
        return mixed

    def _counts(self, chosen: Tensor) -> list[int]:
        """How many tokens each expert gets."""
        if self.assumes_even:
            each, more = divmod(chosen.numel(), len(self.down))
            return [each + (expert < more) for expert in range(len(self.down))]
        found: list[int] = torch.bincount(chosen.flatten(), minlength=len(self.down)).tolist()
        return found


def _expert(tokens: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    """SwiGLU of one expert's tokens [m D], padded as the head's are: how many there are depends on the batch."""
    gate, up = product(pad_rows(tokens), gate_up).chunk(2, dim=-1)
    return product(functional.silu(gate) * up, down)[: len(tokens)]
