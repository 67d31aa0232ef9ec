"""A node is lost in each stage, and at last the head: from one submission the same result, in the end one line.

Storage is a real S3 server, which all that is written goes through.
"""

import re
import threading
import time
from collections.abc import Callable

import pytest
from conftest import small_recipe
from ray_clusters import LoopbackCluster, Node, NodeKind, new_token
from s3_server import new_bucket, s3_environment
from submitted import Cli, alone, check_equal, nodes_with, recipe_of, run_of

from dllm_core.checkpoints.store import CheckpointStore
from dllm_core.storage.store import Store, open_store

pytestmark = [pytest.mark.long, pytest.mark.timeout(900)]
# One more of each than the stages need: what is lost is not replaced.
NODES = tuple(
    NodeKind(stage, cpus) for stage, cpus in (("preprocess", 1), ("train", 1), ("serve", 1)) for _ in range(2)
)
NODES += (NodeKind("train", 1),)
UNITS_BEFORE_A_LOSS = 12


@pytest.fixture(scope="module")
def cli(rados, tmp_path_factory):
    folder = tmp_path_factory.mktemp("lost")
    with (
        s3_environment(rados.endpoint, folder / "cache", rados.access_key, rados.secret_key),
        LoopbackCluster(NODES, token=new_token()) as cluster,
    ):
        yield Cli(cluster, folder)


def kill_one(cli: Cli, killed: dict[str, Node], stage: str, what: str, is_time: Callable[[], bool]) -> None:
    """Once it is time, a node of the stage on which `what` runs."""
    give_up = time.monotonic() + 500
    while time.monotonic() < give_up:
        if is_time() and (found := nodes_with(cli.cluster, stage, what)):
            found[0].kill()
            killed[stage] = found[0]
            return
        time.sleep(0.1)


def killers(cli: Cli, store: Store, killed: dict[str, Node], astray: list[Node]) -> None:
    """Into `astray`: nodes that hold a part of the driver's, with which a training would be lost."""

    def receipts() -> bool:
        keys = [item.key for item in store.list("corpora")]
        assert not any(key.endswith("manifest.json") for key in keys), "too late"
        return sum("receipt" in key for key in keys) >= UNITS_BEFORE_A_LOSS

    def checkpoint() -> bool:
        names = [item.key for item in store.list("runs") if item.key.endswith("/recipe.yaml")]
        if not names or not CheckpointStore(run_of(store, "small")).committed():
            return False
        for stage in ("preprocess", "train", "serve"):
            for actor in ("ray::_Mailbox", "ray::TrainController"):
                astray.extend(nodes_with(cli.cluster, stage, actor))
        return True

    kill_one(cli, killed, "preprocess", "ray::", receipts)
    kill_one(cli, killed, "train", "ray::", checkpoint)
    kill_one(cli, killed, "serve", "ServeReplica:dllm:DecodeReplica", lambda: True)


def test_a_node_lost_in_each_stage_changes_nothing(cli, tmp_path):
    root = f"s3://{new_bucket()}/lab"
    recipe = recipe_of(cli.folder, root, paragraphs=1500, train={"steps": 240, "checkpoint_every": 40})
    path = cli.written(recipe)
    store, killed, astray = open_store("root", root), dict[str, Node](), list[Node]()
    killing = threading.Thread(target=killers, args=(cli, store, killed, astray), daemon=True)
    begun = time.monotonic()
    killing.start()
    done = cli("submit", path, timeout=800)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert set(killed) == {"preprocess", "train", "serve"}
    assert astray == []
    check_equal(run_of(store, "small"), alone(recipe, tmp_path))
    print(f"a node lost in each of {', '.join(killed)}: data equal bit for bit, losses within 1e-3, the same text;")
    print(f"    {len(NODES)} nodes and a head, S3, {time.monotonic() - begun:.0f} s")


def test_a_lost_head_is_one_line(cli, tmp_path):
    """The follower waits a minute for one that comes back."""
    recipe = small_recipe(tmp_path, corpus={"path": str(cli.folder / "corpus")}, storage={"root": str(tmp_path / "s")})
    words = [
        "submit",
        cli.written(recipe, "head.yaml"),
        "--verb",
        "train",
        "train.steps=100000",
        "train.checkpoint_every=100000",
    ]
    words += ["placement.train.workers=1", "placement.train.labels={dllm-stage: train}"]
    follower = cli.begin(*words)
    time.sleep(25)
    assert follower.poll() is None
    cli.cluster.head.kill()
    _, told = follower.communicate(timeout=120)
    assert follower.returncode == 3
    assert re.fullmatch(r"dllm: --address: .*: the job may go on: dllm jobs logs small-\S+ --address \S+\n", told), told
    done = cli("jobs", "list")
    assert done.returncode == 3
    assert re.fullmatch(r"dllm: --address: nobody answers .*\n", done.stderr), done.stderr
