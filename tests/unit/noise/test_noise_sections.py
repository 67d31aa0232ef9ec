"""The recipe's section `noise`: every kind of process, and one clear line where a stage cannot take it."""

import pytest
import yaml
from conftest import small_recipe
from enumeration import SCHEDULES

from dllm_core.data.manifest import CorpusManifest
from dllm_core.errors import ConfigError
from dllm_core.noise.absorbing import AbsorbingProcess
from dllm_core.noise.hybrid import HybridProcess
from dllm_core.noise.process import NoiseConfig
from dllm_core.noise.schedule import CosineSchedule
from dllm_core.noise.uniform import UniformProcess

MASKS_ONLY = "written noise, objective masked_diffusion and decoding know masks only"
SECTIONS = {
    "absorbing": ({}, AbsorbingProcess),
    "uniform": ({}, UniformProcess),
    "hybrid": ({"p_u": 0.4, "gamma": 0.5}, HybridProcess),
}


@pytest.mark.parametrize("kind", SECTIONS)
@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)
def test_a_section_survives_being_written_out_and_binds_to_its_process(kind, schedule):
    values, process_type = SECTIONS[kind]
    values = {"type": kind, **values, "schedule": schedule.model_dump()}
    config = NoiseConfig.checked({"process": values, "steps": 7})
    assert NoiseConfig.checked(yaml.safe_load(yaml.safe_dump(config.model_dump(mode="json")))) == config
    process = config.process.bind(3, 11)
    assert isinstance(process, process_type)
    assert process.replaces is config.process.replaces
    named = {**values, "mask_id": 3, "vocab_size": 11}
    assert process.model_dump() == {name: named[name] for name in process_type.model_fields}


def test_a_section_that_names_no_kind_means_masks(small_corpus):
    config = NoiseConfig.checked({"process": {"schedule": {"type": "cosine"}}})
    assert config.process.bind(3, 11) == AbsorbingProcess(mask_id=3, schedule=CosineSchedule())
    values = small_corpus.manifest.model_dump(mode="json")
    assert values["process"] == {"type": "absorbing", "schedule": {"type": "linear"}}
    assert CorpusManifest.checked(values) == small_corpus.manifest


@pytest.mark.parametrize(
    ("noise", "line"),
    [
        ({"process": {"type": "uniform"}}, f"noise.process.type: {MASKS_ONLY}, got 'uniform': use absorbing"),
        (
            {"process": {"type": "hybrid"}, "epochs": 0},
            f"noise.process.type: {MASKS_ONLY}, got 'hybrid': use absorbing",
        ),
        (
            {"steps": 8},
            "noise.steps: stored times and objective masked_diffusion are of continuous time, got 8: use null",
        ),
        ({"process": {"type": "gaussian"}}, "noise.process.type: unknown kind, got 'gaussian': one of 'absorbing', "),
        (
            {"process": {"type": "hybrid", "gamma": 2.5}},
            "noise.process.gamma: must be less than or equal to 2, got 2.5",
        ),
        ({"process": {"type": "hybrid", "p_u": 1}}, "noise.process.p_u: must be less than 1, got 1"),
        ({"process": {"schedule": {"type": "log_linear", "eps": 0}}}, "noise.process.schedule.eps: must be greater"),
        ({"process": {"schedule": {"type": "polynomial", "exponent": 0}}}, "noise.process.schedule.exponent: must be"),
        ({"steps": 0}, "noise.steps: must be greater than or equal to 1, got 0"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(tmp_path, noise, line):
    with pytest.raises(ConfigError) as refused:
        small_recipe(tmp_path, noise=noise)
    assert str(refused.value).startswith(line)


def test_an_absorbing_corpus_is_the_one_that_it_was(tmp_path):
    """`steps: null` says nothing new, so it does not rename a corpus; T does."""
    recipe = small_recipe(tmp_path)
    before = recipe.corpus_fingerprint([])
    discrete = recipe.model_copy(update={"noise": recipe.noise.model_copy(update={"steps": 8})})
    assert discrete.corpus_fingerprint([]) != before
    values = recipe.noise.model_dump(mode="json", exclude={"epochs", "steps"})
    assert values == {
        "process": {"type": "absorbing", "schedule": {"type": "linear"}},
        "t_min": 1e-3,
        "block_length": None,
    }
