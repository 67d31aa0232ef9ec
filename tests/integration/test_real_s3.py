"""What is made on S3 is, byte for byte, what is made in a folder: on a real server, and while a tenth of requests fail.

`rados` is Ceph's gateway, `moto` a server in this process.
"""

import gzip
import itertools
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from email.message import Message
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import small_recipe, small_text
from s3_faults import LOST, QUICK, RESET, at_random, faulty_s3, first
from s3_server import new_bucket, s3_environment, s3_server

from dllm_core.data.manifest import CorpusManifest
from dllm_core.errors import DataError
from dllm_core.storage import s3
from dllm_core.storage.s3 import S3Store
from dllm_core.storage.store import LocalStore, Store, open_store, sha256
from workflows.fan_out import serially
from workflows.preprocess.flow import Preprocessing, plan_corpus
from workflows.recipe import Recipe

ONE_OF_MANY = """
import sys
from dllm_core.storage.store import open_store
store, mine = open_store("", sys.argv[1]), sys.argv[2].encode()
assert not store.exists("lock")
print("ready", flush=True)
sys.stdin.readline()
print(store.put_if_absent("lock", mine))
"""


@dataclass(frozen=True)
class Server:
    """A server that the environment names, and the sources of a corpus on it."""

    endpoint: str
    sources: str


def write_sources(store: Store, folder: str) -> None:
    """Text in byte ranges, compressed JSON lines, and a table in two row groups; one document is there twice."""
    blocks = small_text(60).split("\n\n")
    store.put(f"{folder}/text/names.txt", "\n\n".join(blocks[:30]).encode())
    lines = [json.dumps({"text": block}) for block in (*blocks[30:45], blocks[0])]
    store.put(f"{folder}/lines/a.jsonl.gz", gzip.compress("\n".join(lines).encode(), mtime=0))
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table({"text": blocks[45:]}), sink, row_group_size=8)
    store.put(f"{folder}/table/a.parquet", sink.getvalue().to_pybytes())


def recipe_over(sources: str, root: str) -> Recipe:
    """Every kind of task: signatures, decisions, a tokenizer, tokens, two epochs of noise."""
    values = small_recipe(Path("unused")).model_dump(mode="json")
    values["storage"]["root"] = root
    values["corpus"] = {
        "type": "mixture",
        "unit_bytes": 1024,
        "heldout_fraction": 0.1,
        "dedup": {},
        "sources": [
            {"type": "text", "path": f"{sources}/text", "document": "paragraph"},
            {"type": "jsonl", "path": f"{sources}/lines"},
            {"type": "parquet", "path": f"{sources}/table"},
        ],
    }
    return Recipe.checked(values)


def preprocess(recipe: Recipe) -> tuple[CorpusManifest, int]:
    """The manifest, and the number of tasks that ran."""
    run = Preprocessing(plan_corpus(recipe, open_store("storage.root", recipe.storage.root)), serially)
    return run.run(), run.ran


def objects(root: str) -> dict[str, bytes]:
    """Every object that is to be seen below the folder of the one corpus, by its key there."""
    store = open_store("storage.root", root)
    return {item.key.split("/", 2)[2]: store.read(item.key) for item in store.list("corpora")}


@pytest.fixture(scope="module", params=["moto", "rados"])
def server(request, tmp_path_factory):
    top = tmp_path_factory.mktemp("cache")
    if request.param == "rados":
        gateway = request.getfixturevalue("rados")
        running = s3_environment(gateway.endpoint, top, gateway.access_key, gateway.secret_key)
    else:
        running = s3_server(top)
    with running:
        store = S3Store(new_bucket(), "")
        write_sources(store, "sources")
        yield Server(os.environ["AWS_ENDPOINT_URL"], f"{store.url}/sources")


@pytest.fixture(scope="module")
def expected(server, tmp_path_factory) -> dict[str, bytes]:
    """The objects of a run that reads the same sources and writes into a folder."""
    root = str(tmp_path_factory.mktemp("folder"))
    preprocess(recipe_over(server.sources, root))
    return objects(root)


def seeds(*quick: tuple[str, int]) -> list:
    """These always, and ten more on each server where time does not count."""
    long = [(name, seed) for name in ("moto", "rados") for seed in range(10, 20)]
    return [*quick, *(pytest.param(*case, marks=pytest.mark.long) for case in long)]


def test_a_corpus_on_s3_is_byte_for_byte_the_one_in_a_folder_and_is_made_once(server, expected, tmp_path):
    recipe = recipe_over(server.sources, f"s3://{new_bucket()}/root")
    manifest, ran = preprocess(recipe)
    assert objects(recipe.storage.root) == expected
    assert ran == manifest.units * (1 + 1 + 2)  # signatures, tokens, two epochs of noise
    assert preprocess(recipe) == (manifest, 0)
    assert objects(recipe.storage.root) == expected

    write_sources(LocalStore(tmp_path), "sources")
    at_home, _ = preprocess(recipe_over(str(tmp_path / "sources"), str(tmp_path / "root")))
    named = {"fingerprint": manifest.fingerprint, "source": manifest.source}  # paths; times instead of ETags
    assert at_home.model_copy(update=named) == manifest
    kept = objects(str(tmp_path / "root"))
    assert kept.keys() == expected.keys()
    assert [key for key in kept if kept[key] != expected[key]] == ["manifest.json"]


