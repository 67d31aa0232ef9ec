"""`dllm task`: what it writes is a corpus and a recipe that keep the graded problems out of the trained ones."""

import json
from pathlib import Path

import pytest
from conftest import SmallCorpus, make_small_bundle

from dllm_core.checkpoints.bundle import read_bundle
from dllm_core.data.manifest import read_tokenizer
from dllm_core.errors import ConfigError, DataError
from dllm_core.evaluation.models import writer_of
from dllm_core.evaluation.tasks.measure import answer_problems, rooms_for
from dllm_core.storage.store import open_store
from workflows.evaluate.flow import evaluate
from workflows.fan_out import serially
from workflows.preprocess.flow import Preprocessing, plan_corpus
from workflows.recipe import load_recipe
from workflows.task.flow import write_task

KINDS = pytest.mark.parametrize(
    ("kind", "overrides"),
    [("sudoku", ["max_clues=8", "split_seed=5"]), ("addition", ["digits=2", "first_digit=least_significant"])],
)


@KINDS
def test_the_recipe_learns_what_was_written_and_is_graded_on_the_rest(kind, overrides, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    written = write_task(kind, "out", 150, 3, overrides)
    problems = [json.loads(line) for line in Path("out/train.jsonl").read_text(encoding="ascii").splitlines()]
    small = ["model.dim=32", "model.layers=1", "model.heads=2", "model.ffn_dim=32", f"storage.root={tmp_path / 's'}"]
    recipe = load_recipe(
        Path(written["recipe"]), [*small, "corpus.heldout_fraction=0.1", "evaluate.problems=30", "evaluate.rows=8"]
    )
    [task] = recipe.evaluate.tasks
    assert written["task"] == task.model_dump(mode="json")
    for name, value in (pair.split("=") for pair in overrides):
        assert str(getattr(task, name)) == value
    assert problems == [vars(problem) for problem in task.problems("train", 150, seed=3)]
    store = open_store("storage.root", recipe.storage.root)
    manifest = Preprocessing(plan_corpus(recipe, store), serially).run()
    assert manifest.accounting.train + manifest.accounting.heldout == 150, "no problem is too long for a row"
    assert manifest.vocab_size == 259, "a byte a token"
    run = make_small_bundle(SmallCorpus(recipe, store, manifest, read_tokenizer(store, manifest)), store.root)
    [result] = evaluate(recipe, run, serially, lambda *told: None)["tasks"]
    assert result["problems"] == 30
    tokenizer, test = read_tokenizer(store, manifest), task.problems("test", 30, seed=3)
    writer = writer_of(read_bundle(run), recipe.decode)
    far, near = (
        answer_problems(writer, tokenizer, task, test, rooms=rooms_for(tokenizer, test, end), seed=3)[:4]
        for end in (recipe.packing.seq_len, None)
    )
    assert [e["answer"] for e in result["examples"]] == [one.text for one in far]
    assert [one.text for one in near] != [one.text for one in far], "masks are counted"
    assert recipe.decode.max_tokens == recipe.packing.seq_len - max(len(problem.prompt) for problem in test)
    assert not {e["prompt"] for e in result["examples"]} & {problem["prompt"] for problem in problems}


def test_the_same_words_write_the_same_bytes_and_another_seed_others(tmp_path):
    files = []
    for seed in (0, 0, 1):
        write_task("addition", str(tmp_path / "t"), 50, seed, [])
        files.append([(tmp_path / "t" / name).read_bytes() for name in ("train.jsonl", "recipe.yaml")])
    assert files[0] == files[1]
    assert files[0][0] != files[2][0]


@pytest.mark.parametrize(
    ("error", "kind", "rows", "overrides", "line"),
    [
        (ConfigError, "chess", 5, [], "task: unknown kind, got 'chess': one of addition, sudoku"),
        (ConfigError, "addition", 5, ["digits=99"], "addition.digits: must be less than or equal to 8, got 99"),
        (ConfigError, "sudoku", 5, ["digits=2"], "sudoku.digits: unknown name: "),
        (ConfigError, "addition", 500, ["digits=1"], "--rows: the train part holds "),
        (DataError, "addition", 5, [], ": cannot be written (Not a directory)"),
    ],
)
def test_a_mistake_is_one_line(error, kind, rows, overrides, line, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(error) as told:
        write_task(kind, str(tmp_path / "file" / "t"), rows, 0, overrides)
    assert line in str(told.value)
