"""DecodeReplica: the Ray Serve deployment that holds weights. One decoding loop for each model that it serves.

Ray Serve lets every call in: the loops refuse rows themselves, so that a question after the load never waits behind
work. A model's first call is made before the replica says that it is ready.
"""

import asyncio
import contextlib
import os
import sys
from collections.abc import AsyncIterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

from ray.serve.exceptions import BackPressureError

from dllm_core.checkpoints.bundle import read_bundle
from dllm_core.checkpoints.run_dir import RunDir
from dllm_core.decoding.request import Request
from dllm_core.errors import RequestError
from dllm_core.evaluation.question import AnswerScore, Question
from workflows.serve.config import ServedModels, ServedRun
from workflows.serve.progress import Detail, LoopEndedError, Told

if TYPE_CHECKING:
    from workflows.serve.hosted import HostedModel  # torch, which whoever deploys need not wait for
    from workflows.serve.loop import DecodingLoop

_SWITCH_S = 5e-4  # the event loop waits so long for a decoding thread that computes in Python, 5 ms by default
_LAST_WORDS_S = 0.5  # in which whoever waits is told
_MOST_SCORING = 8  # requests for scores that wait or run; each may take seconds


class DecodeReplica:
    """settings: dtype, max_batch_tokens, max_waiting, threads, use_gpu, compile_seconds.

    Its models come by `reconfigure`, {name: {run, decode}}: a new one is loaded while the others go on decoding.
    """

    def __init__(self, settings: dict[str, Any]) -> None:
        import torch

        torch.set_num_threads(settings["threads"])
        sys.setswitchinterval(_SWITCH_S)
        self._settings = settings
        self._models: dict[str, HostedModel] = {}
        self._runs: dict[str, ServedRun] = {}
        self._scoring = 0
        self._aside = ThreadPoolExecutor(max_workers=1, thread_name_prefix="aside")  # loads and scores

    async def reconfigure(self, models: dict[str, dict[str, Any]]) -> None:
        """Serve these models, and no other."""
        here, runs = asyncio.get_running_loop(), ServedModels.of(models)
        for name, said in runs.items():
            if self._runs.get(name) != said:
                loaded = await here.run_in_executor(self._aside, self._loaded, said)
                old, self._models[name], self._runs[name] = self._models.get(name), loaded, said
                if old is not None:
                    await old.close()
        for name in self._models.keys() - runs.keys():
            del self._runs[name]
            await self._models.pop(name).close()

    def _loaded(self, said: ServedRun) -> "HostedModel":
        from workflows.serve.hosted import HostedModel

        model = HostedModel(read_bundle(RunDir.at(said.run)), self._settings)
        model.warm_up(said.decode)
        return model

    def _model(self, name: str) -> "HostedModel":
        if name not in self._models:  # a gateway may know of it a moment earlier
            raise RequestError("model", "is not served here", name)
        return self._models[name]

    async def decode(
        self, name: str, requests: Sequence[Request], detail: Detail, end_id: int | None = None
    ) -> AsyncIterator[Told]:
        """Decode rows together, telling their progress: one message a tick, for all of them."""
        model = self._model(name)
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
        self, name: str, questions: Sequence[Question], draws: int, target_error: float | None, seed: int
    ) -> tuple[list[AnswerScore], str]:
        """Likelihoods, beside the decoding."""
        model, here = self._model(name), asyncio.get_running_loop()
        if self._scoring >= _MOST_SCORING:
            raise BackPressureError(num_queued_requests=self._scoring, max_queued_requests=_MOST_SCORING)
        self._scoring += 1
        try:
            return await here.run_in_executor(self._aside, model.score, questions, draws, target_error, seed)
        finally:
            self._scoring -= 1

    async def load(self) -> dict[str, Any]:
        """Rows running and waiting, and the denoiser calls they are expected to take; raises if a loop is dead."""
        await self.check_health()
        loops = self._loops
        return {
            "running": sum(loop.load["running"] for loop in loops),
            "waiting": sum(loop.load["waiting"] for loop in loops),
            "work": sum(loop.work for loop in loops),
        }

    async def record_autoscaling_stats(self) -> dict[str, float]:
        """Called by Ray Serve: what `scaling.ByWork` scales by."""
        loops = self._loops
        busy = min(1.0, sum(loop.busy_share() for loop in loops))
        return {"work": float(sum(loop.work for loop in loops)), "busy": busy}

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
        return [model.loop for model in self._models.values() if model.is_started]
