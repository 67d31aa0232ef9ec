"""What was decided on one document is never done to another, and a search for duplicates maps few files at a time."""

import json

import numpy as np
import pytest
from conftest import small_recipe

from dllm_core.data import build
from dllm_core.data.build import decisions_key, put_shard, to_arrow
from dllm_core.data.filters import first_reason
from dllm_core.data.receipts import DECISIONS, FileReceipt
from dllm_core.data.shard import map_shard
from dllm_core.errors import DataError
from dllm_core.storage.store import LocalStore
from workflows.fan_out import serially
from workflows.preprocess.flow import CorpusPlan, Preprocessing, plan_corpus

TEXTS = [f"document {i} of so many words {i * i}" for i in range(60)]
TEXTS[40] = TEXTS[30]
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
    assert json.loads(line)["text"] == TEXTS[40]
