"""DecodeReplica: the Ray Serve deployment that holds weights. One decoding loop for each model that it serves.

Ray Serve lets every call in: the loops refuse rows themselves, so that a question after the load never waits behind
work. A model's first call is made before the replica says that it is ready.
"""

import asyncio
import contextlib
import logging
import os
import sys
import threading
import time
from collections.abc import AsyncIterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

from ray.serve.exceptions import BackPressureError

from dllm_core.checkpoints.bundle import read_bundle
from dllm_core.checkpoints.run_dir import RunDir
from dllm_core.decoding.request import Request
from dllm_core.errors import CheckpointError
from dllm_core.evaluation.question import AnswerScore, Question
from workflows.serve.config import ServedModels, ServedRun
from workflows.serve.progress import Detail, LoopEndedError, NotLoadedError, Told
from workflows.serve.routing import STANDS_STILL

if TYPE_CHECKING:
    from workflows.serve.hosted import HostedModel  # torch, which whoever deploys need not wait for
    from workflows.serve.loop import DecodingLoop

_LOG = logging.getLogger("ray.serve")
_SWITCH_S = 5e-4  # the event loop waits so long for a decoding thread that computes in Python, 5 ms by default
_LAST_WORDS_S = 0.5  # in which whoever waits is told
_DRAIN_S = 120.0  # as long as a request takes by default
_IDLE_S = 5.0  # in which gateways learn that there is another
_MOST_SCORING = 8  # requests for scores that wait or run; each may take seconds


