"""A public checkpoint becomes a run that generates, and the run becomes the checkpoint again, bit for bit."""

import filecmp
import json
import resource
import shutil
from pathlib import Path

import pytest
import tokenizers
import torch
from conftest import SmallCorpus, make_small_bundle, make_small_corpus
from safetensors.torch import load_file, save_file

from dllm_core.checkpoints.bundle import read_bundle
from dllm_core.checkpoints.run_dir import RunDir
from dllm_core.decoding.config import DecodeConfig
from dllm_core.decoding.engine import Engine
from dllm_core.decoding.request import Request
from dllm_core.errors import CheckpointError, ConfigError, DataError
from dllm_core.model.families import LLADA, places
from dllm_core.model.foreign import open_foreign, read_foreign, write_foreign
from dllm_core.model.pattern import CAUSAL
from dllm_core.model.tensor_file import Header
from workflows.console import Console
from workflows.generate.asked import Asked
from workflows.generate.flow import Generator
from workflows.pipeline.flow import Pipeline
from workflows.target import Target, find_run
from workflows.transfer.flow import export_checkpoint, import_checkpoint

GOLDEN = Path(__file__).parents[2] / "golden"
QUIET = Console("json")


@pytest.fixture
def root(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def imported(folder: Path, *words: str, name: str = "copy") -> RunDir:
    return RunDir.at(import_checkpoint(str(folder), name, words, QUIET)["run"])


def written(run: RunDir, command: str = "out") -> Path:
    return Path(export_checkpoint(run.url, command, QUIET)["folder"])


def ids_of(tokenizer: Path) -> dict[str, int]:
    return tokenizers.Tokenizer.from_file(str(tokenizer)).get_vocab(with_added_tokens=True)


def qwen_folder(folder: Path) -> Path:
    """An autoregressive checkpoint: Qwen2's shapes under LLaDA's tokenizer, whose mask is out of sight."""
    shutil.copytree(GOLDEN / "tiny-llada", folder)
    weights, plain = load_file(folder / "model.safetensors"), {}
    old = json.loads((folder / "config.json").read_text())
    names = {"attn_out": "self_attn.o_proj", "ff_proj": "mlp.gate_proj", "up_proj": "mlp.up_proj"}
    names |= {"ff_out": "mlp.down_proj", "attn_norm": "input_layernorm", "ff_norm": "post_attention_layernorm"}
    tops = {"wte": "model.embed_tokens", "ln_f": "model.norm", "ff_out": "lm_head"}
    for name, tensor in weights.items():
        parts = name.split(".")
        if parts[2] == "blocks":
            new = f"model.layers.{parts[3]}.{names.get(parts[4], f'self_attn.{parts[4]}')}.weight"
        else:
            new, tensor = f"{tops[parts[2]]}.weight", tensor[:998] if parts[2] != "ln_f" else tensor
        plain[new] = tensor.contiguous()
    save_file(plain, folder / "model.safetensors", {"format": "pt"})
    config = {"model_type": "llama", "hidden_size": old["d_model"], "num_attention_heads": old["n_heads"]}
    config |= {"num_hidden_layers": old["n_layers"], "intermediate_size": old["mlp_hidden_size"], "vocab_size": 998}
    config |= {"rope_theta": 5e5, "rms_norm_eps": 1e-5, "hidden_act": "silu", "max_position_embeddings": 256}
    (folder / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": False, "eos_token_id": 996}))
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    tokenizer["added_tokens"] = [token for token in tokenizer["added_tokens"] if token["id"] < 998]
    tokenizer["model"]["vocab"] = {token: i for token, i in tokenizer["model"]["vocab"].items() if i < 998}
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    (folder / "tokenizer_config.json").write_text("{}")
    return folder


@pytest.mark.parametrize("name", ["tiny-llada", "tiny-llada2-moe"])
def test_what_was_imported_is_exported_bit_for_bit_and_decodes_as_it_did(root, name):
    run = imported(GOLDEN / name)
    bundle, denoiser = read_bundle(run), read_foreign(GOLDEN / name)
    ids = torch.arange(24)[None]
    with torch.inference_mode():
        assert torch.equal(bundle.denoiser()(ids), denoiser(ids))
    assert bundle.tokenizer().json_text == (GOLDEN / name / "tokenizer.json").read_bytes().decode()
    assert bundle.tokenizer().mask_id == bundle.config.mask_id == denoiser.config.mask_id
    recipe, found = find_run(run.url, ["decode.max_tokens=12"])
    assert found.name == run.name
    told = Generator(recipe, run, QUIET).one(Asked(prompt="hello"), None)
    assert told["num_calls"] > 0
    out = written(run)
    files = sorted(path.name for path in (GOLDEN / name).iterdir())
    assert files == sorted(path.name for path in out.iterdir())
    assert filecmp.cmpfiles(GOLDEN / name, out, files, shallow=False)[0] == files


def test_blocks_are_decoded_in_those_that_the_family_has_or_the_user_says(root):
    assert read_bundle(imported(GOLDEN / "tiny-llada2-moe")).manifest.block_length == 32
    words = ("noise.block_length=8", "decode.block_length=8", "decode.steps_per_block=8")
    bundle = read_bundle(imported(GOLDEN / "tiny-llada2-moe", *words))
    decode = DecodeConfig.checked({**bundle.manifest.decode, "max_tokens": 20})
    request = Request(prompt=(5, 6, 7), suffix=(), config=decode, seed=0)
    kept, whole = (Engine(bundle, keeps_keys=keeps).generate([request])[0] for keeps in (True, False))
    assert kept.tokens == whole.tokens
    with pytest.raises(ConfigError, match=r"decode\.block_length: must be noise\.block_length=16"):
        imported(GOLDEN / "tiny-llada2-moe", "noise.block_length=16")


def test_an_import_is_the_same_run_again_and_another_type_another(root):
    first, again = imported(GOLDEN / "tiny-llada"), imported(GOLDEN / "tiny-llada")
    narrow = imported(GOLDEN / "tiny-llada", "dtype=bfloat16")
    assert first.name == again.name != narrow.name
    blocks = [
        [],
        ["noise.block_length=16", "decode.block_length=16", "decode.steps_per_block=16"],
        ["packing.seq_len=64"],
    ]
    others = [imported(GOLDEN / "tiny-llada2-moe", *words) for words in blocks]
    assert [read_bundle(run).manifest.block_length for run in others] == [32, 16, 32]  # none is written over another
    assert [read_bundle(run).config.context_length == 64 for run in others] == [False, False, True]
    weights = load_file(read_bundle(narrow).folder / "model.safetensors")
    assert {tensor.dtype for tensor in weights.values()} == {torch.bfloat16}
    recipe, _ = find_run(narrow.url, ["decode.max_tokens=8"])
    assert Generator(recipe, narrow, QUIET).one(Asked(prompt="hello"), None)["num_calls"] > 0


def test_a_corpus_is_named_by_its_path_as_a_section_or_as_a_mixture(root):
    (root / "text").mkdir()
    (root / "text" / "a.txt").write_text("hello")
    plain = "{type: text, path: text}"
    said = ("corpus.path=text", f"corpus={plain}", f"corpus={{type: mixture, sources: [{plain}]}}")
    runs = [imported(GOLDEN / "tiny-llada", word, "packing.seq_len=64") for word in ("seed=0", *said)]
    corpora = [read_bundle(run).manifest.lineage.corpus for run in runs]
    assert [corpus == "none" for corpus in corpora] == [True, False, False, False]
    assert corpora[1] == corpora[2]
    assert len({run.name for run in runs}) == 3


def test_an_autoregressive_checkpoint_needs_to_be_told_its_mask(root):
    folder = qwen_folder(root / "in")
    with pytest.raises(ConfigError, match=r"mask_id: no mask token.*mask_id=new"):
        imported(folder)
    assert not (root / "dllm-runs").exists()
    run = imported(folder, "mask_id=new")
    bundle = read_bundle(run)
    assert (bundle.config.mask_id, bundle.config.vocab_size, bundle.tokenizer().mask_id) == (998, 999, 998)
    assert 998 not in bundle.tokenizer().encode("<|mask|> text")
    assert ids_of(folder / "tokenizer.json").items() <= ids_of(bundle.folder / "tokenizer.json").items()
    assert (bundle.config.eos_id, bundle.config.pad_id) == (bundle.tokenizer().eos_id, bundle.tokenizer().pad_id)
    ids = torch.arange(12)[None]
    with torch.inference_mode():
        wanted = read_foreign(folder, mask_id=900)(ids, pattern=CAUSAL)
        torch.testing.assert_close(bundle.denoiser()(ids, pattern=CAUSAL)[..., :998], wanted, atol=1e-4, rtol=0)
    recipe, _ = find_run(run.url, ["decode.max_tokens=8"])
    assert Generator(recipe, run, QUIET).one(Asked(prompt="hello"), None)["num_tokens"] > 0
    again = imported(written(run), name="again")
    assert read_bundle(again).config == bundle.config
    assert filecmp.cmp(read_bundle(again).folder / "model.safetensors", bundle.folder / "model.safetensors", False)


@pytest.mark.parametrize("has_token", [True, False])
def test_a_spare_id_may_be_the_mask_with_or_without_a_token_of_its_own(root, has_token):
    folder = qwen_folder(root / "in")
    if not has_token:
        tokenizer = json.loads((folder / "tokenizer.json").read_text())
        tokenizer["added_tokens"] = [token for token in tokenizer["added_tokens"] if token["id"] != 990]
        tokenizer["model"]["vocab"].pop("<|r990|>", None)
        (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    bundle = read_bundle(imported(folder, "mask_id=990"))
    assert bundle.config.mask_id == bundle.tokenizer().mask_id == 990
    assert bundle.tokenizer().token_text(990) == ("<|r990|>" if has_token else "<|mask|>")
    assert (bundle.config.eos_id, bundle.config.pad_id) == (bundle.tokenizer().eos_id, bundle.tokenizer().pad_id)
    assert bundle.config.vocab_size == 998


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        (["mask_id=5"], r"mask_id: the checkpoint says 998, got 5"),
        (["mask_id=yes"], r"mask_id: must be an id or new, got True"),
        (["dtype=int8"], r"dtype: unknown type, got 'int8': one of float32"),
        (["packing.seq_len=2048"], r"packing\.seq_len: must be <= 1024, the checkpoint's context, got 2048"),
        (["model.heads=3"], r"model: is the checkpoint's"),
        (["decode.step=3"], r"decode\.step: unknown name"),
    ],
)
def test_words_that_mean_nothing_are_refused_before_anything_is_written(root, words, problem):
    with pytest.raises(ConfigError, match=problem):
        imported(GOLDEN / "tiny-llada", *words)
    assert not (root / "dllm-runs").exists()


def test_a_tokenizer_that_is_missing_or_of_another_model_is_refused(root):
    folder = root / "in"
    shutil.copytree(GOLDEN / "tiny-llada2-moe", folder)
    shutil.copy(GOLDEN / "tiny-llada" / "tokenizer.json", folder)
    with pytest.raises(CheckpointError, match=r"tokenizer\.json: has ids up to 999, the checkpoint's last is 639"):
        imported(folder)
    (folder / "tokenizer.json").unlink()
    with pytest.raises(CheckpointError, match=r"tokenizer\.json: cannot be read.*save the checkpoint's tokenizer"):
        imported(folder)


def test_a_tokenizer_that_counts_otherwise_than_its_file_is_refused(root):
    folder = qwen_folder(root / "in")
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    tokenizer["added_tokens"] = [token for token in tokenizer["added_tokens"] if token["id"] != 995]
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(CheckpointError, match=r"endoftext\|> has the id 995 there, and the checkpoint's eos_id is 996"):
        imported(folder, "mask_id=990")


def test_imported_weights_are_not_trained_over(root):
    run = imported(GOLDEN / "tiny-llada")
    recipe, _ = find_run(run.url, [])
    with pytest.raises(ConfigError, match=r"its weights were imported.*start\.run="):
        Pipeline(Target(recipe, run, None), QUIET).train()


def test_a_run_of_our_own_goes_out_as_llada_where_it_fits_and_comes_back(
    tmp_path, monkeypatch, small_corpus: SmallCorpus
):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=r"no public format holds such a model.*model\.qk_norm=True"):
        written(make_small_bundle(small_corpus, tmp_path / "tied"))
    plain = make_small_corpus(tmp_path / "plain", model={"qk_norm": False, "tie_embeddings": False})
    run = make_small_bundle(plain, tmp_path / "untied")
    out = written(run)
    with pytest.raises(DataError, match="is not empty"):
        written(run)
    back, ids = read_bundle(imported(out)), torch.arange(12)[None]
    with torch.inference_mode():
        assert torch.equal(back.denoiser()(ids), read_bundle(run).denoiser()(ids))
    assert back.config.mask_id == read_bundle(run).config.mask_id


