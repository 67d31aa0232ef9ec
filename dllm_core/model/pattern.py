"""AttentionPattern: which family of objectives a forward serves. Torch-free, because costs and recipes ask it too.

| kind | a position sees | serves |
|---|---|---|
| full | every position | masked diffusion |
| causal | itself and what stands before it | autoregression |
| block_causal | its own block and the blocks before it | decoding block by block |
| block_diffusion | in [xt ; x0], noised: its own noised block and the clean blocks before it | training |
| | in [xt ; x0], clean: its own clean block and the clean blocks before it | |
"""

from dataclasses import dataclass
from typing import Literal

PatternKind = Literal["full", "causal", "block_causal", "block_diffusion"]


@dataclass(frozen=True)
class AttentionPattern:
    """A kind and, where it counts in blocks, their length in tokens.

    Blocks are counted from the first token of a document, or of the row where documents are not isolated; the last
    block of either may be short. `block_diffusion` is the training pass of `block_causal`: block b of the noised half
    gets the logits that it gets behind the clean blocks before it. BD3-LM, arXiv:2503.09573, section 3.2.
    """

    kind: PatternKind
    block_length: int | None = None

    def __post_init__(self) -> None:
        in_blocks = self.kind in ("block_causal", "block_diffusion")
        if in_blocks and (self.block_length is None or self.block_length < 1):
            raise ValueError(f"attention pattern {self.kind}: block_length must be at least 1, got {self.block_length}")
        if not in_blocks and self.block_length is not None:
            raise ValueError(f"attention pattern {self.kind}: takes no block_length, got {self.block_length}")

    @property
    def has_clean_half(self) -> bool:
        """Whether the input is [xt ; x0], twice as long as the row."""
        return self.kind == "block_diffusion"

    def num_pairs(self, length: int) -> int:
        """Pairs (query, key) that see each other in one row of `length` tokens that is one document."""
        if self.kind == "full":
            return length * length
        full_blocks, rest = divmod(length, self.block_length or 1)
        # Block j of b tokens has b queries with (j + 1) b keys each; the short last one sees the whole row.
        pairs = (self.block_length or 1) ** 2 * full_blocks * (full_blocks + 1) // 2 + rest * length
        return 2 * pairs if self.has_clean_half else pairs  # a noised block has as many keys as its clean twin


FULL = AttentionPattern("full")
CAUSAL = AttentionPattern("causal")


def training_pattern(block_length: int | None) -> AttentionPattern:
    """The pattern in which diffusion is trained and scored: whole rows, or [xt ; x0] in blocks."""
    return FULL if block_length is None else AttentionPattern("block_diffusion", block_length)
