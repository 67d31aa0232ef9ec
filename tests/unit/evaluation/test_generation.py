"""What decoding costs is counted, not estimated: tokens, calls and the entropy of what came out."""

import math
from collections import Counter

import numpy as np
import pytest
import torch

from dllm_core.decoding.config import DecodeConfig
from dllm_core.decoding.engine import Engine
from dllm_core.decoding.request import Request
from dllm_core.decoding.unmask import LowConfidencePolicy, ThresholdPolicy
from dllm_core.evaluation.generation import DecodeCost, measure_decoding
from dllm_core.model.config import DenoiserConfig, ModelConfig
from dllm_core.model.denoiser import Denoiser
from dllm_core.noise.absorbing import AbsorbingProcess

VOCABULARY, CONTEXT, MASK, PAD = 12, 24, 11, 10


def engine(eos_id: int, *, sharpness: float) -> Engine:
    """Over random weights; with sharpness 0 all tokens are equally likely, and the first of them is taken."""
    torch.manual_seed(2)
    model = ModelConfig(dim=16, layers=1, heads=2, ffn_dim=16, tie_embeddings=False)
    config = DenoiserConfig(
        model=model, vocab_size=VOCABULARY, context_length=CONTEXT, mask_id=MASK, eos_id=eos_id, pad_id=PAD
    )
    denoiser = Denoiser(config).eval()
    with torch.no_grad():
        denoiser.norm.weight.mul_(sharpness)
    return Engine.over(denoiser, AbsorbingProcess(mask_id=MASK), max_batch_tokens=100)


PROMPTS = np.random.default_rng(0).integers(1, 9, (5, 4)).tolist()
SLOW = DecodeConfig(policy=LowConfidencePolicy(), block_length=4, steps_per_block=2, max_tokens=8)


def test_a_decoder_that_repeats_itself_commits_all_in_the_calls_of_its_policy_and_has_no_entropy():
    cost = measure_decoding(engine(9, sharpness=0), PROMPTS, SLOW, context=CONTEXT, seed=0)
    assert cost == DecodeCost(prompts=5, tokens=5 * 8, calls=5 * 4, entropy=0.0)
    assert cost.tokens_per_call == 2.0


def test_an_end_token_counts_and_nothing_behind_it():
    """All answers are one end token: the first call commits it, and no call is made for what stands behind."""
    cost = measure_decoding(engine(0, sharpness=0), PROMPTS, SLOW, context=CONTEXT, seed=0)
    assert cost == DecodeCost(prompts=5, tokens=5, calls=5, entropy=0.0)


@pytest.mark.parametrize("policy", [LowConfidencePolicy(), ThresholdPolicy(threshold=0.2)])
@pytest.mark.parametrize("temperature", [0.7, 1.0])
def test_counts_are_the_sums_over_completions_of_all_prompts(policy, temperature):
    config = DecodeConfig(policy=policy, block_length=4, steps_per_block=4, max_tokens=9, temperature=temperature)
    cost = measure_decoding(engine(9, sharpness=1), PROMPTS, config, context=CONTEXT, seed=3)
    answers = [
        engine(9, sharpness=1).generate([Request(prompt=tuple(prompt), config=config, seed=3 + i)])[0]
        for i, prompt in enumerate(PROMPTS)
    ]
    assert cost.prompts == 5
    assert cost.tokens == sum(answer.num_committed for answer in answers)
    assert cost.calls == sum(answer.num_calls for answer in answers)
    assert cost.tokens_per_call == cost.tokens / cost.calls
    counts = Counter(token for answer in answers for token in answer.tokens)
    total = sum(counts.values())
    assert cost.entropy == pytest.approx(-sum(n / total * math.log(n / total) for n in counts.values()))
    assert cost.entropy > 0.5


def test_a_completion_is_cut_to_what_the_context_holds():
    long = SLOW.model_copy(update={"max_tokens": 99})
    cost = measure_decoding(engine(9, sharpness=0), PROMPTS, long, context=10, seed=0)
    assert cost.tokens == 5 * (10 - 4)


def test_no_prompts_cost_nothing():
    cost = measure_decoding(engine(9, sharpness=0), [], SLOW, context=CONTEXT, seed=0)
    assert cost == DecodeCost(prompts=0, tokens=0, calls=0, entropy=0.0)
    assert cost.tokens_per_call == 0
