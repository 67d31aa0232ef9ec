"""Section `evaluate`."""

from pydantic import Field

from dllm_core.config.base import Frozen


class EvaluateConfig(Frozen):
    """Which held-out rows are scored, and how often each."""

    rows: int = Field(1024, ge=2, description="held-out rows at most, evenly spaced")
    draws: int = Field(8, ge=1, le=1 << 20, description="noises drawn for each row; at most, with target_error")
    target_error: float | None = Field(None, gt=0, description="nats/token of Monte-Carlo error at which draws end")
    batch_rows: int = Field(32, ge=1)
    prompts: int = Field(16, ge=0, description="held-out rows whose first quarter is completed, for tokens per call")
