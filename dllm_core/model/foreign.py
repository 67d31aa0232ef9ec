"""Public checkpoints in and out: folders of config.json and safetensors under other names than ours.

    denoiser = read_foreign(Path("LLaDA-8B-Instruct"))
    opened = open_foreign(Path("LLaDA-8B-Instruct"))         # headers only; opened.tensors(names) one after the other
    write_foreign(weights_of(denoiser), opened.layout, Path("out"))

What is read is written again under the same names, types and headers: a file that nobody trained on comes back bit for
bit. At the peak of reading there is the model and, where types are converted, one tensor.
"""

import base64
import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Literal

import torch
from pydantic import Field
from torch import Tensor

from dllm_core.config.base import Frozen
from dllm_core.errors import CheckpointError, ConfigError, DataError
from dllm_core.model.config import CONFIG_NAME, WEIGHTS_NAME, DenoiserConfig
from dllm_core.model.denoiser import Denoiser
from dllm_core.model.families import LLADA, Family, Fields, Place, family_named, family_of, model_of, places
from dllm_core.model.pretrained import BY_TOKEN, assign_weights, differences, weights_of
from dllm_core.model.special_ids import (
    TOKENIZER_CONFIG_NAME,
    TOKENIZER_NAME,
    find_special_ids,
    read_json,
    with_listed,
)
from dllm_core.model.tensor_file import Header, read_header, read_into, write_file

INDEX_NAME = "model.safetensors.index.json"
_TEXTS = ("*.json", "*.txt", "*.jinja", "*.py")
_IGNORED = ("rotary_emb.inv_freq", "rotary_emb.original_inv_freq")  # follow from rope_theta; older files store them
_ADAPTERS = "adapter_config.json"
_SHOWN = 8


class ForeignLayout(Frozen):
    """How a foreign folder was laid out, without its weights: what it takes to write it again.

    texts: its small files as they stand; headers: of each safetensors file; buffers: tensors that no model needs, in
    base64.
    """

    format: Literal[1] = 1
    family: str
    rows: int
    texts: dict[str, str]
    headers: dict[str, str]
    buffers: dict[str, str] = Field(default_factory=dict)

    def parsed(self) -> dict[str, Header]:
        """The headers by file."""
        return {name: Header.parsed(text, name) for name, text in self.headers.items()}

    def listing(self, tokenizer_json: str, tokens: Collection[str]) -> "ForeignLayout":
        """The same, whose tokenizer_config.json knows of these tokens, by which the tokenizer has grown."""
        if TOKENIZER_CONFIG_NAME not in self.texts:
            return self
        told = with_listed(self.texts[TOKENIZER_CONFIG_NAME], tokenizer_json, tokens)
        return self.model_copy(update={"texts": {**self.texts, TOKENIZER_CONFIG_NAME: told}})


@dataclass(frozen=True)
class Foreign:
    """A folder that was opened and found whole: only headers have been read. num_new: rows that the file lacks."""

    folder: Path
    family: Family
    config: DenoiserConfig
    layout: ForeignLayout
    headers: dict[str, Header]
    num_new: int = 0

    def specs(self, dtype: torch.dtype | None = None) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        """Type and shape of each of our tensors; dtype: None for the files' own."""
        found: dict[str, torch.dtype] = {}
        entries = {name: entry for header in self.headers.values() for name, entry in header.entries.items()}
        for place in self._places():
            if place.foreign in entries:
                own = dtype or entries[place.foreign].dtype
                found[place.ours] = torch.promote_types(found.get(place.ours, own), own)
        return {name: (found[name], tuple(tensor.shape)) for name, tensor in weights_of(self.skeleton()).items()}

    def skeleton(self) -> Denoiser:
        """The denoiser on the meta device, without weights."""
        with torch.device("meta"):
            return Denoiser(self.config)

    def tensors(self, names: Sequence[str], dtype: torch.dtype | None = None) -> Iterator[Tensor]:
        """Tensors by our names, one after the other, each made of its parts. A new row is the mean of the others."""
        of_ours: dict[str, list[Place]] = {}
        for place in self._places():
            of_ours.setdefault(place.ours, []).append(place)
        with ExitStack() as stack:
            files = {name: stack.enter_context((self.folder / name).open("rb")) for name in self.headers}
            at = {name: file for file, header in self.headers.items() for name in header.entries}
            specs = self.specs(dtype)
            for ours in names:
                kind, shape = specs[ours]
                tensor = torch.empty(shape, dtype=kind)
                for place in of_ours[ours]:
                    self._read(place, tensor, at, files)
                if self.num_new and ours in BY_TOKEN:
                    tensor[-self.num_new :] = tensor[: -self.num_new].double().mean(0)
                yield tensor

    def _read(self, place: Place, tensor: Tensor, at: Mapping[str, str], files: Mapping[str, BinaryIO]) -> None:
        if place.foreign not in at:
            return  # a tied head that is not written down
        file = at[place.foreign]
        target = place.within(tensor)
        if not place.is_optional:
            read_into(files[file], self.headers[file], place.foreign, target)
            return
        twin = torch.empty_like(target)
        read_into(files[file], self.headers[file], place.foreign, twin)
        if not torch.equal(twin, target):
            raise CheckpointError(f"{self.folder / file}: {place.foreign}", "is tied by config.json, and differs")

    def _places(self) -> list[Place]:
        return list(places(self.family, self.config.model, self.config.vocab_size - self.num_new))


