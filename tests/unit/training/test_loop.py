"""Laws of a training run: what it was stopped for, at what step and how often does not show in its weights."""

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from trainers import BadAt, BadGradientAt, BadLossAt, Told, Work, make_trainer, newest_of, run_dir

from dllm_core.checkpoints.store import Checkpoint, CheckpointStore
from dllm_core.errors import DivergedError
from dllm_core.objective.config import DiffusionConfig
from dllm_core.objective.loss import Objective
from dllm_core.training.backend import LocalBackend
from dllm_core.training.ema import WeightAverage
from dllm_core.training.loop import Trainer

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def make(small_corpus, tmp_path):
    """A function that makes the trainer of a run in `tmp_path`, which goes on from the run's newest checkpoint."""
    return lambda name="run", **options: make_trainer(small_corpus, CheckpointStore(run_dir(tmp_path, name)), **options)


def assert_same_bits(left: Checkpoint, right: Checkpoint) -> None:
    assert left.manifest.position == right.manifest.position
    for name in ("model.safetensors", "ema.safetensors", "optimizer.safetensors"):
        assert left.files[name].read_bytes() == right.files[name].read_bytes(), name


def tensors(root, step: int, name: str = "run") -> list[bytes]:
    folder = root / "runs" / name / "checkpoints" / f"step-{step:08d}"
    return [path.read_bytes() for path in sorted(folder.glob("*.safetensors"))]


def die_after_saving(told: Told, at: int) -> None:
    def saved(step: int) -> None:
        if step == at:
            raise KeyError("killed")

    told.saved = saved


def run_in_parts(make: Callable[..., object], stops: tuple[int, ...], **options: object) -> None:
    """The run `parts`, killed after each of its checkpoints at `stops` and started again."""
    for stop in stops:
        trainer, _, told = make("parts", checkpoint_every=stop, **options)
        die_after_saving(told, stop)
        with pytest.raises(KeyError, match="killed"):
            trainer.run()
        options.pop("wrap", None)  # what went wrong did so before the first kill
    make("parts", checkpoint_every=100, **options)[0].run()


@pytest.mark.parametrize("stops", [(3,), (1, 2, 5)])
def test_a_run_that_was_killed_and_goes_on_ends_in_the_very_bits_of_one_that_was_not(make, tmp_path, stops):
    make("whole", checkpoint_every=100)[0].run()
    run_in_parts(make, stops)
    assert newest_of(tmp_path, "whole").manifest.position.step == 6
    assert_same_bits(newest_of(tmp_path, "parts"), newest_of(tmp_path, "whole"))


def test_a_skipped_step_before_the_kill_makes_no_difference(make, tmp_path):
    def wrap(objective: Objective) -> Objective:
        return BadAt(objective, lambda call: call == 1)

    make("whole", wrap=wrap, checkpoint_every=100)[0].run()
    run_in_parts(make, (3,), wrap=wrap)
    assert newest_of(tmp_path, "whole").manifest.position.skipped_steps == 1
    assert_same_bits(newest_of(tmp_path, "parts"), newest_of(tmp_path, "whole"))


def test_a_finished_run_goes_on_to_nothing(make, tmp_path):
    make()[0].run()
    before = newest_of(tmp_path)
    trainer, _, told = make()
    assert trainer.run() == before.manifest.position
    assert (told.begun, told.records, told.saves) == ([(6, 0.0)], [], [])
    assert_same_bits(newest_of(tmp_path), before)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_step_whose_loss_is_no_number_changes_no_weight_and_is_counted(make, tmp_path, value):
    trainer, _, told = make(
        wrap=lambda objective: BadAt(objective, lambda call: call in {2, 3}, value),
        checkpoint_every=1,
        keep_checkpoints=9,
    )
    trainer.run()
    assert told.skips == [2, 3]
    assert tensors(tmp_path, 1) != tensors(tmp_path, 2) == tensors(tmp_path, 3) == tensors(tmp_path, 4)
    assert tensors(tmp_path, 4) != tensors(tmp_path, 5)
    assert trainer.position.skipped_steps == 2
    assert trainer.position.samples_seen == 6 * 8  # a bad batch is not met again
    assert [record.step for record in told.records] == [1, 2, 5, 6]
    assert all(math.isfinite(record.loss) for record in told.records)


