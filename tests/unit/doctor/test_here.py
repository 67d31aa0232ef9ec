"""The doctor finds what is wrong, and only that."""

import socket

import pytest

from dllm_core.storage.store import LocalStore
from workflows.console import Console
from workflows.doctor import here
from workflows.doctor.flow import examine


def one(findings):
    [finding] = list(findings)
    return finding


def test_this_machine_is_well():
    for check in (here.python, here.packages, here.devices, here.room):
        assert [finding for finding in check() if finding.verdict == "bad"] == []


def test_a_missing_and_an_old_package_are_named_with_what_is_taken(monkeypatch):
    monkeypatch.setattr(
        here.importlib.metadata, "requires", lambda name: ["ray>=99", "no-such-thing", "lora; extra=='x'"]
    )
    finding = one(here.packages())
    assert finding.verdict == "bad"
    assert "ray 2." in finding.told
    assert "is not >=99" in finding.told
    assert "no-such-thing is missing" in finding.told
    assert "lora" not in finding.told
    assert finding.remedy


def test_an_old_python_is_refused(monkeypatch):
    monkeypatch.setattr(here.sys, "version_info", (3, 10))
    assert one(here.python()).verdict == "bad"


def test_a_port_that_is_taken():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        number = taken.getsockname()[1]
        finding = one(here.port("127.0.0.1", number))
        assert (finding.verdict, finding.remedy) == ("doubtful", "serve.port=...")
    assert one(here.port("127.0.0.1", number)).verdict == "good"


def test_storage_is_exercised_and_left_as_it_was(tmp_path):
    assert one(here.storage(str(tmp_path))).verdict == "good"
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


def test_storage_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("x")
    finding = one(here.storage(str(tmp_path / "file" / "below")))
    assert finding.verdict == "bad"
    assert finding.remedy


def test_what_to_do_is_said_once_behind_what_is_wrong(capsys):
    told = examine(None, "ftp://x", Console(), address="http://127.0.0.1:9", ca_file=None, only_nodes=True)
    assert told["exit_code"] == 3
    assert capsys.readouterr().out.count("ray dashboard cluster.yaml") == 1
    examine(None, "ftp://x", Console(), address=None, ca_file=None, only_nodes=False)
    line = "storage.root: unknown kind of storage, got 'ftp://x': a folder or s3://bucket/prefix"
    assert capsys.readouterr().out.splitlines()[-1].endswith(f"  {line}")


@pytest.mark.parametrize("broken", ["always", "never", "other"])
def test_storage_that_puts_over_what_is_there_or_forgets_it(tmp_path, monkeypatch, broken):
    """Planted: what an S3 server does that ignores If-None-Match, refuses it, or gives back something else."""
    if broken == "other":
        monkeypatch.setattr(LocalStore, "read", lambda self, key, *span: b"x")
    else:
        monkeypatch.setattr(
            LocalStore, "put_if_absent", lambda self, key, data: (self.put(key, data), broken == "always")[1]
        )
    finding = one(here.storage(str(tmp_path)))
    assert finding.verdict == "bad"
    assert "If-None-Match" in finding.remedy or "give back" in finding.told
