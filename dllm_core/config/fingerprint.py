"""What a thing *is*: canonical JSON -> sha256. Equal fingerprints, equal results; placement is never hashed."""

import hashlib
import json
from typing import Any

from pydantic import BaseModel

LENGTH = 12
_SEAL = "sha256"


def canonical(value: Any) -> str:
    """One spelling for a value: sorted keys, no spaces, models as plain JSON."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, default=_plain)


def fingerprint(value: Any) -> str:
    """The first 12 hex digits of sha256(canonical(value)): 48 bits, enough for a folder name."""
    return hashlib.sha256(canonical(value).encode()).hexdigest()[:LENGTH]


def seal(record: BaseModel | dict[str, Any]) -> bytes:
    """A record as JSON that carries the sha256 of its own content: what a manifest is written as."""
    values = record.model_dump(mode="json") if isinstance(record, BaseModel) else record
    return json.dumps({**values, _SEAL: _digest(values)}, indent=1, ensure_ascii=False).encode()


def unseal(data: bytes) -> Any:
    """The content of a sealed record; ValueError if one bit of it has changed."""
    values = json.loads(data)
    if not isinstance(values, dict) or values.pop(_SEAL, None) != _digest(values):
        raise ValueError("its content does not match its own sha256")
    return values


def _digest(values: Any) -> str:
    return hashlib.sha256(canonical(values).encode()).hexdigest()


def _plain(value: Any) -> Any:
    if isinstance(value, BaseModel):
        return value.model_dump(mode="json")
    raise TypeError(f"not plain data: {type(value).__name__}")