def open_foreign(folder: Path, *, mask_id: int | str | None = None, eos_id: int | None = None) -> Foreign:
    """Check a folder: its family, its sizes, its ids, and that every tensor is there, of its shape, and no other.

    mask_id, eos_id: for checkpoints that name none; mask_id="new" adds a row. Raises CheckpointError and ConfigError.
    """
    if (folder / _ADAPTERS).exists():  # other software adds them to the weights beside them
        remedy = "merge them into the weights, or take them out of the folder"
        raise CheckpointError(str(folder), f"holds adapters ({_ADAPTERS}), which are not read", remedy=remedy)
    values = read_json(folder / CONFIG_NAME)
    if not values:
        raise CheckpointError(str(folder), f"holds no {CONFIG_NAME}", remedy="name a checkpoint's folder")
    fields = Fields(str(folder / CONFIG_NAME), values)
    try:
        family = family_of(fields)
        model = model_of(family, fields)
    except (TypeError, ValueError, AttributeError) as error:  # text where a number must be, and the like
        raise CheckpointError(fields.place, f"makes no sense ({error})") from error
    rows = fields.whole(family.rows if values.get(family.rows) is not None else "vocab_size")
    ids = find_special_ids(folder, values, rows, mask_id=mask_id, eos_id=eos_id)
    headers = _headers(folder)
    _check_tensors(folder, list(places(family, model, rows)), headers)
    config = DenoiserConfig(
        model=model,
        vocab_size=rows + ids.is_new,
        context_length=fields.whole(family.context),
        mask_id=ids.mask_id,
        eos_id=ids.eos_id,
        pad_id=ids.pad_id,
    )
    layout = ForeignLayout(
        family=family.name,
        rows=rows,
        texts=_texts(folder),
        headers={name: header.text for name, header in headers.items()},
        buffers=_buffers(folder, headers),
    )
    if ids.is_new:  # a mask that the checkpoint does not know
        layout = _with_rows(layout, config, {"mask_token_id": config.mask_id})
    return Foreign(folder, family, config, layout, headers, int(ids.is_new))


def read_foreign(
    folder: Path, *, mask_id: int | str | None = None, eos_id: int | None = None, dtype: torch.dtype | None = None
) -> Denoiser:
    """The denoiser of a foreign folder, in evaluation mode; dtype: None for the files' own types."""
    opened = open_foreign(folder, mask_id=mask_id, eos_id=eos_id)
    denoiser = opened.skeleton()
    names = list(weights_of(denoiser))
    assign_weights(denoiser, dict(zip(names, opened.tensors(names, dtype), strict=True)), str(folder))
    return denoiser.eval().requires_grad_(False)


def write_foreign(weights: Mapping[str, Tensor], config: DenoiserConfig, layout: ForeignLayout, folder: Path) -> None:
    """Write weights by our names as the layout says, in the types that it names.

    Raises DataError for a folder that holds something already, CheckpointError for weights of another model and for
    names that lead out of the folder: a layout comes with a bundle, from anywhere.
    """
    if leaving := [name for name in (*layout.headers, *layout.texts) if not _is_plain(name)]:
        raise CheckpointError(str(folder), f"{_listed(leaving)} would be written elsewhere")
    if folder.exists() and any(folder.iterdir()):
        raise DataError(str(folder), "is not empty", remedy="name a new folder")
    family = family_named(layout.family)
    of_theirs = {place.foreign: place for place in places(family, config.model, config.vocab_size)}
    for file, header in layout.parsed().items():
        lacking = [name for name in header.entries if name not in of_theirs and name not in layout.buffers]
        lacking += [
            place.foreign for name in header.entries if (place := of_theirs.get(name)) and place.ours not in weights
        ]
        if lacking:
            raise CheckpointError(str(folder), f"the weights lack {_listed(lacking)}")

        def parts(header: Header = header) -> Iterator[Tensor]:
            for name, entry in header.entries.items():
                place = of_theirs.get(name)
                if place is None:
                    raw = bytearray(base64.b64decode(layout.buffers[name]))
                    yield torch.frombuffer(raw, dtype=entry.dtype).view(entry.shape)
                else:
                    yield place.within(weights[place.ours])

        write_file(folder / file, header, parts())
    for name, text in layout.texts.items():
        (folder / name).write_bytes(text.encode("utf-8"))


