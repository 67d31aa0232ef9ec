"""Which ids of a foreign folder mean mask, end and padding: its config says, then its tokenizer, then the user.

Never this code: equal architectures come with other vocabularies, and a wrong mask gives fluent nonsense.
"""

import json
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dllm_core.errors import CheckpointError, ConfigError

TOKENIZER_NAME, TOKENIZER_CONFIG_NAME = "tokenizer.json", "tokenizer_config.json"
# Spellings of masks among a tokenizer's added tokens, where none of its files names one as `mask_token`.
_MASKS = ("<|mask|>", "<|mdm_mask|>", "[MASK]", "<mask>", "<|MASK|>")


@dataclass(frozen=True)
class SpecialIds:
    """is_new: the mask is one id more than the checkpoint has rows."""

    mask_id: int
    eos_id: int
    pad_id: int
    is_new: bool = False


def find_special_ids(
    folder: Path, fields: dict[str, Any], rows: int, *, mask_id: int | str | None = None, eos_id: int | None = None
) -> SpecialIds:
    """The ids of a checkpoint with so many rows of embeddings.

    mask_id, eos_id: what the user says, for a checkpoint that does not; mask_id="new" adds a row; eos_id also chooses
    among several. Raises ConfigError where nobody says, and where the user says other than the checkpoint.
    """
    declared = _Declared(folder)
    mask = _first(fields.get("mask_token_id"), declared.id_of("mask_token"), declared.only_mask())
    if mask is None and mask_id is None:
        problem = f"no mask token: {folder}/config.json has no mask_token_id and its tokenizer names none"
        raise ConfigError("mask_id", problem, remedy="mask_id=N takes a spare id, mask_id=new adds a row for it")
    if mask is not None and mask_id is not None and mask_id != mask:
        raise ConfigError("mask_id", f"the checkpoint says {mask}", mask_id, "leave it out")
    ends = fields.get("eos_token_id")
    eos = _first(ends, declared.id_of("eos_token"), eos_id)
    if eos is None:
        problem = f"no end token: neither {folder}/config.json nor its tokenizer names one"
        raise ConfigError("eos_id", problem, remedy="eos_id=N")
    if eos_id is not None and eos_id != eos:
        if not isinstance(ends, list) or eos_id not in ends:
            raise ConfigError("eos_id", f"the checkpoint says {eos if ends is None else ends}", eos_id, "leave it out")
        eos = eos_id
    pad = _first(fields.get("pad_token_id"), declared.id_of("pad_token"), eos)
    assert pad is not None
    chosen = mask if mask is not None else mask_id
    if isinstance(chosen, str) and chosen != "new":
        raise ConfigError("mask_id", "must be an id or new", chosen)
    found = SpecialIds(rows if isinstance(chosen, str) else int(chosen or 0), eos, pad, isinstance(chosen, str))
    for name, value in (("mask_id", found.mask_id), ("eos_id", eos), ("pad_id", pad)):
        if not 0 <= value < rows + found.is_new:
            raise ConfigError(name, f"must be an id below {rows}, the rows of the embedding", value)
    if found.mask_id in (eos, pad):
        raise ConfigError("mask_id", "must differ from the ids of end and padding", found.mask_id)
    return found


def tokens_of(folder: Path) -> dict[int, str]:
    """The special tokens of a folder's tokenizer, and the others that were added."""
    return {number: token for token, number in _Declared(folder).added.items()}


def with_token(tokenizer_json: str, token: str, number: int, place: str) -> str:
    """A tokenizer.json with one special token more, the others' ids as they were. Raises CheckpointError where token or
    id are taken.

    A library counts on from the size of the vocabulary: the new token may stand behind a gap, and added ones that are
    not in the vocabulary, as Qwen's and LLaDA's, would move up. So each is put there by its id.
    """
    values = json.loads(tokenizer_json)
    vocabulary, added = values.get("model", {}).get("vocab"), values.setdefault("added_tokens", [])
    if not isinstance(vocabulary, dict):
        raise CheckpointError(place, "has no vocabulary that a mask could be added to")
    if token in vocabulary or number in vocabulary.values() or any(token == other["content"] for other in added):
        raise CheckpointError(place, f"has {token} or the id {number} already", remedy="mask_id=another")
    for other in added:
        vocabulary.setdefault(other["content"], other["id"])
    vocabulary[token] = number
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    added.append({"id": number, "content": token, **flags, "special": True})
    return json.dumps(values, ensure_ascii=False)


def with_listed(config_json: str, tokenizer_json: str, tokens: Collection[str]) -> str:
    """A tokenizer_config.json that lists these tokens of a tokenizer.json beside the added ones that it lists, if any.

    Newer libraries go by that list where there is one, and would take other tokens apart as text.
    """
    values = json.loads(config_json)
    listed = values.get("added_tokens_decoder")
    if not listed:
        return config_json
    added = {str(token["id"]): token for token in json.loads(tokenizer_json).get("added_tokens") or []}
    new = {number: token for number, token in added.items() if token["content"] in tokens and number not in listed}
    if not new:
        return config_json
    flags = {number: {name: flag for name, flag in token.items() if name != "id"} for number, token in new.items()}
    return json.dumps({**values, "added_tokens_decoder": {**listed, **flags}}, indent=2, ensure_ascii=False) + "\n"


def _first(*found: Any) -> int | None:
    """The first that says something; of several end tokens the first counts, and -1 is Llama's word for none."""
    for value in found:
        value = value[0] if isinstance(value, list) and value else value
        if isinstance(value, int) and not isinstance(value, bool) and value != -1:
            return value
    return None


class _Declared:
    """What a folder's tokenizer files say of its special tokens."""

    def __init__(self, folder: Path) -> None:
        tokenizer = read_json(folder / TOKENIZER_NAME)
        self._says = [read_json(folder / name) for name in (TOKENIZER_CONFIG_NAME, "special_tokens_map.json")]
        self.added: dict[str, int] = dict(read_json(folder / "added_tokens.json"))
        try:
            for number, token in (self._says[0].get("added_tokens_decoder") or {}).items():
                self.added[token["content"]] = int(number)
            for token in tokenizer.get("added_tokens") or []:
                self.added[token["content"]] = int(token["id"])
            vocabulary = (tokenizer.get("model") or {}).get("vocab")
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            problem = f"its tokenizer's files make no sense ({error!r})"
            raise CheckpointError(str(folder), problem, remedy="fetch the tokenizer again") from error
        self._vocabulary: dict[str, int] = vocabulary if isinstance(vocabulary, dict) else {}

    def id_of(self, role: str) -> int | None:
        """The id of the token that plays this role, if a file says which does."""
        for says in self._says:
            token = says.get(role)
            token = token.get("content") if isinstance(token, dict) else token
            if isinstance(token, str):
                return self.added.get(token, self._vocabulary.get(token))
        return None

    def only_mask(self) -> int | None:
        """The one added token that is spelled as masks are; None where there are several."""
        found = {self.added[token] for token in _MASKS if token in self.added}
        return found.pop() if len(found) == 1 else None


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object, {} where there is no file. Raises CheckpointError for a damaged one."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, RecursionError) as error:  # the last: brackets in brackets, thousands deep
        raise CheckpointError(str(path), f"cannot be read ({error})") from error
    if not isinstance(values, dict):
        raise CheckpointError(str(path), "is no JSON object", type(values).__name__)
    return values
