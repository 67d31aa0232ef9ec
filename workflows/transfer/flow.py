"""The verbs import and export: a public checkpoint becomes a run with a bundle, and a bundle a public checkpoint.

dllm import LLaDA-8B-Instruct llada
dllm import Qwen2.5-0.5B qwen mask_id=new corpus.path=my/text
dllm export dllm-runs/runs/llada-0123456789ab out

Weights pass one tensor at a time. The run's recipe says what the model is; a corpus is needed only to evaluate it.
"""

import contextlib
import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.markup import escape
from safetensors.torch import load_file

from dllm_core.checkpoints.bundle import read_bundle, write_bundle
from dllm_core.checkpoints.bundle_manifest import BundleManifest, Lineage
from dllm_core.checkpoints.run_dir import RunDir
from dllm_core.config.fingerprint import fingerprint
from dllm_core.config.overrides import apply_overrides
from dllm_core.data.tokenizer import Tokenizer, TokenizerConfig
from dllm_core.errors import CheckpointError, ConfigError, DataError
from dllm_core.model.config import WEIGHTS_NAME
from dllm_core.model.foreign import Foreign, ForeignLayout, layout_for, open_foreign, write_foreign
from dllm_core.model.special_ids import TOKENIZER_NAME, tokens_of, with_token
from dllm_core.model.tensor_file import Header, write_file
from dllm_core.storage.store import (
    LocalStore,
    Store,
    check_scratch,
    file_sha256,
    local_path,
    open_store,
    sha256,
)
from workflows.console import Console
from workflows.preprocess.flow import plan_corpus
from workflows.recipe import Recipe, anchored

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_LONGEST = 4096  # positions that serve.max_batch_tokens has room for by default
_BLOCK = 32  # tokens of a block: what LLaDA2 was trained in, and where LLaDA's samplers stop for breath
_NO_CORPUS = "no-corpus-was-named-at-import"  # what whoever evaluates such a run is told


def import_checkpoint(folder: str, name: str, words: Sequence[str], console: Console) -> dict[str, Any]:
    """Make a run of a foreign folder. words: mask_id=N|new, eos_id=N, dtype=..., and overrides of the recipe.

    Raises ConfigError and CheckpointError before anything is written.
    """
    source = local_path("FOLDER", folder)
    own, overrides = _sorted_out(words)
    opened = open_foreign(source, mask_id=own.get("mask_id"), eos_id=own.get("eos_id"))
    dtype = _dtype(own.get("dtype"))
    tokenizer = _tokenizer(opened)
    recipe = _recipe(opened, name, tokenizer.config, overrides)
    recipe.check_decodable()
    length, longest = recipe.packing.seq_len, opened.config.context_length
    if length > longest:
        raise ConfigError("packing.seq_len", f"must be <= {longest}, the checkpoint's context", length)
    store = open_store("storage.root", recipe.storage.root)
    header = Header.of(opened.specs(dtype), {"format": "pt"})
    _check_room(store, header.size)
    corpus = plan_corpus(recipe, store).fingerprint if _has_corpus(recipe) else "none"
    digests = {file: file_sha256(source / file) for file in opened.headers}
    identity: list[Any] = [opened.config, digests, own.get("dtype"), recipe.run_fingerprint(corpus), tokenizer.digest]
    usual = _recipe(opened, name, tokenizer.config, [])
    if corpus == "none" and (recipe.packing, recipe.noise) != (usual.packing, usual.noise):  # else its corpus tells
        identity += [recipe.packing, recipe.noise]
    run = RunDir(store, f"{name}-{fingerprint(identity)}")
    with run.locked(), tempfile.TemporaryDirectory() as scratch, console.stage("import") as bar:
        bar.update("copying weights")
        weights = Path(scratch, WEIGHTS_NAME)
        write_file(weights, header, opened.tensors(list(header.entries), dtype))
        run.store.put(run.key("recipe.yaml"), recipe.to_yaml().encode())
        write_bundle(
            run,
            weights=weights,
            config=opened.config.model_copy(update={"context_length": length}),
            tokenizer=tokenizer,
            process=recipe.noise.process,
            objective=recipe.objective,
            block_length=recipe.noise.block_length,
            decode=recipe.decode.model_dump(mode="json"),
            lineage=Lineage(
                run=run.name,
                recipe_sha256=sha256(recipe.to_yaml().encode()),
                corpus=corpus,
                manifest_sha256="",
                checkpoint=source.name,
                checkpoint_sha256=sha256("".join(digests.values()).encode()),
                step=0,
            ),
            layout=_layout(opened, tokenizer),
        )
    parameters = recipe.model.num_parameters(opened.config.vocab_size)
    left = _left_behind(opened)
    if left:
        console.print(f"Left behind, and so in no export: {escape(', '.join(left))}")
    console.done("import", f"{opened.family.name}, {parameters:,} parameters, {escape(run.url)}")
    told = {"family": opened.family.name, "parameters": parameters, "mask_id": opened.config.mask_id}
    return {"run": run.url, **told, "left_behind": left}


