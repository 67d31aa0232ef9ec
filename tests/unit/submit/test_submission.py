"""What is refused before a cluster is asked, and what a job is called by."""

import asyncio
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from ray.dashboard.modules.job.pydantic_models import JobDetails
from s3_server import s3_server

from dllm_core.checkpoints.run_dir import RunDir
from dllm_core.errors import ConfigError, DataError
from dllm_core.storage.store import open_store
from workflows.cli_cluster import jobs as jobs_verb
from workflows.console import Console
from workflows.recipe import load_recipe
from workflows.submit.flow import Submission, _result, jobs, prepare, root_of, submit
from workflows.submit.server import JobServer, checked_address
from workflows.verb import EndedError

ROOT = Path(__file__).parents[3]
QUICKSTART = str(ROOT / "workflows/recipes/quickstart.yaml")
S3 = "storage.root=s3://bucket/runs"


@pytest.mark.parametrize(
    ("given", "url"),
    [
        ("127.0.0.1:8265", "http://127.0.0.1:8265"),
        ("https://head/", "https://head"),
        ("http://[::1]:8265", "http://[::1]:8265"),
    ],
)
def test_addresses(given, url):
    assert checked_address(given) == url


@pytest.mark.parametrize("given", ["", "ray://head:10001", "http://", "head:port", "http://he ad:1", "http://h:99999"])
def test_what_is_no_address(given):
    with pytest.raises(ConfigError, match="--address"):
        checked_address(given)


def test_a_storage_root_stands_alone_and_nothing_else(tmp_path):
    assert root_of(None, [])[1] == "dllm-runs"
    assert root_of("storage.root=~/x", []) == (None, "~/x")
    assert root_of(QUICKSTART, [f"storage.root={tmp_path}", "serve.port=9"])[1] == str(tmp_path)
    for words, line in [
        (["serve.port=9"], "serve: is a recipe's, and none is named"),
        (["storage.root=x", "serve.port=9"], "serve: is a recipe's, and none is named"),
        (["storage.root="], "storage.root: must be a valid string"),
        (["storage.rot=x"], "storage.rot: unknown name: did you mean 'root'"),
    ]:
        with pytest.raises(ConfigError) as caught:
            root_of(words[0], words[1:])
        assert str(caught.value).startswith(line)


def test_nobody_there_is_a_line(monkeypatch):
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:6379")
    with pytest.raises(DataError, match=r"--address: nobody answers .*127\.0\.0\.1:9'") as caught:
        JobServer("http://127.0.0.1:9")
    assert caught.value.exit_code == 3


@pytest.mark.parametrize(
    ("asked", "line"),
    [
        (Submission(QUICKSTART), r"storage\.root: is a folder of this machine alone, got 'dllm-runs'"),
        (Submission(QUICKSTART, ("storage.root=runs",)), r"storage\.root.*'runs'"),
        (Submission(QUICKSTART, (S3,), verb="bench"), r"--verb.*'bench'"),
        (Submission(QUICKSTART, (S3, "train.step=1")), r"train\.step: unknown name: did you mean 'steps'"),
        (Submission(QUICKSTART, (S3,), environment=("DLLM_NOT_SET_HERE",)), r"--env: is not set here"),
        (Submission(QUICKSTART, (S3,), environment=("A B=1",)), r"--env"),
        (Submission(QUICKSTART, (S3,), placement=Path("nowhere.yaml")), r"--placement: cannot be read"),
        (Submission("nowhere.yaml", (S3,)), r"nowhere\.yaml: no such recipe"),
    ],
)
def test_mistakes_are_refused_without_a_cluster(asked, line):
    with pytest.raises(ConfigError, match=line):
        prepare(asked)