def test_a_step_whose_gradient_alone_is_no_number_is_skipped_like_one_whose_loss_is_none(make, tmp_path):
    for name, kind in (("both", BadAt), ("loss", BadLossAt), ("gradient", BadGradientAt)):
        trainer, _, told = make(name, wrap=lambda objective, kind=kind: kind(objective, lambda call: call == 2))
        trainer.run()
        assert told.skips == [2]
    assert tensors(tmp_path, 6, "both") == tensors(tmp_path, 6, "loss") == tensors(tmp_path, 6, "gradient")


def test_ten_bad_steps_in_a_row_end_the_run_and_nine_do_not(make):
    trainer, _, told = make(wrap=lambda o: BadAt(o, lambda call: call % 10 != 9), steps=20)
    assert trainer.run().skipped_steps == 18
    trainer, _, told = make("diverged", wrap=lambda o: BadAt(o, lambda call: call >= 3), steps=1000)
    with pytest.raises(DivergedError, match="10 times in a row, at step 12") as caught:
        trainer.run()
    assert caught.value.exit_code == 5
    assert told.skips == list(range(3, 13))
    for calls in ((3, 99), (0, 99)):  # stopped in the row of bad steps, and all of them again from a checkpoint there
        options = {"wrap": lambda o, calls=calls: BadAt(o, lambda call: call >= calls[0]), "checkpoint_every": 7}
        parts, _, again = make("parts", steps=1000, **options)
        with pytest.raises(DivergedError, match="10 times in a row, at step 12"):
            parts.run()
        assert parts.skipped == trainer.skipped
    assert again.begun == [(7, 0.0)]
    assert again.skips == list(range(7, 13))


def make_timed(make: Callable[..., object], name: str = "run", **options: object) -> object:
    clock = Work()
    return make(name, clock=clock, wrap=clock.on, seconds=10.5, steps=10**6, **options)


@pytest.mark.parametrize(("every", "saves"), [(4, [4, 8, 10]), (5, [5, 10])])
def test_a_run_ends_when_its_time_is_used_up_and_the_learning_rate_falls_with_it(
    make, small_corpus, tmp_path, every, saves
):
    trainer, _, told = make_timed(make, checkpoint_every=every)
    assert trainer.run().step == 10
    assert told.saves == saves
    rate_at = small_corpus.recipe.train.learning_rate_at
    assert [record.learning_rate for record in told.records] == [rate_at(i, (i + 1) / 10.5) for i in range(10)]
    assert newest_of(tmp_path).manifest.position == trainer.position


def test_a_time_budget_is_over_all_restarts_and_a_restart_after_its_end_takes_no_step(make, tmp_path):
    make_timed(make, "whole", checkpoint_every=100)[0].run()
    run_in_parts(lambda *args, **options: make_timed(make, *args, **options), (1, 2, 3, 5))
    assert_same_bits(newest_of(tmp_path, "parts"), newest_of(tmp_path, "whole"))
    run_in_parts(lambda *args, **options: make_timed(make, *args, **options), ())
    assert_same_bits(newest_of(tmp_path, "parts"), newest_of(tmp_path, "whole"))


def test_speed_is_tokens_of_all_steps_over_the_time_they_took(make):
    for every in (1, 3):
        clock = Work()
        _, _, told = run_told(make, f"every-{every}", clock=clock, wrap=clock.on, log_every=every)
        seen = [0, *(record.tokens for record in told.records)]
        for record, before in zip(told.records, seen, strict=False):
            assert record.tokens_per_s == pytest.approx((record.tokens - before) / every)


def test_utilisation_counts_every_pass_of_a_step_and_a_complement_is_a_second_one(make):
    for complementary in (False, True):
        clock = Work()
        given = {
            "clock": clock,
            "wrap": clock.on,
            "peak_flops": 1e9,
            "objective": DiffusionConfig(complementary=complementary),
        }
        _, backend, told = run_told(make, f"complementary-{complementary}", **given)
        config, passes = backend.module.config, 1 + complementary
        of_token = config.model.flops_per_token(config.vocab_size, config.context_length)
        for record in told.records:
            assert record.mfu == pytest.approx(passes * record.tokens_per_s * of_token / 1e9)


def run_told(make: Callable[..., object], name: str, **fields: object) -> tuple[Trainer, LocalBackend, Told]:
    made = make(name, **fields)
    made[0].run()
    return made


