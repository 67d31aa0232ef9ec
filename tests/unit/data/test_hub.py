"""What `datasets` streams, through one of its local builders: no network is needed to prove the path."""

import json
from pathlib import Path

import pytest
from test_data_plane import made, quarantine_of, texts_of

from dllm_core.errors import DataError


@pytest.fixture
def streamed(tmp_path: Path) -> tuple[dict, list[str]]:
    """A hub section over three JSON files, and the texts in them."""
    folder = tmp_path / "streamed"
    folder.mkdir()
    texts = [f"streamed text number {i}, of the hub" for i in range(60)]
    for part in range(3):
        lines = [json.dumps({"body": text}) for text in texts[part::3]]
        (folder / f"part-{part}.jsonl").write_text("\n".join(lines) + "\n")
    section = {"type": "hub", "path": "json", "data_files": f"{folder}/*.jsonl"}
    return {**section, "record": {"type": "text", "field": "body"}}, texts


def test_every_record_that_a_builder_streams_is_there_once(tmp_path, streamed):
    hub, texts = streamed
    corpus = made(tmp_path, corpus=hub)
    assert corpus.manifest.units == 3  # one for each file that it streams
    assert sorted(texts_of(corpus).elements()) == sorted(texts)
    assert corpus.manifest.accounting.bytes_in == sum(len(text) for text in texts)


def test_a_hub_source_is_one_of_a_mixture(tmp_path, streamed):
    hub, texts = streamed
    local = [f"local text number {i}, on disk" for i in range(30)]
    (tmp_path / "local.txt").write_text("\n".join(local) + "\n")
    lines = {"type": "text", "path": str(tmp_path / "local.txt"), "document": "line"}
    corpus = made(tmp_path, corpus={"type": "mixture", "sources": [lines, hub]})
    assert sorted(texts_of(corpus).elements()) == sorted([*texts, *local])


def test_a_streamed_record_without_its_field_is_quarantined_with_its_row(tmp_path, streamed):
    hub, _ = streamed
    with (tmp_path / "streamed" / "part-1.jsonl").open("a") as file:
        file.write(json.dumps({"body": None}) + "\n")
    corpus = made(tmp_path, corpus={**hub, "max_bad_fraction": 0.5})
    [record] = quarantine_of(corpus)
    assert (record["key"], record["offset"], record["reason"]) == ("hub:json/1", 20, "'body' is not a string")
    with pytest.raises(DataError, match=r"are bad, 1% are allowed"):
        made(tmp_path, corpus={**hub, "record": {"type": "text", "field": "other"}})


def test_what_cannot_be_loaded_is_one_line_about_its_name(tmp_path, streamed):
    hub, _ = streamed
    with pytest.raises(DataError, match=r"cannot be loaded") as caught:
        made(tmp_path, corpus={**hub, "data_files": f"{tmp_path}/nothing-*.jsonl"})
    assert "\n" not in str(caught.value)


def test_a_stream_that_breaks_off_is_one_line_and_no_bad_record(tmp_path, streamed):
    hub, _ = streamed
    with (tmp_path / "streamed" / "part-1.jsonl").open("a") as file:
        file.write('{"body": "cut\n{"body": "after"}\n')
    with pytest.raises(DataError, match=r"^corpus\.path: broke off at record \d+ of part 1 of 3 \(.*JSON") as caught:
        made(tmp_path, corpus={**hub, "max_bad_fraction": 0.5})
    assert "\n" not in str(caught.value)
