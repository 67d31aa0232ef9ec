"""Denoiser: noised ids -> logits over clean ids, each position seeing what the AttentionPattern lets it see."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from dllm_core.model.attention import Attention, JoinedRows, JoinedStrips, Strip, rope_tables
from dllm_core.model.cache import KeyValues, LayerKeyValues, NewPositions
from dllm_core.model.conditioning import TimeConditioning, modulated
from dllm_core.model.config import DenoiserConfig, ModelConfig
from dllm_core.model.experts import MixtureOfExperts
from dllm_core.model.layers import MIN_ROWS, Embedding, Linear, RMSNorm, SwiGLU, pad_rows
from dllm_core.model.pattern import FULL, AttentionPattern
from dllm_core.model.recorder import Recorder
from dllm_core.model.visibility import predecessors, told_by_previous, visible_keys

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask

_LONGEST_TABLE = 8192  # positions that are prepared for unasked: contexts of 131,072 would take 134 MB


class Block(nn.Module):
    """x + attention(norm(x)), then x + ffn(norm(x))."""

    def __init__(self, config: ModelConfig, number: int) -> None:
        super().__init__()
        self.norm1 = RMSNorm(config.dim, config.norm_eps)
        self.attention = Attention(config)
        self.norm2 = RMSNorm(config.dim, config.norm_eps)
        self.ffn: SwiGLU | MixtureOfExperts
        if config.experts is not None and config.has_experts(number):
            self.ffn = MixtureOfExperts(config, config.experts)
        else:
            self.ffn = SwiGLU(config.dim, config.ffn_dim, scale=(2 * config.layers) ** -0.5)

    def forward(
        self,
        x: Tensor,
        cos: Tensor,
        sin: Tensor,
        attention: "Tensor | BlockMask | None",
        is_causal: bool,
        modulation: Tensor | None,
        cache: LayerKeyValues | JoinedRows | None = None,
        read: Tensor | None = None,
    ) -> Tensor:
        """[B L D] -> [B L D]. modulation: [B L|1 6D], shift, scale and gate of either half.

        read: int64 [n], of a last block without modulation: only at those of the B L positions is more computed than
        keys and values, and the result is [1 n D], padded to MIN_ROWS.
        """
        if modulation is None:
            mixed = self.attention(self.norm1(x), cos, sin, attention, is_causal, cache)
            if read is not None:
                x, mixed = (pad_rows(part.flatten(0, 1)[read])[None] for part in (x, mixed))
            return self.behind(x, mixed)
        shift1, scale1, gate1, shift2, scale2, gate2 = modulation.chunk(6, dim=-1)
        mixed = self.attention(modulated(self.norm1(x), shift1, scale1), cos, sin, attention, is_causal, cache)
        x = x + (1 + gate1) * self.attention.out(mixed)
        out: Tensor = x + (1 + gate2) * self.ffn(modulated(self.norm2(x), shift2, scale2))
        return out

    def before(self, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """What attention mixes of x [B L D], as `Attention.projected`."""
        return self.attention.projected(self.norm1(x), cos, sin)

    def behind(self, x: Tensor, mixed: Tensor) -> Tensor:
        """The block's result [B L D] of x and what its attention has mixed."""
        x = x + self.attention.out(mixed)
        out: Tensor = x + self.ffn(self.norm2(x))
        return out


@dataclass(frozen=True)
class Part:
    """What a forward is given of rows that are of one width: input_ids, is_real [B W]; read int64 [n], of the B W."""

    input_ids: Tensor
    is_real: Tensor
    read: Tensor
    cache: KeyValues | None = None