def layout_for(config: DenoiserConfig, dtype: torch.dtype = torch.float32) -> ForeignLayout:
    """The layout of a model that never was foreign: LLaDA's, for the models that it can hold. Raises ConfigError."""
    model = config.model
    plain = {
        "qk_norm": False,
        "time_conditioning": False,
        "rope_fraction": 1.0,
        "head_width": None,
        "shifted": False,
        "experts": None,
        "scale_embeddings": model.scale_embeddings and not model.tie_embeddings,
    }
    other = [f"model.{name}={getattr(model, name)}" for name, value in plain.items() if getattr(model, name) != value]
    if other:
        problem = "no public format holds such a model; `llada` would but for " + ", ".join(other)
        raise ConfigError("export", problem, remedy="train one with model.qk_norm=false model.tie_embeddings=false")
    said = {
        "architectures": ["LLaDAModelLM"],
        "model_type": "llada",
        "d_model": model.dim,
        "n_heads": model.heads,
        "n_kv_heads": model.num_kv_heads,
        "n_layers": model.layers,
        "mlp_hidden_size": model.ffn_dim,
        "activation_type": "silu",
        "block_type": "llama",
        "block_group_size": 1,
        "alibi": False,
        "rope": True,
        "rope_full_precision": True,
        "rope_theta": model.rope_theta,
        "attention_layer_norm": False,
        "input_emb_norm": False,
        "layer_norm_type": "rms",
        "layer_norm_with_affine": True,
        "rms_norm_eps": model.norm_eps,
        "max_sequence_length": config.context_length,
        "include_bias": False,
        "include_qkv_bias": model.qkv_bias,
        "bias_for_layer_norm": False,
        "scale_logits": False,
        "flash_attention": False,
        "attention_dropout": 0.0,
        "residual_dropout": 0.0,
        "embedding_dropout": 0.0,
        "vocab_size": config.vocab_size,
        "embedding_size": config.vocab_size,
        "weight_tying": model.tie_embeddings,
        "mask_token_id": config.mask_id,
        "eos_token_id": config.eos_id,
        "pad_token_id": config.pad_id,
        "init_device": "cpu",
        "use_cache": False,
    }
    found = [place for place in places(LLADA, model, config.vocab_size) if not place.is_optional]
    header = Header.of({place.foreign: (dtype, place.shape) for place in found}, {"format": "pt"})
    texts = {CONFIG_NAME: json.dumps(said, indent=2) + "\n"}
    return ForeignLayout(family="llada", rows=config.vocab_size, texts=texts, headers={WEIGHTS_NAME: header.text})


def _is_plain(name: Any) -> bool:
    """Whether it names a file of a folder, and of no other."""
    return isinstance(name, str) and Path(name).name == name and name not in ("", "..") and "\0" not in name


def _headers(folder: Path) -> dict[str, Header]:
    """The headers of the folder's safetensors files; an index must name every tensor where it is."""
    if not (folder / INDEX_NAME).exists():
        if not (folder / WEIGHTS_NAME).exists() and any(folder.glob("*.bin")):
            raise CheckpointError(str(folder), "holds pickled weights", remedy="save them as safetensors first")
        return {WEIGHTS_NAME: read_header(folder / WEIGHTS_NAME)}
    index = read_json(folder / INDEX_NAME).get("weight_map")
    if not isinstance(index, dict) or any(not _is_plain(file) for file in index.values()):
        raise CheckpointError(str(folder / INDEX_NAME), "has no weight_map of tensors to files")
    if (folder / WEIGHTS_NAME).exists() and WEIGHTS_NAME not in index.values():
        problem = f"names other files than {WEIGHTS_NAME} beside it, which other software reads"
        raise CheckpointError(str(folder / INDEX_NAME), problem, remedy="remove the one that is old")
    headers = {file: read_header(folder / file) for file in sorted(set(index.values()))}
    lost = [name for name, file in index.items() if name not in headers[file].entries]
    if lost:
        raise CheckpointError(str(folder / INDEX_NAME), f"names {_listed(lost)} where they are not")
    return headers