def export_checkpoint(target: str, out: str, console: Console) -> dict[str, Any]:
    """Write a run's bundle as the public checkpoint that it came from, or as one that can hold it."""
    run, folder = RunDir.at(target), local_path("FOLDER", out)
    bundle = read_bundle(run)
    config, found = bundle.config, bundle.layout()
    _check_public(bundle.manifest, was_imported=found is not None)
    weights = load_file(bundle.folder / WEIGHTS_NAME)
    layout = found or layout_for(config, next(iter(weights.values())).dtype)
    try:
        with _whole_or_empty(folder):
            write_foreign(weights, config, layout, folder)
            shutil.copyfile(bundle.folder / TOKENIZER_NAME, folder / TOKENIZER_NAME)
    except OSError as error:
        raise DataError(str(folder), f"cannot be written ({error.strerror})") from error
    if found is None:
        console.print("No public format is this model's own; it is written as [bold]llada[/bold], which can hold it.")
    console.done("export", f"{layout.family} in {escape(str(folder))}")
    return {"folder": str(folder), "family": layout.family}


@contextlib.contextmanager
def _whole_or_empty(folder: Path) -> Iterator[None]:
    """Take back what was written into an empty folder where the rest cannot be: it is no checkpoint, takes room, and
    would be in the way of the next try. One export at a time is in a folder: two would find it empty, and mix.
    """
    was_there = folder.exists()
    with contextlib.suppress(FileExistsError):
        folder.mkdir(parents=True)
    opened = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        _lock(opened, folder)
        is_empty = not any(folder.iterdir())
        try:
            yield
        except BaseException:
            if is_empty:
                for path in folder.iterdir():
                    path.unlink()
                if not was_there:
                    folder.rmdir()
            raise
    finally:
        os.close(opened)


def _lock(opened: int, folder: Path) -> None:
    """Raises DataError where another process has the folder. Over NFS no folder can be locked."""
    try:
        fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise DataError(str(folder), "another export is writing there", remedy="name another folder") from None
    except OSError:
        pass


def _check_room(store: Store, size: int) -> None:
    """Fail now if so many bytes have no room in the storage, or where they are put together before."""
    is_shared = isinstance(store, LocalStore) and _device(store.root) == _device(Path(tempfile.gettempdir()))
    store.check_writable("storage.root", 2 * size if is_shared else size)
    check_scratch(size)


def _device(path: Path) -> int:
    """Of the folder, or of the one that it will be made in."""
    return next(folder for folder in (path, *path.parents) if folder.exists()).stat().st_dev


def _check_public(manifest: BundleManifest, *, was_imported: bool) -> None:
    """Refuse a model that whoever reads a public checkpoint would take for another: its tensors do not say whom a
    position sees, nor what noise is. was_imported: into a family that sees as the model does now.
    """
    kind, process = manifest.objective.type, manifest.process.type
    is_told = kind == "autoregressive" or (kind != "masked_lm" and process == "absorbing")
    if is_told and (was_imported or kind == "diffusion"):
        return
    other = f"noise.process.type={process}" if kind == "diffusion" else f"objective.type={kind}"
    problem = f"no public format holds such a model; `llada` would but for {other}"
    raise ConfigError("export", problem, remedy="train one with objective.type=diffusion noise.process.type=absorbing")


def _sorted_out(words: Sequence[str]) -> tuple[dict[str, Any], list[str]]:
    """What is said of the checkpoint itself, and overrides of the recipe."""
    named = [word for word in words if word.partition("=")[0].strip() in ("mask_id", "eos_id", "dtype")]
    own = apply_overrides({}, named)
    for name in ("mask_id", "eos_id"):
        value = own.get(name)
        if value is not None and (isinstance(value, bool) or not (isinstance(value, int) or value == "new")):
            raise ConfigError(name, "must be an id" + (" or new" if name == "mask_id" else ""), value)
    return own, [word for word in words if word not in named]


