"""The denoiser x_theta(xt) -> logits over x0: a bidirectional transformer.

`config.py` (sizes, parameter and FLOP counts; no torch) -> `attention.py` -> `layers.py` -> `denoiser.py` -> `pretrained.py`.
"""

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from dllm_core.model.denoiser import Denoiser


def load_denoiser(path: str | Path) -> "Denoiser":
    """The denoiser in a bundle's folder, in evaluation mode: `load_denoiser(path)(input_ids [B L]) -> logits [B L V]`.

    Raises CheckpointError if a file is missing, damaged or of another shape.
    """
    from dllm_core.model.pretrained import read_denoiser  # torch costs 1.4 s; `dllm show` must not pay it

    return read_denoiser(Path(path))
