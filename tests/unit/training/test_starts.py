"""A training that starts from a run has its weights at step 0, its sizes and its tokenizer, and nothing by chance."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file
from starts import Prepared, chats, imported_qwen, qwen2_folder, texts, values_of

from dllm_core.checkpoints.bundle import read_bundle
from dllm_core.checkpoints.run_dir import RunDir
from dllm_core.checkpoints.store import CheckpointStore
from dllm_core.errors import CheckpointError, ConfigError
from dllm_core.model.foreign import read_foreign
from dllm_core.model.pattern import CAUSAL
from dllm_core.model.pretrained import weights_of
from workflows.console import Console
from workflows.recipe import Recipe, load_recipe, resolved
from workflows.start import check_start
from workflows.target import open_target, read_target_recipe
from workflows.transfer.flow import export_checkpoint, import_checkpoint

QUIET = Console("json")
AUTOREGRESSIVE = {"type": "autoregressive"}


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("starts")


@pytest.fixture(scope="module")
def own(root) -> RunDir:
    """A run of our own, pre-trained on plain text."""
    sections = {"tokenizer": {"vocab_size": 300}, "model": {"dim": 32, "layers": 2, "heads": 2, "ffn_dim": 64}}
    return Prepared(values_of(root, texts(root / "text"), **sections)).trained()


@pytest.fixture(scope="module")
def qwen(root) -> RunDir:
    return imported_qwen(root)


@pytest.fixture(scope="module")
def spare(root) -> RunDir:
    """The same, whose mask is one of its rows that are no token: four more follow."""
    folder = qwen2_folder(root / "spare")
    words = ["mask_id=302", f"storage.root={root / 'storage'}"]
    return RunDir.at(import_checkpoint(str(folder), "spare", words, QUIET)["run"])


def weights_at_start(prepared: Prepared) -> dict[str, torch.Tensor]:
    found = {}
    prepared.session(lambda module: found.update({n: t.detach().clone() for n, t in weights_of(module).items()}))
    return found


@pytest.mark.parametrize("kind", ["qwen", "spare"])
def test_training_begins_with_the_bundles_weights_in_fp32_and_a_checkpoint_wins_over_them(root, kind, request):
    qwen = request.getfixturevalue(kind)  # of one, some rows are no token: they stay
    start = {"start": {"run": qwen.url}, "objective": AUTOREGRESSIVE}
    prepared = Prepared(values_of(root, texts(root / "text"), **start, train={"learning_rate": 1e-2}))
    stored, first = load_file(read_bundle(qwen).folder / "model.safetensors"), weights_at_start(prepared)
    assert {t.dtype for t in stored.values()} == {torch.bfloat16}
    assert first.keys() == stored.keys()
    assert all(torch.equal(tensor, stored[name].float()) for name, tensor in first.items())
    assert {t.dtype for t in first.values()} == {torch.float32}
    prepared.session(steps=2).run()
    second = weights_at_start(prepared)
    newest = CheckpointStore(prepared.run).at(2)
    assert all(torch.equal(second[name], t) for name, t in load_file(newest.files["model.safetensors"]).items())
    assert not torch.equal(second["norm.weight"], first["norm.weight"])


def test_the_resolved_recipe_stands_alone_and_a_moved_start_is_the_same_start(root, own, tmp_path):
    values = values_of(root, texts(root / "text"), start={"run": own.url}, name="alone")
    prepared = Prepared(values)
    recipe, bundle = prepared.recipe, read_bundle(own)
    assert recipe.model == bundle.config.model
    assert recipe.tokenizer.vocab_size == bundle.config.vocab_size
    shutil.copytree(root / "storage" / "runs" / own.name, tmp_path / "elsewhere" / "runs" / own.name)
    moved = resolved({**values, "start": {"run": str(tmp_path / "elsewhere" / "runs" / own.name)}})
    shutil.rmtree(tmp_path / "elsewhere")
    for other in (moved, Recipe.checked(yaml.safe_load(recipe.to_yaml())), read_target_recipe(prepared.run.url, [])[0]):
        assert other.corpus_fingerprint([]) == recipe.corpus_fingerprint([])
        assert other.run_fingerprint("corpus") == recipe.run_fingerprint("corpus")
    assert resolved(yaml.safe_load(recipe.to_yaml())) == recipe
    plain = Recipe.checked({**recipe.model_dump(mode="json"), "start": None})
    assert plain.run_fingerprint("corpus") != recipe.run_fingerprint("corpus")


def test_the_started_run_may_go_once_there_is_a_checkpoint(root, qwen, tmp_path):
    copy = tmp_path / "runs" / qwen.name
    shutil.copytree(root / "storage" / "runs" / qwen.name, copy)
    start = {"start": {"run": str(copy)}, "objective": AUTOREGRESSIVE, "name": "orphan"}
    prepared = Prepared(values_of(root, texts(root / "text"), **start))
    prepared.session(steps=2).run()
    shutil.rmtree(copy)
    run = prepared.trained()
    target = open_target(run.url, [])
    assert (target.corpus, target.run.name) == (prepared.corpus, run.name)
    assert export_checkpoint(run.url, str(tmp_path / "out"), QUIET)["family"] == "qwen2"


def test_other_weights_are_another_start(root, qwen, own):
    values = values_of(root, texts(root / "text"), objective=AUTOREGRESSIVE)
    folder = qwen2_folder(root / "other", seed=1)
    words = ["mask_id=new", f"storage.root={root / 'storage'}"]
    other = import_checkpoint(str(folder), "other", words, QUIET)["run"]
    first, second = (resolved({**values, "start": {"run": url}}) for url in (qwen.url, other))
    assert first.model == second.model
    assert first.corpus_fingerprint([]) == second.corpus_fingerprint([])
    assert first.run_fingerprint("corpus") != second.run_fingerprint("corpus")


def test_a_bundle_that_was_changed_since_is_refused_wherever_it_is_met(root, qwen, tmp_path):
    copy = tmp_path / "runs" / qwen.name
    shutil.copytree(root / "storage" / "runs" / qwen.name, copy)
    values = values_of(root, texts(root / "text"), start={"run": str(copy)}, objective=AUTOREGRESSIVE, name="changed")
    prepared = Prepared(values)
    section = prepared.recipe.start
    weights = copy / "bundle" / "model.safetensors"
    data = weights.read_bytes()
    weights.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    with pytest.raises(CheckpointError, match=r"model\.safetensors: does not match its sha256"):
        prepared.session()
    shutil.rmtree(copy)
    folder = qwen2_folder(tmp_path / "other", seed=1)
    words = ["mask_id=new", f"storage.root={tmp_path / 'storage'}"]
    other = Path(import_checkpoint(str(folder), "other", words, QUIET)["run"])
    shutil.copytree(other, copy)
    with pytest.raises(ConfigError, match=r"start\.run: its bundle was changed since"):
        check_start(section)
    with pytest.raises(CheckpointError, match=r"its weights are .*start another run from it"):
        prepared.session()
    with pytest.raises(ConfigError, match=r"start\.weights_sha256: the bundle was changed since: .*leave it out"):
        resolved({**values, "start": section.model_dump()})
    shutil.rmtree(copy)
    with pytest.raises(ConfigError, match=r"start\.run: no run to start from: there is no bundle"):
        check_start(section)


def test_what_trains_and_what_masks_read_as_are_part_of_a_runs_name_and_unsaid_they_are_not(root, own):
    def named(**start: object) -> str:
        values = values_of(root, texts(root / "text"), start={"run": own.url, **start})
        return resolved(values).run_fingerprint("corpus")

    said = [{"lora": {}}, {"lora": {"rank": 4}}, {"mask_noise": {}}, {"mask_noise": {"steps": 9}}]
    assert len({named(), *(named(**start) for start in said)}) == 5
    assert named(lora=None, mask_noise=None) == named()
    assert resolved(values_of(root, texts(root / "text"), start={"run": own.url})).start.identity.keys() == {"weights"}


@pytest.mark.parametrize(
    ("section", "problem"),
    [
        ({"start": {"run": "nowhere"}}, r"start\.run: no run to start from: is not a run, got 'nowhere'"),
        ({"start": {"run": "runs/nothing-0123456789ab"}}, r"start\.run: no run to start from: there is no bundle"),
        ({"start": {"run": "x", "loras": 1}}, r"start\.loras: unknown name: did you mean 'lora'"),
        ({"model": {"dim": 64}}, r"model\.dim: is 32 in the run that it starts from, and cannot change, got 64: leave"),
        ({"model": {"dims": 64}}, r"model\.dims: unknown name: did you mean 'dim'"),
        ({"model": {"experts": {}}}, r"model\.experts: is None in the run that it starts from"),
        ({"model": {"dim": "much"}}, r"model\.dim: must be a valid integer"),
        ({"tokenizer": {"mask_token": "<|m|>"}}, r"tokenizer\.mask_token: is '<\|mask\|>' in the run"),
        ({"tokenizer": {"vocab_size": 4096}}, r"tokenizer\.vocab_size: is 300 in the run"),
        (
            {"tokenizer": {"path": "other.json"}},
            r"tokenizer\.path: is not the tokenizer of the run",
        ),
        ({"packing": {"seq_len": 64}}, r"packing\.seq_len: must be <= 32, the context .*got 64: packing\.seq_len=32"),
        ({"tokenizer": {"chat": {"user": "<|eos|>", "end": "<|eos|>"}}}, r"the four markers must differ"),
    ],
)
def test_what_does_not_agree_with_the_start_is_refused(root, own, section, problem):
    with pytest.raises(ConfigError, match=problem):
        resolved(values_of(root, texts(root / "text"), **{"start": {"run": own.url}, **section}))


def test_what_is_said_again_agrees(root, own):
    said = {
        "tokenizer": {"vocab_size": 300, "path": str(root / "storage" / "runs" / own.name / "bundle/tokenizer.json")}
    }
    values = values_of(root, texts(root / "text"), start={"run": own.url}, model={"dim": 32, "heads": 2}, **said)
    assert resolved(values).model == read_bundle(own).config.model


def test_noise_of_tokens_is_drawn_among_the_models_rows(root, qwen, spare):
    noise = {"process": {"type": "uniform"}}
    values = values_of(root, texts(root / "text"), start={"run": qwen.url}, noise=noise)
    assert resolved(values).noise.process.type == "uniform"
    with pytest.raises(ConfigError, match=r"noise\.process\.type: draws among all ids, .*has 4 that are no token"):
        resolved({**values, "start": {"run": spare.url}})


def test_conversations_get_the_markers_that_the_tokenizer_lacks_as_new_rows(root, own):
    values = values_of(root, chats(root / "chats"), start={"run": own.url}, tokenizer={"chat": {}}, name="chat")
    prepared = Prepared({**values, "packing": {"type": "padded", "seq_len": 32}})
    old, first = load_file(read_bundle(own).folder / "model.safetensors"), weights_at_start(prepared)
    embed = first["embed.weight"]
    assert (len(old["embed.weight"]), len(embed)) == (300, 304)
    assert torch.equal(embed[:300], old["embed.weight"])
    torch.testing.assert_close(embed[300:], old["embed.weight"].mean(0).expand(4, -1), atol=1e-6, rtol=0)
    bundle = read_bundle(prepared.trained())
    tokenizer = bundle.tokenizer()
    assert [tokenizer.role_id("system"), tokenizer.role_id("user"), tokenizer.end_of_turn_id] == [300, 301, 303]
    assert bundle.config.vocab_size == 304
    text = "HEAVY RED ARROW <|user|> 17"
    assert tokenizer.encode(text) == read_bundle(own).tokenizer().encode(text)
    # A third run, from the second: its markers are there already.
    again = Prepared(values_of(root, chats(root / "chats"), start={"run": prepared.run.url}, name="again"))
    assert again.recipe.tokenizer.chat == prepared.recipe.tokenizer.chat
    assert len(weights_at_start(again)["embed.weight"]) == 304
    with pytest.raises(ConfigError, match=r"tokenizer\.chat: is \{'system': .* in the run that it starts from"):
        resolved({**values, "start": {"run": prepared.run.url}, "tokenizer": {"chat": {"user": "<|me|>"}}})


def test_markers_take_the_ids_behind_the_last_token_whether_there_is_a_row_for_them_or_not(root, qwen, spare):
    for run, new in ((qwen, 4), (spare, 0)):
        values = values_of(root, chats(root / "chats"), start={"run": run.url}, tokenizer={"chat": {}}, name="ids")
        config, old = read_bundle(run).config, load_file(read_bundle(run).folder / "model.safetensors")
        prepared = Prepared({**values, "objective": AUTOREGRESSIVE})
        first = weights_at_start(prepared)["embed.weight"]
        assert len(first) == len(old["embed.weight"]) + new
        assert torch.equal(first[: config.vocab_size], old["embed.weight"].float())
        tokenizer = read_bundle(prepared.trained()).tokenizer()
        assert sorted(tokenizer.special_ids)[-4:] == [config.mask_id + 1 + k for k in range(4)]


def test_a_model_that_was_trained_on_goes_out_under_its_own_names_and_comes_back(root, qwen):
    start = {"start": {"run": qwen.url}, "objective": AUTOREGRESSIVE, "name": "tuned"}
    run = Prepared(values_of(root, texts(root / "text"), **start)).trained()
    bundle, out = read_bundle(run), root / "out"
    assert export_checkpoint(run.url, str(out), QUIET)["family"] == "qwen2"
    before = load_file(root / "qwen" / "model.safetensors")
    after = load_file(out / "model.safetensors")
    assert {name: t.dtype for name, t in after.items()} == {name: t.dtype for name, t in before.items()}
    assert not torch.equal(after["model.norm.weight"], before["model.norm.weight"])
    back, ids = read_foreign(out, dtype=torch.float32), torch.arange(20)[None]
    assert back.config.mask_id == bundle.config.mask_id
    with torch.inference_mode():
        ours = bundle.denoiser()
        rounded = {name: t.bfloat16().float() for name, t in weights_of(ours).items()}
        ours.load_state_dict(rounded, strict=False)
        assert torch.equal(back(ids, pattern=CAUSAL), ours(ids, pattern=CAUSAL))


def test_rows_that_were_added_go_out_too(root, qwen):
    values = values_of(root, chats(root / "chats"), start={"run": qwen.url}, tokenizer={"chat": {}}, name="grown")
    run = Prepared({**values, "objective": AUTOREGRESSIVE}).trained()
    export_checkpoint(run.url, str(root / "grown"), QUIET)
    rows = json.loads((root / "grown" / "config.json").read_text())["vocab_size"]
    assert rows == read_bundle(run).config.vocab_size == read_bundle(qwen).config.vocab_size + 4
    # Libraries that go by the list beside the tokenizer find in it what was added: the mask at import, four markers.
    listed = json.loads((root / "grown" / "tokenizer_config.json").read_text())["added_tokens_decoder"]
    added = json.loads((root / "grown" / "tokenizer.json").read_text())["added_tokens"]
    assert {number: token["content"] for number, token in listed.items()} == {str(t["id"]): t["content"] for t in added}
    assert listed[str(rows - 1)]["special"] is True
    assert len(added) == 3 + 1 + 4
    words = [f"storage.root={root / 'storage'}"]
    back = RunDir.at(import_checkpoint(str(root / "grown"), "back", words, QUIET)["run"])
    assert read_bundle(back).config == read_bundle(run).config.model_copy(update={"context_length": 64})


def test_showing_a_recipe_with_a_start_writes_it_out_and_loads_nothing_large(root, own):
    recipe = root / "mine.yaml"
    recipe.write_text(yaml.safe_dump(values_of(root, texts(root / "text"))))
    code = (
        "import sys; from workflows.target import open_target, read_target_recipe;"
        f"print(read_target_recipe({str(recipe)!r}, ['start.run={own.url}'])[0].to_yaml());"
        "print(sorted({'torch', 'ray', 'deepspeed', 'boto3'} & set(sys.modules)))"
    )
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert answer.strip().endswith("[]")
    shown = Recipe.checked(yaml.safe_load(answer.strip().removesuffix("[]")))
    assert shown == load_recipe(recipe, [f"start.run={own.url}"])
    assert shown.start.weights_sha256 == read_bundle(own).manifest.weights_sha256
