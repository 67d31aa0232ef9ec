"""KeyRing: API keys by their hashes, from a file that may change while the endpoint runs.

A line is `NAME sha256:HEX`; blank lines and those that begin with # say nothing. A key is long and random, so that its
plain hash tells nothing; `printf %s "$KEY" | sha256sum` makes it.
"""

import hashlib
import hmac
import logging
import re
import time
from pathlib import Path

from dllm_core.errors import ConfigError

_LINE = re.compile(r"([A-Za-z0-9._-]{1,128})\s+sha256:([0-9a-f]{64})")
_LOOK_EVERY_S = 1.0
_log = logging.getLogger("dllm.keys")


class KeyRing:
    """The keys that are let in."""

    def __init__(self, path: str) -> None:
        self._path = Path(path)
        self._stamp = file_stamp(self._path)  # first: what changes while it is read is read again
        self._names, self._read_at = read_keys(self._path), time.monotonic()

    def name_of(self, authorization: str | None) -> str | None:
        """Whose key an Authorization header holds; None for nobody's. Takes as long for a wrong key as for a right."""
        self._look()
        scheme, _, key = (authorization or "").partition(" ")
        given = hashlib.sha256(key.strip().encode("latin-1", "replace")).hexdigest()
        found = None
        for name, kept in self._names:
            if hmac.compare_digest(kept, given):
                found = name
        return found if scheme.lower() == "bearer" else None

    def _look(self) -> None:
        """Read the file again where it has changed; one that cannot be read leaves the keys as they were."""
        now = time.monotonic()
        if now - self._read_at < _LOOK_EVERY_S:
            return
        self._read_at = now
        stamp = file_stamp(self._path)
        if stamp == self._stamp:
            return
        self._stamp = stamp
        try:
            self._names = read_keys(self._path)
        except ConfigError as error:
            _log.error("the keys stay as they were: %s", error)


def file_stamp(path: Path) -> tuple[int, int, int] | None:
    """What changes when a file does; None where there is none."""
    try:
        about = path.stat()
    except OSError:
        return None
    return about.st_mtime_ns, about.st_size, about.st_ino


def read_keys(path: Path) -> list[tuple[str, str]]:
    """(name, sha256) of each line. Raises ConfigError by the line at fault; never shows what stands there."""
    place = "serve.keys_file"
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError, ValueError) as error:
        reason = getattr(error, "strerror", None) or "is not text"
        raise ConfigError(place, f"cannot be read ({reason})", str(path)) from None
    found: dict[str, str] = {}
    for number, line in enumerate(lines, 1):
        if not line.strip() or line.startswith("#"):
            continue
        matched = _LINE.fullmatch(line.strip())
        if matched is None:
            remedy = 'a line is NAME sha256:HEX, as `printf %s "$KEY" | sha256sum` makes it'
            raise ConfigError(place, f"line {number} is no key", str(path), remedy)
        if matched[1] in found:
            raise ConfigError(place, f"line {number} names a key that is there already", matched[1])
        found[matched[1]] = matched[2]
    if not found:
        raise ConfigError(place, "holds no key: nobody could ask", str(path), "a line is NAME sha256:HEX")
    return list(found.items())
