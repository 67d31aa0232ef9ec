"""The law of recorded forwards: from a shape's third time on they say what plain ones say, whatever moves meanwhile.

What a GPU does again from a graph is here done again by a call: all else is the same.
"""

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from conftest import draws
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import VOCABULARY, closely, ids_of, mixed_denoiser, new_denoiser
from torch._dynamo.testing import CompileCounterWithBackend

from dllm_core.model import recorder
from dllm_core.model.cache import KeyValueStore
from dllm_core.model.denoiser import Denoiser
from dllm_core.model.pattern import FULL, AttentionPattern
from dllm_core.model.recorder import Recorder

pytestmark = pytest.mark.usefixtures("one_thread")
LONGEST = 32
KINDS = {"plain": {}, "shifted": {"shifted": True}, "grouped": {"heads": 4, "kv_heads": 2, "qk_norm": True}}


def again(run: Callable[[], None]) -> Callable[[], None]:
    run()  # as a graph's recording does
    return run


class Both:
    """One denoiser's forwards, plain and by a recorder, over two stores that are kept alike."""

    def __init__(self, denoiser: Denoiser, rows: int = 0, **options: object) -> None:
        self.denoiser, self.recorder = denoiser, Recorder(denoiser, **{"record": again, **options})
        self.stores = [KeyValueStore(denoiser.config.model) for _ in range(2)]
        self.slots: list[int] = []
        self.take(rows)

    def take(self, rows: int) -> None:
        for _ in range(rows):
            first, second = (store.take(LONGEST) for store in self.stores)
            assert first == second
            self.slots.append(first)

    def forward(self, rows: list[int], begin: int, width: int, seed: int, pattern: AttentionPattern = FULL) -> None:
        """Of some rows' positions; under `full` their keys are written over, else kept where whole blocks are."""
        ids = torch.randint(3, VOCABULARY, (len(rows), width), generator=torch.Generator().manual_seed(seed))
        read = torch.arange(0, ids.numel(), 1 + seed % 3)
        found = []
        with torch.inference_mode():
            for store, recorder in zip(self.stores, (None, self.recorder), strict=True):
                self.denoiser.recorder = recorder
                begins = [begin] * len(rows) if pattern.kind == "full" else None
                cache = store.rows([self.slots[row] for row in rows], begins)
                real = torch.ones_like(ids, dtype=torch.bool)
                found.append(self.denoiser(ids, real, read, pattern=pattern, cache=cache).clone())
                if pattern.kind != "full":
                    cache.commit([width] * len(rows))
        self.denoiser.recorder = None
        closely(*found)
        closely(self.stores[0].slots, self.stores[1].slots)


@st.composite
def calls(draw: st.DrawFn) -> list[tuple[list[int], int, int]]:
    """Rows, in order or not, where their new positions begin and how many they are: few kinds, which so come again."""
    kinds = st.tuples(st.permutations(range(3)), st.integers(1, 3), st.integers(0, 2), st.sampled_from([8, 16]))
    some = draw(st.lists(kinds, min_size=1, max_size=3))
    return [
        (rows[:number], 8 * begin, width)
        for rows, number, begin, width in draw(st.lists(st.sampled_from(some), min_size=4, max_size=14))
    ]


@settings(max_examples=draws(30), deadline=None)
@given(calls(), st.sampled_from(sorted(KINDS)))
def test_a_recorded_forward_says_what_a_plain_one_says(some, kind):
    both = Both(new_denoiser(**KINDS[kind]), rows=3)
    both.forward([0, 1, 2], 0, LONGEST, seed=0)
    for seed, (rows, begin, width) in enumerate(some):
        both.forward(rows, begin, width, seed)
    shapes = [(tuple(rows), width) for rows, _, width in some]
    assert len(both.recorder.held) >= (max(map(shapes.count, shapes)) >= 3)


