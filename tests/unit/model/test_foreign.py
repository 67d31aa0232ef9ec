"""Public checkpoints: logits are the references', and what was read is written again bit for bit."""

import filecmp
import json
import shutil
from pathlib import Path

import pytest
import torch
from foreign_folders import CONFIGS, DIM, DREAM, LLADA, QWEN2, ROWS, random_tensors, reference_logits, write_folder
from safetensors.torch import load_file, save_file
from tiny import closely, ids_of, mixed_denoiser, new_denoiser

from dllm_core.errors import CheckpointError, ConfigError, DataError
from dllm_core.model.denoiser import Denoiser
from dllm_core.model.foreign import layout_for, open_foreign, read_foreign, trained_layout, write_foreign
from dllm_core.model.pattern import CAUSAL, FULL, AttentionPattern
from dllm_core.model.pretrained import weights_of

pytestmark = pytest.mark.usefixtures("one_thread")
GOLDEN = Path(__file__).parents[2] / "golden"
NAMES = ["tiny-llada", "tiny-llada2-moe"]


def folder_of(name: str, tmp_path: Path, **options: object) -> Path:
    return write_folder(tmp_path / "in", CONFIGS[name], **options)


def read(folder: Path, **options: object) -> Denoiser:
    has_mask = "mask_token_id" in json.loads((folder / "config.json").read_text())
    return read_foreign(folder, mask_id=None if has_mask else 36, **options)


def opened_of(folder: Path):
    has_mask = "mask_token_id" in json.loads((folder / "config.json").read_text())
    return open_foreign(folder, mask_id=None if has_mask else 36)


def assert_equal_files(left: Path, right: Path) -> None:
    names = sorted(path.name for path in right.iterdir())
    assert names == sorted(path.name for path in left.iterdir() if path.name != "tokenizer.json")
    assert filecmp.cmpfiles(left, right, names, shallow=False) == (names, [], [])


@pytest.mark.parametrize("case", ["full1", "full3", "leftpad3"])
@torch.inference_mode()
def test_llada_gives_the_reference_s_logits(case):
    known = load_file(GOLDEN / "llada.logits.safetensors")
    mask = known.get(f"{case}.attention_mask", torch.ones_like(known[f"{case}.ids"])).bool()
    found = read_foreign(GOLDEN / "tiny-llada")(known[f"{case}.ids"], mask)[..., ::4]
    # 1.01e-4 at one left-padded position, of logits up to 30; the reference itself is 9e-5 off float64.
    torch.testing.assert_close(found[mask], known[f"{case}.logits"][mask], atol=1.1e-4, rtol=0)


