"""What a load showed: latencies by quantile, throughput, goodput. Plain data, a table, plots."""

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

from workflows.bench.load import Answered, Load
from workflows.drawing import ACCENT, INK, axes, grid, page, svg

_QUANTILES = (0.5, 0.95, 0.99)


def summarize(load: Load, answered: Sequence[Answered], slo_s: float) -> dict[str, Any]:
    """Of one load. slo_s: an answer within so many seconds counts as good; seconds: from the first to the last."""
    good = [one for one in answered if one.whole is not None]
    span = max((one.began + (one.whole or 0.0) for one in answered), default=0.0)
    tokens, calls = sum(one.tokens for one in good), sum(one.calls for one in good)
    within = sum(one.whole is not None and one.whole <= slo_s for one in answered)
    return {
        "load": load.kind,
        "level": load.level,
        "seconds": round(span, 3),
        "requests": len(answered),
        "by_status": {str(status): count for status, count in sorted(Counter(one.status for one in answered).items())},
        "ttfc_s": _quantiles([one.first for one in good if one.first is not None]),
        "e2e_s": _quantiles([one.whole for one in good if one.whole is not None]),
        "tokens_per_s": round(tokens / span, 2) if span else 0.0,
        "requests_per_s": round(len(good) / span, 3) if span else 0.0,
        "goodput_per_s": round(within / span, 3) if span else 0.0,
        "tokens_per_call": round(tokens / calls, 3) if calls else None,
    }


def _quantiles(seconds: Sequence[float]) -> dict[str, float | None]:
    return {f"p{round(100 * q)}": round(float(np.quantile(seconds, q)), 4) if seconds else None for q in _QUANTILES}


HEADER = ["load", "requests", "refused, failed", "TTFC p50 / p99", "end to end p50 / p99", "tokens/s", "goodput /s"]


def row(summary: dict[str, Any]) -> list[str]:
    """One load's row of a table."""
    level = f"{summary['level']:g} at once" if summary["load"] == "closed" else f"{summary['level']:g} a second"
    failed = summary["requests"] - summary["by_status"].get("200", 0)
    latencies = [_both(summary[name]) for name in ("ttfc_s", "e2e_s")]
    rates = [f"{summary['tokens_per_s']:.1f}", f"{summary['goodput_per_s']:.2f}"]
    return [level, str(summary["requests"]), str(failed), *latencies, *rates]


def _both(quantiles: dict[str, float | None]) -> str:
    if quantiles["p50"] is None or quantiles["p99"] is None:
        return "–"
    return f"{1000 * quantiles['p50']:.0f} / {1000 * quantiles['p99']:.0f} ms"


def report(url: str, model: str, summaries: Sequence[dict[str, Any]], slo_s: float) -> bytes:
    """A page with the table, and for each kind of load two plots."""
    parts = [grid(HEADER, [row(summary) for summary in summaries])]
    for kind, name in (("closed", "requests at once"), ("open", "requests a second")):
        some = [one for one in summaries if one["load"] == kind and one["e2e_s"]["p50"] is not None]
        if len(some) > 1:
            parts.append(f"<h2>{kind.capitalize()} loop</h2>{_plots(some, name)}")
    return page(f"Load on {model}", f"{url}; good is an answer within {slo_s:g} s", *parts)


def _plots(some: Sequence[dict[str, Any]], name: str) -> str:
    figure, (left, right) = axes(1, 2, 3.2)
    levels = [one["level"] for one in some]
    for quantile, style in (("p50", "-"), ("p99", "--")):
        left.plot(levels, [one["e2e_s"][quantile] for one in some], style, color=INK, label=f"end to end {quantile}")
        left.plot(levels, [one["ttfc_s"][quantile] for one in some], style, color=ACCENT, label=f"TTFC {quantile}")
    left.set(xlabel=name, ylabel="seconds", ylim=(0, None))
    left.legend(frameon=False, fontsize=8)
    right.plot(levels, [one["tokens_per_s"] for one in some], "o-", color=ACCENT)
    right.set(xlabel=name, ylabel="tokens a second", ylim=(0, None))
    return svg(figure, f"latency and tokens a second by {name}")
