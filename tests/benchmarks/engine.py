"""The decoding engine against a plain loop, and against itself: one JSON line of ratios, positions and calls.

    python tests/benchmarks/engine.py [--run RUN] [--dtype bfloat16] [--rounds 3] [--threads 2]

The rival is the loop of public reference decoders: the whole canvas through the network for every token, full logits,
one row at a time. Without --run the weights are random, 110 M of them, and the commits a fixed schedule: blocks of
32 in 8 calls, 4 tokens each, as a threshold gives trained ones. With --run they are those of a trained run, and the
policy is a confidence threshold; lengths are what its context has room for. Settings alternate within a round, and
each one's best round counts, so that a neighbour's burst does not. The overhead is the share of the time outside the
denoiser's forward.
"""

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import torch
from figures import tell
from random_model import BASE, BASE_VOCABULARY, random_denoiser

from dllm_core.checkpoints.bundle import read_bundle
from dllm_core.checkpoints.run_dir import RunDir
from dllm_core.decoding.config import AnyPolicy, DecodeConfig
from dllm_core.decoding.engine import Engine
from dllm_core.decoding.request import Request
from dllm_core.decoding.unmask import LowConfidencePolicy, ThresholdPolicy
from dllm_core.model.denoiser import Denoiser
from dllm_core.noise.absorbing import AbsorbingProcess

BLOCK, STEPS = 32, 8
MAX_BATCH_TOKENS = 16384
_PLAIN_CALLS = 32  # of the rival that are timed


@torch.inference_mode()
def plain_loop(denoiser: Denoiser, prompt: Sequence[int], length: int, calls: int) -> list[int]:
    """One token a call: the surest of all masked positions, the end token's never. Every call costs the same."""
    config = denoiser.config
    ids = torch.tensor([[*prompt, *[config.mask_id] * length]])
    is_real = torch.ones_like(ids, dtype=torch.bool)
    for _ in range(calls):
        logits = denoiser(ids, is_real)[0].float()
        logits[:, [config.mask_id, config.eos_id, config.pad_id]] = -torch.inf
        sure, tokens = logits.softmax(-1).max(-1)
        at = int(sure.masked_fill(ids[0] != config.mask_id, -1.0).argmax())
        ids[0, at] = tokens[at]
    return ids[ids != config.mask_id].tolist()[len(prompt) :]


