"""What `dllm submit` and `dllm jobs` refuse, on a cluster that asks for a token. What they do: test_one_job.py."""

import re
import socket
import ssl
import subprocess

import pytest
from conftest import free_port, small_recipe, write_small_text
from ray_clusters import LoopbackCluster, NodeKind, new_token
from submitted import Cli, Relay

NODES = (NodeKind("train", 2),)


@pytest.fixture(scope="module")
def cli(tmp_path_factory):
    with LoopbackCluster(NODES, token=new_token()) as cluster:
        yield Cli(cluster, tmp_path_factory.mktemp("submit"))


@pytest.fixture(scope="module")
def recipe(cli):
    write_small_text(cli.folder)
    return small_recipe(cli.folder, serve={"port": free_port()}, placement={"train": {"workers": 1}})


@pytest.fixture(scope="module")
def path(cli, recipe):
    return cli.written(recipe)


@pytest.mark.parametrize("token", ["", "0" * 64])
def test_no_token_and_one_that_does_not_hold_are_a_line(cli, token):
    mode = {"RAY_AUTH_MODE": "token" if token else "disabled"}
    done = cli("jobs", "list", RAY_AUTH_TOKEN=token, **mode)
    assert done.returncode == 3
    assert re.fullmatch(r"dllm: --address: refuses the token .*RAY_AUTH_TOKEN.*\n", done.stderr), done.stderr
    assert cli.cluster.token not in done.stdout + done.stderr


def test_tls_is_spoken_with_who_is_known(cli, tmp_path):
    """A proxy before the head ends TLS, as on a cluster that is reached from outside."""
    key, certificate = tmp_path / "key.pem", tmp_path / "certificate.pem"
    words = ["-subj", "/CN=127.0.0.1", "-addext", "subjectAltName=IP:127.0.0.1", "-out", str(certificate)]
    made = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-keyout", str(key), *words]
    subprocess.run(made, check=True, capture_output=True)
    tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    tls.load_cert_chain(certificate, key)
    relay = Relay(cli.cluster.dashboard_port, tls)
    address = f"https://127.0.0.1:{relay.port}"
    assert cli("jobs", "list", "--ca-file", str(certificate), address=address).returncode == 0
    unknown = cli("jobs", "list", address=address)
    assert unknown.returncode == 3
    assert re.fullmatch(r"dllm: --address: no TLS with it .*--ca-file.*\n", unknown.stderr), unknown.stderr
    plain = cli("jobs", "list", address=address.replace("https", "http"))
    assert plain.returncode == 3
    assert re.fullmatch(r"dllm: --address: does not answer as it should .*\n", plain.stderr), plain.stderr
    relay.close()


def test_what_the_cluster_has_no_room_for_is_refused_before_it_is_sent(cli, path):
    asked = ["placement.train.workers=4", "placement.train.labels={dllm-stage: train}"]
    done = cli("submit", path, *asked, "placement.train.resources={dllm-train: 1}")
    assert done.returncode == 3
    line = "placement.train: needs 4 × CPU=1 dllm-train=1 on nodes with dllm-stage=train; there is room for 2"
    assert line in done.stderr
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
