"""Laws of the denoiser: a row alone, in a batch, padded, shifted, written down and read again is the same row."""

import hashlib
import json
import subprocess
import sys

import pytest
import torch
from conftest import draws
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import VOCABULARY, ids_of, mixed_denoiser, new_denoiser, same
from torch.nn import functional

from dllm_core.errors import CheckpointError
from dllm_core.model import load_denoiser
from dllm_core.model.attention import _attend
from dllm_core.model.config import DenoiserConfig, ExpertsConfig, ModelConfig
from dllm_core.model.denoiser import Denoiser
from dllm_core.model.pattern import CAUSAL, FULL, AttentionPattern
from dllm_core.model.pretrained import assign_weights, read_denoiser, weights_of, write_weights

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module", params=[True, False], ids=["tied", "untied"])
def denoiser(request) -> Denoiser:
    return new_denoiser(tie_embeddings=request.param, qk_norm=request.param)


@settings(max_examples=draws(25), deadline=None)
@given(lengths=st.lists(st.integers(1, 20), min_size=1, max_size=5), left=st.booleans(), seed=st.integers(0, 99))
@torch.inference_mode()
def test_a_row_does_not_depend_on_its_neighbours_nor_on_padding_at_either_end(denoiser, lengths, left, seed):
    width = max(lengths) + 2
    batch = ids_of(len(lengths), width, seed=seed)  # what stands in the padding is arbitrary
    is_real = torch.zeros(batch.shape, dtype=torch.bool)
    for row, length in enumerate(lengths):
        is_real[row, width - length :] = left
        is_real[row, :length] |= not left
    together = denoiser(batch, is_real)
    for row in range(len(lengths)):
        same(together[row][is_real[row]], denoiser(batch[row][is_real[row]][None])[0])


@torch.inference_mode()
def test_padding_of_a_long_row_is_not_seen_either():
    long = new_denoiser(layers=1)
    ids = ids_of(2, 300)  # the fused kernel's side of attention
    is_real = torch.arange(300).expand(2, 300) < torch.tensor([[270], [300]])
    together = long(ids, is_real)
    same(together[0, :270], long(ids[:1, :270])[0])
    same(together[1], long(ids[1:])[0])


