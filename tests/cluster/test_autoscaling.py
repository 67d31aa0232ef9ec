"""Nodes of cluster.yaml's kinds, in small, come when preprocessing asks for them and go when it is done.

Ray's own autoscaler starts them, with its provider of made-up nodes: each is a real raylet on this machine.
"""

import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import yaml
from ray.autoscaler._private.fake_multi_node.node_provider import (
    FAKE_HEAD_NODE_ID,
    FAKE_HEAD_NODE_TYPE,
    FakeMultiNodeProvider,
)
from ray_clusters import LoopbackCluster, new_token
from submitted import Cli, alone, recipe_of, shards

from dllm_core.data.manifest import read_manifest
from dllm_core.storage.store import LocalStore

pytestmark = [pytest.mark.long, pytest.mark.timeout(600)]
ROOT = Path(__file__).parents[2]
PROVIDER = f"{FakeMultiNodeProvider.__module__}.{FakeMultiNodeProvider.__name__}"
MOST, CORES = 2, 1


def in_small(config: dict[str, Any]) -> dict[str, Any]:
    """cluster.yaml with its labels and custom resources, on nodes that fit on this machine."""
    kinds = config["available_node_types"]
    for name, kind in kinds.items():
        kind |= {"node_config": {}, "min_workers": 0, "max_workers": 0 if name == config["head_node_type"] else MOST}
        kind["resources"] = {resource: min(amount, CORES) for resource, amount in kind["resources"].items()}
        kind["resources"].pop("GPU", None)
        kind.pop("docker", None)
    provider = {"type": "external", "module": PROVIDER, "launch_multiple": True, "head_node_id": FAKE_HEAD_NODE_ID}
    provider |= {"disable_node_updaters": True, "disable_launch_config_check": True, "foreground_node_launch": True}
    empty = ("docker", "auth", "file_mounts")
    kinds[FAKE_HEAD_NODE_TYPE] = kinds.pop(config["head_node_type"])  # the provider knows it by this name alone
    rest = {name: config[name] for name in ("cluster_name", "upscaling_speed")} | {
        "head_node_type": FAKE_HEAD_NODE_TYPE
    }
    return {
        **rest,
        **{name: {} for name in empty},
        "provider": provider,
        "available_node_types": kinds,
        "max_workers": MOST * len(kinds),
        "idle_timeout_minutes": 0.1,
        **{
            name: []
            for name in (
                *("initialization_commands", "setup_commands", "head_setup_commands", "worker_setup_commands"),
                *("head_start_ray_commands", "worker_start_ray_commands", "cluster_synced_files"),
            )
        },
    }


def stages(cluster: LoopbackCluster) -> Counter[str]:
    nodes = [node for node in cluster.alive() or () if not node["is_head_node"]]
    return Counter(node["labels"].get("dllm-stage", "none") for node in nodes)


def test_nodes_come_for_preprocessing_and_go_after_it(tmp_path):
    config = in_small(yaml.safe_load((ROOT / "cluster.yaml").read_text()))
    nodes = tmp_path / "cluster.yaml"
    nodes.write_text(yaml.safe_dump(config))
    recipe = recipe_of(tmp_path, str(tmp_path / "storage"), paragraphs=8000)
    with LoopbackCluster(token=new_token(), autoscaling=config) as cluster:
        cli = Cli(cluster, tmp_path)
        path = cli.written(recipe)
        refused = cli("submit", path, "--verb", "preprocess")
        assert refused.returncode == 3
        assert "there is room for 0" in refused.stderr
        assert not stages(cluster)
        seen: list[Counter[str]] = []
        is_over = threading.Event()

        def watch() -> None:
            while not is_over.wait(0.5):
                seen.append(stages(cluster))

        watching = threading.Thread(target=watch)
        watching.start()
        try:
            done = cli("submit", path, "--verb", "preprocess", "--nodes", str(nodes))
            assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
            assert "nodes must be started first: preprocess" in done.stdout
            give_up = time.monotonic() + 120
            while seen[-1]:
                assert time.monotonic() < give_up, seen[-1]
                time.sleep(0.5)
        finally:
            is_over.set()
            watching.join()
    most = max(seen, key=lambda counts: counts.total())
    assert most == {"preprocess": MOST}, most
    assert {stage for counts in seen for stage in counts} == {"preprocess"}
    print(f"autoscaling: 0 -> {MOST} -> 0 nodes of the kind `preprocess`, none of another")
    single = alone(recipe, tmp_path)
    found = read_manifest(LocalStore(tmp_path / "storage"), single.corpus)
    assert list(shards(found)) == list(shards(single.manifest))
