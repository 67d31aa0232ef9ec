"""Recorder: forwards over kept keys whose shape comes again are launched at once, as CUDA graphs.

A step of few positions reads every weight and computes little with it: a GPU is through with that before Python has
launched its kernels, some forty a block, one by one. What a graph does is fixed, its shapes and its addresses; so what
changes from call to call is copied to where it was recorded. Forwards of many positions, and of rows of several widths,
run as they are: there the kernels take longer than their launch.
"""

import logging
import threading
import weakref
from collections import Counter, OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from dllm_core.errors import first_line
from dllm_core.model.cache import NewPositions
from dllm_core.model.visibility import told_by_previous

if TYPE_CHECKING:
    from dllm_core.model.denoiser import Block, Denoiser

Record = Callable[[Callable[[], None]], Callable[[], None]]
Key = tuple[object, ...]

_MOST_POSITIONS = 256  # of a recorded forward
_MOST_HELD = 128
_SIGHTINGS = 3  # of a shape until it is recorded, which takes as long as several forwards
_LOG = logging.getLogger(__name__)
_RECORDING = threading.Lock()  # a process may record one graph at a time


@dataclass(frozen=True)
class _Parts:
    """A block's operations before and behind its attention, which is called as it is: kept keys are written in it."""

    name: str
    before: Callable[["Block", Tensor, Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]
    behind: Callable[["Block", Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class _Recording:
    """A forward that `replay` does on what `inputs` hold."""

    inputs: list[Tensor]
    replay: Callable[[], None]


class Recorder:
    """Runs a denoiser's forwards over kept keys: each shape as it is at first, and recorded from its third time on.

    compiles: let torch.compile join a block's small operations, which takes a minute once. record: makes, of what is to
    be done on the device, a thing that does it again. What cannot be compiled or recorded here, or then gives something
    else than plain operations, is left with a warning: that costs speed, and no token.
    """

    def __init__(self, denoiser: "Denoiser", *, compiles: bool = False, record: Record | None = None) -> None:
        self._owner = weakref.ref(denoiser)  # which holds this: one that is let go of must not wait for the collector
        self._record = record or _Graphs(denoiser.device)
        self._ways = [*([_compiled()] if compiles else []), _plain()]  # the first that works is taken
        self._held: OrderedDict[Key, _Recording] = OrderedDict()
        self._sightings: Counter[Key] = Counter()
        self._fixed: list[Tensor] = []  # whose addresses recordings hold
        self._logits = torch.empty(0)

    @classmethod
    def attach(cls, denoiser: "Denoiser", *, compiles: bool) -> None:
        """Give a denoiser one, if it has none and is of use to it: on a GPU, not with experts, which ask the host."""
        if denoiser.device.type != "cuda" or denoiser.recorder is not None:
            return
        if denoiser.time is None and denoiser.config.model.experts is None:
            denoiser.recorder = cls(denoiser, compiles=compiles)

    @property
    def _denoiser(self) -> "Denoiser":
        denoiser = self._owner()
        assert denoiser is not None
        return denoiser

    @property
    def held(self) -> list[Key]:
        """What is recorded, the one that was asked for last at the end: of each, first the shape [B W] of its ids."""
        return list(self._held)

    @property
    def ways(self) -> list[str]:
        """What has not failed here, the one that is taken first."""
        return [parts.name for parts in self._ways]

    def __call__(
        self, input_ids: Tensor, new: NewPositions, read: Tensor | None, tables: Sequence[Tensor], *, is_shifted: bool
    ) -> Tensor | None:
        """Logits [n V] at `read` int64 [n] of input_ids [B W], until the next call; None: it is to be run as it is.

        tables: cos and sin [K d]. is_shifted: a position's token is told by the one before it.
        """
        self._forget_if_moved([new.slots, *tables, self._denoiser.embed.weight, self._denoiser.norm.weight])
        count = input_ids.numel()
        if not self._ways or count > _MOST_POSITIONS or read is None or read.dtype != torch.int64 or not len(read):
            return None
        if not torch.is_inference_mode_enabled():  # in which alone its tensors may be written to
            return None
        rows = (new.rows.start, new.rows.stop) if isinstance(new.rows, slice) else None
        key = (input_ids.shape, new.attention.shape, rows, is_shifted)
        given = [input_ids, new.offsets, new.attention, *new.at, *new.of, read]
        given += [new.rows] if isinstance(new.rows, Tensor) else []
        held = self._held.get(key)
        if held is None:
            self._sightings[key] += 1
            if self._sightings[key] < _SIGHTINGS or (held := self._recorded(given, new, tables, is_shifted)) is None:
                return None
            self._held[key] = held
            if len(self._held) > _MOST_HELD:
                del self._sightings[self._held.popitem(last=False)[0]]  # else it is recorded whenever it comes again
        self._held.move_to_end(key)
        _fill(held.inputs, given)
        held.replay()
        return self._logits[: len(read)]

    def _forget_if_moved(self, fixed: list[Tensor]) -> None:
        """Of weights or slots that have moved no recording is of use, and their memory is needed by others."""
        if [_address(part) for part in fixed] != [_address(part) for part in self._fixed]:
            self._held.clear()
            self._sightings.clear()
            self._fixed = [part.detach() for part in fixed]  # `to` moves a parameter in place, and this with it

    def _recorded(
        self, given: Sequence[Tensor], new: NewPositions, tables: Sequence[Tensor], is_shifted: bool
    ) -> _Recording | None:
        """A forward of this shape in the first way that gives what the plain one does; None: in no way, or not now."""
        count = given[0].numel()
        # What says of real and of read positions where they are has room for all.
        sizes = [count if 3 <= i < 8 else len(part) for i, part in enumerate(given)]
        inputs = [part.new_empty(size, *part.shape[1:]) for size, part in zip(sizes, given, strict=True)]
        _fill(inputs, given)
        ids, offsets, attention, slot, offset, row, column, read, *rows = inputs
        fixed = replace(
            new,
            offsets=offsets,
            attention=attention,
            at=(slot, offset),
            of=(row, column),
            rows=rows[0] if rows else new.rows,
        )
        if not len(self._logits):
            head = self._denoiser.head.weight
            self._logits = torch.empty(_MOST_POSITIONS, len(head), dtype=head.dtype, device=head.device)

        def run(parts: _Parts) -> None:
            self._logits[:count] = self._forward(parts, ids, fixed, read, tables, is_shifted)

        run(_plain())
        expected = self._logits[:count].float().clone()
        if not expected.isfinite().all():
            return None  # a bad row, which says nothing of others
        while self._ways:
            parts = self._ways[0]
            try:
                replay = self._record(lambda parts=parts: run(parts))  # type: ignore[misc]
                self._logits.zero_()
                replay()
                error = (self._logits[:count].float() - expected).abs().max()
                if error <= 2**-5 * expected.abs().max():
                    return _Recording(inputs, replay)
                problem = f"logits differ by {float(error):.3g}"
            except Exception as caught:  # noqa: BLE001 (whatever a compiler or a driver may raise)
                problem = f"{type(caught).__name__}: {first_line(caught)}"
            _LOG.warning("%s forwards cannot be recorded on %s (%s)", parts.name, self._denoiser.device, problem)
            del self._ways[0]
        return None

    def _forward(
        self,
        parts: _Parts,
        input_ids: Tensor,
        new: NewPositions,
        read: Tensor,
        tables: Sequence[Tensor],
        is_shifted: bool,
    ) -> Tensor:
        """Logits [n V], without a word to the host."""
        cos, sin = (table[new.offsets][:, None] for table in tables)
        x = self._denoiser.embedded(input_ids)
        block: Block
        for number, block in enumerate(self._denoiser.blocks):  # type: ignore[assignment]
            q, k, v = parts.before(block, x, cos, sin)
            mixed = block.attention.mixed(q, k, v, new.attention, False, new.layer(number), len(x))
            x = parts.behind(block, x, mixed)
        return self._denoiser.logits_at(told_by_previous(x) if is_shifted else x, read)


def _plain() -> _Parts:
    from dllm_core.model.denoiser import Block

    return _Parts("plain", Block.before, Block.behind)


def _compiled() -> _Parts:
    """One code for all blocks and lengths."""
    from dllm_core.model.denoiser import Block

    def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
        return torch.compile(function, fullgraph=True, dynamic=True)

    return _Parts("compiled", compiled(Block.before), compiled(Block.behind))


def _fill(inputs: Sequence[Tensor], given: Sequence[Tensor]) -> None:
    """Copy to where it was recorded. What is shorter there says its first again, which is then done twice alike."""
    for to, part in zip(inputs, given, strict=True):
        to[: len(part)] = part
        if len(part) < len(to):
            to[len(part) :] = part[:1]


def _address(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


class _Graphs:
    """Records CUDA graphs, which share one pool of memory: none runs while another does."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._room: tuple[Any, torch.cuda.Stream] | None = None  # of what is recorded: a pool of memory and a stream

    def __call__(self, run: Callable[[], None]) -> Callable[[], None]:
        # The caller's stream is set for itself: where a recording fails, torch leaves its own in the caller's place.
        with _RECORDING, torch.cuda.device(self._device), torch.cuda.stream(torch.cuda.current_stream()):
            pool, beside = self._room or (torch.cuda.graph_pool_handle(), torch.cuda.Stream())  # type: ignore[no-untyped-call]
            self._room = None  # in that of a recording that has failed no other is taken
            beside.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(beside):
                for _ in range(2):  # kernels are compiled, and libraries take their room, which no graph may
                    run()
            torch.cuda.current_stream().wait_stream(beside)
            graph = torch.cuda.CUDAGraph()
            # Other threads, which decode other models, are not hindered.
            with torch.cuda.graph(graph, pool, beside, capture_error_mode="thread_local"):
                run()
            self._room = pool, beside
        return graph.replay
