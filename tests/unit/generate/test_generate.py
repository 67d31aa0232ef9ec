"""`dllm generate` in all its forms: prompts, templates, edits, files of them, and traces to make them again from."""

import json
import os
import re
import shutil
import threading
from dataclasses import replace
from pathlib import Path

import pytest
import tokenizers
import torch
from conftest import make_small_bundle
from sentence_pieces import sentence_pieces

from dllm_core.checkpoints.bundle import read_bundle
from dllm_core.checkpoints.run_dir import RunDir
from dllm_core.data.tokenizer import Tokenizer, TokenizerConfig
from dllm_core.decoding.answer import Answer, RowUpdate
from dllm_core.decoding.config import DecodeConfig
from dllm_core.decoding.engine import Engine
from dllm_core.decoding.request import Request
from dllm_core.errors import RequestError
from dllm_core.model.denoiser import Denoiser
from dllm_core.storage.store import open_store
from workflows.cli import run_command_line
from workflows.generate.asked import Asked
from workflows.generate.flow import Generator, canvas_text
from workflows.generate.trace import Decoded
from workflows.generate.unfold import unfold
from workflows.recipe import Recipe

SMALL = ["decode.max_tokens=8", "decode.block_length=4", "decode.steps_per_block=4"]


@pytest.fixture
def told(small_bundle, capsys):
    """Run `dllm generate` on the small bundle: exit code, JSON lines, stderr."""

    def run(*words: str, url: str = small_bundle.url) -> tuple[int, list[dict], str]:
        capsys.readouterr()
        code = run_command_line(["generate", url, *SMALL, *words, "--output", "json"])
        out, err = capsys.readouterr()
        return code, [json.loads(line) for line in out.splitlines()], err

    return run


def test_a_template_keeps_what_is_given_and_tells_each_hole(told, small_bundle):
    code, [answer], _ = told("--infill", "RED [[3]] OF [[2]] SIGN", "--seed", "4")
    assert code == 0
    tokenizer = read_bundle(small_bundle).tokenizer()
    between = tokenizer.encode(" OF ")
    assert answer["token_ids"][3:-2] == between
    assert answer["holes"] == [tokenizer.decode(answer["token_ids"][:3]), tokenizer.decode(answer["token_ids"][-2:])]
    assert answer["text"] == f"{answer['holes'][0]} OF {answer['holes'][1]}"
    assert answer["num_tokens"] == 5
    assert "search" not in answer


@pytest.mark.parametrize("template", ["A[[2]][[3]]B[[1]] C", "A[[2-2]][[2-3]]B[[1]] C"])
def test_holes_that_stand_side_by_side_are_told_apart(told, small_bundle, template):
    code, [answer], _ = told("--infill", template, "--seed", "4")
    assert code == 0
    tokenizer, tokens = read_bundle(small_bundle).tokenizer(), answer["token_ids"]
    stop = len(tokens) - 2  # of the second hole; behind it stand B and the third
    assert tokens[stop:-1] == tokenizer.encode("B")
    assert answer["holes"] == [tokenizer.decode(part) for part in (tokens[:2], tokens[2:stop], tokens[-1:])]


def test_words_between_and_in_holes_are_shown_with_the_spaces_before_them():
    """Of a tokenizer that writes them into its tokens, and one before each text, as Llama's does."""
    tokenizer = sentence_pieces("the cat sat on the mat")
    request, _ = Asked(infill="the[[1]] on[[1]]").given(tokenizer, DecodeConfig(), 32)
    generator = object.__new__(Generator)
    generator._tokenizer = tokenizer
    tokens = tokenizer.encode("cat on mat")
    shown = generator._shown(Decoded(request, Answer(tokens, "stop", 1, 2), []))
    assert shown.plain == "the cat on mat"


