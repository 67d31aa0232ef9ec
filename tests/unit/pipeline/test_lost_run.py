"""A driver that has lost its run on S3 to another writes nothing any more."""

import time
from types import SimpleNamespace

import pytest
from s3_server import s3_server

from dllm_core.checkpoints.run_dir import JsonLines, RunDir
from dllm_core.errors import DataError
from dllm_core.storage import claim
from dllm_core.storage.s3 import S3Store
from workflows.console import Console
from workflows.pipeline import flow
from workflows.pipeline.flow import Pipeline
from workflows.target import Target


@pytest.fixture
def run(tmp_path, monkeypatch):
    monkeypatch.setattr(claim, "HEARTBEAT_S", 0.05)
    with s3_server(tmp_path) as server:
        yield RunDir(S3Store(server.new_bucket(), ""), "small-01")


def test_who_has_lost_the_run_sends_no_event(run, small_corpus):
    def drive():
        with Pipeline(Target(small_corpus.recipe, run, None), Console("json")) as pipeline, pipeline._stage("train"):
            run.store.put(run.key(".claims/00000002"), b'{"host": "far"}')
            time.sleep(20)

    with pytest.raises(DataError, match="has taken this run over"):
        drive()
    assert JsonLines(run, "events.jsonl").read() == []


def test_events_are_sent_before_the_next_driver_may_begin(run, small_corpus, monkeypatch):
    held, put_file = [], S3Store.put_file

    def noted(store, key, path):
        held.append(b'"is_released": false' in store.read(run.key(".claims/00000001")))
        put_file(store, key, path)

    monkeypatch.setattr(S3Store, "put_file", noted)
    with Pipeline(Target(small_corpus.recipe, run, None), Console("json")) as pipeline, pipeline._stage("train"):
        pass
    assert [event["event"] for event in JsonLines(run, "events.jsonl").read()] == ["started"]
    assert held == [True]


def test_events_are_there_with_each_checkpoint_while_a_training_goes_on(run, small_corpus, monkeypatch):
    """A driver's machine may be lost for good; and a storage that fails meanwhile ends no training."""
    seen = []

    def events():
        return [event["event"] for event in JsonLines(run, "events.jsonl").read()]

    def train(recipe, run, corpus, take):
        take({"kind": "checkpoint", "step": 2})
        seen.append(events())
        with monkeypatch.context() as gone:
            gone.setattr(S3Store, "put_file", refuse)
            take({"kind": "checkpoint", "step": 4})
        take({"kind": "checkpoint", "step": 6})
        seen.append(events())

    def refuse(*_):
        raise DataError("storage.root", "does not answer")

    monkeypatch.setattr(flow, "train", train)
    monkeypatch.setattr(Pipeline, "_cluster", lambda _: None)
    monkeypatch.setattr(flow, "final_step", lambda run: 6)
    with Pipeline(Target(small_corpus.recipe, run, SimpleNamespace(fingerprint="corpus")), Console("json")) as pipeline:
        monkeypatch.setattr(pipeline, "_check_room", lambda needed: None)
        pipeline.train()
    assert seen == [["started", "checkpoint"], ["started", *["checkpoint"] * 3]]
    assert events() == [*seen[-1], "done"]
