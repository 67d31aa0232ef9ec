"""Checkpoints of a run: safetensors under `checkpoints/step-N/`, a manifest with every sha256 written last.

Nothing is pickled and nothing is cut by rank, so any world size, ZeRO stage or backend resumes from any checkpoint.
"""

import contextlib
import math
import re
import shutil
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from dllm_core.checkpoints.run_dir import RunDir
from dllm_core.config.base import Frozen
from dllm_core.config.fingerprint import fingerprint, seal, unseal
from dllm_core.errors import CheckpointError, ConfigError, DataError
from dllm_core.storage.cache import hold
from dllm_core.storage.store import LocalStore, Store, fetch_intact, file_sha256

CHECKPOINTS = "checkpoints"
_MANIFEST = "manifest.json"
_COMMITTED = re.compile(rf"step-(\d{{8,}})/{re.escape(_MANIFEST)}")
_ANY = re.compile(r"step-(\d{8,})/.*")
_FETCHES = 8


class FileEntry(Frozen):
    """What a manifest promises of one file."""

    bytes: int
    sha256: str

    def matches(self, path: Path) -> bool:
        """Whether a file is the promised one."""
        return path.stat().st_size == self.bytes and file_sha256(path) == self.sha256


class TrainPosition(Frozen):
    """Where training stands: all of its state that is not a tensor. skipped_in_a_row: the last steps, if not taken."""

    step: int = 0
    samples_seen: int = 0
    tokens_seen: int = 0
    seconds: float = 0.0
    skipped_steps: int = 0
    skipped_in_a_row: int = 0


class CheckpointManifest(Frozen):
    """What a committed checkpoint holds. heldout: nats a token by its weights; scored: digest of the rows that it is
    of, None where nobody noted it; corpus: digest of the rows that were trained on.
    """

    position: TrainPosition
    files: dict[str, FileEntry]
    heldout: float | None = None
    scored: str | None = None
    corpus: str | None = None


@dataclass(frozen=True)
class Checkpoint:
    """A verified checkpoint with its files at hand."""

    name: str
    manifest: CheckpointManifest
    files: dict[str, Path]


