"""A training step as it is shipped, against the same model in a bare PyTorch loop, on cores that are held apart.

    python tests/benchmarks/train.py [--steps 120] [--rounds 3] [--dim 128] [--layers 4] [--seq-len 64] [--rows 32]

One JSON line. `of_bare`: tokens a second of one DeepSpeed worker (ZeRO 2) with loader, logs, held-out scores and
checkpoints at their defaults, over those of a loop that has its batches in memory and does nothing but loss, backward,
clipping and AdamW; both on core 0 with one thread, in turns; the median of the rounds' ratios, and each of them, for a
shared machine changes its pace from one minute to the next. `workers_2`: tokens a second of two such workers on two
cores over one. `data_wait` and `save_wait`: shares of the time of the one worker. Steps of the warm-up do not
count: the records' own clock tells the rest. bf16 where the machine has it, in all of them.
"""

import argparse
import os
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

import torch
from figures import tell
from torch import multiprocessing, nn

from dllm_core.checkpoints.run_dir import JsonLines, RunDir
from dllm_core.data.loader import Loader
from dllm_core.data.manifest import read_manifest, read_tokenizer
from dllm_core.model.denoiser import Denoiser
from dllm_core.objective.build import new_objective
from dllm_core.storage.store import LocalStore
from dllm_core.training.backend import new_optimizer, resolve_precision
from workflows.fan_out import serially
from workflows.preprocess.flow import Preprocessing, plan_corpus
from workflows.recipe import Recipe
from workflows.train.job import denoiser_config
from workflows.train.session import METRICS, MetricsLog, Silence, open_session

CPU, WARM_UP = torch.device("cpu"), 20


def recipe_of(root: str, options: argparse.Namespace) -> Recipe:
    """The quickstart's, to other sizes."""
    return Recipe.checked(
        {
            "name": "train",
            "storage": {"root": root},
            "corpus": {"type": "text", "path": "python:unicode-names", "document": "paragraph"},
            "tokenizer": {"vocab_size": options.vocab},
            "packing": {"seq_len": options.seq_len},
            "noise": {"epochs": 2},
            "model": {"dim": options.dim, "layers": options.layers, "heads": 8, "ffn_dim": 3 * options.dim},
            "objective": {"max_weight": 5},
            "train": {
                "steps": options.steps + WARM_UP,
                "batch_rows": options.rows,
                "log_every": WARM_UP,
                "zero_stage": 2,
                "checkpoint_every": options.checkpoint_every,
            },
            "decode": {"max_tokens": 16},
        },
        "recipe",
    )


def hold(core: int) -> None:
    """One thread on one core."""
    os.sched_setaffinity(0, {core})
    torch.set_num_threads(1)


def bare(recipe: Recipe, corpus: str, told: Any) -> None:
    """Tokens a second of the loop without anything else."""
    hold(0)
    store = LocalStore(Path(recipe.storage.root))
    manifest = read_manifest(store, corpus)
    tokenizer = read_tokenizer(store, manifest)
    config, train = denoiser_config(recipe, manifest, tokenizer), recipe.train
    torch.manual_seed(recipe.seed)
    module = Denoiser(config)
    process = manifest.process.bind(tokenizer.mask_id, manifest.vocab_size)
    objective = new_objective(recipe.objective, config, process, CPU, seed=recipe.seed, t_min=manifest.t_min)
    loader = Loader.open(store, manifest, tokenizer.mask_id)
    batches = [loader.batch(step * train.batch_rows, train.batch_rows) for step in range(train.steps)]
    optimizer, precision = new_optimizer(module, train), resolve_precision(train.precision, CPU)
    for step, batch in enumerate(batches):
        if step == WARM_UP:
            begun = time.perf_counter()
        with torch.autocast("cpu", precision, enabled=precision is not torch.float32):
            loss = objective.loss(module, batch)
        (loss.nats / loss.divisor).backward()
        nn.utils.clip_grad_norm_(module.parameters(), train.clip_norm)
        optimizer.step()
        optimizer.zero_grad()
    told.put((train.steps - WARM_UP) * train.batch_rows * manifest.seq_len / (time.perf_counter() - begun))


