"""`lm_eval` on bundles: local tasks from its own command line, and the laws of its three kinds of requests."""

import itertools
import json
import math
import os
import random
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import datasets
import lm_eval
import numpy as np
import pytest
from conftest import runs_by_kind
from lm_eval.api.model import CachingLM
from lm_eval.tasks import TaskManager
from sentence_pieces import sentence_pieces

from dllm_core.checkpoints.bundle import FOLDER, read_bundle
from dllm_core.checkpoints.run_dir import RunDir
from dllm_core.data.tokenizer import Tokenizer
from dllm_core.decoding.engine import Engine
from dllm_core.decoding.request import Request
from dllm_core.errors import CheckpointError, ConfigError, RequestError
from dllm_core.evaluation.answers import AnswerScorer
from dllm_core.evaluation.estimators import estimator_of_bundle
from dllm_core.evaluation.question import Question
from workflows.evaluate.harness import DllmModel

TASKS = Path(__file__).with_name("tasks")
DOCUMENTS = [json.loads(line) for line in (TASKS / "questions.jsonl").read_text().splitlines()]
NAMES = ["shapes", "names", "texts"]
SCRIPT = "from workflows.__main__ import lm_eval; lm_eval()"  # what `dllm-lm-eval` runs
SAMPLED = {"until": [], "max_gen_toks": 8, "do_sample": True, "temperature": 1.5}
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def runs(small_bundle: RunDir, tmp_path_factory: pytest.TempPathFactory) -> dict[str, RunDir]:
    """A bundle of random weights of each kind."""
    sections: dict[str, dict[str, object]] = {
        "autoregressive": {"objective": {"type": "autoregressive"}},
        "masked_lm": {"objective": {"type": "masked_lm"}},
        "blocks": {"noise": {"block_length": 4, "epochs": 1}, "objective": {"type": "block_diffusion"}},
        "timed": {"model": {"time_conditioning": True}},
    }
    of = runs_by_kind(tmp_path_factory, sections)
    return {"masks": small_bundle, **{kind: of(kind)[1] for kind in sections}}


def model_of(run: RunDir, **model_args: object) -> DllmModel:
    return DllmModel(bundle=run.url, **{"draws": 8, **model_args})


def asking(*args: object) -> SimpleNamespace:
    return SimpleNamespace(args=args)


def choices() -> list[SimpleNamespace]:
    return [asking(one["question"], f" {choice}") for one in DOCUMENTS for choice in one["choices"]]


def scorer_of(run: RunDir, **options: object) -> AnswerScorer:
    bundle = read_bundle(run)
    return AnswerScorer(bundle.denoiser(), estimator_of_bundle(bundle, "cpu"), **{"draws": 8, **options})


@pytest.fixture
def offline(monkeypatch, tmp_path):
    """Where `datasets` keeps its files, and no way to its hub; beside the tasks, which name a file in their folder."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path))
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.chdir(TASKS)


@pytest.mark.long  # the same questions are put in this process below
def test_the_command_line_runs_local_tasks_and_tells_how_sure_their_figures_are(runs, tmp_path):
    """In a process of its own, which may not reach any hub."""
    run = runs["masks"]
    model_args = f"bundle={run.url}/{FOLDER},draws=8,decode.block_length=2,decode.steps_per_block=2"
    words = ["--model", "dllm", "--model_args", model_args, "--tasks", ",".join(NAMES), "--include_path", str(TASKS)]
    alone = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "hub"), "PYTHONPATH": os.pathsep.join(sys.path)}
    told = subprocess.run(
        [sys.executable, "-c", SCRIPT, *words, "--output_path", str(tmp_path / "out"), "--log_samples"],
        cwd=TASKS,
        env={**os.environ, **alone},
        capture_output=True,
        text=True,
        check=False,
    )
    assert told.returncode == 0, told.stderr[-3000:]
    [path] = (tmp_path / "out").rglob("results_*.json")
    results = json.loads(path.read_text())
    found, said = results["results"], results["config"]["dllm"]
    scores = expected_choices(run)
    assert found["shapes"]["acc,none"] == pytest.approx(scores["acc"])
    assert found["shapes"]["acc_norm,none"] == pytest.approx(scores["acc_norm"])
    assert found["texts"]["bits_per_byte,none"] == pytest.approx(expected_bits(run), rel=1e-6)
    assert 0 <= found["names"]["exact_match,none"] <= 1
    assert (said["run"], said["estimator"], said["is_greedy"], said["draws"]) == (run.url, "exact-count", "decode", 8)
    assert said["loglikelihood_rolling"]["draws"] == 8 * len(DOCUMENTS)
    assert said["decode"]["block_length"] == 2
    assert said["loglikelihood"]["texts"] == len(choices())
    assert said["loglikelihood_rolling"]["texts"] == len(DOCUMENTS)
    for kind in ("loglikelihood", "loglikelihood_rolling"):
        assert 0 < said[kind]["error"] <= said[kind]["largest_error"]


def expected_bits(run: RunDir) -> float:
    """Bits a byte of all documents' texts, each by itself."""
    texts = [Question((), tuple(read_bundle(run).tokenizer().encode(one["text"]))) for one in DOCUMENTS]
    nats = sum(score.nats for batch in scorer_of(run).score(texts) for score in batch.values())
    return nats / math.log(2) / sum(len(one["text"].encode()) for one in DOCUMENTS)