def _check_tensors(folder: Path, expected: list[Place], headers: Mapping[str, Header]) -> None:
    """Every tensor once, none missing, none unknown, each of its shape; else all that is wrong in one error."""
    shapes: dict[str, tuple[int, ...]] = {}
    wrong = []
    for header in headers.values():
        for name, entry in header.entries.items():
            wrong += [f"twice {name}"] if name in shapes else []
            shapes[name] = entry.shape
    needed = {one.foreign: one.shape for one in expected if one.foreign in shapes or not one.is_optional}
    read = {name: shape for name, shape in shapes.items() if name in needed or not name.endswith(_IGNORED)}
    if wrong := wrong + differences(needed, read):
        raise CheckpointError(str(folder), _listed(wrong))


def _listed(names: list[str]) -> str:
    """All of a few names; of many the first, and how many more."""
    more = f"; and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return "; ".join(names[:_SHOWN]) + more


def _texts(folder: Path) -> dict[str, str]:
    """The small files beside the weights; the tokenizer's own is kept apart."""
    found: dict[str, str] = {}
    for path in sorted(path for pattern in _TEXTS for path in folder.glob(pattern)):
        if path.name != TOKENIZER_NAME:
            try:
                found[path.name] = path.read_bytes().decode("utf-8")
            except (OSError, UnicodeDecodeError) as error:
                raise CheckpointError(str(path), f"cannot be read ({error})") from error
    return found


def _buffers(folder: Path, headers: Mapping[str, Header]) -> dict[str, str]:
    """Tensors that are not read, as they are: they go out again with the rest."""
    found: dict[str, str] = {}
    for file, header in headers.items():
        for name, entry in header.entries.items():
            if name.endswith(_IGNORED):
                with (folder / file).open("rb") as data:
                    data.seek(header.data_start + entry.start)
                    found[name] = base64.b64encode(data.read(entry.stop - entry.start)).decode()
    return found


def trained_layout(
    layout: ForeignLayout, config: DenoiserConfig, *, is_causal: bool, in_blocks: bool
) -> ForeignLayout | None:
    """The layout of weights that were trained on, None where no family holds what they have become.

    is_causal, in_blocks: how they see now. An autoregressive Qwen2 that sees whole rows and tells the next token is
    Dream. Rows of tokens that were added are written too.
    """
    family = family_named(layout.family)
    said: dict[str, Any] = {}
    if (family.is_causal, family.in_blocks) != (is_causal, in_blocks):
        if family.name != "qwen2" or is_causal or in_blocks or not config.model.shifted:
            return None
        said = {"model_type": "Dream", "architectures": ["DreamModel"], "mask_token_id": config.mask_id}
        # Dream's code looks for these at the top alone, where it has values of its own for what it does not find.
        said |= {"rope_theta": config.model.rope_theta, "pad_token_id": config.pad_id}
        layout = layout.model_copy(update={"family": "dream"})
    return _with_rows(layout, config, said)


def _with_rows(layout: ForeignLayout, config: DenoiserConfig, said: dict[str, Any]) -> ForeignLayout:
    """The same with the config's rows, which may be more, and with what is `said` in config.json."""
    family = family_named(layout.family)
    values, texts, rows = json.loads(layout.texts[CONFIG_NAME]), dict(layout.texts), config.vocab_size
    if rows == layout.rows and not said:
        return layout
    if rows != layout.rows:
        said = {**said, "vocab_size": rows, **({family.rows: rows} if family.rows in values else {})}
    texts[CONFIG_NAME] = json.dumps({**values, **said}, indent=2, ensure_ascii=False) + "\n"
    grown = {place.foreign: place.shape for place in places(family, config.model, rows)}
    headers = {
        file: Header.of(
            {name: (entry.dtype, grown.get(name, entry.shape)) for name, entry in header.entries.items()},
            header.metadata,
        )
        for file, header in layout.parsed().items()
    }
    if INDEX_NAME in texts:
        index = json.loads(texts[INDEX_NAME])
        index["metadata"] = {**index.get("metadata", {}), "total_size": sum(h.size for h in headers.values())}
        texts[INDEX_NAME] = json.dumps(index, indent=2) + "\n"
    changed = {"rows": rows, "texts": texts, "headers": {name: header.text for name, header in headers.items()}}
    return layout.model_copy(update=changed)
