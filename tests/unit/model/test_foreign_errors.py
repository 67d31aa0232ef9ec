"""A foreign folder that is not whole, or says what we cannot compute, is refused in one line that says what and why."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import draws
from foreign_folders import DREAM, LLADA, LLADA_MOE, QWEN2, ROWS, random_tensors, write_folder
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from dllm_core.errors import CheckpointError, ConfigError, DllmError
from dllm_core.model.foreign import open_foreign, read_foreign

GOLDEN = Path(__file__).parents[2] / "golden"


def test_missing_unknown_and_misshapen_tensors_are_listed_all_together(tmp_path):
    tensors = random_tensors(LLADA)
    lost = [f"model.transformer.blocks.{layer}.q_proj.weight" for layer in range(2)]
    for name in lost:
        del tensors[name]
    tensors |= {"model.transformer.wpe.weight": torch.zeros(3), "model.transformer.ln_f.weight": torch.ones(31)}
    with pytest.raises(CheckpointError) as told:
        read_foreign(write_folder(tmp_path, LLADA, tensors))
    for text in (*lost, "unknown model.transformer.wpe.weight", "ln_f.weight is [31], must be [32]"):
        assert text in str(told.value)


def test_of_very_many_the_first_are_listed_with_the_number_of_the_rest(tmp_path):
    kept = {name: tensor for name, tensor in random_tensors(LLADA).items() if ".blocks." not in name}
    with pytest.raises(CheckpointError, match=r"missing .*; and 10 more$"):
        open_foreign(write_folder(tmp_path, LLADA, kept))


@pytest.mark.parametrize("sizes", [{"n_heads": 8, "n_kv_heads": 4}, {"n_layers": 1}, {"n_layers": 3}, {"d_model": 64}])
def test_a_config_of_another_model_is_refused(tmp_path, sizes):
    with pytest.raises(CheckpointError, match=r"missing|unknown|must be"):
        open_foreign(write_folder(tmp_path, {**LLADA, **sizes}, random_tensors(LLADA)))


@pytest.mark.parametrize(
    ("config", "field", "value"),
    [
        *((LLADA, name, value) for name, value in {"alibi": True, "rope": False, "activation_type": "gelu"}.items()),
        *((LLADA, name, True) for name in ("include_bias", "attention_layer_norm", "scale_logits", "input_emb_norm")),
        *((LLADA, name, value) for name, value in {"block_type": "sequential", "layer_norm_type": "low"}.items()),
        *((base, "rope_scaling", {"type": "yarn", "factor": 4}) for base in (LLADA, QWEN2, DREAM, LLADA_MOE)),
        *((QWEN2, name, value) for name, value in {"use_sliding_window": True, "hidden_act": "gelu"}.items()),
        (QWEN2, "layer_types", ["full_attention", "sliding_attention"]),
        (QWEN2, "quantization_config", {"bits": 4}),
        *(({**QWEN2, "model_type": name}, "is_causal", False) for name in ("qwen2", "qwen3", "llama")),
        ({**QWEN2, "model_type": "llama"}, "attention_bias", True),
        ({**QWEN2, "model_type": "llama"}, "mlp_bias", True),
        ({**QWEN2, "model_type": "llama"}, "rope_parameters", {"rope_type": "llama3", "rope_theta": 1}),
        (LLADA_MOE, "moe_layer_freq", [1, 0]),
        (LLADA_MOE, "shared_expert_intermediate_size", 12),
        (LLADA_MOE, "moe_router_score_function", "sigmoid"),
        (LLADA_MOE, "norm_topk_prob", True),
        (LLADA_MOE, "routed_scaling_factor", 2.5),
    ],
)
def test_a_field_that_we_do_not_compute_is_refused_by_name_and_value(tmp_path, config, field, value):
    folder = write_folder(tmp_path, {**config, field: value}, random_tensors(config))
    with pytest.raises(CheckpointError, match=rf"config\.json: {field}: is not supported, got") as told:
        open_foreign(folder, mask_id=None if "mask_token_id" in config else 36)
    assert str(told.value).count("\n") == 0


@pytest.mark.parametrize("field", ["n_group", "topk_group", "routed_scaling_factor", "partial_rotary_factor"])
def test_what_one_reader_takes_for_another_number_than_the_next_must_be_said(tmp_path, field):
    shutil.copytree(GOLDEN / "tiny-llada2-moe", tmp_path, dirs_exist_ok=True)
    said = json.loads((tmp_path / "config.json").read_text())
    del said[field]
    (tmp_path / "config.json").write_text(json.dumps(said))
    with pytest.raises(CheckpointError, match=rf"config\.json: {field}: is missing"):
        open_foreign(tmp_path)


@pytest.mark.parametrize("name", ["rope_scaling", "rope_parameters"])
def test_two_values_of_rope_theta_are_refused_and_the_same_twice_is_one(tmp_path, name):
    def said(**more):
        return open_foreign(write_folder(tmp_path, {**DREAM, **more})).config.model.rope_theta

    with pytest.raises(
        CheckpointError, match=r"rope_theta: is there more than once, got \[1000\.0, 1000000\.0\]: keep"
    ):
        said(**{name: {"rope_type": "default", "rope_theta": 1e3}})
    assert said(**{name: {"rope_type": "default", "rope_theta": 1e6}}) == 1e6
    assert said(**{name: {"rope_type": "default", "rope_theta": 1e3}}, rope_theta=None) == 1e3


def test_an_unknown_family_is_told_the_known_ones(tmp_path):
    folder = write_folder(tmp_path, {**QWEN2, "model_type": "mamba"}, {})
    with pytest.raises(
        CheckpointError, match=r"model_type: is not known, got 'mamba': known are .*llada.*Dream.*qwen2"
    ):
        open_foreign(folder)
    with pytest.raises(CheckpointError, match=r"hidden_size: is missing"):
        open_foreign(write_folder(tmp_path, {name: v for name, v in QWEN2.items() if name != "hidden_size"}, {}))


def test_a_folder_that_is_not_whole_is_refused_by_the_file(tmp_path):
    with pytest.raises(CheckpointError, match=r"holds no config\.json"):
        open_foreign(tmp_path)
    folder = write_folder(tmp_path / "in", LLADA, shards=3)
    shard = folder / "model-00002-of-00003.safetensors"
    whole = shard.read_bytes()
    for data, problem in ((whole[:-5], "its header says"), (whole[:40], "safetensors"), (b"", "safetensors")):
        shard.write_bytes(data)
        with pytest.raises(CheckpointError, match=f"{shard.name}.*{problem}"):
            open_foreign(folder)
    shard.unlink()
    with pytest.raises(CheckpointError, match=f"{shard.name}: is missing"):
        open_foreign(folder)
    save_file({}, shard)
    with pytest.raises(CheckpointError, match=r"index\.json: names .* where they are not"):
        open_foreign(folder)
    (tmp_path / "pickled").mkdir()
    (tmp_path / "pickled" / "config.json").write_text(json.dumps(LLADA))
    (tmp_path / "pickled" / "pytorch_model.bin").write_bytes(b"x")
    with pytest.raises(CheckpointError, match="holds pickled weights"):
        open_foreign(tmp_path / "pickled")


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "model.safetensors", "model.safetensors.index.json"])
def test_a_file_that_is_nested_too_deep_is_refused_in_a_line(tmp_path, name):
    text = b"[" * 100_000
    header = len(text).to_bytes(8, "little") if name == "model.safetensors" else b""
    (write_folder(tmp_path, DREAM) / name).write_bytes(header + text)
    with pytest.raises(CheckpointError, match=f"{name}: .*recursion"):
        open_foreign(tmp_path)


@settings(max_examples=draws(60), deadline=None)
@given(at=st.integers(0, 3000), value=st.integers(0, 255))
def test_a_damaged_header_is_refused_or_says_the_same_sizes(tmp_path_factory, at, value):
    folder = write_folder(tmp_path_factory.mktemp("damaged"), LLADA)
    data = bytearray((folder / "model.safetensors").read_bytes())
    data[at] = value
    (folder / "model.safetensors").write_bytes(data)
    try:
        opened = open_foreign(folder)
    except DllmError:
        return
    assert {name: shape for name, (_, shape) in opened.specs().items()} == {
        name: shape for name, (_, shape) in open_foreign(write_folder(folder, LLADA)).specs().items()
    }


@settings(max_examples=draws(150), deadline=None)
@given(
    base=st.sampled_from([LLADA, QWEN2, DREAM, LLADA_MOE]),
    data=st.data(),
    value=st.one_of(st.none(), st.booleans(), st.integers(-2, 99), st.floats(-1, 9), st.text(max_size=3), st.just([1])),
)
def test_whatever_a_config_says_is_read_or_refused_in_a_line(tmp_path_factory, base, data, value):
    folder = write_folder(tmp_path_factory.getbasetemp() / "anything", base)
    config = {**base, data.draw(st.sampled_from(sorted(base))): value}
    (folder / "config.json").write_text(json.dumps(config))
    try:
        open_foreign(folder, mask_id=None if "mask_token_id" in config else 36)
    except DllmError:
        return


NO_MASK = {name: value for name, value in DREAM.items() if name != "mask_token_id"}


def tokenizer_files(folder, *, declared: str | None = None, added: dict[str, int] | None = None) -> None:
    tokens = [{"id": number, "content": token, "special": True} for token, number in (added or {}).items()]
    (folder / "tokenizer.json").write_text(json.dumps({"added_tokens": tokens, "model": {"vocab": {}}}))
    (folder / "tokenizer_config.json").write_text(json.dumps({"mask_token": declared} if declared else {}))


def test_the_mask_is_the_config_s_then_the_tokenizer_s_then_the_user_s(tmp_path):
    folder = write_folder(tmp_path, DREAM)
    tokenizer_files(folder, declared="<hide>", added={"<hide>": 7, "[MASK]": 8})
    assert open_foreign(folder).config.mask_id == 36
    write_folder(folder, NO_MASK, random_tensors(DREAM))
    assert open_foreign(folder).config.mask_id == 7
    tokenizer_files(folder, added={"<hide>": 7, "[MASK]": 8})
    assert open_foreign(folder).config.mask_id == 8
    tokenizer_files(folder, added={"<hide>": 7, "[MASK]": 8, "<|mask|>": 9})  # two that look like it: nobody guesses
    for given_id, found in ((9, 9), ("new", ROWS)):
        assert open_foreign(folder, mask_id=given_id).config.mask_id == found
    for told in ("no mask token: .*mask_id=N takes a spare id, mask_id=new adds a row",):
        with pytest.raises(ConfigError, match=told):
            open_foreign(folder)


def test_null_is_no_mask_and_a_dictionary_may_declare_one(tmp_path):
    folder = write_folder(tmp_path, {**DREAM, "mask_token_id": None}, random_tensors(DREAM))
    tokenizer_files(folder, added={"<hide>": 7})
    (folder / "special_tokens_map.json").write_text(json.dumps({"mask_token": {"content": "<hide>"}}))
    assert open_foreign(folder).config.mask_id == 7


@pytest.mark.parametrize(
    ("config", "said", "problem"),
    [
        (DREAM, {"mask_id": 5}, r"mask_id: the checkpoint says 36, got 5: leave it out"),
        (NO_MASK, {"mask_id": ROWS}, rf"mask_id: must be an id below {ROWS}"),
        (NO_MASK, {"mask_id": -1}, r"mask_id: must be an id below"),
        (NO_MASK, {"mask_id": "last"}, r"mask_id: must be an id or new, got 'last'"),
        (NO_MASK, {"mask_id": 35}, r"mask_id: must differ from the ids of end and padding"),
        ({**DREAM, "eos_token_id": None}, {}, r"no end token: .*eos_id=N"),
        (DREAM, {"eos_id": 5}, r"eos_id: the checkpoint says 35, got 5: leave it out"),
        ({**DREAM, "eos_token_id": [33, 35]}, {"eos_id": 5}, r"eos_id: the checkpoint says \[33, 35\], got 5"),
    ],
)
def test_ids_that_mean_nothing_are_refused(tmp_path, config, said, problem):
    with pytest.raises(ConfigError, match=problem):
        open_foreign(write_folder(tmp_path, config, random_tensors(DREAM)), **said)


@pytest.mark.parametrize(
    ("file", "values"),
    [
        ("tokenizer.json", {"added_tokens": [{"id": 7}]}),
        ("tokenizer.json", {"added_tokens": {"<hide>": 7}}),
        ("tokenizer.json", {"added_tokens": [{"id": "last", "content": "<hide>"}]}),
        ("tokenizer.json", {"model": "bpe"}),
        ("tokenizer_config.json", {"added_tokens_decoder": {"last": {"content": "<hide>"}}}),
        ("tokenizer_config.json", {"added_tokens_decoder": ["<hide>"]}),
    ],
)
def test_files_of_a_tokenizer_that_make_no_sense_are_refused_in_a_line(tmp_path, file, values):
    folder = write_folder(tmp_path, DREAM)
    (folder / file).write_text(json.dumps(values))
    with pytest.raises(CheckpointError, match="its tokenizer's files make no sense"):
        open_foreign(folder)


def test_what_a_tokenizer_leaves_null_it_does_not_say(tmp_path):
    folder = write_folder(tmp_path, DREAM)
    (folder / "tokenizer.json").write_text(json.dumps({"added_tokens": None, "model": None}))
    (folder / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": None, "mask_token": None}))
    assert open_foreign(folder).config.mask_id == 36


@pytest.mark.parametrize("file", ["../in/model-00001-of-00003.safetensors", "/etc/passwd", "", ".", "..", "a\0b", 5])
def test_an_index_names_files_of_its_folder_alone(tmp_path, file):
    folder = write_folder(tmp_path / "in", DREAM, shards=3)
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    index["weight_map"]["model.norm.weight"] = file
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=r"index\.json: has no weight_map of tensors to files"):
        open_foreign(folder)


@pytest.mark.parametrize("has_weights", [True, False])
def test_adapters_that_other_software_adds_to_the_weights_are_refused(tmp_path, has_weights):
    (write_folder(tmp_path, DREAM) if has_weights else tmp_path).joinpath("adapter_config.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"holds adapters \(adapter_config\.json\), which are not read: merge"):
        open_foreign(tmp_path)


def test_weights_of_which_other_software_would_read_others_are_refused(tmp_path):
    folder = write_folder(tmp_path, DREAM, shards=3)
    (folder / "model.safetensors").write_bytes((folder / "model-00001-of-00003.safetensors").read_bytes())
    with pytest.raises(CheckpointError, match=r"index\.json: names other files than model\.safetensors beside it"):
        open_foreign(folder)


@pytest.mark.parametrize("pad", [None, -1])
def test_of_several_end_tokens_the_first_counts_and_pads_or_the_one_that_the_user_says(tmp_path, pad):
    config = {**NO_MASK, "eos_token_id": [33, 35], "pad_token_id": pad}
    folder = write_folder(tmp_path, config, random_tensors(DREAM))
    for said, eos in ((None, 33), (33, 33), (35, 35)):
        found = open_foreign(folder, mask_id=1, eos_id=said).config
        assert (found.mask_id, found.eos_id, found.pad_id) == (1, eos, eos)


PEAK = """
import sys, torch
from pathlib import Path
from dllm_core.model.foreign import read_foreign
def peak():
    return 1024 * int(next(l for l in open("/proc/self/status") if l.startswith("VmHWM")).split()[1])
