"""YAML and `a.b=c`: nothing is silently dropped, and the file that was read is never changed."""

import pickle

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dllm_core.config.overrides import apply_overrides, parse_yaml, read_recipe
from dllm_core.errors import ConfigError

NAMES = st.text("abcdefg", min_size=1, max_size=3)
LEAVES = st.one_of(st.integers(), st.booleans(), st.text("xyz", min_size=1), st.none())


def test_a_key_that_stands_twice_is_refused_with_its_file_and_line(tmp_path):
    path = tmp_path / "twice.yaml"
    path.write_text("train:\n  steps: 1\n  lr: 2\n  steps: 3\n")
    with pytest.raises(ConfigError) as caught:
        read_recipe(path)
    assert str(caught.value) == f"{path} line 4: the key is there twice, got 'steps': keep one"
    assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)


@pytest.mark.parametrize("text", ["a: [1", "a: b: c", "a: 2026-02-31", "\tx", "a: \0", "- &x *x", "a: !!python/none x"])
def test_what_is_not_yaml_is_one_line_that_names_the_file(text):
    with pytest.raises(ConfigError) as caught:
        parse_yaml(text, "recipe.yaml")
    assert str(caught.value).startswith("recipe.yaml")
    assert "not YAML" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["008", "010", "0123", "-012", "+07_7", "00"])
def test_a_number_that_begins_with_zeros_is_no_octal_one(text):
    assert int(parse_yaml(f"seed: {text}", "recipe.yaml")["seed"]) == int(text)
    assert int(apply_overrides({}, [f"seed={text}"])["seed"]) == int(text)
    assert parse_yaml("[0x10, 0, 7, 1_000, 0b11]", "recipe.yaml") == [16, 0, 7, 1000, 3]


@pytest.mark.parametrize("content", [b"", b"- 1\n", b"just text", b"\xff\xfe"])
def test_a_file_that_is_no_mapping_is_refused(tmp_path, content):
    path = tmp_path / "odd.yaml"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=r"odd\.yaml"):
        read_recipe(path)


def test_a_recipe_that_is_not_there_says_so(tmp_path):
    with pytest.raises(ConfigError, match="no such recipe"):
        read_recipe(tmp_path / "none.yaml")
    with pytest.raises(ConfigError, match="cannot be read"):
        read_recipe(tmp_path)


@given(path=st.lists(NAMES, min_size=1, max_size=4), value=LEAVES, other=st.dictionaries(NAMES, LEAVES))
def test_an_override_sets_exactly_its_path(path, value, other):
    before = {name: other[name] for name in other if name != path[0]}
    text = "null" if value is None else str(value).lower() if isinstance(value, bool) else f"{value}"
    after = apply_overrides(before, [f"{'.'.join(path)}={text}"])
    expected = value
    for name in reversed(path):
        expected = {name: expected}
    assert after == {**before, **expected}


def test_values_are_yaml_and_the_original_is_left_alone():
    values = {"a": {"b": 1, "c": [1]}}
    changed = apply_overrides(values, ["a.b=[1, 2]", "a.d=true", "e.f=x=y", "a.c=", "g=**/*.md"])
    assert changed == {"a": {"b": [1, 2], "d": True, "c": None}, "e": {"f": "x=y"}, "g": "**/*.md"}
    assert values == {"a": {"b": 1, "c": [1]}}


def test_another_kind_drops_the_old_kind_s_keys_and_the_same_kind_keeps_them():
    values = {"slope": {"type": "steep", "power": 3}}
    assert apply_overrides(values, ["slope.type=flat"]) == {"slope": {"type": "flat"}}
    assert apply_overrides(values, ["slope.type=steep"]) == values
    assert apply_overrides({"slope": {"power": 3}}, ["slope.type=steep"]) == values
    assert apply_overrides({}, ["slope.power=3", "slope.type=steep"]) == values


def test_another_kind_drops_nothing_that_an_override_has_set():
    """Before its kind or after: `corpus.path=my/texts corpus.type=jsonl` is one folder of another kind."""
    values = {"slope": {"type": "steep", "power": 3, "at": {"x": 1}}}
    before = apply_overrides(values, ["slope.rate=2", "slope.at.y=5", "slope.type=flat"])
    assert before == {"slope": {"type": "flat", "rate": 2, "at": {"x": 1, "y": 5}}}
    assert apply_overrides(values, ["slope.type=flat", "slope.rate=2"]) == {"slope": {"type": "flat", "rate": 2}}
    whole = apply_overrides(values, ["slope={type: flat, rate: 2}", "slope.type=round"])
    assert whole == {"slope": {"type": "round", "rate": 2}}


def test_an_item_of_a_list_is_named_by_its_number():
    values = {"a": [{"type": "x", "w": 1}, {"type": "x", "w": 2, "l": [[1, 2]]}]}
    assert apply_overrides(values, ["a.1.w=5", "a.1.l.0.1=7", "a.0=null"]) == {
        "a": [None, {"type": "x", "w": 5, "l": [[1, 7]]}]
    }
    assert apply_overrides(values, ["a.0.v=3", "a.0.type=y"])["a"][0] == {"type": "y", "v": 3}
    assert values == {"a": [{"type": "x", "w": 1}, {"type": "x", "w": 2, "l": [[1, 2]]}]}


@pytest.mark.parametrize("path", ["a.2", "a.-1", "a.x", "a.2.w", "a.\u0661.w", "a.type"])
def test_what_is_no_item_of_a_list_is_told_with_those_that_are(path):
    with pytest.raises(ConfigError, match=r"^a\..*: no such item of a list, got '.*': it has items 0 to 1$"):
        apply_overrides({"a": [{"w": 1}, {"w": 2}]}, [f"{path}=5"])


@pytest.mark.parametrize("text", ["texts/part #2", "#2", "a\t#b", "1 # one"])
def test_what_would_be_a_comment_in_a_file_is_text_in_an_override(text):
    assert apply_overrides({}, [f"path={text}"]) == {"path": text}
    assert apply_overrides({}, [f"path=['{text}']"]) == {"path": [text]}


@pytest.mark.parametrize("item", ["steps", "=3", "a..b=1", ".a=1", "a.=1"])
def test_what_is_not_an_override_shows_how_to_write_one(item):
    with pytest.raises(ConfigError, match=r"write dotted\.path=value"):
        apply_overrides({}, [item])


def test_a_bad_value_names_the_override():
    with pytest.raises(ConfigError, match=r"^train\.steps"):
        apply_overrides({}, ["train.steps=[1"])