def shipped(rank: int, world_size: int, recipe: Recipe, corpus: str, name: str, told: Any) -> None:
    """The records of a worker as Ray Train starts it, but for Ray."""
    hold(rank)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size), MASTER_ADDR="127.0.0.1")
    from dllm_core.training.deepspeed_backend import DeepSpeedBackend

    run = RunDir(LocalStore(Path(recipe.storage.root)), name)
    meeting = f"file://{recipe.storage.root}/{name}.rendezvous"
    torch.distributed.init_process_group("gloo", init_method=meeting, rank=rank, world_size=world_size)
    open_session(
        recipe,
        run,
        read_manifest(run.store, corpus),
        CPU,
        backend=DeepSpeedBackend,
        events_of=lambda step: Silence() if rank else MetricsLog(run, step),
        on_damage=lambda error: None,
    ).run()
    if rank == 0:
        told.put(JsonLines(run, METRICS).read())
        time.sleep(0.5)  # the queue's thread
    os._exit(0)  # gloo's threads sometimes abort at the interpreter's own end


def figures_of(records: list[dict[str, Any]]) -> dict[str, float]:
    """Of the records behind the warm-up."""
    first, rest = records[0], records[1:]
    seconds = [b["seconds"] - a["seconds"] for a, b in zip(records, rest, strict=False)]
    shares = {
        name: sum(r[name] * s for r, s in zip(rest, seconds, strict=True)) / sum(seconds)
        for name in ("data_wait", "save_wait")
    }
    return {"rate": (rest[-1]["tokens"] - first["tokens"]) / sum(seconds), **shares}


def main() -> None:
    parser = argparse.ArgumentParser()
    sizes = {"steps": 120, "rounds": 3, "dim": 128, "layers": 4, "seq-len": 64, "rows": 32, "vocab": 1024}
    for name, default in {**sizes, "checkpoint-every": 200}.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    options = parser.parse_args()
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as root:
        recipe = recipe_of(root, options)
        corpus = Preprocessing(plan_corpus(recipe, LocalStore(Path(root))), serially).run().fingerprint
        found: dict[str, list[Any]] = {"bare": [], "1": [], "2": []}
        for turn in range(options.rounds):
            for kind in found:
                told = context.Queue()
                if kind == "bare":
                    ranks = [context.Process(target=bare, args=(recipe, corpus, told))]
                else:
                    given = (int(kind), recipe, corpus, f"{turn}-{kind}", told)
                    ranks = [context.Process(target=shipped, args=(rank, *given)) for rank in range(int(kind))]
                for process in ranks:
                    process.start()
                found[kind].append(told.get(timeout=600))
                for process in ranks:
                    process.join()
    ours = {kind: [figures_of(records) for records in found[kind]] for kind in ("1", "2")}
    rates = {"bare": found["bare"], **{kind: [part["rate"] for part in parts] for kind, parts in ours.items()}}
    of_bare = [one / bare for one, bare in zip(rates["1"], rates["bare"], strict=True)]
    workers_2 = [two / one for two, one in zip(rates["2"], rates["1"], strict=True)]
    tell(
        "train",
        **vars(options),
        of_bare=round(median(of_bare), 3),
        workers_2=round(median(workers_2), 3),
        data_wait=round(median(part["data_wait"] for part in ours["1"]), 4),
        save_wait=round(median(part["save_wait"] for part in ours["1"]), 4),
        each_of_bare=[round(ratio, 3) for ratio in of_bare],
        each_workers_2=[round(ratio, 3) for ratio in workers_2],
        tokens_per_s={kind: round(median(values)) for kind, values in rates.items()},
    )


if __name__ == "__main__":
    sys.exit(main())
