"""The Ray Serve application: gateways, and behind them decode replicas whose number follows the work in hand.

`build` is what `dllm serve`, `serve run` and `serve deploy` use. Models stand in `user_config`, so that another one is
loaded by deploying again, with nothing restarted.
"""

import contextlib
import errno
import hashlib
import importlib.metadata
import logging
import re
import socket
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import httpx
from pydantic import Field

from dllm_core.config.base import Frozen
from dllm_core.errors import ConfigError, DataError, first_line
from workflows.env import actor_options
from workflows.placement import ServePlacement
from workflows.serve.config import ServeConfig, ServedRun

APP_NAME = "dllm"
_READY_WITHIN_S = 120.0
_NO_LIMIT = 1 << 14  # Ray Serve lets every call in: a replica refuses rows itself, and tells its load meanwhile
_PROXY_WAITS_S = 10.0  # longer than the gateway, whose own deadline answers in OpenAI's shape
_POLL_S = 0.05
_LOOKED_AFTER_S = 2  # by the controller: whether a replica is well, and whether it stands still
_STARTS = 2
_SURGE_PERCENT = 25  # an upgrade starts new ones before it stops old ones, one at least
_DRAINS_S = 30.0  # what a replica that is to go has for the requests that it holds; others are tried again elsewhere
# Of the section `serve`, what decides nothing in a gateway: a changed list of models must not restart it.
_NO_REASON = {"models", "models_file", "examples", "host", "port"}
_POLICY = "workflows.serve.scaling:ByWork"
_ROUTER = "workflows.serve.routing.LeastWorkRouter"


class AppArgs(Frozen):
    """What the application is built from. models: by the name that requests give; the first is the page's default.

    None, where a config file of Ray Serve says them as `user_config` of Gateway and DecodeReplica: what stands in its
    `args` is identity there, and others would restart all.
    """

    models: dict[str, ServedRun] = Field({})
    serve: ServeConfig = ServeConfig()
    placement: ServePlacement = ServePlacement()


def build(args: AppArgs) -> Any:
    """The application: a gateway bound to its replicas."""
    from ray import serve
    from ray.serve.config import AutoscalingConfig, AutoscalingPolicy, RequestRouterConfig

    from workflows.serve.gateway import Gateway
    from workflows.serve.replica import DecodeReplica

    placement, settings = args.placement, args.serve
    models = {name: said.model_dump(mode="json") for name, said in args.models.items()}
    scaling = AutoscalingConfig(
        min_replicas=placement.min_replicas,
        max_replicas=placement.max_replicas,
        initial_replicas=max(1, placement.min_replicas),
        upscale_delay_s=0,  # the policy keeps its own time
        downscale_delay_s=0,
        metrics_interval_s=1,
        look_back_period_s=4,
        policy=AutoscalingPolicy(
            policy_function=_POLICY,
            policy_kwargs={
                "target": placement.target_work,
                "up_after_s": placement.up_after_s,
                "down_after_s": placement.down_after_s,
            },
        ),
    )
    shared: dict[str, Any] = {
        "version": _version(args),
        "_internal": True,
        "max_surge_percent": _SURGE_PERCENT,
        "user_config": models,
        "logging_config": {"enable_access_log": False},  # gateways have their own, without prompts
        "max_ongoing_requests": _NO_LIMIT,
        "graceful_shutdown_timeout_s": min(_DRAINS_S, settings.request_timeout_s),
    }
    bound = (
        serve.deployment(DecodeReplica)
        .options(
            **shared,
            autoscaling_config=scaling,
            request_router_config=RequestRouterConfig(
                request_router_class=_ROUTER, request_routing_stats_period_s=_LOOKED_AFTER_S
            ),
            ray_actor_options=actor_options(placement.demand),
            max_constructor_retry_count=_STARTS,
            health_check_period_s=_LOOKED_AFTER_S,
            health_check_timeout_s=10,
        )
        .bind(
            {
                "dtype": settings.dtype,
                "max_batch_tokens": settings.max_batch_tokens,
                "max_waiting": settings.max_queued_requests,
                "threads": max(1, int(placement.cpus_per_replica)),
                "use_gpu": placement.gpus_per_replica > 0,
                "compile_seconds": settings.limits.compile_seconds,
            }
        )
    )
    deployment: Any = Gateway  # `serve.deployment` made a Deployment of it; its stub says that it is the class still
    gateway = deployment.options(
        **shared, num_replicas=placement.gateways, ray_actor_options=actor_options(placement.gateway_demand)
    )
    told = settings.model_dump(mode="json", exclude=_NO_REASON)
    return gateway.bind(bound, {**told, "open": True}, placement.min_replicas == 0, placement.gateways)