def expected_choices(run: RunDir) -> dict[str, float]:
    """acc and acc_norm of the multiple choice, by hand."""
    tokenizer, hits = read_bundle(run).tokenizer(), {"acc": [], "acc_norm": []}
    for one in DOCUMENTS:
        given = tuple(tokenizer.encode(one["question"]))
        asked = [Question(given, tuple(tokenizer.encode(f" {choice}"))) for choice in one["choices"]]
        nats = {q: score.nats for batch in scorer_of(run).score(asked) for q, score in batch.items()}
        lengths = [len(choice) for choice in one["choices"]]
        hits["acc"].append(np.argmin([nats[q] for q in asked]) == one["answer"])
        per_length = [nats[q] / length for q, length in zip(asked, lengths, strict=True)]
        hits["acc_norm"].append(np.argmin(per_length) == one["answer"])
    return {name: float(np.mean(found)) for name, found in hits.items()}


def test_a_model_made_here_is_evaluated_too(runs, offline):
    run = runs["autoregressive"]
    results = lm_eval.simple_evaluate(
        model=model_of(run),
        tasks=["shapes", "texts"],
        task_manager=TaskManager(include_path=str(TASKS), include_defaults=False),
        bootstrap_iters=0,
    )
    found, said = results["results"], results["config"]["dllm"]
    assert {name: found["shapes"][f"{name},none"] for name in ("acc", "acc_norm")} == expected_choices(run)
    assert found["texts"]["bits_per_byte,none"] == pytest.approx(expected_bits(run), rel=1e-6)
    assert (said["estimator"], said["is_greedy"]) == ("exact", "argmax")
    assert said["loglikelihood"] == {"texts": len(choices()), "draws": len(choices()), "error": 0, "largest_error": 0}
    [scored, *_] = results["samples"]["shapes"]
    assert [tuple(resps[0]) for resps in scored["resps"]] == model_of(run).loglikelihood(choices()[:4])


@pytest.mark.parametrize("kind", ["masks", "autoregressive", "blocks"])
def test_results_depend_on_no_order_no_company_and_no_batch(runs, kind):
    requests = [*choices(), *choices()[:3]]
    model = model_of(runs[kind])
    whole = model.loglikelihood(requests)
    assert whole[:3] == whole[-3:]
    assert {score.draws for score in model.scores.values()} == ({1} if kind == "autoregressive" else {1, 8})
    order = random.Random(0).sample(range(len(requests)), len(requests))
    mixed = model_of(runs[kind], max_batch_tokens=64).loglikelihood([requests[i] for i in order])
    assert mixed == [whole[i] for i in order]
    assert model_of(runs[kind]).loglikelihood(requests[5:6]) == whole[5:6]
    if kind != "autoregressive":
        assert model_of(runs[kind], seed=1).loglikelihood(requests) != whole
    texts = [asking(one["text"]) for one in DOCUMENTS]
    rolling = model_of(runs[kind]).loglikelihood_rolling(texts)
    assert model_of(runs[kind], max_batch_tokens=32).loglikelihood_rolling(texts[::-1]) == rolling[::-1]


