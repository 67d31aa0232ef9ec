"""What was decided on one document is never done to another, and a search for duplicates maps few files at a time."""

import json
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from conftest import in_long, small_recipe

from dllm_core.data import build, shard
from dllm_core.data.build import decisions_key, put_shard, to_arrow
from dllm_core.data.filters import first_reason
from dllm_core.data.receipts import DECISIONS, FileReceipt
from dllm_core.data.records import Document
from dllm_core.data.shard import map_shard
from dllm_core.errors import DataError
from dllm_core.storage.store import LocalStore
from workflows.fan_out import serially
from workflows.preprocess.flow import CorpusPlan, Preprocessing, plan_corpus

TEXTS = [f"document {i} of so many words {i * i}" for i in range(2000)]
TEXTS[1700] = TEXTS[30]  # equal, and nearly equal, in another unit
TEXTS[1800] = f"{TEXTS[20]}!"
DROPPED = {"before": TEXTS[0], "behind": TEXTS[-1]}


class KilledError(Exception):
    """Between the passes."""


def killed(function, items, **options):
    if getattr(function, "func", None) is build.tokenize_unit:
        raise KilledError
    return serially(function, items, **options)


def planned(root, unit_bytes: int = 1 << 20, **dedup: object) -> CorpusPlan:
    (root / "corpus").mkdir(exist_ok=True)
    (root / "corpus" / "lines.txt").write_text("\n".join(TEXTS))
    section = {"document": "line", "unit_bytes": unit_bytes, "dedup": dedup}
    return plan_corpus(small_recipe(root, corpus=section), LocalStore(root / "storage"))


def forget_digests(plan: CorpusPlan) -> None:
    """Decisions as they were written before digests were kept."""
    job = plan.job()
    for unit, receipt in job.receipts.of_all(DECISIONS).items():
        views = map_shard(job.output, job.prefix, receipt.shard)
        data = to_arrow({name: np.array(view) for name, view in views.items() if name != "digest"}, {})
        sizes = {"unit": unit, "rows": receipt.shard.rows, "tokens": 0}
        info = put_shard(job.output, job.prefix, decisions_key(unit), data, **sizes)
        job.receipts.write(DECISIONS, unit, FileReceipt(shard=info))


def drop(monkeypatch, text: str) -> None:
    """From now on a filter drops this document too."""
    monkeypatch.setattr(build, "first_reason", lambda filters, t: "new" if t == text else first_reason(filters, t))


@pytest.mark.parametrize("which", DROPPED)
@pytest.mark.parametrize("has_digests", [True, False])
def test_a_filter_that_changes_between_the_passes_is_refused(tmp_path, monkeypatch, which, has_digests):
    plan = planned(tmp_path)
    with pytest.raises(KilledError):
        Preprocessing(plan, killed).run()
    if not has_digests:
        forget_digests(plan)
    drop(monkeypatch, DROPPED[which])
    with pytest.raises(DataError, match="changed between two passes: ") as told:
        Preprocessing(plan, serially).run()
    assert told.value.place == f"{plan.url}/dedup/decisions-000000.arrow"
    assert told.value.remedy == f"delete {plan.url} and run `dllm preprocess` again"
    assert ("is not the document that was decided on" in str(told.value)) == (has_digests and which == "before")


@pytest.mark.parametrize("has_digests", [True, False])
def test_decisions_are_done_to_their_documents(tmp_path, has_digests):
    plan = planned(tmp_path)
    with pytest.raises(KilledError):
        Preprocessing(plan, killed).run()
    if not has_digests:
        forget_digests(plan)
    assert Preprocessing(plan, serially).run().accounting.duplicates == {"exact": 1}
    [line] = plan.store.path(plan.job().key("quarantine/unit-000000.jsonl")).read_text().splitlines()
    assert json.loads(line)["text"] == TEXTS[1700]


@pytest.mark.parametrize("most", [1, *in_long(3)])
def test_a_search_over_many_units_maps_few_files_at_a_time_and_decides_alike(tmp_path, monkeypatch, most):
    """As over more units than a process has mappings (65,530)."""
    few = planned(tmp_path, near={})
    Preprocessing(few, serially).run()
    many = planned(tmp_path, unit_bytes=1 << 10, near={})
    job, units = many.job(), many.units()
    receipts = [build.sign_unit(job, unit) for unit in units]
    at_once, inner = [], shard._views

    def counted(batch):
        maps = Path("/proc/self/maps").read_text().splitlines()
        at_once.append(sum("dedup/signatures" in line for line in maps))
        return inner(batch)

    monkeypatch.setattr(shard, "_views", counted)
    monkeypatch.setattr(build, "_MAPPED_SIGNATURES", most)
    build.decide(job, receipts)
    assert len(units) > 60
    assert max(at_once) <= most + 3  # what is looked at, and what is opened in its place
    assert columns(many, "representative") == columns(few, "representative")
    assert columns(many, "digest") == columns(few, "digest")


def columns(plan: CorpusPlan, name: str) -> list[object]:
    """Of all decisions, in the order of the documents."""
    job = plan.job()
    receipts = [receipt.shard for _, receipt in sorted(job.receipts.of_all(DECISIONS).items())]
    return [value for info in receipts for value in map_shard(job.output, job.prefix, info)[name].tolist()]


def test_the_first_pass_holds_few_of_a_units_texts(tmp_path, monkeypatch):
    """A compressed file is one unit whatever its size."""
    plan, count = planned(tmp_path), 256
    long = (Document(f"{number} " + "x" * (1 << 16), "a", number) for number in range(count))
    monkeypatch.setattr(build, "read_unit", lambda *asked: long)
    tracemalloc.start()
    try:
        receipt = build.sign_unit(plan.job(), plan.units()[0])
        assert tracemalloc.get_traced_memory()[1] < 4 << 20  # of 16 MiB
    finally:
        tracemalloc.stop()
    assert receipt.shard.rows == count
