"""What the serve verb prints can be copied into a shell as it stands."""

import contextlib
import inspect
import io
import json
import shlex
from functools import partial
from types import SimpleNamespace

import httpx
import pytest
from ray.serve._private import constants
from rich.console import Console as RichConsole

from dllm_core.checkpoints.bundle import read_bundle
from dllm_core.errors import ConfigError, DataError
from workflows import env
from workflows.console import Console
from workflows.pipeline.flow import Pipeline
from workflows.placement import ServePlacement
from workflows.serve import flow
from workflows.serve.app import AppArgs
from workflows.serve.config import Example, ServeConfig, ServedRun
from workflows.serve.flow import ask, say_how_to_use


def test_a_prompt_is_shown_as_it_is_and_not_as_markup(small_corpus):
    prompt = "[bold]RED[/bold] :heart: \\[x] [/nothing]"
    console = Console()
    console.rich = RichConsole(file=io.StringIO(), soft_wrap=True)
    recipe = small_corpus.recipe.model_copy(update={"serve": ServeConfig(examples=(Example(prompt=prompt),))})
    say_how_to_use(console, "http://127.0.0.1:8000", "small", recipe)
    command = shlex.split(console.rich.file.getvalue().splitlines()[1])
    assert json.loads(command[-1])["prompt"] == prompt


@pytest.mark.parametrize(
    ("answer", "line"),
    [
        (httpx.Response(500, text="Internal Server Error"), "is no answer of ours: 'Internal Server Error', got 500"),
        (httpx.Response(404, json={"detail": "Not Found"}), "is no answer of ours: "),
        (httpx.Response(400, json={"error": {"message": "prompt: is bad"}}), "serve: prompt: is bad, got 400"),
    ],
)
def test_an_answer_that_is_none_is_told_in_a_line(answer, line, monkeypatch):
    monkeypatch.setattr(httpx, "post", lambda *_, **__: answer)
    with pytest.raises(DataError) as caught:
        ask("http://127.0.0.1:8000", "small", {"prompt": "RED"})
    assert line in str(caught.value)


@pytest.mark.parametrize(
    ("health", "told"),
    [
        ({"status": "ok", "replicas": 1}, None),
        (
            {"status": "ok", "replicas": 1, "not_loaded": ["bad"]},
            "models stay as they were: serve: no replica can load bad",
        ),
    ],
)
def test_models_of_which_one_cannot_be_loaded_are_taken_back(monkeypatch, capsys, health, told):
    before, new = AppArgs(models={"m": ServedRun(run="m")}), AppArgs(models={"bad": ServedRun(run="b")})
    deployed = []
    monkeypatch.setattr(flow, "args_of", lambda *_: new)
    monkeypatch.setattr(flow, "deploy", deployed.append)
    monkeypatch.setattr(httpx, "get", lambda *_, **__: httpx.Response(200, json=health))
    served = flow._deployed_again(None, None, Console("json"), None, before, "http://127.0.0.1:8000")
    assert served is (new if told is None else before)
    assert deployed == [new, before][: 1 if told is None else 2]
    assert (told or "models") in capsys.readouterr().err


def test_what_is_deployed_names_its_bundle_so_that_another_in_its_place_is_another_model(small_corpus, small_bundle):
    [said] = flow.args_of(small_corpus.recipe, small_bundle).models.values()
    assert said.digest == read_bundle(small_bundle).digest


def test_ray_serve_reads_what_it_is_told_and_waits_for_a_proxy_on_a_busy_machine():
    known = inspect.getsource(constants)
    assert all(f'"{name}"' in known for name in env._SETTINGS if name.startswith("RAY_SERVE_"))
    assert float(env._SETTINGS["RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S"]) >= 60


@pytest.mark.parametrize("verb", ["serve", "run"])
def test_replicas_whose_gpus_are_not_there_are_refused(verb, small_corpus, monkeypatch):
    """One starts with the endpoint even where none need stay, and would be waited for without end."""
    section = ServePlacement(min_replicas=0, gpus_per_replica=1)
    placement = small_corpus.recipe.placement.model_copy(update={"serve": section})
    recipe = small_corpus.recipe.model_copy(update={"placement": placement})
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    for name in ("_SETTINGS", "_PRIVATE"):
        monkeypatch.setattr(env, name, {})
    monkeypatch.setattr(env, "_connect", lambda cpus: None)
    monkeypatch.setattr(env, "_shut_down", lambda before: None)
    monkeypatch.setattr("ray.cluster_resources", lambda: {"CPU": 2.0})
    monkeypatch.setattr(flow, "args_of", lambda *_: AppArgs())
    monkeypatch.setattr(flow, "start", lambda args: pytest.fail("it was waited for"))
    monkeypatch.setattr(flow, "stop", lambda: None)
    monkeypatch.setattr(flow, "check_port", lambda settings: None)
    pipeline = Pipeline(SimpleNamespace(recipe=recipe, run=None), Console("json"))
    ask_for = {"run": pipeline._cluster, "serve": partial(flow.serve_forever, recipe, None, Console("json"), None)}
    with pytest.raises(ConfigError, match="placement: asks for 1 GPUs, this machine has 0"):
        ask_for[verb]()


def test_models_that_change_while_the_first_are_read_are_deployed(small_corpus, tmp_path, monkeypatch):
    path = tmp_path / "models.yaml"
    path.write_text("a: run\n")
    looked, deployed = [], []

    def read_and_changed(*_):
        path.write_text("a: run\nb: other\n")
        return AppArgs()

    def look(_):
        looked.append(1)
        if len(looked) > 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(flow, "args_of", read_and_changed)
    monkeypatch.setattr(flow, "_deployed_again", lambda *_: deployed.append(path.read_text()))
    monkeypatch.setattr(flow, "ray_cluster", lambda *_: contextlib.nullcontext())
    for name in ("check_port", "start", "say_how_to_use", "stop"):
        monkeypatch.setattr(flow, name, lambda *_: None)
    monkeypatch.setattr(flow, "time", SimpleNamespace(sleep=look))
    recipe = small_corpus.recipe.model_copy(update={"serve": ServeConfig(models_file=str(path))})
    with pytest.raises(KeyboardInterrupt):
        flow.serve_forever(recipe, SimpleNamespace(name="run"), Console("json"), None)
    assert deployed == ["a: run\nb: other\n"]
