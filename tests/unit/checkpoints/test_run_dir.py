"""A run's folder is found by its url, stays below its root, and its logs survive a kill in the middle of a line."""

import os
import re
import resource
import socket
from pathlib import Path

import pytest
from s3_server import s3_server

from dllm_core.checkpoints.run_dir import JsonLines, RunDir
from dllm_core.errors import ConfigError, DataError
from dllm_core.storage import claim
from dllm_core.storage.s3 import S3Store
from dllm_core.storage.store import LocalStore


@pytest.fixture(scope="module", params=["folder", "bucket"])
def new_run(request, tmp_path_factory):
    """A function that makes a run in an empty store."""
    top = tmp_path_factory.mktemp("runs")
    if request.param == "folder":
        yield lambda: RunDir(LocalStore(Path(tmp_path_factory.mktemp("root"))), "small-01")
        return
    with s3_server(top) as server:
        yield lambda: RunDir(S3Store(server.new_bucket(), "some/where"), "small-01")


@pytest.fixture
def run(new_run) -> RunDir:
    return new_run()


def test_a_run_is_what_its_url_names(run):
    assert RunDir.at(run.url) == run
    assert RunDir.at(f"{run.url}/") == run


@pytest.mark.parametrize("url", ["/tmp/x", "/tmp/runs/x/bundle", "/tmp/runs/../x", "s3://bucket/x", "s3://bucket/runs"])
def test_a_folder_that_is_no_run_is_refused(url):
    with pytest.raises(ConfigError, match="is not a run"):
        RunDir.at(url)


@pytest.mark.parametrize("name", ["..", "a b", "ä"])
def test_a_run_name_that_is_no_name_is_refused(name):
    with pytest.raises(ConfigError, match="run: must be"):
        RunDir.at(f"s3://bucket/runs/{name}")


def test_a_run_name_that_leaves_its_root_is_refused(run):
    outside = RunDir(run.store, "../../outside")
    for call in (
        lambda: outside.write_json("x.json", {}),
        lambda: outside.read_json("x.json"),
        lambda: JsonLines(outside, "log.jsonl").sync() or JsonLines(outside, "log.jsonl").keep(bool),
    ):
        with pytest.raises(DataError, match="leaves the storage root"):
            call()


def test_json_comes_back_and_none_is_no_file(run):
    assert run.read_json("stages/x.json") is None
    run.write_json("stages/x.json", {"ä": [1, None, 0.5]})
    assert run.read_json("stages/x.json") == {"ä": [1, None, 0.5]}


@pytest.mark.parametrize("data", [b"", b"{", b"\xff\xfe"])
def test_damaged_json_is_refused_by_name(run, data):
    run.store.put(run.key("x.json"), data)
    with pytest.raises(DataError, match=r"x\.json: is not JSON"):
        run.read_json("x.json")


@pytest.mark.parametrize("data", [b"{", b"\0" * 9, b"\xff\xfe", b"5"])
def test_a_damaged_line_of_a_log_is_refused_by_its_number(run, data):
    run.store.put(run.key("log.jsonl"), b'{"step": 1}\n' + data + b'\n{"step": 3}\n')
    with pytest.raises(DataError, match=r"log\.jsonl: line 2 is not JSON: delete that line"):
        JsonLines(run, "log.jsonl").read()


def test_a_log_is_what_was_appended_also_for_who_opens_it_later(run):
    records = [{"step": i, "text": "ä\n\u2028"} for i in range(5)]
    log = JsonLines(run, "log.jsonl")
    assert log.read() == []
    for record in records[:3]:
        log.append(record)
    log.sync()
    again = JsonLines(run, "log.jsonl")
    assert again.read() == records[:3]
    for record in records[3:]:
        again.append(record)
    again.sync()
    assert JsonLines(run, "log.jsonl").read() == records


