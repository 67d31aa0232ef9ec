"""An error is one line that names place, problem, value and remedy, in this process and in the next."""

import pickle

import pytest

from dllm_core.errors import (
    CheckpointError,
    ConfigError,
    DataError,
    DivergedError,
    DllmError,
    PreemptedError,
    RequestError,
)

KINDS = (DllmError, ConfigError, DataError, CheckpointError, PreemptedError, DivergedError, RequestError)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("arguments", [("a.b", "is wrong"), ("a.b", "is wrong", None), ("a.b", "is wrong", 3, "say 4")])
def test_an_error_crosses_a_process_border_unchanged(kind, arguments):
    error = kind(*arguments)
    copy = pickle.loads(pickle.dumps(error))
    assert type(copy) is kind
    assert str(copy) == str(error)
    assert (copy.place, copy.problem, copy.value, copy.remedy) == (
        error.place,
        error.problem,
        error.value,
        error.remedy,
    )


def test_the_line_names_place_problem_value_and_remedy():
    assert str(ConfigError("train.steps", "must be > 0", 0, "say 1")) == "train.steps: must be > 0, got 0: say 1"


def test_a_value_of_none_is_shown_and_no_value_is_not():
    assert str(ConfigError("a", "is wrong", None)) == "a: is wrong, got None"
    assert str(ConfigError("a", "is wrong")) == "a: is wrong"


def test_a_long_value_is_cut_and_a_foreign_message_of_several_lines_becomes_one():
    assert len(str(DataError("a", "is wrong", "x" * 10_000))) < 150
    assert str(DataError("a", "failed (first\nsecond)", "v\nw")).count("\n") == 0


def test_a_command_ends_with_a_code_that_tells_what_kind_of_failure_it_was():
    codes = [kind("a", "b").exit_code for kind in (ConfigError, DataError, PreemptedError, DivergedError)]
    assert len(set(codes)) == 4
    assert 0 not in codes
    assert CheckpointError("a", "b").exit_code == DataError.exit_code
