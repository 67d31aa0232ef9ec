"""Training that is killed at any moment, or whose checkpoints are damaged or find no room, ends with the bits of one
that was left alone. One process of plain PyTorch; the same under Ray and DeepSpeed: `test_training_storm.py`."""

import os
import random
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from conftest import SmallCorpus
from s3_server import S3Server, s3_server
from survival import checkpoint_bits

from dllm_core.checkpoints.run_dir import JsonLines, RunDir
from dllm_core.checkpoints.store import CheckpointStore
from dllm_core.errors import CheckpointError, DataError
from dllm_core.storage.s3 import S3Store
from dllm_core.storage.store import LocalStore, Store
from dllm_core.training.backend import LocalBackend
from dllm_core.training.events import StepRecord
from workflows.train.session import METRICS, MetricsLog, open_session, train_to_end

pytestmark = pytest.mark.usefixtures("one_thread")
STEPS, SAVE_EVERY = 24, 4
FILES = ("model.safetensors", "ema.safetensors", "optimizer.safetensors", "manifest.json")
Train = Callable[..., None]


@dataclass(frozen=True)
class DeadlyStore(LocalStore):
    """SIGKILLs its process in a save: when it shall write or remove an object of a checkpoint for the n-th time."""

    left: list[int]

    def _count(self, key: str) -> None:
        if "/checkpoints/" in key:
            self.left[0] -= 1
            if self.left[0] == 0:
                os.kill(os.getpid(), signal.SIGKILL)

    def put_file(self, key: str, path: Path) -> None:
        self._count(key)
        super().put_file(key, path)

    def put(self, key: str, data: bytes) -> None:
        self._count(key)
        super().put(key, data)

    def delete(self, key: str) -> None:
        self._count(key)
        super().delete(key)


@dataclass(frozen=True)
class DeadlyBucket(S3Store):
    """SIGKILLs its process when a checkpoint was committed for the n-th time, before anybody is told."""

    left: list[int]

    def put(self, key: str, data: bytes) -> None:
        super().put(key, data)
        if "/checkpoints/" in key and key.endswith("/manifest.json"):
            self.left[0] -= 1
            if self.left[0] == 0:
                os.kill(os.getpid(), signal.SIGKILL)


class SlowLog(MetricsLog):
    """Makes every step take so many seconds, so that a kill finds it at work on any machine."""

    def __init__(self, run: RunDir, resumed_at: int, seconds: float) -> None:
        super().__init__(run, resumed_at)
        self._seconds = seconds

    def stepped(self, record: StepRecord) -> None:
        super().stepped(record)
        time.sleep(self._seconds)


def raised(error: CheckpointError) -> None:
    raise error


@pytest.fixture
def train(small_corpus: SmallCorpus) -> Train:
    """Train the run below a root to its end, from where it stands."""

    def trained(
        root: Path,
        deadly: int = 0,
        store: Store | None = None,
        on_damage: Callable[[CheckpointError], None] = raised,
        slowed: float = 0.0,
        **fields: object,
    ) -> None:
        store = store or DeadlyStore(root, [deadly])
        for item in small_corpus.store.list("corpora"):
            store.put_file(item.key, small_corpus.store.path(item.key))
        run = RunDir(store, "run")
        options = {"steps": STEPS, "checkpoint_every": SAVE_EVERY, "heldout_every": None, **fields}
        section = small_corpus.recipe.train.model_copy(update=options)
        trainer = open_session(
            small_corpus.recipe.model_copy(update={"train": section}),
            run,
            small_corpus.manifest,
            torch.device("cpu"),
            backend=LocalBackend,
            events_of=lambda step: SlowLog(run, step, slowed),
            on_damage=on_damage,
        )
        train_to_end(trainer, run, small_corpus.manifest)

    return trained


def run_of(root: Path) -> RunDir:
    return RunDir(LocalStore(root), "run")


def losses(run: RunDir) -> list[tuple[int, float, float]]:
    """(step, loss, norm) of every step of a run."""
    return [(line["step"], line["loss"], line["grad_norm"]) for line in JsonLines(run, METRICS).read()]


def outcome(root: Path) -> tuple[dict[str, str], list[tuple[int, float, float]]]:
    """The sha256 of what the last checkpoint holds, and the losses that led there."""
    return checkpoint_bits(run_of(root), STEPS), losses(run_of(root))


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("whole")


@pytest.fixture
def expected(train: Train, whole: Path) -> tuple[dict[str, str], list[tuple[int, float, float]]]:
    """What a run leaves that nothing disturbs."""
    if not (whole / "runs").exists():
        train(whole)
    found = outcome(whole)
    assert [step for step, _, _ in found[1]] == list(range(1, STEPS + 1))
    return found


def killed(work: Callable[[], None], after: float | None = None) -> None:
    """Do work in a process of its own, which is killed: by itself, or from outside after so many seconds."""
    child = os.fork()
    if child == 0:
        try:
            work()
        finally:
            os._exit(0)
    if after is not None:
        time.sleep(after)
        os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status)
    assert os.WTERMSIG(status) == signal.SIGKILL