class Denoiser(nn.Module):
    """x_theta(xt) or, with `model.time_conditioning`, x_theta(xt, t).

    For absorbing noise the masks themselves tell t (MDLM, section 3.3); where noise is made of tokens, t helps.
    checkpoints_blocks: keep each block's input for the backward alone, and compute the rest again: memory for time.
    recorder: what runs forwards over kept keys, where it can; who decodes sets it.
    made: is shown each part (the embedding, a block, the head, ...) as soon as it has its weights and before the next
    one is made, so that who holds but a share of them can let go of the rest: a whole model need never exist.
    """

    checkpoints_blocks = False
    recorder: Recorder | None = None

    def __init__(self, config: DenoiserConfig, made: Callable[[nn.Module], None] = lambda part: None) -> None:
        super().__init__()
        model = config.model
        self.config = config
        self.embed = Embedding(config.vocab_size, model.dim, model.dim**-0.5 if model.tie_embeddings else 1.0)
        made(self.embed)
        self.blocks = nn.ModuleList()
        for number in range(model.layers):
            self.blocks.append(Block(model, number))
            made(self.blocks[number])
        self.norm = RMSNorm(model.dim, model.norm_eps)
        self.head = Linear(model.dim, config.vocab_size)
        if model.tie_embeddings:
            self.head.weight = self.embed.weight
        made(self.norm)
        made(self.head)
        # Made last: from one seed, all other weights are those of the unconditioned model.
        self.time = TimeConditioning(model) if model.time_conditioning else None
        if self.time is not None:
            made(self.time)
        self._tables: tuple[Tensor, Tensor] | None = None

    def forward(
        self,
        input_ids: Tensor,
        is_real: Tensor | None = None,
        read: Tensor | None = None,
        segment_ids: Tensor | None = None,
        *,
        pattern: AttentionPattern = FULL,
        positions: Tensor | None = None,
        t: Tensor | None = None,
        cache: KeyValues | None = None,
    ) -> Tensor:
        """Logits for input_ids [B L]; under `block_diffusion` for the noised half of input_ids [B 2L] = [xt ; x0].

        All else is about a row's L tokens, whose two halves are alike. is_real: bool [B L], False at padding, which
        no real position sees. read: bool [B L], or rising int64 [n] of the B L positions, for which no GPU is waited;
        then the head runs at those only and the result is [n V], else [B L V]. segment_ids: int [B L]; a position sees
        its own segment only. positions: int [L] or [B L], by default 0 to L - 1. They need not restart: RoPE tells
        distances alone. t: [B] or [B L] in [0, 1], with `time_conditioning` only; the clean half is at t = 0. Logits at
        i are of token i, also where `model.shifted` has the position before tell it; under `causal`, of what the caller
        takes them to be.

        With a cache, whose rows are the batch's, the L tokens stand behind what is kept of each row: they see that too,
        positions count on from it, padding stands at their end, and the result is what a whole forward gives at them.
        `cache.commit` then keeps of them what is settled. Under `full` they stand where the cache says, and see kept
        keys of all other positions; shifted, the first of them tells itself. is_real may be on the host, where it is
        read. Without gradients.

        Raises ValueError for a t that is missing or of no use, a [xt ; x0] of odd length, and what has no cache.
        """
        if cache is not None:
            return self._continued(cache, input_ids, is_real, read, segment_ids, pattern, positions, t)
        length = input_ids.shape[1]
        if pattern.has_clean_half:
            length, odd = divmod(length, 2)
            if odd:
                raise ValueError(f"input_ids: block diffusion takes [xt ; x0], of even length, got {2 * length + 1}")
        is_causal = pattern.kind == "causal" and is_real is None and segment_ids is None
        attention = None if is_causal else self._visible(pattern, length, is_real, segment_ids)
        cos, sin = self._rope(length, input_ids.device, positions, 2 if pattern.has_clean_half else 1)
        x = self.embedded(input_ids)
        *of_blocks, of_norm = self._modulations(t, length, pattern, x.dtype)
        last = self._read_by_last(read, pattern)
        x = self._through_blocks(x, (cos, sin, attention, is_causal), of_blocks, None, last)
        if last is not None:
            return self._logits_of(x, last)
        if self.config.model.shifted and pattern.kind != "causal":
            teller = predecessors(pattern, length, x.device, is_real, segment_ids)
            x = x.take_along_dim(teller[..., None], dim=1)
        return self.logits_at(x[:, :length], read, of_norm)

    def _continued(
        self,
        cache: KeyValues,
        input_ids: Tensor,
        is_real: Tensor | None,
        read: Tensor | None,
        segment_ids: Tensor | None,
        pattern: AttentionPattern,
        positions: Tensor | None,
        t: Tensor | None,
    ) -> Tensor:
        """Logits at the new positions input_ids [B n], behind what the cache keeps."""
        if segment_ids is not None or torch.is_grad_enabled():
            raise ValueError("cache: is for inference, torch.no_grad() or inference_mode(), on rows of one document")
        if self.config.model.shifted and pattern.kind == "block_causal":
            raise ValueError("cache: a block's first token is told by the position before it, which no cache keeps")
        rows, width = input_ids.shape
        new = cache.open(pattern, width, is_real)
        is_shifted = self.config.model.shifted and pattern.kind == "full"
        if positions is None:
            tables = self._rope(new.reach, input_ids.device)
            if self.recorder is not None:
                logits = self.recorder(input_ids, new, read, tables, is_shifted=is_shifted)
                if logits is not None:
                    return logits
            cos, sin = (table[new.offsets][:, None] for table in tables)
        else:
            cos, sin = self._rope(width, input_ids.device, positions)
        missing = max(0, -(-MIN_ROWS // width) - rows)  # rows of padding, so that no matrix product has too few
        if missing:
            input_ids = functional.pad(input_ids, (0, 0, 0, missing))
            t = None if t is None else functional.pad(t, (*(0, 0) * (t.ndim - 1), 0, missing))
        x = self.embedded(input_ids)
        *of_blocks, of_norm = self._modulations(t, width, pattern, x.dtype)
        last = self._read_by_last(read, pattern)
        x = self._through_blocks(x, (cos, sin, new.attention, False), of_blocks, new, last)
        if last is not None:
            return self._logits_of(x, last)
        if is_shifted:
            x = told_by_previous(x)
        if read is None:
            return self.logits_at(x, None, of_norm)[:rows]
        return self.logits_at(x[:rows], read, None if of_norm is None else of_norm[:rows])

    def _visible(
        self, pattern: AttentionPattern, length: int, is_real: Tensor | None, segment_ids: Tensor | None
    ) -> "Tensor | BlockMask | None":
        """Who sees whom: a table [B|1 1 Q|1 K], or in training on a GPU tiles of it; None where all see all."""
        if self.device.type == "cuda" and torch.is_grad_enabled():
            from dllm_core.model.flex import has_tiles, visible_tiles  # a second that a CPU need not pay

            if has_tiles(self.device, self.config.model.head_dim):
                return visible_tiles(pattern, length, self.device, is_real, segment_ids)
        table = visible_keys(pattern, length, self.device, is_real, segment_ids)
        return None if table is None else table[:, None]

    @property
    def can_join(self) -> bool:
        """Whether `together` is for it: one that is not told t, and whose logits are not shifted."""
        return self.time is None and not self.config.model.shifted

    def together(self, parts: Sequence[Part], pattern: AttentionPattern = FULL) -> Tensor:
        """Logits [n V] where each part reads, part after part: to the bit what a forward of each gives, without
        gradients. Every weight is read once and meets all positions; attention alone is done part by part.
        """
        strips: list[Strip] = []
        tables: list[tuple[Tensor, Tensor]] = []
        for part in parts:
            shape = (part.input_ids.shape[0], part.input_ids.shape[1])
            if part.cache is None:
                seen = visible_keys(pattern, shape[1], part.input_ids.device, part.is_real)
                strips.append(Strip(shape, None if seen is None else seen[:, None], None))
                at = torch.arange(shape[1], device=part.input_ids.device).expand(shape)
                cos, sin = self._rope(shape[1], part.input_ids.device)
            else:
                new = part.cache.open(pattern, shape[1], part.is_real)
                strips.append(Strip(shape, new.attention, new))
                at = new.offsets
                cos, sin = self._rope(new.reach, part.input_ids.device)
            tables.append((cos[at.flatten()], sin[at.flatten()]))
        ids = torch.cat([part.input_ids.flatten() for part in parts])
        missing = max(0, MIN_ROWS - len(ids))
        cos, sin = (functional.pad(torch.cat(both), (0, 0, 0, missing)) for both in zip(*tables, strict=True))
        x = self.embedded(functional.pad(ids, (0, missing)))[None]
        ends = accumulate((part.input_ids.numel() for part in parts), initial=0)
        read = torch.cat([part.read + begin for part, begin in zip(parts, ends, strict=False)])
        untold = [None] * len(self.blocks)
        x = self._through_blocks(x, (cos, sin, None, False), untold, JoinedStrips(strips), read)
        return self._logits_of(x, read)

    def _through_blocks(
        self,
        x: Tensor,
        sights: "tuple[Tensor, Tensor, Tensor | BlockMask | None, bool]",
        modulations: Sequence[Tensor | None],
        kept: NewPositions | JoinedStrips | None,
        last: Tensor | None,
    ) -> Tensor:
        """[B L D] -> [B L D], or [1 n D], padded, where `last` says which positions the last block is wanted at.

        sights: what `Block` takes as cos, sin, attention and is_causal, the same for all.
        """
        for number, (block, modulation) in enumerate(zip(self.blocks, modulations, strict=True)):
            layer = None if kept is None else kept.layer(number)
            given = (x, *sights, modulation, layer, last if number == len(self.blocks) - 1 else None)
            if self.checkpoints_blocks and torch.is_grad_enabled():
                x = checkpoint(block, *given, use_reentrant=False, preserve_rng_state=False)  # nothing draws
            else:
                x = block(*given)
        return x

    def embedded(self, input_ids: Tensor) -> Tensor:
        """[B L] -> [B L D], of about unit size."""
        model = self.config.model
        is_scaled = model.tie_embeddings and model.scale_embeddings
        embedded: Tensor = self.embed(input_ids) * (model.dim**0.5 if is_scaled else 1.0)
        return embedded

    def _modulations(
        self, t: Tensor | None, length: int, pattern: AttentionPattern, dtype: torch.dtype
    ) -> list[Tensor | None]:
        """What t gives to each block [B L|2L|1 6D] and the last norm [B L|2L|1 2D]; None where time plays no part."""
        if self.time is None:
            if t is not None:
                raise ValueError("t: the denoiser takes none, its model.time_conditioning is false")
            return [None] * (len(self.blocks) + 1)
        if t is None:
            raise ValueError("t: missing, the denoiser's model.time_conditioning is true")
        t = t[:, None] if t.ndim == 1 else t
        if pattern.has_clean_half:
            t = t.expand(-1, length)
            t = torch.cat([t, torch.zeros_like(t)], dim=1)
        return [part.to(dtype) for part in self.time(t)]  # the type of x: bf16 would round 1 + 0.003 to 1

    def _read_by_last(self, read: Tensor | None, pattern: AttentionPattern) -> Tensor | None:
        """int64 [n]: where the last block need do more than make keys and values; None for everywhere.

        To the bit the same, since a row of a product does not know how many others there are. In inference alone: in
        training the positions are as many as noise makes them, and a compiled block would be compiled anew for each.
        """
        if self.time is not None or pattern.has_clean_half or not torch.is_inference_mode_enabled():
            return None
        if read is None or (self.config.model.shifted and pattern.kind != "causal"):
            return None
        return read if read.dtype == torch.int64 else read.flatten().nonzero()[:, 0]

    def _logits_of(self, x: Tensor, read: Tensor) -> Tensor:
        """The head at what the last block has computed, [1 n D] padded -> [n V]."""
        return self.logits_at(x, None, None)[0, : len(read)]

    def logits_at(self, x: Tensor, read: Tensor | None, modulation: Tensor | None = None) -> Tensor:
        """The head at x [B L D], or where `read` says. modulation: [B L|1 2D], shift and scale."""
        if modulation is not None:
            modulation = modulation[:, : x.shape[1]].expand(-1, x.shape[1], -1)
        if read is not None:
            at = read if read.dtype == torch.bool else (read // x.shape[1], read % x.shape[1])
            x, modulation = x[at], None if modulation is None else modulation[at]
        x = self.norm(x)
        if modulation is not None:
            x = modulated(x, *modulation.chunk(2, dim=-1))
        logits: Tensor = self.head(x if read is None else pad_rows(x))
        # A slice of all would still cost its backward a copy of the gradient.
        return logits if read is None or len(logits) == len(x) else logits[: len(x)]

    def _rope(
        self, length: int, device: torch.device, positions: Tensor | None = None, halves: int = 1
    ) -> tuple[Tensor, Tensor]:
        """(cos, sin) for every position of the input; those of 0 to L - 1 are kept for as long as they fit."""
        model = self.config.model
        if positions is None:
            tables = self._tables  # another thread may put shorter ones there at any time
            if tables is None or tables[0].shape[0] < length or tables[0].device != device:
                longest = max(length, min(self.config.context_length, _LONGEST_TABLE))
                with torch.inference_mode(False):  # else a model that was evaluated first could not be trained
                    every = torch.arange(longest, device=device)
                    tables = self._tables = rope_tables(every, model.rope_dim, model.rope_theta)
            cos, sin = (table[:length] for table in tables)
        else:
            cos, sin = rope_tables(positions, model.rope_dim, model.rope_theta)
            if positions.ndim == 2:
                cos, sin = cos[:, None], sin[:, None]
        return (cos, sin) if halves == 1 else (torch.cat([cos, cos], dim=-2), torch.cat([sin, sin], dim=-2))

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.embed.weight.device