@pytest.mark.parametrize("kind", ["masks", "autoregressive"])
def test_the_chances_of_all_texts_of_one_token_add_up_to_1_less_those_that_cannot_follow(runs, kind):
    tokenizer, context = read_bundle(runs[kind]).tokenizer(), "RED CIRCLE 7"
    given_ = tokenizer.encode(context)
    texts = [tokenizer.token_text(i) for i in range(tokenizer.vocab_size) if i not in tokenizer.special_ids]
    follow = [text for text in texts if len(tokenizer.encode(context + text)) == len(given_) + 1]
    model = model_of(runs[kind])
    chances = [math.exp(logp) for logp, _ in model.loglikelihood([asking(context, text) for text in follow])]
    assert 100 < len(follow) < len(texts)
    assert 0.2 < sum(chances) < 1
    assert {score.error for score in model.scores.values()} == {0}


def test_a_continuation_is_scored_whole_wherever_the_border_falls(runs):
    """With the spaces before it; as a document is encoded, or apart where one token would stand across the border."""
    model, tokenizer = model_of(runs["masks"]), read_bundle(runs["masks"]).tokenizer()
    text, kinds = "HEAVY RED ARROW 17\n\n WHITE  HEART 3", set()
    for cut in range(len(text)):
        question = model._question(text[:cut], text[cut:])
        stripped = text[:cut].rstrip()
        assert tokenizer.decode(question.context) == stripped
        assert tokenizer.decode(question.answer) == text[len(stripped) :]
        whole = tokenizer.encode(text)
        is_whole = whole[: len(question.context)] == list(question.context)
        apart = tokenizer.encode(text[len(stripped) :])
        assert list(question.answer) == (whole[len(question.context) :] if is_whole else apart)
        kinds.add(is_whole)
    assert kinds == {True, False}
    assert model._question("", text) == Question((), tuple(tokenizer.encode(text)))
    assert model.loglikelihood([asking("RED", "")]) == [(0.0, True)]


def test_a_continuation_is_encoded_as_the_text_that_it_ends(runs):
    """A tokenizer that puts a space before every text puts none into the middle of one."""
    model, tokenizer = model_of(runs["masks"]), read_bundle(runs["masks"]).tokenizer()
    spaced = tokenizer.json_text.replace('"add_prefix_space":false', '"add_prefix_space":true')
    model._tokenizer = Tokenizer(spaced, tokenizer.config)
    question = model._question("RED:", "CIRCLE")
    assert model._tokenizer.decode([*question.context, *question.answer]) == " RED:CIRCLE"
    assert model._tokenizer.decode(model._tokenizer.encode("CIRCLE")) == " CIRCLE"
    model._tokenizer, text = sentence_pieces("the cat sat on the mat and ran "), "the cat sat on the mat"
    for cut in range(len(text)):  # within words too, where both are encoded apart
        question = model._question(text[:cut], text[cut:])
        assert model._tokenizer.decode([*question.context, *question.answer]) == text


@pytest.mark.parametrize("kind", ["masks", "blocks", "autoregressive"])
def test_is_greedy_means_that_decoding_gives_exactly_this(runs, kind):
    model, bundle = model_of(runs[kind]), read_bundle(runs[kind])
    tokenizer, engine, requests = bundle.tokenizer(), Engine(bundle), []
    for n, start in itertools.product((1, 2, 3), range(0, 60, 2)):
        context = f"RED CIRCLE {start}"
        prompt = tuple(tokenizer.encode(context))
        [answer] = engine.generate([Request(prompt, model._decode.model_copy(update={"max_tokens": n}))])
        text = tokenizer.decode(answer.tokens)
        if len(answer.tokens) == n and model._question(context, text) == Question(prompt, tuple(answer.tokens)):
            requests.append(asking(context, text))
    assert len(requests) >= 3
    assert all(is_greedy for _, is_greedy in model.loglikelihood(requests))
    others = [asking(context, f"{text}X"[1:]) for context, text in (request.args for request in requests)]
    assert not any(is_greedy for _, is_greedy in model.loglikelihood(others))


def test_where_there_is_no_decoder_nothing_is_greedy_and_it_is_said(runs):
    model = model_of(runs["timed"])
    assert not any(is_greedy for _, is_greedy in model.loglikelihood(choices()))
    assert model.get_model_info()["dllm"]["is_greedy"] is None
    with pytest.raises(ConfigError, match=r"^model\.time_conditioning: there is no decoder"):
        model.generate_until([asking("RED", {"until": []})])