def test_what_stands_between_holes_is_kept_as_it_is_or_refused():
    """Some tokenizers compose characters first, as Qwen's does."""
    core = tokenizers.Tokenizer.from_str(Tokenizer.train(["cafe"], TokenizerConfig(vocab_size=260)).json_text)
    core.normalizer = tokenizers.normalizers.NFC()
    tokenizer = Tokenizer(core.to_str(), TokenizerConfig(vocab_size=260))
    request, _ = Asked(infill="cafe\u0301[[1]] caf\u00e9 [[1]]").given(tokenizer, DecodeConfig(), 64)
    assert tokenizer.decode([token for token in request.middle if token is not None]) == " caf\u00e9 "
    with pytest.raises(RequestError, match=r"^infill: the text between what is made .* would change"):
        Asked(infill="[[1]]cafe\u0301[[1]]").given(tokenizer, DecodeConfig(), 64)


def test_the_length_of_a_hole_is_searched_where_it_is_not_said(told):
    code, [answer], _ = told("--infill", "RED [[1-4]] SIGN")
    assert code == 0
    assert 1 <= answer["search"]["lengths"][0] <= 4
    assert len(answer["token_ids"]) == answer["search"]["lengths"][0]
    assert 3 <= answer["search"]["num_rows"] <= 4  # 1, 2 and 4; 3 where one beside it is best
    assert answer["search"]["num_calls"] > answer["num_calls"]
    code, [answer], _ = told("--infill", "RED [[]] SIGN")
    assert 1 <= answer["search"]["lengths"][0] <= 8


def test_an_edit_changes_its_span_alone(told, small_bundle):
    text = "LATIN SMALL LETTER"
    code, [answer], _ = told("--prompt", text, "--edit", "6:11", "--strength", "0.9", "--seed", "1")
    assert code == 0
    tokenizer = read_bundle(small_bundle).tokenizer()
    assert answer["prompt_ids"] == tokenizer.encode("LATIN ")
    assert len(answer["token_ids"]) == len(tokenizer.encode("SMALL"))
    assert (answer["edit"], answer["strength"]) == ("6:11", 0.9)


def test_a_stop_string_is_cut_off(told, small_bundle):
    code, [whole], _ = told("--prompt", "RED ", "--seed", "2")
    stop = whole["text"][2:4]
    code, [answer], _ = told("--prompt", "RED ", "--seed", "2", "--stop", stop)
    assert code == 0
    assert answer["text"] == whole["text"][: whole["text"].index(stop)]
    assert answer["finish_reason"] == "stop"


def test_an_answer_matches_what_was_asked_and_is_made_again_from_its_trace(told, tmp_path):
    trace, schema = tmp_path / "trace.jsonl", tmp_path / "schema.json"
    _, [answer], _ = told("--prompt", "RED ", "--regex", "[A-Z]{2,4}(-[0-9])+", "--trace", str(trace))
    assert re.fullmatch("[A-Z]{2,4}(-[0-9])+", answer["text"])
    assert told("--replay", str(trace))[0] == 0
    schema.write_text('{"type": "array", "items": {"type": "boolean"}, "maxItems": 1}', encoding="utf-8-sig")
    for given in (str(schema), schema.read_text(encoding="utf-8-sig")):
        _, [answer], _ = told("--json-schema", given, "decode.max_tokens=16")
        assert json.loads(answer["text"]) in ([], [True], [False])
    _, [answer], _ = told("--infill", "A [[1-6]] B", "--regex", "[0-9]{5}")
    assert re.fullmatch("[0-9]{5}", answer["text"])


