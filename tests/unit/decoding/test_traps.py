"""What public decoders of diffusion language models got wrong, each made hard to miss. Others are laws elsewhere:
ragged batches and rows that wait for the slowest (test_engine.py), masks in an infill (test_canvases.py).
"""

import itertools

import pytest
import torch
from rows import EOS, MASK, PAD, VOCABULARY, new_denoiser, new_engine
from torch.utils._python_dispatch import TorchDispatchMode

from dllm_core.decoding import forward, step
from dllm_core.decoding.config import DecodeConfig
from dllm_core.decoding.engine import Engine
from dllm_core.decoding.request import Request
from dllm_core.decoding.revise import AncestralPolicy, EditingPolicy, RemaskingPolicy
from dllm_core.decoding.unmask import EntropyPolicy, LowConfidencePolicy, MarginPolicy, RandomPolicy, ThresholdPolicy
from dllm_core.model import cache as cache_of_keys
from dllm_core.model.denoiser import Denoiser

SYNCS = {"_local_scalar_dense", "nonzero", "masked_select", "unique"}


def bumped(ids: list[int], by: float) -> Denoiser:
    """A denoiser that is far surer of these tokens than of others."""
    denoiser = new_denoiser()
    bump = torch.zeros(VOCABULARY)
    bump[ids] = by
    denoiser.head.register_forward_hook(lambda _, __, logits: logits + bump)
    return denoiser


def config_of(length: int, block: int, steps: int, **said: object) -> DecodeConfig:
    policy = said.pop("policy", LowConfidencePolicy())
    return DecodeConfig(policy=policy, max_tokens=length, block_length=block, steps_per_block=steps, **said)


@pytest.mark.parametrize("policy", [LowConfidencePolicy(), ThresholdPolicy(threshold=0.9)])
def test_a_mask_or_padding_that_the_model_is_sure_of_is_never_committed_and_ends_nothing(policy):
    engine = new_engine(bumped([MASK, PAD], 80.0))
    for suffix in ((), (5, 6)):
        [answer] = engine.generate([Request((3, 4), config_of(16, 4, 4, policy=policy), suffix)])
        assert not {MASK, PAD} & set(answer.tokens)
        assert answer.num_calls <= 16


