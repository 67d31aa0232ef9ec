"""Exponential moving average of the weights, fp32: what is evaluated and served."""

import torch
from torch import Tensor


class WeightAverage:
    """ema <- d ema + (1 - d) weights, with d = min(decay, (1 + step) / (10 + step)) so that early steps do not weigh.

    Each rank holds that of its own share of the weights (`Backend.shard`): it is written down and served, never
    trained on.
    """

    def __init__(self, weights: dict[str, Tensor], decay: float) -> None:
        self._decay = decay
        self.weights = {name: tensor.detach().float().clone() for name, tensor in weights.items()}

    @torch.no_grad()
    def update(self, weights: dict[str, Tensor], step: int) -> None:
        """Take in the weights after optimizer step `step` (counted from 0)."""
        decay = min(self._decay, (1 + step) / (10 + step))
        new = [weights[name].detach().float() for name in self.weights]
        if new:  # a rank whose share is nothing
            torch._foreach_lerp_(list(self.weights.values()), new, 1 - decay)
