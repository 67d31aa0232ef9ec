"""What a recipe's model can be asked to decode, and in which blocks: said by the recipe, before torch is there."""

import itertools

import pytest
from conftest import small_recipe

from dllm_core.errors import ConfigError
from dllm_core.model.pattern import CAUSAL, FULL, AttentionPattern

OBJECTIVES = ("diffusion", "block_diffusion", "autoregressive", "masked_lm")
EVERY_MODEL = [
    pytest.param(*values, id="-".join(map(str, values)))
    for values in itertools.product(OBJECTIVES, ("absorbing", "uniform", "hybrid"), (False, True))
    if not (values[0] in OBJECTIVES[2:] and values[2])  # a recipe has no such model
]


@pytest.mark.parametrize(("objective", "process", "is_timed"), EVERY_MODEL)
def test_there_is_a_decoder_or_a_line_that_says_why_not(tmp_path, objective, process, is_timed):
    recipe = small_recipe(
        tmp_path,
        objective={"type": objective},
        noise={"process": {"type": process}, "block_length": 4 if objective == "block_diffusion" else None},
        model={"time_conditioning": is_timed},
    )
    patterns = {"block_diffusion": AttentionPattern("block_causal", 4), "autoregressive": CAUSAL, "diffusion": FULL}
    is_mask = process == "absorbing" and not is_timed
    is_ancestral = objective == "diffusion" and process != "absorbing"
    if objective == "autoregressive" or is_ancestral or (objective in patterns and is_mask):
        assert recipe.can_be_decoded
        assert recipe.decoding_pattern == patterns[objective]
        recipe.check_decodable()
        told = {"type": "ancestral", "steps": 64} if is_ancestral else recipe.decode.policy.model_dump(mode="json")
        assert recipe.decode_told["policy"] == (None if objective == "autoregressive" else told)
        return
    assert not recipe.can_be_decoded
    with pytest.raises(ConfigError, match="there is no decoder for such a model yet") as refused:
        recipe.check_decodable()
    place, value = {
        "masked_lm": ("objective.type", "masked_lm"),
        "absorbing": ("model.time_conditioning", True),
    }.get(objective if objective == "masked_lm" else process, ("noise.process.type", process))
    assert (refused.value.place, refused.value.value) == (place, value)


@pytest.mark.parametrize(
    ("trained", "asked", "steps", "remedy"),
    [
        (4, 4, 4, None),
        (4, 4, 2, None),
        (4, 5, 4, "decode.block_length=4"),
        (4, 8, 8, "decode.block_length=4 decode.steps_per_block=4"),
        (8, 4, 4, "decode.block_length=8"),
    ],
)
def test_a_model_of_blocks_is_decoded_in_its_own_and_trained_whatever_the_recipe_would_decode(
    tmp_path, trained, asked, steps, remedy
):
    sections = {"noise": {"block_length": trained}, "decode": {"block_length": asked, "steps_per_block": steps}}
    recipe = small_recipe(tmp_path, objective={"type": "block_diffusion"}, **sections)  # loads: it may be trained only
    assert recipe.can_be_decoded
    if remedy is None:
        recipe.check_decodable()
        return
    with pytest.raises(ConfigError) as refused:
        recipe.check_decodable()
    line = f"decode.block_length: must be noise.block_length={trained}, got {asked}: {remedy}"
    assert str(refused.value) == line
    assert refused.value.exit_code == 2
    small_recipe(tmp_path, objective={"type": "autoregressive"}, **sections).check_decodable()  # reads no blocks