class CheckpointStore:
    """Saves, finds and prunes the checkpoints of one run. Only rank 0 writes.

    corpus, scored: digests of the rows that are trained on and of those that are scored, to be written into what is
    saved.
    """

    def __init__(self, run: RunDir, corpus: str | None = None, scored: str | None = None) -> None:
        self._run, self._corpus, self._scored = run, corpus, scored

    @property
    def identity(self) -> str:
        """Of the run that they belong to, wherever it is looked at from: 12 hex digits."""
        return fingerprint(self._run.url)

    def folder(self, step: int) -> str:
        """Key prefix of a step's checkpoint."""
        return self._run.key(f"{CHECKPOINTS}/step-{step:08d}")

    def save(self, position: TrainPosition, files: Mapping[str, Path], heldout: float | None = None) -> None:
        """Store the files, then the manifest that makes them a checkpoint. A kill in between leaves no checkpoint.

        Where that fails, what was stored of it is removed: it would take the room of the next one.
        """
        folder, entries, manifest = self.folder(position.step), dict[str, FileEntry](), b""
        try:
            for name, path in files.items():
                entry = FileEntry(bytes=path.stat().st_size, sha256=file_sha256(path))
                self._run.store.put_file(f"{folder}/{name}", path)
                entries[name] = entry
            scored = None if heldout is None else self._scored
            values = CheckpointManifest(
                position=position, files=entries, heldout=heldout, scored=scored, corpus=self._corpus
            )
            manifest = seal(values)
            self._run.store.put(f"{folder}/{_MANIFEST}", manifest)
        except (DataError, OSError):
            with contextlib.suppress(DataError, OSError):
                self._take_back(folder, list(entries), manifest)
            raise

    def _take_back(self, folder: str, names: list[str], manifest: bytes) -> None:
        """Remove what a save has put. A checkpoint that stands there by another's manifest is left as it is."""
        store, key = self._run.store, f"{folder}/{_MANIFEST}"
        if store.exists(key):
            if store.read(key) != manifest:
                return
            store.delete(key)  # it arrived, though its writer was not told
        for name in names:
            store.delete(f"{folder}/{name}")
        if isinstance(store, LocalStore):  # what a kill left of one that was being written takes room too
            shutil.rmtree(store.path(folder), ignore_errors=True)

    def committed(self) -> list[int]:
        """Steps that have a manifest, oldest first."""
        return self._steps(_COMMITTED)

    def _steps(self, pattern: re.Pattern[str]) -> list[int]:
        """The steps of all objects whose key below `checkpoints/` matches, each once, ascending."""
        top = self._run.key(CHECKPOINTS)
        names = [item.key.removeprefix(f"{top}/") for item in self._run.store.list(top)]
        return sorted({int(found[1]) for name in names if (found := pattern.fullmatch(name))})

    def newest(self, on_damage: Callable[[CheckpointError], None]) -> Checkpoint | None:
        """The newest checkpoint whose every byte is as promised; damaged ones are reported and passed over."""
        return next(self.intact(on_damage), None)

    def intact(self, on_damage: Callable[[CheckpointError], None]) -> Iterator[Checkpoint]:
        """Checkpoints whose every byte is as promised, the newest first; damaged ones are reported and passed over."""
        return self._intact(self.committed()[::-1], on_damage)

    def best(self, on_damage: Callable[[CheckpointError], None]) -> Iterator[Checkpoint]:
        """The same in the order of their held-out scores, the least nats first; those without one last."""
        return self._intact(self._ranked(), on_damage)

    def _intact(self, steps: list[int], on_damage: Callable[[CheckpointError], None]) -> Iterator[Checkpoint]:
        for step in steps:
            try:
                yield self.at(step)
            except CheckpointError as error:
                on_damage(error)

    def _ranked(self, distrusted: Collection[int] = ()) -> list[int]:
        """Committed steps, the best held-out score first; of equal ones and of those without, the newest.

        Scores of other rows than the newest one's say nothing beside it, so they are none.
        """
        found = {step: self._said(step) for step in self.committed()[::-1] if step not in distrusted}
        rows = next((said.scored for said in found.values() if said is not None and said.scored is not None), None)

        def score(step: int) -> float:
            said = found[step]
            if said is None or said.heldout is None or said.scored not in (None, rows):
                return math.inf
            return said.heldout

        return sorted(found, key=score)

    def _said(self, step: int) -> CheckpointManifest | None:
        with contextlib.suppress(CheckpointError):
            return self.manifest(step)
        return None

    def prune(
        self, keep: int, keep_every: int | None = None, keep_best: int = 0, distrusted: Collection[int] = ()
    ) -> None:
        """Delete all but the newest `keep`, those at multiples of `keep_every` steps and the `keep_best` best ones.

        What a kill left of others before the newest goes too. distrusted: steps that a resume passed over as damaged.
        They count for none of these and go with what is left before the newest of the others; after it they stay, since
        the error may have been one of reading.
        """
        trusted = [step for step in self.committed() if step not in distrusted]
        best = self._ranked(distrusted)[:keep_best] if keep_best else []
        kept = {step for step in trusted if step in best or (keep_every and step % keep_every == 0)}
        kept.update(trusted[-keep:])
        for step in self._steps(_ANY):
            if step not in kept and step < max(trusted, default=0):
                self._delete(step)

    def _delete(self, step: int) -> None:
        """The manifest goes first, so that a half-deleted one does not count."""
        folder = self.folder(step)
        keys = [item.key for item in self._run.store.list(folder)]
        for key in sorted(keys, key=lambda key: not key.endswith(f"/{_MANIFEST}")):
            self._run.store.delete(key)
        if isinstance(self._run.store, LocalStore):
            shutil.rmtree(self._run.store.path(folder), ignore_errors=True)

    def at(self, step: int) -> Checkpoint:
        """The checkpoint of a step. Raises CheckpointError where a byte is not as promised."""
        manifest, folder = self.manifest(step), self.folder(step)
        place = f"{self._run.store.url}/{folder}"
        files = {
            name: verified_file(self._run.store, f"{folder}/{name}", entry, f"{place}/{name}")
            for name, entry in manifest.files.items()
        }
        return Checkpoint(f"step-{step:08d}", manifest, files)

    def manifest(self, step: int) -> CheckpointManifest:
        """What the checkpoint of a step says of itself; its files are not looked at. Raises CheckpointError."""
        store, key = self._run.store, f"{self.folder(step)}/{_MANIFEST}"
        try:
            return CheckpointManifest.checked(unseal(store.read(key)))
        except (DataError, ConfigError, ValueError) as error:
            if isinstance(error, DataError) and _is_out_of_reach(store, key):
                raise
            raise CheckpointError(f"{store.url}/{key}", f"cannot be read ({error})") from error


def verified_file(store: Store, key: str, entry: FileEntry, place: str) -> Path:
    """A local file whose sha256 is the promised one; what another process drops from the cache is fetched again.

    Raises CheckpointError for one that is damaged or gone, and another DataError where that is not known.
    """
    try:
        for _ in range(_FETCHES):
            with contextlib.suppress(FileNotFoundError):
                path = fetch_intact(store, key, entry.sha256)
                if path is None:
                    raise CheckpointError(place, "does not match its sha256", remedy="the file was changed or damaged")
                # Held until all of them are read: the next one may be more than the cache is to hold.
                if isinstance(store, LocalStore) or hold(path):
                    return path
    except CheckpointError:
        raise
    except (DataError, OSError) as error:
        if _is_out_of_reach(store, key):
            raise DataError(place, f"cannot be fetched ({error})") from error
        raise CheckpointError(place, f"cannot be read ({error})") from error
    raise DataError(place, "is dropped from the cache again and again", remedy="set a larger DLLM_CACHE_BYTES")


def _is_out_of_reach(store: Store, key: str) -> bool:
    """Whether what could not be read is there: a server that does not answer now, or a full cache, is no damage, and
    who passed it over would train again what was trained.
    """
    return not isinstance(store, LocalStore) and store.exists(key)
