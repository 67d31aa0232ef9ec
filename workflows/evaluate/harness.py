"""The model `dllm` of lm-evaluation-harness: bundles on its benchmarks. The one file that imports `lm_eval`.

dllm-lm-eval --model dllm --model_args bundle=RUN,draws=64 --tasks arc_easy

Conventions: special tokens are never spelled by text, and nothing stands before a context, as at the endpoint; a row
ends with its answer, so that a diffusion model is told how long that is. A log-likelihood is exact or a lower bound
in the mean over draws (`estimators.py`), with a Monte-Carlo error; perplexities are then upper bounds.
"""

import json
import logging
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from typing import Any

import torch
from pydantic import Field

from dllm_core.checkpoints.bundle import read_bundle
from dllm_core.checkpoints.bundle_manifest import FOLDER
from dllm_core.checkpoints.run_dir import RunDir
from dllm_core.config.base import Frozen
from dllm_core.config.overrides import apply_overrides
from dllm_core.decoding.config import DecodeConfig, no_decoder
from dllm_core.decoding.engine import Engine
from dllm_core.decoding.request import Request
from dllm_core.decoding.text import TextStream
from dllm_core.errors import ConfigError, RequestError
from dllm_core.evaluation.answers import AnswerScorer
from dllm_core.evaluation.estimators import estimator_of_bundle
from dllm_core.evaluation.question import AnswerScore, Question
from dllm_core.objective.config import AutoregressiveConfig

try:
    from lm_eval.__main__ import cli_evaluate as cli_evaluate
    from lm_eval.api.model import LM
    from lm_eval.api.registry import register_model
    from lm_eval.models.utils import normalize_gen_kwargs
    from tqdm import tqdm
except ModuleNotFoundError as error:
    if str(error.name).partition(".")[0] != "lm_eval":
        raise
    raise ConfigError("lm_eval", "is not installed", remedy="pip install 'dllm[harness]'") from None

Stops = tuple[str, ...]
_logger = logging.getLogger(__name__)
_KNOWN = {"until", "do_sample", "temperature", "top_p", "max_gen_toks"}


class HarnessConfig(Frozen):
    """`--model_args`, beside `decode.*`, which overrides the bundle's section `decode`."""

    bundle: str = Field("", description="a run's folder or its bundle, on disk or on S3")
    seed: int = Field(0, ge=0)
    draws: int = Field(64, ge=1, le=1 << 20, description="noises drawn for each answer; at most, with target_error")
    target_error: float | None = Field(None, gt=0, description="nats of Monte-Carlo error at which its draws end")
    overlap: int = Field(1, ge=0, description="tokens shown again, at least, at each window of a long text")
    max_batch_tokens: int = Field(4096, ge=16, description="token positions in a forward, which changes no result")
    device: str | None = Field(None, description="cuda where there is one, else cpu, whatever cuda is asked for")