@pytest.mark.parametrize(("length", "block", "steps"), [(16, 4, 1), (16, 4, 4), (15, 4, 3), (16, 16, 4), (5, 7, 7)])
def test_no_budget_ends_with_masks_left_nor_costs_more_calls_than_it_has(length, block, steps):
    """steps == number of blocks divided by zero steps a block elsewhere; a rest of positions stayed masks."""
    [answer] = new_engine(bumped([EOS], -80.0)).generate([Request((3,), config_of(length, block, steps))])
    assert len(answer.tokens) == length
    assert answer.num_calls <= -(-length // block) * steps


@pytest.mark.parametrize("top_k", [VOCABULARY, 10**30])
def test_a_top_k_beyond_the_vocabulary_leaves_all_of_it(top_k):
    whole, wide, one = (config_of(8, 4, 4, temperature=1.0, top_k=k) for k in (None, top_k, 1))
    answers = [new_engine(new_denoiser()).generate([Request((3,), config, seed=5)])[0] for config in (whole, wide, one)]
    assert answers[0] == answers[1] != answers[2]


def test_of_equally_likely_tokens_the_first_are_told_whatever_a_neighbour_asks_for():
    denoiser = new_denoiser()
    denoiser.head.weight.data.zero_()
    requests = [Request((3,), config_of(3, 3, 1), top_logprobs=number) for number in (3, 20, 2)]
    for batch in ([requests[0]], requests):
        engine = new_engine(denoiser)
        for request in batch:
            engine.add(request)
        first, *_ = engine.step()
        assert first.best_tokens.tolist() == [[EOS, 3, 4]] * 3


def test_a_top_p_of_hardly_any_leaves_the_likeliest():
    """The least float64 times a sum below a half is 0, which cut every token off: padding was the answer."""
    cold, cut = (config_of(8, 4, 4, temperature=t, top_k=1, top_p=p) for t, p in ((0.0, 1.0), (5.0, 5e-324)))
    answers = [new_engine(new_denoiser()).generate([Request((3,), config, seed=5)])[0] for config in (cold, cut)]
    assert answers[0] == answers[1]


def test_a_block_that_is_full_costs_no_call():
    request = Request((3,), config_of(12, 4, 4), middle=(None, None, None, None, 5, 6, 7, 8, None, None, None, None))
    [answer] = new_engine(bumped([EOS], -80.0)).generate([request])
    assert answer.num_calls == 8
    sure = config_of(12, 4, 4, policy=ThresholdPolicy(threshold=1e-9))  # a block is full after one of its four steps
    assert new_engine(bumped([EOS], -80.0)).generate([Request((3,), sure)])[0].num_calls == 3


def test_rows_that_are_done_leave_and_waiting_ones_take_their_place_at_once():
    """Waiting for the slowest took 59 calls elsewhere where the rows need 45; here no row waits for another."""
    lengths = [1, 2, 24, 3, 1, 2, 5, 7]
    engine = Engine.over(bumped([EOS], -80.0), new_engine(new_denoiser())._process, max_rows=2)
    for length in lengths:
        engine.add(Request((3,), config_of(length, 1, 1)))
    ticks = calls = 0
    while updates := engine.step():
        ticks, calls = ticks + 1, calls + len(updates)
    assert calls == sum(lengths)
    assert ticks == 1 + 24  # the long one comes in the second tick; beside it the others fit in


def test_an_end_token_of_the_prompt_or_between_holes_ends_nothing():
    engine = new_engine(bumped([EOS], -80.0))
    [answer] = engine.generate([Request((EOS, 3, EOS), config_of(8, 4, 4))])
    assert (len(answer.tokens), answer.finish_reason) == (8, "length")
    [answer] = engine.generate([Request((3,), config_of(8, 4, 4), middle=(None, EOS, None, None))])
    assert (len(answer.tokens), answer.tokens[1], answer.finish_reason) == (4, EOS, "length")


def test_nothing_stands_behind_the_end_and_what_would_costs_no_call():
    [answer] = new_engine(bumped([EOS], 80.0)).generate([Request((3,), config_of(24, 4, 4))])
    assert (answer.tokens, answer.finish_reason) == ([], "stop")
    assert answer.num_calls <= 4


def test_a_threshold_is_compared_in_full_precision_whatever_the_model_is_in():
    """In bf16 all confidences above 0.998 are 1, and those about 0.9 lie 0.004 apart: ties that no threshold parts."""
    denoiser = new_denoiser().bfloat16()
    engine = new_engine(denoiser)
    engine.add(Request((3, 4, 5), config_of(16, 16, 1, policy=ThresholdPolicy(threshold=1e-9))))
    [update] = engine.step()
    assert update.confidence.dtype == "float32"
    as_bf16 = torch.from_numpy(update.confidence).bfloat16().float().numpy()
    assert (as_bf16 != update.confidence).any()


class Watch(TorchDispatchMode):
    """What calls do: reads of single numbers, and copies as large as the store."""

    def __init__(self, store_size: int = 1 << 60) -> None:
        super().__init__()
        self.syncs, self.copies, self._store_size = 0, 0, store_size

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        name = function.overloadpacket.__name__
        by_mask = name in ("index", "index_put") and any(one is not None and one.dtype == torch.bool for one in args[1])
        self.syncs += name in SYNCS or by_mask  # how many are chosen is known to the device alone
        if name in ("clone", "_to_copy", "index_put", "cat", "stack"):  # a gather of the rows that are read is none
            self.copies += isinstance(out, torch.Tensor) and out.numel() >= self._store_size
        return out


@pytest.mark.parametrize("kind", ["plain", "shifted", "time_conditioning"])
def test_a_call_of_rows_of_every_kind_waits_for_the_device_once_for_its_verdict(kind, monkeypatch):
    copies, on_device = [], []

    def sent(array, device):
        on_device.append(torch.from_numpy(array).to(device))
        return on_device[-1]

    def count(name):
        whole = getattr(torch.Tensor, name)

        def counted(own):
            is_host_s = own.dtype == torch.bool and all(own.data_ptr() != one.data_ptr() for one in on_device)
            copies.extend([] if is_host_s else [name])  # what is padding is known to the host
            return whole(own)

        monkeypatch.setattr(torch.Tensor, name, counted)

    for module in (cache_of_keys, forward, step):
        monkeypatch.setattr(module, "sent", sent)
    for name in ("cpu", "numpy", "tolist", "item"):
        count(name)
    engine = new_engine(new_denoiser(**({} if kind == "plain" else {kind: True})), max_batch_tokens=2000)
    policies = [ThresholdPolicy(threshold=0.99), LowConfidencePolicy(position_temperature=0.3), EntropyPolicy()]
    policies += [MarginPolicy(), RandomPolicy(), RemaskingPolicy(eta=0.3), EditingPolicy(), AncestralPolicy()]
    rows = list(itertools.product(policies, ["none"] if kind == "time_conditioning" else ["none", "prefix", "dual"]))
    for i, (policy, cache) in enumerate(rows):
        sampled = {"temperature": 0.7, "top_p": 0.8, "top_k": 4} if i % 2 else {"guidance": 0.5}
        config = config_of(12, 4, 4, policy=policy, cache=cache, **sampled)
        engine.add(Request((3, 4) * (1 + i % 4), config, (5,), seed=i, top_logprobs=i % 3))
    for _ in range(4):
        copies.clear()
        on_device.clear()
        with Watch() as watch:
            assert engine.step()
        assert watch.syncs == 0
        assert copies == ["cpu", "numpy"]


def test_logits_are_made_at_open_positions_of_the_block_alone_and_never_for_the_canvas():
    denoiser = new_denoiser()
    widths = []
    denoiser.head.register_forward_hook(lambda _, given, out: widths.append((out.shape[0], out.dtype)))
    new_engine(denoiser).generate([Request((3,) * 9, config_of(24, 4, 4))])
    assert all(rows <= 16 for rows, _ in widths)  # padded to the rows of a product that sums in one order
    assert {dtype for _, dtype in widths} == {torch.float32}


def test_kept_keys_are_written_in_place_and_no_layer_copies_the_store():
    denoiser = new_denoiser()
    engine = new_engine(denoiser)
    requests = [Request((3, 4), config_of(24, 4, 4, cache="dual"), seed=i) for i in range(8)]
    for request in requests:
        engine.add(request)
    engine.step()
    for row in range(2, 8):  # what the two left compute is smaller than what a layer keeps
        engine.cancel(row)
    store = engine._store
    assert store is not None
    at = store.slots.data_ptr()
    with Watch(store_size=store.slots[0].numel()) as watch:
        while engine.step():
            pass
    assert watch.copies == 0
    assert store.slots.data_ptr() == at
