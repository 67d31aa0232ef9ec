"""The command line as a shell sees it: one line and the right exit code for every mistake."""

import errno
import importlib.metadata
import io
import json
import os
import socket
import subprocess
import sys

import pytest
import ray
import yaml
from conftest import make_small_bundle, make_small_corpus, write_small

from dllm_core.checkpoints.run_dir import JsonLines, RunDir
from dllm_core.errors import CheckpointError
from dllm_core.storage.store import LocalStore
from workflows.cli import run_command_line
from workflows.interrupts import Interrupted
from workflows.pipeline.flow import Pipeline
from workflows.target import Target
from workflows.verb import EndedError, run_verb

DLLM = [sys.executable, "-m", "workflows"]


def dllm(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*DLLM, *words], capture_output=True, text=True, check=False, timeout=120)


@pytest.fixture
def here(capsys):
    """`dllm WORDS` in this process: as from a shell, but for the start of Python and torch, which is seconds each."""

    def run(*words: str) -> subprocess.CompletedProcess[str]:
        capsys.readouterr()
        code = run_command_line(list(words))
        told = capsys.readouterr()
        assert not ray.is_initialized()
        return subprocess.CompletedProcess(words, code, told.out, told.err)

    return run


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A folder with a corpus and `small.yaml`."""
    folder = tmp_path_factory.mktemp("cli")
    write_small(folder)
    return folder


MISTAKES = [
    (2, "decode.step_per_block=4", "dllm: decode.step_per_block: unknown name: did you mean 'steps_per_block'?"),
    (
        2,
        "decode.steps_per_block=64",
        "dllm: decode.steps_per_block: must be in [1, block_length=4], got 64: every step",
    ),
    (2, "train.steps=0", "dllm: train.steps: must be greater than or equal to 1, got 0"),
    (2, "train.learning_rate=.nan", "dllm: train.learning_rate: must be"),
    (2, "noise.process.type=gaussian", "dllm: noise.process.type: "),
    (2, "train.batch_rows=7", "dllm: train.batch_rows: must be a multiple of placement.train.workers=2, got 7"),
    (2, "name=../escape", "dllm: name: must be 1-128 of"),
    (2, "storage.root=ftp://host/x", "dllm: storage.root: unknown kind of storage, got 'ftp://host/x'"),
    (2, "storage.root=s3:/bucket", "dllm: storage.root: is neither a path nor s3://bucket/prefix, got 's3:/bucket'"),
    (2, "train", "dllm: train: not an override: write dotted.path=value"),
    (2, "train.steps=yes", "dllm: train.steps: must not be true or false, got True"),
    (2, "storage.root=~nosuchuser/x", "dllm: storage.root: is no path ("),
    (2, "packing.seq_len=8192", "dllm: serve.max_batch_tokens: must be >= packing.seq_len=8192"),
    (3, "tokenizer.path=/nope.json", "dllm: tokenizer.path: cannot be read ("),
    (3, "corpus.path=/nowhere/at/all", "dllm: corpus.path: no such file or folder, got '/nowhere/at/all'"),
    (3, "corpus.glob=*.pdf", "dllm: corpus.path: no file matches '*.pdf'"),
    (3, "storage.root=/proc/nowhere", "dllm: storage.root: cannot write ("),
]


@pytest.mark.parametrize(("code", "override", "line"), MISTAKES, ids=[override for _, override, _ in MISTAKES])
def test_a_mistake_gets_one_line_and_its_exit_code_before_anything_starts(root, here, code, override, line):
    told = here("run", str(root / "small.yaml"), override)
    assert told.returncode == code
    assert told.stderr.startswith(line)
    assert told.stderr.count("\n") == 1
    assert told.stdout == ""
    assert not list((root / "storage").glob("runs/*/events.jsonl"))


def test_a_cluster_that_does_not_answer_is_told_of_in_one_line(root, here, tmp_path, monkeypatch):
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{closed.getsockname()[1]}"  # nobody listens there
        monkeypatch.setenv("RAY_ADDRESS", address)
        told = here("train", str(root / "small.yaml"), f"storage.root={tmp_path}")
    assert told.returncode == 3
    line = "dllm: RAY_ADDRESS: no Ray cluster answers ([Errno 111] Connection refused), got "
    assert told.stderr.startswith(f"{line}'{address}': check it, or unset it")


def test_a_port_that_is_taken_is_refused_before_training(root, here):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        told = here("run", str(root / "small.yaml"), f"serve.port={taken.getsockname()[1]}")
    assert told.returncode == 2
    assert told.stderr.startswith("dllm: serve.port: cannot be listened on at 127.0.0.1 (")


def test_a_port_is_told_as_an_option_which_holds_over_the_recipe(small_bundle, here):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        told = here("serve", small_bundle.url, "serve.port=8001", "--port", str(port))
    assert told.returncode == 2
    assert told.stderr.startswith("dllm: serve.port: cannot be listened on at 127.0.0.1 (")
    assert told.stderr.rstrip().count("\n") == 0
    assert str(port) in told.stderr


@pytest.mark.parametrize("verb", ["generate", "serve"])
def test_a_bundle_that_fails_its_sha256_is_refused_by_its_file(small_bundle, here, tmp_path, verb):
    run = tmp_path / "runs" / small_bundle.name
    for item in small_bundle.store.list(small_bundle.prefix):
        target = tmp_path / item.key
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(small_bundle.store.read(item.key))
    weights = run / "bundle" / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    told = here(verb, str(run))
    assert told.returncode == 3
    assert told.stderr == f"dllm: {weights}: does not match its sha256: the file was changed or damaged\n"


@pytest.mark.parametrize("verb", [["generate"], ["serve"]])
def test_a_model_without_decoder_is_refused_before_anything_starts(here, tmp_path, verb):
    corpus = make_small_corpus(tmp_path, objective={"type": "masked_lm"}, noise={"epochs": 0})
    run = make_small_bundle(corpus, corpus.store.root)
    told = here(*verb, run.url)
    assert told.returncode == 2
    line = "dllm: objective.type: there is no decoder for such a model yet, got 'masked_lm': it can be trained"
    assert told.stderr.startswith(line)
    assert told.stderr.count("\n") == 1
    assert told.stdout == ""


BLOCKS = ["objective.type=block_diffusion", "noise.block_length=4", "corpus.heldout_fraction=0.2"]


@pytest.mark.parametrize(
    ("overrides", "line"),
    [
        (
            ["decode.block_length=8", "decode.steps_per_block=8"],
            "decode.block_length: must be noise.block_length=4, got 8: decode.block_length=4 decode.steps_per_block=4",
        ),
        (
            ["serve.examples=[{prompt: RED}, {prompt: RED, suffix: STAR}]"],
            "serve.examples.1.suffix: the model reads from left to right and does not see what stands behind a hole, "
            "got 'STAR': leave it out",
        ),
    ],
    ids=["block_length", "suffix"],
)
def test_what_a_model_of_blocks_could_not_be_asked_is_refused_before_anything_starts(root, here, overrides, line):
    told = here("run", str(root / "small.yaml"), *BLOCKS, *overrides)
    assert (told.returncode, told.stderr) == (2, f"dllm: {line}\n")
    assert not list((root / "storage").glob("runs/*/events.jsonl"))


@pytest.mark.long
@pytest.mark.parametrize(
    ("kind", "refusals"),
    [
        (["objective.type=autoregressive"], {"generate": (["--suffix", "STAR"], "suffix: the model reads from left")}),
        (
            BLOCKS,
            dict.fromkeys(
                ("generate", "serve", "evaluate"),
                (["decode.block_length=8"], "decode.block_length: must be noise.block_length=4, got 8: decode."),
            ),
        ),
    ],
    ids=["autoregressive", "blocks"],
)
def test_what_reads_left_to_right_is_trained_and_generates(root, kind, refusals):
    """The recipe asks for other blocks than the model's: that hinders no training, but every decoding."""
    train = ["train", str(root / "small.yaml"), *kind, "decode.block_length=5", "placement.train.workers=1"]
    told = dllm(*train, "--output", "json")
    assert told.returncode == 0, told.stderr
    run = json.loads(told.stdout.splitlines()[-1])["run"]
    words = ["generate", run, "--prompt", "HEAVY RED ", "decode.block_length=4", "--seed", "3", "--output", "json"]
    told = [dllm(*words, f"decode.temperature={value}").stdout for value in (1, 1, 0)]
    hot, again, greedy = (json.loads(stdout.splitlines()[-1]) for stdout in told)
    assert hot["text"] == again["text"] != greedy["text"]
    for answer in (hot, greedy):
        if kind is BLOCKS:
            assert answer["policy"] == {"type": "threshold", "threshold": 0.9}
        else:
            assert answer["policy"] is None
            assert answer["num_calls"] == answer["num_tokens"] > 0
    for verb, (more, line) in refusals.items():
        told = dllm(verb, run, *more)
        assert (told.returncode, told.stdout) == (2, "")
        assert told.stderr.startswith(f"dllm: {line}")
        assert told.stderr.count("\n") == 1