class Bench:
    """Timed settings by name: the best round's tokens a second, and what a decode took."""

    def __init__(self, denoiser: Denoiser, policy: AnyPolicy, rounds: int) -> None:
        self._denoiser, self._policy, self._rounds = denoiser, policy, rounds
        self._settings: dict[str, Callable[[], tuple[int, dict[str, float]]]] = {}
        self.rates: dict[str, float] = {}
        self.costs: dict[str, dict[str, float]] = {}

    def config(self, length: int, cache: str) -> DecodeConfig:
        return DecodeConfig(
            policy=self._policy, block_length=BLOCK, steps_per_block=STEPS, max_tokens=length, cache=cache
        )

    def loop(self, name: str, prompt: Sequence[int], length: int) -> None:
        def setting() -> tuple[int, dict[str, float]]:
            made = plain_loop(self._denoiser, prompt, length, min(_PLAIN_CALLS, length))
            return len(made), {"calls": len(made), "positions": len(made) * (len(prompt) + length)}

        self._settings[name] = setting

    def engine(self, name: str, requests: Sequence[Request], together: bool = True) -> None:
        def setting() -> tuple[int, dict[str, float]]:
            engine = Engine.over(
                self._denoiser, AbsorbingProcess(mask_id=self._denoiser.config.mask_id), MAX_BATCH_TOKENS
            )
            inside, begun = 0.0, time.perf_counter()
            forwards = {name: getattr(self._denoiser, name) for name in ("forward", "together")}

            def timed(forward: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
                def called(*given: object, **options: object) -> torch.Tensor:
                    nonlocal inside
                    start = time.perf_counter()
                    out = forward(*given, **options)
                    inside += time.perf_counter() - start
                    return out

                return called

            for name, forward in forwards.items():
                setattr(self._denoiser, name, timed(forward))
            try:
                batches = [requests] if together else [[request] for request in requests]
                answers = [answer for batch in batches for answer in engine.generate(batch)]
            finally:
                for name in forwards:
                    delattr(self._denoiser, name)
            cost = {
                "calls": sum(answer.num_calls for answer in answers),
                "positions": sum(answer.num_positions for answer in answers),
                "overhead": 1 - inside / (time.perf_counter() - begun),
            }
            return sum(answer.num_committed for answer in answers), cost

        self._settings[name] = setting

    def run(self) -> None:
        for _ in range(self._rounds):
            for name, setting in self._settings.items():
                begun = time.perf_counter()
                tokens, cost = setting()
                rate = tokens / (time.perf_counter() - begun)
                if rate > self.rates.get(name, 0.0):
                    self.rates[name], self.costs[name] = rate, cost


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--run")
    parser.add_argument(
        "--dtype", choices=["float32", "bfloat16"], default="float32", help="of weights; the rival's too"
    )
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--prompt", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    length, policy = options.length, LowConfidencePolicy()
    if options.run:
        denoiser, policy = read_bundle(RunDir.at(options.run)).denoiser(), ThresholdPolicy()
        length = min(length, denoiser.config.context_length - options.prompt)
    else:
        denoiser = random_denoiser(BASE, BASE_VOCABULARY, length + options.prompt)
    denoiser = denoiser.to(getattr(torch, options.dtype))
    bench = Bench(denoiser, policy, options.rounds)
    rng = np.random.default_rng(0)
    size = denoiser.config.vocab_size
    prompts = [tuple(map(int, rng.integers(3, size - 3, options.prompt))) for _ in range(32)]
    dual, none = bench.config(length, "dual"), bench.config(length, "none")
    one = Request(prompts[0], dual)
    bench.loop("plain_loop", prompts[0], length)
    bench.engine("no_cache", [replace(one, config=none)])
    bench.engine("dual", [one])
    eight = [replace(one, prompt=prompt, config=bench.config(length // 2, "dual")) for prompt in prompts[:8]]
    bench.engine("eight_in_turn", eight, together=False)
    bench.engine("eight_together", eight)
    equal = [replace(one, prompt=prompt, config=bench.config(length // 4, "dual")) for prompt in prompts]
    lengths = rng.integers(length // 8, 3 * length // 8 + 1, len(prompts))
    mixed = [
        replace(
            request, prompt=request.prompt[: int(rng.integers(4, options.prompt + 1))], config=bench.config(n, "dual")
        )
        for request, n in zip(equal, map(int, lengths), strict=True)
    ]
    bench.engine("equal_32", equal)
    bench.engine("mixed_32", mixed)
    bench.run()
    rates = bench.rates
    tell(
        "engine",
        weights=options.run or "random",
        dtype=options.dtype,
        parameters=sum(p.numel() for p in denoiser.parameters()),
        length=length,
        prompt=options.prompt,
        threads=options.threads,
        **{f"tokens_per_s_{name}": round(rate, 1) for name, rate in rates.items()},
        ratio_dual_to_plain_loop=round(rates["dual"] / rates["plain_loop"], 2),
        ratio_dual_to_no_cache=round(rates["dual"] / rates["no_cache"], 2),
        ratio_eight_together_to_in_turn=round(rates["eight_together"] / rates["eight_in_turn"], 2),
        ratio_mixed_to_equal=round(rates["mixed_32"] / rates["equal_32"], 3),
        costs={name: {k: round(v, 4) for k, v in cost.items()} for name, cost in bench.costs.items()},
    )


if __name__ == "__main__":
    sys.exit(main())
