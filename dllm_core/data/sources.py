"""Where a corpus's files are: a path, S3, or text that every Python installation carries.

`python:unicode-names`: the names of all Unicode characters that have one of their own. `python:stdlib`: its sources.
"""

import os
import sysconfig
import unicodedata
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from dllm_core.data.corpus import CorpusBase, HubSource, SourceBase
from dllm_core.data.units import SourceFiles, list_files
from dllm_core.errors import DataError
from dllm_core.storage.store import LocalStore, Store, local_path, open_store

_PLACE = "corpus.path"
_COLUMN = 16
# Names made by rule from the code point teach nothing but counting; UAX #44, section 4.2, table 4-8.
_BY_RULE = ("CJK UNIFIED IDEOGRAPH-", "CJK COMPATIBILITY IDEOGRAPH-", "HANGUL SYLLABLE ", "TANGUT IDEOGRAPH-",
            "NUSHU CHARACTER-", "KHITAN SMALL SCRIPT CHARACTER-")  # fmt: skip


def find_files(corpus: CorpusBase, root: Store) -> tuple[SourceFiles, ...]:
    """List every source's files; missing and unreadable ones are refused now. `root` keeps what is made first."""
    return tuple(find_source(source, root) for source in corpus.all_sources)


def find_source(source: SourceBase, root: Store) -> SourceFiles:
    """List one source's files. A hub source has none that are known beforehand."""
    if isinstance(source, HubSource):
        return SourceFiles(root, ())
    if source.path == "python:unicode-names":
        key = f"sources/unicode-names-{unicodedata.unidata_version}/names.txt"
        if not root.exists(key):
            root.put_if_absent(key, unicode_names().encode())
        # Its content follows from its key: the time at which this machine wrote it down is no part of its identity.
        return SourceFiles(root, tuple(replace(item, stamp="") for item in list_files(source, root, key)))
    if source.path == "python:stdlib":
        store = LocalStore(Path(sysconfig.get_paths()["stdlib"]))
        files = list_files(source, store, "")
        return SourceFiles(store, tuple(item for item in files if not item.key.startswith("site-packages/")))
    if source.path.startswith("python:"):
        raise DataError(_PLACE, "no such text", source.path, "python:unicode-names or python:stdlib")
    if source.path.startswith("s3://"):
        return _remote_files(source)
    return _local_files(source, root)


def _remote_files(source: SourceBase) -> SourceFiles:
    """As with folders, keys are relative to `path`, or to what a single object stands in."""
    bucket, _, prefix = source.path.removeprefix("s3://").strip("/").partition("/")
    name = ""
    if prefix and open_store(_PLACE, f"s3://{bucket}").stat(prefix) is not None:
        prefix, _, name = prefix.rpartition("/")
    store = open_store(_PLACE, f"s3://{bucket}/{prefix}")
    return SourceFiles(store, tuple(list_files(source, store, name)))


def _local_files(source: SourceBase, root: Store) -> SourceFiles:
    path = local_path(_PLACE, source.path)
    try:
        is_file, exists = path.is_file(), path.exists()
    except OSError as error:
        raise DataError(_PLACE, f"cannot be looked at ({error.strerror})", source.path) from None
    if not exists:
        raise DataError(_PLACE, "no such file or folder", source.path, "name one that exists")
    store = LocalStore(path.parent if is_file else path)
    files = list_files(source, store, path.name if is_file else "")
    if isinstance(root, LocalStore) and store.root in root.root.parents:  # what we make is no part of what we read
        ours = f"{root.root.relative_to(store.root).as_posix()}/"
        files = [item for item in files if not item.key.startswith(ours)]
        if not files:
            raise DataError(_PLACE, "holds nothing but storage.root", source.path, "name another folder")
    for item in files:
        if not os.access(store.path(item.key), os.R_OK):
            raise DataError(_PLACE, "no permission to read", str(store.path(item.key)))
    return SourceFiles(store, tuple(files))


def unicode_names() -> str:
    """Names in the order of the code charts: a name a line, a blank line between columns of 16 code points."""
    return "\n\n".join("\n".join(column) for column in _columns()) + "\n"


def _columns() -> Iterator[list[str]]:
    for start in range(0, 0x110000, _COLUMN):
        names = (unicodedata.name(chr(point), "") for point in range(start, start + _COLUMN))
        column = [name for name in names if name and not name.startswith(_BY_RULE)]
        if column:
            yield column
