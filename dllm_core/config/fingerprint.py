"""What a thing *is*: canonical JSON -> sha256. Equal fingerprints, equal results; placement is never hashed."""

import hashlib
import json
from typing import Any

from pydantic import BaseModel

LENGTH = 12


def canonical(value: Any) -> str:
    """One spelling for a value: sorted keys, no spaces, models as plain JSON."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, default=_plain)


def fingerprint(value: Any) -> str:
    """The first 12 hex digits of sha256(canonical(value)): 48 bits, enough for a folder name."""
    return hashlib.sha256(canonical(value).encode()).hexdigest()[:LENGTH]


def _plain(value: Any) -> Any:
    if isinstance(value, BaseModel):
        return value.model_dump(mode="json")
    raise TypeError(f"not plain data: {type(value).__name__}")