def test_with_json_the_last_line_is_one_object_for_an_answer_and_for_an_error(small_bundle, here):
    told = here("generate", small_bundle.url, "--prompt", "RED ", "--seed", "3", "--output", "json")
    assert told.returncode == 0
    answer = json.loads(told.stdout.splitlines()[-1])
    assert answer["tokens_per_call"] == pytest.approx(answer["num_tokens"] / answer["num_calls"], abs=1e-3)
    by_ids = [
        "--prompt-ids",
        ",".join(map(str, answer["prompt_ids"])),
        "decode.policy.type=margin",
        "decode.cache=dual",
    ]
    told = here("generate", small_bundle.url, *by_ids, "--output", "json")
    other = json.loads(told.stdout.splitlines()[-1])
    assert (other["prompt_ids"], other["policy"]["type"]) == (answer["prompt_ids"], "margin")
    assert len(other["calls"]) == other["num_calls"]
    committed = {one["position"]: one["token"] for call in other["calls"] for one in call}
    first = len(other["prompt_ids"])
    assert [committed[first + i] for i in range(len(other["token_ids"]))] == other["token_ids"]
    told = here("generate", small_bundle.url, "--prompt-ids", "1,x")
    assert (told.returncode, told.stderr.startswith("dllm: --prompt-ids: must be numbers")) == (2, True)
    told = here("generate", small_bundle.url, "decode.max_tokens=0", "--output", "json")
    error = json.loads(told.stdout.splitlines()[-1])
    assert (told.returncode, error["exit_code"], error["error"]["place"]) == (2, 2, "decode.max_tokens")


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["--foo"], "no such option: --foo"),
        (["show"], "missing argument 'RECIPE-or-RUN'"),
        (["show", "x.yaml", "--output", "xml"], "invalid value for '--output'"),
        (["nope"], "no such command 'nope'"),
        (["show", "x" * 300], "cannot be read"),
        (["preprocess", "verfy", "x.yaml"], "preprocess: knows no such action, got 'verfy': one of plan, run, verify,"),
        (["preprocess", "x.yaml", "plan"], "the action stands first, got 'plan': dllm preprocess plan x.yaml"),
        (["preprocess", "x.yaml", "train.steps"], "x.yaml: no such recipe"),
    ],
)
def test_a_mistake_in_the_words_themselves_is_one_line(here, words, line):
    told = here(*words)
    assert told.returncode == 2
    assert line in told.stderr
    assert told.stderr.count("\n") == 1


