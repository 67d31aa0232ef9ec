"""Hub: data sets that `datasets` streams. The only file that imports the library, which costs 0.8 s and pandas."""

from collections.abc import Iterator
from typing import Any

from dllm_core.data.corpus import HubSource
from dllm_core.errors import DataError


def num_shards(source: HubSource) -> int:
    """Into how many parts the data set can be streamed; each becomes a unit."""
    return int(_load(source).num_shards)


def hub_records(source: HubSource, index: int, shards: int) -> Iterator[Any]:
    """The records of part `index` of `shards`, as the library yields them: mappings of named fields."""
    yield from _load(source).shard(num_shards=shards, index=index)


def _load(source: HubSource) -> Any:
    import datasets

    try:
        return datasets.load_dataset(
            source.path, source.subset, split=source.split, data_files=source.data_files, streaming=True
        )
    except Exception as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise DataError("corpus.path", f"cannot be loaded ({reason})", source.path) from error
