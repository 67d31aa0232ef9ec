"""A gateway before a real decode replica in this process: every route over ASGI, without a cluster."""

import asyncio
import contextlib
from types import SimpleNamespace

import httpx
import ray.serve
from ray.exceptions import RayTaskError

from workflows.serve.config import ServeConfig
from workflows.serve.gateway import Gateway, api
from workflows.serve.replica import DecodeReplica


class Call:
    """A call of the replica, as Ray Serve hands it to the gateway: errors come wrapped, `cancel` ends it."""

    def __init__(self, started):
        self._started, self._task = started, None

    def __await__(self):
        self._task = asyncio.ensure_future(self._started)
        return self._awaited().__await__()

    async def _awaited(self):
        try:
            return await self._task
        except Exception as error:
            raise RayTaskError("call", "", error).as_instanceof_cause() from error

    async def __aiter__(self):
        try:
            async with contextlib.aclosing(self._started) as told:
                async for item in told:
                    yield item
        except Exception as error:
            raise RayTaskError("call", "", error).as_instanceof_cause() from error

    def cancel(self):
        if self._task is not None:
            self._task.cancel()


class LocalReplicas:
    """One replica behind what looks like a deployment's handle."""

    def __init__(self, replica):
        self._replica = replica

    def __getattr__(self, method):
        return SimpleNamespace(remote=lambda *args: Call(getattr(self._replica, method)(*args)))

    def options(self, stream):
        return self

    def broadcast(self, method):
        async def asked():
            return [SimpleNamespace(get_async=getattr(self._replica, method))]

        return SimpleNamespace(_fetch_replica_results_async=asked)


REPLICA = {
    "dtype": None,
    "max_batch_tokens": 4096,
    "max_waiting": 512,
    "threads": 1,
    "use_gpu": False,
    "compile_seconds": 10,
}


@contextlib.contextmanager
def local_endpoint(models, **settings):
    """models: {name: {run, decode}}; yields `run(scenario)`, where scenario(client) is a coroutine function."""
    ours = Gateway.func_or_class.__mro__[1]  # below Ray's own wrapping
    before = ray.serve.get_replica_context

    async def session(scenario, headers):
        replica = DecodeReplica(REPLICA)
        await replica.reconfigure(models)
        gateway = ours(LocalReplicas(replica), ServeConfig(**settings).model_dump(mode="json"))
        gateway.reconfigure(models)
        ray.serve.get_replica_context = lambda: SimpleNamespace(servable_object=gateway)
        transport = httpx.ASGITransport(app=api, raise_app_exceptions=False)
        try:
            async with httpx.AsyncClient(
                transport=transport, base_url="http://gateway", headers=headers, timeout=60
            ) as client:
                return await scenario(client)
        finally:
            await replica.reconfigure({})

    try:
        yield lambda scenario, headers=None: asyncio.run(session(scenario, headers or {}))
    finally:
        ray.serve.get_replica_context = before
