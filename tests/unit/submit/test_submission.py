"""What is refused before a cluster is asked, and what a job is called by."""

from pathlib import Path

import pytest
import yaml

from dllm_core.errors import ConfigError, DataError
from workflows.console import Console
from workflows.submit.flow import Submission, _result, prepare, submit
from workflows.submit.server import JobServer, checked_address

ROOT = Path(__file__).parents[3]
QUICKSTART = str(ROOT / "workflows/recipes/quickstart.yaml")
S3 = "storage.root=s3://bucket/runs"


@pytest.mark.parametrize(
    ("given", "url"),
    [
        ("127.0.0.1:8265", "http://127.0.0.1:8265"),
        ("https://head/", "https://head"),
        ("http://[::1]:8265", "http://[::1]:8265"),
    ],
)
def test_addresses(given, url):
    assert checked_address(given) == url


@pytest.mark.parametrize("given", ["", "ray://head:10001", "http://", "head:port", "http://he ad:1", "http://h:99999"])
def test_what_is_no_address(given):
    with pytest.raises(ConfigError, match="--address"):
        checked_address(given)


def test_nobody_there_is_a_line(monkeypatch):
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:6379")
    with pytest.raises(DataError, match=r"--address: nobody answers .*127\.0\.0\.1:9'") as caught:
        JobServer("http://127.0.0.1:9")
    assert caught.value.exit_code == 3


@pytest.mark.parametrize(
    ("asked", "line"),
    [
        (Submission(QUICKSTART), r"storage\.root: is a folder of this machine alone, got 'dllm-runs'"),
        (Submission(QUICKSTART, ("storage.root=runs",)), r"storage\.root.*'runs'"),
        (Submission(QUICKSTART, (S3,), verb="bench"), r"--verb.*'bench'"),
        (Submission(QUICKSTART, (S3, "train.step=1")), r"train\.step: unknown name: did you mean 'steps'"),
        (Submission(QUICKSTART, (S3,), environment=("DLLM_NOT_SET_HERE",)), r"--env: is not set here"),
        (Submission(QUICKSTART, (S3,), environment=("A B=1",)), r"--env"),
        (Submission(QUICKSTART, (S3,), placement=Path("nowhere.yaml")), r"--placement: cannot be read"),
        (Submission("nowhere.yaml", (S3,)), r"nowhere\.yaml: no such recipe"),
    ],
)
def test_mistakes_are_refused_without_a_cluster(asked, line):
    with pytest.raises(ConfigError, match=line):
        prepare(asked)


def test_a_placement_file_is_gone_over_by_the_command_line():
    job = prepare(
        Submission(QUICKSTART, (S3, "placement.train.workers=8"), placement=ROOT / "deploy/cluster/placement.yaml")
    )
    [train] = [need for need in job.needs if need.stage == "train"]
    assert (train.at_once, train.demand.gpus, train.demand.labels) == (8, 1, {"dllm-stage": "train"})
    assert job.entrypoint == "python -m workflows run recipe.yaml"


def test_a_wrong_placement_file_is_refused_by_its_place(tmp_path):
    path = tmp_path / "p.yaml"
    path.write_text("train: {worker: 2}")
    with pytest.raises(ConfigError, match=r"placement\.train\.worker: unknown name"):
        prepare(Submission(QUICKSTART, (S3,), placement=path))


def test_the_fingerprint_follows_all_that_a_job_is_and_nothing_else():
    one = prepare(Submission(QUICKSTART, (S3,)))
    assert prepare(Submission(QUICKSTART, (S3,))).fingerprint == one.fingerprint
    others = [
        prepare(Submission(QUICKSTART, (S3, "train.steps=5"))),
        prepare(Submission(QUICKSTART, (S3, "placement.train.workers=4"))),
        prepare(Submission(QUICKSTART, (S3,), verb="train")),
        prepare(Submission(QUICKSTART, (S3,), environment=("A=1",))),
        prepare(Submission(QUICKSTART, (S3,), include=(ROOT / "Makefile",))),
    ]
    assert len({one.fingerprint, *(job.fingerprint for job in others)}) == len(others) + 1
    # The same run elsewhere or on more nodes is the same run, at which there is one job at a time.
    assert others[1].run == one.run == others[2].run
    assert others[0].run != one.run


def test_the_recipe_that_is_sent_is_the_resolved_one():
    import io
    import zipfile

    job = prepare(Submission(QUICKSTART, (S3, "train.steps=7")))
    sent = yaml.safe_load(zipfile.ZipFile(io.BytesIO(job.package.data)).read("recipe.yaml"))
    assert sent["train"]["steps"] == 7
    assert sent["storage"]["root"] == "s3://bucket/runs"


def test_a_dry_run_says_what_would_be_sent(capsys):
    told = submit(Submission(QUICKSTART, (S3,)), None, Console("json"), detach=False, refuse_busy=False)
    assert told["entrypoint"].endswith("run recipe.yaml")
    assert {need["stage"] for need in told["needs"]} == {"preprocess", "train", "evaluate", "serve"}
    assert told["bytes"] < 1 << 20


def test_what_all_nodes_must_see_is_named(tmp_path):
    assert prepare(Submission(QUICKSTART, (S3,))).paths == ()
    (tmp_path / "corpus").mkdir()
    job = prepare(Submission(QUICKSTART, (f"storage.root={tmp_path}", f"corpus.path={tmp_path}/corpus")))
    assert job.paths == (str(tmp_path), f"{tmp_path}/corpus")


class Ended:
    submission_id = "x-1"

    def __init__(self, status, driver_exit_code):
        self.status, self.driver_exit_code = status, driver_exit_code


@pytest.mark.parametrize(
    ("job", "code"),
    [
        (Ended("SUCCEEDED", 0), 0),
        (Ended("FAILED", 5), 5),
        (Ended("FAILED", None), 3),
        (Ended("FAILED", -9), 137),
        (Ended("STOPPED", None), 143),
        (Ended("STOPPED", 4), 4),
        (Ended("RUNNING", None), None),
    ],
)
def test_the_exit_code_is_the_job_s(job, code):
    assert _result(job)["exit_code"] == code
