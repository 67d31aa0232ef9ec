"""The manifest of a large corpus, as a tree of tables, against one JSON document of the same shards.

    python tests/benchmarks/manifest.py [--shards 60000]

One JSON line: seconds to write and to load `--shards` token shards with one noise epoch, of `json.loads` and model
validation of the same content, and their ratio.
"""

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path

from figures import tell
from pydantic import TypeAdapter

from dllm_core.data.manifest import Accounting, CorpusManifest, Split, read_manifest, write_manifest
from dllm_core.data.packing import WrapPacking
from dllm_core.data.shard import ShardInfo
from dllm_core.data.tokenizer import TokenizerConfig
from dllm_core.noise.process import AbsorbingNoise
from dllm_core.storage.store import LocalStore, sha256


def shards(kind: str, count: int) -> tuple[ShardInfo, ...]:
    """Shards as they are in a corpus of 4 MB units."""
    return tuple(
        ShardInfo(
            key=f"{kind}-{unit:06d}.arrow",
            unit=unit,
            rows=1000 + unit % 7,
            tokens=1_024_000 + unit,
            bytes=2_050_000 + unit,
            sha256=sha256(f"{kind}{unit}".encode()),
        )
        for unit in range(count)
    )


def seconds_of(function) -> float:
    """The fastest of three."""
    times = []
    for _ in range(3):
        begun = time.perf_counter()
        function()
        times.append(time.perf_counter() - begun)
    return min(times)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--shards", type=int, default=60_000)
    count = parser.parse_args().shards
    tokens, noise = shards("tokens/train", count), shards("noise/epoch-000/train", count)
    manifest = CorpusManifest(
        fingerprint="0123456789abcdef",
        source={},
        units=count,
        tokenizer=TokenizerConfig(),
        tokenizer_sha256=sha256(b""),
        tokenizer_engine="none",
        vocab_size=32768,
        packing=WrapPacking(seq_len=1024),
        seed=0,
        process=AbsorbingNoise(),
        t_min=1e-3,
        accounting=Accounting(),
        train=Split.model_construct(shards=tokens),
        heldout=Split.model_construct(shards=tokens[:1]),
        noise_epochs=(noise,),
    )
    document = json.dumps([shard.model_dump() for shard in (*tokens, *noise)])
    rival = TypeAdapter(tuple[ShardInfo, ...])
    with tempfile.TemporaryDirectory() as scratch:
        store = LocalStore(Path(scratch))
        write = seconds_of(lambda: write_manifest(store, manifest))
        assert read_manifest(store, manifest.fingerprint) == manifest
        load = seconds_of(lambda: read_manifest(store, manifest.fingerprint))
    plain = seconds_of(lambda: rival.validate_python(json.loads(document)))
    figures = {
        "shards": count,
        "write_s": round(write, 2),
        "load_s": round(load, 2),
        "plain_json_s": round(plain, 2),
        "ratio": round(plain / load, 2),
    }
    tell("manifest", **figures)


if __name__ == "__main__":
    sys.exit(main())