def test_a_file_of_prompts_is_decoded_as_each_would_be_alone(told, tmp_path, small_bundle):
    lines = [
        {"prompt": "RED "},
        {"prompt_ids": [5, 6], "seed": 7},
        {"prompt": "A ", "suffix": " B"},
        {"infill": "X [[2]] Y [[1-3]]Z"},
        {"prompt": "LATIN SMALL", "edit": "0:5", "strength": 1},
    ]
    path = tmp_path / "prompts.jsonl"
    path.write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
    code, [*answers, last], _ = told("--prompts", str(path), "--seed", "3")
    assert code == 0
    assert last["num_answers"] == len(answers) == 5
    assert last["num_tokens"] == sum(answer["num_tokens"] for answer in answers)
    assert [answer["seed"] for answer in answers] == [3, 7, 3, 3, 3]
    alone = [
        told("--prompt", "RED ", "--seed", "3"),
        told("--prompt-ids", "5,6", "--seed", "7"),
        told("--prompt", "A ", "--suffix", " B", "--seed", "3"),
        told("--infill", "X [[2]] Y [[1-3]]Z", "--seed", "3"),
        told("--prompt", "LATIN SMALL", "--edit", "0:5", "--strength", "1", "--seed", "3"),
    ]
    for answer, (_, [other], _) in zip(answers, alone, strict=True):
        assert (other.pop("run"), other.pop("seconds") > 0) == (small_bundle.name, True)
        assert {k: v for k, v in answer.items() if k != "calls"} == {k: v for k, v in other.items() if k != "calls"}
    plain = tmp_path / "prompts.txt"
    plain.write_text("RED \n\nBLUE \n", encoding="utf-8")
    code, [*answers, _], _ = told("--prompts", str(plain), "--seed", "3")
    assert [answer["prompt"] for answer in answers] == ["RED ", "BLUE "]
    assert answers[0]["token_ids"] == alone[0][1][0]["token_ids"]


def test_a_row_may_be_as_long_as_the_recipe_lets_a_call_be(told, small_corpus, tmp_path):
    length = 4200  # more than a call's positions where a recipe says nothing
    values = {**small_corpus.recipe.model_dump(mode="json"), "packing": {"seq_len": length}}
    recipe = Recipe.checked({**values, "serve": {"max_batch_tokens": length}})
    manifest = small_corpus.manifest.model_copy(update={"packing": recipe.packing})
    run = make_small_bundle(replace(small_corpus, recipe=recipe, manifest=manifest), tmp_path)
    ids = ",".join(["5"] * (length - 8))
    code, [answer], _ = told("--prompt-ids", ids, "decode.block_length=8", "decode.steps_per_block=1", url=run.url)
    assert code == 0, answer
    assert (len(answer["prompt_ids"]), answer["num_calls"]) == (length - 8, 1)


def test_text_shows_what_was_given_and_what_was_made(small_bundle, capsys, tmp_path):
    code = run_command_line(["generate", small_bundle.url, *SMALL, "--infill", "RED [[2]] SIGN"])
    shown = capsys.readouterr().out.splitlines()
    assert code == 0
    assert shown[0].startswith("RED ")
    assert shown[0].endswith(" SIGN")
    assert shown[-1].startswith("2 tokens in 2 denoiser calls")
    path = tmp_path / "prompts.txt"
    path.write_text("RED \nBLUE \n", encoding="utf-8")
    assert run_command_line(["generate", small_bundle.url, *SMALL, "--prompts", str(path)]) == 0
    shown = capsys.readouterr().out
    assert "RED " in shown
    assert "BLUE " in shown
    assert "2 answers, " in shown


def test_a_trace_is_made_again_token_for_token_and_call_for_call(told, tmp_path, small_bundle):
    path = tmp_path / "trace.jsonl"
    told("--infill", "RED [[3]] SIGN", "--trace", str(path), "decode.temperature=1", "decode.policy.type=random")
    code, [again], _ = told("--replay", str(path))
    assert code == 0
    assert (again["traces"], again["identical"], again["max_confidence_difference"]) == (1, True, 0.0)
    assert again["calls"] == len(json.loads(path.read_text())["calls"])
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("\n".join(json.dumps({"prompt": "AB"[: i % 3], "seed": i}) for i in range(9)), encoding="utf-8")
    told("--prompts", str(prompts), "--trace", str(path), "decode.temperature=0.8", "decode.max_tokens=6")
    code, [again], _ = told("--replay", str(path))
    assert (code, again["traces"]) == (0, 9)


