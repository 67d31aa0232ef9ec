"""The launcher's files pass Ray's own checks, offer what our placement asks for, and let nobody in without a token."""

import copy
import re
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config

from workflows.placement import Demand, PlacementConfig

ROOT = Path(__file__).parents[3]
CLOUDS = [ROOT / "cluster.yaml", ROOT / "deploy/cluster/gcp.yaml"]
FILES = [*CLOUDS, ROOT / "deploy/cluster/on-premise.yaml"]
PLACEMENT = PlacementConfig.checked(yaml.safe_load((ROOT / "deploy/cluster/placement.yaml").read_text()), "placement")
DEMANDS = {
    "preprocess": (PLACEMENT.preprocess.workers, PLACEMENT.preprocess.demand),
    "train": (PLACEMENT.train.workers, PLACEMENT.train.demand),
    "evaluate": (PLACEMENT.evaluate.workers, PLACEMENT.evaluate.demand),
    "serve": (PLACEMENT.serve.max_replicas, PLACEMENT.serve.demand),
    "gateways": (PLACEMENT.serve.gateways, PLACEMENT.serve.gateway_demand),
}


def read(path: Path) -> dict[str, Any]:
    return yaml.safe_load(path.read_text(encoding="utf-8"))


def check(config: dict[str, Any]) -> dict[str, Any]:
    prepared = prepare_config(copy.deepcopy(config))
    validate_config(prepared)
    return prepared


def fitting(node: dict[str, Any], demand: Demand) -> int:
    """How many such tasks, workers or replicas one node takes at once."""
    if any(node.get("labels", {}).get(name) != value for name, value in demand.labels.items()):
        return 0
    return min(int(node["resources"].get(name, 0) / amount + 1e-9) for name, amount in demand.amounts.items())


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_ray_takes_the_file(path):
    prepared = check(read(path))
    assert prepared["max_workers"] >= 1


@pytest.mark.parametrize("path", CLOUDS, ids=lambda path: path.name)
def test_every_stage_fits_on_the_nodes_that_its_label_names(path):
    config = read(path)
    for stage, (count, demand) in DEMANDS.items():
        offered = {
            name: node["max_workers"] * fitting(node, demand)
            for name, node in config["available_node_types"].items()
            if name != config["head_node_type"]
        }
        assert sum(offered.values()) >= count, (stage, offered)


@pytest.mark.parametrize("path", CLOUDS, ids=lambda path: path.name)
def test_stages_keep_off_nodes_that_are_not_theirs(path):
    for stage, (_, demand) in DEMANDS.items():
        where = {name for name, node in read(path)["available_node_types"].items() if fitting(node, demand)}
        assert where == {demand.labels["dllm-stage"]}, stage


@pytest.mark.parametrize("path", CLOUDS, ids=lambda path: path.name)
def test_the_sum_of_all_kinds_is_within_the_cluster_s_own_bound(path):
    config = read(path)
    nodes = [node for name, node in config["available_node_types"].items() if name != config["head_node_type"]]
    assert max(node["max_workers"] for node in nodes) <= config["max_workers"]
    for name in ("preprocess", "serve", "train"):
        assert config["available_node_types"][name]["min_workers"] == 0, "nothing is paid for while nobody works"


def market(node: dict[str, Any]) -> bool:
    said = node["node_config"]
    is_spot = said.get("InstanceMarketOptions", {}).get("MarketType") == "spot"
    return is_spot or any(part.get("provisioningModel") == "SPOT" for part in said.get("scheduling", []))


@pytest.mark.parametrize("path", CLOUDS, ids=lambda path: path.name)
def test_only_preprocessing_is_on_spot_nodes(path):
    kinds = read(path)["available_node_types"]
    assert {name for name, node in kinds.items() if market(node)} == {"preprocess"}
    assert all((node["labels"].get("dllm-market") == "spot") == market(node) for node in kinds.values())


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_the_head_runs_no_work(path):
    config = read(path)
    assert any("--num-cpus=0" in command for command in config["head_start_ray_commands"])
    if "available_node_types" in config:
        assert config["available_node_types"][config["head_node_type"]]["resources"] == {"CPU": 0}


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_every_process_asks_for_the_token_and_the_dashboard_stays_inside(path):
    config = read(path)
    starts = [
        command
        for name in ("head_start_ray_commands", "worker_start_ray_commands")
        for command in config[name]
        if "ray start" in command
    ]
    assert len(starts) == 2
    for command in starts:
        assert "RAY_AUTH_MODE=token" in command
        [path_of_token] = re.findall(r"RAY_AUTH_TOKEN_PATH=(\S+)", command)
        assert path_of_token in config["file_mounts"]
    assert "--dashboard-host=127.0.0.1" in starts[0]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_images_are_pinned(path):
    config = read(path)
    docker = [config["docker"], *(node.get("docker", {}) for node in config.get("available_node_types", {}).values())]
    images = [value for section in docker for name, value in section.items() if name.endswith("image")]
    assert images
    assert all(re.fullmatch(r"[\w./-]+:\d+\.\d+\.\d+(-cpu)?", image) for image in images)


def without_head(config: dict[str, Any]) -> None:
    config["head_node_type"] = "haed"


def with_more(config: dict[str, Any]) -> None:
    config["storage"] = "s3://bucket"


def with_wrong_resource(config: dict[str, Any]) -> None:
    config["available_node_types"]["train"]["resources"]["GPU"] = "8"


def with_too_many(config: dict[str, Any]) -> None:
    config["available_node_types"]["train"]["min_workers"] = config["max_workers"] + 1


@pytest.mark.parametrize("spoil", [without_head, with_more, with_wrong_resource, with_too_many])
def test_what_is_wrong_is_refused(spoil):
    config = read(ROOT / "cluster.yaml")
    spoil(config)
    with pytest.raises((ValueError, jsonschema.ValidationError)):
        check(config)


def test_a_stage_that_no_node_offers_is_found():
    config = read(ROOT / "cluster.yaml")
    demand = Demand(cpus=1, resources={"dllm-preproces": 1}, labels={"dllm-stage": "preprocess"})
    assert not any(fitting(node, demand) for node in config["available_node_types"].values())
