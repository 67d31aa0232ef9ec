"""Receipts: what a step leaves when it is done. Written after its files; a step whose receipt stands is not run again.

Of one unit a worker asks by name. Who wants those of all units lists them and their files, a request for a thousand of
either, and reads receipts alone: one by one, each took a request for the receipt, one to read it and one a file.
"""

import re
from dataclasses import dataclass
from typing import Generic, TypeVar

from dllm_core.config.base import Frozen
from dllm_core.config.fingerprint import seal, unseal
from dllm_core.data.manifest import Accounting
from dllm_core.data.shard import ShardInfo
from dllm_core.storage.store import Store, read_each

_UNIT = re.compile(r".*/unit-(\d+)\.json")


class UnitReceipt(Frozen):
    """What became of one unit. quarantine_sha256: None of older ones, and where nothing was removed."""

    unit: int
    accounting: Accounting
    train: ShardInfo
    heldout: ShardInfo
    quarantine: str | None
    quarantine_sha256: str | None = None


class FileReceipt(Frozen):
    """A step that made one shard-like file."""

    shard: ShardInfo


AnyReceipt = TypeVar("AnyReceipt", UnitReceipt, FileReceipt)


@dataclass(frozen=True)
class Step(Generic[AnyReceipt]):
    """One kind of task: the folder of its receipts, that of the files they vouch for, and what a receipt says."""

    name: str
    files: str
    kind: type[AnyReceipt]

    @property
    def folder(self) -> str:
        """Where its receipts stand in the corpus's folder."""
        return f"receipts/{self.name}"

    def key(self, unit: int) -> str:
        """Where the receipt of a unit stands in the corpus's folder."""
        return f"{self.folder}/unit-{unit:06d}.json"


TOKENS = Step("tokens", "tokens", UnitReceipt)
SIGNATURES = Step("signatures", "dedup", FileReceipt)
DECISIONS = Step("decisions", "dedup", FileReceipt)


def noise_step(epoch: int) -> Step[FileReceipt]:
    """The noise of an epoch."""
    return Step(f"noise/epoch-{epoch:03d}", f"noise/epoch-{epoch:03d}", FileReceipt)


def shards_of(receipt: UnitReceipt | FileReceipt) -> list[ShardInfo]:
    """The files that a receipt vouches for; a split without rows has none."""
    if isinstance(receipt, FileReceipt):
        return [receipt.shard]
    return [shard for shard in (receipt.train, receipt.heldout) if shard.rows]


@dataclass(frozen=True)
class Receipts:
    """Those of the corpus in the folder `prefix` of a store."""

    store: Store
    prefix: str

    def write(self, step: Step[AnyReceipt], unit: int, receipt: AnyReceipt) -> None:
        """The last thing that a step does."""
        self.store.put(f"{self.prefix}/{step.key(unit)}", seal(receipt))

    def of(self, step: Step[AnyReceipt], unit: int) -> AnyReceipt | None:
        """The receipt of a unit that was completed once, whatever became of its files."""
        key = f"{self.prefix}/{step.key(unit)}"
        return _read(step, self.store.read(key)) if self.store.exists(key) else None

    def finished(self, step: Step[AnyReceipt], unit: int) -> AnyReceipt | None:
        """The receipt of a unit that was completed and whose files have the promised sizes, else None."""
        receipt = self.of(step, unit)
        return receipt if receipt is not None and all(map(self._stands, shards_of(receipt))) else None

    def _stands(self, info: ShardInfo) -> bool:
        found = self.store.stat(f"{self.prefix}/{info.key}")
        return found is not None and found.size == info.bytes

    def of_all(self, step: Step[AnyReceipt]) -> dict[int, AnyReceipt]:
        """`of` every unit that has one."""
        found = [(item.key, _UNIT.fullmatch(item.key)) for item in self.store.list(f"{self.prefix}/{step.folder}")]
        units = {int(match[1]): key for key, match in found if match}
        read = zip(units, read_each(self.store, list(units.values())), strict=True)
        receipts = {unit: None if data is None else _read(step, data) for unit, data in read}
        return {unit: receipt for unit, receipt in receipts.items() if receipt is not None}

    def all_finished(self, *steps: Step[AnyReceipt]) -> list[dict[int, AnyReceipt]]:
        """`finished` of every unit, for each of the steps; a folder of files is listed once."""
        receipts = [self.of_all(step) for step in steps]
        folders = {step.files for step, found in zip(steps, receipts, strict=True) if found}
        start = len(self.prefix) + 1
        sizes = {
            item.key[start:]: item.size for folder in folders for item in self.store.list(f"{self.prefix}/{folder}")
        }

        def stands(receipt: UnitReceipt | FileReceipt) -> bool:
            return all(sizes.get(info.key) == info.bytes for info in shards_of(receipt))

        return [{unit: receipt for unit, receipt in found.items() if stands(receipt)} for found in receipts]


def _read(step: Step[AnyReceipt], data: bytes) -> AnyReceipt | None:
    """None for a receipt that was damaged: its step runs again."""
    try:
        return step.kind.model_validate(unseal(data))
    except ValueError:
        return None
