"""What run.json says, and what it must never say."""

import json
import shutil
import subprocess

import torch
from conftest import SmallCorpus
from hypothesis import given
from hypothesis import strategies as st

from dllm_core.checkpoints.run_dir import RunDir
from dllm_core.storage.store import sha256
from workflows.train import facts as module
from workflows.train.facts import _git, facts, scrubbed

SECRET = "s3cr3t-Va1ue"
NAMES = st.sampled_from(
    ["AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "HF_TOKEN", "WANDB_API_KEY", "MLFLOW_TRACKING_PASSWORD"]
)
URLS = st.sampled_from(
    [
        f"https://user:{SECRET}@host:5000/path",
        f"https://host/path?X-Amz-Signature={SECRET}&part=1",
        f"https://host/path?part=1&access_token={SECRET}",
        f"http://{SECRET}@host",
    ]
)


@given(names=st.sets(NAMES), url=URLS)
def test_no_secret_is_written_down(names, url):
    given_ = {name: SECRET for name in names} | {"MLFLOW_TRACKING_URI": url, "OMP_NUM_THREADS": "2", "SECRET": SECRET}
    found = scrubbed(given_)
    assert SECRET not in json.dumps(found)
    assert found.keys() == names | {"MLFLOW_TRACKING_URI", "OMP_NUM_THREADS"}
    assert found["OMP_NUM_THREADS"] == "2"
    assert "host" in found["MLFLOW_TRACKING_URI"]


def test_the_facts_name_data_code_and_device(small_corpus: SmallCorpus, monkeypatch):
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
    corpus, run = small_corpus, RunDir(small_corpus.store, "run")
    said = facts(corpus.recipe, run, corpus.manifest, torch.device("cpu"), 3)
    raw = corpus.store.read(f"corpora/{corpus.manifest.fingerprint}/manifest.json")
    assert said["manifest_sha256"] == sha256(raw)
    assert said["tokenizer_sha256"] == corpus.manifest.tokenizer_sha256
    assert (said["seed"], said["workers"]) == (corpus.recipe.seed, 3)
    assert torch.__version__.startswith(said["packages"]["torch"])
    assert said["device"]["type"] == "cpu"
    assert said["device"]["name"]
    assert SECRET not in json.dumps(said)


def test_code_that_is_installed_inside_another_checkout_is_not_of_its_commit(tmp_path):
    """As in a `.venv` that lies, ignored, in the folder of somebody's own project."""
    installed = tmp_path / ".venv" / "train"
    installed.mkdir(parents=True)
    shutil.copy(module.__file__, installed)
    (tmp_path / ".gitignore").write_text(".venv")
    git = ["git", "-C", str(tmp_path), "-c", "user.name=x", "-c", "user.email=x"]

    def committed(*what):
        for words in (["init", "-q"], ["add", *what], ["commit", "-qm", "theirs"]):
            subprocess.run([*git, *words], check=True)

    committed(".gitignore")
    assert _git(installed) is None
    committed("-f", ".venv")
    found = _git(installed)
    assert len(found["commit"]) == 40
    assert found["is_dirty"] is False
