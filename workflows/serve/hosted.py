"""HostedModel: a bundle in memory with its decoding loop, its compiler of constraints, and its scores. Needs torch."""

import asyncio
from collections.abc import Callable, Sequence
from typing import Any

import torch

from dllm_core.checkpoints.bundle import ModelBundle
from dllm_core.decoding.automaton import TokenAutomaton
from dllm_core.decoding.config import DecodeConfig
from dllm_core.decoding.engine import Engine
from dllm_core.decoding.request import Request
from dllm_core.decoding.unmask import LowConfidencePolicy
from dllm_core.errors import ConfigError, RequestError
from dllm_core.evaluation.answers import AnswerScorer
from dllm_core.evaluation.estimators import estimator_of_bundle
from dllm_core.evaluation.question import AnswerScore, Question
from dllm_core.model.denoiser import Denoiser
from workflows.serve.compiling import Compiler
from workflows.serve.loop import DecodingLoop


class GivenUpError(Exception):
    """Nobody waits for the answer any more."""


class _WhileAsked:
    """A denoiser for as long as somebody waits for what is made of its calls."""

    def __init__(self, denoiser: Denoiser, is_given_up: Callable[[], bool]) -> None:
        self.config, self.device = denoiser.config, denoiser.device
        self._denoiser, self._is_given_up = denoiser, is_given_up

    def __call__(self, *args: Any, **options: Any) -> torch.Tensor:
        """Its logits."""
        if self._is_given_up():
            raise GivenUpError
        logits: torch.Tensor = self._denoiser(*args, **options)
        return logits


class HostedModel:
    """A bundle with its loop, its compiler and its scores."""

    def __init__(self, bundle: ModelBundle, settings: dict[str, Any]) -> None:
        self.bundle, self._settings = bundle, settings
        device = "cuda" if settings["use_gpu"] else "cpu"
        options = {"dtype": settings["dtype"], "compiles": settings["use_gpu"]}
        self.engine = Engine(bundle, device, settings["max_batch_tokens"], **options)
        self._device = device
        self._loop: DecodingLoop | None = None
        self._compiler: Compiler | None = None
        self._turn, self._num_preparing = asyncio.Lock(), 0

    def warm_up(self, decode: DecodeConfig) -> None:
        """One small request to its end: what a first call sets up is set up, and a model that fails fails now.

        Where steps are recorded, some of two rows and of one: what they compile would make a client wait for a minute.
        """
        most = min(decode.max_tokens, decode.block_length, self.engine.context_length - 1)  # a block shows it all
        config = decode.model_copy(update={"max_tokens": most})
        [answer] = self.engine.generate([Request((self.engine.eos_id,), config)])
        if answer.finish_reason == "error":
            raise ConfigError("model", "its output is no number", self.bundle.folder.name)
        if self.engine.denoiser.recorder is not None and not self.engine.is_ancestral:
            steps = {"policy": LowConfidencePolicy(), "steps_per_block": min(8, config.block_length), "cache": "dual"}
            for number in (2, 1):  # what one takes is less, and has room
                self.engine.generate([Request((self.engine.eos_id,), config.model_copy(update=steps))] * number)

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

    @property
    def is_busy(self) -> bool:
        """Whether anything that was asked of it is yet to be decoded."""
        return self._num_preparing > 0 or (self._loop is not None and any(self._loop.load.values()))

    async def prepare(self, request: Request) -> None:
        """Compile its constraint, where that was not done, while others are decoded; once for all who wait for it."""
        if request.constraint is None or request.constraint in self.engine.automata:
            return
        self._num_preparing += 1
        try:
            async with self._turn:
                if request.constraint not in self.engine.automata:
                    self.engine.automata.put(request.constraint, await self._compiled(request.constraint))
        finally:
            self._num_preparing -= 1

    async def _compiled(self, regex: str) -> TokenAutomaton:
        if self._compiler is None:
            spelled = self.bundle.tokenizer().token_bytes()
            if spelled is None:
                raise RequestError("constraint", "needs a byte-level tokenizer, which the model has not")
            self._compiler = Compiler(spelled, self._settings["compile_seconds"])
        return await self._compiler.compile(regex)

    def score(
        self,
        questions: Sequence[Question],
        draws: int,
        target_error: float | None,
        seed: int,
        is_given_up: Callable[[], bool],
    ) -> tuple[list[AnswerScore], str]:
        """One for each question, in order, and the estimator's name. GivenUpError: nobody waits any more."""
        estimator = estimator_of_bundle(self.bundle, self._device)
        if estimator is None:
            raise RequestError("model", "has no likelihood: it is a masked language model")
        scorer = AnswerScorer(
            _WhileAsked(self.engine.denoiser, is_given_up),
            estimator,
            seed=seed,
            draws=draws,
            target_error=target_error,
            max_batch_tokens=self._settings["max_batch_tokens"],
        )
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
