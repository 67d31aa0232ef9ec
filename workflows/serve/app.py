"""The Ray Serve application: one gateway; behind it, decode replicas whose number follows the requests in flight."""

import logging
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
        max_ongoing_requests=256,
        max_queued_requests=settings.max_queued_requests,
        health_check_period_s=2,
        health_check_timeout_s=10,
        graceful_shutdown_timeout_s=5,
    )
    bound = replica.bind(
        run_url, settings.max_batch_tokens, max(1, int(placement.cpus_per_replica)), placement.gpus_per_replica > 0
    )
    deployment: Any = Gateway  # `serve.deployment` made a Deployment of it; its stub says that it is the class still
    gateway = deployment.options(
        ray_actor_options={"num_cpus": 0.1}, max_ongoing_requests=4096, graceful_shutdown_timeout_s=5
    )
    return gateway.bind(bound, run_url, model, decode.model_dump(mode="json"))


def check_port(settings: ServeConfig) -> None:
    """Refuse a port that is taken, before anything starts."""
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((settings.host, settings.port))
        except OSError as error:
            problem = f"cannot be listened on at {settings.host} ({error.strerror})"
            raise ConfigError("serve.port", problem, settings.port, "choose another: serve.port=...") from None


def start(run_url: str, model: str, settings: ServeConfig, decode: DecodeConfig, placement: ServePlacement) -> str:
    """Start the endpoint on the connected cluster and wait until it answers; its base URL."""
    from ray import serve
    from ray.serve.config import HTTPOptions

    check_port(settings)
    logging.getLogger("ray.serve").setLevel(logging.ERROR)
    serve.start(
        http_options=HTTPOptions(host=settings.host, port=settings.port, request_timeout_s=settings.request_timeout_s)
    )
    serve.run(build_app(run_url, model, settings, decode, placement), name=APP_NAME, blocking=False)
    host = "127.0.0.1" if settings.host in {"0.0.0.0", "::"} else settings.host
    url = f"http://{host}:{settings.port}"
    give_up = time.monotonic() + _READY_WITHIN_S
    while time.monotonic() < give_up:
        try:
            if httpx.get(f"{url}/health", timeout=10).status_code == 200:
                return url
        except httpx.HTTPError:
            time.sleep(0.1)
    raise DataError("serve", f"did not answer within {_READY_WITHIN_S:.0f} s", url, "see the logs of Ray Serve")


def stop() -> None:
    """Take our application down; requests in flight are finished first. Other applications of the cluster stay."""
    from ray import serve

    serve.delete(APP_NAME)