KINDS = {
    "plain": new_denoiser,
    "mixed": mixed_denoiser,
    "one block": lambda: new_denoiser(layers=1),
    "shifted": lambda: new_denoiser(shifted=True),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("pattern", [FULL, CAUSAL, AttentionPattern("block_causal", 4)], ids=lambda p: p.kind)
@given(seed=st.integers(0, 1 << 20), share=st.floats(0, 1))
@settings(max_examples=10, deadline=None)
def test_the_last_block_skips_what_is_not_read_and_changes_no_bit(kind, pattern, seed, share):
    """In inference alone; under no_grad every position goes through it."""
    denoiser, ids = KINDS[kind](), ids_of(3, 16, seed=seed)
    rng = torch.Generator().manual_seed(seed)
    is_real = torch.arange(16) < torch.randint(1, 17, (3, 1), generator=rng)
    read = is_real & (torch.rand(3, 16, generator=rng) < share)
    rows = []
    hook = denoiser.blocks[-1].ffn.register_forward_hook(lambda module, given, out: rows.append(out[..., 0].numel()))
    with torch.no_grad():
        whole = denoiser(ids, is_real, read, pattern=pattern)
    with torch.inference_mode():
        skipped = denoiser(ids, is_real, read, pattern=pattern)
    hook.remove()
    assert torch.equal(skipped, whole)
    skips = kind != "shifted" or pattern.kind == "causal"
    assert rows == [48, max(16, int(read.sum())) if skips else 48]


@torch.inference_mode()
def test_logits_that_are_read_are_those_of_their_positions(denoiser):
    ids = ids_of(3, 11)
    read = ids_of(3, 11, seed=2) < 7
    assert 0 < read.sum() < read.numel()
    same(denoiser(ids, read=read), denoiser(ids)[read])
    assert torch.equal(denoiser(ids, read=read.flatten().nonzero()[:, 0]), denoiser(ids, read=read))
    assert denoiser(ids, read=torch.zeros_like(read)).shape == (0, VOCABULARY)


@torch.inference_mode()
def test_every_position_sees_every_other_and_where_it_stands(denoiser):
    ids = ids_of(1, 7)
    before = denoiser(ids)[0]
    for changed in range(7):
        other = ids.clone()
        other[0, changed] = (other[0, changed] + 1) % VOCABULARY
        assert (denoiser(other)[0] != before).any(-1).all()
    exchanged = ids.clone()
    exchanged[0, [0, 1]] = ids[0, [1, 0]]
    assert ids[0, 0] != ids[0, 1]
    assert (denoiser(exchanged)[0, 2:] - before[2:]).abs().amax(-1).min() > 1e-4


@settings(max_examples=draws(25), deadline=None)
@given(
    heads=st.integers(1, 4),
    pairs=st.integers(4, 6),
    layers=st.integers(1, 3),
    ffn_dim=st.integers(8, 30),
    qk_norm=st.booleans(),
    tied=st.booleans(),
    timed=st.booleans(),
    vocabulary=st.integers(3, 40),
    others=st.fixed_dictionaries(
        {"qkv_bias": st.booleans(), "kv_heads": st.sampled_from([None, 1]), "head_width": st.sampled_from([None, 6])},
        optional={"experts": st.builds(ExpertsConfig, num_shared_experts=st.integers(0, 2))},
    ),
)
def test_the_number_of_parameters_is_their_number(
    heads, pairs, layers, ffn_dim, qk_norm, tied, timed, vocabulary, others
):
    kinds = {"qk_norm": qk_norm, "tie_embeddings": tied, "time_conditioning": timed, **others}
    model = ModelConfig(dim=2 * heads * pairs, layers=layers, heads=heads, ffn_dim=ffn_dim, **kinds)
    config = DenoiserConfig(model=model, vocab_size=vocabulary, context_length=8, mask_id=0, eos_id=1, pad_id=2)
    with torch.device("meta"):
        made = Denoiser(config)
    assert model.num_parameters(vocabulary) == sum(p.numel() for p in made.parameters() if p.requires_grad)
    assert model.num_parameters(vocabulary) == sum(tensor.numel() for tensor in weights_of(made).values())


def test_what_foreign_models_need_changes_no_bit_of_a_model_that_does_not_ask_for_it():
    """Names, weights of a seed and the fingerprint's spelling, as they were before these fields were there."""
    config = DenoiserConfig(model=ModelConfig(), vocab_size=300, context_length=64, mask_id=0, eos_id=1, pad_id=2)
    torch.manual_seed(3)
    digest = hashlib.sha256()
    for name, tensor in Denoiser(config).state_dict().items():
        digest.update(name.encode() + tensor.numpy().tobytes())
    assert digest.hexdigest() == "7979a7f4ba49abc56c185fbe1aba0479c679a6bd907c95e22cfbeeb5d151eb47"
    assert list(ModelConfig().identity) == [
        *("dim", "layers", "heads", "ffn_dim", "rope_theta", "norm_eps", "qk_norm", "tie_embeddings"),
        "time_conditioning",
    ]
    assert ModelConfig(kv_heads=2).identity["kv_heads"] == 2
    assert {name for name in ModelConfig(shifted=True).identity if name not in ModelConfig().identity} == {"shifted"}
    assert (ModelConfig().num_parameters(1000), ModelConfig().flops_per_token(1000, 64)) == (981_376, 6_273_024)


@torch.inference_mode()
def test_new_weights_give_logits_of_about_unit_size(denoiser):
    assert 0.3 < denoiser(ids_of(8, 20)).std() < 3


def test_a_model_that_was_evaluated_first_can_be_trained():
    model = new_denoiser()
    with torch.inference_mode():
        model(ids_of(1, 5))
    model(ids_of(1, 5)).sum().backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in model.parameters())


def test_a_row_longer_than_the_context_gets_positions_too():
    model = new_denoiser()
    ids = ids_of(1, 50)
    with torch.inference_mode():
        fresh = model(ids)
        model(ids[:, :5])
        same(model(ids), fresh)


def written(folder, denoiser: Denoiser) -> None:
    (folder / "config.json").write_text(denoiser.config.model_dump_json(), encoding="utf-8")
    write_weights(folder / "model.safetensors", weights_of(denoiser))


@torch.inference_mode()
def test_a_thread_that_makes_shorter_tables_of_angles_meanwhile_takes_none_away(denoiser):
    class Raced(Denoiser):
        """Whatever tables are put there, those that are found are of 4 positions: another thread came between."""

        @property
        def _tables(self):
            return self.__dict__.get("found")

        @_tables.setter
        def _tables(self, made):
            self.__dict__["found"] = None if made is None else tuple(table[:4] for table in made)

    raced = Raced(denoiser.config).eval()
    raced.load_state_dict(denoiser.state_dict())
    same(raced(ids_of(2, 9)), denoiser(ids_of(2, 9)))


def test_what_was_written_is_read_bit_for_bit(denoiser, tmp_path):
    written(tmp_path, denoiser)
    again = read_denoiser(tmp_path)
    assert again.config == denoiser.config
    assert list(again.state_dict()) == list(denoiser.state_dict())
    assert all(torch.equal(again.state_dict()[name], tensor) for name, tensor in denoiser.state_dict().items())
    assert (again.head.weight is again.embed.weight) == denoiser.config.model.tie_embeddings
    assert not again.training
    assert not any(p.requires_grad for p in again.parameters())
    with torch.inference_mode():
        assert torch.equal(again(ids_of(2, 9)), denoiser(ids_of(2, 9)))
        assert torch.equal(load_denoiser(str(tmp_path))(ids_of(2, 9)), denoiser(ids_of(2, 9)))


