"""The recipe's section `noise`: every kind of process, and one clear line where a stage cannot take it."""

import pytest
import yaml
from conftest import small_recipe
from enumeration import SCHEDULES

from dllm_core.config.fingerprint import fingerprint
from dllm_core.data.manifest import CorpusManifest
from dllm_core.errors import ConfigError
from dllm_core.noise.absorbing import AbsorbingProcess
from dllm_core.noise.hybrid import HybridProcess
from dllm_core.noise.process import NoiseConfig
from dllm_core.noise.schedule import CosineSchedule
from dllm_core.noise.uniform import UniformProcess

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
        ({"block_length": 8}, "noise.block_length: objective.type=diffusion needs none, got 8: set both or neither"),
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


@pytest.mark.parametrize(
    ("sections", "line"),
    [
        (
            {"objective": {"type": "block_diffusion"}},
            "noise.block_length: objective.type=block_diffusion needs the blocks' length, got None: set both",
        ),
        (
            {"objective": {"max_weight": 5}, "noise": {"process": {"type": "uniform"}}},
            "objective.max_weight: says how masks weigh in continuous time; it needs noise.process.type=absorbing, ",
        ),
        (
            {"objective": {"weight": "context"}, "noise": {"process": {"type": "hybrid"}}},
            "objective.weight: says how masks weigh",
        ),
        (
            {"objective": {"complementary": True}, "noise": {"steps": 9}},
            "objective.complementary: says how masks weigh",
        ),
        (
            {"objective": {"weight": "none", "max_weight": 5}},
            "objective.max_weight: clips weight=nelbo, not none, got 5.0: leave it out",
        ),
        (
            {"objective": {"type": "autoregressive"}, "model": {"time_conditioning": True}},
            "model.time_conditioning: objective.type=autoregressive has no diffusion time, got True: leave it out",
        ),
        (
            {"objective": {"type": "masked_lm", "replaced": 0.3}},
            "objective.replaced: masked=0.8 leaves less, got 0.3: their sum is at most 1",
        ),
    ],
)
def test_an_objective_that_does_not_fit_its_noise_is_refused_in_one_line(tmp_path, sections, line):
    with pytest.raises(ConfigError) as refused:
        small_recipe(tmp_path, **sections)
    assert str(refused.value).startswith(line)


@pytest.mark.parametrize("process", [{"type": "uniform"}, {"type": "hybrid"}], ids=str)
@pytest.mark.parametrize("steps", [None, 8])
def test_replaced_tokens_are_decoded_over_whole_rows_and_not_in_blocks(tmp_path, process, steps):
    assert small_recipe(tmp_path, noise={"process": process, "steps": steps}).can_be_decoded
    blocks = {
        "noise": {"process": process, "steps": steps, "block_length": 4},
        "objective": {"type": "block_diffusion"},
    }
    assert not small_recipe(tmp_path, **blocks).can_be_decoded


def test_an_absorbing_corpus_is_the_one_that_it_was(tmp_path):
    """`steps: null` says nothing new, so it does not rename a corpus; T does."""
    recipe = small_recipe(tmp_path)
    identity = {
        "seed": recipe.seed,
        "corpus": recipe._corpus_identity(),
        "tokenizer": recipe.tokenizer,
        "packing": recipe.packing,
        "noise": {
            "process": {"type": "absorbing", "schedule": {"type": "linear"}},
            "t_min": 1e-3,
            "block_length": None,
        },
        "sources": [],
    }
    assert recipe.corpus_fingerprint([]) == fingerprint(identity)
    discrete = recipe.model_copy(update={"noise": recipe.noise.model_copy(update={"steps": 8})})
    assert discrete.corpus_fingerprint([]) != fingerprint(identity)