@pytest.mark.parametrize(("server", "seed"), seeds(("moto", 1), ("rados", 2)), indirect=["server"])
def test_a_tenth_of_all_requests_fails_and_the_bytes_are_the_same(server, expected, seed):
    recipe = recipe_over(server.sources, f"s3://{new_bucket()}/root")
    with faulty_s3(server.endpoint, at_random(seed, share=0.1), read_seconds=0.5) as faults:
        preprocess(recipe)
    assert objects(recipe.storage.root) == expected
    assert faults.injected.total() > 0.05 * faults.requests > 5


@pytest.mark.parametrize(("server", "seed"), seeds(("moto", 1)), indirect=["server"])
def test_a_run_that_gives_up_says_so_in_one_line_leaves_whole_objects_and_the_next_one_goes_on(
    server, expected, seed, monkeypatch
):
    monkeypatch.setattr(s3, "_ATTEMPTS", 2)
    recipe, errors, is_done = recipe_over(server.sources, f"s3://{new_bucket()}/root"), [], False
    drawn, number, written = at_random(seed, share=0.15, kinds=QUICK), itertools.count(), set()

    def choose(method: str, path: str, headers: Message) -> str | None:
        if method == "PUT":
            written.add((path.split("/", 5)[5], headers["X-Amz-Content-SHA256"]))
        return RESET if next(number) in {60, 61, 62} else drawn(method, path, headers)  # so one run gives up for sure

    while not is_done:
        with faulty_s3(server.endpoint, choose):
            try:
                preprocess(recipe)
                is_done = True
            except DataError as error:
                errors.append(str(error))
        seen = objects(recipe.storage.root)
        assert seen.items() <= expected.items()
        assert "manifest.json" not in seen or seen.keys() == expected.keys()  # its answer may be lost, and so the run
        assert len(errors) < 200
    assert seen == expected
    assert written == {(key, sha256(data)) for key, data in expected.items()}  # no object in two steps
    assert errors
    assert all("s3://" in line and "\n" not in line for line in errors)


@pytest.mark.parametrize("server", ["rados"], indirect=True)
def test_a_listing_goes_on_over_a_thousand_objects(server):
    store = S3Store(new_bucket(), "root")
    keys = [f"many/{i:04d}" for i in range(1001)]
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda key: store.put(key, b""), keys))
    assert [item.key for item in store.list("many")] == keys


@pytest.mark.parametrize("server", ["rados"], indirect=True)
def test_a_range_of_a_large_file_may_cross_the_parts_it_went_up_in(server, tmp_path):
    store, path = S3Store(new_bucket(), "root"), tmp_path / "large"
    size, part = 2 * s3._PART_BYTES + 12345, s3._PART_BYTES
    path.write_bytes(os.urandom(size))
    store.put_file("large", path)
    whole = path.read_bytes()
    assert store.stat("large").size == size
    for start, stop in (
        (0, 1),
        (part - 7, part + 7),
        (part - 1, 2 * part + 1),
        (size - 1, size),
        (size - 3, size + 99),
    ):
        assert store.read("large", start, stop) == whole[start:stop]
    assert store.fetch("large").read_bytes() == whole


@pytest.mark.parametrize("server", ["rados"], indirect=True)
def test_an_upload_whose_last_answer_is_lost_is_known_to_have_ended(server, tmp_path):
    store, path = S3Store(new_bucket(), "root"), tmp_path / "large"
    path.write_bytes(os.urandom(s3._PART_BYTES + 1))
    with faulty_s3(server.endpoint, first(1, LOST, "POST", "uploadId"), read_seconds=30) as faults:
        store.put_file("large", path)
        assert faults.injected[LOST] == 1
    assert store.read("large") == path.read_bytes()


@pytest.mark.long
def test_of_several_processes_exactly_one_wins(server):
    store = S3Store(new_bucket(), "root")
    command = [sys.executable, "-c", ONE_OF_MANY, store.url]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    writers = [subprocess.Popen([*command, str(i)], **pipes) for i in range(8)]
    for writer in writers:
        assert writer.stdout.readline() == "ready\n"
    for writer in writers:
        writer.stdin.write("go\n")
        writer.stdin.flush()
    answers = [writer.communicate()[0] for writer in writers]
    assert answers.count("True\n") == 1
    assert answers.count("False\n") == 7
    assert store.read("lock") == b"%d" % answers.index("True\n")


def test_a_wrong_secret_is_refused_in_one_line_and_at_once(rados, tmp_path):
    with (
        s3_environment(rados.endpoint, tmp_path, rados.access_key, "wrong"),
        faulty_s3(rados.endpoint, lambda *request: None) as counted,
    ):
        with pytest.raises(DataError, match=r"storage\.root: put_object failed \(SignatureDoesNotMatch\)") as caught:
            S3Store("any-bucket", "").check_writable("storage.root")
        assert counted.requests == 1
    assert "\n" not in str(caught.value)
    assert caught.value.exit_code == 3
