"""What reports are drawn with: one style, plots as inline SVG, tables. Pages hold everything they need."""

import html
import io
import json
import re
from typing import Any

import numpy as np

from dllm_core.data.batch import Batch
from dllm_core.noise.interpolating import InterpolatingProcess

INK, ACCENT, SOFT = "#1f2430", "#2a6fdb", "#9db7e0"
STYLE = """
body{font:16px/1.55 system-ui,sans-serif;color:#1f2430;max-width:60rem;margin:2.5rem auto;padding:0 1.2rem}
h1{font-size:1.6rem;margin-bottom:.2rem}h2{font-size:1.15rem;margin:2.2rem 0 .6rem}p.sub{color:#667;margin-top:0}
svg{width:100%;height:auto;margin-top:.8rem}table{border-collapse:collapse;width:100%;font-size:.92rem}
td,th{padding:.3rem .7rem .3rem 0;text-align:left;border-bottom:1px solid #e6e8ee;vertical-align:top}
.figures{display:grid;grid-template-columns:repeat(auto-fit,minmax(15rem,1fr));gap:1rem;margin:1.4rem 0}
.figures div{background:#f4f6fa;border-radius:.5rem;padding:.8rem 1rem}.figures b{display:block;font-size:1.45rem}
.figures span{color:#667;font-size:.85rem}.canvas{font:13px/1.6 ui-monospace,monospace;background:#f7f8fb;
border-radius:.5rem;padding:.7rem .9rem;overflow-x:auto}.canvas div{white-space:pre}
.canvas i{color:#99a;font-style:normal}
.given{color:#99a}.open{color:#c5cad6}.new{background:#d5e6ff;color:#0b3f91;border-radius:2px}
.swapped{background:#ffe3d3;color:#9a3412;border-radius:2px}code{font-size:.88rem}
"""


def page(title: str, place: str, *parts: str) -> bytes:
    """A whole page."""
    head = (
        f"<!doctype html><html lang=en><meta charset=utf-8><title>{html.escape(title)}</title>"
        "<meta name=viewport content='width=device-width'>"
        f"<style>{STYLE}</style><h1>{html.escape(title)}</h1><p class=sub>{html.escape(place)}</p>"
    )
    return (head + "".join(parts) + "</html>").encode()


def figures(cards: list[tuple[str, str]]) -> str:
    """Large numbers, each (value, what it is)."""
    items = "".join(f"<div><b>{html.escape(value)}</b><span>{html.escape(name)}</span></div>" for value, name in cards)
    return f"<div class=figures>{items}</div>"


def table(values: dict[str, Any]) -> str:
    """Names and values."""
    rows = "".join(
        f"<tr><th>{html.escape(name)}</th><td><code>{html.escape(json.dumps(value).strip(chr(34)))}</code></td></tr>"
        for name, value in values.items()
    )
    return f"<table>{rows}</table>"


def grid(header: list[str], rows: list[list[str]]) -> str:
    """A table of several columns; a short row's last cell takes what is left."""
    lines = ["".join(f"<th>{html.escape(name)}</th>" for name in header)]
    for row in rows:
        rest = len(header) - len(row) + 1
        *cells, last = (html.escape(value) for value in row)
        lines.append("".join(f"<td>{value}</td>" for value in cells) + f"<td colspan={rest}>{last}</td>")
    return "<table>" + "".join(f"<tr>{line}</tr>" for line in lines) + "</table>"


def cell(text: str) -> str:
    """A token's text in a canvas."""
    return html.escape(text).replace("\n", "⏎")


def noised_cell(text: str, clean: str, mask: str) -> str:
    """A noised token in a canvas: open where it is the mask, marked where it is another than the clean one."""
    if text == mask:
        return "<span class=open>░</span>"
    return cell(text) if text == clean else f"<span class=swapped>{cell(text)}</span>"


def axes(rows: int, columns: int, height: float) -> tuple[Any, list[Any]]:
    """A figure and its axes, row by row."""
    from matplotlib.figure import Figure  # without pyplot: no display, no global state

    figure = Figure(figsize=(9, height), layout="constrained")
    found = figure.subplots(rows, columns, squeeze=False).ravel().tolist()
    for axis in found:
        axis.spines[["top", "right"]].set_visible(False)
    return figure, found


def svg(figure: Any, alt: str) -> str:
    """A figure inside the page, the same bytes for the same figure."""
    from matplotlib import rc_context

    sink = io.StringIO()
    with rc_context({"svg.hashsalt": alt}):
        figure.savefig(sink, format="svg", metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
    drawn = sink.getvalue()
    drawn = re.sub(r' id="[\w.]+_\d+"', "", drawn[drawn.index("<svg ") :])  # not one of a kind in a page of many
    return drawn.replace("<svg ", f'<svg role="img" aria-label="{html.escape(alt)}" ', 1)


def noise_figure(process: InterpolatingProcess, batch: Batch) -> str:
    """Share of noised tokens against t, a point a row, beside what the process says, and how t is spread."""
    figure, (left, right) = axes(1, 2, 3.0)
    counted = np.maximum(batch.loss_mask.sum(1), 1)
    share = ((batch.xt != batch.x0) & batch.loss_mask).sum(1) / counted
    grid = np.linspace(0, 1, 101)
    left.scatter(batch.t.mean(1), share, s=5, color=SOFT, label="rows")
    left.plot(grid, 1 - process.mixture(grid).keep, color=ACCENT, label="what the process says")
    left.set(xlabel="t", ylabel="share of noised tokens")
    left.legend(frameon=False, fontsize=9)
    right.hist(batch.t.ravel(), bins=20, range=(0, 1), color=SOFT, edgecolor="white")
    right.axhline(batch.t.size / 20, color=INK, lw=1, ls="--")
    right.set(xlabel="t", ylabel="tokens")
    return svg(figure, "share of noised tokens against t and the distribution of t")
