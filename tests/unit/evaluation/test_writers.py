"""Laws of writing on: autoregression draws from the law that its scorer knows; the engine answers as it serves."""

import itertools
from collections import Counter

import numpy as np
import pytest
import torch

from dllm_core.decoding.config import DecodeConfig
from dllm_core.decoding.engine import Engine
from dllm_core.decoding.request import Request
from dllm_core.errors import RequestError
from dllm_core.evaluation.scorers import AutoregressiveScorer
from dllm_core.evaluation.writers import CausalWriter, EngineWriter, Written
from dllm_core.model.config import DenoiserConfig, ModelConfig
from dllm_core.model.denoiser import Denoiser
from dllm_core.model.pattern import CAUSAL
from dllm_core.noise.absorbing import AbsorbingProcess

CPU = torch.device("cpu")
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


def causal(denoiser, **options) -> CausalWriter:
    return CausalWriter(denoiser, MASK, CPU, **{"end_id": EOS, "never": (PAD,), **options})


def test_the_likeliest_token_each_time_up_to_the_end(denoiser):
    ended = 0
    for prompt, answer in zip(PROMPTS, causal(denoiser).write(PROMPTS, 12, seed=0), strict=True):
        text = list(prompt)
        while len(text) < len(prompt) + 12 and EOS not in text[len(prompt) :]:
            with torch.inference_mode():
                logits = denoiser(torch.tensor([[MASK, *text]]), pattern=CAUSAL)[0, -1].numpy().copy()
            logits[[MASK, PAD]] = -np.inf
            text.append(int(logits.argmax()))
        committed = len(text) - len(prompt)
        ended += EOS in text[len(prompt) :]
        tokens = [token for token in text[len(prompt) :] if token != EOS]
        assert answer == Written(tokens, committed, committed)
    assert 0 < ended < len(PROMPTS), "some end, some do not"


def test_drawn_texts_come_as_often_as_the_scorer_says(denoiser):
    """All texts of two tokens behind a prompt, over 6000 seeds."""
    prompt, count = (3, 5), 6000
    writer = causal(denoiser, end_id=None, temperature=1.0, never=(), batch_rows=6000)
    drawn = Counter(tuple(one.tokens) for one in writer.write([prompt] * count, 2, seed=7))
    texts = list(itertools.product([i for i in range(VOCABULARY) if i != MASK], repeat=2))
    rows = np.array([[*prompt, *text] for text in texts])
    scorer = AutoregressiveScorer(denoiser, MASK, CPU, name="itself", batch_rows=64)
    law = np.exp(-scorer.nats(rows, np.ones(rows.shape, bool))[:, 2:].sum(1))
    assert law.sum() == pytest.approx(1, abs=1e-5)
    found = np.array([drawn[text] for text in texts])
    assert found.sum() == count
    assert (abs(found - count * law) < 5 * np.sqrt(count * law) + 2).all()
    assert law.max() < 0.6, "not one text alone"


def test_a_low_temperature_is_greedy_and_seeds_differ(denoiser):
    greedy = causal(denoiser).write(PROMPTS, 8, seed=0)
    assert causal(denoiser, temperature=1e-4).write(PROMPTS, 8, seed=3) == greedy
    warm = causal(denoiser, temperature=1.0)
    assert warm.write(PROMPTS, 8, seed=1) != warm.write(PROMPTS, 8, seed=100)


@pytest.mark.parametrize("kind", ["causal", "engine"])
def test_an_answer_is_the_same_alone_and_in_any_batch(denoiser, kind):
    decode = DecodeConfig(block_length=4, steps_per_block=2, temperature=1.0)
    writers = {
        "causal": causal(denoiser, temperature=1.0, batch_rows=4),
        "engine": EngineWriter(Engine.over(denoiser, AbsorbingProcess(mask_id=MASK)), decode),
    }
    rooms = [9 - i % 3 for i in range(len(PROMPTS))]
    for max_tokens, own in ((9, [9] * len(PROMPTS)), (rooms, rooms)):
        together = writers[kind].write(PROMPTS, max_tokens, seed=40)
        alone = [writers[kind].write([p], own[i], seed=40 + i)[0] for i, p in enumerate(PROMPTS)]
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


def test_answers_without_an_end_take_all_their_room(denoiser):
    endless = causal(denoiser, end_id=None, never=(PAD, EOS), temperature=1.5).write(PROMPTS, 6, seed=2)
    assert {(one.num_committed, one.num_calls, len(one.tokens)) for one in endless} == {(6, 6, 6)}
    assert not {MASK, PAD, EOS} & {token for one in endless for token in one.tokens}


def test_how_wide_a_row_is_read_is_its_own_length_s_alone(denoiser):
    """Another width sums in another order: the last bit, and so a near tie, would hang on the neighbours."""

    class Recorded:
        def __init__(self) -> None:
            self.widths: dict[tuple[int, ...], set[int]] = {}

        def __call__(self, ids, **options):
            for prompt, row in itertools.product(PROMPTS, ids.tolist()):
                if tuple(row[: len(prompt) + 2]) == (MASK, *prompt, MASK):
                    self.widths.setdefault(prompt, set()).add(len(row))
            return denoiser(ids, **options)

    together = Recorded()
    causal(together, end_id=None).write(PROMPTS, 5, seed=0)
    for prompt in PROMPTS:
        alone = Recorded()
        causal(alone, end_id=None).write([prompt], 5, seed=0)
        assert alone.widths[prompt] == together.widths[prompt]
    assert len(set().union(*together.widths.values())) == 2
