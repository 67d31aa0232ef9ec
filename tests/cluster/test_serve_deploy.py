"""The files of deploy/serve through Ray Serve's own command, to a cluster that runs: deployed, changed, shut down."""

import subprocess
from pathlib import Path

import httpx
import pytest
import yaml
from conftest import free_port, runs_by_kind
from endpoint.conftest import replicas, wait_for
from ray_clusters import LoopbackCluster, NodeKind

pytestmark = [pytest.mark.long, pytest.mark.timeout(600)]
FILE = Path(__file__).parents[2] / "deploy/serve/cpu.yaml"


def test_a_config_is_deployed_changed_and_shut_down(tmp_path, tmp_path_factory):
    of = runs_by_kind(tmp_path_factory, {"first": {}, "second": {"objective": {"type": "autoregressive"}}})
    runs = {name: of(name)[1] for name in ("first", "second")}
    port = free_port()
    url = f"http://127.0.0.1:{port}"

    def written(*names):
        """The file as it ships, with these models and on a port that is free."""
        values = yaml.safe_load(FILE.read_text(encoding="utf-8"))
        values["http_options"]["port"] = values["applications"][0]["args"]["serve"]["port"] = port
        decode = {"max_tokens": 12, "block_length": 4, "steps_per_block": 4}
        models = {name: {"run": runs[name].url, "decode": decode} for name in names}
        for deployment in values["applications"][0]["deployments"]:
            deployment["user_config"] = models
        path = tmp_path / "serve.yaml"
        path.write_text(yaml.safe_dump(values), encoding="utf-8")
        return str(path)

    def answers(model):
        """Its status; None where nothing listens."""
        try:
            told = httpx.post(
                f"{url}/v1/completions", json={"model": model, "prompt": "RED ", "max_tokens": 8}, timeout=60
            )
        except httpx.HTTPError:
            return None
        return told.status_code

    with LoopbackCluster(nodes=[NodeKind("serve", cpus=3)]) as cluster:

        def serve(*words):
            command = ["serve", words[0], "--address", cluster.dashboard, *words[1:]]
            done = subprocess.run(command, env=cluster.env, capture_output=True, text=True, timeout=120, check=False)
            assert done.returncode == 0, done.stderr[-3000:]

        serve("deploy", written("first"))
        wait_for(lambda: answers("first") == 200, 120)
        before = {process.pid for process in replicas("")}
        assert len(before) == 2
        assert answers("second") == 404
        serve("deploy", written("first", "second"))
        wait_for(lambda: answers("second") == 200)
        assert answers("first") == 200
        assert {process.pid for process in replicas("")} == before
        serve("shutdown", "-y")
        wait_for(lambda: answers("first") is None and replicas("") == [])
