"""How a training ends for its driver, without a cluster: what it raises, and that nothing is tried in vain."""

import sys
from types import SimpleNamespace

import pytest
import ray
import torch
from ray.train.v2._internal.exceptions import WorkerHealthCheckFailedError
from ray.train.v2.api.exceptions import WorkerGroupError
from trainers import run_dir

from dllm_core.errors import DataError, DivergedError, DllmError
from workflows.train import announcements, flow


class Box:
    """A mailbox in this process: calls are answered at once, as `ray.get` of an answer is the answer."""

    def __init__(self) -> None:
        inner = announcements._Mailbox()
        for name in ("stop", "must_stop", "tell", "take"):
            setattr(self, name, SimpleNamespace(remote=getattr(inner, name)))


@pytest.fixture
def train(monkeypatch, tmp_path, small_corpus):
    """`flow.train` with a worker that is a function, started again `max_failures` times; what it told and raised."""

    def trained(worker):
        starts, shown = [], []

        def fit(recipe, run, corpus, mailbox):
            for left in range(recipe.placement.train.max_failures, -1, -1):
                starts.append(1)
                try:
                    return flow._on_worker({"job": SimpleNamespace(mailbox=mailbox)})
                except Exception:
                    if not left:
                        raise

        monkeypatch.setattr(flow, "_fit", fit)
        monkeypatch.setattr(announcements, "open_mailbox", Box)
        monkeypatch.setattr(ray, "get", lambda answer: answer)
        monkeypatch.setitem(sys.modules, "workflows.train.worker", SimpleNamespace(train_worker=worker))
        error = None
        try:
            flow.train(small_corpus.recipe, run_dir(tmp_path, "run"), "corpus", shown.append)
        except DllmError as raised:
            error = raised
        return len(starts), shown, error

    return trained


def test_a_training_that_diverges_is_not_started_again_and_its_error_is_the_drivers(train):
    def diverges(config):
        raise DivergedError("train", "10 times in a row", remedy="lower train.learning_rate")

    starts, shown, error = train(diverges)
    assert (starts, shown) == (1, [])
    assert str(error) == "train: 10 times in a row: lower train.learning_rate"
    assert error.exit_code == 5


def test_a_training_that_finishes_or_fails_ends_as_it_says(train):
    def finishes(config):
        announcements.Announcer(config["job"].mailbox).tell_surely("finished", step=6)

    def fails(config):
        raise OSError("no such device")

    assert train(finishes) == (1, [{"kind": "finished", "step": 6}], None)
    starts, _, error = train(fails)
    assert starts == 4
    assert (str(error), error.exit_code) == ("train: OSError: no such device", 3)


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize(
    ("failed", "line"),
    [
        (DataError("shard", "no such file"), "shard: no such file"),
        (
            WorkerHealthCheckFailedError("gone", OSError("died\nby SIGKILL")),
            "train: WorkerHealthCheckFailedError: by SIGKILL",
        ),
    ],
)
def test_the_rank_that_failed_is_told_of_and_not_those_that_miss_it(train, failed, rank, line):
    missing = RuntimeError("gloo: connection closed by peer")

    def fails(config):
        raise WorkerGroupError("errors", {0: missing, 1: failed} if rank else {0: failed, 1: missing})

    assert str(train(fails)[2]) == line


@pytest.mark.skipif(torch.cuda.is_available(), reason="no GPU is missed where there is one")
def test_a_worker_that_was_given_a_gpu_does_not_train_on_the_cpu_beside_it():
    from workflows.train.worker import _device  # DeepSpeed: 2 s that other tests need not pay

    assert _device(0).type == "cpu"
    with pytest.raises(DataError, match=r"^placement\.train\.gpus_per_worker: this worker was given 1 of a node"):
        _device(1)
