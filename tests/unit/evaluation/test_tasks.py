"""A task's way through the product: a corpus whose answers alone are learned, and a model graded on the other part."""

import numpy as np
import pytest
import torch
from conftest import small_recipe

from dllm_core.data.loader import split_rows
from dllm_core.data.tokenizer import Tokenizer, TokenizerConfig
from dllm_core.decoding.config import DecodeConfig
from dllm_core.decoding.engine import Engine
from dllm_core.decoding.unmask import LowConfidencePolicy
from dllm_core.evaluation.tasks.addition import AdditionTask
from dllm_core.evaluation.tasks.corpus import write_problems
from dllm_core.evaluation.tasks.measure import answer_problems, rooms_for, summarize_answers
from dllm_core.evaluation.tasks.sudoku import SudokuTask
from dllm_core.evaluation.writers import EngineWriter
from dllm_core.model.config import DenoiserConfig, ModelConfig
from dllm_core.noise.absorbing import AbsorbingProcess
from dllm_core.storage.store import open_store
from workflows.fan_out import serially
from workflows.preprocess.flow import Preprocessing, plan_corpus
from workflows.recipe import Recipe

TASKS = {
    "sudoku": SudokuTask(),
    "addition": AdditionTask(),
    "reversed": AdditionTask(first_digit="least_significant"),
}


def byte_tokenizer(**fields: object) -> Tokenizer:
    smallest = TokenizerConfig(**fields).smallest
    return Tokenizer.train(["1+2=3 " * 50], TokenizerConfig(vocab_size=smallest, **fields))


def test_a_byte_is_a_token_in_every_problem():
    tokenizer = byte_tokenizer()
    assert tokenizer.vocab_size == 256 + 3
    for task in TASKS.values():
        for problem in task.problems("train", 50, seed=1):
            text = problem.prompt + problem.answer
            assert len(tokenizer.encode(text)) == len(text)
            assert tokenizer.encode(problem.prompt) + tokenizer.encode(problem.answer) == tokenizer.encode(text)


def recipe_of(root) -> Recipe:
    """The sections that `corpus.py` names."""
    sections = {
        "corpus": {"type": "jsonl", "path": str(root / "task"), "record": {"type": "pair"}, "heldout_fraction": 0.2},
        "tokenizer": {"vocab_size": TokenizerConfig().smallest},
        "packing": {"type": "padded", "seq_len": 48, "learn_padding": True},
    }
    return Recipe.checked(small_recipe(root).model_dump(mode="json") | sections)


@pytest.mark.parametrize("name", TASKS)
def test_a_corpus_of_it_learns_answers_and_their_end_and_nothing_else(name, tmp_path):
    problems = TASKS[name].problems("train", 120, seed=3)
    (tmp_path / "task").mkdir()
    write_problems(tmp_path / "task" / "train.jsonl", problems)
    recipe = recipe_of(tmp_path)
    store = open_store("storage.root", recipe.storage.root)
    manifest = Preprocessing(plan_corpus(recipe, store), serially).run()
    tokenizer = byte_tokenizer()
    assert manifest.vocab_size == tokenizer.vocab_size
    found = set()
    for split in (manifest.train, manifest.heldout):
        rows = split_rows(store, manifest, split, np.arange(split.rows))
        assert rows.has_prompt
        for ids, learned, real in zip(rows.x0, rows.is_learned, rows.is_real, strict=True):
            assert ids[learned][-1] == tokenizer.eos_id
            found.add((tokenizer.decode(ids[real & ~learned].tolist()), tokenizer.decode(ids[learned].tolist())))
    assert found == {(problem.prompt, problem.answer) for problem in problems}


class Calculator(torch.nn.Module):
    """Reads prompts as a person does and writes the sum's digit at each place, wrong by one where told so."""

    def __init__(self, tokenizer, *, wrong_from: int = 99) -> None:
        super().__init__()
        self.tokenizer, self.wrong_from, self.device = tokenizer, wrong_from, torch.device("cpu")
        self.config = DenoiserConfig(
            model=ModelConfig(dim=16, layers=1, heads=2, ffn_dim=16),
            vocab_size=tokenizer.vocab_size,
            context_length=64,
            mask_id=tokenizer.mask_id,
            eos_id=tokenizer.eos_id,
            pad_id=tokenizer.pad_id,
        )

    def forward(self, ids, is_real=None, read=None, **options):
        logits = torch.zeros(len(read), self.tokenizer.vocab_size)
        for k, (row, i) in enumerate(divmod(at, ids.shape[1]) for at in read.tolist()):
            prompt = self.tokenizer.decode(ids[row].tolist()).partition("=")[0]
            total = str(sum(map(int, prompt.split("+"))))
            place = i - len(prompt) - 1
            digit = self.tokenizer.eos_id
            if place < len(total):
                [digit] = self.tokenizer.encode(str((int(total[place]) + (place >= self.wrong_from)) % 10))
            logits[k, digit] = 20.0
        return logits


def test_answers_of_one_who_adds_are_right_and_of_one_who_errs_are_not():
    tokenizer, task = byte_tokenizer(), AdditionTask(digits=2, test_share=0.5)
    problems = task.problems("test", 60, seed=4)
    rooms = rooms_for(tokenizer, problems)
    assert rooms == [4] * 60, "three digits and an end"
    assert rooms_for(tokenizer, problems, 16) == [16 - len(problem.prompt) for problem in problems]
    config = DecodeConfig(policy=LowConfidencePolicy(), block_length=4, steps_per_block=2, max_tokens=1)

    def measured(wrong_from):
        engine = Engine.over(Calculator(tokenizer, wrong_from=wrong_from), AbsorbingProcess(mask_id=tokenizer.mask_id))
        return answer_problems(EngineWriter(engine, config), tokenizer, task, problems, rooms=rooms, seed=5)

    right = summarize_answers(measured(99))
    assert (right.problems, right.exact.value, right.pieces.value) == (60, 1.0, 1.0)
    assert right.exact.low < 0.96
    assert 1 <= right.tokens_per_call.value <= 2
    answered = measured(1)
    wrong = summarize_answers(answered)
    lengths = np.array([len(problem.answer) for problem in problems])
    assert wrong.exact.value == pytest.approx((lengths == 1).mean())
    assert wrong.pieces.value == pytest.approx(60 / lengths.sum())
    assert [one.text[0] for one in answered] == [problem.answer[0] for problem in problems]
    assert [one.tokens for one in answered] == (lengths + 1).tolist()


def test_an_answer_with_a_special_token_inside_is_wrong():
    """`decode` leaves it out, and would read the rest as right."""
    tokenizer = byte_tokenizer(chat={})

    class Marked(Calculator):
        def forward(self, ids, is_real=None, read=None, **options):
            logits = super().forward(ids, is_real, read)
            for k, (row, i) in enumerate(divmod(at, ids.shape[1]) for at in read.tolist()):
                if ids[row, i - 1] == tokenizer.encode("=")[0]:
                    logits[k, tokenizer.end_of_turn_id] = 99.0
            return logits

    task = AdditionTask(digits=1, test_share=0.5)
    engine = Engine.over(Marked(tokenizer), AbsorbingProcess(mask_id=tokenizer.mask_id))
    writer = EngineWriter(engine, DecodeConfig())
    problems = task.problems("test", 10, seed=0)
    answered = answer_problems(writer, tokenizer, task, problems, rooms=[3] * 10, seed=0)
    assert all("<|end|>" in one.text for one in answered)
    assert summarize_answers(answered).exact.value == 0
    assert summarize_answers([]) is None
