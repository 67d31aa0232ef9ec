"""The denoiser x_theta(xt[, t]) -> logits over x0: one transformer for every objective of the field.

`pattern.py` (who may see whom) and `config.py` (sizes, parameter and FLOP counts), both without torch -> `layers.py`
-> `visibility.py` -> `cache.py` (keys and values that no later call changes) -> `attention.py` -> `conditioning.py` ->
`denoiser.py` -> `pretrained.py`. Laws: a row's logits do not depend on its neighbours in the batch, nor on its padding;
an isolated document's not on the others of its row; behind kept keys they are what a whole forward gives.
"""

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from dllm_core.model.denoiser import Denoiser


def load_denoiser(path: str | Path) -> "Denoiser":
    """The denoiser in a bundle's folder, in evaluation mode: input_ids [B L] -> logits [B L V].

    Raises CheckpointError if a file is missing, damaged or of another shape.
    """
    from dllm_core.model.pretrained import read_denoiser  # torch costs 1.4 s; `dllm show` must not pay it

    return read_denoiser(Path(path))
