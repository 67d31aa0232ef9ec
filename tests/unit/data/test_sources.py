"""Where a corpus's files are found, and what is said when they are not."""

import os

import pytest

from dllm_core.data.corpus import TextCorpus
from dllm_core.data.sources import find_source, unicode_names
from dllm_core.errors import DataError
from dllm_core.storage.store import LocalStore
from workflows.preprocess.flow import plan_corpus
from workflows.recipe import RECIPES, load_recipe


def test_the_unicode_names_are_one_corpus_wherever_and_whenever_they_are_written_down(tmp_path):
    recipe = load_recipe(RECIPES / "quickstart.yaml")
    fingerprints = {plan_corpus(recipe, LocalStore(tmp_path / name)).fingerprint for name in ("a", "b")}
    assert len(fingerprints) == 1


def test_the_unicode_names_are_columns_of_names():
    columns = unicode_names().rstrip("\n").split("\n\n")
    assert columns[0].splitlines()[:2] == ["SPACE", "EXCLAMATION MARK"]
    assert all(1 <= column.count("\n") + 1 <= 16 for column in columns)
    assert "CJK UNIFIED IDEOGRAPH-4E00" not in unicode_names().splitlines()


def test_the_standard_library_is_there_without_what_was_installed_beside_it(tmp_path):
    found = find_source(TextCorpus(path="python:stdlib", glob="**/*.py"), LocalStore(tmp_path))
    keys = {item.key for item in found.files}
    assert {"os.py", "json/decoder.py"} <= keys
    assert not any(key.startswith("site-packages/") for key in keys)


def test_what_we_make_inside_the_corpus_is_no_part_of_it(tmp_path):
    (tmp_path / "a.txt").write_text("text")
    root = LocalStore(tmp_path / "dllm-runs")
    before = find_source(TextCorpus(path=str(tmp_path)), root)
    root.put("corpora/x/manifest.json", b"{}")
    assert [item.key for item in find_source(TextCorpus(path=str(tmp_path)), root).files] == ["a.txt"]
    assert before == find_source(TextCorpus(path=str(tmp_path)), root)


def test_a_name_that_is_not_utf8_is_refused_in_one_line_where_the_glob_takes_it(tmp_path):
    root = LocalStore(tmp_path / "root")
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.txt").write_text("text")
    (tmp_path / "in" / os.fsdecode(b"\xff.md")).write_text("text")
    source = TextCorpus(path=str(tmp_path / "in"))
    found = find_source(source.model_copy(update={"glob": "*.txt"}), root)
    assert [item.key for item in found.files] == ["a.txt"]
    with pytest.raises(DataError, match=r"^corpus\.path: a file's name is not UTF-8, got '\\udcff\.md'") as caught:
        find_source(source, root)
    assert str(caught.value).isascii()


@pytest.mark.parametrize(
    ("path", "problem"),
    [("python:haiku", "no such text"), ("/nowhere/at/all", "no such file or folder"), ("", "")],
)
def test_what_is_not_there_is_refused_in_one_line(tmp_path, path, problem):
    if not path:
        path = str(tmp_path / "empty")
        (tmp_path / "empty").mkdir()
        problem = "no file matches"
    with pytest.raises(DataError, match=problem) as caught:
        find_source(TextCorpus(path=path), LocalStore(tmp_path / "root"))
    assert caught.value.place == "corpus.path"
