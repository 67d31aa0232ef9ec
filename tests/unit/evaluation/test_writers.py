"""Laws of writing on: the engine answers as it serves, and each prompt by itself."""

import pytest
import torch

from dllm_core.decoding.config import DecodeConfig
from dllm_core.decoding.engine import Engine
from dllm_core.decoding.request import Request
from dllm_core.errors import RequestError
from dllm_core.evaluation.writers import EngineWriter, Written
from dllm_core.model.config import DenoiserConfig, ModelConfig
from dllm_core.model.denoiser import Denoiser
from dllm_core.noise.absorbing import AbsorbingProcess

VOCABULARY, MASK, EOS, PAD = 7, 2, 0, 6
PROMPTS = [(1, 3, 4), (), (5,), (1,) * 14, (3, 3), (4, 5, 1, 3)]


@pytest.fixture(scope="module")
def denoiser() -> Denoiser:
    """Random, with answers that hang on what is seen, and an end now and then."""
    torch.manual_seed(5)
    model = ModelConfig(dim=16, layers=2, heads=2, ffn_dim=16, tie_embeddings=False)
    config = DenoiserConfig(model=model, vocab_size=VOCABULARY, context_length=32, mask_id=MASK, eos_id=EOS, pad_id=PAD)
    found = Denoiser(config).eval()
    with torch.no_grad():
        for block in found.blocks:
            block.attention.out.weight.mul_(6)
    return found


def test_an_answer_is_the_same_alone_and_in_any_batch(denoiser):
    decode = DecodeConfig(block_length=4, steps_per_block=2, temperature=1.0)
    writer = EngineWriter(Engine.over(denoiser, AbsorbingProcess(mask_id=MASK)), decode)
    rooms = [9 - i % 3 for i in range(len(PROMPTS))]
    for max_tokens, own in ((9, [9] * len(PROMPTS)), (rooms, rooms)):
        together = writer.write(PROMPTS, max_tokens, seed=40)
        alone = [writer.write([p], own[i], seed=40 + i)[0] for i, p in enumerate(PROMPTS)]
        assert together == alone
        assert all(one.num_committed <= room for one, room in zip(together, own, strict=True))
    assert len({tuple(one.tokens) for one in together}) > 3


def test_the_engine_writes_what_it_serves_and_refuses_what_does_not_fit(denoiser):
    decode = DecodeConfig(max_tokens=30, block_length=4, steps_per_block=2, temperature=1.0)
    engine = Engine.over(denoiser, AbsorbingProcess(mask_id=MASK))
    written = EngineWriter(engine, decode).write(PROMPTS, 8, seed=6)
    served = decode.model_copy(update={"max_tokens": 8})
    for i, (prompt, one) in enumerate(zip(PROMPTS, written, strict=True)):
        [answer] = engine.generate([Request(prompt=prompt, config=served, seed=6 + i)])
        assert one == Written(answer.tokens, answer.num_committed, answer.num_calls)
    with pytest.raises(RequestError, match="context of 32"):
        EngineWriter(engine, decode).write(PROMPTS, 20, seed=6)