@pytest.mark.parametrize(
    ("sections", "what"),
    [
        ({"objective": {"type": "autoregressive"}}, "objective.type=autoregressive"),
        ({"objective": {"type": "masked_lm"}}, "objective.type=masked_lm"),
        ({"objective": {"type": "block_diffusion"}, "noise": {"block_length": 4}}, "objective.type=block_diffusion"),
        ({"noise": {"process": {"type": "uniform"}}}, "noise.process.type=uniform"),
    ],
)
def test_a_run_that_sees_or_noises_otherwise_than_llada_does_not_go_out_as_llada(tmp_path, sections, what):
    corpus = make_small_corpus(tmp_path / "other", model={"qk_norm": False, "tie_embeddings": False}, **sections)
    with pytest.raises(ConfigError, match=f"export: no public format holds such a model; `llada` would but for {what}"):
        written(make_small_bundle(corpus, tmp_path / "run"), str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_an_export_that_cannot_be_written_whole_leaves_nothing_and_is_tried_again_at_the_same_place(root):
    run, before = imported(GOLDEN / "tiny-llada"), resource.getrlimit(resource.RLIMIT_FSIZE)
    for made in (True, False):
        if made:
            (root / "out").mkdir()
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, before[1]))  # of 7 MB of weights
        try:
            with pytest.raises(DataError, match=r"out: cannot be written \(File too large\)"):
                written(run)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
        assert (root / "out").exists() == made
        assert not made or not any((root / "out").iterdir())
        shutil.rmtree(written(run))
    (root / "file").write_text("kept")
    with pytest.raises(DataError, match=r"file: cannot be written \(Not a directory\)"):
        written(run, "file")
    assert (root / "file").read_text() == "kept"


