"""What a job takes along: our sources, the recipe and what the user names, as one small zip with the same bytes for the
same content. Data and secrets stay here.
"""

import hashlib
import io
import os
import re
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import dllm_core
import workflows
from dllm_core.data.records import is_unicode
from dllm_core.errors import ConfigError, DataError
from dllm_core.storage.store import local_path

MAX_BYTES = 20 << 20  # Ray's head keeps packages in its memory and refuses those of hundreds of MB
RECIPE = "recipe.yaml"
_KINDS = {".py", ".pyi", ".yaml", ".yml", ".json", ".toml", ".html", ".txt", ".md", ".cfg"}
_LEFT_OUT = {"__pycache__", ".git", ".venv", "venv", "node_modules", "dllm-runs"}
_SECRET_PARTS = (
    *("secret", "credential", "password", "passwd", "passphrase", "token", "keys.", ".env", "kubeconfig", "netrc"),
    *("api_key", "apikey", "private_key", "service_account", "auth."),
    *("id_rsa", "id_dsa", "id_ecdsa", "id_ed25519"),
)
_KEY = re.compile(r"(?<![a-z])key\.")  # and no monkey's
_STAMP = (1980, 1, 1, 0, 0, 0)


@dataclass(frozen=True)
class Package:
    """The zip; `left_out`: files below an included folder that are links, or look like data or secrets."""

    data: bytes
    files: tuple[str, ...]
    left_out: tuple[str, ...]

    @property
    def digest(self) -> str:
        """Equal content, equal digest."""
        return hashlib.sha256(self.data).hexdigest()


def pack(recipe: str | None, include: Sequence[Path] = ()) -> Package:
    """Our own sources, a recipe's text, and files and folders of the user's beside them.

    Raises ConfigError for what is not there or has one of our names or another's, DataError for a package that is too
    large, which is known before a file of it is read.
    """
    found: dict[str, Path] = {}
    left_out: list[str] = []
    for module in (dllm_core, workflows):
        root = Path(module.__file__ or "").parent
        for path in (path for path in _sources(root) if path.suffix in _KINDS and path.is_file()):
            found[f"{root.name}/{path.relative_to(root).as_posix()}"] = path
    for given in include:
        top = local_path("--include", str(given))  # a link keeps its name, by which it is imported
        if not top.exists():
            raise ConfigError("--include", "there is no such file or folder", str(given))
        if top.name in ("dllm_core", "workflows", RECIPE):
            raise ConfigError("--include", "has a name of the package's own", str(given))
        for path in _sources(top) if top.is_dir() else [top]:
            name = path.relative_to(top.parent).as_posix()
            if not is_unicode(name) or (path != top and _stays(path, path.relative_to(top))):
                left_out.append(name.encode(errors="backslashreplace").decode())
            elif found.setdefault(name, path) != path:
                raise ConfigError("--include", f"gives another {name} than one before", str(given), "rename one")
    texts = {} if recipe is None else {RECIPE: recipe.encode()}
    _check_size({name: path.stat().st_size for name, path in found.items()})
    contents = {**{name: path.read_bytes() for name, path in found.items()}, **texts}
    return Package(_zipped(contents), tuple(sorted(contents)), tuple(sorted(left_out)))


def _sources(root: Path) -> Iterator[Path]:
    """Files and links below a folder; one that cannot be listed ends it, or its files would be missed where it runs."""
    for folder, folders, names in os.walk(root, onerror=_raise_unlisted):
        folders[:] = sorted(set(folders) - _LEFT_OUT)
        for path in (Path(folder, name) for name in sorted({*folders, *names} - _LEFT_OUT)):
            if path.is_file() or path.is_symlink():
                yield path


def _raise_unlisted(error: OSError) -> None:
    raise DataError("package", f"cannot be listed ({error.strerror})", str(error.filename)) from error


def _stays(path: Path, below: Path) -> bool:
    """What is no source, may be a secret, or is a link: that may lead to anything, so it is not followed."""
    return path.is_symlink() or path.suffix not in _KINDS or _is_secret(below)


def _is_secret(path: Path) -> bool:
    """By the names of a file and of the folders below the included one that it lies in."""
    *folders, name = (part.lower() for part in path.parts)
    # A module, and a folder of modules, may well be called tokenizer.
    telling = [folder.replace("tokenizer", "") for folder in folders] + ([] if path.suffix == ".py" else [name])
    is_hidden = any(part.startswith(".") for part in (*folders, name))
    telling = [told.replace("-", "_") for told in telling]
    return is_hidden or any(_KEY.search(told) or any(part in told for part in _SECRET_PARTS) for told in telling)


def _check_size(sizes: dict[str, int]) -> None:
    total = sum(sizes.values())
    if total > MAX_BYTES:
        largest = sorted(sizes, key=lambda name: -sizes[name])[:3]
        told = ", ".join(f"{name} {sizes[name] / 1e6:.0f} MB" for name in largest)
        problem = f"is {total / 1e6:.0f} MB, of which {told}"
        remedy = f"a package has at most {MAX_BYTES >> 20} MB: data belongs into storage.root, on s3://"
        raise DataError("package", problem, remedy=remedy)


def _zipped(found: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name in sorted(found):
            entry = zipfile.ZipInfo(name, _STAMP)
            entry.external_attr = 0o644 << 16
            entry.compress_type = zipfile.ZIP_DEFLATED
            archive.writestr(entry, found[name])
    return buffer.getvalue()