def test_what_is_no_longer_so_is_told_of(told, tmp_path, small_bundle):
    path = tmp_path / "trace.jsonl"
    told("--prompt", "RED ", "--trace", str(path))
    record = json.loads(path.read_text())

    def replayed(**changed: object) -> str:
        path.write_text(json.dumps({**record, **changed}), encoding="utf-8")
        code, _, err = told("--replay", str(path))
        assert code in (2, 3)
        assert err.count("\n") == 1
        return err.removeprefix(f"dllm: {path}:1")

    calls = [[list(commit) for commit in call] for call in record["calls"]]
    calls[1][0][1] += 1
    assert replayed(calls=calls).startswith(": call 2 commits other tokens than the trace says: it was made by torch ")
    assert "commits other tokens" in replayed(calls=record["calls"][:-1])
    assert "the answer is another" in replayed(tokens=[3])
    assert "was made with another bundle" in replayed(bundle_digest="0" * 12)
    assert "is a trace of another format, got 9" in replayed(format=9)
    for wrong in ({"novel": 1}, {"prompt": "RED"}, {"strength": "much"}, {"middle": [[1]]}, {"seed": None}):
        assert "is no request of this version" in replayed(request={**record["request"], **wrong})
    assert "is no request of this version" in replayed(request=[])
    assert "request.config" in replayed(request={"prompt": [3]})
    assert "middle" in replayed(request={**record["request"], "middle": []})
    for wrong in (None, [3], [[3]], [[[3, "a", 0.5]]]):
        assert "is no trace (calls: " in replayed(calls=wrong)
    path.write_text("{}", encoding="utf-8")
    assert "is no trace" in told("--replay", str(path))[2]
    for text in ("x", "[" * 100_000):
        path.write_text(text, encoding="utf-8")
        assert "is not JSON" in told("--replay", str(path))[2]
    path.write_text("", encoding="utf-8")
    assert "holds no trace" in told("--replay", str(path))[2]


def test_what_was_made_in_another_type_is_not_made_again_by_chance(told, tmp_path):
    path = tmp_path / "trace.jsonl"
    words = ["--prompt", "RED ", "decode.temperature=2", "decode.max_tokens=24"]
    told(*words, "serve.dtype=bfloat16", "--trace", str(path))
    assert json.loads(path.read_text())["made_by"]["dtype"] == "torch.bfloat16"
    code, [again], _ = told("--replay", str(path), "serve.dtype=bfloat16")
    assert (code, again["max_confidence_difference"]) == (0, 0.0)
    code, told_last, err = told("--replay", str(path))
    assert code == 3 or told_last[0]["max_confidence_difference"] > 0
    assert code == 0 or "torch.bfloat16; this is torch" in err


def test_weights_that_are_no_numbers_end_with_one_line(small_bundle, told, monkeypatch):
    engine = Engine.step

    def spoilt(self):
        self.denoiser.head.weight.data.fill_(float("nan"))
        return engine(self)

    monkeypatch.setattr(Engine, "step", spoilt)
    code, _, err = told("--prompt", "RED ")
    assert code == 3
    assert "the denoiser's output is no number" in err


