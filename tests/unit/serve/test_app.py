"""What stands in the way of an endpoint is named, and nothing of it stays behind."""

import socket
from types import SimpleNamespace

import pytest
from ray import serve
from ray.exceptions import ActorDiedError

from dllm_core.errors import ConfigError, DataError
from workflows.serve.app import AppArgs, check_port, start
from workflows.serve.config import ServeConfig, ServedRun

TRACEBACK = """The deployment failed to start 2 times in a row. Error:
\x1b[36mray::ServeReplica:dllm:DecodeReplica.initialize_and_get_metadata()\x1b[39m (pid=12237)
  File "workflows/serve/replica.py", line 161, in __init__
dllm_core.errors.CheckpointError: runs/small/bundle/model.safetensors: is damaged
"""


def test_a_replica_that_does_not_start_is_one_line_and_leaves_nothing(monkeypatch):
    def refuse(*_, **__):
        raise RuntimeError("Deploying application dllm failed: Failed to update the deployments ['DecodeReplica'].")

    taken_down = []
    states = {
        "Gateway": SimpleNamespace(status="UPDATING", message="starting"),
        "DecodeReplica": SimpleNamespace(status="DEPLOY_FAILED", message=TRACEBACK),
    }
    monkeypatch.setattr(serve, "start", lambda **_: None)
    monkeypatch.setattr("workflows.serve.app._running_port", lambda: None)
    monkeypatch.setattr(serve, "run", refuse)
    monkeypatch.setattr(serve, "delete", taken_down.append)
    status = SimpleNamespace(applications={"dllm": SimpleNamespace(deployments=states)})
    monkeypatch.setattr(serve, "status", lambda: status)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with pytest.raises(DataError) as caught:
        start(AppArgs(models={"small": ServedRun(run="run")}, serve=ServeConfig(port=port)))
    assert str(caught.value) == (
        "serve: a replica does not start (CheckpointError: runs/small/bundle/model.safetensors: is damaged): "
        "the logs of Ray Serve have the whole story"
    )
    assert taken_down == ["dllm"]


def test_a_proxy_of_ray_serve_that_dies_on_a_busy_machine_is_one_line(monkeypatch):
    """Planted: what Ray 2.60 raised where 33 processes shared two cores."""

    def die(**_):
        raise ActorDiedError

    taken_down = []
    monkeypatch.setattr(serve, "start", die)
    monkeypatch.setattr(serve, "run", lambda *_, **__: None)
    monkeypatch.setattr(serve, "delete", taken_down.append)
    monkeypatch.setattr("workflows.serve.app._running_port", lambda: None)
    monkeypatch.setattr("workflows.serve.app._controller_is_known", lambda: True)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with pytest.raises(DataError, match=r"^serve: Ray Serve does not start \(The actor died .*: run it again"):
        start(AppArgs(models={"small": ServedRun(run="run")}, serve=ServeConfig(port=port)))
    assert taken_down == ["dllm"]


@pytest.mark.parametrize("host", ["no-such-host.invalid", "192.0.2.1"])
def test_a_host_that_is_not_ours_is_blamed_and_not_the_port(host):
    with pytest.raises(ConfigError, match=r"^serve\.host: is no address of this machine"):
        check_port(ServeConfig(host=host, open=True))


def test_a_port_that_is_taken_is_blamed():
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        with pytest.raises(ConfigError, match=r"^serve\.port"):
            check_port(ServeConfig(port=other.getsockname()[1]))


def test_an_empty_host_would_be_all_interfaces_and_is_refused():
    with pytest.raises(ConfigError, match="host"):
        ServeConfig.checked({"host": ""})


def test_an_address_that_others_reach_needs_keys_or_leave():
    with pytest.raises(ConfigError, match=r"lets other machines in.*serve\.keys_file=FILE, or serve\.open=true"):
        ServeConfig.checked({"host": "0.0.0.0"})
    assert ServeConfig.checked({"host": "0.0.0.0", "keys_file": "keys"}).keys_file == "keys"


def test_a_cluster_that_serves_on_another_port_is_named(monkeypatch):
    monkeypatch.setattr("workflows.serve.app._running_port", lambda: 8000)
    with pytest.raises(ConfigError, match=r"serve\.port: the cluster's Ray Serve listens on 8000 already.*port=8000"):
        start(AppArgs(models={"small": ServedRun(run="run")}, serve=ServeConfig(port=9000)))
