"""Decoding with and without kept keys and values, autoregressive and block by block, of one network of random weights.

    python tests/benchmarks/decode.py [--tokens 256] [--prompt 32] [--rounds 3] [--threads 1]

One JSON line: new tokens a second (`ar`, `block`; `_kept` and `_computed`; batch 1 and 8), the ratio kept to computed,
and the calls a block took. Settings alternate within a round, and the best round counts, so that a neighbour's burst
does not. Autoregression is a call a token; blocks of 16 are decoded in 8 calls, two tokens each, so that random weights
cost what trained ones would at that rate.
"""

import argparse
import sys
import time

import numpy as np
import torch
from figures import tell
from random_model import random_denoiser

from dllm_core.decoding.config import DecodeConfig
from dllm_core.decoding.engine import Engine
from dllm_core.decoding.request import Request
from dllm_core.decoding.unmask import LowConfidencePolicy
from dllm_core.model.config import ModelConfig
from dllm_core.model.pattern import CAUSAL, AttentionPattern
from dllm_core.noise.absorbing import AbsorbingProcess

BLOCK, STEPS, VOCABULARY = 16, 8, 1024
MODEL = ModelConfig(dim=128, layers=4, heads=4, ffn_dim=384, tie_embeddings=False)
PATTERNS = {"ar": CAUSAL, "block": AttentionPattern("block_causal", BLOCK)}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--prompt", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    denoiser = random_denoiser(MODEL, VOCABULARY, options.prompt + options.tokens)
    rng = np.random.default_rng(0)
    config = DecodeConfig(
        policy=LowConfidencePolicy(), block_length=BLOCK, steps_per_block=STEPS, max_tokens=options.tokens
    )
    prompts = [tuple(map(int, rng.integers(3, VOCABULARY, options.prompt - i))) for i in range(8)]
    best: dict[str, float] = {}
    calls: dict[str, int] = {}

    def measure(kind: str, batch: int, keeps_keys: bool) -> None:
        requests = [Request(prompt, config) for prompt in prompts[:batch]]
        engine = Engine.over(denoiser, AbsorbingProcess(mask_id=0), pattern=PATTERNS[kind], keeps_keys=keeps_keys)
        begun = time.perf_counter()
        answers = engine.generate(requests)
        seconds = time.perf_counter() - begun
        assert all(len(answer.tokens) == options.tokens for answer in answers)
        name = f"{kind}_{'kept' if keeps_keys else 'computed'}_batch_{batch}"
        best[name] = max(best.get(name, 0.0), batch * options.tokens / seconds)
        calls[kind] = answers[0].num_calls

    for _ in range(options.rounds):
        for kind in PATTERNS:
            for batch in (1, 8):
                for keeps_keys in (True, False):
                    measure(kind, batch, keeps_keys)
    names = [f"{kind}_{{}}_batch_{batch}" for kind in PATTERNS for batch in (1, 8)]
    figures = {
        "tokens": options.tokens,
        "prompt": options.prompt,
        "threads": options.threads,
        **{f"tokens_per_s_{name}": round(value, 1) for name, value in best.items()},
        **{
            f"ratio_{name.format('kept')}": round(best[name.format("kept")] / best[name.format("computed")], 2)
            for name in names
        },
        **{f"calls_{kind}": number for kind, number in calls.items()},
    }
    tell("decode", **figures)


if __name__ == "__main__":
    sys.exit(main())
