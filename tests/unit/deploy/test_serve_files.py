"""What `serve deploy` is given is what Ray Serve and our builder take, and fits on the nodes that it names."""

import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from ray.serve.schema import ServeDeploySchema

from dllm_core.errors import ConfigError
from workflows.serve.app import AppArgs
from workflows.serve.config import ServedModels
from workflows.submit.demand import startable

ROOT = Path(__file__).parents[3]
FILES = sorted((ROOT / "deploy/serve").glob("*.yaml"))


def read(path: Path) -> dict[str, Any]:
    return yaml.safe_load(path.read_text(encoding="utf-8"))


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_ray_serve_and_the_builder_take_it(path):
    values = read(path)
    [application] = ServeDeploySchema.model_validate(values).applications
    assert application.import_path == "workflows.serve.app:build"
    args = AppArgs.checked(application.args, "args")
    assert not args.models  # others there would restart all
    said = {one.name: ServedModels.of(one.user_config) for one in application.deployments}
    assert said.keys() == {"DecodeReplica", "Gateway"}
    assert said["DecodeReplica"] == said["Gateway"] != {}
    http = values["http_options"]
    assert (http["host"], http["port"]) == (args.serve.host, args.serve.port)
    assert http["request_timeout_s"] > args.serve.request_timeout_s
    assert args.serve.host == "127.0.0.1" or args.serve.keys_file


def test_replicas_and_gateways_find_their_nodes():
    args = AppArgs.checked(read(ROOT / "deploy/serve/gpu.yaml")["applications"][0]["args"])
    nodes, placement = startable(ROOT / "cluster.yaml"), args.placement
    assert sum(node.room(placement.demand) for node in nodes) >= placement.max_replicas
    assert sum(node.room(placement.gateway_demand) for node in nodes) >= placement.gateways


def test_files_are_there_and_say_how_they_are_used():
    assert [path.name for path in FILES] == ["cpu.yaml", "gpu.yaml"]
    for path in FILES:
        assert re.search(rf"#   serve (run|deploy) deploy/serve/{path.name}", path.read_text())


@pytest.mark.parametrize("field", ["replicas", "gpus_per_replicas"])
def test_a_misspelt_name_is_refused(field):
    args = read(ROOT / "deploy/serve/gpu.yaml")["applications"][0]["args"]
    args["placement"][field] = 1
    with pytest.raises(ConfigError, match=f"args.placement.{field}: unknown name"):
        AppArgs.checked(args, "args")
