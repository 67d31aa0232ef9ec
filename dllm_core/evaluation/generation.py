"""What decoding costs: tokens per denoiser call over completions of held-out prompts, and how varied they are."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from dllm_core.decoding.config import DecodeConfig
from dllm_core.decoding.engine import Engine
from dllm_core.decoding.request import Request
from dllm_core.seeding import Ints


@dataclass(frozen=True)
class DecodeCost:
    """Over all prompts: tokens per call is a ratio of sums. entropy: of the produced tokens, nats; a decoder that
    repeats itself is fast and has little.
    """

    prompts: int
    tokens: int
    calls: int
    entropy: float

    @property
    def tokens_per_call(self) -> float:
        """1 is autoregressive speed."""
        return self.tokens / max(self.calls, 1)


def measure_decoding(engine: Engine, rows: Ints, config: DecodeConfig, *, context: int, seed: int) -> DecodeCost:
    """Complete the first quarter of each row [N L] with `config`, cut to what the context holds."""
    quarter = rows.shape[1] // 4
    config = config.model_copy(update={"max_tokens": min(config.max_tokens, context - quarter)})
    requests = [
        Request(prompt=tuple(int(i) for i in row[:quarter]), config=config, seed=seed + i) for i, row in enumerate(rows)
    ]
    answers = engine.generate(requests)
    return DecodeCost(
        prompts=len(requests),
        tokens=sum(answer.num_committed for answer in answers),
        calls=sum(answer.num_calls for answer in answers),
        entropy=_entropy([token for answer in answers for token in answer.tokens]),
    )


def _entropy(tokens: Sequence[int]) -> float:
    counts = np.array(list(Counter(tokens).values()), dtype=np.float64)
    share = counts / max(counts.sum(), 1)
    return float((share * -np.log(share)).sum())