@pytest.fixture
def s3(tmp_path: Path) -> Iterator[S3Server]:
    with s3_server(tmp_path / "cache") as server:
        yield server


def test_a_machine_lost_right_after_a_commit_takes_no_line_of_the_log_with_it(train, expected, s3, tmp_path):
    """On S3 the log is a local mirror, which goes with the machine."""
    bucket = s3.new_bucket()
    for deadly in (1, 2, 1):
        killed(lambda deadly=deadly: train(tmp_path, store=DeadlyBucket(bucket, "lab", [deadly])))
    run = RunDir(S3Store(bucket, "lab"), "run")
    train(tmp_path, store=run.store)
    assert (checkpoint_bits(run, STEPS), losses(run)) == expected


def scratches(prefix: str) -> list[Path]:
    """Copies of tensors on their way to the store."""
    return list(Path(tempfile.gettempdir()).glob(f"{prefix}-*"))


def test_kills_at_any_moment_and_at_every_point_of_a_save_change_no_bit(train, expected, tmp_path, capsys):
    rng = random.Random(1)
    inside, outside, stood, left = 0, 0, [], []
    prefix = f"dllm-checkpoint-{CheckpointStore(run_of(tmp_path)).identity}"
    for deadly in (1, 2, 3, 4, 5, 6, 7, 8):  # of 4 writes a save; from the third on, 4 removals
        killed(lambda deadly=deadly: train(tmp_path, deadly))
        inside += 1
        left.append(len(scratches(prefix)))
        committed = CheckpointStore(run_of(tmp_path)).committed()
        stood.append(committed[-1] if committed else 0)
        if deadly % 2:
            killed(lambda: train(tmp_path, slowed=0.15), after=rng.uniform(0.05, 0.4))
            outside += 1
    assert max(left) == 1  # each start clears away what the one before left
    assert stood == sorted(stood)
    assert stood[-1] < STEPS
    train(tmp_path)
    assert outcome(tmp_path) == expected
    assert scratches(prefix) == []
    with capsys.disabled():
        print(f"\ntraining: {inside} kills inside a save, {outside} elsewhere: losses and checkpoint bit for bit")


def damage(path: Path, kind: str, rng: random.Random) -> None:
    data = bytearray(path.read_bytes())
    if kind == "deleted":
        path.unlink()
    elif kind == "cut":
        path.write_bytes(data[: rng.randrange(len(data))])
    else:
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        path.write_bytes(data)


@pytest.fixture(scope="module")
def half(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("half")


@pytest.mark.parametrize("kind", ["flipped", "cut", "deleted"])
@pytest.mark.parametrize("file", FILES)
def test_a_damaged_file_of_the_newest_checkpoint_is_named_and_the_one_before_leads_to_the_same_bits(
    train, expected, half, tmp_path, file, kind
):
    if not (half / "runs").exists():  # two checkpoints, of steps 8 and 12; the save of step 16 is killed
        killed(lambda: train(half, 4 + 4 + 8 + 1))
    root = tmp_path / "root"
    shutil.copytree(half, root)
    newest = root / "runs/run/checkpoints/step-00000012"
    assert CheckpointStore(run_of(root)).committed() == [8, 12]
    damage(newest / file, kind, random.Random(file + kind))
    refused: list[CheckpointError] = []
    train(root, on_damage=refused.append)
    if (file, kind) != ("manifest.json", "deleted"):  # then there is no such checkpoint
        assert [error.place for error in refused] == [str(newest / file)]
    assert outcome(root) == expected


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[tuple[Path, Callable[[int], None]]]:
    """A disk of its own, and what sets its size in bytes."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if os.geteuid() or subprocess.run(["mount", "-t", "tmpfs", "tmpfs", folder], check=False).returncode:
        pytest.skip("nothing can be mounted here")
    try:
        yield folder, lambda size: subprocess.run(["mount", "-o", f"remount,size={size}", folder], check=True)
    finally:
        subprocess.run(["umount", "-l", folder], check=True)


def test_a_disk_that_fills_up_in_a_save_costs_that_save_alone(train, expected, whole, small_disk):
    root, resize = small_disk
    of_one = sum(path.stat().st_size for path in (whole / "runs/run/checkpoints/step-00000024").iterdir())
    of_corpus = sum(path.stat().st_size for path in (whole / "corpora").rglob("*"))
    resize(of_corpus + int(2.6 * of_one) + 200_000)  # a third checkpoint finds no room, and two are kept
    with pytest.raises(DataError, match="No space left on device") as full:
        train(root)
    assert full.value.exit_code == 3
    assert "\n" not in str(full.value)
    assert len(losses(run_of(root))) == STEPS  # it had gone on to its last step, whose checkpoint it must not lose
    assert CheckpointStore(run_of(root)).committed() == [4, 8]
    assert sorted(os.listdir(root / "runs/run/checkpoints")) == ["step-00000004", "step-00000008"]  # nothing of others
    resize(1 << 28)
    train(root)
    assert outcome(root) == expected
