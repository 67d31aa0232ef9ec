"""The measures of `evaluation.json` for people: lines for a terminal, sections for report.html."""

import html
from collections.abc import Iterator
from typing import Any

from workflows.drawing import ACCENT, INK, SOFT, axes, grid, svg

Figures = dict[str, Any]
_SIDES = {
    "both": (ACCENT, "both sides"),
    "left": ("#c2410c", "left side only"),
    "right": ("#7a5cc0", "right side only"),
}


def lines(evaluation: Figures) -> Iterator[tuple[str, str]]:
    """(measure, what came out) of all that was asked for."""
    for name, tell in (("calibration", _about_calibration), ("infill", _about_infill), ("samples", _about_samples)):
        figures = evaluation[name]
        if figures is not None:
            yield name, _or_why_not(figures) or tell(figures)
    for figures in evaluation["tasks"]:
        yield figures["task"]["type"], _or_why_not(figures) or _about_task(figures)


def sections(evaluation: Figures) -> list[str]:
    """HTML of all that was asked for."""
    parts: list[str] = []
    for name, title, draw in (
        ("calibration", "Calibration: how often is it right when it is so sure?", _calibration),
        ("infill", "Infilling: holes in held-out rows", _infill),
        ("samples", "Generated text", _samples),
    ):
        figures = evaluation[name]
        if figures is not None:
            parts += [f"<h2>{title}</h2>", _not_measured(figures) or draw(figures)]
    if evaluation["tasks"]:
        parts += ["<h2>Tasks with known answers</h2>", _tasks(evaluation["tasks"])]
    return parts


def shown(estimate: Figures, digits: int = 2, unit: float = 1.0) -> str:
    """`value ± standard error`, in units of `unit`."""
    error = estimate["standard_error"]
    told = f"{estimate['value'] / unit:.{digits}f}"
    return told if error is None else f"{told} ± {error / unit:.{digits}f}"


def shown_nats(likelihood: Figures) -> str:
    """The nats a token of a likelihood, `value ± standard error`."""
    return shown({"value": likelihood["nelbo"], "standard_error": likelihood["standard_error"]}, 3)


def percent(estimate: Figures) -> str:
    """A share with its error, or with its 95 % interval where all rows agree and show no spread."""
    if "low" in estimate and not estimate["standard_error"]:
        low, high = 100 * estimate["low"], 100 * estimate["high"]
        return f"{100 * estimate['value']:.1f} % (95 %: {low:.1f} to {high:.1f})"
    return f"{shown(estimate, 1, 0.01)} %"


def _or_why_not(figures: Figures) -> str:
    return f"not measured: {figures['not_measured']}" if "not_measured" in figures else ""


def _not_measured(figures: Figures) -> str:
    why = _or_why_not(figures)
    return f"<p>{html.escape(why[:1].upper() + why[1:])}.</p>" if why else ""


def _about_calibration(figures: Figures) -> str:
    told = (f"{one['rate']:.0%} hidden {shown(one['expected_error'], 3)}" for one in figures["by_rate"])
    return f"expected calibration error {', '.join(told)}"


def _about_infill(figures: Figures) -> str:
    told = {one["length"]: "" for one in figures["holes"]}
    for one in figures["holes"]:
        told[one["length"]] += f" {percent(one['token'])} from {one['side']},"
    return f"tokens restored in holes{';'.join(f' of {n}:{of_n[:-1]}' for n, of_n in told.items())}"


def _about_samples(figures: Figures) -> str:
    told = (
        f"{name} {_about_text(figures[part])}" for part, name in (("model", "samples"), ("heldout", "held-out text"))
    )
    return f"{'; '.join(told)} ({figures['scorer']})"


def _about_text(quality: Figures) -> str:
    perplexity = _or_why_not(quality) or f"perplexity {shown(quality['perplexity'])}"
    return perplexity if "entropy" not in quality else f"{perplexity}, entropy {shown(quality['entropy'])}"


def _about_task(figures: Figures) -> str:
    return (
        f"{percent(figures['exact'])} of {figures['problems']} test problems solved, {percent(figures['pieces'])} of "
        f"their pieces; {figures['tokens_per_call']['value']:.2f} tokens per call"
    )


def interval(estimates: list[Figures]) -> list[list[float]]:
    """How far the 95 % intervals reach below and above, as matplotlib wants them."""
    return [[e["value"] - e["low"] for e in estimates], [e["high"] - e["value"] for e in estimates]]


