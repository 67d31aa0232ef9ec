"""A task's training part as a corpus: JSON lines of prompt and answer, of which only the answers are learned.

    corpus: {type: jsonl, path: FOLDER, record: {type: pair}}
    tokenizer: {vocab_size: 259}  # 256 bytes and three special tokens: a byte a token
    packing: {type: padded, seq_len: L, learn_padding: true}
    decode: {max_tokens: L less a prompt's tokens}

Merged digits would differ in how many cells a token decides. Where answers differ in length, `learn_padding` is needed:
without it a training row has as many masks as its answer has tokens, and a canvas with more room reads as a longer
answer. With it a denoiser counts masks all the same: a canvas is to reach as far as a trained row did (`rooms_for`).
"""

import json
from collections.abc import Sequence
from pathlib import Path

from dllm_core.evaluation.tasks.problem import Problem

PROBLEMS_NAME = "train.jsonl"


def write_problems(path: Path, problems: Sequence[Problem]) -> None:
    """One `{"prompt": ..., "answer": ...}` a line."""
    path.write_text(problem_lines(problems), encoding="ascii")


def problem_lines(problems: Sequence[Problem]) -> str:
    """The lines of `write_problems`."""
    return "".join(json.dumps({"prompt": p.prompt, "answer": p.answer}) + "\n" for p in problems)
