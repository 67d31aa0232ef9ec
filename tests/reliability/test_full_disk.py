"""A disk that is full ends a run in one line; what is there is whole, and with more room the run ends as any other."""

import hashlib
import json
import os
import random
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from conftest import small_recipe
from survival import DLLM, hashes, temporaries, write_corpus, write_recipe

from dllm_core.errors import DataError
from dllm_core.storage.store import LocalStore
from workflows.fan_out import serially
from workflows.preprocess.flow import Preprocessing, plan_corpus
from workflows.recipe import Recipe

PAGE = 4096
Resize = Callable[[int], None]


@pytest.fixture
def disk(tmp_path) -> Iterator[tuple[Path, Resize]]:
    """A disk of its own, mounted at `tmp_path/disk`, and what sets its size in bytes."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if os.geteuid() or subprocess.run(["mount", "-t", "tmpfs", "tmpfs", folder], check=False).returncode:
        pytest.skip("nothing can be mounted here")

    def resize(num_bytes: int) -> None:
        subprocess.run(["mount", "-o", f"remount,size={num_bytes // PAGE * PAGE}", folder], check=True)

    try:
        yield folder, resize
    finally:
        subprocess.run(["umount", "-l", folder], check=True)


def recipe_in(root: Path, storage: Path, **sections: object) -> Recipe:
    return small_recipe(root, storage={"root": str(storage)}, corpus={"dedup": {}}, noise={"epochs": 1}, **sections)


def preprocess(recipe: Recipe) -> None:
    Preprocessing(plan_corpus(recipe, LocalStore(Path(recipe.storage.root))), serially).run()


def assert_whole(storage: Path) -> None:
    """What a receipt vouches for is there with its sha256, and nothing else of a name that is not temporary is cut."""
    for folder in (storage / "corpora").glob("*"):
        for path in folder.rglob("receipts/**/*.json"):
            receipt = json.loads(path.read_bytes())
            for part in ("shard", "train", "heldout"):
                if part in receipt and receipt[part]["rows"]:
                    data = (folder / receipt[part]["key"]).read_bytes()
                    assert hashlib.sha256(data).hexdigest() == receipt[part]["sha256"]
        assert not (folder / "manifest.json").exists()
    assert temporaries(storage) == []


def num_pages(folder: Path) -> int:
    """What the files below a folder take."""
    return sum(-(-path.stat().st_size // PAGE) for path in folder.rglob("*") if path.is_file())


def ended(words: list[str | Path]) -> tuple[int, str]:
    told = subprocess.run(words, capture_output=True, text=True, check=False)
    return told.returncode, told.stderr


def test_a_disk_that_fills_up_at_any_moment_ends_in_one_line_and_costs_nothing_that_is_done(tmp_path, disk):
    write_corpus(tmp_path, 20_000)
    preprocess(recipe_in(tmp_path, tmp_path / "alone"))
    expected = hashes(tmp_path / "alone")
    storage, resize = disk
    recipe = recipe_in(tmp_path, storage)
    for size in sorted(random.Random(1).sample(range(4, num_pages(tmp_path / "alone")), 12)):
        resize(size * PAGE)
        with pytest.raises(DataError, match=r"cannot write \(No space left on device\): free some space") as caught:
            preprocess(recipe)
        assert caught.value.exit_code == 3
        assert_whole(storage)
        assert hashes(storage).items() <= expected.items()
    resize(1 << 26)
    preprocess(recipe)
    assert hashes(storage) == expected


@pytest.mark.long
def test_the_verb_on_a_disk_that_fills_up_ends_in_one_line_with_exit_3_and_goes_on_when_there_is_room(tmp_path, disk):
    write_corpus(tmp_path, 100_000)
    preprocess(recipe_in(tmp_path, tmp_path / "alone"))
    expected = hashes(tmp_path / "alone")
    storage, resize = disk
    words = [*DLLM, "preprocess", "run", write_recipe(tmp_path / "full.yaml", recipe_in(tmp_path, storage))]
    pages = num_pages(tmp_path / "alone")
    lines = []
    for share in (0, 0.1, 0.4, 0.7, 0.95):
        resize(int(2 + share * pages) * PAGE)
        code, line = ended(words)
        assert (code, line.count("\n")) == (3, 1), line
        assert line.startswith("dllm: ")
        assert_whole(storage)
        lines.append(line)
    resize(1 << 26)
    code, line = ended(words)
    assert (code, line) == (0, "")
    assert {key: value for key, value in hashes(storage).items() if key.startswith("corpora/")} == expected
    print(f"\nfull disk: {len(lines)} ends with exit 3 in one line, then {len(expected)} files equal; the last line:")
    print(lines[-1].strip())