def test_a_placement_file_is_gone_over_by_the_command_line():
    job = prepare(
        Submission(QUICKSTART, (S3, "placement.train.workers=8"), placement=ROOT / "deploy/cluster/placement.yaml")
    )
    [train] = [need for need in job.needs if need.stage == "train"]
    assert (train.at_once, train.demand.gpus, train.demand.labels) == (8, 1, {"dllm-stage": "train"})
    assert job.entrypoint == "python -m workflows run recipe.yaml"


def test_a_wrong_placement_file_is_refused_by_its_place(tmp_path):
    path = tmp_path / "p.yaml"
    path.write_text("train: {worker: 2}")
    with pytest.raises(ConfigError, match=r"placement\.train\.worker: unknown name"):
        prepare(Submission(QUICKSTART, (S3,), placement=path))


def test_the_fingerprint_follows_all_that_a_job_is_and_nothing_else():
    one = prepare(Submission(QUICKSTART, (S3,)))
    assert prepare(Submission(QUICKSTART, (S3,))).fingerprint == one.fingerprint
    others = [
        prepare(Submission(QUICKSTART, (S3, "train.steps=5"))),
        prepare(Submission(QUICKSTART, (S3, "placement.train.workers=4"))),
        prepare(Submission(QUICKSTART, (S3,), verb="train")),
        prepare(Submission(QUICKSTART, (S3,), environment=("A=1",))),
        prepare(Submission(QUICKSTART, (S3,), include=(ROOT / "Makefile",))),
    ]
    assert len({one.fingerprint, *(job.fingerprint for job in others)}) == len(others) + 1
    # The same run elsewhere or on more nodes is the same run, at which there is one job at a time.
    assert others[1].run == one.run == others[2].run
    assert others[0].run != one.run


def written_run(root: Path, *overrides: str) -> str:
    """The folder of a run of the quickstart's, with the recipe that its driver keeps there."""
    recipe = load_recipe(Path(QUICKSTART), [f"storage.root={root}", *overrides])
    folder = root / "runs" / f"{recipe.name}-0123456789ab"
    folder.mkdir(parents=True)
    (folder / "recipe.yaml").write_text(recipe.to_yaml())
    return str(folder)


def test_a_run_is_the_same_by_its_recipe_and_by_its_folder(tmp_path):
    root = tmp_path / "root"
    folder = written_run(root, "train.steps=7")
    asked = Submission(QUICKSTART, (f"storage.root={root}/", "train.steps=7"), "train")
    run = prepare(asked).run
    assert prepare(Submission(folder, (), "train")).run == run
    assert prepare(Submission(f"{folder}/", ("evaluate.draws=3", "corpus.path=/moved"))).run == run
    (tmp_path / "link").symlink_to(root)
    assert prepare(Submission(QUICKSTART, (f"storage.root={tmp_path}/link", "train.steps=7"))).run == run


def test_a_run_on_s3_is_the_same_by_its_recipe_and_by_its_folder(tmp_path):
    with s3_server(tmp_path) as server:
        root = f"s3://{server.new_bucket()}/lab"
        recipe = load_recipe(Path(QUICKSTART), [f"storage.root={root}/"])
        run = RunDir(open_store("root", root), f"{recipe.name}-0123456789ab")
        run.store.put(run.key("recipe.yaml"), recipe.to_yaml().encode())
        assert prepare(Submission(run.url)).run == prepare(Submission(QUICKSTART, (f"storage.root={root}/",))).run


def test_other_texts_other_names_and_other_roots_are_other_runs():
    text = ("corpus.type=text", "corpus.path=s3://bucket/a")
    mixture = 'corpus={"type": "mixture", "sources": [{"type": "text", "path": "s3://bucket/%s"}]}'
    jobs = [
        prepare(Submission(QUICKSTART, overrides))
        for overrides in [
            (S3, *text),
            (S3, *text, "corpus.path=s3://bucket/b"),
            (S3, *text, "name=other"),
            ("storage.root=s3://bucket/others", *text),
            (S3, mixture % "a"),
            (S3, mixture % "b"),
        ]
    ]
    assert len({job.run for job in jobs}) == len(jobs)