def _dtype(name: Any) -> torch.dtype | None:
    if name is not None and name not in _DTYPES:
        raise ConfigError("dtype", "unknown type", name, f"one of {', '.join(_DTYPES)}; the files' own if left out")
    return None if name is None else _DTYPES[name]


def _has_corpus(recipe: Recipe) -> bool:
    """Whether one was named, in whatever words."""
    return all(Path(source.path).name != _NO_CORPUS for source in recipe.corpus.all_sources)


def _tokenizer(opened: Foreign) -> Tokenizer:
    """The folder's tokenizer, byte for byte; only a mask that it has no token for is added to it."""
    path, config = opened.folder / TOKENIZER_NAME, opened.config
    try:
        text = path.read_bytes().decode("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        remedy = "save the checkpoint's tokenizer as a tokenizer.json first"
        raise CheckpointError(str(path), f"cannot be read ({error})", remedy=remedy) from error
    tokens = tokens_of(opened.folder)
    if config.mask_id not in tokens:
        tokens[config.mask_id] = "<|mask|>"
        text = with_token(text, tokens[config.mask_id], config.mask_id, str(path))
    for name, number in (("eos_id", config.eos_id), ("pad_id", config.pad_id)):
        if number not in tokens:
            raise CheckpointError(str(path), f"has no special token of {name}={number}")
    section = TokenizerConfig(
        path=str(path),
        mask_token=tokens[config.mask_id],
        eos_token=tokens[config.eos_id],
        pad_token=tokens[config.pad_id],
    )
    tokenizer = Tokenizer(text, section, str(path))
    for name in ("mask_id", "eos_id", "pad_id"):
        number, found = getattr(config, name), getattr(tokenizer, name)
        if found != number:
            problem = f"{tokens[number]} has the id {found} there, and the checkpoint's {name} is {number}"
            raise CheckpointError(str(path), problem, remedy="save the checkpoint's tokenizer again")
    if tokenizer.vocab_size > config.vocab_size:
        problem = f"has ids up to {tokenizer.vocab_size - 1}, the checkpoint's last is {config.vocab_size - 1}"
        raise CheckpointError(str(path), problem)
    return tokenizer


def _left_behind(opened: Foreign) -> list[str]:
    """What the folder holds besides weights, texts and tokenizer, which are carried along; hidden files are none."""
    carried = {*opened.headers, *opened.layout.texts, TOKENIZER_NAME}
    return sorted(path.name for path in opened.folder.iterdir() if path.name not in carried and path.name[0] != ".")


def _layout(opened: Foreign, tokenizer: Tokenizer) -> ForeignLayout:
    """The folder's, untouched; only a mask that was added to its tokenizer is told to what stands beside that."""
    is_new = opened.config.mask_id not in tokens_of(opened.folder)
    return opened.layout.listing(tokenizer.json_text, [tokenizer.config.mask_token]) if is_new else opened.layout


def _recipe(opened: Foreign, name: str, tokenizer: TokenizerConfig, overrides: Sequence[str]) -> Recipe:
    """The recipe of the run: the model as it is, decoded as its family is, and what the user says."""
    family, length = opened.family, min(opened.config.context_length, _LONGEST)
    asked = apply_overrides({"packing": {"seq_len": length}}, list(overrides))["packing"]
    length = asked["seq_len"] if isinstance(asked, dict) and isinstance(asked["seq_len"], int) else length
    block = min(_BLOCK, length)
    values: dict[str, Any] = {
        "name": name,
        "corpus": {"type": "text", "path": _NO_CORPUS},
        "tokenizer": tokenizer.model_dump(mode="json"),
        "packing": {"seq_len": length},
        "model": opened.config.model.model_dump(mode="json"),
        "decode": {"block_length": block, "steps_per_block": block, "max_tokens": min(128, length)},
    }
    if family.is_causal:
        values["objective"] = {"type": "autoregressive"}
    elif family.in_blocks:
        values["objective"], values["noise"] = {"type": "block_diffusion"}, {"block_length": block}
    recipe = anchored(Recipe.checked(apply_overrides(values, list(overrides))))
    if recipe.model != opened.config.model:
        raise ConfigError("model", "is the checkpoint's, which no override changes", remedy="leave it out")
    return recipe