read_foreign(Path(sys.argv[1]))  # a small one: what torch itself loads when it is first used, 70 MB, is no weights
before = peak()
read_foreign(Path(sys.argv[2]))
print(peak() - before)
"""


@pytest.mark.parametrize("shards", [1, 4])
def test_reading_takes_the_weights_and_little_more(tmp_path, shards):
    sizes = {"d_model": 1024, "n_layers": 6, "mlp_hidden_size": 2048, "embedding_size": 8192, "vocab_size": 8192}
    config = {**LLADA, **sizes}
    shapes = open_shapes(config)
    tensors = {name: torch.full(shape, 0.01) for name, shape in shapes.items()}
    size = sum(tensor.nbytes for tensor in tensors.values())
    assert size > 300e6
    folders = [write_folder(tmp_path / "small", LLADA), write_folder(tmp_path / "large", config, tensors, shards)]
    del tensors
    words = [sys.executable, "-c", PEAK, *map(str, folders)]
    ratio = int(subprocess.run(words, capture_output=True, text=True, check=True).stdout) / size
    print(f"peak {ratio:.3f} of {size / 1e6:.0f} MB in {shards} files")
    assert ratio <= 1.2


def open_shapes(config) -> dict[str, tuple[int, ...]]:
    """LLaDA's shapes at other sizes than the small ones."""
    dim, ffn, rows = config["d_model"], config["mlp_hidden_size"], config["embedding_size"]
    shapes = {"wte.weight": (rows, dim), "ff_out.weight": (rows, dim), "ln_f.weight": (dim,)}
    for layer in range(config["n_layers"]):
        shapes |= {f"blocks.{layer}.{name}.weight": (dim, dim) for name in ("q_proj", "k_proj", "v_proj", "attn_out")}
        shapes |= {f"blocks.{layer}.{name}.weight": (dim,) for name in ("attn_norm", "ff_norm")}
        shapes |= {f"blocks.{layer}.{name}.weight": (ffn, dim) for name in ("ff_proj", "up_proj")}
        shapes[f"blocks.{layer}.ff_out.weight"] = (dim, ffn)
    return {f"model.transformer.{name}": shape for name, shape in shapes.items()}