@register_model("dllm")
class DllmModel(LM):  # type: ignore[misc]
    """A bundle as `lm_eval.simple_evaluate(model=DllmModel(bundle="dllm-runs/runs/NAME"), ...)` takes it.

    scores: the AnswerScore of every scored request, by (method, *its texts). Raises ConfigError for arguments that
    mean nothing and for a model without a likelihood, CheckpointError where there is no bundle.
    """

    def __init__(self, *, batch_size: Any = None, max_batch_size: Any = None, **model_args: Any) -> None:
        super().__init__()
        if str(batch_size or 1) != "1" or max_batch_size is not None:
            _logger.warning("batch sizes are not used: the model's max_batch_tokens bounds a forward")
        decode = {name: model_args.pop(name) for name in list(model_args) if name.startswith("decode.")}
        self._config = config = HarnessConfig.checked(model_args, "model_args")
        if not config.bundle:
            raise ConfigError("model_args.bundle", "missing", remedy="--model_args bundle=dllm-runs/runs/NAME")
        self._device = _device(config.device)
        self._run = RunDir.at(_run_of(config.bundle))
        self._bundle = read_bundle(self._run)
        estimator = estimator_of_bundle(self._bundle, str(self._device))
        if estimator is None:
            raise ConfigError("objective.type", "such a model has no likelihood", self._bundle.manifest.objective.type)
        self._context_length = self._bundle.config.context_length
        if config.overlap >= self._context_length:
            problem = f"must be below the context of {self._context_length} tokens"
            raise ConfigError("model_args.overlap", problem, config.overlap)
        overrides = [f"{name}={json.dumps(value)}" for name, value in decode.items()]
        section = apply_overrides({"decode": self._bundle.manifest.decode}, overrides)["decode"]
        self._decode = DecodeConfig.checked(section, "decode")
        manifest = self._bundle.manifest
        self._no_decoder = no_decoder(manifest.objective, manifest.process, self._bundle.config.model)
        self._tokenizer, self._denoiser = self._bundle.tokenizer(), self._bundle.denoiser(str(self._device))
        self._estimator = estimator
        self._scorer = AnswerScorer(
            self._denoiser,
            estimator,
            seed=config.seed,
            draws=config.draws,
            target_error=config.target_error,
            overlap=config.overlap,
            max_batch_tokens=config.max_batch_tokens,
        )
        self.scores: dict[tuple[str, ...], AnswerScore] = {}
        self._num_shortened: Counter[str] = Counter()

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """(log p(continuation | context), is_greedy) of each request.

        A context's trailing spaces belong to the continuation. Both are encoded as one text, as documents are; where a
        token would stand across the border they are encoded apart, so that the continuation is scored whole. What
        does not fit of a context is cut off at its beginning.

        is_greedy: decoding at temperature 0 gives exactly these tokens: token by token for an autoregressive model;
        else with the section `decode` on a canvas of the continuation's length. False where there is no decoder for
        the model, or the canvas does not fit: `get_model_info` says so.
        """
        questions = [self._question(*request.args) for request in requests]

        def results(scores: dict[Question, AnswerScore]) -> dict[Question, tuple[float, bool]]:
            is_greedy = self._greedy(list(scores))
            return {question: (-score.nats, is_greedy[question]) for question, score in scores.items()}

        return self._scored("loglikelihood", requests, questions, results, disable_tqdm)

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        """Log-likelihood of each whole text, with nothing before it and no end token behind it.

        A longer text than the context is cut into windows; see `dllm_core.evaluation.answers.windows`.
        """
        questions = [Question((), tuple(self._tokenizer.encode(request.args[0]))) for request in requests]

        def results(scores: dict[Question, AnswerScore]) -> dict[Question, float]:
            return {question: -score.nats for question, score in scores.items()}

        return self._scored("loglikelihood_rolling", requests, questions, results, disable_tqdm)

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        """The text decoded behind each context, up to the first of its `until` strings.

        Greedy unless generation_kwargs say do_sample or a temperature; until, max_gen_toks and top_p count too, all
        else is as the section `decode` says, and what would change more is refused. max_gen_toks is the canvas; where
        it does not fit, a context keeps its last half of the positions, or all it has if that is less. Of equal
        requests that sample, the k-th has the k-th text. Raises ConfigError where there is no decoder, RequestError.
        """
        seen: Counter[tuple[str, str]] = Counter()
        wanted = []
        for request in requests:
            context, arguments = request.args
            content = (context, json.dumps(arguments, sort_keys=True, default=str))
            wanted.append(self._decoding(context, arguments, seen[content]))
            seen[content] += 1
        args = defaultdict(list)
        for request, one in zip(requests, wanted, strict=True):
            args[one].append(request.args)
        texts: dict[tuple[Request, Stops], str] = {}
        with tqdm(total=len(requests), desc="generate_until", disable=disable_tqdm) as bar:
            for one, text in self._decoded(sorted(args, key=lambda one: -one[0].length)):
                texts[one] = text
                for own in args[one]:
                    self.cache_hook.add_partial("generate_until", own, text)
                bar.update(len(args[one]))
        return [texts[one] for one in wanted]

    def get_model_info(self) -> dict[str, Any]:
        """What `lm_eval` adds to the `config` of its results: how figures were got, and how sure they are."""
        kinds = sorted({kind for kind, *_ in self.scores})
        return {
            "dllm": {
                "run": self._run.url,
                "step": self._bundle.manifest.lineage.step,
                "estimator": self._estimator.name,
                "is_greedy": self._greedy_by,
                **self._config.model_dump(mode="json", exclude={"bundle", "device"}),
                "decode": self._decode.model_dump(mode="json"),
                "shortened": dict(self._num_shortened),
                **{kind: _summary([s for (own, *_), s in self.scores.items() if own == kind]) for kind in kinds},
            }
        }

    def _question(self, context: str, continuation: str) -> Question:
        stripped = context.rstrip()
        continuation = context[len(stripped) :] + continuation
        given, whole = (self._tokenizer.encode(text) for text in (stripped, stripped + continuation))
        answer = whole[len(given) :] if whole[: len(given)] == given else self._tokenizer.encode_behind(continuation)
        self._num_shortened["contexts"] += bool(given) and len(given) + len(answer) > self._context_length
        return Question(tuple(given), tuple(answer))

    def _scored(
        self,
        kind: str,
        requests: list[Any],
        questions: list[Question],
        results_of: Callable[[dict[Question, AnswerScore]], dict[Question, Any]],
        disable_tqdm: bool,
    ) -> list[Any]:
        args, results = defaultdict(list), {}
        for request, question in zip(requests, questions, strict=True):
            args[question].append(request.args)
        with tqdm(total=len(requests), desc=kind, disable=disable_tqdm) as bar:
            for scores in self._scorer.score(questions):
                results.update(results_of(scores))
                for question, score in scores.items():
                    for own in args[question]:
                        self.scores[kind, *own] = score
                        self.cache_hook.add_partial(kind, own, results[question])
                    bar.update(len(args[question]))
        return [results[question] for question in questions]

    @property
    def _greedy_by(self) -> str | None:
        """What decides is_greedy; None: nothing does."""
        if isinstance(self._bundle.manifest.objective, AutoregressiveConfig):
            return "argmax"
        return None if self._no_decoder else "decode"

    def _greedy(self, questions: list[Question]) -> dict[Question, bool]:
        if self._greedy_by == "argmax":
            return self._scorer.are_likeliest(questions)
        if self._greedy_by is None:
            return dict.fromkeys(questions, False)
        canvases = {question: self._canvas(question) for question in questions}
        asked = list(dict.fromkeys(canvas for canvas in canvases.values() if canvas is not None))
        answers = dict(zip(asked, self._engine.generate(asked), strict=True))
        return {
            question: not question.answer or (canvas is not None and tuple(answers[canvas].tokens) == question.answer)
            for question, canvas in canvases.items()
        }

    def _canvas(self, question: Question) -> Request | None:
        """An open canvas of the answer's length behind as much of the context as fits; None: it does not fit itself."""
        length = len(question.answer)
        room = self._engine.context_length - length
        if not length or room < 0:
            return None
        config = self._decode.model_copy(update={"max_tokens": length, "temperature": 0.0})
        return Request(question.context[max(0, len(question.context) - room) :], config)

    @cached_property
    def _engine(self) -> Engine:
        budget = max(self._config.max_batch_tokens, self._context_length)  # below it a row would be cut
        return Engine(self._bundle, max_batch_tokens=budget, denoiser=self._denoiser)

    def _decoding(self, context: str, arguments: dict[str, Any], number: int) -> tuple[Request, Stops]:
        """A request to the engine; requests of equal content have one seed each if they sample."""
        told = normalize_gen_kwargs(arguments, self._decode.max_tokens)
        for name, value in told.items():
            if name not in _KNOWN and (name, value) != ("num_beams", 1):
                remedy = f"known: {', '.join(sorted(_KNOWN))}"
                raise RequestError(f"generation_kwargs.{name}", "is unknown", value, remedy)
        prompt = self._tokenizer.encode(context)
        room = self._engine.context_length
        length = min(told["max_gen_toks"], room - min(len(prompt), room // 2))
        self._num_shortened["canvases"] += length < told["max_gen_toks"]
        self._num_shortened["prompts"] += len(prompt) > room - length
        prompt = prompt[max(0, len(prompt) - (room - length)) :]
        changed = {
            "max_tokens": length,
            "temperature": told.get("temperature", 1.0) if told["do_sample"] else 0.0,
            "top_p": told.get("top_p", self._decode.top_p),
        }
        config = DecodeConfig.checked({**self._decode.model_dump(), **changed}, "generation_kwargs")
        seed = Question(tuple(prompt), ()).digest(self._config.seed, number if config.temperature > 0 else 0)
        stops = tuple(dict.fromkeys(stop for stop in told["until"] if stop))
        return Request(tuple(prompt), config, seed=seed), stops

    def _decoded(self, wanted: Sequence[tuple[Request, Stops]]) -> Iterator[tuple[tuple[Request, Stops], str]]:
        """Texts as they end: a row leaves the batch once a stop string in it is settled."""
        engine = self._engine
        with engine.left_empty():
            rows = {engine.add(one[0]): (one, TextStream(self._tokenizer, one[1])) for one in wanted}
            while updates := engine.step():
                for update in updates:
                    one, stream = rows[update.row]
                    is_last = update.state.finish_reason is not None
                    stream.push(update.state.answer(engine.eos_id), last=is_last)
                    if is_last or stream.stopped:
                        engine.cancel(update.row)
                        yield one, stream.text


def _run_of(path: str) -> str:
    """The run of a bundle's folder; a run's own folder as it is."""
    run, _, name = path.rstrip("/").rpartition("/")
    return (run or ".") if name == FOLDER and not run.endswith("runs") else path


def _device(name: str | None) -> torch.device:
    """`lm_eval` says cuda:0 for a user who has said nothing, and takes it for a wish."""
    has_cuda = torch.cuda.is_available()
    if name is None or (name.startswith("cuda") and not has_cuda):
        name = "cuda" if has_cuda else "cpu"
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).partition(".")[0]
        raise ConfigError("model_args.device", f"cannot be used ({reason})", name) from None
    return device


def _summary(scores: list[AnswerScore]) -> dict[str, Any]:
    """Monte-Carlo errors of the scored texts, nats each: root mean square and largest; None after one draw."""
    errors = [score.error for score in scores]
    known = [error for error in errors if error is not None]
    is_known = len(known) == len(errors)
    return {
        "texts": len(scores),
        "draws": sum(score.draws for score in scores),
        "error": (sum(error**2 for error in known) / len(known)) ** 0.5 if is_known else None,
        "largest_error": max(known) if is_known else None,
    }
