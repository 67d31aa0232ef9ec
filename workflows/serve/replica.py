"""DecodeReplica: the Ray Serve deployment that holds weights. One decoding loop for each model that it serves.

Ray Serve lets every call in: the loops refuse rows themselves, so that a question after the load never waits behind
work. A model's first call is made before the replica says that it is ready.
"""

import asyncio
import contextlib
import sys
from collections.abc import AsyncIterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from ray.serve.exceptions import BackPressureError

from dllm_core.checkpoints.bundle import ModelBundle, read_bundle
from dllm_core.checkpoints.run_dir import RunDir
from dllm_core.decoding.config import DecodeConfig
from dllm_core.decoding.engine import Engine
from dllm_core.decoding.request import Request
from dllm_core.errors import ConfigError, RequestError
from dllm_core.evaluation.answers import AnswerScorer
from dllm_core.evaluation.estimators import estimator_of_bundle
from dllm_core.evaluation.question import AnswerScore, Question
from workflows.serve.compiling import Compiler
from workflows.serve.loop import DecodingLoop
from workflows.serve.progress import Detail, Told

_SWITCH_S = 5e-4  # the event loop waits so long for a decoding thread that computes in Python, 5 ms by default
_MOST_SCORING = 8  # requests for scores that wait or run; each may take seconds


class _Model:
    """A bundle with its loop, its compiler and its scores."""

    def __init__(self, bundle: ModelBundle, settings: dict[str, Any]) -> None:
        self.bundle, self._settings = bundle, settings
        device = "cuda" if settings["use_gpu"] else "cpu"
        self.engine = Engine(bundle, device, settings["max_batch_tokens"], dtype=settings["dtype"])
        self._device = device
        self._loop: DecodingLoop | None = None
        self._compiler: Compiler | None = None

    def warm_up(self, decode: DecodeConfig) -> None:
        """One small request to its end: what a first call sets up is set up, and a model that fails fails now."""
        most = min(decode.max_tokens, decode.block_length, self.engine.context_length - 1)  # a block shows it all
        config = decode.model_copy(update={"max_tokens": most})
        [answer] = self.engine.generate([Request((self.engine.eos_id,), config)])
        if answer.finish_reason == "error":
            raise ConfigError("model", "its output is no number", self.bundle.folder.name)

    @property
    def loop(self) -> DecodingLoop:
        """Made within the event loop, which the constructor has none of."""
        if self._loop is None:
            self._loop = DecodingLoop(self.engine, self._settings["max_waiting"])
        return self._loop

    @property
    def is_started(self) -> bool:
        """Whether anything was decoded yet."""
        return self._loop is not None

    async def prepare(self, request: Request) -> None:
        """Compile its constraint, where that was not done, while others are decoded."""
        if request.constraint is None or request.constraint in self.engine.automata:
            return
        if self._compiler is None:
            spelled = self.bundle.tokenizer().token_bytes()
            if spelled is None:
                raise RequestError("constraint", "needs a byte-level tokenizer, which the model has not")
            self._compiler = Compiler(spelled, self._settings["compile_seconds"])
        self.engine.automata.put(request.constraint, await self._compiler.compile(request.constraint))

    def score(
        self, questions: Sequence[Question], draws: int, target_error: float | None, seed: int
    ) -> tuple[list[AnswerScore], str]:
        """One for each question, in order, and the estimator's name."""
        estimator = estimator_of_bundle(self.bundle, self._device)
        if estimator is None:
            raise RequestError("model", "has no likelihood: it is a masked language model")
        scorer = AnswerScorer(
            self.engine.denoiser, estimator, seed=seed, draws=draws, target_error=target_error,
            max_batch_tokens=self._settings["max_batch_tokens"],
        )  # fmt: skip
        found: dict[Question, AnswerScore] = {}
        for some in scorer.score(questions):
            found.update(some)
        return [found[question] for question in questions], estimator.name

    async def close(self) -> None:
        """Free what it holds."""
        if self._loop is not None:
            await self._loop.close()
        if self._compiler is not None:
            self._compiler.close()


class DecodeReplica:
    """settings: dtype, max_batch_tokens, max_waiting, threads, use_gpu, compile_seconds.

    Its models come by `reconfigure`, {name: {run, decode}}: a new one is loaded while the others go on decoding.
    """

    def __init__(self, settings: dict[str, Any]) -> None:
        import torch

        torch.set_num_threads(settings["threads"])
        sys.setswitchinterval(_SWITCH_S)
        self._settings = settings
        self._models: dict[str, _Model] = {}
        self._runs: dict[str, dict[str, Any]] = {}
        self._scoring = 0
        self._aside = ThreadPoolExecutor(max_workers=1, thread_name_prefix="aside")  # loads and scores

    async def reconfigure(self, models: dict[str, dict[str, Any]]) -> None:
        """Serve these models, and no other."""
        here = asyncio.get_running_loop()
        for name, said in models.items():
            if self._runs.get(name) != said:
                loaded = await here.run_in_executor(self._aside, self._loaded, said)
                old, self._models[name], self._runs[name] = self._models.get(name), loaded, said
                if old is not None:
                    await old.close()
        for name in self._models.keys() - models.keys():
            del self._runs[name]
            await self._models.pop(name).close()

    def _loaded(self, said: dict[str, Any]) -> _Model:
        model = _Model(read_bundle(RunDir.at(said["run"])), self._settings)
        model.warm_up(DecodeConfig.checked(said["decode"]))
        return model

    def _model(self, name: str) -> _Model:
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
        async with contextlib.aclosing(model.loop.stream(requests, detail, end_id)) as progress:
            async for told in progress:
                yield told

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
        """Called by Ray Serve."""
        for loop in self._loops:
            loop.check()

    @property
    def _loops(self) -> list[DecodingLoop]:
        """Of the models that have decoded anything yet."""
        return [model.loop for model in self._models.values() if model.is_started]
