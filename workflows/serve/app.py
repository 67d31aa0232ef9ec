"""The Ray Serve application: one gateway; behind it, decode replicas whose number follows the requests in flight."""

import errno
import logging
import re
import socket
import time
from typing import Any

import httpx

from dllm_core.decoding.config import DecodeConfig
from dllm_core.errors import ConfigError, DataError
from workflows.placement import ServePlacement
from workflows.serve.config import ServeConfig

APP_NAME = "dllm"
_READY_WITHIN_S = 120.0
_NO_LIMIT = 1 << 14  # Ray Serve lets every call in: a replica refuses rows itself, and tells its load meanwhile
_PROXY_WAITS_S = 10.0  # longer than the gateway, whose own deadline answers in OpenAI's shape
_STARTS = 2


def build_app(run_url: str, model: str, settings: ServeConfig, decode: DecodeConfig, placement: ServePlacement) -> Any:
    """Bind gateway and replicas to a run's bundle."""
    from ray import serve
    from ray.serve.config import AutoscalingConfig

    from workflows.serve.gateway import Gateway
    from workflows.serve.replica import DecodeReplica

    replica = serve.deployment(DecodeReplica).options(
        autoscaling_config=AutoscalingConfig(
            min_replicas=placement.min_replicas,
            max_replicas=placement.max_replicas,
            target_ongoing_requests=placement.target_ongoing_requests,
            upscale_delay_s=2,
            downscale_delay_s=60,
        ),
        ray_actor_options={"num_cpus": placement.cpus_per_replica, "num_gpus": placement.gpus_per_replica},
        max_ongoing_requests=_NO_LIMIT,
        max_constructor_retry_count=_STARTS,
        health_check_period_s=2,
        health_check_timeout_s=10,
        graceful_shutdown_timeout_s=5,
    )
    bound = replica.bind(
        run_url,
        settings.dtype,
        settings.max_batch_tokens,
        settings.max_queued_requests,
        max(1, int(placement.cpus_per_replica)),
        placement.gpus_per_replica > 0,
    )
    deployment: Any = Gateway  # `serve.deployment` made a Deployment of it; its stub says that it is the class still
    gateway = deployment.options(
        ray_actor_options={"num_cpus": 0.1}, max_ongoing_requests=_NO_LIMIT, graceful_shutdown_timeout_s=5
    )
    return gateway.bind(bound, run_url, model, decode.model_dump(mode="json"), settings.request_timeout_s)


def check_port(settings: ServeConfig) -> None:
    """Refuse a host that is not ours and a port that is taken, before anything starts."""
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((settings.host, settings.port))
        except OSError as error:
            if isinstance(error, socket.gaierror) or error.errno == errno.EADDRNOTAVAIL:
                problem = f"is no address of this machine ({error.strerror})"
                remedy = "127.0.0.1 for this machine alone, 0.0.0.0 for all that reach it"
                raise ConfigError("serve.host", problem, settings.host, remedy) from None
            problem = f"cannot be listened on at {settings.host} ({error.strerror})"
            raise ConfigError("serve.port", problem, settings.port, "choose another: serve.port=...") from None


def start(run_url: str, model: str, settings: ServeConfig, decode: DecodeConfig, placement: ServePlacement) -> str:
    """Start the endpoint on the connected cluster and wait until it answers; its base URL. All or nothing."""
    from ray import serve
    from ray.serve.config import HTTPOptions

    check_port(settings)
    logging.getLogger("ray.serve").setLevel(logging.ERROR)
    patience = settings.request_timeout_s + _PROXY_WAITS_S
    serve.start(http_options=HTTPOptions(host=settings.host, port=settings.port, request_timeout_s=patience))
    host = "127.0.0.1" if settings.host in {"0.0.0.0", "::"} else settings.host
    url = f"http://[{host}]:{settings.port}" if ":" in host else f"http://{host}:{settings.port}"
    try:
        _deploy(build_app(run_url, model, settings, decode, placement))
        _wait_until_it_answers(url)
    except BaseException:
        stop()
        raise
    return url


def _deploy(app: Any) -> None:
    from ray import serve

    try:
        serve.run(app, name=APP_NAME, blocking=False)
    except RuntimeError as error:
        problem = f"a replica does not start ({_reason(serve.status()) or error})"
        raise DataError("serve", problem, remedy="the logs of Ray Serve have the whole story") from error


def _reason(status: Any) -> str:
    """What the first failed deployment said last: the exception at the end of its traceback."""
    deployments = status.applications[APP_NAME].deployments.values() if APP_NAME in status.applications else ()
    failed = [deployment.message.strip() for deployment in deployments if deployment.status == "DEPLOY_FAILED"]
    return re.sub(r"^[\w.]*\.(?=\w+: )", "", failed[0].splitlines()[-1]) if failed and failed[0] else ""


def _wait_until_it_answers(url: str) -> None:
    give_up = time.monotonic() + _READY_WITHIN_S
    while time.monotonic() < give_up:
        try:
            if httpx.get(f"{url}/health", timeout=10).status_code == 200:
                return
        except httpx.HTTPError:
            pass
        time.sleep(0.1)
    raise DataError("serve", f"did not answer within {_READY_WITHIN_S:.0f} s", url, "see the logs of Ray Serve")


def stop() -> None:
    """Take our application down; requests in flight are finished first. Other applications of the cluster stay."""
    from ray import serve

    serve.delete(APP_NAME)
