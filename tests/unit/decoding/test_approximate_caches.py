"""Laws of the caches under full attention: what they recompute, what they leave, and when they change nothing."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import draws
from hypothesis import given, settings
from rows import CONTEXT, EOS, MASK, PAD, PROCESS, new_denoiser, new_engine, requests

from dllm_core.decoding.config import DecodeConfig
from dllm_core.decoding.engine import Engine
from dllm_core.decoding.request import Request
from dllm_core.decoding.unmask import LowConfidencePolicy, ThresholdPolicy
from dllm_core.errors import ConfigError
from dllm_core.model.config import DenoiserConfig, ModelConfig
from dllm_core.model.denoiser import Denoiser

pytestmark = pytest.mark.usefixtures("one_thread")
caches = pytest.mark.parametrize("cache", ["prefix", "dual"])


@pytest.fixture(scope="module", params=["plain", "shifted"])
def denoiser(request) -> Denoiser:
    plain = new_denoiser()
    if request.param == "plain":
        return plain
    values = plain.config.model_dump()
    shifted = Denoiser(DenoiserConfig.checked({**values, "model": {**values["model"], "shifted": True}})).eval()
    shifted.load_state_dict(plain.state_dict())
    return shifted


def cached(request: Request, cache: str, refresh_every: int | None = None, **fields: object) -> Request:
    update = {"cache": cache, "refresh_every": refresh_every, **fields}
    return replace(request, config=request.config.model_copy(update=update))


@caches
@settings(max_examples=draws(30), deadline=None)
@given(request=requests())
def test_renewed_at_every_call_a_cache_changes_nothing(denoiser, cache, request):
    expected = new_engine(denoiser).generate([cached(request, "none")])
    assert new_engine(denoiser).generate([cached(request, cache, refresh_every=1)]) == expected


@caches
@settings(max_examples=draws(20), deadline=None)
@given(request=requests())
def test_where_a_block_takes_one_call_a_cache_changes_nothing(denoiser, cache, request):
    at_once = {"policy": ThresholdPolicy(threshold=1e-6)}
    expected = new_engine(denoiser).generate([cached(request, "none", **at_once)])
    assert new_engine(denoiser).generate([cached(request, cache, **at_once)]) == expected


class Asked:
    """How many positions each forward computes for a row."""

    def __init__(self, denoiser: Denoiser) -> None:
        self.widths: list[int] = []
        self._handle = denoiser.register_forward_pre_hook(lambda _, given: self.widths.append(int(given[1].sum())))

    def __enter__(self) -> "Asked":
        return self

    def __exit__(self, *error: object) -> None:
        self._handle.remove()


@pytest.mark.parametrize(
    ("cache", "refresh_every", "widths"),
    [
        ("none", None, [20] * 8),
        ("prefix", None, [20, 15, 15, 15, 20, 11, 11, 11]),
        ("dual", None, [20, 4, 4, 4, 20, 4, 4, 4]),
        ("dual", 2, [20, 4, 20, 4, 20, 4, 20, 4]),
        ("prefix", 3, [20, 15, 15, 20, 20, 11, 11, 20]),
    ],
)
def test_a_call_computes_what_its_cache_leaves_to_it(cache, refresh_every, widths):
    """prompt 5, two blocks of 4, suffix 7; prefix: from the block's begin, dual: the block."""
    denoiser = new_denoiser()
    config = DecodeConfig(
        policy=LowConfidencePolicy(),
        max_tokens=8,
        block_length=4,
        steps_per_block=4,
        cache=cache,
        refresh_every=refresh_every,
    )
    with Asked(denoiser) as asked:
        new_engine(denoiser).generate([Request((5, 6, 7, 8, 9), config, (3, 4, 5, 6, 7, 8, 9))])
    assert asked.widths == widths


@caches
@settings(max_examples=draws(25), deadline=None)
@given(request=requests())
def test_an_inner_call_changes_the_keys_that_it_computes_and_no_others(denoiser, cache, request):
    engine = new_engine(denoiser)
    engine.add(cached(request, cache))
    while True:
        state = next(iter(engine._active.values()), None)
        before = None if engine._store is None else engine._store.slots.clone()
        span = None if state is None else state.span(0)
        if not engine.step():
            return
        if before is None or span is None or not span.needs_keys:
            continue
        changed = (engine._store.slots != before).any(dim=(0, 1, 3, 5))[state.slots[0] if state.slots else 0]
        outside = np.ones(len(changed), bool)
        outside[span.begin : span.stop] = False
        assert not changed.numpy()[outside].any()


