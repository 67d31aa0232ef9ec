"""Whether a cluster has room for a verb's stages: against brute force, and what is said where it has not."""

import os
import signal
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dllm_core.errors import ConfigError, DataError
from workflows.env import _check_answers, actor_options, ray_cluster
from workflows.interrupts import Interrupted
from workflows.placement import Demand, PlacementConfig
from workflows.submit.demand import Need, NodeGroup, busy, check_room, matches, needs, startable

ROOT = Path(__file__).parents[3]


@given(
    st.dictionaries(st.sampled_from(["CPU", "GPU", "x"]), st.integers(0, 9)),
    st.integers(1, 4),
    st.integers(1, 4),
    st.integers(0, 3),
)
def test_room_is_what_filling_the_nodes_one_by_one_finds(resources, count, cpus, gpus):
    demand = Demand(cpus=cpus, gpus=gpus)
    left, placed = dict(resources), 0
    while all(left.get(name, 0) >= amount for name, amount in demand.amounts.items()):
        placed += 1
        left = {name: left.get(name, 0) - demand.amounts.get(name, 0) for name in {*left, *demand.amounts}}
    assert NodeGroup(resources, {}, count).room(demand) == count * placed


def test_tenths_fill_a_core():
    assert NodeGroup({"CPU": 1.0}, {}).room(Demand(cpus=0.1)) == 10


@pytest.mark.parametrize(("gpus", "room"), [(0.3, 24), (0.4, 16), (0.5, 16), (0.1, 80), (1, 8), (3, 2)])
def test_a_part_of_a_gpu_is_one_of_a_single_gpu(gpus, room):
    """Ray holds no five of 0.4 on two GPUs: each has 0.2 left, which is of no use."""
    assert NodeGroup({"CPU": 99.0, "GPU": 8.0}, {}).room(Demand(gpus=gpus)) == room


@pytest.mark.parametrize("name", ["train.gpus_per_worker", "evaluate.gpus_per_worker", "serve.gpus_per_replica"])
def test_gpus_above_one_are_whole_as_ray_wants_them(name):
    stage, field = name.split(".")
    for gpus in (0, 0.25, 1, 2):
        PlacementConfig.checked({stage: {field: gpus}}, "placement")
    with pytest.raises(ConfigError, match=rf"placement\.{stage}\.{field}: must be whole above 1"):
        PlacementConfig.checked({stage: {field: 1.5}}, "placement")


def test_memory_is_counted_where_it_is_asked_for_and_told_in_gibibytes():
    node = NodeGroup({"CPU": 8.0, "memory": 4.0 * 2**30}, {})
    assert node.room(Demand(cpus=1)) == 8
    assert node.room(Demand(cpus=1, memory_gib=1.5)) == 2
    placement = PlacementConfig.checked({"train": {"workers": 3, "memory_gib": 1.5}})
    [need] = [need for need in needs("train", placement) if need.stage == "train"]
    with pytest.raises(DataError, match=r"placement\.train: needs 3 × CPU=1 memory=1\.5GiB; there is room for 2"):
        check_room([need], [node])
    [line] = busy([need], {"memory": (2.0 * 2**30, 4.0 * 2**30)})
    assert line == "train needs 4.5GiB memory, of 4GiB 2GiB are in use"
    later = startable(ROOT / "cluster.yaml")  # says no memory: an autoscaler would start nothing for who asks for it
    for gib, room in ((0, 256), (1.5, 0)):
        asked = Demand(memory_gib=gib, labels={"dllm-stage": "preprocess"}, resources={"dllm-preprocess": 1})
        assert (sum(group.room(asked) for group in later) >= 256) is (room > 0)


def test_ray_is_asked_for_memory_of_a_cluster_and_not_of_a_machine_of_its_own(monkeypatch):
    demand = PlacementConfig.checked({"preprocess": {"memory_gib": 1.5}}).preprocess.demand
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    assert actor_options(demand) == {"num_cpus": 1, "num_gpus": 0}
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    assert actor_options(demand) == {"num_cpus": 1, "num_gpus": 0, "memory": 1.5 * 2**30}


@pytest.mark.parametrize(
    ("value", "wanted", "is_so"),
    [
        ("train", "train", True),
        ("serve", "train", False),
        (None, "train", False),
        ("train", "!train", False),
        (None, "!train", True),
        ("b", "in(a, b)", True),
        ("c", "in(a,b)", False),
        ("c", "!in(a,b)", True),
        (None, "!in(a,b)", True),
    ],
)
def test_labels_are_selected_as_ray_does(value, wanted, is_so):
    """The same table through Ray's own parser of selectors: each of these is one that it takes."""
    from ray._private.label_utils import validate_label_selector

    assert validate_label_selector({"dllm-stage": wanted.replace(" ", "")}) is None
    assert matches(value, wanted) is is_so


def test_a_training_s_workers_must_fit_together_and_tasks_queue():
    placement = PlacementConfig.checked({"preprocess": {"workers": 256}, "train": {"workers": 8, "gpus_per_worker": 1}})
    found = {(need.stage, need.at_once) for need in needs("train", placement)}
    assert found == {("preprocess", 1), ("train", 8)}
    nodes = [NodeGroup({"CPU": 64, "GPU": 4}, {}), NodeGroup({"CPU": 64, "GPU": 4}, {})]
    assert check_room(needs("train", placement), nodes) == []
    with pytest.raises(DataError, match=r"placement\.train: needs 8 × CPU=1 GPU=1; there is room for 4"):
        check_room(needs("train", placement), nodes[:1])