def test_a_record_is_the_mean_over_the_tokens_since_the_last_one(make, small_corpus):
    _, _, single = run_told(make, "single", log_every=1)
    _, _, windows = run_told(make, "windows", log_every=4)
    assert [record.step for record in single.records] == [1, 2, 3, 4, 5, 6]
    assert [record.step for record in windows.records] == [4, 6]
    seen = [0, *(record.tokens for record in single.records)]
    for record, first in zip(windows.records, (0, 4), strict=True):
        inside = single.records[first : record.step]
        for field in ("loss", "bound"):
            total = sum(getattr(one, field) * (seen[one.step] - seen[one.step - 1]) for one in inside)
            assert getattr(record, field) == pytest.approx(total / (seen[record.step] - seen[first]))
        assert record.grad_norm == pytest.approx(sum(one.grad_norm for one in inside) / len(inside))
        assert record.tokens == seen[record.step]
        assert record.epoch == record.step * 8 / small_corpus.manifest.train.rows


def test_only_the_newest_checkpoints_are_kept(make, tmp_path):
    _, _, told = run_told(make, "run", checkpoint_every=1, keep_checkpoints=2)
    assert told.saves == [1, 2, 3, 4, 5, 6]
    assert CheckpointStore(run_dir(tmp_path, "run")).committed() == [5, 6]


def test_a_step_in_micro_batches_is_the_step(make, tmp_path):
    for name, fields in (("whole", {}), ("micro", {"micro_rows": 2})):
        make(name, steps=20, log_every=20, **fields)[0].run()
    whole, micro = newest_of(tmp_path, "whole"), newest_of(tmp_path, "micro")
    assert micro.manifest.position == whole.manifest.position
    for name, path in whole.files.items():
        for key, tensor in load_file(path).items():
            torch.testing.assert_close(load_file(micro.files[name])[key], tensor, atol=1e-5, rtol=0)


@pytest.mark.parametrize("kind", [BadAt, BadLossAt, BadGradientAt])
def test_a_bad_micro_batch_spoils_its_whole_step_and_no_other(make, tmp_path, kind):
    trainer, _, told = make(
        wrap=lambda o: kind(o, lambda call: call == 9), micro_rows=2, checkpoint_every=1, keep_checkpoints=9
    )
    trainer.run()
    assert told.skips == [2]
    assert tensors(tmp_path, 2) == tensors(tmp_path, 3) != tensors(tmp_path, 4)
    whole = make("whole", wrap=lambda o: kind(o, lambda call: call == 2))[0]
    whole.run()
    for key, tensor in load_file(newest_of(tmp_path, "whole").files["model.safetensors"]).items():
        found = load_file(newest_of(tmp_path).files["model.safetensors"])[key]
        torch.testing.assert_close(found, tensor, atol=1e-5, rtol=0)


def test_checkpointed_activations_give_the_very_bits(make, tmp_path):
    for name, is_on in (("plain", False), ("checkpointed", True)):
        make(name, activation_checkpointing=is_on)[0].run()
    assert_same_bits(newest_of(tmp_path, "plain"), newest_of(tmp_path, "checkpointed"))


@given(st.floats(0, 0.9999), st.lists(st.floats(-9, 9, width=32), min_size=1, max_size=4))
def test_the_average_of_weights_that_stay_is_the_weights(decay, values):
    weights = {"a": torch.tensor(values)}
    average = WeightAverage(weights, decay)
    for step in range(30):
        average.update(weights, step)
    assert torch.equal(average.weights["a"], weights["a"])


def test_the_average_is_the_sum_that_its_formula_says_and_follows_no_later_change_of_its_source():
    source = torch.zeros(2)
    average, expected = WeightAverage({"a": source}, 0.9), torch.zeros(2, dtype=torch.float64)
    for step in range(200):
        source.copy_(torch.tensor([float(step), 1.0]))  # in place, as an optimizer does
        average.update({"a": source}, step)
        source.fill_(-100)
        decay = min(0.9, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * torch.tensor([float(step), 1.0], dtype=torch.float64)
        torch.testing.assert_close(average.weights["a"].double(), expected, rtol=1e-5, atol=1e-6)
    assert float(expected[0]) == pytest.approx(199 - 0.9 / 0.1, rel=1e-3)  # a lag of decay / (1 - decay) steps
