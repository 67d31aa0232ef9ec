"""Who watches hears of every piece of a long read, and of the wait for another process's fetch; nobody else does."""

import hashlib
import threading
import time

import pytest
import torch
from safetensors.torch import save_file

from dllm_core.model.tensor_file import TensorFile
from dllm_core.storage import cache
from dllm_core.storage.progress import progress_to, progressed
from dllm_core.storage.store import file_sha256


class Heard:
    """Counts the signs of progress in a block."""

    def __init__(self) -> None:
        self.number = 0

    def __call__(self) -> None:
        self.number += 1


@pytest.fixture
def cached(tmp_path, monkeypatch):
    monkeypatch.setenv("DLLM_CACHE", str(tmp_path / "cache"))


@pytest.mark.parametrize("size", [0, 1, (1 << 18) - 1, 1 << 18, 3_000_001])
def test_a_file_is_hashed_piece_by_piece(tmp_path, size):
    path, data = tmp_path / "file", bytes(size)
    path.write_bytes(data)
    with progress_to(heard := Heard()):
        assert file_sha256(path) == hashlib.sha256(data).hexdigest()
    assert heard.number == -(-size // (1 << 18))


def test_a_copy_is_fetched_piece_by_piece_and_what_is_there_is_not(cached):
    for expected in (3, 0):
        with progress_to(heard := Heard()):
            assert cache.cached_copy("name", 6, lambda: [b"ab", b"cd", b"ef"]).read_bytes() == b"abcdef"
        assert heard.number == expected


def test_who_waits_for_the_fetch_of_another_is_heard(cached):
    heard, deadline = Heard(), time.monotonic() + 20
    waiter = threading.Thread(target=lambda: wait_and_copy(heard))

    def pieces():
        waiter.start()
        while heard.number < 3 and time.monotonic() < deadline:
            time.sleep(0.01)
        yield b"ab"

    cache.cached_copy("name", 2, pieces)
    waiter.join()
    assert heard.number >= 3


def wait_and_copy(heard: Heard) -> None:
    with progress_to(heard):
        cache.cached_copy("name", 2, lambda: pytest.fail("it is there by then"))


def test_tensors_of_a_file_are_read_one_by_one(tmp_path):
    save_file({name: torch.zeros(2) for name in "abc"}, tmp_path / "file")
    with progress_to(heard := Heard()):
        assert len(dict(TensorFile(tmp_path / "file"))) == 3
    assert heard.number == 3


def test_a_listener_hears_its_own_block_and_thread_alone():
    with progress_to(outer := Heard()):
        with progress_to(inner := Heard()):
            progressed()
        other = threading.Thread(target=progressed)
        other.start()
        other.join()
        progressed()
    progressed()
    assert (outer.number, inner.number) == (1, 1)
