"""What a task is sent does not grow with the corpus: at 223,517 units a manifest takes 5 s to be read from a pickle."""

import pickle

import pytest
from conftest import small_recipe, small_text

from dllm_core.storage.store import LocalStore
from workflows.fan_out import serially
from workflows.preprocess.flow import Preprocessing, plan_corpus
from workflows.preprocess.verbs import verify

UNIT_BYTES = {"few": 1 << 16, "all": 1 << 10}  # names of one length, for the paths in what is sent


@pytest.mark.parametrize("process", ["absorbing", "uniform", "hybrid"])
def test_what_a_noise_task_and_a_check_are_sent_is_as_large_for_many_units_as_for_few(tmp_path, process):
    sent = {name: {} for name in UNIT_BYTES}
    units = {}
    for name, unit_bytes in UNIT_BYTES.items():

        def weighed(function, items, *, into=sent[name], **options):
            shared, parts = pickle.dumps(function), [pickle.dumps(item) for item in items]
            into[function.func.__name__] = len(shared) + max(map(len, parts))
            return serially(pickle.loads(shared), list(map(pickle.loads, parts)), **options)

        (tmp_path / name / "corpus").mkdir(parents=True)
        (tmp_path / name / "corpus" / "names.txt").write_text(small_text(400))
        recipe = small_recipe(
            tmp_path / name, corpus={"unit_bytes": unit_bytes}, noise={"epochs": 1, "process": {"type": process}}
        )
        plan = plan_corpus(recipe, LocalStore(tmp_path / name / "storage"))
        units[name] = Preprocessing(plan, weighed).run().units
        assert verify(plan, weighed, lambda *told: None) == []
    assert units["all"] > 20 * units["few"]
    for task in ("_draw_noise", "verify_shard"):
        assert sent["all"][task] < sent["few"][task] + 50, task