def test_what_is_not_carried_along_is_named(root, capsys):
    shutil.copytree(GOLDEN / "tiny-llada", root / "in")
    for name in ("LICENSE", "chat_template.jinja", "tokenizer.model", ".gitattributes"):
        (root / "in" / name).write_text("x")
    (root / "in" / "additional_chat_templates").mkdir()
    told = import_checkpoint(str(root / "in"), "copy", [], Console("text"))
    assert told["left_behind"] == ["LICENSE", "additional_chat_templates", "tokenizer.model"]
    assert "Left behind, and so in no export: LICENSE, additional_chat_templates, tokenizer.model" in " ".join(
        "".join(capsys.readouterr()).split()
    )
    assert {path.name for path in written(RunDir.at(told["run"])).iterdir()} == {
        path.name for path in (root / "in").iterdir() if path.name not in (*told["left_behind"], ".gitattributes")
    }


def test_a_number_that_a_type_has_no_room_for_does_not_become_infinite(root):
    shutil.copytree(GOLDEN / "tiny-llada", root / "in")
    weights = load_file(root / "in" / "model.safetensors")
    weights["model.transformer.ln_f.weight"] = torch.full_like(weights["model.transformer.ln_f.weight"], -73728)
    save_file(weights, root / "in" / "model.safetensors", {"format": "pt"})
    problem = r"model\.safetensors: model\.transformer\.ln_f\.weight: holds 73728, and float16 ends at 65504"
    with pytest.raises(CheckpointError, match=problem):
        imported(root / "in", "dtype=float16")
    bundle = read_bundle(imported(root / "in", "dtype=bfloat16"))
    found, layout = load_file(bundle.folder / "model.safetensors"), bundle.layout()
    assert found["norm.weight"].eq(-73728).all()
    [header] = layout.parsed().values()
    halves = Header.of({name: (torch.float16, entry.shape) for name, entry in header.entries.items()}, {})
    layout = layout.model_copy(update={"headers": {"model.safetensors": halves.text}})
    with pytest.raises(CheckpointError, match=problem):
        write_foreign(found, bundle.config, layout, root / "out")