def _calibration(figures: Figures) -> str:
    figure, panels = axes(1, len(figures["by_rate"]), 3.2)
    for axis, one in zip(panels, figures["by_rate"], strict=True):
        bins = one["bins"]
        sure, right = [b["confidence"]["value"] for b in bins], [b["accuracy"] for b in bins]
        axis.plot([0, 1], [0, 1], color=INK, lw=1, ls="--")
        axis.bar(
            [(b["low"] + b["high"]) / 2 for b in bins],
            [b["tokens"] / one["tokens"] for b in bins],
            width=[b["high"] - b["low"] for b in bins],
            color=SOFT,
            alpha=0.5,
        )
        axis.errorbar(sure, [r["value"] for r in right], yerr=interval(right), fmt="o-", color=ACCENT, ms=4, capsize=2)
        axis.set(title=f"{one['rate']:.0%} hidden", xlabel="confidence", xlim=(0, 1), ylim=(0, 1))
    panels[0].set_ylabel("accuracy; bars: share of tokens")
    rows = [
        [
            f"{one['rate']:.0%}",
            f"{one['tokens']:,}",
            shown(one["expected_error"], 4),
            f"{one['expected_error_by_chance']:.4f}",
            percent(one["accuracy"]),
            percent(one["confidence"]),
            shown(one["brier"], 3),
        ]
        for one in figures["by_rate"]
    ]
    header = ["hidden", "tokens", "ECE", "ECE by chance alone", "accuracy", "mean confidence", "Brier score"]
    return svg(figure, "reliability: accuracy against confidence at each share of hidden tokens") + grid(header, rows)


def _infill(figures: Figures) -> str:
    figure, (left, right) = axes(1, 2, 3.2)
    longest = max(one["length"] for one in figures["holes"])
    for side, (colour, name) in _SIDES.items():
        holes = [one for one in figures["holes"] if one["side"] == side]
        if not holes:
            continue
        for key, style in (("token", "o-"), ("exact", "s:")):
            found = [one[key] for one in holes]
            left.errorbar(
                [one["length"] for one in holes],
                [one["value"] for one in found],
                yerr=interval(found),
                fmt=style,
                color=colour,
                ms=4,
                capsize=2,
                label=f"{name}, {'tokens' if key == 'token' else 'whole holes'}",
            )
        for one in holes:
            if one["length"] == longest:
                at = one["by_distance"]
                found = [d["accuracy"] for d in at]
                places, values = [d["distance"] for d in at], [one["value"] for one in found]
                right.errorbar(places, values, yerr=interval(found), fmt="o-", color=colour, ms=4, capsize=2)
    left.set(xlabel="tokens a hole", ylabel="share restored", ylim=(0, 1))
    left.legend(frameon=False, fontsize=8)
    right.set(xlabel=f"distance from the nearest visible token, holes of {longest}", ylabel="accuracy", ylim=(0, 1))
    gains = {(gain["length"], gain["over"]): gain["token"] for gain in figures["gains"]}
    rows = [
        [
            str(one["length"]),
            _SIDES[one["side"]][1],
            str(one["exact"]["rows"]),
            percent(one["token"]),
            percent(one["exact"]),
            shown(one["tokens_per_call"]),
            percent(gains[at]) if (at := (one["length"], one["side"])) in gains else "",
        ]
        for one in figures["holes"]
    ]
    header = [
        "tokens",
        "shown",
        "holes",
        "tokens restored",
        "whole holes",
        "tokens per call",
        "both sides are better by",
    ]
    left_out = "".join(
        f"<p>Holes of {one['length']}, {_SIDES[one['side']][1]}: not measured, {html.escape(one['why'])}.</p>"
        for one in figures["left_out"]
    )
    return svg(figure, "share of holes restored by length, and by distance") + grid(header, rows) + left_out


def _samples(figures: Figures) -> str:
    told: list[tuple[str, Figures]] = [("the model's", figures["model"]), ("held-out text", figures["heldout"])]
    rows = []
    for name, quality in told:
        if "not_measured" in quality:
            rows.append([name, _or_why_not(quality)])
            continue
        rows.append(
            [
                name,
                f"{quality['samples']} of {quality['tokens']:,} tokens",
                shown(quality["perplexity"]),
                shown(quality["nats"], 3),
                shown(quality["entropy"], 3),
                shown(quality["entropy_within"], 3),
                ", ".join(f"{shown(one['overall'])} ({one['n']})" for one in quality["distinct"]),
            ]
        )
    header = ["text", "samples", "perplexity", "nats/token", "entropy", "entropy within", "distinct n-grams (n)"]
    told_by = (
        f"<p>Scored by: {html.escape(figures['scorer'])}; entropies in nats/token. Repetition is cheap for every "
        "scorer: read perplexity beside entropy and beside the text's own.</p>"
    )
    return told_by + grid(header, rows)


def _tasks(tasks: list[Figures]) -> str:
    rows, examples = [], []
    for one in tasks:
        fields = {name: value for name, value in one["task"].items() if name != "type"}
        name = f"{one['task']['type']} ({', '.join(f'{key} {value}' for key, value in fields.items())})"
        if "not_measured" in one:
            rows.append([name, _or_why_not(one)])
            continue
        rows.append(
            [
                name,
                str(one["problems"]),
                percent(one["exact"]),
                f"{100 * one['exact']['low']:.1f} to {100 * one['exact']['high']:.1f} %",
                percent(one["pieces"]),
                shown(one["tokens_per_call"]),
            ]
        )
        examples += [
            f"<div>{'✓' if e['is_correct'] else '✗'} <span class=given>{html.escape(e['prompt'])}</span>"
            f"{html.escape(e['answer'])}</div>"
            for e in one["examples"]
        ]
    header = ["task", "test problems", "solved", "95 % interval", "pieces right", "tokens per call"]
    canvas = f"<div class=canvas>{''.join(examples)}</div>" if examples else ""
    return grid(header, rows) + canvas