@torch.inference_mode()
def test_llada2_gives_the_reference_s_logits_in_blocks():
    known = load_file(GOLDEN / "llada2.logits.safetensors")
    found = read_foreign(GOLDEN / "tiny-llada2-moe")(known["ids"], pattern=AttentionPattern("block_causal", 16))
    torch.testing.assert_close(found, known["logits"], atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", CONFIGS)
@torch.inference_mode()
def test_every_family_gives_the_logits_of_its_published_equations(tmp_path, name):
    folder, ids = folder_of(name, tmp_path), ids_of(1, 7)[0].tolist()
    denoiser = read(folder)
    for pattern in (FULL, CAUSAL):
        wanted = reference_logits(folder, ids, is_causal=pattern is CAUSAL).float()
        if denoiser.config.model.shifted and pattern is FULL:
            wanted = torch.cat([wanted[:1], wanted[:-1]])  # token i is told at i - 1, and the first one by itself
        closely(denoiser(torch.tensor([ids]), pattern=pattern)[0], wanted)


def test_which_families_tell_a_token_at_the_position_before(tmp_path):
    told = {name: read(write_folder(tmp_path / name, config)).config.model.shifted for name, config in CONFIGS.items()}
    assert {name for name, shifted in told.items() if not shifted} == {n for n in CONFIGS if n.startswith("llada")}


@torch.inference_mode()
def test_a_left_padded_row_of_shifted_logits_is_the_row_alone(tmp_path):
    denoiser, ids = read(folder_of("dream", tmp_path)), ids_of(2, 9)
    is_real = torch.arange(9) >= torch.tensor([[4], [0]])
    closely(denoiser(ids, is_real)[0, 4:], denoiser(ids[:1, 4:])[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("name", CONFIGS)
def test_what_was_read_is_written_again_bit_for_bit(tmp_path, name, shards, dtype):
    folder = folder_of(name, tmp_path, tensors=random_tensors(CONFIGS[name], dtype), shards=shards)
    (folder / "generation_config.json").write_text('{"mask_token_id": null}\n')
    denoiser = read(folder)
    assert denoiser.embed.weight.dtype == dtype
    write_foreign(weights_of(denoiser), denoiser.config, opened_of(folder).layout, tmp_path / "out")
    assert_equal_files(folder, tmp_path / "out")
    wide = read(folder, dtype=torch.float32)
    assert {tensor.dtype for tensor in weights_of(wide).values()} == {torch.float32}
    write_foreign(weights_of(wide), wide.config, opened_of(folder).layout, tmp_path / "again")
    assert_equal_files(folder, tmp_path / "again")


@pytest.mark.parametrize("name", NAMES)
def test_golden_checkpoints_come_back_bit_for_bit(tmp_path, name):
    denoiser, layout = read_foreign(GOLDEN / name), open_foreign(GOLDEN / name).layout
    write_foreign(weights_of(denoiser), denoiser.config, layout, tmp_path / "out")
    assert_equal_files(GOLDEN / name, tmp_path / "out")


def test_types_that_differ_within_a_file_are_kept(tmp_path):
    tensors = random_tensors(LLADA, torch.bfloat16)
    for name in tensors:
        if "norm" in name or name.endswith("0.k_proj.weight"):
            tensors[name] = tensors[name].float()
    folder = write_folder(tmp_path / "in", LLADA, tensors)
    denoiser = read_foreign(folder)
    assert denoiser.blocks[0].attention.qkv.weight.dtype == torch.float32  # what holds all three of them
    assert denoiser.blocks[1].attention.qkv.weight.dtype == torch.bfloat16
    write_foreign(weights_of(denoiser), denoiser.config, open_foreign(folder).layout, tmp_path / "out")
    assert_equal_files(folder, tmp_path / "out")


def test_buffers_of_positions_are_passed_over_and_written_again(tmp_path):
    tensors = {**random_tensors(QWEN2), "model.layers.0.self_attn.rotary_emb.inv_freq": torch.rand(4)}
    folder = write_folder(tmp_path / "in", QWEN2, tensors)
    denoiser = read(folder)
    write_foreign(weights_of(denoiser), denoiser.config, opened_of(folder).layout, tmp_path / "out")
    assert_equal_files(folder, tmp_path / "out")


def test_a_tied_head_that_is_written_down_must_be_the_embedding(tmp_path):
    config = {**QWEN2, "tie_word_embeddings": True}
    tensors = random_tensors(config)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    folder = write_folder(tmp_path / "in", config, tensors)
    denoiser = read(folder)
    assert denoiser.head.weight is denoiser.embed.weight
    write_foreign(weights_of(denoiser), denoiser.config, opened_of(folder).layout, tmp_path / "out")
    assert_equal_files(folder, tmp_path / "out")
    tensors["lm_head.weight"][3, 3] += 1
    write_folder(folder, config, tensors)
    with pytest.raises(CheckpointError, match=r"lm_head\.weight: is tied by config\.json, and differs"):
        read(folder)


@pytest.mark.parametrize("name", ["qwen2", "qwen2, tied"])
@pytest.mark.parametrize("shards", [1, 2])
@torch.inference_mode()
def test_a_new_row_for_the_mask_is_the_mean_of_all_and_changes_no_other_logit(tmp_path, name, shards):
    folder, ids = folder_of(name, tmp_path, shards=shards), ids_of(1, 9)
    before, opened = read(folder), open_foreign(folder, mask_id="new")
    after = read_foreign(folder, mask_id="new")
    assert (after.config.mask_id, after.config.vocab_size) == (ROWS, ROWS + 1)
    closely(after(ids)[..., :ROWS], before(ids))
    closely(after.embed.weight[ROWS], before.embed.weight.mean(0))
    closely(after(ids)[..., ROWS], before(ids).mean(-1))
    write_foreign(weights_of(after), after.config, opened.layout, tmp_path / "out")
    again = read_foreign(tmp_path / "out")  # which says now what its mask is
    assert again.config == after.config
    assert torch.equal(again(ids), after(ids))


@pytest.mark.parametrize("name", ["qwen2", "qwen2, tied"])
def test_a_new_row_is_one_of_embedding_and_head_whatever_else_has_as_many_rows(tmp_path, name):
    config = {
        **CONFIGS[name],
        "vocab_size": DIM - 1,
        "eos_token_id": 3,
    }  # one more, and every matrix D wide has as many
    tensors = random_tensors(config)
    for key in [key for key in tensors if key.startswith(("model.embed_tokens", "lm_head"))]:
        tensors[key] = tensors[key][: DIM - 1].contiguous()
    folder = write_folder(tmp_path / "in", config, tensors)
    after, before = weights_of(read_foreign(folder, mask_id="new")), weights_of(read_foreign(folder, mask_id=7))
    for key in before.keys() - {"embed.weight", "head.weight"}:
        assert torch.equal(after[key], before[key]), key
    assert after["embed.weight"].shape == (DIM, DIM)


@torch.inference_mode()
def test_heads_that_turn_in_part_are_known_from_newer_files_too(tmp_path):
    shutil.copytree(GOLDEN / "tiny-llada2-moe", tmp_path / "in")
    config = json.loads((tmp_path / "in" / "config.json").read_text())
    del config["rope_scaling"]
    moved = {name: config.pop(name) for name in ("rope_theta", "partial_rotary_factor")}
    (tmp_path / "in" / "config.json").write_text(
        json.dumps({**config, "rope_parameters": moved | {"rope_type": "default"}})
    )
    known, pattern = load_file(GOLDEN / "llada2.logits.safetensors"), AttentionPattern("block_causal", 16)
    found = read_foreign(tmp_path / "in")(known["ids"], pattern=pattern)
    torch.testing.assert_close(found, known["logits"], atol=1e-4, rtol=0)


def test_a_model_of_our_own_goes_out_as_llada_where_that_can_hold_it(tmp_path):
    own = new_denoiser(qk_norm=False, tie_embeddings=False, heads=4, kv_heads=2)
    write_foreign(weights_of(own), own.config, layout_for(own.config), tmp_path / "out")
    again = read_foreign(tmp_path / "out")
    ids = ids_of(2, 9)
    with torch.inference_mode():
        assert torch.equal(again(ids), own(ids))
    assert again.config.mask_id == own.config.mask_id
    for denoiser, lacking in (
        (new_denoiser(), r"qk_norm=True, model\.scale_embeddings"),
        (mixed_denoiser(), "experts="),
    ):
        with pytest.raises(ConfigError, match=f"no public format holds such a model.*{lacking}"):
            layout_for(denoiser.config)


def test_nothing_is_written_over_and_nothing_of_another_model(tmp_path):
    denoiser, layout = read(folder_of("dream", tmp_path)), open_foreign(tmp_path / "in").layout
    with pytest.raises(DataError, match="is not empty"):
        write_foreign(weights_of(denoiser), denoiser.config, layout, tmp_path / "in")
    weights = {name: tensor for name, tensor in weights_of(denoiser).items() if name != "norm.weight"}
    with pytest.raises(CheckpointError, match=r"lack model\.norm\.weight"):
        write_foreign(weights, denoiser.config, layout, tmp_path / "out")
    other = layout.model_copy(update={"family": "gpt9"})
    with pytest.raises(CheckpointError, match="family: is not known, got 'gpt9'"):
        write_foreign(weights_of(denoiser), denoiser.config, other, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["../gone.py", "{root}/gone.py", "a/gone.py", "..", ""])
@pytest.mark.parametrize("part", ["texts", "headers"])
def test_nothing_is_written_outside_of_the_folder(tmp_path, part, name):
    denoiser, layout = read(folder_of("dream", tmp_path)), open_foreign(tmp_path / "in").layout
    [some] = list(getattr(layout, part).values())[:1]
    crafted = layout.model_copy(update={part: {**getattr(layout, part), name.format(root=tmp_path): some}})
    with pytest.raises(CheckpointError, match="would be written elsewhere"):
        write_foreign(weights_of(denoiser), denoiser.config, crafted, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


def test_a_qwen2_that_goes_out_as_dream_says_where_dreams_code_looks_for_it_what_other_defaults_would_change(tmp_path):
    kept = {"rope_theta": None, "rope_parameters": {"rope_theta": 1e6, "rope_type": "default"}}
    opened = open_foreign(write_folder(tmp_path, {**QWEN2, **kept}, random_tensors(QWEN2)), mask_id=36)
    layout = trained_layout(opened.layout, opened.config, is_causal=False, in_blocks=False)
    told = json.loads(layout.texts["config.json"])
    assert (told["model_type"], told["rope_theta"], told["pad_token_id"]) == ("Dream", 1e6, 35)


def test_a_library_reads_what_was_written(tmp_path):
    tensors = random_tensors(DREAM)
    save_file(tensors, tmp_path / "plain")
    denoiser = read(write_folder(tmp_path / "in", DREAM, tensors))
    write_foreign(weights_of(denoiser), denoiser.config, open_foreign(tmp_path / "in").layout, tmp_path / "out")
    again = load_file(tmp_path / "out" / "model.safetensors")
    assert again.keys() == tensors.keys()
    assert all(torch.equal(again[name], tensor) for name, tensor in tensors.items())