def test_what_an_autoscaler_may_start_counts_and_is_told():
    need = Need("train", 16, Demand(cpus=8, gpus=1, resources={"dllm-train": 1}, labels={"dllm-stage": "train"}))
    later = startable(ROOT / "cluster.yaml")
    assert check_room([need], [], later) == [need]
    assert sum(group.room(need.demand) for group in later) == 32
    with pytest.raises(DataError, match="there is room for 32"):
        check_room([Need("train", 33, need.demand)], [], later)


@pytest.mark.parametrize(("said", "room"), [("max_workers: 5\n", 5), ("max_workers: 99\n", 16), ("", 2)])
def test_a_cluster_s_own_bound_holds_for_each_kind_of_node(tmp_path, said, room):
    path = tmp_path / "c.yaml"
    kinds = "available_node_types: {head: {resources: {}}, train: {resources: {GPU: 1}, max_workers: 16}}\n"
    path.write_text(f"{said}head_node_type: head\n{kinds}")
    assert sum(group.room(Demand(cpus=0, gpus=1)) for group in startable(path)) == room


def test_a_cluster_s_own_bound_holds_for_all_kinds_of_nodes_together(tmp_path):
    """Else a training waits for ever for nodes that no autoscaler will start."""
    path = tmp_path / "c.yaml"
    kinds = "available_node_types: {h: {resources: {}}, a: {resources: {GPU: 1}, labels: }, b: {resources: {GPU: 4}}}"
    path.write_text(f"max_workers: 3\nhead_node_type: h\n{kinds}")
    later, gpu = startable(path), Demand(cpus=0, gpus=1)
    assert check_room([need := Need("train", 12, gpu)], [], later) == [need]  # three of b
    with pytest.raises(DataError, match="there is room for 12"):
        check_room([Need("train", 13, gpu)], [], later)
    with pytest.raises(DataError, match="there is room for 0"):
        check_room([Need("train", 1, Demand(labels={"a": "b"}))], [], later)


def test_a_full_cluster_is_told_by_what_is_missing():
    need = Need("train", 4, Demand(cpus=1, gpus=1))
    assert busy([need], {"CPU": (0, 8), "GPU": (2, 8)}) == []
    assert busy([need], {"CPU": (0, 8), "GPU": (6, 8)}) == ["train needs 4 GPU, of 8 6 are in use"]
    assert busy([need], {}) == []


@pytest.mark.parametrize("text", ["[", "a: 1", "available_node_types: {}", "- x"])
def test_a_file_that_is_no_launcher_s_is_refused(tmp_path, text):
    path = tmp_path / "c.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError):
        startable(path)


def test_a_private_cluster_is_asked_for_neither_labels_nor_resources(monkeypatch):
    from workflows.env import actor_options

    demand = Demand(cpus=2, gpus=1, resources={"dllm-train": 1}, labels={"dllm-stage": "train"})
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    assert actor_options(demand) == {"num_cpus": 2, "num_gpus": 1}
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    assert actor_options(demand) == {
        "num_cpus": 2,
        "num_gpus": 1,
        "resources": {"dllm-train": 1},
        "label_selector": {"dllm-stage": "train"},
    }


@pytest.mark.parametrize("known", ["nowhere", "in the home folder", "in the environment"])
def test_a_private_cluster_asks_the_home_folder_for_no_token(monkeypatch, tmp_path, known):
    """Ray writes one where it finds none, and a home folder may be read-only."""
    told = {}

    def init(**options):
        told.update(os.environ)
        raise RuntimeError("enough")

    for name in ("RAY_ADDRESS", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.setenv(name, "")  # put back afterwards, whatever is set below
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr("ray.init", init)
    if known == "in the home folder":
        (tmp_path / ".ray").mkdir()
        (tmp_path / ".ray" / "auth_token").write_text("theirs")
    elif known == "in the environment":
        monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(tmp_path / "token"))
    with pytest.raises(DataError, match="enough"), ray_cluster(1):
        pass
    assert (len(told.get("RAY_AUTH_TOKEN", "")) >= 32) == (known == "nowhere")
    assert told["RAY_task_oom_retries"] == "3"  # for ever otherwise, where a task needs more memory than there is


def test_a_sigterm_while_a_cluster_starts_ends_as_any_other(monkeypatch):
    """Ray's own handler, which stands until then, ends the process with 15 and without a word."""
    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setenv("RAY_AUTH_TOKEN", "ours")
    monkeypatch.setattr("ray._private.node.Node", lambda *_, **__: os.kill(os.getpid(), signal.SIGTERM))
    try:
        with pytest.raises(Interrupted), ray_cluster(1):
            pass
    finally:
        signal.signal(signal.SIGTERM, before)


@pytest.mark.parametrize("scheme", ["", "ray://"])
def test_an_address_of_ipv6_is_asked_where_it_is(scheme, monkeypatch):
    """Ray writes it in brackets, in which no resolver knows it."""
    asked = []
    monkeypatch.setattr(
        "socket.create_connection", lambda where, timeout: asked.append(where) or SimpleNamespace(close=int)
    )
    _check_answers(f"{scheme}[::1]:6379")
    assert asked == [("::1", 6379)]


@pytest.mark.parametrize("resources", [{"GPU": 1}, {"x": 0}, {"memory": 5}])
def test_custom_resources_are_custom(resources):
    with pytest.raises(ConfigError, match=r"placement\.train\.resources"):
        PlacementConfig.checked({"train": {"resources": resources}}, "placement")