@pytest.mark.parametrize("made", [True, False])
def test_of_two_exports_into_one_folder_at_once_one_is_refused_and_spoils_nothing(root, monkeypatch, made):
    first, second = imported(GOLDEN / "tiny-llada"), imported(GOLDEN / "tiny-llada2-moe")
    if made:
        (root / "out").mkdir()

    def late(*given):
        monkeypatch.setattr("workflows.transfer.flow.write_foreign", write_foreign)
        with pytest.raises(DataError, match="out: another export is writing there"):
            written(second)
        write_foreign(*given)

    monkeypatch.setattr("workflows.transfer.flow.write_foreign", late)
    out, files = written(first), sorted(path.name for path in (GOLDEN / "tiny-llada").iterdir())
    assert sorted(path.name for path in out.iterdir()) == files
    assert filecmp.cmpfiles(GOLDEN / "tiny-llada", out, files, shallow=False)[0] == files


def test_an_import_that_has_no_room_is_refused_before_a_byte_is_copied(root):
    folder = root / "in"
    shutil.copytree(GOLDEN / "tiny-llada", folder)
    told = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**told, "mlp_hidden_size": 1 << 28}))
    config = open_foreign(GOLDEN / "tiny-llada").config
    huge = places(LLADA, config.model.model_copy(update={"ffn_dim": 1 << 28}), config.vocab_size)
    header = Header.of({place.foreign: (torch.float32, place.shape) for place in huge}, {})
    with (folder / "model.safetensors").open("wb") as file:
        data = header.text.encode()
        file.write(len(data).to_bytes(8, "little") + data)
        file.truncate(header.data_start + header.size)  # 2.5 TB, of which none is written
    with pytest.raises(DataError, match=r"storage\.root: \d+ MiB free, \d+ MiB needed"):
        imported(folder)
    assert not (root / "dllm-runs" / "runs").exists()
