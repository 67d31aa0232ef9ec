"""A recipe with a `start` is completed from the run that it starts from: model, tokenizer, digests. Torch-free.

What the recipe says itself must agree, since sizes cannot change. So the recipe of a run stands alone, and whatever
does not fit is refused before anything starts.
"""

import hashlib
import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dllm_core.checkpoints.bundle_manifest import FOLDER, BundleOutline, read_manifest, read_outline
from dllm_core.checkpoints.run_dir import RunDir
from dllm_core.data.tokenizer import Tokenizer, TokenizerConfig, with_markers
from dllm_core.errors import ConfigError, DataError
from dllm_core.model.config import ModelConfig
from dllm_core.model.special_ids import TOKENIZER_NAME
from dllm_core.training.start import StartConfig

_TOKENS = ("mask_token", "eos_token", "pad_token")


@dataclass(frozen=True)
class Started:
    """The run that a recipe starts from, and what its section says."""

    section: StartConfig
    run: RunDir
    outline: BundleOutline

    def completed(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """The recipe's sections with `model`, `tokenizer` and `start` written out. Raises ConfigError."""
        manifest = self.outline.manifest
        found, said = manifest.weights_sha256, self.section.weights_sha256
        if said not in (None, found):
            problem = f"the bundle was changed since: its weights are {found[:12]}... now"
            remedy = "leave it out to make another run, which starts from them"
            raise ConfigError("start.weights_sha256", problem, said, remedy)
        pinned = {"run": self.run.url, "weights_sha256": found, "tokenizer_sha256": manifest.tokenizer_sha256}
        return {
            **values,
            "model": self._model(values),
            "tokenizer": self._tokenizer(_mapping(values.get("tokenizer"))),
            "start": self.section.model_copy(update=pinned).model_dump(mode="json"),
        }

    def check_tuned(self, block_length: int | None) -> None:
        """Refuse to tune by preference what is no diffusion of masks, over whole rows or in these very blocks."""
        said = self.outline.manifest
        if said.process.replaces or said.objective.type not in ("diffusion", "block_diffusion"):
            what = said.process.type if said.process.replaces else said.objective.type
            problem = f"tunes diffusions of masks, and the run that it starts from is {what}"
            raise ConfigError("objective.type", problem, "preference", "start from another run")
        if said.block_length != block_length:
            before = "null" if said.block_length is None else said.block_length
            problem = f"must be {before}, as in the run that it starts from"
            raise ConfigError("noise.block_length", problem, block_length, f"noise.block_length={before}")

    def check(self, seq_len: int, replaces: bool, vocab_size: int) -> None:
        """Refuse what the finished recipe asks of the bundle that it has not. replaces: the noise is tokens."""
        config = self.outline.config
        if seq_len > config.context_length:
            problem = f"must be <= {config.context_length}, the context of the run that it starts from"
            raise ConfigError("packing.seq_len", problem, seq_len, f"packing.seq_len={config.context_length}")
        if self.section.lora is not None and vocab_size > config.vocab_size:
            problem = f"trains no rows, and {vocab_size - config.vocab_size} are new: markers that look all alike"
            raise ConfigError("start.lora", problem, remedy="name special tokens that there are in tokenizer.chat")
        if self.section.lora is not None and importlib.util.find_spec("peft") is None:
            problem = "needs peft, which is not installed"
            raise ConfigError("start.lora", problem, remedy="pip install 'dllm[lora]'")
        known = self.outline.tokenizer().vocab_size
        if replaces and known < vocab_size:
            problem = f"draws among all ids, and the started model has {vocab_size - known} that are no token"
            raise ConfigError("noise.process.type", problem, remedy="noise.process.type=absorbing")

    def _model(self, values: Mapping[str, Any]) -> dict[str, Any]:
        own, said = self.outline.config.model.model_dump(mode="json"), _mapping(values.get("model"))
        free = None
        if self.outline.manifest.objective.type == "autoregressive":  # to which a shift says nothing
            free = "shifted"
            if _mapping(values.get("objective")).get("type", "diffusion") != "autoregressive":
                own[free] = True
        asked = ModelConfig.checked({**own, **said}, "model").model_dump(mode="json")
        for name, value in own.items():
            if asked[name] != value and name != free:
                problem = f"is {value!r} in the run that it starts from, and cannot change"
                raise ConfigError(f"model.{name}", problem, said[name], "leave it out")
        return asked

    def _tokenizer(self, said: Mapping[str, Any]) -> dict[str, Any]:
        """The bundle's, at its place there; markers of turns that it lacks are added to it."""
        outline, url = self.outline, f"{self.run.url}/{FOLDER}/{TOKENIZER_NAME}"
        own = outline.manifest.tokenizer
        agreed: dict[str, tuple[Any, ...]] = {name: (getattr(own, name),) for name in _TOKENS}
        if own.chat is not None and said.get("chat") is not None:
            agreed["chat"] = (own.chat.model_dump(),)
            said = {**said, "chat": TokenizerConfig.checked({"chat": said["chat"]}, "tokenizer").model_dump()["chat"]}
        for name, allowed in agreed.items():
            if name in said and said[name] not in allowed:
                problem = f"is {allowed[0]!r} in the run that it starts from, and cannot change"
                raise ConfigError(f"tokenizer.{name}", problem, said[name], "leave it out")
        if said.get("path") not in (None, url) and _digest(said["path"]) != outline.manifest.tokenizer_sha256:
            problem = "is not the tokenizer of the run that it starts from"
            raise ConfigError("tokenizer.path", problem, said["path"], "leave it out")
        chat = said.get("chat") if own.chat is None else own.chat.model_dump()
        section = {**own.model_dump(mode="json"), "path": url, "chat": chat}
        config = TokenizerConfig.checked(section, "tokenizer")
        tokenizer = Tokenizer(with_markers(outline.tokenizer_json, config, url), config, url)
        rows = max(outline.config.vocab_size, tokenizer.vocab_size)
        if said.get("vocab_size") not in (None, own.vocab_size, outline.config.vocab_size, rows):
            problem = f"is {rows} in the run that it starts from, and cannot change"
            raise ConfigError("tokenizer.vocab_size", problem, said["vocab_size"], "leave it out")
        return {**config.model_dump(mode="json"), "vocab_size": rows}


def started_of(values: Mapping[str, Any]) -> Started | None:
    """The run that a recipe's `start` names, if it has one. Raises ConfigError where there is no such run."""
    if values.get("start") is None:
        return None
    section = StartConfig.checked(values["start"], "start")
    try:
        run = RunDir.at(section.run)
        return Started(section, run, read_outline(run))
    except (ConfigError, DataError) as error:
        raise ConfigError("start.run", f"no run to start from: {error.problem}", section.run, error.remedy) from error


def check_start(section: StartConfig) -> None:
    """Refuse a start whose bundle is gone or another by now; its weights are not read. Raises ConfigError."""
    try:
        manifest, _ = read_manifest(RunDir.at(section.run))
    except (ConfigError, DataError) as error:
        raise ConfigError("start.run", f"no run to start from: {error.problem}", section.run, error.remedy) from error
    if manifest.weights_sha256 != section.weights_sha256:
        problem = f"its bundle was changed since: its weights are {manifest.weights_sha256[:12]}... now"
        raise ConfigError("start.run", problem, section.run, "start another run from it")


def _mapping(section: Any) -> dict[str, Any]:
    """A section as it is written; what is none is refused by whoever checks the whole."""
    return section if isinstance(section, dict) else {}


def _digest(path: Any) -> str | None:
    try:
        return hashlib.sha256(Path(str(path)).read_bytes()).hexdigest()
    except (OSError, ValueError):
        return None
