"""What these tests share: a corpus of many small units, drivers that are real processes, and what they left on disk.

python tests/reliability/survival.py RECIPE   preprocesses in one process; a line of progress for each task
"""

import hashlib
import os
import subprocess
import sys
import uuid
from pathlib import Path
from typing import Any

import psutil

from dllm_core.checkpoints.run_dir import RunDir
from dllm_core.checkpoints.store import CheckpointStore

SERIAL = [sys.executable, str(Path(__file__))]
DLLM = [sys.executable, "-m", "workflows"]
MARK = "DLLM_TEST_MARK"
BAD_BYTES = b"\xff\xfe no text"


def write_corpus(root: Path, num_bytes: int) -> Path:
    """`root/corpus`: paragraphs, of which every 25th comes again later and 1 in 400 is no text."""
    folder = root / "corpus"
    folder.mkdir(parents=True)
    blocks: list[bytes] = []
    size = 0
    while size < num_bytes:
        i = len(blocks)
        text = "\n".join(f"paragraph {i} line {j} {hashlib.sha256(b'%d %d' % (i, j)).hexdigest()}" for j in range(2))
        block = BAD_BYTES if i % 400 == 399 else blocks[i // 2] if i % 25 == 24 else text.encode()
        blocks.append(block)
        size += len(block) + 2
    (folder / "a.txt").write_bytes(b"\n\n".join(blocks) + b"\n")
    return folder


def write_recipe(path: Path, recipe: Any) -> Path:
    """The recipe's file."""
    path.write_text(recipe.to_yaml(), encoding="utf-8")
    return path


def start(words: list[str | Path], **environment: str) -> tuple[subprocess.Popen[str], str]:
    """A driver in a group of its own; the mark finds all that it starts."""
    mark = uuid.uuid4().hex
    driver = subprocess.Popen(
        [str(word) for word in words],
        env={**os.environ, MARK: mark, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    return driver, mark


def marked(mark: str) -> list[psutil.Process]:
    """Every process that a driver started, also those that have lost their parent."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get(MARK) == mark and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except (psutil.Error, OSError):
            continue
    return found


def kill_all(driver: subprocess.Popen[str], mark: str) -> None:
    """SIGKILL to a driver and to all that it started; nothing stays behind."""
    driver.kill()
    while left := marked(mark):
        for process in left:
            try:
                process.kill()
            except psutil.NoSuchProcess:
                continue
        psutil.wait_procs(left, timeout=5)
    driver.communicate()


def corpus_folder(storage: Path) -> Path:
    """The one corpus below a storage root."""
    [folder] = (storage / "corpora").iterdir()
    return folder


def is_temporary(path: Path) -> bool:
    """A file that a kill left before it was renamed: no object of the store."""
    return path.name.startswith(".") and ".tmp-" in path.name


def hashes(folder: Path) -> dict[str, str]:
    """sha256 of every object below a folder, by its key."""
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and not is_temporary(path)
    }


def checkpoint_bits(run: RunDir, step: int) -> dict[str, str]:
    """sha256 of each file of tensors in a checkpoint that is as its manifest says."""
    checkpoint = CheckpointStore(run).at(step)
    return {name: entry.sha256 for name, entry in checkpoint.manifest.files.items()}


def temporaries(folder: Path) -> list[Path]:
    """What was never renamed."""
    return [path for path in folder.rglob("*") if path.is_file() and is_temporary(path)]


def main(recipe_path: str) -> int:
    """The preprocessing in this process; exit code and line as the command line gives them."""
    from dllm_core.errors import DllmError
    from dllm_core.storage.store import open_store
    from workflows.fan_out import serially
    from workflows.preprocess.flow import Preprocessing, plan_corpus
    from workflows.recipe import load_recipe

    try:
        recipe = load_recipe(Path(recipe_path))
        plan = plan_corpus(recipe, open_store("storage.root", recipe.storage.root))
        work = Preprocessing(plan, serially, lambda what, done, total: print(done, flush=True))
        work.run()
    except DllmError as error:
        sys.stderr.write(f"dllm: {error}\n")
        return error.exit_code
    print(f"peak {peak_kib()}")
    return 0


def peak_kib() -> int:
    """The most memory that this process has held. Not getrusage: that starts from the memory of who forked it."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:"))


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
