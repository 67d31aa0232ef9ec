"""Section `evaluate`: what is measured of a bundle, and on how much. Torch-free. A measure of 0 rows is left out."""

from typing import Annotated, Literal

from pydantic import Field

from dllm_core.config.base import Frozen
from dllm_core.evaluation.tasks.section import AnyTask

Side = Literal["both", "left", "right"]


class CalibrationConfig(Frozen):
    """Of the tokens that a denoiser is so sure of, how many are right? One call a rate and row."""

    rows: int = Field(256, ge=0, description="held-out rows at most; 0: not measured")
    rates: tuple[Annotated[float, Field(gt=0, le=1)], ...] = Field(
        (0.2, 0.5, 0.8), min_length=1, description="shares of a row's tokens that are hidden"
    )


class InfillConfig(Frozen):
    """Holes in held-out rows, filled as `decode` says; one a row and length, the same from every side."""

    rows: int = Field(64, ge=0, description="held-out rows at most; 0: not measured")
    lengths: tuple[Annotated[int, Field(ge=1)], ...] = Field((1, 4, 16), min_length=1, description="tokens a hole")
    sides: tuple[Side, ...] = Field(("both", "left"), min_length=1, description="which context is shown")


class NGramScorerConfig(Frozen):
    """An n-gram model of the corpus's own training rows."""

    type: Literal["ngram"] = "ngram"
    order: int = Field(4, ge=1, le=16)
    rows: int = Field(4096, ge=1, description="training rows at most, evenly spaced")


class AutoregressiveScorerConfig(Frozen):
    """An autoregressive run over the same tokenizer."""

    type: Literal["autoregressive"] = "autoregressive"
    run: str = Field(min_length=1, description="its folder, `<storage.root>/runs/<name>`")


AnyScorer = Annotated[NGramScorerConfig | AutoregressiveScorerConfig, Field(discriminator="type")]


class SamplesConfig(Frozen):
    """Generative perplexity of completions, as `decode` says but for the temperature, beside that of held-out text."""

    rows: int = Field(0, ge=0, description="held-out rows at most whose beginning is completed; 0: not measured")
    temperature: float = Field(1.0, ge=0, le=10, description="greedy text says little of a model's law")
    scorer: AnyScorer = NGramScorerConfig()


class EvaluateConfig(Frozen):
    """Which held-out rows are scored, how often each, and what else is measured."""

    rows: int = Field(1024, ge=2, description="held-out rows at most, evenly spaced")
    draws: int = Field(8, ge=1, le=1 << 20, description="noises drawn for each row; at most, with target_error")
    target_error: float | None = Field(None, gt=0, description="nats/token of Monte-Carlo error at which draws end")
    batch_rows: int = Field(32, ge=1)
    prompts: int = Field(
        16, ge=0, description="held-out rows whose prompt, or of plain text first quarter, is completed"
    )
    calibration: CalibrationConfig = CalibrationConfig()
    infill: InfillConfig = InfillConfig()
    samples: SamplesConfig = SamplesConfig()
    tasks: tuple[AnyTask, ...] = Field((), description="whose test problems are answered; a corpus is `dllm task`'s")
    problems: int = Field(200, ge=1, description="test problems of each task")
