"""The house stays as it is drawn: where things are, how large they are, who imports whom."""

import ast
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TOP_LEVEL = {"workflows", "dllm_core", "deploy", "tests", "pyproject.toml", "cluster.yaml"}
BESIDE = {"README.md", "Makefile", "LICENSE", "constraints.txt"}
SOURCES = sorted(path for package in ("dllm_core", "workflows") for path in (ROOT / package).rglob("*.py"))
FORBIDDEN_NAMES = {"utils", "util", "common", "helpers", "helper", "manager", "misc"}


def tracked() -> list[str]:
    listing = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False)
    if listing.returncode:
        pytest.skip("not a git checkout")
    return listing.stdout.splitlines()


@cache
def imports_of(path: Path) -> set[str]:
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
    return found


def test_nothing_stands_at_the_top_but_what_belongs_there():
    top = {name.partition("/")[0] for name in tracked()}
    assert {name for name in top if not name.startswith(".")} <= TOP_LEVEL | BESIDE


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_file_says_what_it_is_and_has_one_room(path):
    text = path.read_text(encoding="utf-8")
    assert ast.get_docstring(ast.parse(text)), "opens with its convention"
    assert text.count("\n") <= 400, "two rooms in one"
    assert path.stem not in FORBIDDEN_NAMES
    if path.name == "__init__.py" and path.parent != ROOT / "dllm_core" / "model":
        assert not imports_of(path), "a package's __init__ is a docstring, no re-exports"


@pytest.mark.parametrize(
    ("library", "only"),
    [
        ("deepspeed", {"dllm_core/training/deepspeed_backend.py"}),
        ("boto3", {"dllm_core/storage/s3.py"}),
        ("botocore", {"dllm_core/storage/s3.py"}),
        ("datasets", {"dllm_core/data/hub.py"}),
        ("tokenizers", {"dllm_core/data/tokenizer.py"}),
        ("fastokens", {"dllm_core/data/tokenizer.py"}),
        ("rensa", {"dllm_core/data/dedup.py"}),
        ("peft", {"dllm_core/training/lora.py"}),
        ("lm_eval", {"workflows/evaluate/harness.py"}),
    ],
)
def test_a_library_is_imported_in_the_one_file_that_wraps_it(library, only):
    users = {
        str(path.relative_to(ROOT))
        for path in SOURCES
        if any(name == library or name.startswith(f"{library}.") for name in imports_of(path))
    }
    assert users == only


def test_ray_wraps_and_never_enters():
    for path in (ROOT / "dllm_core").rglob("*.py"):
        assert not {name for name in imports_of(path) if name.partition(".")[0] == "ray"}, path
    without = ["recipe.py", "placement.py", "target.py", "cli.py", "cli_asking.py", "cli_cluster.py"]
    without += [f"submit/{name}.py" for name in ("flow", "package", "demand")] + ["doctor/here.py"]
    without += [f"serve/{name}.py" for name in ("config", "work", "keys", "edge", "compiling", "scaling")]
    own = [ROOT / "workflows" / name for name in without]
    for path in [*own, *(ROOT / "workflows/serve/dialect").glob("*.py"), *(ROOT / "workflows/bench").glob("*.py")]:
        assert not {n for n in imports_of(path) if n.partition(".")[0] == "ray"}, path


def test_the_layers_hold():
    import importlinter.application.use_cases as linter
    from importlinter.configuration import configure

    configure()
    assert linter.lint_imports(config_filename=str(ROOT / "pyproject.toml"), is_debug_mode=False, cache_dir=None)


def test_showing_a_recipe_starts_and_loads_nothing_large():
    code = (
        "import sys; from workflows.target import read_target_recipe; from workflows.recipe import RECIPES;"
        "read_target_recipe(str(RECIPES / 'quickstart.yaml'), []);"
        "print(sorted({'torch', 'ray', 'deepspeed', 'fastapi', 'boto3', 'datasets'} & set(sys.modules)))"
    )
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert answer.stdout.strip() == "[]"


def test_every_public_thing_is_described():
    for path in SOURCES:
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            is_thing = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)
            if is_thing and not node.name.startswith("_"):
                assert ast.get_docstring(node), f"{path.relative_to(ROOT)}: {node.name}"
