"""Memory follows the size of a unit, never that of the corpus."""

import random
import subprocess
from pathlib import Path

import pytest
from conftest import small_recipe
from survival import SERIAL, write_recipe

WORDS = [f"w{i:x}" for i in range(3000)]


def peak_mib(root: Path, num_bytes: int, unit_bytes: int, line_bytes: int, *, has_new_words: bool = False) -> float:
    """The peak of a process of its own that preprocesses so much text in units of one size, a document a line.

    The tokenizer remembers words, up to 200 MiB of them: with few words it is full at once, with ever new ones late.
    """
    (root / "corpus").mkdir(parents=True)
    rng, width = random.Random(1), line_bytes - 1
    with (root / "corpus" / "a.txt").open("w") as file:
        for i in range(num_bytes // line_bytes):
            text = f"{i} {i * i:x}" if has_new_words else " ".join(rng.choices(WORDS, k=width // 5))
            file.write(f"{text[:width]:<{width}}\n")
    section = {"document": "line", "unit_bytes": unit_bytes}
    tokenizer = {"vocab_size": 300, "train_bytes": unit_bytes}
    recipe = small_recipe(root, corpus=section, tokenizer=tokenizer, packing={"seq_len": 256}, noise={"epochs": 1})
    words = [*SERIAL, write_recipe(root / "recipe.yaml", recipe)]
    told = subprocess.run(words, capture_output=True, text=True, check=True).stdout
    return int(told.splitlines()[-1].removeprefix("peak ")) / 1024


def test_sixteen_times_the_text_takes_no_more_memory(tmp_path):
    once, more = (peak_mib(tmp_path / str(n), n << 18, 1 << 18, line_bytes=25) for n in (1, 16))
    assert more < 1.1 * once


@pytest.mark.long
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("has_new_words", [False, True], ids=["few words", "new words"])
def test_a_hundred_times_the_text_takes_no_more_memory(tmp_path, has_new_words):
    def peak(n: int) -> float:
        return peak_mib(tmp_path / str(n), n * 2_000_000, 1 << 20, line_bytes=100, has_new_words=has_new_words)

    peaks = {n: peak(n) for n in (1, 10, 100)}
    told = ", ".join(f"{n * 2} MB {peak:.0f} MiB" for n, peak in peaks.items())
    print(f"\npeak memory of driver and task in one process: {told}")
    assert max(peaks.values()) < 1.1 * peaks[1] + (250 if has_new_words else 0)
