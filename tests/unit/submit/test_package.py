"""What a job takes along: the same bytes for the same content, no data, no secrets, and not too much."""

import errno
import io
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from dllm_core.errors import ConfigError, DataError
from workflows.submit import package
from workflows.submit.package import RECIPE, pack

ROOT = Path(__file__).parents[3]
STAYS = ("corpus.arrow", "weights.safetensors", ".env", "api_keys.txt", "aws_credentials.json", "id_rsa", "a.pem")


def names(data: bytes) -> set[str]:
    return set(zipfile.ZipFile(io.BytesIO(data)).namelist())


@pytest.fixture
def lab(tmp_path):
    """A user's folder, with all that should stay at home."""
    folder = tmp_path / "my_lab"
    (folder / "sub").mkdir(parents=True)
    (folder / ".git").mkdir()
    for name in ("noise.py", "sub/tokenizer.py", "settings.yaml"):
        (folder / name).write_text("x = 1\n")
    for name in STAYS:
        (folder / name).write_text("secret\n")
    (folder / ".git" / "config.toml").write_text("x")
    os.symlink("/etc/hostname", folder / "link.txt")
    os.symlink("/etc", folder / "link")
    return folder


def test_our_sources_and_the_recipe_are_in_it():
    found = names(pack("name: x\n").data)
    assert {RECIPE, "dllm_core/errors.py", "workflows/cli.py", "workflows/serve/page.html"} <= found
    assert all(name.split("/")[0] in ("dllm_core", "workflows", RECIPE) for name in found)
    assert not any("__pycache__" in name or name.endswith(".pyc") for name in found)


def test_equal_content_gives_equal_bytes_whenever_it_was_written(lab):
    first = pack("name: x\n", [lab])
    os.utime(lab / "noise.py", (1, 1))
    assert pack("name: x\n", [lab]).data == first.data
    (lab / "noise.py").write_text("x = 2\n")
    assert pack("name: x\n", [lab]).digest != first.digest
    assert pack("name: y\n").digest != pack("name: x\n").digest


def test_data_and_secrets_stay_and_are_named(lab):
    packed = pack(None, [lab])
    mine = {name for name in packed.files if name.startswith("my_lab/")}
    assert mine == {"my_lab/noise.py", "my_lab/sub/tokenizer.py", "my_lab/settings.yaml"}
    assert set(packed.left_out) == {f"my_lab/{name}" for name in (*STAYS, "link.txt", "link")}
    assert b"secret" not in packed.data


def test_a_folder_that_is_a_link_keeps_the_name_that_it_is_imported_by(lab, tmp_path):
    (tmp_path / "alias").symlink_to(lab)
    assert "alias/noise.py" in pack(None, [tmp_path / "alias"]).files
    assert pack(None, [lab, lab]).data == pack(None, [lab]).data


def test_names_that_no_zip_holds_stay_and_are_named(lab):
    Path(os.fsdecode(os.fsencode(lab) + b"/\xff.py")).write_text("x = 1\n")
    assert r"my_lab/\udcff.py" in pack(None, [lab]).left_out


def test_a_folder_that_cannot_be_listed_is_not_left_out_without_a_word(lab, monkeypatch):
    scandir = os.scandir

    def closed(path):
        if str(path).endswith("my_lab/sub"):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", closed)
    with pytest.raises(DataError, match=r"package: cannot be listed \(Permission denied\), got '.*my_lab/sub'"):
        pack(None, [lab])


SECRET = ("secrets/prod.yaml", "credentials/db.json", ".docker/config.json", ".kube/config.yaml", "a/.b/c.py")
SECRET += ("deep/My-Secrets/more/list.txt", "a/api_tokens/x.yaml", "secrets/keys.py", "api_key.txt", "API-Key.json")
SECRET += ("gcp-key.json", "key.json", "service-account.json", "my_kubeconfig.yaml", "private-key.txt", "a/auth.json")
PLAIN = ("configs/prod.yaml", "tokenizers/bpe.py", "my_tokenizer/settings.json", "lib/secrets.py", "a/b/c/notes.md")
PLAIN += ("monkey.json", "keyboard.yaml", "author.md", "api_keys.py")


def test_what_lies_in_a_hidden_folder_or_one_that_is_named_for_secrets_stays_and_is_named(tmp_path):
    lab = tmp_path / ".hidden-secrets" / "my_lab"  # where the folder lies says nothing of what is in it
    for name in (*SECRET, *PLAIN):
        (lab / name).parent.mkdir(parents=True, exist_ok=True)
        (lab / name).write_text("x = 1\n")
    packed = pack(None, [lab])
    assert set(packed.left_out) == {f"my_lab/{name}" for name in SECRET}
    assert {name for name in packed.files if name.startswith("my_lab/")} == {f"my_lab/{name}" for name in PLAIN}


def test_what_is_unpacked_runs(tmp_path):
    """The package alone is enough: `python -m workflows` in it, from nothing else of ours."""
    recipe = (ROOT / "workflows/recipes/quickstart.yaml").read_text()
    zipfile.ZipFile(io.BytesIO(pack(recipe).data)).extractall(tmp_path)
    done = subprocess.run(
        [sys.executable, "-m", "workflows", "show", RECIPE, "name=quick"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "vocab_size" in done.stdout


def test_too_large_a_package_is_refused_by_its_largest_files(tmp_path, monkeypatch):
    monkeypatch.setattr(package, "MAX_BYTES", 3 << 20)
    (tmp_path / "big").mkdir()
    with (tmp_path / "big" / "table.json").open("wb") as file:
        file.truncate(1 << 40)  # that much is never read
    with pytest.raises(DataError, match=r"big/table\.json 1099512 MB.*storage\.root"):
        pack(None, [tmp_path / "big"])


def test_what_is_not_there_or_has_our_name_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="no such file"):
        pack(None, [tmp_path / "nowhere"])
    (tmp_path / "workflows").mkdir()
    with pytest.raises(ConfigError, match="package's own"):
        pack(None, [tmp_path / "workflows"])
    for name in ("a", "b"):
        (tmp_path / name / "lab").mkdir(parents=True)
        (tmp_path / name / "lab" / "noise.py").write_text(name)
    with pytest.raises(ConfigError, match=r"--include: gives another lab/noise\.py than one before"):
        pack(None, [tmp_path / "a" / "lab", tmp_path / "b" / "lab"])
