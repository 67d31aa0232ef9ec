"""Engine, objectives and measures on a pretended GPU: nothing of theirs is left on the host, and each figure is the
CPU's. No kernel of a GPU runs in it; what a real one is needed for is said in `pretended_gpu.py`.
"""

import itertools
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

TESTS = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def hooks(tmp_path_factory):
    from pretended_gpu import build

    return build(tmp_path_factory.mktemp("hooks"))


def found(hooks: Path, what: str) -> Any:
    """What a process of its own, which has the pretended device, tells of it."""
    done = subprocess.run([sys.executable, __file__, str(hooks), what], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.long
@pytest.mark.parametrize("kind", ["full", "shifted", "timed", "block_causal", "causal", "uniform", "hybrid"])
def test_the_engine_answers_as_on_the_cpu_and_waits_for_each_call_once(hooks, kind):
    told = found(hooks, f"engine:{kind}")
    assert told["answers"] > 5
    assert told["other"] == []
    assert set(map(tuple, told["waits"])) == {("to the host",)}


@pytest.mark.long
def test_objectives_have_their_loss_and_gradients_on_the_device(hooks):
    told = found(hooks, "objectives")
    assert len(told) > 20
    assert {name: found for name, found in told.items() if not found["same"]} == {}
    # Masks of what is read, and the count that a sum is divided by: a bounded number, however many rows there are.
    assert all(found["waits"] <= 20 for found in told.values())


@pytest.mark.long
def test_measures_are_those_of_the_cpu(hooks):
    told = found(hooks, "measures")
    assert set(told) == {"exact", "count", "blocks", "time", "calibration", "judge"}
    assert all(error < 1e-5 for error in told.values())


def engine(kind: str) -> dict[str, Any]:
    """Requests of every policy, cache and draw, together, on the device and on the CPU."""
    import torch
    from pretended_gpu import counted, moved, pretended
    from rows import MASK, VOCABULARY, new_denoiser, new_engine

    from dllm_core.decoding.config import DecodeConfig
    from dllm_core.decoding.engine import Engine
    from dllm_core.decoding.request import Request
    from dllm_core.decoding.revise import AncestralPolicy, EditingPolicy, RemaskingPolicy
    from dllm_core.decoding.unmask import (
        EntropyPolicy,
        FactorPolicy,
        LowConfidencePolicy,
        MarginPolicy,
        RandomPolicy,
        ThresholdPolicy,
    )
    from dllm_core.model import recorder
    from dllm_core.model.pattern import AttentionPattern
    from dllm_core.noise.hybrid import HybridProcess
    from dllm_core.noise.uniform import UniformProcess

    # A graph is what was recorded, done again. Where it lies is asked of what is held: a wrapper has no address.
    recorder._Graphs = lambda device: lambda run: [run(), run(), run()] and run
    recorder._address = lambda tensor: getattr(tensor, "held", tensor).untyped_storage().data_ptr()
    noise = {
        "uniform": UniformProcess(mask_id=MASK, vocab_size=VOCABULARY),
        "hybrid": HybridProcess(mask_id=MASK, vocab_size=VOCABULARY, p_u=0.4, gamma=1),
    }
    revising = [RemaskingPolicy(eta=0.3), EditingPolicy(), AncestralPolicy()] if kind in ("full", "timed") else []
    policies = [ThresholdPolicy(threshold=0.3), FactorPolicy(factor=1.0), LowConfidencePolicy(position_temperature=0.3)]
    policies += [MarginPolicy(), EntropyPolicy(), RandomPolicy(), *revising]
    caches = ["none", "prefix", "dual"] if kind in ("full", "shifted") else ["none"]
    rows = []
    for i, (policy, cache) in enumerate(itertools.product(policies, caches)):
        said: dict[str, Any] = {"temperature": 0.7, "top_p": 0.8, "top_k": 4} if i % 2 else {}
        if kind in ("full", "shifted", "timed") and not i % 4:
            said["guidance"] = 0.5
        if kind in noise:
            said["policy"] = AncestralPolicy()
        elif kind != "causal":
            said["policy"] = policy
        config = DecodeConfig(**said, cache=cache, block_length=4, steps_per_block=4, max_tokens=12)
        suffix = (5,) if kind in ("full", "timed", *noise) else ()
        rows.append(Request((3, 4) * (1 + i % 4), config, suffix, seed=i, top_logprobs=i % 3))
    patterns = {"block_causal": AttentionPattern("block_causal", 4), "causal": AttentionPattern("causal")}
    options = {"pattern": patterns[kind]} if kind in patterns else {}

    def new() -> Any:
        return new_denoiser(shifted=kind == "shifted", time_conditioning=kind == "timed")

    def made(denoiser: Any) -> Engine:
        if kind in noise:
            return Engine.over(denoiser, noise[kind], 300, is_ancestral=True)
        return new_engine(denoiser, **options)

    expected = [answer.tokens for answer in made(new()).generate(rows)]
    with pretended():
        on_gpu = made(moved(new()))
        waited: list[list[str]] = []
        answers = {}
        for request in rows:
            on_gpu.add(request)
        while True:
            with counted() as waits:
                updates = on_gpu.step()
            if not updates:
                break
            waited.append(list(waits))
            ended = [update for update in updates if update.state.finish_reason is not None]
            answers.update({update.row: tuple(update.state.answer(on_gpu.eos_id)) for update in ended})
        assert on_gpu.denoiser.device == torch.device("cuda", 0)
    other = [i for i, tokens in enumerate(expected) if tuple(tokens) != answers[i]]
    # A recording is held against a plain forward once, which is waited for; what it then does is not.
    usual = [waits for waits in waited if waits.count("_local_scalar_dense") == 0]
    assert len(usual) > len(waited) / 2
    return {"answers": len(answers), "other": other, "waits": sorted(map(list, set(map(tuple, usual))))}


def objectives() -> dict[str, Any]:
    """Every objective's nats and gradients, on the device and on the CPU."""
    import small
    import torch
    from pretended_gpu import counted, host, moved, pretended
    from test_sums import noised

    on_cpu = small.every_objective()
    small.CPU = torch.device("cuda", 0)
    on_gpu, told = small.every_objective(), {}
    for name, objective in on_cpu.items():
        batch, own, other = noised(name, 1), small.new_denoiser(1).train(), small.new_denoiser(1).train()
        expected = objective.loss(own, batch)
        (expected.nats / expected.divisor).backward()
        with pretended(), counted() as waits:
            loss = on_gpu[name].loss(moved(other), batch)
            (loss.nats / loss.divisor).backward()
            count = len(waits)
        pairs = [(a.grad, b.grad) for a, b in zip(own.parameters(), other.parameters(), strict=True)]
        is_same = all((a is None) == (b is None) for a, b in pairs) and loss.divisor == expected.divisor
        is_same &= all(torch.allclose(a, host(b), atol=1e-6) for a, b in pairs if a is not None)
        told[name] = {"same": is_same and torch.allclose(expected.nats, host(loss.nats), rtol=1e-6), "waits": count}
    return told


def measures() -> dict[str, float]:
    """How far each measure of the device is from the CPU's."""
    import numpy as np
    import torch
    from pretended_gpu import moved, pretended
    from small import LINEAR, MASK, PROCESSES, TEXT, new_denoiser

    from dllm_core.evaluation.calibration import score_calibration
    from dllm_core.evaluation.estimators import Draw, ExactCount, ExactNLL, HeldoutRows, StratifiedTime
    from dllm_core.evaluation.scorers import AutoregressiveScorer

    rng = np.random.default_rng(0)
    x0 = rng.choice(TEXT, (6, 8))
    is_real = np.arange(8) < rng.integers(4, 9, (6, 1))
    segments = np.cumsum(rng.random(x0.shape) < 0.2, axis=1, dtype=np.int32)
    rows = HeldoutRows(x0=x0, counted=is_real, ids=np.arange(6), is_real=is_real, segment_ids=segments)
    draw = Draw(seed=3, number=0)

    def figures(denoiser: Any, device: torch.device) -> dict[str, Any]:
        scores = score_calibration(denoiser, LINEAR, rows, rate=0.5, seed=1, device=device)
        return {
            "exact": ExactNLL(MASK, device).nats(denoiser, rows, draw),
            "count": ExactCount(MASK, device).nats(denoiser, rows, draw),
            "blocks": ExactCount(MASK, device, 2).nats(denoiser, rows, draw),
            "time": StratifiedTime(PROCESSES["uniform"], device).nats(denoiser, rows, draw),
            "calibration": np.concatenate([scores.confidence.ravel(), scores.brier.ravel()]),
            "judge": AutoregressiveScorer(denoiser, MASK, device, name="judge").nats(x0, is_real),
        }

    with torch.no_grad():
        expected = figures(new_denoiser(2), torch.device("cpu"))
        with pretended():
            told = figures(moved(new_denoiser(2)), torch.device("cuda", 0))
    return {name: float(np.abs(told[name] - values).max()) for name, values in expected.items()}


if __name__ == "__main__":
    sys.path[:0] = [str(TESTS), str(TESTS / "unit/decoding"), str(TESTS / "unit/objective")]
    from pretended_gpu import load

    load(Path(sys.argv[1]))
    what, _, of = sys.argv[2].partition(":")
    print(json.dumps(globals()[what](*([of] if of else []))))
