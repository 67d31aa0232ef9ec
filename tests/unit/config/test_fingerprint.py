"""Equal things have equal fingerprints, whatever the order or process they were written in."""

import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dllm_core.config.base import Frozen
from dllm_core.config.fingerprint import canonical, fingerprint, seal, unseal

PLAIN = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.text(st.characters(codec="utf-8"))),
    lambda inner: st.one_of(st.lists(inner), st.dictionaries(st.text(st.characters(codec="utf-8")), inner)),
    max_leaves=8,
)


class Leaf(Frozen):
    name: str
    sizes: tuple[int, ...]
    rate: float


class Section(Frozen):
    b: float = 0.5
    a: tuple[int, ...] = (1, 2)


def _reversed(value):
    if isinstance(value, dict):
        return {key: _reversed(value[key]) for key in reversed(value)}
    return [_reversed(item) for item in value] if isinstance(value, list) else value


@given(PLAIN)
def test_the_order_of_keys_does_not_matter(value):
    assert fingerprint(value) == fingerprint(_reversed(value))


@given(PLAIN, PLAIN)
def test_equal_spelling_means_equal_value(first, second):
    if canonical(first) == canonical(second):
        assert _typed(first) == _typed(second)


def _typed(value):
    """Python holds True == 1; JSON does not."""
    if isinstance(value, dict):
        return {key: _typed(item) for key, item in value.items()}
    return [_typed(item) for item in value] if isinstance(value, list) else (type(value), value)


def test_a_section_is_what_its_json_is():
    assert fingerprint({"x": Section()}) == fingerprint({"x": {"a": [1, 2], "b": 0.5}})
    assert fingerprint(Section()) != fingerprint(Section(b=0.25))


def test_another_process_finds_the_same_name():
    code = "from dllm_core.config.fingerprint import fingerprint; print(fingerprint({'b': [1.5, 'é'], 'a': None}))"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()
    assert found == fingerprint({"a": None, "b": [1.5, "é"]}) == "8c6adbf0c005"


def test_what_is_not_plain_data_is_refused():
    with pytest.raises(TypeError, match="set"):
        fingerprint({"x": {1}})


def test_a_sealed_record_comes_back_and_no_changed_bit_of_it_is_taken_for_it():
    record = Leaf(name='é\n"', sizes=(1, 2), rate=1e-5)
    data = seal(record)
    assert Leaf.checked(unseal(data)) == record
    for i in range(8 * len(data)):
        flipped = bytearray(data)
        flipped[i // 8] ^= 1 << i % 8
        try:
            values = unseal(bytes(flipped))
        except ValueError:
            continue
        assert Leaf.checked(values) == record  # 1e-05 and 1E-05 are one number
    for stop in range(len(data)):
        with pytest.raises(ValueError):  # noqa: PT011
            unseal(data[:stop])
