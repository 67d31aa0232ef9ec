"""The inspect verb: rows as text, clean and noised side by side, and report.html of a corpus.

dllm preprocess inspect workflows/recipes/quickstart.yaml
"""

import html
import itertools
import json
from collections import Counter
from collections.abc import Iterator
from typing import Any

import numpy as np
from rich.table import Table
from rich.text import Text

from dllm_core.data.loader import Loader, all_rows
from dllm_core.data.manifest import CorpusManifest, corpus_prefix, read_manifest, read_tokenizer
from dllm_core.data.tokenizer import Tokenizer
from dllm_core.seeding import Ints
from dllm_core.storage.store import Store
from workflows.console import Console
from workflows.drawing import SOFT, axes, figures, noise_figure, noised_cell, page, svg, table
from workflows.preprocess.flow import CorpusPlan

_SHOWN_ROWS = 4
_SAMPLE_ROWS = 2048
_QUARANTINE_SHOWN = 12


def inspect(corpus: CorpusPlan, console: Console) -> dict[str, Any]:
    """Show rows, write the report, say where it is."""
    store = corpus.store
    manifest = read_manifest(store, corpus.fingerprint)
    tokenizer = read_tokenizer(store, manifest)
    batch = Loader.open(store, manifest, tokenizer.mask_id).batch(0, min(_SAMPLE_ROWS, manifest.train.rows))
    rows = [
        {"t": round(float(t.mean()), 3), "clean": _spelled(tokenizer, x0), "noised": _spelled(tokenizer, xt)}
        for x0, xt, t in zip(batch.x0[:_SHOWN_ROWS], batch.xt, batch.t, strict=False)
    ]
    if console.output == "text":
        console.rich.print(_side_by_side(rows, tokenizer.token_text(tokenizer.mask_id)))
    key = f"{corpus_prefix(corpus.fingerprint)}/report.html"
    store.put(key, _report(corpus, manifest, tokenizer, batch, rows))
    return {"corpus": corpus.url, "report": f"{store.url}/{key}", "rows": rows}


def _spelled(tokenizer: Tokenizer, ids: Ints) -> list[str]:
    return [tokenizer.token_text(int(i)) for i in ids]


def _side_by_side(rows: list[dict[str, Any]], mask: str) -> Table:
    shown = Table(show_lines=True, header_style="bold")
    shown.add_column("t", justify="right")
    shown.add_column("clean", ratio=1)
    shown.add_column("noised", ratio=1)
    for row in rows:
        noised = Text()
        for token, clean in zip(row["noised"], row["clean"], strict=True):
            style = "dim" if token == mask else "" if token == clean else "bold red"
            noised.append("░" if token == mask else token.replace("\n", "⏎"), style=style)
        shown.add_row(f"{row['t']:.2f}", Text("".join(row["clean"]).replace("\n", "⏎")), noised)
    return shown