class FakeServer:
    """A job server that takes all and runs nothing. ended: the status of what is followed."""

    address = "http://head"

    def __init__(self, ended: str = "SUCCEEDED") -> None:
        self.known, self.ended = [], ended

    def nodes(self):
        return [{"resources_total": {"CPU": 64.0}, "labels": {}}]

    def usage(self):
        return {}

    def jobs(self):
        return list(self.known)

    def submit(self, name, entrypoint, package, environment, metadata):
        assert name not in {job.submission_id for job in self.known}
        job = SimpleNamespace(
            submission_id=name, status="RUNNING", driver_exit_code=None, metadata=metadata, message=""
        )
        self.known.append(job)

    def follow(self, name, write):
        [job] = [job for job in self.known if job.submission_id == name]
        job.status = self.ended
        return job


def sent(server: FakeServer, *overrides: str, target: str = QUICKSTART, detach: bool = False):
    asked = Submission(target, overrides, "train")
    return submit(asked, server, Console("json"), detach=detach, refuse_busy=False)


@pytest.mark.parametrize("ended", ["SUCCEEDED", "FAILED", "STOPPED"])
def test_a_job_that_has_ended_runs_anew_and_one_that_has_not_is_followed(ended):
    server = FakeServer(ended)
    first = sent(server, S3, detach=True)["job"]
    assert first.endswith("-1")
    assert sent(server, S3, detach=True)["job"] == first
    followed = sent(server, S3)
    assert (followed["job"], followed["status"]) == (first, ended)
    again = sent(server, S3)["job"]
    assert again == f"{first.removesuffix('-1')}-2"
    assert [job.submission_id for job in server.known] == [first, again]
    del server.known[0]  # `ray job delete`
    assert sent(server, S3)["job"] == f"{first.removesuffix('-1')}-3"


def test_a_job_that_is_there_though_sending_it_failed_is_followed():
    """An answer was lost, or the same command was given elsewhere at the same time."""
    server = FakeServer()
    accept = server.submit

    def submit_and_fail(*asked):
        accept(*asked)
        raise DataError("--address", "does not answer as it should (already exists)")

    server.submit = submit_and_fail
    assert sent(server, S3)["status"] == "SUCCEEDED"
    assert len(server.known) == 1
    server.submit = refuse
    with pytest.raises(DataError, match="cannot be sent"):
        sent(server, S3)


def test_ctrl_c_while_a_job_is_followed_stays_one_where_nobody_reads(monkeypatch):
    server = FakeServer()

    def follow(name, write):
        monkeypatch.setattr("sys.stderr", SimpleNamespace(write=lambda text: write_to_nobody()))
        raise KeyboardInterrupt

    def write_to_nobody():
        raise BrokenPipeError("closed")

    server.follow = follow
    with pytest.raises(KeyboardInterrupt):
        sent(server, S3)


def refuse(*_):
    raise DataError("--address", "cannot be sent")


@pytest.mark.parametrize("status", ["STOPPED", "RUNNING"])
def test_a_job_that_did_not_end_when_it_was_told_to_is_not_said_to_have_ended(status, capsys):
    job = SimpleNamespace(submission_id="x-1", status=status, driver_exit_code=None)
    server = SimpleNamespace(address="http://head", stop=lambda name: True, wait=lambda name, within_s: job)
    if status == "STOPPED":
        assert jobs("stop", "x-1", server, Console("text"))["exit_code"] == 0
        assert "x-1 has ended" in capsys.readouterr().out
    else:
        with pytest.raises(DataError, match="job: was told to end, and is RUNNING still, got 'x-1'"):
            jobs("stop", "x-1", server, Console("text"))


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("Request failed with status code 404: No job", "job: the cluster does not know it, got 'a-4049-1'"),
        (
            "Request failed with status code 500: a-4049-1",
            "as it should .Request failed with status code 500: a-4049-1",
        ),
        (
            "Request failed with status code 400: Traceback (most recent call last):\n  x\nValueError: no",
            "ValueError: no",
        ),
    ],
)
def test_what_a_server_refuses_is_told_by_what_it_says(text, line):
    server = JobServer.__new__(JobServer)
    server.address = "http://head"

    def ask():
        raise RuntimeError(text)

    with pytest.raises(DataError, match=line):
        server._asked(ask, "a-4049-1")