def test_blocks_behind_kept_ones_are_recorded_too():
    pattern = AttentionPattern("block_causal", 4)
    both = Both(new_denoiser(), rows=2)
    for seed in range(LONGEST // 4):
        both.forward([0, 1], 0, 4, seed, pattern)
    assert len(both.recorder.held) == 2  # 16 keys and 32


def test_what_has_moved_is_recorded_anew():
    both = Both(new_denoiser(), rows=1)
    for seed in range(3):
        both.forward([0], 0, 16, seed)
    assert len(both.recorder.held) == 1
    both.take(4)  # the slots' tensor grows
    both.forward([0], 0, 16, seed=3)
    assert len(both.recorder.held) == 0
    for seed in range(3):
        both.forward([0], 0, 16, seed)
    assert len(both.recorder.held) == 1
    both.denoiser.load_state_dict(
        {name: part.clone() for name, part in new_denoiser(1).state_dict().items()}, assign=True
    )
    both.forward([0], 0, 16, seed=4)
    assert len(both.recorder.held) == 0
    for seed in range(3):
        both.forward([0], 0, 16, seed)
    assert len(both.recorder.held) == 1
    both.denoiser.double().float()  # parameters stay, what they hold is elsewhere
    both.forward([0], 0, 16, seed=5)
    assert len(both.recorder.held) == 0


def test_shapes_that_take_turns_in_too_little_room_are_not_recorded_at_every_call(monkeypatch):
    monkeypatch.setattr(recorder, "_MOST_HELD", 1)
    recorded = []
    both = Both(new_denoiser(), rows=1, record=lambda run: recorded.append(run) or again(run))
    for seed in range(12):
        both.forward([0], 0, (8, 16)[seed % 2], seed)
    assert len(both.recorder.held) == 1
    assert len(recorded) == 3  # each at its third time, and the first, which made room for the other, at its sixth


def test_slots_that_have_grown_are_not_held_by_forwards_that_are_too_large_to_record(monkeypatch):
    both = Both(new_denoiser(), rows=1)
    both.forward([0], 0, 16, seed=0)
    old = weakref.ref(both.stores[1].slots.untyped_storage())
    both.take(1)
    monkeypatch.setattr(recorder, "_MOST_POSITIONS", 8)
    assert old() is not None
    both.forward([0, 1], 0, 16, seed=1)
    assert old() is None


def raises(run: Callable[[], None]) -> Callable[[], None]:
    raise RuntimeError("operation not permitted when stream is capturing\nmore")


@pytest.mark.parametrize(
    ("record", "why"),
    [(raises, "RuntimeError: operation not permitted when stream is capturing)"), (lambda run: lambda: None, "differ")],
)
def test_a_machine_that_cannot_record_decodes_as_before(record, why, caplog):
    both = Both(new_denoiser(), rows=1, record=record)
    for seed in range(8):
        both.forward([0], 0, 16, seed)
    assert len(both.recorder.held) == 0
    [warning] = caplog.messages
    assert why in warning


class Gpu:
    """What of torch.cuda a recording asks for: the stream that is current, and as torch's own does, a recording that
    fails leaves its stream in place.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.current: object = SimpleNamespace(wait_stream=lambda other: None)
        self.pools: list[object] = []
        given = {"current_stream": lambda: self.current, "device": nullcontext, "graph": self.graph}
        given |= {"CUDAGraph": lambda: SimpleNamespace(replay=None), "stream": self.stream}
        given |= {"Stream": lambda: SimpleNamespace(wait_stream=lambda other: None), "graph_pool_handle": object}
        for name, part in given.items():
            monkeypatch.setattr(torch.cuda, name, part)

    @contextmanager
    def stream(self, stream: object) -> Iterator[None]:
        before, self.current = self.current, stream
        try:
            yield
        finally:
            self.current = before

    @contextmanager
    def graph(self, graph: object, pool: object, stream: object, **options: object) -> Iterator[None]:
        before, self.current = self.current, stream
        self.pools.append(pool)
        yield
        self.current = before


def test_a_recording_that_fails_leaves_the_callers_stream_and_its_memory_to_no_other(monkeypatch):
    gpu = Gpu(monkeypatch)
    graphs, before, calls = recorder._Graphs(torch.device("cpu")), gpu.current, []

    def fails_at_the_third(call: int) -> None:
        calls.append(call)
        if len(calls) == 3:
            raise RuntimeError("operation not permitted when stream is capturing")

    with pytest.raises(RuntimeError, match="not permitted"):
        graphs(lambda: fails_at_the_third(0))
    assert gpu.current is before
    for _ in range(2):
        graphs(lambda: fails_at_the_third(1))
    assert gpu.current is before
    first, second, third = gpu.pools
    assert first is not second is third


def test_a_row_that_is_no_number_is_not_held_against_the_machine(caplog):
    both = Both(new_denoiser(), rows=1)
    head = both.denoiser.head.weight
    with torch.no_grad():
        kept = head[3].clone()
        head[3] = torch.nan
        ids, read = ids_of(1, 16), torch.arange(16)
        both.denoiser.recorder = both.recorder
        with torch.inference_mode():
            for _ in range(4):
                cache = both.stores[1].rows([0], [0])
                assert both.denoiser(ids, torch.ones_like(ids).bool(), read, cache=cache)[:, 3].isnan().all()
        head[3] = kept
    both.stores[1].slots.zero_()
    both.forward([0], 0, 16, seed=0)
    assert len(both.recorder.held) == 1
    assert not caplog.messages


def test_a_model_that_is_let_go_of_is_gone_at_once():
    denoiser = new_denoiser()
    denoiser.recorder = Recorder(denoiser)
    gone = weakref.ref(denoiser)
    del denoiser
    assert gone() is None


def test_experts_and_a_cpu_have_none():
    for denoiser in (new_denoiser(), mixed_denoiser()):
        Recorder.attach(denoiser, compiles=True)
        assert denoiser.recorder is None


@pytest.mark.long
def test_a_block_is_compiled_whole_and_once_for_all_blocks_and_lengths(monkeypatch):
    counter = CompileCounterWithBackend("eager")
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=counter))
    both = Both(new_denoiser(dim=36, heads=3, layers=5, qk_norm=True), rows=2, compiles=True)
    for width in (8, 16, 24):
        for seed in range(4):
            both.forward([0, 1], 0, width, seed)
            both.forward([1], 0, width, seed)
    assert len(both.recorder.held) == 6
    assert counter.frame_count == 4  # before and behind attention, of one row and of several


@pytest.mark.long
def test_compiled_forwards_say_what_plain_ones_say():
    both = Both(new_denoiser(dim=36, heads=3, qk_norm=True), rows=2, compiles=True)
    for seed in range(5):
        both.forward([0, 1], 0, 16, seed)
    assert len(both.recorder.held) == 1
    assert both.recorder.ways == ["compiled", "plain"]