def _version(args: AppArgs) -> str:
    """What replicas and gateways are restarted for: our code, and all but the models, which they load and drop.

    Deployed from Python, Ray Serve 2.60 would make one up each time, and restart all for another model; it takes ours
    only where it is told that it was meant for itself.
    """
    said = args.model_dump_json(exclude={"models": True, "serve": _NO_REASON})
    return hashlib.sha256(f"{importlib.metadata.version('dllm')}\n{said}".encode()).hexdigest()[:16]


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


def start(args: AppArgs) -> str:
    """Start the endpoint on the connected cluster and wait until it answers; its base URL. All or nothing."""
    from ray.serve.config import HTTPOptions

    settings = args.serve
    running = _running_port()
    if running is None:
        check_port(settings)
    elif running != settings.port:
        problem = f"the cluster's Ray Serve listens on {running} already, and has one port"
        raise ConfigError("serve.port", problem, settings.port, f"serve.port={running}")
    logging.getLogger("ray.serve").setLevel(logging.ERROR)
    patience = settings.request_timeout_s + _PROXY_WAITS_S
    http = HTTPOptions(host=settings.host, port=settings.port, request_timeout_s=patience)
    host = "127.0.0.1" if settings.host in {"0.0.0.0", "::"} else settings.host
    url = f"http://[{host}]:{settings.port}" if ":" in host else f"http://{host}:{settings.port}"
    try:
        with _starting(
            http_options=http, logging_config={"enable_access_log": False}, tracing_config=_tracing(settings)
        ):
            deploy(args)
        _wait_until_it_answers(url)
    except BaseException:
        stop()
        raise
    return url


@contextlib.contextmanager
def _starting(**options: Any) -> Iterator[None]:
    """Ray Serve with these options, from when its controller is known: its proxies start beside what the block does."""
    from ray import serve

    aside = ThreadPoolExecutor(1)
    started = aside.submit(serve.start, **options)
    aside.shutdown(wait=False)  # whoever is interrupted need not wait for it
    while not started.done() and not _controller_is_known():
        time.sleep(_POLL_S)
    if started.done():
        _outcome(started)
    yield
    _outcome(started)


def _outcome(started: Future[None]) -> None:
    """On a machine that is busy enough its proxy dies, or is waited for in vain."""
    from ray.exceptions import RayError

    try:
        started.result()
    except RayError as error:
        problem = f"Ray Serve does not start ({first_line(error)})"
        remedy = "run it again: a busy machine may need longer than Ray waits"
        raise DataError("serve", problem, remedy=remedy) from error


def _controller_is_known() -> bool:
    """Whether calls to it would be kept until it runs; `_running_port` waits for that."""
    import ray
    from ray.serve._private.constants import SERVE_CONTROLLER_NAME, SERVE_NAMESPACE

    try:
        ray.get_actor(SERVE_CONTROLLER_NAME, namespace=SERVE_NAMESPACE)
    except ValueError:
        return False
    return True


def _running_port() -> int | None:
    """Where the cluster's Ray Serve listens; None where it does not run yet.

    What this process knows of may be of a cluster that it has left: jobs of private clusters all have the same number.
    """
    from ray.serve.context import _check_cached_client_alive, _get_global_client

    client, _ = _check_cached_client_alive()
    if client is None:
        client = _get_global_client(raise_if_no_controller_running=False)
    return None if client is None else int(client.http_config.port)


def _tracing(settings: ServeConfig) -> dict[str, Any] | None:
    """As Ray Serve has it; None where nobody asks: its own environment variables then count."""
    if not settings.tracing_ratio:
        return None
    exporter = {} if settings.tracing_exporter is None else {"exporter_import_path": settings.tracing_exporter}
    return {"enabled": True, "sampling_ratio": settings.tracing_ratio, **exporter}


def deploy(args: AppArgs) -> None:
    """Deploy, or deploy again: what has changed is changed, and nothing else is touched."""
    from ray import serve

    try:
        serve.run(build(args), name=APP_NAME, blocking=False)
    except RuntimeError as error:
        problem = f"a replica does not start ({_reason(serve.status()) or error})"
        raise DataError("serve", problem, remedy="the logs of Ray Serve have the whole story") from error


def check_loaded(url: str) -> None:
    """Raise DataError if a replica could not load a model that was deployed beside others, which it serves still."""
    try:
        missing = httpx.get(f"{url}/health", timeout=10).json().get("not_loaded", [])
    except (httpx.HTTPError, ValueError) as error:
        raise DataError("serve", f"does not say whether all is loaded ({first_line(error)})", url) from error
    if missing:
        problem = f"no replica can load {', '.join(missing)}"
        raise DataError("serve", problem, remedy="the logs of Ray Serve have the whole story")


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