def test_a_second_job_at_a_run_is_refused_by_whatever_it_is_named(tmp_path):
    root = f"storage.root={tmp_path}"
    server, folder = FakeServer(), written_run(tmp_path)
    first = sent(server, root, detach=True)["job"]
    for target, overrides in ((folder, ()), (QUICKSTART, (root, "placement.train.workers=1"))):
        with pytest.raises(DataError, match=f"another job is at this run, got '{first}'"):
            sent(server, *overrides, target=target)
    other = sent(server, root, "corpus.type=text", "corpus.path=s3://bucket/other", detach=True)
    assert other["status"] == "RUNNING"
    sent(server, root)
    assert sent(server, target=folder)["status"] == "SUCCEEDED"


def test_the_recipe_that_is_sent_is_the_resolved_one():
    import io
    import zipfile

    job = prepare(Submission(QUICKSTART, (S3, "train.steps=7")))
    sent = yaml.safe_load(zipfile.ZipFile(io.BytesIO(job.package.data)).read("recipe.yaml"))
    assert sent["train"]["steps"] == 7
    assert sent["storage"]["root"] == "s3://bucket/runs"


def test_a_dry_run_says_what_would_be_sent(capsys):
    told = submit(Submission(QUICKSTART, (S3,)), None, Console("json"), detach=False, refuse_busy=False)
    assert told["entrypoint"].endswith("run recipe.yaml")
    assert {need["stage"] for need in told["needs"]} == {"preprocess", "train", "evaluate", "serve"}
    assert told["bytes"] < 1 << 20


def test_what_stays_here_is_named_also_where_the_job_is_sent(tmp_path, capsys):
    (tmp_path / "rows.parquet").write_text("x")
    for server in (None, FakeServer()):
        submit(
            Submission(QUICKSTART, (S3,), include=(tmp_path,)), server, Console("text"), detach=True, refuse_busy=False
        )
        assert f"left out as data, secrets or links: {tmp_path.name}/rows.parquet" in capsys.readouterr().out


def test_a_dry_run_too_reads_what_nodes_there_are(tmp_path):
    asked = Submission(QUICKSTART, (S3,), nodes=tmp_path / "none.yaml")
    with pytest.raises(ConfigError, match=r"^--nodes: cannot be read"):
        submit(asked, None, Console("json"), detach=False, refuse_busy=False)


@pytest.mark.parametrize(("meanwhile", "silent"), [("RUNNING", 1), ("SUCCEEDED", 1), ("SUCCEEDED", 99)])
def test_a_connection_that_is_gone_without_a_word_is_made_anew(monkeypatch, meanwhile, silent):
    """As of a head that lost its power, or a tunnel whose machine slept: nothing comes, and nothing ends it.

    A job that ended meanwhile has last lines to tell, and once more is all that is tried for them.
    """
    client, connections = SimpleNamespace(status="RUNNING"), []

    async def tail(name):
        connections.append(name)
        yield "one\ntwo\n"
        if len(connections) <= silent:
            client.status = meanwhile
            await asyncio.sleep(10)
            pytest.fail("it was waited for")
        yield "three\n"
        client.status = "SUCCEEDED"

    client.tail_job_logs, client.get_job_info = tail, lambda name: SimpleNamespace(status=client.status)
    monkeypatch.setattr("workflows.submit.server._SILENCE_S", 0.05)
    monkeypatch.setattr("workflows.submit.server._POLL_S", 0.0)
    server = JobServer.__new__(JobServer)
    server.address, server._client, written = "http://head", client, []
    assert server.follow("x-1", written.append).status == "SUCCEEDED"
    assert ("".join(written), len(connections)) == ("one\ntwo\n" + "three\n" * (silent == 1), 2)


