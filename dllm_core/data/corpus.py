"""Section `corpus`: where text comes from and what is taken of it. Sections only, and no I/O.

`units.py` cuts a corpus into work, `readers.py` reads bytes, `records.py` makes documents of them.
"""

from typing import Annotated, Literal

from pydantic import Field

from dllm_core.config.base import Frozen
from dllm_core.data.dedup import DedupConfig
from dllm_core.data.filters import AnyFilter


class TextRecord(Frozen):
    """A record of named fields is a document: the text in `field`."""

    type: Literal["text"] = "text"
    field: str = "text"


class ChatRecord(Frozen):
    """A conversation in `field`: a list of `{role, content}`; the assistant's turns are what is learned."""

    type: Literal["chat"] = "chat"
    field: str = "messages"


class PairRecord(Frozen):
    """A prompt and its answer, which alone is learned."""

    type: Literal["pair"] = "pair"
    prompt_field: str = "prompt"
    answer_field: str = "answer"


class PreferenceRecord(Frozen):
    """A prompt and two answers of which one was preferred: texts.

    conversations: the prompt is a list of `{role, content}`, an answer such a list or what the assistant says.
    """

    type: Literal["preference"] = "preference"
    prompt_field: str = "prompt"
    chosen_field: str = "chosen"
    rejected_field: str = "rejected"
    conversations: bool = False


AnyRecord = Annotated[TextRecord | ChatRecord | PairRecord | PreferenceRecord, Field(discriminator="type")]


class SourceBase(Frozen):
    """What every source has."""

    path: str = Field(min_length=1, description="folder, file, s3://bucket/prefix, python:stdlib, python:unicode-names")
    glob: str = Field("**/*", description="which files below `path`")
    weight: float = Field(1.0, gt=0, le=1000, description="how often a training document is taken, in the mean")


class TextSource(SourceBase):
    """Plain text, also .gz and .zst: a document is a file, a paragraph (after a blank line) or a line."""

    type: Literal["text"] = "text"
    document: Literal["file", "paragraph", "line"] = "file"


class JsonlSource(SourceBase):
    """One JSON object a line, also .gz and .zst."""

    type: Literal["jsonl"] = "jsonl"
    glob: str = "**/*.jsonl*"
    record: AnyRecord = TextRecord()


class ParquetSource(SourceBase):
    """Parquet files, a record a row; a row group is the smallest unit."""

    type: Literal["parquet"] = "parquet"
    glob: str = "**/*.parquet"
    record: AnyRecord = TextRecord()


class ArrowSource(SourceBase):
    """Arrow IPC files (file or stream format), a record a row; a record batch is the smallest unit."""

    type: Literal["arrow"] = "arrow"
    glob: str = "**/*.arrow"
    record: AnyRecord = TextRecord()


class HubSource(SourceBase):
    """Anything that `datasets.load_dataset(path, ...)` streams: a hub name or a local builder such as `json`."""

    type: Literal["hub"] = "hub"
    subset: str | None = None
    split: str = "train"
    data_files: str | None = None
    record: AnyRecord = TextRecord()


AnySource = Annotated[TextSource | JsonlSource | ParquetSource | ArrowSource | HubSource, Field(discriminator="type")]


class CorpusBase(Frozen):
    """What every corpus has, whatever its sources."""

    unit_bytes: int = Field(4 << 20, ge=1 << 10, le=1 << 32, description="bytes of input a task reads")
    heldout_fraction: float = Field(0.02, gt=0, lt=0.5)
    max_bad_fraction: float = Field(0.01, ge=0, le=1, description="more bad records than this end the run")
    filters: tuple[AnyFilter, ...] = Field((), description="a document is dropped by the first that has a reason")
    dedup: DedupConfig | None = Field(None, description="null: every document is kept")

    @property
    def all_sources(self) -> tuple[SourceBase, ...]:
        """The sources in their order; a plain corpus is its own only one."""
        assert isinstance(self, SourceBase)
        return (self,)

    @property
    def records(self) -> tuple[TextRecord | ChatRecord | PairRecord | PreferenceRecord | None, ...]:
        """The record section of each source, None of plain text."""
        return tuple(getattr(source, "record", None) for source in self.all_sources)


class TextCorpus(TextSource, CorpusBase):
    """A corpus of plain text."""


class JsonlCorpus(JsonlSource, CorpusBase):
    """A corpus of JSON lines."""


class ParquetCorpus(ParquetSource, CorpusBase):
    """A corpus of Parquet files."""


class ArrowCorpus(ArrowSource, CorpusBase):
    """A corpus of Arrow files."""


class HubCorpus(HubSource, CorpusBase):
    """A corpus that `datasets` streams."""


class MixtureCorpus(CorpusBase):
    """Several sources; `weight` says how often each one's training documents are taken (0.5: a half of them).

    Conversations and plain text may be mixed: both are token rows in the end.
    """

    type: Literal["mixture"] = "mixture"
    sources: tuple[AnySource, ...] = Field(min_length=1)

    @property
    def all_sources(self) -> tuple[SourceBase, ...]:
        """The sources in their order."""
        return self.sources


AnyCorpus = Annotated[
    TextCorpus | JsonlCorpus | ParquetCorpus | ArrowCorpus | HubCorpus | MixtureCorpus, Field(discriminator="type")
]
