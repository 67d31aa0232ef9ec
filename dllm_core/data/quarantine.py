"""The quarantine: what was taken out of a corpus, each record with its place, kind and rule, so that nothing is lost.

`quarantine/unit-NNNNNN.jsonl`, one object a line: `key`, `offset`, `kind` (quarantined, filtered, duplicates),
`reason`, and the record itself: `raw` (base64) of a bad one, `text` of a document.
"""

import base64
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from dllm_core.data.records import BadRecord, Document

SUMMARY = "quarantine/summary.json"
Kind = Literal["quarantined", "filtered", "duplicates"]


@dataclass(frozen=True)
class Removed:
    """One record that made no tokens, and why."""

    record: Document | BadRecord
    kind: Kind
    reason: str

    @property
    def rule(self) -> str:
        """What it is counted by: the reason without its details."""
        return self.reason.partition(" (")[0]


def removed_lines(removed: Sequence[Removed]) -> bytes:
    """The content of a unit's quarantine file."""
    return b"".join(json.dumps(_as_json(item), ensure_ascii=False).encode() + b"\n" for item in removed)


def _as_json(item: Removed) -> dict[str, Any]:
    record = item.record
    body = {"raw": base64.b64encode(record.raw).decode()} if isinstance(record, BadRecord) else {"text": record.text}
    return {"key": record.key, "offset": record.offset, "kind": item.kind, "reason": item.reason, **body}
