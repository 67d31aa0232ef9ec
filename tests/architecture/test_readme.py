"""What the README tells a newcomer to type works: every `sh` command is read and tried as far as is cheap.

The Python block runs against a live endpoint in tests/endpoint/test_endpoint.py.
"""

import doctest
import json
import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from lm_eval._cli import HarnessCLI
from lm_eval.api.registry import model_registry
from typer.testing import CliRunner

from dllm_core.config.overrides import parse_yaml
from workflows.cli import app
from workflows.compare.recipe import load_comparison
from workflows.evaluate.harness import HarnessConfig
from workflows.recipe import Recipe, load_recipe
from workflows.serve.dialect.body import parse_body
from workflows.serve.dialect.completions import CompletionRequest
from workflows.submit.demand import check_room, startable
from workflows.submit.flow import Submission, prepare
from workflows.task.flow import write_task

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
QUICKSTART = ROOT / "workflows" / "recipes" / "quickstart.yaml"
COMMANDS = [
    line
    for block in re.findall(r"```sh\n(.*?)```", README, re.DOTALL)
    for line in block.splitlines()
    if line.strip() and not line.startswith("#")
]

WRITTEN = dict(re.findall(r"```yaml\n# (\S+)\n(.*?)```", README, re.DOTALL))


def words_of(command: str) -> list[str]:
    words = shlex.split(command, comments=True)
    while re.fullmatch(r"[A-Z_]+=\S*", words[0]):
        words = words[1:]
    return words


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_of_the_readme_means_something(command, tmp_path):
    tool, *words = words_of(command)
    if tool == "make":
        subprocess.run(["make", "-n", *words], cwd=ROOT, check=True, capture_output=True)
    elif tool == "curl":
        body = json.loads(words[words.index("-d") + 1])
        assert parse_body(CompletionRequest, json.dumps(body).encode()).prompt
    elif tool == "dllm-lm-eval":
        assert tool in tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
        parser = HarnessCLI()._parser  # parse_args() reads the words of this process
        told = parser.parse_args(["run", *words])
        assert told.model in model_registry
        assert HarnessConfig.checked(told.model_args).bundle
    else:
        assert tool == "dllm"
        verb, target, *rest = words
        root = ROOT
        for kind, out in re.findall(r"^dllm task (\w+) (\S+)", README, re.MULTILINE):
            if (verb, target) == ("task", kind) or target == f"{out}/recipe.yaml":
                root, target = tmp_path, f"{out}/recipe.yaml"
                write_task(kind, str(root / out), 20, 0, [])
        if target in WRITTEN:  # not resolved: there is no run here to start from
            assert verb in {"run", "train"}
            assert Recipe.checked({"name": "written", **parse_yaml(WRITTEN[target], target)}).start is not None
            return
        if target in {"plan", "verify", "repair", "inspect"}:
            target, *rest = rest
        options = [word for word in rest if word.startswith("--")]
        told = CliRunner().invoke(app, [verb, "--help"], env={"COLUMNS": "200", "TERM": "dumb"})
        assert told.exit_code == 0
        assert all(option in told.stdout for option in options)
        overrides = [word for word in rest if re.match(r"[a-z_]+(\.[a-z_]+)*=", word)]
        if verb == "bench":
            assert target.startswith("http://127.0.0.1:")
            return
        if verb == "jobs":
            assert target in {"list", "status", "logs", "stop"}
            return
        if verb == "submit":
            files = {
                option: Path(rest[rest.index(option) + 1]) for option in ("--placement", "--nodes") if option in rest
            }
            placement, nodes = files["--placement"], files["--nodes"]
            job = prepare(Submission(str(root / target), tuple(overrides), placement=root / placement))
            assert check_room(job.needs, [], startable(root / nodes))
            return
        if verb == "import":
            own = [word for word in overrides if "." not in word.partition("=")[0]]
            assert {word.partition("=")[0] for word in own} <= {"mask_id", "eos_id", "dtype"}
            assert load_recipe(QUICKSTART, [word for word in overrides if word not in own]).name
            assert re.fullmatch("[a-z]+", rest[0])
            return
        if verb == "compare":
            assert load_comparison(root / target, overrides).models
            return
        recipe = load_recipe(root / target if target.endswith(".yaml") else QUICKSTART, overrides)
        assert recipe.name
        if not target.endswith(".yaml"):
            assert re.search(r"runs/[a-z]+-[0-9a-f]{12}$", target)


def test_the_readme_has_a_command_for_every_verb():
    verbs = {words_of(command)[1] for command in COMMANDS if words_of(command)[0] == "dllm"}
    assert verbs == {
        *("run", "show", "plan", "preprocess", "train", "evaluate", "generate", "serve", "task", "compare"),
        *("import", "export", "bench", "submit", "jobs", "doctor"),
    }


def test_the_engine_is_asked_in_python_as_the_readme_says(small_bundle):
    [block] = re.findall(r"```pycon\n(.*?)```", README, re.DOTALL)
    there: dict[str, object] = {}
    for example in doctest.DocTestParser().get_examples(block):
        source = re.sub(r'"dllm-runs/[^"]*"', repr(small_bundle.url), example.source)
        exec(compile(source, "README", "single"), there)
    assert there["answer"].tokens


def test_the_typo_of_the_readme_gets_the_answer_of_the_readme():
    [(command, answer)] = re.findall(r"^\$ dllm (.*)\n(dllm: .*)$", README, re.MULTILINE)
    told = subprocess.run(
        [sys.executable, "-m", "workflows", *shlex.split(command)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert told.returncode == 2
    assert told.stderr.strip() == answer


def test_what_the_readme_points_at_is_there():
    links = [link for link in re.findall(r"\]\(([^)#]+)\)", README) if "://" not in link]
    files = [name for name in re.findall(r"`([\w/.]+\.(?:py|yaml|txt))`", README) if "/" in name or name[0].isalpha()]
    for name in [*links, *(name for name in files if "/" in name)]:
        assert (ROOT / name).exists(), name