def test_a_text_ends_before_the_first_of_its_stop_strings_and_costs_no_call_more(runs):
    model = model_of(runs["masks"], **{"decode.block_length": 1, "decode.steps_per_block": 1})
    calls: list[int] = []
    model._denoiser.register_forward_hook(lambda *told: calls.append(1))
    told = {"max_gen_toks": 12, "do_sample": True, "temperature": 1.0}
    [whole] = model.generate_until([asking("RED", {**told, "until": []})])
    of_whole = len(calls)
    assert (of_whole, len(whole) > 6) == (12, True)
    for at in (1, 4):
        calls.clear()
        stops = [whole[at : at + 2], whole[at + 1 : at + 3], "nowhere", ""]
        [cut] = model.generate_until([asking("RED", {**told, "until": stops})])
        assert cut == whole[: min(whole.find(stop) for stop in stops[:2])]
        assert len(calls) < of_whole
    assert model.generate_until([asking("RED", {**told, "until": whole[1]})]) == [whole[: whole.find(whole[1])]]


@pytest.mark.parametrize("kind", ["masks", "blocks", "autoregressive"])
def test_a_text_is_what_the_engine_gives_alone_and_in_any_company(runs, kind):
    model, bundle = model_of(runs[kind]), read_bundle(runs[kind])
    tokenizer = bundle.tokenizer()
    requests = [asking(f"RED {i} CIRCLE"[: 4 + i], {"until": [], "max_gen_toks": 1 + i % 9}) for i in range(14)]
    texts = model.generate_until(requests)
    for request, text in zip(requests, texts, strict=True):
        config = model._decode.model_copy(update={"max_tokens": request.args[1]["max_gen_toks"]})
        [answer] = Engine(bundle).generate([Request(tuple(tokenizer.encode(request.args[0])), config)])
        assert text == tokenizer.decode(answer.tokens)
    assert len(set(texts)) > 5
    assert model_of(runs[kind], max_batch_tokens=32).generate_until(requests[::-1]) == texts[::-1]
    [unsaid] = model.generate_until([asking("RED", {"until": []})])
    assert unsaid == model.generate_until([asking("RED", {"until": [], "max_gen_toks": model._decode.max_tokens})])[0]


def test_texts_that_were_interrupted_are_written_again_by_the_same_model(runs):
    model, requests = model_of(runs["masks"]), [asking(text, {"until": [], "max_gen_toks": 8}) for text in ("RED", "A")]
    expected = model.generate_until(requests)

    def interrupt(*_: object) -> None:
        handle.remove()
        raise KeyboardInterrupt

    handle = model._denoiser.register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        model.generate_until(requests)
    assert model.generate_until(requests) == expected


def test_repeats_that_sample_differ_and_those_that_do_not_are_equal(runs):
    requests = [asking("RED", SAMPLED)] * 5 + [asking("BLUE", SAMPLED)]
    texts = model_of(runs["masks"]).generate_until(requests)
    assert len(set(texts)) > 3
    assert model_of(runs["masks"]).generate_until([*requests[4:], *requests[:4]]) == [texts[0], texts[5], *texts[1:5]]
    assert model_of(runs["masks"], seed=1).generate_until(requests) != texts
    for cold in ({"do_sample": False}, {"do_sample": None, "temperature": 0.0}):
        assert len(set(model_of(runs["masks"]).generate_until([asking("RED", {**SAMPLED, **cold})] * 3))) == 1


@pytest.mark.parametrize(("tokens", "wanted"), [(0, 99), (5, 99), (60, 8), (60, 99), (31, 1), (32, 32)])
def test_what_does_not_fit_is_cut_off_and_counted(runs, tokens, wanted):
    """A context of 32 tokens: the end of the prompt stays, half of the positions are its own if it needs them."""
    model, bundle = model_of(runs["masks"]), read_bundle(runs["masks"])
    prompt = bundle.tokenizer().encode(" RED CIRCLE 17\n" * 20)[:tokens]
    context = bundle.tokenizer().decode(prompt)
    request, _ = model._decoding(context, {"until": [], "max_gen_toks": wanted}, 0)
    room = 32 - min(wanted, 32 - min(tokens, 16))
    assert request.config.max_tokens == 32 - room
    assert list(request.prompt) == prompt[max(0, tokens - room) :]
    counted = model.get_model_info()["dllm"]["shortened"]
    assert counted == {"canvases": int(wanted > 32 - room), "prompts": int(tokens > room)}
    assert len(model.generate_until([asking(context, {"until": [], "max_gen_toks": wanted})])) == 1


