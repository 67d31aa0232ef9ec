"""Hub: data sets that `datasets` streams. The only file that imports the library, which costs 0.8 s and pandas."""

from collections.abc import Iterator
from typing import Any

from dllm_core.data.corpus import HubSource
from dllm_core.errors import DataError, first_line


def num_shards(source: HubSource) -> int:
    """Into how many parts the data set can be streamed; each becomes a unit."""
    return int(_load(source).num_shards)


def hub_records(source: HubSource, index: int, shards: int) -> Iterator[Any]:
    """The records of part `index` of `shards`, as the library yields them: mappings of named fields.

    A stream that breaks off is a DataError, not a bad record: what follows in it is not known to be bad.
    """
    part, row = _load(source).shard(num_shards=shards, index=index), 0
    try:
        for record in part:
            yield record
            row += 1
    except Exception as error:
        problem = f"broke off at record {row} of part {index} of {shards} ({first_line(error)})"
        raise DataError("corpus.path", problem, source.path, "what is complete is kept: run again") from error


def _load(source: HubSource) -> Any:
    import datasets

    try:
        return datasets.load_dataset(
            source.path, source.subset, split=source.split, data_files=source.data_files, streaming=True
        )
    except Exception as error:
        raise DataError("corpus.path", f"cannot be loaded ({first_line(error)})", source.path) from error
