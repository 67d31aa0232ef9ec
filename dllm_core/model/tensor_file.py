"""safetensors files, one tensor at a time: 8 bytes of length, a JSON header, the tensors' bytes end to end.

Bytes go from a file straight to where they belong in a tensor. A mapped file would hold its pages beside the copies
that fused tensors are made of, twice the weights at the peak; and a header that is kept as it stands is written again
bit for bit.
"""

import json
import math
from abc import abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from dllm_core.errors import CheckpointError
from dllm_core.storage.progress import progressed

_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
_LONGEST_HEADER = 100_000_000  # the format's own bound


@dataclass(frozen=True)
class Entry:
    """A tensor of a file: where its bytes are behind the header, and what they mean."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    stop: int


@dataclass(frozen=True)
class Header:
    """What a file says of itself, as it stands there and as it was understood."""

    text: str
    entries: dict[str, Entry]

    @classmethod
    def parsed(cls, text: str, place: str) -> "Header":
        """Raises CheckpointError for what is no header, for unknown types and for bytes that overlap or are missing."""
        try:
            values: dict[str, Any] = json.loads(text)
            values.pop("__metadata__", None)
            entries = {name: _entry(name, value) for name, value in values.items()}
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise CheckpointError(place, f"is no safetensors file ({error!r})") from error
        end = 0
        for entry in sorted(entries.values(), key=lambda entry: (entry.start, entry.stop)):
            if entry.start != end or entry.stop - entry.start != math.prod(entry.shape) * entry.dtype.itemsize:
                raise CheckpointError(place, "its header does not fit its tensors", remedy="fetch the file again")
            end = entry.stop
        return cls(text, dict(sorted(entries.items(), key=lambda item: item[1].start)))

    @classmethod
    def of(cls, specs: Mapping[str, tuple[torch.dtype, tuple[int, ...]]], metadata: dict[str, str]) -> "Header":
        """A header for these tensors, the widest types first, so that each is aligned."""
        values: dict[str, Any] = {"__metadata__": metadata} if metadata else {}
        end = 0
        for name, (dtype, shape) in sorted(specs.items(), key=lambda item: (-item[1][0].itemsize, item[0])):
            start, end = end, end + math.prod(shape) * dtype.itemsize
            values[name] = {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": [start, end]}
        text = json.dumps(values, separators=(",", ":"), ensure_ascii=False)
        return cls.parsed(text + " " * (-len(text.encode()) % 8), "header")

    @property
    def size(self) -> int:
        """Bytes of all tensors."""
        return max((entry.stop for entry in self.entries.values()), default=0)

    @property
    def metadata(self) -> dict[str, str]:
        """Free text of the file's writer."""
        found: dict[str, str] = json.loads(self.text).get("__metadata__") or {}
        return found

    @property
    def data_start(self) -> int:
        """The first byte of the tensors in the file."""
        return 8 + len(self.text.encode())


def _entry(name: str, value: dict[str, Any]) -> Entry:
    start, stop = value["data_offsets"]
    if value["dtype"] not in _DTYPES:
        raise ValueError(f"{name} is of type {value['dtype']}, known are {', '.join(_DTYPES)}")
    return Entry(_DTYPES[value["dtype"]], tuple(int(size) for size in value["shape"]), int(start), int(stop))


def read_header(path: Path) -> Header:
    """The header of a file whose length is what it says. Raises CheckpointError."""
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if length > _LONGEST_HEADER:
                raise CheckpointError(str(path), "is no safetensors file")
            text = file.read(length).decode("utf-8")
            size = path.stat().st_size
    except FileNotFoundError:
        raise CheckpointError(str(path), "is missing") from None
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(str(path), f"cannot be read ({error})") from error
    header = Header.parsed(text, str(path))
    if size != header.data_start + header.size:
        problem = f"has {size} bytes, its header says {header.data_start + header.size}"
        raise CheckpointError(str(path), problem, remedy="fetch the file again")
    return header


def read_into(file: BinaryIO, header: Header, name: str, target: Tensor) -> None:
    """Read a tensor into `target`, contiguous, of its shape; of another type it is converted on the way."""
    entry = header.entries[name]
    direct = target if target.dtype == entry.dtype else torch.empty(entry.shape, dtype=entry.dtype)
    file.seek(header.data_start + entry.start)
    if file.readinto(_bytes_of(direct)) != entry.stop - entry.start:  # type: ignore[attr-defined]
        raise CheckpointError(file.name, f"ends within {name}", remedy="fetch the file again")
    if direct is not target:
        target.copy_(_converted(direct, target.dtype, f"{file.name}: {name}"))


class LazyTensors(Mapping[str, Tensor]):
    """Tensors by name on the CPU, each made when it is asked for and held by who asked alone."""

    @property
    @abstractmethod
    def shapes(self) -> Mapping[str, torch.Size]:
        """The shape of every tensor, without making one."""

    def __iter__(self) -> Iterator[str]:
        return iter(self.shapes)

    def __len__(self) -> int:
        return len(self.shapes)


class TensorFile(LazyTensors):
    """The tensors of a file, each read when it is asked for."""

    def __init__(self, path: Path) -> None:
        self._path, self._header = path, read_header(path)

    @property
    def shapes(self) -> dict[str, torch.Size]:
        """As the header says."""
        return {name: torch.Size(entry.shape) for name, entry in self._header.entries.items()}

    def __getitem__(self, name: str) -> Tensor:
        """The tensor, in the file's type; told as progress."""
        entry = self._header.entries[name]
        found = torch.empty(entry.shape, dtype=entry.dtype)
        with self._path.open("rb") as file:
            read_into(file, self._header, name, found)
        progressed()
        return found


def shapes_of(tensors: Mapping[str, Tensor]) -> Mapping[str, torch.Size]:
    """The shape of each tensor by name; of lazy ones none is made for it."""
    if isinstance(tensors, LazyTensors):
        return tensors.shapes
    return {name: tensor.shape for name, tensor in tensors.items()}


def write_file(path: Path, header: Header, tensors: Iterable[Tensor]) -> None:
    """Write the tensors of a header, in its order; one at a time is held. Others' types are converted."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        data = header.text.encode()
        file.write(len(data).to_bytes(8, "little") + data)
        for (name, entry), tensor in zip(header.entries.items(), tensors, strict=True):
            if tuple(tensor.shape) != entry.shape:
                raise CheckpointError(str(path), f"{name} is {list(tensor.shape)}, must be {list(entry.shape)}")
            file.write(_bytes_of(_converted(tensor.detach().cpu(), entry.dtype, f"{path}: {name}").contiguous()))


def _converted(tensor: Tensor, dtype: torch.dtype, place: str) -> Tensor:
    """Of another type. Raises CheckpointError for a number that the type has no room for: it would be infinite."""
    found = tensor.to(dtype)
    largest = torch.finfo(dtype).max
    if largest < torch.finfo(tensor.dtype).max and found.isinf().sum() > tensor.isinf().sum():
        kind, kept = str(dtype).removeprefix("torch."), tensor[tensor.isfinite()]
        raise CheckpointError(place, f"holds {float(kept.abs().max()):.6g}, and {kind} ends at {largest:.6g}")
    return found


def _bytes_of(tensor: Tensor) -> memoryview:
    """The memory of a contiguous tensor."""
    return tensor.flatten().view(torch.uint8).numpy().data