@pytest.mark.parametrize(
    ("words", "code", "line"),
    [
        (["--infill", "no hole"], 2, "infill: has no hole, got 'no hole': write one as [[8]], [[2-8]] or [[]]"),
        (["--infill", "[[1]]", "--prompt", "x"], 2, "infill: holds all of the text"),
        (["--infill", "[[3-2]]"], 2, "infill: a hole is [[LENGTH]] or [[LEAST-MOST]], of at least 1 token, got"),
        (["--infill", "[[0]]"], 2, "infill: a hole is"),
        (["--infill", "A[[31-99]]B"], 2, "middle: its holes need 31 positions at least"),
        (["--infill", "A[[31]]B"], 2, "max_tokens: prompt ("),
        (["--infill", "A[[99999999999]][[1]]B"], 2, "infill: its holes (100000000000) exceed the context of 32 tokens"),
        (
            ["--prompt", "RED", "--edit", "2:9"],
            2,
            "edit: must be characters BEGIN:STOP within the prompt's 3, got '2:9'",
        ),
        (["--prompt", "RED", "--edit", "x"], 2, "edit: must be characters"),
        (["--prompt", "RED", "--edit", "1:1"], 2, "edit: must be characters"),
        (["--prompt", "RED", "--edit", "0:2", "--suffix", "x"], 2, "edit: is a span of the prompt's text"),
        (["--prompt", "RED", "--edit", "0:2", "--strength", "0"], 2, "strength: must be greater than 0"),
        (["--prompt", "RED", "--strength", "0.9"], 2, "--strength: says how --edit makes a span anew"),
        (["--prompt", "RED", "--prompt-ids", "1"], 2, "prompt_ids: is another form of prompt"),
        (["--prompt", "RED", "--stop", ""], 2, "stop: must not be empty"),
        (["--suffix", "\udcff"], 2, "suffix: is not Unicode, got '\\udcff': write it as UTF-8"),
        (["--infill", "[[2]] A [[1]]", "--stop", "A"], 2, "stop: is for text that goes on from a prompt"),
        (["--prompt", "RED", "--edit", "0:2", "--stop", "D"], 2, "stop: is for text that goes on from a prompt"),
        (["--regex", "(a"], 2, "constraint: is no regular expression"),
        (["--regex", "a", "--json-schema", "{}"], 2, "json_schema: is another form of regex"),
        (["--regex", "a{99}b"], 2, "constraint: no answer of at most 8 tokens matches it"),
        (["--infill", "A[[1-2]]B", "--regex", "[0-9]{30}"], 2, "constraint: no answer of at most"),
        (["--json-schema", "/nowhere.json"], 3, "--json-schema: cannot be read"),
        (
            ["--json-schema", '{"type": "integer", "maximum": 3}'],
            2,
            "constraint: has keywords that are not kept: maximum",
        ),
        (["--prompts", "/nowhere.txt"], 3, "/nowhere.txt: cannot be read"),
        (["--replay", "/nowhere.jsonl"], 3, "/nowhere.jsonl: cannot be read"),
        (["--replay", "x", "--seed", "2"], 2, "--replay: takes all from the trace"),
        (["--prompt", "RED", "--trace", "/nowhere/at/all"], 3, "/nowhere/at/all: cannot write the trace"),
    ],
)
def test_a_mistake_is_one_line(told, words, code, line):
    got, _, err = told(*words)
    assert (got, err.startswith(f"dllm: {line}"), err.count("\n")) == (code, True, 1), err


@pytest.mark.parametrize(
    ("text", "code", "line"),
    [
        ("", 3, ": holds no prompt"),
        ('{"prompt": "a"}\n{"promt": "b"}', 2, ":2.promt: unknown name: did you mean 'prompt'?"),
        ('{"prompt": 1}', 2, ":1.prompt: must be a valid string"),
        ('{"prompt": "\\ud800"}', 2, ":1.prompt: is not Unicode, got "),
        ("[1]", 2, ":1: must be a JSON object, got [1]"),
        ("{", 2, ":1: is not JSON"),
        ('{"prompt": "a", "prompt": "b"}', 2, ":1: the key is there twice, got 'prompt': keep one"),
    ],
)
def test_a_mistake_in_a_file_of_prompts_names_its_line(told, tmp_path, text, code, line):
    path = tmp_path / "p.jsonl"
    path.write_text(text, encoding="utf-8")
    got, _, err = told("--prompts", str(path))
    assert (got, err.startswith(f"dllm: {path}{line}"), err.count("\n")) == (code, True, 1), err


