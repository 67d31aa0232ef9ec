"""Training batches from mapped shards on one core, against Hugging Face `datasets` reading the same rows.

    python tests/benchmarks/loader.py [--seq-len 1024] [--rows 64] [--seconds 3]

One JSON line: million tokens a second of whole batches (ids, noised ids, times, loss mask) with written noise and with
computed noise; of `datasets`, which gives the ids alone, in the same shuffled order; and the ratio of the first to the
last. The corpus is the standard library's sources.
"""

import argparse
import os
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

os.environ.update(RAYON_NUM_THREADS="1", FASTOKENS_BPE_THREADS="1", TOKENIZERS_PARALLELISM="false", OMP_NUM_THREADS="1")

import datasets
import numpy as np
import pyarrow as pa
import torch
from figures import tell

from dllm_core.data.loader import Loader, corpus_noise
from dllm_core.data.manifest import corpus_prefix, read_tokenizer
from dllm_core.data.order import SampleOrder
from dllm_core.storage.store import LocalStore
from workflows.fan_out import serially
from workflows.preprocess.flow import Preprocessing, plan_corpus
from workflows.recipe import Recipe


def rate(function, tokens: int, seconds: float) -> float:
    """Million tokens a second: the median of single calls, so that a neighbour's burst does not count."""
    function(0)
    times: list[float] = []
    begun = time.perf_counter()
    while time.perf_counter() - begun < seconds:
        at = time.perf_counter()
        function(len(times) + 1)
        times.append(time.perf_counter() - at)
    return tokens / sorted(times)[len(times) // 2] / 1e6


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--seq-len", type=int, default=1024)
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=3.0)
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as scratch:
        recipe = Recipe.checked(
            {
                "name": "loader",
                "corpus": {"type": "text", "path": "python:stdlib", "glob": "**/*.py"},
                "tokenizer": {"vocab_size": 8192, "train_bytes": 1 << 21},
                "packing": {"seq_len": options.seq_len},
                "noise": {"epochs": 1},
                "storage": {"root": scratch},
            },
            "recipe",
        )
        store = LocalStore(Path(scratch))
        manifest = Preprocessing(plan_corpus(recipe, store), serially).run()
        mask_id = read_tokenizer(store, manifest).mask_id
        written = Loader.open(store, manifest, mask_id)
        unwritten = manifest.model_copy(update={"noise_epochs": ()})
        computed = Loader(store, unwritten, corpus_noise(unwritten, mask_id))
        prefix = corpus_prefix(manifest.fingerprint)
        batches = manifest.train.rows // options.rows
        tokens = options.rows * options.seq_len

        def batch(loader: Loader, step: int) -> None:
            made = loader.batch(step % batches * options.rows, options.rows)
            assert torch.from_numpy(made.xt).data_ptr() == made.xt.ctypes.data

        for step in range(batches):  # every shard is mapped and checked once, as in an epoch's first steps
            batch(written, step)
        mapped = [pa.memory_map(str(store.path(f"{prefix}/{shard.key}"))) for shard in manifest.train.shards]
        table = pa.concat_tables([pa.ipc.open_file(file).read_all().replace_schema_metadata(None) for file in mapped])
        rival = datasets.Dataset(table.select(["ids"])).with_format("torch")
        order = SampleOrder(recipe.seed, manifest.train.rows)

        def rows_of(step: int) -> torch.Tensor:
            rows = step % batches * options.rows + np.arange(options.rows)
            return rival[order.sample(0, rows)]["ids"]

        assert torch.equal(rows_of(0).long(), torch.from_numpy(written.batch(0, options.rows).x0))
        figures = {
            "written": rate(partial(batch, written), tokens, options.seconds),
            "computed": rate(partial(batch, computed), tokens, options.seconds),
            "datasets": rate(rows_of, tokens, options.seconds),
        }
        told = {
            "seq_len": options.seq_len,
            "rows": options.rows,
            **{f"mtokens_per_s_{name}": round(value, 1) for name, value in figures.items()},
            "ratio": round(figures["written"] / figures["datasets"], 2),
        }
        tell("loader", **told)


if __name__ == "__main__":
    sys.exit(main())