@pytest.mark.parametrize("said", [{}, [1], {"data": {"result": []}}, {"data": 1}])
@pytest.mark.parametrize("question", ["version", "nodes", "usage", "jobs"])
def test_what_is_json_and_not_ray_s_is_a_line(question, said):
    """As of a proxy, or of another server at that port."""
    answer = SimpleNamespace(status_code=200, json=lambda: said)
    server = JobServer.__new__(JobServer)
    server.address = "http://head"
    server._client = SimpleNamespace(_do_request=lambda *_: answer, list_jobs=lambda: [JobDetails(**said)])
    if (question, said) == ("usage", {"data": {"result": []}}):
        assert server.usage() == {}  # as before the autoscaler has told
        return
    with pytest.raises(DataError, match=r"--address: answers what Ray does not .*dashboard of a Ray"):
        getattr(server, question)()


def test_an_output_that_is_closed_is_not_laid_to_the_server(monkeypatch):
    """As of `dllm jobs logs NAME | head -1`: nothing is tried again."""
    attempts = []

    async def tail(name):
        attempts.append(name)
        yield "one\n"

    def write(text):
        raise BrokenPipeError("closed")

    monkeypatch.setattr("workflows.submit.server._PATIENCE_S", 0.0)
    monkeypatch.setattr("workflows.submit.server._RETRY_S", 0.0)
    server = JobServer.__new__(JobServer)
    server.address, server._client = "http://head", SimpleNamespace(tail_job_logs=tail)
    with pytest.raises(BrokenPipeError, match="closed"):
        server.follow("x-1", write)
    assert len(attempts) == 1


def test_what_all_nodes_must_see_is_named(tmp_path):
    assert prepare(Submission(QUICKSTART, (S3,))).paths == ()
    (tmp_path / "corpus").mkdir()
    job = prepare(Submission(QUICKSTART, (f"storage.root={tmp_path}", f"corpus.path={tmp_path}/corpus")))
    assert job.paths == (str(tmp_path), f"{tmp_path}/corpus")


class Ended:
    submission_id = "x-1"

    def __init__(self, status, driver_exit_code):
        self.status, self.driver_exit_code = status, driver_exit_code


@pytest.mark.parametrize(
    ("job", "code"),
    [
        (Ended("SUCCEEDED", 0), 0),
        (Ended("FAILED", 5), 5),
        (Ended("FAILED", None), 3),
        (Ended("FAILED", -9), 137),
        (Ended("STOPPED", None), 143),
        (Ended("STOPPED", 4), 4),
        (Ended("RUNNING", None), None),
    ],
)
def test_the_exit_code_is_the_job_s(job, code):
    assert _result(job)["exit_code"] == code


def test_the_status_of_a_job_tells_its_exit_code_and_ends_well(monkeypatch, capsys):
    job = SimpleNamespace(submission_id="x-1", status="FAILED", driver_exit_code=-9, message="", entrypoint="x")
    job.start_time = job.end_time = 1000
    server = SimpleNamespace(job=lambda name: job, jobs=lambda: [job], follow=lambda name, write: job)
    monkeypatch.setattr("workflows.submit.server.JobServer", lambda address, ca_file: server)
    jobs_verb("status", "x-1", address="http://head", output="json")
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["exit_code"] == 137
    jobs_verb("list", address="http://head", output="json")
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["jobs"][0]["exit_code"] == 137
    with pytest.raises(EndedError) as caught:
        jobs_verb("logs", "x-1", address="http://head", output="json")
    assert caught.value.code == 137