@pytest.mark.parametrize(
    ("lines", "line"),
    [
        ([{}, {"prompt_ids": [9999]}], ":2.prompt: token ids must be in [0, "),
        ([{}, {"prompt": "x" * 99}], ":2.prompt: 99 tokens leave no room in the context of 32"),
        ([{}, {}, {"infill": "A[[31-99]]B"}], ":3.middle: its holes need 31 positions at least"),
        ([{"prompt": "A"}, {"regex": "a{99}"}], ":2.constraint: no answer of at most 8 tokens"),
        ([{"regex": "(a"}], ":1.constraint: is no regular expression"),
    ],
)
def test_a_line_that_cannot_be_decoded_is_named_before_any_is(told, tmp_path, lines, line):
    path = tmp_path / "p.jsonl"
    path.write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
    code, [failed], err = told("--prompts", str(path))
    assert (code, err.startswith(f"dllm: {path}{line}"), err.count("\n")) == (2, True, 1), err
    assert failed["exit_code"] == 2


def test_a_row_of_a_file_that_fails_costs_the_others_nothing(told, tmp_path, monkeypatch):
    path, trace = tmp_path / "p.jsonl", tmp_path / "trace.jsonl"
    path.write_text('{"prompt_ids": [5, 6]}\n{"prompt_ids": [5, 8]}', encoding="utf-8")
    _, [*expected, _], _ = told("--prompts", str(path))
    poison = min({*range(10, 200)}.difference(*(answer["token_ids"] for answer in expected)))
    embedded = Denoiser.embedded

    def spoilt(self: Denoiser, ids: torch.Tensor) -> torch.Tensor:
        return embedded(self, ids).masked_fill((ids == poison)[..., None], torch.nan)

    monkeypatch.setattr(Denoiser, "embedded", spoilt)
    path.write_text(
        f'{{"prompt_ids": [5, 6]}}\n{{"prompt_ids": [{poison}]}}\n{{"prompt_ids": [5, 8]}}', encoding="utf-8"
    )
    code, [first, bad, last, failed], err = told("--prompts", str(path), "--trace", str(trace))
    assert [first, last] == expected
    assert bad["finish_reason"] == "error"
    assert (code, failed["exit_code"], err.count("\n")) == (3, 3, 1)
    assert f"the denoiser's output is no number for {path}:2" in err
    assert len(trace.read_text().splitlines()) == 2


def test_answers_are_told_as_soon_as_those_before_them_are(told, tmp_path, monkeypatch):
    """What was decoded before an interrupt is not lost."""
    path, step, ticks = tmp_path / "p.jsonl", Engine.step, []
    lines = [{"infill": "A[[1]]B"}, {"prompt": "RED "}, {"infill": "A[[2]]B"}]
    path.write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")

    def interrupted(self: Engine) -> list[RowUpdate]:
        ticks.append(1)
        if len(ticks) == 3:
            raise KeyboardInterrupt
        return step(self)

    monkeypatch.setattr(Engine, "step", interrupted)
    code, [*answers, last], _ = told("--prompts", str(path), "decode.policy.type=low_confidence")
    assert (code, last["error"]["message"]) == (130, "interrupted")
    assert [answer["infill"] for answer in answers] == ["A[[1]]B"]


@pytest.mark.parametrize("name", ["nowhere/trace.jsonl", ""])
def test_a_trace_that_cannot_be_written_is_refused_before_anything_is_decoded(told, tmp_path, monkeypatch, name):
    monkeypatch.delattr(Engine, "step")
    (tmp_path / "p.txt").write_text("RED \n", encoding="utf-8")
    for words in (("--prompt", "RED "), ("--prompts", str(tmp_path / "p.txt"))):
        code, [failed], err = told(*words, "--trace", str(tmp_path / name))
        assert (code, failed["error"]["place"], err.count("\n")) == (3, str(tmp_path / name), 1)
        assert "cannot write the trace ([Errno " in err


def test_a_trace_goes_into_a_pipe_and_takes_no_device_s_place(told, tmp_path):
    path, read = tmp_path / "pipe", []
    os.mkfifo(path)
    reader = threading.Thread(target=lambda: read.append(path.read_text()), daemon=True)
    reader.start()
    assert told("--prompt", "RED ", "--trace", str(path))[0] == 0
    assert path.is_fifo()
    reader.join()
    assert json.loads(read[0])["tokens"]


