"""Decoding against the machine's own limits: how near a step comes to reading the weights once, a batch to its FLOPs.

    python tests/benchmarks/roofline.py [--shape 8b] [--batches 1,2,4,8,16,32,64] [--steps 32,16,8,4,2]

One JSON line. The weights are random, of LLaDA-8B's shape on a GPU and 110 M on a CPU; the commits follow a fixed
schedule, blocks of 32 in --steps calls each. Limits are measured in the same run: bytes a second of a sum over a large
array, FLOP a second of a large product. A block step is a call of the dual cache that computes its block alone, and its
time a tick's, host and all; shares are of the median. FLOPs are 2 a weight and position, attention's left out.
--batches, in 8 steps a block: latency and tokens a second as rows are added; --steps, one row: as tokens a call are.
"""

import argparse
import statistics
import sys
import time

import numpy as np
import torch
from figures import tell
from random_model import BASE, BASE_VOCABULARY, random_denoiser

from dllm_core.decoding.config import DecodeConfig
from dllm_core.decoding.engine import Engine
from dllm_core.decoding.request import Request
from dllm_core.decoding.unmask import LowConfidencePolicy
from dllm_core.model.config import ModelConfig
from dllm_core.noise.absorbing import AbsorbingProcess
from dllm_core.training.loop import measure_peak_flops

BLOCK, STEPS = 32, 8
SHAPES = {
    "8b": (ModelConfig(dim=4096, layers=32, heads=32, ffn_dim=12288, tie_embeddings=False), 126464),
    "100m": (BASE, BASE_VOCABULARY),
}


def bandwidth_of(device: torch.device, rounds: int = 5) -> float:
    """Bytes a second that this device is seen to read."""
    many, found = torch.ones(1 << (29 if device.type == "cuda" else 26), device=device), []
    for _ in range(rounds + 1):
        begun = time.perf_counter()
        float(many.sum())
        found.append(time.perf_counter() - begun)
    return many.nbytes / min(found[1:])


def decoded(engine: Engine, batch: int, steps: int, prompt: int, length: int) -> list[float]:
    """Seconds of each tick of so many rows of one length, which so walk in step."""
    rng = np.random.default_rng(0)
    config = DecodeConfig(
        policy=LowConfidencePolicy(), block_length=BLOCK, steps_per_block=steps, max_tokens=length, cache="dual"
    )
    for _ in range(batch):
        engine.add(Request(tuple(map(int, rng.integers(3, engine.denoiser.config.vocab_size, prompt))), config))
    found = []
    while engine.num_active or engine.num_waiting:
        begun = time.perf_counter()
        engine.step()
        found.append(time.perf_counter() - begun)
    return found


def main() -> None:
    is_gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser()
    parser.add_argument("--shape", choices=list(SHAPES), default="8b" if is_gpu else "100m")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="bfloat16" if is_gpu else "float32")
    parser.add_argument("--batches", default="1,2,4,8,16,32,64" if is_gpu else "1,2,4,8")
    parser.add_argument("--steps", default="32,16,8,4,2")
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--prompt", type=int, default=32)
    parser.add_argument("--plain", action="store_true", help="without torch.compile")
    options = parser.parse_args()
    device, dtype = torch.device("cuda" if is_gpu else "cpu"), getattr(torch, options.dtype)
    bandwidth, flops = bandwidth_of(device), measure_peak_flops(dtype, device)
    denoiser = random_denoiser(*SHAPES[options.shape], options.prompt + options.length, dtype, device)
    # An embedding is looked up: of its table hardly anything is read, and nothing multiplied.
    weights = sum(p.numel() for p in denoiser.parameters()) - denoiser.embed.weight.numel()
    once = weights * denoiser.head.weight.element_size() / bandwidth

    def measured(batch: int, steps: int) -> dict[str, float]:
        most = 1 << 20
        engine = Engine.over(denoiser, AbsorbingProcess(mask_id=0), most, max_rows=batch, compiles=not options.plain)
        for _ in range(4 if is_gpu else 2):  # in the first what is compiled and recorded is so
            seconds = decoded(engine, batch, steps, options.prompt, options.length)
        inner = statistics.median(part for i, part in enumerate(seconds) if i % steps)
        return {
            "batch": batch,
            "tokens_per_call": BLOCK / steps,
            "block_step_ms": round(1000 * inner, 3),
            "whole_step_ms": round(1000 * statistics.median(seconds[::steps]), 3),
            "share_of_bandwidth": round(once / inner, 3),
            "share_of_flops": round(2 * weights * batch * BLOCK / inner / flops, 3),
            "latency_s": round(sum(seconds), 3),
            "tokens_per_s": round(batch * options.length / sum(seconds), 1),
        }

    over_batch = [measured(batch, STEPS) for batch in map(int, options.batches.split(","))]
    over_calls = [measured(1, steps) for steps in map(int, options.steps.split(","))]
    recorder = denoiser.recorder
    tell(
        "roofline",
        shape=options.shape,
        parameters=sum(p.numel() for p in denoiser.parameters()),
        dtype=options.dtype,
        device=torch.cuda.get_device_name(device) if is_gpu else "cpu",
        length=options.length,
        prompt=options.prompt,
        limit_gb_per_s=round(bandwidth / 1e9, 1),
        limit_tflop_per_s=round(flops / 1e12, 3),
        recorded=None if recorder is None else {"ways": recorder.ways, "shapes": len(recorder.held)},
        over_batch=over_batch,
        over_tokens_per_call=over_calls,
    )


if __name__ == "__main__":
    sys.exit(main())
