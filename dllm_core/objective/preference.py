"""Preference: the better of two answers gains on the other one, measured from the weights that training starts from.

VRPO of LLaDA 1.5, arXiv:2505.19223. A diffusion's likelihood is not at hand, its bound is drawn; what varies inside
the sigmoid costs bias as well. So policy and reference are shown the same masks, and each draw has a time of its own.
"""

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import softplus

from dllm_core.data.batch import Batch
from dllm_core.model import visibility
from dllm_core.model.pattern import training_pattern
from dllm_core.noise.exact_count import exact_counts
from dllm_core.objective.config import PreferenceConfig
from dllm_core.objective.loss import DenoiserLike, LossSum, Rows
from dllm_core.objective.vocabulary import nll
from dllm_core.seeding import Bools, Doubles, Ints, Purpose, uniforms64


@dataclass(frozen=True)
class Margins:
    """Of B pairs, fp32 [B], each the mean over draws.

    gain: (log pi(y_w) - log ref(y_w)) - (log pi(y_l) - log ref(y_l)) of the answers' bounds, nats; chosen_nats: the
    policy's bound of -log pi(y_w).
    """

    gain: Tensor
    chosen_nats: Tensor


class Preference:
    """-log sigmoid(beta gain), a pair; DPO's loss (arXiv:2305.18290, eq. 7) on bounds.

    A batch's rows are pairs (`packing.type: pairs`): the first document ends with the chosen answer, the second with
    the rejected one, and only answers are counted. Bounds are estimated by exact counts (`exact_counts`), whose spread
    is below that of masks at drawn times. Draw j of `draws` has its time from the j-th of as many strata, and one mask,
    which the paper finds the best use of a budget. Time and uniforms of a place are the same for both answers.

    Draws are a pure function of (seed, sample counter, draw): a corpus's written noise says nothing of them.
    reference: never trained, and asked without a graph. It and the policy are asked for all draws in one forward, whose
    activations are those of `draws` times the batch: `micro_rows` cuts them.

    passes: the policy's over the chosen answers, which alone are told as counted tokens, and over rejected ones taken
    to be as long. The reference's forwards, a third as much again, are in no figure of utilisation.
    """

    def __init__(
        self,
        config: PreferenceConfig,
        reference: DenoiserLike,
        mask_id: int,
        device: torch.device,
        *,
        seed: int,
        block_length: int | None = None,
    ) -> None:
        self._config, self._reference, self._mask_id = config, reference, mask_id
        self._device, self._seed, self._block_length = device, seed, block_length
        self.pattern = training_pattern(block_length)
        self.passes = 2 * config.draws

    def loss(self, denoiser: DenoiserLike, batch: Batch) -> LossSum:
        """Sums over pairs. The bound is of chosen answers, and so are the tokens told."""
        margins = self.margins(denoiser, batch)
        tokens = (batch.loss_mask & (documents(batch) == 0)).sum(1)
        reward = self._config.beta * margins.gain
        nats = softplus(-reward).sum()
        preferred = torch.stack([(reward > 0).float().sum(), reward.detach().sum()])
        if self._config.sft_weight:
            nats = nats + self._config.sft_weight * (margins.chosen_nats / self._moved(tokens).clamp(min=1)).sum()
        bound = margins.chosen_nats.detach().sum()
        return LossSum(nats, bound, int(tokens.sum()), self.divisor(batch), preferred=preferred)

    def divisor(self, batch: Batch) -> float:
        """The number of pairs."""
        return float(len(batch.x0))

    def margins(self, denoiser: DenoiserLike, batch: Batch) -> Margins:
        """What the loss is made of, with the policy's graph."""
        draws, rows = self._config.draws, Rows.of(batch, self._device)
        shown, weights = zip(*(self.masks(batch, draw) for draw in range(draws)), strict=True)
        read, x0 = self._moved(np.concatenate(shown)), rows.x0.repeat(draws, 1)
        xt = x0.masked_fill(read, self._mask_id)
        given = torch.cat([xt, x0], dim=1) if self.pattern.has_clean_half else xt
        attention = {name: part.repeat(draws, 1) for name, part in rows.attention.items()}

        def cost(asked: DenoiserLike) -> Tensor:
            return nll(asked(given, read=read, pattern=self.pattern, **attention), x0[read], self._mask_id)

        policy = cost(denoiser)
        with torch.no_grad():  # in inference mode ZeRO would keep tensors that cannot be trained
            reference = cost(self._reference)
        weight = self._moved(np.concatenate(weights).astype(np.float32))
        sides = self._moved(documents(batch)).repeat(draws, 1)

        def of_pairs(values: Tensor, signs: Tensor) -> Tensor:
            """Sums over each row, so that a pair's digits do not depend on its neighbours; the mean over draws."""
            spread = torch.zeros(read.shape, device=self._device).masked_scatter(read, weight * values)
            return (spread * signs).sum(1).view(draws, -1).mean(0)

        is_chosen = (sides == 0).float()
        # Token by token: of two sums over an answer, fp32 would lose the digits in which they differ.
        return Margins(of_pairs(reference - policy, is_chosen - (sides == 1).float()), of_pairs(policy, is_chosen))

    def masks(self, batch: Batch, draw: int) -> tuple[Bools, Doubles]:
        """Where a draw masks [B L], and what each mask weighs [masks], row by row."""
        sides, offset = documents(batch), offsets(batch)
        block = np.zeros_like(offset) if self._block_length is None else offset // self._block_length
        blocks = int(block.max(initial=0)) + 1
        share = uniforms64(self._seed, Purpose.PREFERENCE_STRATUM, draw, batch.counters, blocks)
        shares = np.tile((draw + share) / self._config.draws, 2)
        u = uniforms64(self._seed, Purpose.PREFERENCE, draw, batch.counters, offset.shape[1])
        units = np.where(batch.loss_mask, sides * blocks + block, 0)
        return exact_counts(batch.loss_mask, units, shares, np.take_along_axis(u, offset, axis=1))

    def _moved(self, array: NDArray[np.generic]) -> Tensor:
        return torch.from_numpy(array).to(self._device)


def documents(batch: Batch) -> Ints:
    """Which document of its row a token is of [B L]: 0 the chosen, 1 the rejected, above that filler."""
    assert batch.segment_ids is not None
    return (batch.segment_ids - batch.segment_ids[:, :1]).astype(np.int64)


def offsets(batch: Batch) -> Ints:
    """How far each token [B L] stands from its document's first."""
    labels = [torch.from_numpy(batch.segment_ids)]
    found: Ints = visibility.offsets(labels, batch.x0.shape[1], labels[0].device).numpy()
    return found