def test_a_line_that_a_kill_cut_short_is_not_there_and_keep_drops_it(run):
    run.store.put(run.key("log.jsonl"), b'{"step": 1}\n{"step": 2}\n{"step": 3}\n{"ste')
    log = JsonLines(run, "log.jsonl")
    assert log.read() == [{"step": 1}, {"step": 2}, {"step": 3}]
    log.keep(lambda record: record["step"] <= 2)
    log.append({"step": 30})
    log.sync()
    assert log.read() == JsonLines(run, "log.jsonl").read() == [{"step": 1}, {"step": 2}, {"step": 30}]


@pytest.mark.parametrize("cut", range(1, 12))
def test_a_log_cut_anywhere_in_its_last_line_keeps_the_others(tmp_path, cut):
    run = RunDir(LocalStore(tmp_path), "small-01")
    log = JsonLines(run, "log.jsonl")
    log.append({"step": 1})
    log.append({"step": 2})
    path = run.store.path(run.key("log.jsonl"))
    path.write_bytes(path.read_bytes()[:-cut])
    assert JsonLines(run, "log.jsonl").read() == [{"step": 1}]


@pytest.mark.parametrize(
    ("url", "root"), [("/runs/x", "/"), ("/a/runs/b/runs/x", "/a/runs/b"), ("s3://runs/runs/x", "s3://runs")]
)
def test_the_root_is_what_stands_before_the_last_runs(url, root):
    assert RunDir.at(url).store.url == root
    assert RunDir.at(url).url == url


def test_a_run_is_found_by_a_link_to_it_and_as_a_link_to_another_disk(tmp_path):
    own, moved = tmp_path / "root" / "runs" / "own-01", tmp_path / "root" / "runs" / "moved-02"
    own.mkdir(parents=True)
    (tmp_path / "disk").mkdir()
    moved.symlink_to(tmp_path / "disk")
    (tmp_path / "latest").symlink_to(own)
    (own.parent / "alias").symlink_to(own)
    for link in (tmp_path / "latest", own.parent / "alias"):
        assert RunDir.at(str(link)) == RunDir.at(str(own))
    found = RunDir.at(str(moved))
    assert (found.store.url, found.name) == (str(tmp_path / "root"), "moved-02")
    found.write_json("x.json", {"a": 1})
    assert (tmp_path / "disk" / "x.json").exists()
    with pytest.raises(ConfigError, match="is not a run"):
        RunDir.at(str(tmp_path / "disk"))


def test_a_bucket_that_is_called_runs_is_no_run():
    with pytest.raises(ConfigError, match="is not a run"):
        RunDir.at("s3://runs/x")


def test_a_second_driver_on_a_run_is_refused_until_the_first_is_gone(run, monkeypatch):
    monkeypatch.setattr(claim, "HEARTBEAT_S", 0.05)
    named = rf"{run.url}: another dllm is at work on this run \({re.escape(socket.gethostname())}, pid {os.getpid()}\)"
    with run.locked() as is_lost, pytest.raises(DataError, match=named), run.locked():
        pass
    assert not is_lost()
    with run.locked():
        pass


def test_a_log_goes_on_behind_a_line_that_a_kill_cut_short(tmp_path):
    run = RunDir(LocalStore(tmp_path), "small-01")
    log = JsonLines(run, "events.jsonl")
    log.append({"a": 1})
    path = tmp_path / run.key("events.jsonl")
    path.write_bytes(path.read_bytes() + b'{"b')
    again = JsonLines(run, "events.jsonl")
    again.append({"c": 1})
    assert again.read() == [{"a": 1}, {"c": 1}]


def test_a_log_goes_on_behind_a_line_for_which_the_disk_had_no_room(tmp_path):
    log = JsonLines(RunDir(LocalStore(tmp_path), "small-01"), "events.jsonl")
    log.append({"a": 1})
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len('{"a": 1}\n{"b"'), before[1]))
    try:
        with pytest.raises(OSError, match="too large"):
            log.append({"b": 1})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    log.append({"c": 1})
    assert log.read() == [{"a": 1}, {"c": 1}]