def _report(
    corpus: CorpusPlan, manifest: CorpusManifest, tokenizer: Tokenizer, batch: Any, rows: list[dict[str, Any]]
) -> bytes:
    count = manifest.accounting
    sample = all_rows(corpus.store, manifest, manifest.train, np.arange(min(_SAMPLE_ROWS, manifest.train.rows)))
    waste = 1 - manifest.train.tokens / (manifest.train.rows * manifest.seq_len)
    bytes_per_token = count.bytes_in / max(1, manifest.train.tokens + manifest.heldout.tokens)
    cards = [
        (f"{count.documents_in:,}", "records in"),
        (f"{count.documents_out:,}", "documents out"),
        (f"{manifest.train.tokens:,}", "training tokens"),
        (f"{bytes_per_token:.2f}", "bytes of input a token"),
        (f"{waste:.2%}", f"packing waste ({manifest.packing.type})"),
        (f"{sum(len(epoch) for epoch in manifest.noise_epochs):,}", "noise shards"),
    ]
    mask = tokenizer.token_text(tokenizer.mask_id)
    lines = []
    for row in rows:
        for name in ("clean", "noised"):
            shown = [noised_cell(token, clean, mask) for token, clean in zip(row[name], row["clean"], strict=True)]
            lines.append(f"<div><i>t = {row['t'] if name == 'noised' else 0:.2f}  </i>{''.join(shown)}</div>")
    accounting = {
        "records in": count.documents_in,
        "training documents": count.train,
        "held-out documents": count.heldout,
        **{f"filtered: {rule}": n for rule, n in count.filtered.items()},
        **{f"duplicates: {rule}": n for rule, n in count.duplicates.items()},
        **{f"quarantined: {reason}": n for reason, n in count.quarantined.items()},
    }
    return page(
        f"corpus {manifest.fingerprint}",
        corpus.url,
        figures(cards),
        "<h2>Where every record went</h2>",
        table(accounting),
        "<h2>Documents and rows</h2>",
        _lengths(sample, tokenizer),
        "<h2>Noise</h2>",
        noise_figure(manifest.process.bind(tokenizer.mask_id, manifest.vocab_size), batch),
        f"<div class=canvas>{''.join(lines)}</div>",
        "<h2>Removed records</h2>",
        _removed(corpus.store, manifest),
        "<h2>Manifest</h2>",
        table(manifest.model_dump(mode="json", exclude={"train", "heldout", "noise_epochs", "accounting"})),
    )


def _lengths(sample: Any, tokenizer: Tokenizer) -> str:
    """Document lengths in tokens between end tokens, and how full rows are."""
    figure, (left, middle, right) = axes(1, 3, 3.0)
    stream = sample.x0[sample.is_real]
    ends = np.flatnonzero(stream == tokenizer.eos_id)
    lengths = np.diff(np.concatenate([[-1], ends]))
    left.hist(np.maximum(lengths, 1), bins=np.geomspace(1, max(2, lengths.max(initial=2)), 30), color=SOFT)
    left.set(xlabel="tokens a document", ylabel="documents", xscale="log")
    sizes = np.array([len(tokenizer.token_text(int(i)).encode()) for i in np.unique(stream)])
    counts = np.unique(stream, return_counts=True)[1]
    middle.hist(sizes, weights=counts, bins=np.arange(1, sizes.max(initial=1) + 2) - 0.5, color=SOFT)
    middle.set(xlabel="bytes a token", ylabel="tokens")
    right.hist(sample.is_real.mean(1), bins=20, range=(0, 1), color=SOFT)
    right.set(xlabel="share of a row that is real", ylabel="rows")
    return svg(figure, "document lengths, bytes per token and how full rows are")


def _removed(store: Store, manifest: CorpusManifest) -> str:
    kinds = ("quarantined", "filtered", "duplicates")
    counts = Counter({f"{kind}: {rule}": n for kind in kinds for rule, n in getattr(manifest.accounting, kind).items()})
    if not counts:
        return "<p>None.</p>"
    figure, [axis] = axes(1, 1, 0.5 + 0.35 * len(counts))
    names, values = zip(*counts.most_common()[::-1], strict=True)
    axis.barh(names, values, color=SOFT)
    axis.set(xlabel="records")
    shown = "".join(itertools.islice(_removed_rows(store, manifest), _QUARANTINE_SHOWN))
    return svg(figure, "removed records by reason") + f"<table>{shown}</table>"


def _removed_rows(store: Store, manifest: CorpusManifest) -> Iterator[str]:
    for item in store.list(f"{corpus_prefix(manifest.fingerprint)}/quarantine"):
        if not item.key.endswith(".jsonl"):
            continue
        for line in store.read(item.key, 0, 1 << 16).decode("utf-8", "replace").split("\n"):  # a text may hold U+2028
            try:
                record = json.loads(line)
            except ValueError:
                break
            place = f"{record['key']} @ {record['offset']}"
            yield f"<tr><td>{html.escape(record['reason'])}</td><td><code>{html.escape(place)}</code></td></tr>"
