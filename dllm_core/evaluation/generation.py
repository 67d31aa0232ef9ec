"""What decoding costs: tokens per denoiser call over completions of held-out prompts, and how varied they are."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from dllm_core.decoding.config import DecodeConfig
from dllm_core.decoding.engine import Engine
from dllm_core.decoding.request import Request
from dllm_core.evaluation.likelihood import unigram_entropy
from dllm_core.evaluation.writers import Tokens


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


def measure_decoding(
    engine: Engine, prompts: Sequence[Tokens], config: DecodeConfig, *, context: int, seed: int
) -> DecodeCost:
    """Complete prompts, each shorter than the context, with `config`; an answer is cut to what the context holds."""
    requests = []
    for number, prompt in enumerate(prompts):
        room = min(config.max_tokens, context - len(prompt))
        requests.append(Request(tuple(prompt), config.model_copy(update={"max_tokens": room}), seed=seed + number))
    answers = engine.generate(requests)
    counts = np.array(list(Counter(token for answer in answers for token in answer.tokens).values()), np.int64)
    return DecodeCost(
        prompts=len(requests),
        tokens=sum(answer.num_committed for answer in answers),
        calls=sum(answer.num_calls for answer in answers),
        entropy=unigram_entropy(counts),
    )
