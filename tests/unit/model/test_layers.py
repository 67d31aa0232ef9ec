"""A row of a matrix product has the same bits beside any number of others, on any number of threads."""

import pytest
import torch
from tiny import new_denoiser

from dllm_core.model.layers import LONGEST_SUM, MIN_ROWS, Linear


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("fan_in", [LONGEST_SUM, 1024, 2048, 3000])
@pytest.mark.parametrize("bias", [False, True])
def test_a_row_s_bits_do_not_tell_how_many_others_there_are(threads, fan_in, bias):
    before = torch.get_num_threads()
    torch.manual_seed(fan_in)
    layer, x = Linear(fan_in, 256, bias=bias), torch.randn(2, 150, fan_in)
    if bias:
        torch.nn.init.normal_(layer.bias)
    try:
        with torch.inference_mode():
            torch.set_num_threads(1)
            expected = layer(x).flatten(0, 1)
            torch.set_num_threads(threads)
            for rows in (MIN_ROWS, 17, 24, 40, 64, 96, 150, 257, 300):
                assert torch.equal(layer(x.flatten(0, 1)[:rows]), expected[:rows]), rows
    finally:
        torch.set_num_threads(before)


def test_long_sums_are_what_they_are_in_one_go():
    torch.manual_seed(0)
    layer, x = Linear(2000, 64, bias=True), torch.randn(3, 20, 2000)
    torch.nn.init.normal_(layer.bias)
    with torch.no_grad():
        exact = torch.nn.functional.linear(x.double(), layer.weight.double(), layer.bias.double())
        whole = layer(x)
    with torch.inference_mode():
        cut = layer(x)
    for found in (whole, cut):
        torch.testing.assert_close(found.double(), exact, atol=2e-5, rtol=0)


def test_a_block_in_training_asks_nothing_that_would_cut_its_compiled_graph(monkeypatch):
    """That it is one graph takes a compiler and minutes: `test_micro_batch.py`, in `make test-long`."""
    block, tables = new_denoiser().blocks[0], torch.randn(2, 5, new_denoiser().config.model.rope_dim)
    monkeypatch.setattr(torch, "is_inference_mode_enabled", lambda: pytest.fail("no graph can hold the answer"))
    block(torch.randn(2, 5, new_denoiser().config.model.dim), *tables, None, False, None).sum().backward()
    assert block.attention.qkv.weight.grad is not None
