"""`dllm submit` to a cluster that asks for a token: one job makes, trains on two nodes, evaluates and serves
what one process alone does; and all that a platform team does with jobs besides.
"""

import os
import re
import signal
import socket
import subprocess
import sys
import time

import pytest
from ray_clusters import LoopbackCluster, NodeKind, new_token
from submitted import Cli, alone, check_equal, recipe_of, run_of

from dllm_core.checkpoints.run_dir import JsonLines
from dllm_core.storage.store import LocalStore

NODES = (NodeKind("preprocess"), NodeKind("train", 1), NodeKind("train", 1), NodeKind("serve", 2))


@pytest.fixture(scope="module")
def cli(tmp_path_factory):
    with LoopbackCluster(NODES, token=new_token()) as cluster:
        yield Cli(cluster, tmp_path_factory.mktemp("submit"))


@pytest.fixture(scope="module")
def recipe(cli):
    return recipe_of(cli.folder, str(cli.folder / "storage"))


@pytest.fixture(scope="module")
def path(cli, recipe):
    (cli.folder / "small.yaml").write_text(recipe.to_yaml(), encoding="utf-8")
    return str(cli.folder / "small.yaml")


@pytest.fixture(scope="module")
def river(cli, path):
    """What the whole job said."""
    return cli("submit", path)


def test_one_job_runs_all_stages_and_its_result_is_that_of_one_process(cli, river, recipe, tmp_path):
    done = river
    assert done.returncode == 0, done.stdout + done.stderr
    for stage in ("preprocess", "train", "evaluate", "serve", "report"):
        assert re.search(rf"✓ {stage} ", done.stdout), done.stdout
    assert not re.search(r"WebSocket|dashboard_sdk", done.stderr)
    run = run_of(LocalStore(cli.folder / "storage"), "small")
    check_equal(run, alone(recipe, tmp_path))
    [started] = [
        event for event in JsonLines(run, "events.jsonl").read() if event["event"] == "started" and "pid" in event
    ]
    assert started["step"] == 0


def test_the_same_again_is_told_of_and_nothing_runs(cli, river, path):
    before = cli.told("jobs", "list")["jobs"]
    done = cli("submit", path)
    assert done.returncode == 0
    assert "is done" in done.stdout
    assert len(cli.told("jobs", "list")["jobs"]) == len(before)
    [job] = [job for job in before if job["job"].startswith("small-")]
    assert (job["status"], job["exit_code"], job["entrypoint"]) == (
        "SUCCEEDED",
        0,
        "python -m workflows run recipe.yaml",
    )
    assert cli.told("jobs", "status", job["job"])["exit_code"] == 0
    assert "✓ report" in cli("jobs", "logs", job["job"]).stdout


@pytest.mark.parametrize("token", ["", "0" * 64])
def test_no_token_and_one_that_does_not_hold_are_a_line(cli, token):
    mode = {"RAY_AUTH_MODE": "token" if token else "disabled"}
    done = cli("jobs", "list", RAY_AUTH_TOKEN=token, **mode)
    assert done.returncode == 3
    assert re.fullmatch(r"dllm: --address: refuses the token .*RAY_AUTH_TOKEN.*\n", done.stderr), done.stderr
    assert cli.cluster.token not in done.stdout + done.stderr


def test_what_the_cluster_has_no_room_for_is_refused_before_it_is_sent(cli, path):
    done = cli("submit", path, "placement.train.workers=4")
    assert done.returncode == 3
    assert (
        "placement.train: needs 4 × CPU=1 dllm-train=1 on nodes with dllm-stage=train; there is room for 2"
        in done.stderr
    )
    assert done.stderr.count("\n") == 1


def test_a_name_of_no_job_is_a_line(cli):
    for action in ("status", "logs", "stop"):
        done = cli("jobs", action, "no-such-job")
        assert done.returncode == 3
        assert re.fullmatch(r"dllm: job: the cluster does not know it, got 'no-such-job': .*\n", done.stderr), (
            done.stderr
        )


def test_a_job_s_own_exit_code_comes_back(cli, path, recipe):
    """The port is found taken by the job and not by who submits it: 2, where a job that is lost would be 3."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", recipe.serve.port))
        done = cli("submit", path, "name=other")
    assert done.returncode == 2, done.stdout + done.stderr
    assert "dllm: serve.port: cannot be listened on" in done.stdout
    assert "ended with exit code 2" in done.stderr


@pytest.mark.long
def test_a_job_outlives_who_submitted_it_and_is_stopped_with_a_checkpoint(cli, path):
    """Ctrl-C ends the follower alone; a second job at the run is refused; stopping saves, and so ends with 4."""
    words = ["submit", path, "name=long", "train.steps=100000", "train.checkpoint_every=100000", "--verb", "train"]
    follower = subprocess.Popen(
        [sys.executable, "-m", "workflows", *words, "--address", cli.cluster.dashboard],
        cwd=cli.folder,
        env=cli.cluster.env,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    runs = LocalStore(cli.folder / "storage")
    give_up = time.monotonic() + 120
    while not any("/long-" in f"/{item.key}" and item.key.endswith("metrics.jsonl") for item in runs.list("runs")):
        assert time.monotonic() < give_up
        assert follower.poll() is None, follower.communicate()
        time.sleep(0.5)
    os.kill(follower.pid, signal.SIGINT)
    _, told = follower.communicate(timeout=20)
    assert follower.returncode == 130
    [name] = set(re.findall(r"dllm jobs stop (long-\S+)", told))
    other = cli(
        "submit",
        path,
        "name=long",
        "train.steps=100000",
        "train.checkpoint_every=100000",
        "placement.train.workers=1",
    )
    assert other.returncode == 3
    assert f"another job is at this run, got '{name}'" in other.stderr
    assert cli.told("jobs", "status", name)["status"] == "RUNNING"
    assert cli.told("jobs", "stop", name)["exit_code"] == 0
    job = cli.told("jobs", "status", name)
    assert job["status"] == "STOPPED"
    assert any("/long-" in f"/{item.key}" and "checkpoints" in item.key for item in runs.list("runs"))
    assert cli("jobs", "logs", name).returncode in (4, 143)


@pytest.mark.long
def test_the_doctor_asks_every_node(cli):
    told = cli.told("doctor", f"storage.root={cli.folder / 'storage'}")
    found = {finding["what"]: finding for finding in told["findings"]}
    assert found["nodes"]["told"].count("(") == len(NODES) + 1
    assert all(found[what]["verdict"] == "good" for what in ("cluster", "ray", "versions", "one storage", "clocks"))


@pytest.mark.long
def test_the_doctor_finds_storage_that_is_not_one(cli):
    """Planted: a folder that each node has for itself, here by a name that each resolves in its own way."""
    done = cli("doctor", "storage.root=/proc/self/cwd/mine")
    assert done.returncode == 3, done.stdout
    assert re.search(r"one storage .* is another on each of", done.stdout), done.stdout