def test_text_that_looks_like_markup_or_cannot_be_spelled_is_shown_as_it_is(small_bundle):
    words = [*DLLM, "generate", small_bundle.url, "--prompt", "[/b] :warning: [red]é\\"]
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    told = subprocess.run(words, env=environment, capture_output=True, check=False, timeout=120)
    assert told.returncode == 0
    assert told.stdout.startswith(b"[/b] :warning: [red]\\xe9\\")


def test_a_reader_that_has_left_ends_a_verb_in_one_line(tmp_path):
    """As `dllm run ... | head`: exit code 3 as of a disk that is full, not 1 without a word."""
    reading, writing = os.pipe()
    os.close(reading)
    words = [*DLLM, "task", "addition", str(tmp_path / "sums"), "--rows", "3"]
    told = subprocess.run(words, stdout=writing, stderr=subprocess.PIPE, text=True, check=False, timeout=120)
    os.close(writing)
    assert (told.returncode, told.stderr) == (3, "dllm: dllm: the system refuses ([Errno 32] Broken pipe)\n")


class Closed(io.StringIO):
    """A stream whose reader has left."""

    def write(self, text: str) -> int:
        raise BrokenPipeError(errno.EPIPE, "Broken pipe")


@pytest.mark.parametrize("output", ["text", "json"])
@pytest.mark.parametrize(
    ("ends_it", "code"), [(KeyboardInterrupt(), 130), (Interrupted(), 143), (CheckpointError("train", "gone"), 3)]
)
def test_a_reader_that_has_left_changes_no_exit_code(small_corpus, tmp_path, monkeypatch, output, ends_it, code):
    """As `dllm run ... 2>&1 | tee log`, where Ctrl-C ends both: 1 and a traceback, or 3, would be another end."""
    run = RunDir(LocalStore(tmp_path), "small-01")

    def body(console):
        with Pipeline(Target(small_corpus.recipe, run, None), console) as pipeline, pipeline._stage("train"):
            monkeypatch.setattr(sys, "stdout", Closed())
            monkeypatch.setattr(sys, "stderr", Closed())
            raise ends_it

    with pytest.raises(EndedError) as ended:
        run_verb(body, output)
    assert ended.value.code == code
    told = JsonLines(run, "events.jsonl").read()[-1]
    assert (told["event"], told["error"].split(":")[0]) == ("failed", type(ends_it).__name__)


def test_a_command_that_is_shown_can_be_pasted(here, tmp_path):
    told = here("task", "addition", str(tmp_path / "my sums"), "--rows", "3")
    assert f"dllm run '{tmp_path}/my sums/recipe.yaml'" in told.stdout


def test_a_run_keeps_its_name_as_it_keeps_what_it_is(small_bundle, here):
    for word in ("name=other", "seed=77"):
        told = here("show", small_bundle.url, word)
        line = f"dllm: {word}: would make another run than, got '{small_bundle.name}': start from a recipe file"
        assert (told.returncode, told.stderr.startswith(line)) == (2, True)


def test_show_prints_the_resolved_recipe(root, here):
    told = here("show", str(root / "small.yaml"), "train.steps=77")
    assert told.returncode == 0
    assert yaml.safe_load(told.stdout)["train"]["steps"] == 77


def test_which_version_this_is(here):
    told = here("--version")
    assert (told.returncode, told.stdout, told.stderr) == (0, f"dllm {importlib.metadata.version('dllm')}\n", "")
    assert "Usage: dllm" in here().stdout  # no verb
