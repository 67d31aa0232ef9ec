"""Real processes of one world on gloo that stay: each calls what it is handed, one after the other.

To import torch, DeepSpeed and peft takes as long as a hundred small trainings. One process does it, of which all others
are forked, and the tests of several files share them.
"""

import multiprocessing
import os
import tempfile
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from typing import Any, cast

import torch

_IMPORTED_ONCE = ["pytest", "hypothesis", "peft", "dllm_core.training.deepspeed_backend", "workflows.train.session"]
_IMPORTED_ONCE += ["workflows.preprocess.flow", "workflows.transfer.flow", "workflows.pipeline.bundle"]


class Ranks:
    """A world of that size. Its processes end with `close`, and with this process."""

    def __init__(self, world_size: int) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(_IMPORTED_ONCE)
        self.world_size, self._ends, self._processes = world_size, list[Connection](), []
        meeting = f"file://{tempfile.mkdtemp()}/rendezvous"
        for rank in range(world_size):
            ours, theirs = context.Pipe()
            self._ends.append(ours)
            process = context.Process(target=_work, args=(rank, world_size, meeting, theirs), daemon=True)
            process.start()
            theirs.close()
            self._processes.append(process)

    def begin(self, function: Callable[..., None], *args: Any) -> None:
        """Let every process call function(rank, *args)."""
        for end in self._ends:
            end.send((function, args))

    def join(self) -> None:
        """Wait until all have made the call. Where one fails the others may wait for it for ever: all are ended."""
        waiting = list(self._ends)
        while waiting:
            for end in cast(list[Connection], wait(waiting)):
                waiting.remove(end)
                try:
                    error = end.recv()
                except (EOFError, OSError):
                    error = "the process is gone"
                if error is not None:
                    self.close()
                    raise AssertionError(f"rank {self._ends.index(end)} of {self.world_size}: {error}")

    def run(self, function: Callable[..., None], *args: Any) -> None:
        """`begin` and `join`."""
        self.begin(function, *args)
        self.join()

    @property
    def is_up(self) -> bool:
        return all(process.is_alive() for process in self._processes)

    def close(self) -> None:
        for process in self._processes:
            process.kill()
            process.join()


def _work(rank: int, world_size: int, meeting: str, end: Connection) -> None:
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size), MASTER_ADDR="127.0.0.1")
    torch.distributed.init_process_group("gloo", init_method=meeting, rank=rank, world_size=world_size)
    while True:
        try:
            function, args = end.recv()
        except (EOFError, OSError):
            # Not by the interpreter's own end, at which threads of DeepSpeed's group sometimes abort the process.
            os._exit(0)
        try:
            function(rank, *args)
            end.send(None)
        except BaseException:  # noqa: BLE001 (it is raised where the call comes from)
            end.send(traceback.format_exc())
