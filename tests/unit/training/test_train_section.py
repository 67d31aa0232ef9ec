"""Section `train`: curves of the learning rate, what goes together, and what a run's name depends on."""

import math

import pytest
import yaml
from conftest import small_recipe
from hypothesis import given
from hypothesis import strategies as st

from dllm_core.config.fingerprint import fingerprint
from dllm_core.errors import ConfigError
from dllm_core.training.config import TrainConfig
from workflows.recipe import Recipe

CURVES = st.builds(
    TrainConfig,
    learning_rate=st.just(0.5),
    schedule=st.sampled_from(["linear", "cosine", "wsd"]),
    decay_fraction=st.floats(0.01, 1),
    final_lr_fraction=st.floats(0, 1),
    warmup_steps=st.integers(0, 40),
)
LONG_AGO = 10**6  # a step at which no warm-up shows


@given(CURVES, st.integers(0, 60), st.floats(0, 2), st.floats(0, 1))
def test_a_curve_rises_by_steps_and_never_rises_by_progress(config, step, progress, further):
    rate = config.learning_rate_at(step, progress)
    assert config.learning_rate_at(step + 1, progress) >= rate >= 0
    assert rate >= config.learning_rate_at(step, progress + further) - 1e-15
    assert rate <= config.learning_rate_at(LONG_AGO, 0.0) == 0.5


@given(CURVES, st.floats(1, 3))
def test_a_curve_ends_at_the_final_fraction_and_begins_where_it_is_warm_at_the_whole_rate(config, beyond):
    assert config.learning_rate_at(LONG_AGO, beyond) == pytest.approx(0.5 * config.final_lr_fraction, abs=1e-15)
    assert config.learning_rate_at(config.warmup_steps, 0.0) == 0.5
    assert config.learning_rate_at(0, 0.0) == 0.5 / (config.warmup_steps + 1)


@given(CURVES, st.floats(0, 1), st.floats(0, 1e-3))
def test_a_curve_has_no_jump(config, progress, little):
    fall = config.learning_rate_at(LONG_AGO, progress) - config.learning_rate_at(LONG_AGO, progress + little)
    steepest = {"linear": 1, "cosine": math.pi / 2, "wsd": 1 / config.decay_fraction}[config.schedule]
    assert fall <= 0.5 * steepest * little + 1e-12


@given(CURVES.filter(lambda config: config.schedule == "wsd"), st.floats(0, 1))
def test_wsd_is_flat_up_to_its_decay_and_falls_in_it(config, share):
    flat = 1 - config.decay_fraction
    assert config.learning_rate_at(LONG_AGO, flat * share) == pytest.approx(0.5, rel=1e-12)
    halfway = config.learning_rate_at(LONG_AGO, flat + config.decay_fraction / 2)
    assert halfway == pytest.approx(0.5 * (1 + config.final_lr_fraction) / 2)


def test_cosine_is_half_way_down_at_half_of_the_training_and_slow_at_both_ends():
    config = TrainConfig(learning_rate=1.0, schedule="cosine", final_lr_fraction=0.0, warmup_steps=0)
    quarter, half, three = (config.learning_rate_at(LONG_AGO, x) for x in (0.25, 0.5, 0.75))
    assert (quarter, half, three) == pytest.approx(((1 + 0.5**0.5) / 2, 0.5, (1 - 0.5**0.5) / 2))


@given(st.floats(0, 1), st.floats(0, 2), st.integers(0, 100), st.integers(0, 40))
def test_linear_is_what_it_was_bit_for_bit(final, progress, step, warmup):
    config = TrainConfig(learning_rate=3e-3, final_lr_fraction=final, warmup_steps=warmup)
    warm = min(1.0, (step + 1) / (warmup + 1))
    assert config.learning_rate_at(step, progress) == 3e-3 * warm * (1 - (1 - final) * min(1.0, progress))


def test_names_of_runs_made_before_there_were_these_fields_stay():
    assert TrainConfig().identity == {
        "steps": 2000,
        "seconds": None,
        "batch_rows": 16,
        "zero_stage": 2,
        "precision": "auto",
        "learning_rate": 0.003,
        "final_lr_fraction": 0.05,
        "warmup_steps": 50,
        "betas": [0.9, 0.95],
        "weight_decay": 0.01,
        "clip_norm": 1.0,
        "ema_decay": 0.999,
    }
    assert fingerprint(TrainConfig().identity) == "c407580b6602"


@pytest.mark.parametrize(
    "fields",
    [
        {"micro_rows": 4},
        {"micro_rows": "auto"},
        {"zero_stage": 0},
        {"zero_stage": 3, "offload": "parameters"},
        {"offload": "optimizer"},
        {"activation_checkpointing": True},
        {"compile": True},
        {"log_every": 7, "checkpoint_every": 9, "keep_checkpoints": 1},
        {"average_from": "best", "average_checkpoints": 5, "accept_corpus": "rows-0123456789ab"},
        {"decay_fraction": 0.5},  # says nothing where nothing decays so
    ],
)
def test_what_changes_speed_memory_or_rounding_changes_no_name(fields):
    assert TrainConfig(**fields).identity == TrainConfig().identity


def test_every_other_field_changes_the_name():
    changed = [
        TrainConfig(schedule="cosine"),
        TrainConfig(schedule="wsd"),
        TrainConfig(schedule="wsd", decay_fraction=0.5),
        TrainConfig(steps=3),
        TrainConfig(ema_decay=0.5),
    ]
    assert len({fingerprint(config.identity) for config in [TrainConfig(), *changed]}) == 1 + len(changed)
    cosine = TrainConfig(schedule="cosine")
    assert TrainConfig(schedule="cosine", decay_fraction=0.5).identity == cosine.identity


@pytest.mark.parametrize("value", [0, -1, "fast", 2.5, True, [1]])
def test_micro_rows_are_a_number_of_rows_or_auto(value):
    with pytest.raises(ConfigError, match=r"^train\.micro_rows: must ") as caught:
        TrainConfig.checked({"micro_rows": value}, "train")
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize(
    ("stage", "offload", "allowed"),
    [
        (stage, *rest)
        for stage in range(4)
        for rest in (("none", True), ("optimizer", stage >= 1), ("parameters", stage >= 3))
    ],
)
def test_only_what_is_cut_can_be_offloaded(stage, offload, allowed):
    values = {"zero_stage": stage, "offload": offload}
    if allowed:
        assert TrainConfig.checked(values).offload == offload
        return
    with pytest.raises(
        ConfigError, match=r"train\.offload: needs train\.zero_stage >= [13].*: train\.zero_stage=[13]$"
    ):
        TrainConfig.checked(values, "train")


@pytest.mark.parametrize(
    ("micro_rows", "fits"), [(1, True), (2, True), (4, True), (3, False), (8, False), ("auto", True)]
)
def test_micro_batches_divide_a_workers_rows(tmp_path, micro_rows, fits):
    train, placement = {"batch_rows": 8, "micro_rows": micro_rows}, {"train": {"workers": 2}}
    if fits:
        recipe = small_recipe(tmp_path, train=train, placement=placement)
        assert Recipe.checked(yaml.safe_load(recipe.to_yaml())) == recipe
        return
    with pytest.raises(ConfigError, match=r"^train\.micro_rows: must divide the 4 rows of a worker's batch, got \d$"):
        small_recipe(tmp_path, train=train, placement=placement)