class DecodeReplica:
    """settings: dtype, max_batch_tokens, max_waiting, threads, use_gpu, compile_seconds.

    Its models come by `reconfigure`, {name: {run, decode}}: a new one is loaded while the others go on decoding, and
    what it takes the place of decodes to the end what it has begun.
    """

    def __init__(self, settings: dict[str, Any]) -> None:
        import torch

        torch.set_num_threads(settings["threads"])
        sys.setswitchinterval(_SWITCH_S)
        self._settings = settings
        self._models: dict[str, HostedModel] = {}
        self._runs: dict[str, ServedRun] = {}
        self._not_loaded: tuple[str, ...] = ()
        self._retiring: list[tuple[str, HostedModel]] = []
        self._closing: set[asyncio.Task[None]] = set()
        self._scoring: set[Future[Any]] = set()
        self._loads, self._scores = (ThreadPoolExecutor(1, thread_name_prefix=name) for name in ("load", "score"))

    async def reconfigure(self, models: dict[str, dict[str, Any]]) -> None:
        """Serve these models, and no other. Where some are served, what cannot be loaded is left out: Ray Serve would
        end this replica for it, and start others that cannot load it either.
        """
        here, runs = asyncio.get_running_loop(), ServedModels.of(models)
        self._not_loaded = ()
        for name, said in runs.items():
            if self._runs.get(name) != said:
                try:
                    loaded = await here.run_in_executor(self._loads, self._loaded, said)
                except Exception:
                    if not self._models:
                        raise
                    _LOG.exception("the model %r cannot be loaded", name)
                    self._not_loaded += (name,)
                    continue
                old, self._models[name], self._runs[name] = self._models.get(name), loaded, said
                self._retire(name, old)
        for name in self._models.keys() - runs.keys():
            del self._runs[name]
            self._retire(name, self._models.pop(name))

    def _retire(self, name: str, old: "HostedModel | None") -> None:
        """Let it answer what was asked of it, and gateways that still ask, before it is closed."""
        if old is not None:
            task = asyncio.create_task(self._closed_when_idle((name, old)))
            self._retiring.append((name, old))
            self._closing.add(task)
            task.add_done_callback(self._closing.discard)

    async def _closed_when_idle(self, retiring: "tuple[str, HostedModel]") -> None:
        _, model = retiring
        begun = idle_since = time.monotonic()
        try:
            while (now := time.monotonic()) - begun < _DRAIN_S and now - idle_since < _IDLE_S:
                await asyncio.sleep(_IDLE_S / 10)
                if model.is_busy:
                    idle_since = time.monotonic()
        finally:
            self._retiring.remove(retiring)
            await model.close()

    def _loaded(self, said: ServedRun) -> "HostedModel":
        from workflows.serve.hosted import HostedModel

        bundle = read_bundle(RunDir.at(said.run))
        if said.digest not in (None, bundle.digest):  # gateways and other replicas know the one that was deployed
            problem = "its bundle has changed since it was deployed"
            raise CheckpointError(said.run, problem, bundle.digest, "deploy it again")
        model = HostedModel(bundle, self._settings)
        model.warm_up(said.decode)
        return model

    def _model(self, name: str, digest: str) -> "HostedModel":
        """The one with this bundle: gateways may know of another earlier or later than a replica does."""
        for known, model in [*self._models.items(), *self._retiring]:
            if known == name and model.bundle.digest == digest:
                return model
        raise NotLoadedError(name)

    async def decode(
        self, name: str, digest: str, requests: Sequence[Request], detail: Detail, end_id: int | None = None
    ) -> AsyncIterator[Told]:
        """Decode rows together, telling their progress: one message a tick, for all of them."""
        model = self._model(name, digest)
        for request in {request.constraint: request for request in requests}.values():
            await model.prepare(request)
        try:
            async with contextlib.aclosing(model.loop.stream(requests, detail, end_id)) as progress:
                async for told in progress:
                    yield told
        except Exception:
            with contextlib.suppress(LoopEndedError):  # seconds before Ray Serve would ask
                await self.check_health()
            raise

    async def score(
        self, name: str, digest: str, questions: Sequence[Question], draws: int, target_error: float | None, seed: int
    ) -> tuple[list[AnswerScore], str]:
        """Likelihoods, beside the decoding. Leaving early ends them at the next denoiser call."""
        model, given_up = self._model(name, digest), threading.Event()
        if len(self._scoring) >= _MOST_SCORING:
            raise BackPressureError(num_queued_requests=len(self._scoring), max_queued_requests=_MOST_SCORING)
        work = self._scores.submit(model.score, questions, draws, target_error, seed, given_up.is_set)
        self._scoring.add(work)
        work.add_done_callback(self._scoring.discard)
        try:
            return await asyncio.wrap_future(work)
        finally:
            given_up.set()

    async def load(self) -> dict[str, Any]:
        """Rows running and waiting, the denoiser calls they are expected to take, and what could not be loaded; raises
        if a loop is dead.
        """
        await self.check_health()
        loops = self._loops
        return {
            "running": sum(loop.load["running"] for loop in loops),
            "waiting": sum(loop.load["waiting"] for loop in loops),
            "work": sum(loop.work for loop in loops),
            "not_loaded": self._not_loaded,
        }

    async def record_autoscaling_stats(self) -> dict[str, float]:
        """Called by Ray Serve: what `scaling.ByWork` scales by."""
        loops = self._loops
        busy = min(1.0, sum(loop.busy_share() for loop in loops))
        return {"work": float(sum(loop.work for loop in loops)), "busy": busy}

    async def record_routing_stats(self) -> dict[str, Any]:
        """Called by Ray Serve, which tells every router when it changes: `routing.LeastWorkRouter` reads it."""
        return {STANDS_STILL: any(loop.stands_still for loop in self._loops)}

    async def check_health(self) -> None:
        """Called by Ray Serve. A replica of which a loop decodes no more ends: it answers at once, so that gateways,
        which send to the one with the least in hand, would send it everything. Ray Serve starts another.
        """
        try:
            for loop in self._loops:
                loop.check()
        except LoopEndedError:
            asyncio.get_running_loop().call_later(_LAST_WORDS_S, self.end_process)
            raise

    @staticmethod
    def end_process() -> None:
        """At once: a thread that hangs in a denoiser call would keep it for ever."""
        os._exit(1)

    @property
    def _loops(self) -> "list[DecodingLoop]":
        """Of the models that have decoded anything yet."""
        models = [*self._models.values(), *(model for _, model in self._retiring)]
        return [model.loop for model in models if model.is_started]
