"""A denoiser of random weights and requests that share a batch: what holds for them holds for trained ones."""

import torch
from hypothesis import strategies as st

from dllm_core.decoding.config import DecodeConfig
from dllm_core.decoding.engine import Engine
from dllm_core.decoding.request import Request
from dllm_core.decoding.revise import AncestralPolicy, EditingPolicy, RemaskingPolicy
from dllm_core.decoding.unmask import (
    EntropyPolicy,
    FactorPolicy,
    LowConfidencePolicy,
    MarginPolicy,
    RandomPolicy,
    ThresholdPolicy,
)
from dllm_core.model.config import DenoiserConfig, ModelConfig
from dllm_core.model.denoiser import Denoiser
from dllm_core.noise.absorbing import AbsorbingProcess

VOCABULARY, CONTEXT, MASK, EOS, PAD = 23, 48, 0, 1, 2
PROCESS = AbsorbingProcess(mask_id=MASK)

tokens = st.lists(st.integers(3, VOCABULARY - 1), max_size=9).map(tuple)
ranked = st.sampled_from([LowConfidencePolicy, MarginPolicy, EntropyPolicy])
policies = st.one_of(
    st.floats(0.05, 1).map(lambda x: ThresholdPolicy(threshold=x)),
    st.builds(lambda kind, heat: kind(position_temperature=heat), ranked, st.sampled_from([0.0, 0.0, 0.3])),
    st.builds(FactorPolicy, factor=st.floats(0.1, 4), takes_last=st.booleans()),
    st.just(RandomPolicy()),
)
revising = st.one_of(
    st.just(AncestralPolicy()),
    st.builds(RemaskingPolicy, eta=st.floats(0, 1), strategy=st.sampled_from(["cap", "rescale"])),
    st.builds(
        EditingPolicy, threshold=st.floats(0.05, 1), edit_threshold=st.floats(0.05, 1), max_edits=st.integers(0, 3)
    ),
)
caches = st.sampled_from(["none", "prefix", "dual"])


def new_denoiser(*, is_tied: bool = True, time_conditioning: bool = False, shifted: bool = False) -> Denoiser:
    """is_tied: a head that is the embedding prefers the token it was shown, so that left to right it repeats itself."""
    torch.manual_seed(0)
    config = DenoiserConfig(
        model=ModelConfig(
            dim=32,
            layers=2,
            heads=2,
            ffn_dim=48,
            tie_embeddings=is_tied,
            time_conditioning=time_conditioning,
            shifted=shifted,
        ),
        vocab_size=VOCABULARY,
        context_length=CONTEXT,
        mask_id=MASK,
        eos_id=EOS,
        pad_id=PAD,
    )
    model = Denoiser(config).eval()
    with torch.no_grad():
        model.head.weight.mul_(3)  # sharper predictions, so that thresholds and end tokens come into play
        for weight in () if model.time is None else model.time.parameters():
            weight.normal_(std=0.3)  # t plays no part in a new model
    return model


def new_engine(denoiser: Denoiser, max_batch_tokens: int = 300, **options: object) -> Engine:
    return Engine.over(denoiser, PROCESS, max_batch_tokens, **options)


@st.composite
def requests(
    draw: st.DrawFn,
    block_length: int | None = None,
    prompts: st.SearchStrategy = tokens,
    suffixes: st.SearchStrategy = tokens,
    policies: st.SearchStrategy = policies,
    guidance: bool = True,
) -> Request:
    block = block_length or draw(st.integers(1, 12))
    cache = draw(caches)
    config = DecodeConfig(
        policy=draw(policies),
        quota=draw(st.sampled_from(["even", "by_time"])),
        cache=cache,
        guidance=draw(st.sampled_from([0.0, 0.0, 0.5, 2.0])) if guidance else 0.0,
        grow_by=draw(st.none() | st.integers(1, 9)),
        refresh_every=None if cache == "none" else draw(st.none() | st.integers(1, 4)),
        top_k=draw(st.none() | st.integers(1, 5)),
        block_length=block,
        steps_per_block=draw(st.integers(1, block)),
        max_tokens=draw(st.integers(1, 24)),
        temperature=draw(st.sampled_from([0.0, 0.7, 1.5])),
        top_p=draw(st.sampled_from([1.0, 0.8])),
    )
    return Request(prompt=draw(prompts), suffix=draw(suffixes), config=config, seed=draw(st.integers(0, 2**40)))
