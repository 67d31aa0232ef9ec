"""The mean of several checkpoints' weights, tensor by tensor: one model's tensor in memory, whatever their number.

Late points of one run lie around a better one (stochastic weight averaging, arXiv:1803.05407), as those of an EMA do.
"""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path

import torch
from torch import Tensor

from dllm_core.errors import CheckpointError
from dllm_core.model.tensor_file import Header, read_header, read_into, write_file


def average_weights(files: Sequence[Path], target: Path) -> None:
    """Write the mean of safetensors files with the same names and shapes, in fp32; sums are in fp64.

    Raises CheckpointError for files that do not match.
    """
    headers = [read_header(file) for file in files]
    shapes = _shapes(headers[0])
    for file, header in zip(files, headers, strict=True):
        if _shapes(header) != shapes:
            raise CheckpointError(
                str(file), f"holds other tensors than {files[0]}", remedy="average one run's checkpoints"
            )
    mean = Header.of({name: (torch.float32, shape) for name, shape in shapes.items()}, {})
    with ExitStack() as stack:
        opened = [(stack.enter_context(file.open("rb")), header) for file, header in zip(files, headers, strict=True)]

        def means() -> Iterator[Tensor]:
            for name, entry in mean.entries.items():
                total, part = torch.zeros(2, *entry.shape, dtype=torch.float64)
                for file, header in opened:
                    read_into(file, header, name, part)
                    total += part
                yield total / len(opened)

        write_file(target, mean, means())


def _shapes(header: Header) -> dict[str, tuple[int, ...]]:
    return {name: entry.shape for name, entry in header.entries.items()}
