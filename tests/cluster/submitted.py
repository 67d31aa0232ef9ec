"""A small run that is submitted to a cluster, and the same in this process alone, to compare with."""

import contextlib
import itertools
import json
import socket
import ssl
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
from conftest import free_port, small_recipe, small_text
from ray_clusters import LoopbackCluster, Node
from starts import Prepared

from dllm_core.checkpoints.bundle import read_bundle
from dllm_core.checkpoints.run_dir import JsonLines, RunDir
from dllm_core.data.manifest import CorpusManifest, read_manifest
from dllm_core.decoding.engine import Engine
from dllm_core.decoding.request import Request
from dllm_core.storage.store import Store
from workflows.recipe import Recipe
from workflows.target import RECIPE_NAME

PLACEMENT = {
    stage: {"labels": {"dllm-stage": stage}, "resources": {f"dllm-{stage}": 1}} for stage in ("preprocess", "train")
}
PLACEMENT |= {"evaluate": PLACEMENT["train"], "serve": {"labels": {"dllm-stage": "serve"}}}
LOSS_WITHIN = 1e-3


def recipe_of(folder: Path, root: str, paragraphs: int = 120, **sections: Any) -> Recipe:
    """Of a run on two training nodes. root: storage, a folder that all nodes see, or s3://."""
    corpus = folder / "corpus"
    corpus.mkdir(parents=True, exist_ok=True)
    (corpus / "names.txt").write_text(small_text(paragraphs), encoding="utf-8")
    train = {"steps": 40, "checkpoint_every": 10, "zero_stage": 2, "log_every": 10, **sections.pop("train", {})}
    return small_recipe(
        folder,
        storage={"root": root},
        train=train,
        evaluate={"calibration": {"rows": 0}, "infill": {"rows": 0}},
        serve={"port": free_port(), "examples": [{"prompt": "RED "}]},
        placement=PLACEMENT,
        **sections,
    )


@dataclass
class Cli:
    """`dllm` as a user of the cluster calls it."""

    cluster: LoopbackCluster
    folder: Path

    def __call__(
        self, *words: str, address: str | None = None, timeout: float = 280, **environment: str
    ) -> subprocess.CompletedProcess[str]:
        begun = self.begin(*words, address=address, **environment)
        try:
            out, err = begun.communicate(timeout=timeout)
        except BaseException:
            begun.kill()
            raise
        return subprocess.CompletedProcess(begun.args, begun.returncode, out, err)

    def begin(self, *words: str, address: str | None = None, **environment: str) -> subprocess.Popen[str]:
        """The command, while it goes on."""
        return subprocess.Popen(
            [sys.executable, "-m", "workflows", *words, "--address", address or self.cluster.dashboard],
            cwd=self.folder,
            env={**self.cluster.env, **environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def written(self, recipe: Recipe, name: str = "small.yaml") -> str:
        """A file with the recipe; its path."""
        path = self.folder / name
        path.write_text(recipe.to_yaml(), encoding="utf-8")
        return str(path)

    def told(self, *words: str, **options: Any) -> dict[str, Any]:
        """The JSON object of a verb that ends well."""
        done = self(*words, "--output", "json", **options)
        assert done.returncode == 0, done.stderr[-3000:]
        found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
        return found


def run_of(store: Store, name: str) -> RunDir:
    """The one run of that name."""
    [key] = [item.key for item in store.list("runs") if item.key.endswith(f"/{RECIPE_NAME}")]
    run = RunDir(store, key.split("/")[1])
    assert run.name.startswith(name)
    return run


def alone(recipe: Recipe, folder: Path) -> Prepared:
    """The same run, made and trained in this process: one rank, no Ray."""
    values = recipe.model_dump(mode="json")
    values["storage"]["root"] = str(folder / "alone")
    values["placement"] = {}
    prepared = Prepared(values)
    prepared.trained()
    return prepared


def shards(manifest: CorpusManifest) -> Iterator[tuple[str, str]]:
    for shard in itertools.chain(manifest.train.shards, manifest.heldout.shards, *manifest.noise_epochs):
        yield shard.key, shard.sha256


def check_equal(run: RunDir, other: Prepared) -> None:
    """Bitwise the data, within 1e-3 the losses, the same text."""
    bundle = read_bundle(run)
    assert bundle.manifest.lineage.corpus == other.corpus
    assert list(shards(read_manifest(run.store, other.corpus))) == list(shards(other.manifest))
    assert run.name == other.run.name
    ours, theirs = (JsonLines(part, "metrics.jsonl").read() for part in (run, other.run))
    steps = [[record["step"] for record in records] for records in (ours, theirs)]
    assert steps[0] == steps[1], steps
    for mine, single in zip(ours, theirs, strict=True):
        assert abs(mine["loss"] - single["loss"]) <= LOSS_WITHIN
    assert json.loads(run.store.read(run.key("run.json")))["workers"] == 2
    prompts = [tuple(bundle.tokenizer().encode(text)) for text in ("RED ", "HEAVY", "BLUE STAR 7\n")]
    texts = []
    for part in (bundle, read_bundle(other.run)):
        requests = [Request(prompt, other.recipe.decode, seed=1) for prompt in prompts]
        texts.append([answer.tokens for answer in Engine(part).generate(requests)])
    assert texts[0] == texts[1]


def nodes_with(cluster: LoopbackCluster, stage: str, what: str) -> list[Node]:
    """The stage's living nodes on which a process with `what` in its command line runs."""
    found = []
    for node in cluster.started:
        if node.kind is not None and node.kind.stage == stage and not node.is_killed:
            with contextlib.suppress(psutil.Error):
                if any(what in " ".join(process.cmdline()) for process in node.processes()):
                    found.append(node)
    return found


class Relay:
    """A way to a port of loopback that can be cut: connections that stand are reset, and new ones are let through.

    tls: what it speaks to who comes; behind it all is plain.
    """

    def __init__(self, to: int, tls: ssl.SSLContext | None = None) -> None:
        self._to, self._tls, self._open = to, tls, list[socket.socket]()
        self._listening = socket.create_server(("127.0.0.1", 0))
        self.port = int(self._listening.getsockname()[1])
        self.cuts = 0
        threading.Thread(target=self._accept, daemon=True).start()

    def cut(self) -> None:
        standing, self._open = self._open, []
        for end in standing:
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
            end.close()
        self.cuts += bool(standing)

    def close(self) -> None:
        self._listening.close()
        self.cut()

    def _accept(self) -> None:
        while True:
            try:
                here, _ = self._listening.accept()
            except OSError:
                return
            if self._tls is not None:
                try:
                    here = self._tls.wrap_socket(here, server_side=True)
                except (ssl.SSLError, OSError):  # who speaks no TLS, or trusts another certificate
                    here.close()
                    continue
            there = socket.create_connection(("127.0.0.1", self._to))
            self._open += [here, there]
            for source, sink in ((here, there), (there, here)):
                threading.Thread(target=self._pump, args=(source, sink), daemon=True).start()

    def _pump(self, source: socket.socket, sink: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(1 << 16):
                sink.sendall(data)
            sink.shutdown(socket.SHUT_WR)
