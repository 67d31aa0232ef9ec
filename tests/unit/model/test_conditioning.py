"""Laws of time conditioning: nothing at first, then every block hears of t, each token of its own."""

import json

import pytest
import torch
from tiny import ids_of, new_denoiser, same, timed_denoiser, times_of

from dllm_core.model.conditioning import sinusoids
from dllm_core.model.config import DenoiserConfig
from dllm_core.model.pattern import CAUSAL, AttentionPattern
from dllm_core.model.pretrained import read_denoiser, weights_of, write_weights

pytestmark = pytest.mark.usefixtures("one_thread")
PATTERNS = [
    AttentionPattern("full"),
    CAUSAL,
    AttentionPattern("block_causal", 2),
    AttentionPattern("block_diffusion", 2),
]


@pytest.mark.parametrize("tied", [True, False])
def test_a_new_model_is_the_unconditioned_one_of_its_seed(tied):
    plain, timed = new_denoiser(tie_embeddings=tied), new_denoiser(tie_embeddings=tied, time_conditioning=True)
    ids = ids_of(3, 8)
    for pattern in PATTERNS:
        length = 4 if pattern.has_clean_half else 8
        for t in (times_of(3), times_of(3, length), torch.zeros(3), torch.ones(3)):
            assert torch.equal(timed(ids, pattern=pattern, t=t), plain(ids, pattern=pattern))


@pytest.mark.parametrize("pattern", PATTERNS, ids=lambda pattern: pattern.kind)
def test_after_a_step_it_hears_of_t_and_every_weight_learns(pattern):
    model = new_denoiser(time_conditioning=True)
    ids, early, late = ids_of(2, 8), torch.full((2,), 0.1), torch.full((2,), 0.9)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    for step in range(2):
        optimizer.zero_grad()
        model(ids, pattern=pattern, t=torch.tensor([0.2, 0.7])).square().mean().backward()
        gradients = {name: p.grad for name, p in model.named_parameters()}
        assert all(g is not None and g.isfinite().all() for g in gradients.values())
        silent = {name for name, g in gradients.items() if not g.any()}
        assert silent == ({"time.hidden.weight", "time.embed.weight"} if step == 0 else set()), "behind zeros at first"
        if step == 0:
            optimizer.step()
    parts = gradients["time.modulation.weight"].split(16)
    assert len(parts) == 6 * 2 + 2
    assert all(part.any() for part in parts), "every shift, scale and gate of either layer, and the last norm's"
    difference = model(ids, pattern=pattern, t=early) - model(ids, pattern=pattern, t=late)
    assert difference.abs().max() > 1e-4


@torch.inference_mode()
def test_a_time_for_each_token_of_a_row_is_the_rows_time_where_they_are_equal():
    model, ids, t = timed_denoiser(), ids_of(3, 8), times_of(3)
    for pattern in PATTERNS:
        length = 4 if pattern.has_clean_half else 8
        of_rows = model(ids, pattern=pattern, t=t)
        same(model(ids, pattern=pattern, t=t[:, None].expand(3, length)), of_rows)
        same(model(ids, pattern=pattern, t=t[:, None]), of_rows)
        assert (model(ids, pattern=pattern, t=t.flip(0)) - of_rows).abs().max() > 1e-3


@torch.inference_mode()
def test_a_token_is_told_its_own_time():
    model, ids, t = timed_denoiser(), ids_of(1, 8), times_of(1, 8)
    other = t.clone()
    other[0, 5] = 1 - other[0, 5]
    told = (model(ids, pattern=CAUSAL, t=t) != model(ids, pattern=CAUSAL, t=other))[0].any(-1)
    assert torch.equal(told, torch.arange(8) >= 5), "by its own time and that of what it sees"


@torch.inference_mode()
def test_logits_that_are_read_are_those_of_their_positions_and_times():
    model, ids, read = timed_denoiser(), ids_of(3, 11), ids_of(3, 11, seed=2) < 7
    for t in (times_of(3), times_of(3, 11)):
        same(model(ids, read=read, t=t), model(ids, t=t)[read])
        assert len(model(ids, read=torch.zeros_like(read), t=t)) == 0


@torch.inference_mode()
def test_bits_of_a_row_do_not_depend_on_how_many_times_are_embedded_beside_its_own():
    model = timed_denoiser(dim=64, heads=4, ffn_dim=128)
    ids, t, read = ids_of(9, 16), times_of(9), torch.ones(9, 16, dtype=torch.bool)
    together = model(ids, t=t, read=read).view(9, 16, -1)
    for row in range(9):
        assert torch.equal(model(ids[row : row + 1], t=t[row : row + 1], read=read[:1]), together[row])


def test_times_a_thousandth_apart_are_told_apart_alike_wherever_they_are():
    embedded = sinusoids(torch.arange(1025) / 1024)
    likeness = embedded @ embedded.T
    for apart in (0, 1, 10, 100, 1000):
        of_pairs = likeness.diagonal(apart)
        same(of_pairs, of_pairs[:1].expand_as(of_pairs), atol=1e-2)
    assert torch.cdist(embedded, embedded).fill_diagonal_(torch.inf).min() > 1


def test_a_time_too_few_or_too_many_is_refused():
    with pytest.raises(ValueError, match=r"^t: missing, the denoiser's model\.time_conditioning is true$"):
        new_denoiser(time_conditioning=True)(ids_of(1, 4))
    with pytest.raises(ValueError, match=r"^t: the denoiser takes none, its model\.time_conditioning is false$"):
        new_denoiser()(ids_of(1, 4), t=times_of(1))


def test_a_conditioned_denoiser_is_written_and_read_bit_for_bit(tmp_path):
    model = timed_denoiser()
    (tmp_path / "config.json").write_text(model.config.model_dump_json(), encoding="utf-8")
    write_weights(tmp_path / "model.safetensors", weights_of(model))
    again = read_denoiser(tmp_path)
    assert torch.equal(again(ids_of(2, 5), t=times_of(2)), model(ids_of(2, 5), t=times_of(2)))


def test_a_configuration_from_before_there_was_time_conditioning_has_none():
    values = json.loads(new_denoiser().config.model_dump_json())
    del values["model"]["time_conditioning"]
    assert DenoiserConfig.checked(values) == new_denoiser().config
