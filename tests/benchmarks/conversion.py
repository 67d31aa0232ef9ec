"""What an autoregressive start is worth to a model of masks, and what shift, warm-up and noise on masks add to it.

    python tests/benchmarks/conversion.py [--base-steps 2400] [--steps 400] [--learning-rate 3e-3] [--draws 8]

One JSON line. A small autoregressive model learns the standard library's sources for `base-steps`; from it, and from
nothing, models of masks over whole rows are trained for `steps`, each with the same rows, noise and rates. All are
scored on the same held-out rows with the same draws: nats a token with its standard error, and for each variant its
distance from the plain conversion (`shifted`), whose error is that of paired rows. `scratch_long` has all steps alone.
"""

import argparse
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from figures import tell

sys.path += [str(Path(__file__).parents[1])]
from starts import Prepared

from dllm_core.checkpoints.bundle import read_bundle
from dllm_core.data.loader import evenly, split_rows
from dllm_core.estimate import ratio
from dllm_core.evaluation.estimators import Draw, HeldoutRows, estimator_of

CPU, ROWS = torch.device("cpu"), 1024
MODEL = {
    "tokenizer": {"vocab_size": 1024, "train_bytes": 4 << 20},
    "model": {"dim": 64, "layers": 3, "heads": 4, "ffn_dim": 192, "rope_theta": 1000},
}


def values_of(root: Path, name: str, steps: int, rate: float, **sections: Any) -> dict[str, Any]:
    train = {"steps": steps, "batch_rows": 16, "precision": "fp32", "warmup_steps": 20, "learning_rate": rate}
    train |= {"schedule": "cosine", "ema_decay": 0, "checkpoint_every": 1 << 30, "heldout_every": None}
    given = {"name": name, "seed": 1, "storage": {"root": str(root)}, "train": train, "packing": {"seq_len": 64}}
    corpus = {"type": "text", "path": "python:stdlib", "glob": "**/*s.py", "document": "file"}
    return {**given, "corpus": corpus, "noise": {"epochs": 0}, "objective": {"max_weight": 5}, **sections}


def scored(prepared: Prepared, draws: int) -> tuple[np.ndarray, np.ndarray]:
    """Nats and counted tokens of each held-out row, by the trained run's bundle."""
    bundle, manifest = read_bundle(prepared.trained()), prepared.manifest
    estimator = estimator_of(bundle.manifest.objective, bundle.process, CPU)
    ids, denoiser = evenly(np.arange(manifest.heldout.rows), ROWS), bundle.denoiser()
    nats, counted = [], []
    for some in np.array_split(ids, 32):
        rows = HeldoutRows.of(split_rows(prepared.run.store, manifest, manifest.heldout, some), some)
        with torch.inference_mode():
            nats.append(np.mean([estimator.nats(denoiser, rows, Draw(1, k)) for k in range(draws)], axis=0))
        counted.append(rows.counted.sum(1))
    return np.concatenate(nats), np.concatenate(counted)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--base-steps", type=int, default=2400)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--learning-rate", type=float, default=3e-3)
    parser.add_argument("--draws", type=int, default=8)
    options = parser.parse_args()
    torch.set_num_threads(1)
    tenth = options.steps // 10
    warmup = {"max_weight": 5, "block_warmup": [{"block_length": n, "steps": tenth} for n in (1, 4, 16)]}
    noise = {"mask_noise": {"std": 0.5, "steps": options.steps // 4}}
    with tempfile.TemporaryDirectory() as scratch:
        root = Path(scratch)
        base = values_of(root, "base", options.base_steps, 3e-3, objective={"type": "autoregressive"}, **MODEL)
        start = Prepared(base)
        scores = {"autoregressive": scored(start, 1)}
        begun = {"run": start.run.url}
        variants: dict[str, tuple[int, dict[str, Any]]] = {
            "scratch": (options.steps, MODEL),
            "scratch_long": (options.base_steps + options.steps, MODEL),
            "shifted": (options.steps, {"start": begun}),
            "unshifted": (options.steps, {"start": begun, "model": {"shifted": False}}),
            "warm_up": (options.steps, {"start": begun, "objective": warmup}),
            "mask_noise": (options.steps, {"start": {**begun, **noise}}),
        }
        for name, (steps, sections) in variants.items():
            rate = 3e-3 if "start" not in sections else options.learning_rate
            scores[name] = scored(Prepared(values_of(root, name, steps, rate, **sections)), options.draws)
    nats, against = {}, {}
    for name, (row, counted) in scores.items():
        nats[name] = _shown(ratio(row, counted))
        if name not in ("autoregressive", "shifted"):
            against[name] = _shown(ratio(row - scores["shifted"][0], counted))
    told = {name: getattr(options, name) for name in ("base_steps", "steps", "learning_rate", "draws")}
    tell("conversion", **told, nats_per_token=nats, above_shifted=against)


def _shown(found: Any) -> list[float]:
    return [round(float(found.value), 3), round(float(found.standard_error), 3)]


if __name__ == "__main__":
    sys.exit(main())
