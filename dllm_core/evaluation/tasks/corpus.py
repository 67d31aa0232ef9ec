"""A task's training part as a corpus: JSON lines of prompt and answer, of which only the answers are learned.

    corpus: {type: jsonl, path: FOLDER, record: {type: pair}}
    tokenizer: {path: FOLDER/tokenizer.json}
    packing: {type: padded, seq_len: L, learn_padding: true}
    decode: {max_tokens: at most L}

Where answers differ in length, `learn_padding` is needed: without it a training row has as many masks as its answer has
tokens, and a canvas with more room reads as a longer answer.
"""

import json
from collections.abc import Sequence
from pathlib import Path

from dllm_core.data.tokenizer import Tokenizer, TokenizerConfig
from dllm_core.evaluation.tasks.problem import Problem

PROBLEMS_NAME = "train.jsonl"
TOKENIZER_NAME = "tokenizer.json"


def write_problems(path: Path, problems: Sequence[Problem]) -> None:
    """One `{"prompt": ..., "answer": ...}` a line."""
    path.write_text(problem_lines(problems), encoding="ascii")


def problem_lines(problems: Sequence[Problem]) -> str:
    """The lines of `write_problems`."""
    return "".join(json.dumps({"prompt": p.prompt, "answer": p.answer}) + "\n" for p in problems)


def read_problems(path: Path) -> list[Problem]:
    """What `write_problems` wrote."""
    return [Problem(**json.loads(line)) for line in path.read_text(encoding="ascii").splitlines()]


def byte_tokenizer(config: TokenizerConfig | None = None) -> Tokenizer:
    """One token a byte: merged digits would differ in how many cells a token decides."""
    return Tokenizer.train([], config or TokenizerConfig())


def write_task_corpus(folder: Path, problems: Sequence[Problem], tokenizer: TokenizerConfig | None = None) -> None:
    """Write the two files that the module's recipe sections name. tokenizer: for its special tokens' spelling."""
    folder.mkdir(parents=True, exist_ok=True)
    write_problems(folder / PROBLEMS_NAME, problems)
    (folder / TOKENIZER_NAME).write_text(byte_tokenizer(tokenizer).json_text, encoding="utf-8")
