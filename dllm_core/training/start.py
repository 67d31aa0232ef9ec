"""Section `start`: whose weights a training begins with. Torch-free, so that a recipe is checked in no time."""

from typing import Any, Literal

from pydantic import Field, field_validator

from dllm_core.config.base import Frozen
from dllm_core.model.config import ModelConfig

Target = Literal["qkv", "out", "gate_up", "down"]
_SHA256 = "^[0-9a-f]{64}$"


class MaskNoiseConfig(Frozen):
    """Section `start.mask_noise`: noise on what masks read as, which falls linearly to 0 over the first `steps`."""

    std: float = Field(1.0, gt=0, description="in the units of what the first block reads")
    steps: int = Field(100, ge=1, le=1 << 40)


class LoraConfig(Frozen):
    """Section `start.lora`: small matrices are trained beside frozen ones, W + alpha/rank B A. arXiv:2106.09685.

    targets: which matrices of each block: queries, keys and values; attention's output; the feed-forward part's two.
    """

    rank: int = Field(8, ge=1)
    alpha: float = Field(16.0, gt=0)
    targets: tuple[Target, ...] = Field(("qkv", "out", "gate_up", "down"), min_length=1)

    @field_validator("targets")
    @classmethod
    def _each_once(cls, targets: tuple[str, ...]) -> tuple[str, ...]:
        if len(set(targets)) < len(targets):
            raise ValueError("names a matrix twice")
        return targets

    def num_parameters(self, model: ModelConfig) -> int:
        """Weights of all adapters, which is what trains."""
        attention = model.heads * model.head_dim
        total = 0
        for layer in range(model.layers):
            width = model.ffn_dim
            if model.experts is not None and model.has_experts(layer):
                width = model.experts.shared_ffn_dim
            sizes = {"qkv": model.dim + model.qkv_dim, "out": attention + model.dim}
            if width:
                sizes |= {"gate_up": model.dim + 2 * width, "down": width + model.dim}
            total += self.rank * sum(sizes.get(name, 0) for name in self.targets)
        return total


class StartConfig(Frozen):
    """At step 0 the weights are those of another run's bundle, imported or our own; later checkpoints win.

    The digests are filled in when a recipe is read: they say what the run began with, wherever that lies by now.
    """

    run: str = Field(min_length=1, description="a folder below runs/ with a bundle")
    weights_sha256: str | None = Field(None, pattern=_SHA256, description="of the bundle's weights; filled in")
    tokenizer_sha256: str | None = Field(None, pattern=_SHA256, description="of the bundle's tokenizer; filled in")

    mask_noise: MaskNoiseConfig | None = None
    lora: LoraConfig | None = None

    @property
    def identity(self) -> dict[str, Any]:
        """What a fingerprint holds: the weights, not where they are. The tokenizer stands in the corpus's."""
        said = self.model_dump(mode="json", include={"mask_noise", "lora"}, exclude_none=True)
        return {"weights": self.weights_sha256, **said}
