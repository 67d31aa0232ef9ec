"""CheckpointWriter: checkpoints are written beside the training that goes on, one at a time."""

import contextlib
import os
import shutil
import tempfile
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from functools import partial
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from dllm_core.checkpoints.store import CheckpointStore, TrainPosition
from dllm_core.errors import DataError, first_line
from dllm_core.storage.progress import progress_to, progressed
from dllm_core.storage.store import check_scratch

Parts = Mapping[str, Mapping[str, Tensor]]
SLICE_S = 0.5  # at most, between two signs of life of who waits; a limit on them has more


class CheckpointWriter:
    """Hands tensors to a thread that hashes, stores and prunes. Rank 0's.

    before: called by that thread with the step before its checkpoint is committed.
    """

    def __init__(
        self,
        checkpoints: CheckpointStore,
        *,
        keep: int,
        keep_every: int | None,
        keep_best: int,
        before: Callable[[int], None],
    ) -> None:
        self._checkpoints, self._before = checkpoints, before
        self._prune = partial(checkpoints.prune, keep, keep_every, keep_best)
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        self._writing: tuple[int, Future[None]] | None = None
        self._passed_over = set[int]()
        self._has_moved = threading.Event()
        self._prefix = f"dllm-checkpoint-{checkpoints.identity}-"
        for left in Path(tempfile.gettempdir()).glob(f"{self._prefix}*"):  # by a process that was killed in a save
            if left.stat().st_uid == os.geteuid():
                shutil.rmtree(left, ignore_errors=True)

    @property
    def step(self) -> int | None:
        """Of the save whose outcome `ended` has not told."""
        return None if self._writing is None else self._writing[0]

    def begin(self, step: int) -> None:
        """Training begins at this step: what is committed above it was passed over as damaged, and is distrusted until
        it is saved again.
        """
        self._passed_over = {above for above in self._checkpoints.committed() if above > step}

    def submit(self, position: TrainPosition, parts: Parts, heldout: float | None = None) -> None:
        """Start to write `file name -> tensors`, which are the writer's from here on. The save before must have been
        told by `ended`.
        """
        assert self._writing is None, "one at a time"
        self._writing = position.step, self._thread.submit(self._write, position, parts, heldout)

    def ended(self, within: float) -> bool:
        """Whether the save is committed since, or is in so many seconds. Raises what made it fail."""
        if self._writing is None or not wait([self._writing[1]], within).done:
            return False
        (_, writing), self._writing = self._writing, None
        writing.result()
        return True

    def has_moved(self) -> bool:
        """Whether a piece was written since this was last asked: a storage that stands still is found, and where."""
        has_moved = self._has_moved.is_set()
        self._has_moved.clear()
        return has_moved

    def close(self, beat: Callable[[], None]) -> None:
        """Wait for the thread, beating while it moves; what it was writing is committed or is not there."""
        while self._writing is not None and not wait([self._writing[1]], SLICE_S).done:
            if self.has_moved():
                beat()
        self._thread.shutdown(wait=True)

    def _write(self, position: TrainPosition, parts: Parts, heldout: float | None) -> None:
        with progress_to(self._has_moved.set):
            self._write_moving(position, parts, heldout)

    def _write_moving(self, position: TrainPosition, parts: Parts, heldout: float | None) -> None:
        check_scratch(sum(tensor.nbytes for tensors in parts.values() for tensor in tensors.values()))
        with tempfile.TemporaryDirectory(prefix=self._prefix) as scratch:
            files = {name: Path(scratch, name) for name in parts}
            for name, tensors in parts.items():
                try:
                    save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, files[name])
                except (OSError, SafetensorError) as error:  # which say not where
                    remedy = "free some space there, or set TMPDIR"
                    raise DataError(
                        str(files[name]), f"cannot be written ({first_line(error)})", remedy=remedy
                    ) from error
                progressed()
            self._before(position.step)
            self._checkpoints.save(position, files, heldout)
        self._passed_over.discard(position.step)
        with contextlib.suppress(DataError, OSError):  # it is committed; what could not be removed goes after the next
            self._prune(self._passed_over)