def test_answers_that_a_run_was_interrupted_after_are_found_in_the_cache(runs, tmp_path):
    """Every batch is put there as it ends."""
    requests = choices()
    whole = model_of(runs["masks"]).loglikelihood(requests)
    broken = model_of(runs["masks"], max_batch_tokens=64)
    with pytest.raises(KeyboardInterrupt):
        CachingLM(Interrupted(broken, after=3), str(tmp_path / "cache.db")).loglikelihood(requests)
    again = CachingLM(Interrupted(model_of(runs["masks"]), after=10**6), str(tmp_path / "cache.db"))
    assert again.loglikelihood(requests) == whole
    assert 0 < again.lm.asked < len(requests)


class Interrupted:
    """Ctrl-C at the batch `after`; asked: how many requests came."""

    def __init__(self, model: DllmModel, after: int) -> None:
        self.model, self.after, self.asked = model, after, 0
        self.set_cache_hook = model.set_cache_hook

    def loglikelihood(self, requests: list[SimpleNamespace]) -> list[tuple[float, bool]]:
        self.asked = len(requests)
        batches = self.model._scorer.score

        def interrupted(questions: list[Question]):
            for i, batch in enumerate(batches(questions)):
                if i == self.after:
                    raise KeyboardInterrupt
                yield batch

        self.model._scorer.score = interrupted
        return self.model.loglikelihood(requests)


def test_a_model_is_found_by_the_name_of_its_run_or_of_its_bundle(runs, monkeypatch):
    run = runs["masks"]
    monkeypatch.chdir(run.store.path(run.key("")))
    for bundle in (run.url, f"{run.url}/", f"{run.url}/{FOLDER}", f"{run.url}/{FOLDER}/", ".", FOLDER):
        assert DllmModel(bundle=bundle).get_model_info()["dllm"]["run"] == run.url


@pytest.mark.parametrize(
    ("wrong", "line"),
    [
        ({"bundle": ""}, r"model_args\.bundle: missing"),
        ({"drawz": 4}, r"model_args\.drawz: unknown name: did you mean 'draws'\?"),
        ({"draws": 0}, r"model_args\.draws: .* got 0"),
        ({"overlap": 32}, r"model_args\.overlap: must be below the context of 32 tokens, got 32"),
        ({"device": "nonsense"}, r"model_args\.device: cannot be used"),
        ({"decode.block_lenth": 4}, r"decode\.block_lenth: unknown name: did you mean 'block_length'\?"),
    ],
)
def test_an_argument_that_means_nothing_is_refused_in_one_line(runs, wrong, line):
    with pytest.raises(ConfigError, match=f"^{line}") as refused:
        DllmModel(**{"bundle": runs["masks"].url, **wrong})
    assert "\n" not in str(refused.value)


def test_what_cannot_be_scored_or_decoded_as_asked_is_refused(runs, tmp_path):
    with pytest.raises(ConfigError, match=r"^objective\.type: such a model has no likelihood, got 'masked_lm'"):
        model_of(runs["masked_lm"])
    with pytest.raises(CheckpointError, match="there is no bundle"):
        DllmModel(bundle=str(tmp_path / "runs" / "none"))
    model = model_of(runs["masks"])
    for told, line in (({"top_k": 3}, r"generation_kwargs\.top_k: is unknown"), ({"num_beams": 4}, "num_beams")):
        with pytest.raises(RequestError, match=line):
            model.generate_until([asking("RED", {"until": [], **told})])
    with pytest.raises(ConfigError, match=r"generation_kwargs\.max_tokens: .* got 0"):
        model.generate_until([asking("RED", {"until": [], "max_gen_toks": 0})])
    assert model.generate_until([asking("RED", {"until": [], "num_beams": 1})])


def test_without_its_extra_the_harness_says_what_to_install():
    code = f"import sys; sys.modules['lm_eval'] = None; {SCRIPT}"
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (told.returncode, told.stdout) == (2, "")
    assert told.stderr == "dllm: lm_eval: is not installed: pip install 'dllm[harness]'\n"