def exact_dual(denoiser: Denoiser, request: Request) -> list[int]:
    """Dual caching written out for one row: each layer's keys of other positions as the block's first call had them."""
    config, head = request.config, len(request.prompt)
    canvas = torch.tensor([*request.prompt, *[MASK] * config.max_tokens, *request.suffix])
    kept: list[tuple[torch.Tensor, torch.Tensor]] = []

    def attend(number, q, k, v, at):
        if at is None:
            kept[number:] = [(k.clone(), v.clone()), *kept[number + 1 :]]
        else:
            kept[number][0][..., at, :], kept[number][1][..., at, :] = k, v
        keys, values = kept[number]
        weights = (q * q.shape[-1] ** -0.5 @ keys.transpose(-1, -2)).softmax(-1)
        return weights @ values

    def logits(at):
        from dllm_core.model.attention import rope_tables, rotate

        model = denoiser.config.model
        positions = torch.arange(len(canvas)) if at is None else at
        cos, sin = rope_tables(positions, model.rope_dim, model.rope_theta)
        x = denoiser.embedded(canvas[positions][None])
        for number, block in enumerate(denoiser.blocks):
            own = block.attention
            qkv = own.qkv(block.norm1(x)).view(1, len(positions), -1, own.head_dim)
            q, k, v = (part.transpose(1, 2) for part in qkv.split(own.heads, dim=2))
            q, k = rotate(own.q_norm(q), cos, sin), rotate(own.k_norm(k), cos, sin)
            x = x + own.out(attend(number, q, k, v, at).transpose(1, 2).flatten(2))
            x = x + block.ffn(block.norm2(x))
        found = denoiser.head(denoiser.norm(x))[0]
        found[:, [MASK, PAD]] = -torch.inf
        if request.suffix:
            found[:, EOS] = -torch.inf
        return found

    for begin in range(head, head + config.max_tokens, config.block_length):
        block = torch.arange(begin, min(begin + config.block_length, head + config.max_tokens))
        whole = True
        while (canvas[block] == MASK).any():
            found = logits(None)[block] if whole else logits(block)
            whole = False
            probs, tokens = found.softmax(-1).max(-1)
            probs[canvas[block] != MASK] = -1
            canvas[block[probs.argmax()]] = tokens[probs.argmax()]
    return canvas[head : head + config.max_tokens].tolist()


@torch.no_grad()
def test_a_dual_cache_is_what_its_definition_says():
    denoiser = new_denoiser(is_tied=False)
    for weight in denoiser.blocks.parameters():
        weight.mul_(4 if weight.ndim > 1 else 1)  # so that what stands elsewhere matters
    config = DecodeConfig(policy=LowConfidencePolicy(), max_tokens=12, block_length=6, steps_per_block=6, cache="dual")
    differs = 0
    for seed in range(8):
        rng = np.random.default_rng(seed)
        prompt, suffix = tuple(rng.integers(3, 23, 6).tolist()), tuple(rng.integers(3, 23, 4).tolist())
        request = Request(prompt, config, suffix)
        [answer] = new_engine(denoiser).generate([request])
        assert answer.tokens == exact_dual(denoiser, request)
        [plain] = new_engine(denoiser).generate([cached(request, "none")])
        differs += plain.tokens != answer.tokens
    assert differs  # it is an approximation


def test_a_refresh_without_a_cache_is_refused():
    with pytest.raises(ConfigError, match=r"decode\.refresh_every: says when a cache is renewed, and cache is none"):
        DecodeConfig.checked({"refresh_every": 2}, "decode")


def test_slots_are_for_those_who_asked_and_are_given_back():
    engine = Engine.over(new_denoiser(), PROCESS)
    engine.generate([Request((5,), DecodeConfig(max_tokens=8))])
    assert engine._store is None
    engine.generate([Request((5,), DecodeConfig(max_tokens=8, cache="dual")) for _ in range(3)])
    assert len(engine._store._free) == len(engine._store.lengths)
    assert engine._store.capacity < CONTEXT


@pytest.fixture(scope="module", params=["one", "two"])
def wide(request) -> Denoiser:
    """Heads and products as wide as a real model's, whose kernels differ from a tiny one's; on one thread and two."""
    torch.manual_seed(1)
    config = DenoiserConfig(
        model=ModelConfig(dim=192, layers=2, heads=3, ffn_dim=256, tie_embeddings=False),
        vocab_size=512,
        context_length=192,
        mask_id=MASK,
        eos_id=EOS,
        pad_id=PAD,
    )
    before = torch.get_num_threads()
    torch.set_num_threads(1 if request.param == "one" else 2)
    yield Denoiser(config).eval().requires_grad_(False)
    torch.set_num_threads(before)


@pytest.mark.parametrize("cache", ["none", "dual"])
def test_rows_of_any_length_have_the_same_bits_alone_and_together(wide, cache):
    """Rows whose widths differ are one joined forward a call; every confidence is compared to the last bit."""
    rng = np.random.default_rng(2)
    batch = []
    for _ in range(draws(12)):
        prompt = tuple(map(int, rng.integers(3, 512, rng.integers(1, 40))))
        config = DecodeConfig(
            policy=LowConfidencePolicy(),
            block_length=32,
            steps_per_block=int(rng.integers(2, 8)),
            max_tokens=int(rng.integers(8, 120)),
            cache=cache,
        )
        batch.append(Request(prompt, config))

    def commits(requests: list[Request]) -> dict[int, list[tuple[int, int, float]]]:
        engine, found = new_engine(wide, 1 << 14), {}
        for request in requests:
            found[engine.add(request)] = []
        while updates := engine.step():
            for update in updates:
                found[update.row] += update.commits
        return found

    together = commits(batch)
    for row, request in enumerate(batch):
        assert commits([request])[0] == together[row]