def test_a_trace_is_of_a_bundle_and_not_of_a_folder(told, tmp_path, small_bundle):
    """Decoding defaults and lineage may change: the trace has its own, and they decide no token."""
    path = tmp_path / "trace.jsonl"
    told("--prompt", "RED ", "--trace", str(path))
    shutil.copytree(small_bundle.url, tmp_path / "runs" / "other-0123456789ab")
    other = RunDir(open_store("root", str(tmp_path)), "other-0123456789ab")
    code, [again], _ = told("--replay", str(path), "decode.policy.type=margin", url=other.url)
    assert (code, again["run"], again["identical"]) == (0, "other-0123456789ab", True)


def test_python_needs_no_more_than_a_bundle_and_requests(small_bundle):
    bundle = read_bundle(small_bundle)
    [answer] = Engine(bundle).generate([Request((5, 6), DecodeConfig.checked(bundle.manifest.decode))])
    assert answer.tokens


def test_what_the_command_line_says_holds_for_each_line_of_a_file(told, tmp_path):
    path = Path(tmp_path, "p.jsonl")
    path.write_text('{"infill": "A [[1]] B"}', encoding="utf-8")
    code, _, err = told("--prompts", str(path), "--prompt", "x")
    assert code == 2
    assert "infill: holds all of the text" in err


@pytest.mark.parametrize("name", ["p.jsonl", "p.txt"])
def test_a_line_ends_at_its_newline_and_at_no_other_character(told, tmp_path, name):
    """A form feed, U+0085 and U+2028 are characters of a prompt, and a mark in front is none."""
    path, prompts = tmp_path / name, ["A\u2028B", "C\x0bD\x85", " "]
    lines = [json.dumps({"prompt": one}, ensure_ascii=False) if name == "p.jsonl" else one for one in prompts]
    path.write_bytes(("\ufeff" + "\r\n".join(lines) + "\r\n").encode())
    code, [*answers, _], err = told("--prompts", str(path))
    assert code == 0, err
    assert [answer["prompt"] for answer in answers] == prompts


def test_what_no_line_of_a_file_would_take_is_refused(told, tmp_path):
    path = tmp_path / "p.txt"
    path.write_text("A\nB\n", encoding="utf-8")
    code, _, err = told("--prompts", str(path), "--prompt", "RED ")
    assert (code, err.count("\n")) == (2, 1)
    assert err.startswith("dllm: --prompt: is what each line says of a file that is no .jsonl, got 'RED '")


def test_frames_show_what_was_given_from_the_first_and_never_as_made(small_bundle):
    bundle = read_bundle(small_bundle)
    tokenizer = bundle.tokenizer()
    config = DecodeConfig(block_length=4, steps_per_block=4, max_tokens=8)
    given = tuple(tokenizer.encode("OF"))
    request = Request((7,), config, (8,), middle=(None, None, *given, None))
    frames = list(unfold(Engine(bundle), tokenizer, request))
    inside = range(3, 3 + len(given))
    for frame in frames:
        assert "".join(frame.texts[i] for i in inside) == "OF"
        styles = {str(span.style) for span in canvas_text(frame).spans}
        assert not any(frame.committed_at[i] or frame.is_open[i] for i in inside)
        assert ("bold green" in styles) == (frame.num_calls > 0)


@pytest.mark.parametrize(
    "asked",
    [
        Asked(prompt="the c", suffix="t sat on"),
        Asked(infill="the c[[1]]t sat on"),
        Asked(prompt="the cat sat on", edit="5:6"),
        Asked(prompt="the cat sat on", edit="0:5"),
    ],
)
def test_what_stands_behind_another_text_begins_with_no_space_of_its_own(asked):
    pieces = sentence_pieces("the cat sat on the mat and ran ")
    request, _ = asked.given(pieces, DecodeConfig(max_tokens=1), 64)
    middle = request.middle if asked.edit is not None else pieces.encode_behind("a")
    assert pieces.decode([*request.prompt, *middle, *request.suffix]) == "the cat sat on"