def test_missing_unknown_and_misshapen_tensors_are_refused_by_name_and_change_nothing(denoiser):
    victim = new_denoiser(seed=3, **denoiser.config.model.model_dump(include={"tie_embeddings", "qk_norm"}))
    before = {name: tensor.clone() for name, tensor in victim.state_dict().items()}
    weights = weights_of(denoiser)
    name = "blocks.1.ffn.down.weight"
    for wrong, problem in (
        ({k: v for k, v in weights.items() if k != name}, f"missing {name}"),
        ({**weights, "blocks.2.x": weights[name]}, r"unknown blocks\.2\.x"),
        ({**weights, name: weights[name].T}, rf"{name} is \[24, 16\], must be \[16, 24\]"),
    ):
        with pytest.raises(CheckpointError, match=f"place: {problem}"):
            assign_weights(victim, wrong, "place")
    assert all(torch.equal(victim.state_dict()[key], tensor) for key, tensor in before.items())


def test_weights_of_another_size_or_kind_are_refused(denoiser, tmp_path):
    tied = denoiser.config.model.tie_embeddings
    for sizes in ({"layers": 1}, {"dim": 32}, {"tie_embeddings": not tied}, {"qk_norm": not tied}):
        written(tmp_path, denoiser)
        other = new_denoiser(**{"tie_embeddings": tied, "qk_norm": tied, **sizes})
        (tmp_path / "config.json").write_text(other.config.model_dump_json(), encoding="utf-8")
        with pytest.raises(CheckpointError, match=r"model\.safetensors"):
            read_denoiser(tmp_path)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_a_folder_that_holds_no_denoiser_is_refused(tmp_path, name):
    for data in (None, b"", b"{", b"[]", b"\xff" * 40, json.dumps({"model": {}}).encode()):
        written(tmp_path, new_denoiser())
        (tmp_path / name).unlink() if data is None else (tmp_path / name).write_bytes(data)
        with pytest.raises(CheckpointError, match=str(tmp_path)):
            read_denoiser(tmp_path)
    with pytest.raises(CheckpointError):
        read_denoiser(tmp_path / "nowhere")


@settings(max_examples=draws(30), deadline=None)
@given(
    rows=st.integers(1, 3),
    heads=st.integers(1, 3),
    length=st.integers(1, 12),
    masking=st.sampled_from(["none", "causal", "keys", "pairs", "pairs of all rows"]),
    seed=st.integers(0, 99),
)
def test_attention_of_short_rows_is_the_fused_kernels(rows, heads, length, masking, seed):
    generator = torch.Generator().manual_seed(seed)
    q, k, v = torch.randn(3, rows, heads, length, 8, generator=generator).mul(2).unbind(0)
    attention, is_causal = None, masking == "causal"
    if masking not in ("none", "causal"):
        of_rows, queries = 1 if "all" in masking else rows, 1 if masking == "keys" else length
        attention = torch.rand(of_rows, 1, queries, length, generator=generator) < 0.5
        attention[..., 0] = True  # a query that sees nothing has no answer
    inputs = [part.requires_grad_() for part in (q, k, v)]
    expected = functional.scaled_dot_product_attention(*inputs, attn_mask=attention, is_causal=is_causal)
    found = _attend(*inputs, attention, is_causal)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    weights = torch.randn(expected.shape, generator=generator)
    wanted = torch.autograd.grad((expected * weights).sum(), inputs)
    for gradient, want in zip(torch.autograd.grad((found * weights).sum(), inputs), wanted, strict=True):
        torch.testing.assert_close(gradient, want, atol=1e-5, rtol=1e-5)


def test_reading_a_model_draws_no_weights_and_needs_no_compiler():
    """Of torch, whose import takes longer than the reading: it draws on the meta device with it."""
    told = (
        "import sys, torch; from dllm_core.model.config import DenoiserConfig, ExpertsConfig, ModelConfig;"
        "from dllm_core.model.denoiser import Denoiser;"
        "model = ModelConfig(qkv_bias=True, time_conditioning=True, experts=ExpertsConfig(num_shared_experts=1));"
        "config = DenoiserConfig(model=model, vocab_size=300, context_length=64, mask_id=0, eos_id=1, pad_id=2);"
        "before = torch.get_rng_state();"
        "torch.set_default_device('meta'); Denoiser(config); torch.set_default_device('cpu');"
        "assert torch.equal(before, torch.get_rng_state()); sys.exit('torch._dynamo' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", told], check=False).returncode == 0
