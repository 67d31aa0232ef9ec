"""One submitted job on a cluster of five nodes makes, trains, evaluates and serves what one process alone does; it
outlives who submitted it; the doctor asks every node.
"""

import json
import os
import re
import signal
import time
import urllib.request

import pytest
from ray_clusters import LoopbackCluster, NodeKind, new_token
from submitted import Cli, Relay, alone, check_equal, recipe_of, run_of

from dllm_core.checkpoints.run_dir import JsonLines
from dllm_core.storage.store import LocalStore

pytestmark = [pytest.mark.long, pytest.mark.timeout(600)]
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
    return cli.written(recipe)


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


def test_the_same_again_is_a_new_job_that_skips_every_stage(cli, river, path):
    [first] = [job["job"] for job in cli.told("jobs", "list")["jobs"] if job["job"].startswith("small-")]
    done = cli("submit", path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"✓ submit ", done.stdout), done.stdout
    for stage in ("preprocess", "train", "bundle", "evaluate", "serve", "report"):
        assert not re.search(rf"✓ {stage} ", done.stdout), done.stdout
    both = [job for job in cli.told("jobs", "list")["jobs"] if job["job"].startswith("small-")]
    assert [job["job"] for job in both] == [first, f"{first.removesuffix('-1')}-2"]
    for job in both:
        assert (job["status"], job["exit_code"]) == ("SUCCEEDED", 0)
        assert job["entrypoint"] == "python -m workflows run recipe.yaml"
        assert cli.told("jobs", "status", job["job"])["exit_code"] == 0
    assert "✓ report" in cli("jobs", "logs", first).stdout


def asked(cli, path):
    """What the dashboard answers."""
    token = {"Authorization": f"Bearer {cli.cluster.token}"}
    request = urllib.request.Request(f"{cli.cluster.dashboard}{path}", headers=token)
    with urllib.request.urlopen(request, timeout=10) as answer:
        return json.load(answer)


def listed(cli, what):
    return asked(cli, f"/api/v0/{what}?limit=10000&detail=true")["data"]["result"]["result"]


def test_each_stage_ran_on_its_own_nodes(cli, river):
    assert river.returncode == 0
    stages = {node["node_id"]: node["labels"]["dllm-stage"] for node in listed(cli, "nodes")}
    tasks = {stages[task["node_id"]] for task in listed(cli, "tasks") if task["name"] == "_call" and task["node_id"]}
    assert tasks == {"preprocess", "train"}  # evaluation asks for training nodes
    actors = [(actor["class_name"], actor["node_id"]) for actor in listed(cli, "actors") if actor["node_id"]]
    replicas = {stages[node] for name, node in actors if name.startswith("ServeReplica:dllm:")}
    assert replicas == {"serve"}
    workers = [node for name, node in actors if name == "RayTrainWorker"]
    assert {stages[node] for node in workers} == {"train"}
    assert len(set(workers)) == 2


def test_the_cluster_s_prometheus_sees_what_the_job_counted(cli, river):
    """Ray's agents still tell the counters when the job is gone; the gauges went with it."""
    assert river.returncode == 0
    targets = [target for group in asked(cli, "/api/prometheus/sd") for target in group["targets"]]
    told = ""
    for target in targets:
        with urllib.request.urlopen(f"http://{target}/metrics", timeout=10) as answer:
            told += answer.read().decode()
    assert re.search(
        r'^ray_dllm_train_checkpoints_total\{[^}]*run="small-[0-9a-f]{12}"[^}]*\} 4\.0$', told, re.MULTILINE
    )
    assert re.search(r"^ray_dllm_train_starts_total\{[^}]*\} 1\.0$", told, re.MULTILINE)


def test_a_job_outlives_who_submitted_it_and_is_stopped_with_a_checkpoint(cli, path):
    """Ctrl-C ends the follower alone; a second job at the run is refused; stopping saves, and so ends with 4."""
    words = ["submit", path, "name=long", "train.steps=100000", "train.checkpoint_every=100000"]
    follower = cli.begin(*words, "--verb", "train")
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
    other = cli(*words, "placement.train.workers=1")
    assert other.returncode == 3
    assert f"another job is at this run, got '{name}'" in other.stderr
    assert cli.told("jobs", "status", name)["status"] == "RUNNING"
    full = cli("submit", path, "name=third", "--verb", "train", "--refuse-busy")
    assert full.returncode == 3
    assert re.fullmatch(r"dllm: --address: the cluster is full: train needs 2 \S+, .*submit it later\n", full.stderr)
    relay = Relay(cli.cluster.dashboard_port)
    again = cli.begin("jobs", "logs", name, address=f"http://127.0.0.1:{relay.port}")
    for _ in range(3):  # a connection that breaks is made again, and nothing is written twice
        time.sleep(6)
        relay.cut()
    assert relay.cuts == 3
    assert cli.told("jobs", "stop", name)["exit_code"] == 0
    text, told = again.communicate(timeout=60)
    relay.close()
    assert again.returncode in (4, 143), told
    assert text == cli("jobs", "logs", name).stdout
    job = cli.told("jobs", "status", name)
    assert job["status"] == "STOPPED"
    assert any("/long-" in f"/{item.key}" and "checkpoints" in item.key for item in runs.list("runs"))
    assert cli("jobs", "logs", name).returncode in (4, 143)


def test_the_doctor_asks_every_node(cli):
    told = cli.told("doctor", f"storage.root={cli.folder / 'storage'}")
    found = {finding["what"]: finding for finding in told["findings"]}
    assert found["nodes"]["told"].count("(") == len(NODES) + 1
    assert all(found[what]["verdict"] == "good" for what in ("cluster", "ray", "versions", "one storage", "clocks"))


def test_the_doctor_finds_storage_that_is_not_one(cli):
    """Planted: a folder that each node has for itself, here by a name that each resolves in its own way."""
    done = cli("doctor", "storage.root=/proc/self/cwd/mine")
    assert done.returncode == 3, done.stdout
    assert re.search(r"one storage .* is another on each of", done.stdout), done.stdout
