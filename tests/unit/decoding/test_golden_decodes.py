"""What public reference decoders return for public layouts with random weights: token for token, in no more calls."""

import json
from pathlib import Path
from typing import Any

import pytest

from dllm_core.decoding.answer import Answer
from dllm_core.decoding.config import DecodeConfig
from dllm_core.decoding.engine import Engine
from dllm_core.decoding.request import Request
from dllm_core.model.denoiser import Denoiser
from dllm_core.model.foreign import read_foreign
from dllm_core.model.pattern import FULL, AttentionPattern
from dllm_core.noise.absorbing import AbsorbingProcess

pytestmark = pytest.mark.usefixtures("one_thread")
GOLDEN = Path(__file__).parents[2] / "golden"
FAMILIES = {"llada": ("tiny-llada", FULL), "llada2": ("tiny-llada2-moe", AttentionPattern("block_causal", 16))}
CASES = [(family, case) for family in FAMILIES for case in json.loads((GOLDEN / f"{family}.decode.json").read_text())]


@pytest.fixture(scope="module")
def denoisers() -> dict[str, Denoiser]:
    return {family: read_foreign(GOLDEN / folder).eval() for family, (folder, _) in FAMILIES.items()}


def decode_section(family: str, decoder: str, given: dict[str, Any]) -> DecodeConfig:
    """Ours for theirs. `steps` are a block's for LLaDA2 and the answer's for LLaDA."""
    length, block = given["gen_length"], given["block_length"]
    policy: dict[str, Any] = {"type": "low_confidence"}
    if "threshold" in given:
        policy = {"type": "threshold", "threshold": given["threshold"]}
    if "factor" in given:
        policy = {"type": "factor", "factor": given["factor"], "takes_last": True}
    return DecodeConfig.checked(
        {
            "policy": policy,
            "max_tokens": length,
            "block_length": block,
            "steps_per_block": given["steps"] if family == "llada2" else given["steps"] * block // length,
            "cache": decoder.rsplit(".", 1)[-1] if decoder.endswith(("prefix", "dual")) else "none",
        }
    )


def answers(denoiser: Denoiser, family: str, case: dict[str, Any]) -> list[Answer]:
    """Of a case's prompts, decoded together; its end token is the case's own."""
    eos = case["config"].get("eos_id", denoiser.config.eos_id)
    if eos != denoiser.config.eos_id:
        other = Denoiser(denoiser.config.model_copy(update={"eos_id": eos})).eval()
        other.load_state_dict(denoiser.state_dict())
        denoiser = other
    config = decode_section(family, case["decoder"], case["config"])
    engine = Engine.over(denoiser, AbsorbingProcess(mask_id=denoiser.config.mask_id), pattern=FAMILIES[family][1])
    return engine.generate([Request(tuple(prompt), config) for prompt in case["prompt"]])


@pytest.mark.parametrize(("family", "case"), CASES, ids=[case["name"] for _, case in CASES])
def test_greedy_answers_are_the_reference_decoders(denoisers, family, case):
    denoiser = denoisers[family]
    eos = case["config"].get("eos_id", denoiser.config.eos_id)
    found = answers(denoiser, family, case)
    for answer, wanted in zip(found, case["output"], strict=True):
        assert answer.tokens == (wanted[: wanted.index(eos)] if eos in wanted else wanted)
        assert answer.num_calls <= case["forwards"]
