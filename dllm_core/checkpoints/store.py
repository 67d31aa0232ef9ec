"""Checkpoints of a run: safetensors under `checkpoints/step-N/`, a manifest with every sha256 written last.

Nothing is pickled and nothing is cut by rank, so any world size, ZeRO stage or backend resumes from any checkpoint.
"""

import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from dllm_core.checkpoints.run_dir import RunDir
from dllm_core.config.base import Frozen
from dllm_core.config.fingerprint import seal, unseal
from dllm_core.errors import CheckpointError, ConfigError, DataError
from dllm_core.storage.store import LocalStore, Store, fetch_intact, file_sha256

_FOLDER = "checkpoints"
_MANIFEST = "manifest.json"
_COMMITTED = re.compile(rf"step-(\d{{8,}})/{re.escape(_MANIFEST)}")


class FileEntry(Frozen):
    """What a manifest promises of one file."""

    bytes: int
    sha256: str

    def matches(self, path: Path) -> bool:
        """Whether a file is the promised one."""
        return path.stat().st_size == self.bytes and file_sha256(path) == self.sha256


class TrainPosition(Frozen):
    """Where training stands: all of its state that is not a tensor."""

    step: int = 0
    samples_seen: int = 0
    tokens_seen: int = 0
    seconds: float = 0.0
    skipped_steps: int = 0


class CheckpointManifest(Frozen):
    """What a committed checkpoint holds."""

    position: TrainPosition
    files: dict[str, FileEntry]


@dataclass(frozen=True)
class Checkpoint:
    """A verified checkpoint with its files at hand."""

    name: str
    manifest: CheckpointManifest
    files: dict[str, Path]


class CheckpointStore:
    """Saves, finds and prunes the checkpoints of one run. Only rank 0 writes."""

    def __init__(self, run: RunDir) -> None:
        self._run = run

    def folder(self, step: int) -> str:
        """Key prefix of a step's checkpoint."""
        return self._run.key(f"{_FOLDER}/step-{step:08d}")

    def save(self, position: TrainPosition, files: Mapping[str, Path]) -> None:
        """Store the files, then the manifest that makes them a checkpoint. A kill in between leaves no checkpoint."""
        folder = self.folder(position.step)
        entries = {}
        for name, path in files.items():
            entries[name] = FileEntry(bytes=path.stat().st_size, sha256=file_sha256(path))
            self._run.store.put_file(f"{folder}/{name}", path)
        manifest = CheckpointManifest(position=position, files=entries)
        self._run.store.put(f"{folder}/{_MANIFEST}", seal(manifest))

    def committed(self) -> list[int]:
        """Steps that have a manifest, oldest first."""
        top = self._run.key(_FOLDER)
        names = [item.key.removeprefix(f"{top}/") for item in self._run.store.list(top)]
        return sorted(int(found[1]) for name in names if (found := _COMMITTED.fullmatch(name)))

    def newest(self, on_damage: Callable[[CheckpointError], None]) -> Checkpoint | None:
        """The newest checkpoint whose every byte is as promised; damaged ones are reported and passed over."""
        for step in reversed(self.committed()):
            try:
                return self.at(step)
            except CheckpointError as error:
                on_damage(error)
        return None

    def prune(self, keep: int) -> None:
        """Delete all but the newest `keep`: the manifest first, so that a half-deleted one does not count."""
        for step in self.committed()[:-keep]:
            self._run.store.delete(f"{self.folder(step)}/{_MANIFEST}")
            self._delete(step)

    def _delete(self, step: int) -> None:
        folder = self.folder(step)
        for item in list(self._run.store.list(folder)):
            self._run.store.delete(item.key)
        if isinstance(self._run.store, LocalStore):
            shutil.rmtree(self._run.store.path(folder), ignore_errors=True)

    def at(self, step: int) -> Checkpoint:
        """The checkpoint of a step. Raises CheckpointError where a byte is not as promised."""
        folder = self.folder(step)
        place = f"{self._run.store.url}/{folder}"
        try:
            raw = self._run.store.read(f"{folder}/{_MANIFEST}")
            manifest = CheckpointManifest.checked(unseal(raw))
        except (DataError, ConfigError, ValueError) as error:
            raise CheckpointError(f"{place}/{_MANIFEST}", f"cannot be read ({error})") from error
        files = {
            name: verified_file(self._run.store, f"{folder}/{name}", entry, f"{place}/{name}")
            for name, entry in manifest.files.items()
        }
        return Checkpoint(f"step-{step:08d}", manifest, files)


def verified_file(store: Store, key: str, entry: FileEntry, place: str) -> Path:
    """A local file whose sha256 is the promised one."""
    try:
        path = fetch_intact(store, key, entry.sha256)
        if path is not None:
            return path
    except (DataError, OSError) as error:
        raise CheckpointError(place, f"cannot be read ({error})") from error
    raise CheckpointError(place, "does not match its sha256", remedy="the file was changed or damaged")
