"""A comparison as one Markdown table for each axis, and as a page with plots."""

import html
from collections.abc import Sequence
from typing import Any

import numpy as np

from workflows.drawing import INK, axes, figures, grid, page, svg, table
from workflows.evaluate.show import interval, percent, shown, shown_nats

_COLOURS = ("#2a6fdb", "#c2410c", "#15803d", "#7c3aed", "#eab308", "#0e7490", "#be185d", "#4d7c0f")
_NONE = "–"
AUTOREGRESSION = "a token a call"
Rows = list[list[str]]


def table_lines(result: dict[str, Any]) -> list[str]:
    """The tables in Markdown; a dash where a model cannot be asked."""
    lines: list[str] = []
    for title, head, rows in _tables(result):
        lines += ["", f"**{title}**", "", _line_of(head), "|---" * len(head) + "|", *map(_line_of, rows)]
    return lines[1:]


def _line_of(cells: list[str]) -> str:
    """Of a Markdown table: a bar within a cell, as a regular expression may have, would begin another one."""
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def report_page(result: dict[str, Any], place: str) -> bytes:
    """report.html: the tables and a plot for each axis."""
    parts = [figures(_cards(result))]
    plots = {"Learning": _learning_plot, "Context": _context_plot, "Generation": _generation_plot}
    for title, head, rows in _tables(result):
        parts += [f"<h2>{html.escape(title)}</h2>", grid(head, rows)]
        axis = title.split(":")[0]
        if axis in plots:
            parts.append(plots.pop(axis)(result))
    parts += [f"<h2>Answers to the task</h2>{_examples(result)}"] if result.get("task") else []
    parts += ["<h2>Recipe</h2>", table(result["recipe"])]
    return page(result["name"], place, *parts)


def _tables(result: dict[str, Any]) -> list[tuple[str, list[str], Rows]]:
    made = [_learning_table(result), _context_table(result), _generation_table(result), _flexibility_table(result)]
    if result.get("repetition"):
        made.insert(1, _repetition_table(result))
    if result.get("task"):
        made.append(_task_table(result))
    return made


def _learning_table(result: dict[str, Any]) -> tuple[str, list[str], Rows]:
    of_text = {run["model"]: run for run in result["runs"] if run["data"] == "text"}
    # Models may have seen other numbers of tokens: overrides, or a run that was there and kept other checkpoints.
    columns = sorted({point["tokens"] for points in result["learning"].values() for point in points or []})
    head = ["model", "parameters", "training s", *(f"{tokens / 1e6:.2f}M tokens" for tokens in columns)]
    head += ["bits/byte", "estimator"]
    rows = []
    for model, found in result["learning"].items():
        run = of_text[model]
        row = [model, f"{run['parameters']:,}", f"{run['seconds']:.0f}"]
        if not found:
            rows.append([*row, *[_NONE] * len(columns), _NONE, "no likelihood"])
            continue
        last, of = found[-1]["likelihood"], {point["tokens"]: _nats(point) for point in found}
        nats = [of.get(tokens, _NONE) for tokens in columns]
        rows.append([*row, *nats, f"{last['bits_per_byte']:.3f}", last["estimator"]])
    return "Learning: held-out nats per token (exact, or an upper bound) after so many tokens, ± SE", head, rows


def _repetition_table(result: dict[str, Any]) -> tuple[str, list[str], Rows]:
    first = next(iter(result["repetition"].values()))
    epochs = [int(point["data"].removeprefix("small-")) for point in first]
    head = ["model", *(f"{n} epoch{'s' if n > 1 else ''}" for n in epochs)]
    rows = [[model, *map(_nats, points)] for model, points in result["repetition"].items()]
    tokens = first[0]["corpus_tokens"]
    return f"Repetition: held-out nats per token after epochs of the same {tokens:,} tokens, ± SE", head, rows


def _context_table(result: dict[str, Any]) -> tuple[str, list[str], Rows]:
    head = ["model", "left only", "right only", "both", "both, next to the hole's edge", "both, in its middle"]
    rows = []
    for model, sides in result["context"].items():
        sides = sides or {}
        row = [model, *(percent(sides[s]["token"]) if s in sides else _NONE for s in ("left", "right", "both"))]
        near = sides["both"]["by_distance"] if "both" in sides else []
        rows.append([*row, *(percent(near[at]["accuracy"]) if near else _NONE for at in (0, -1))])
    length = result["recipe"]["context"]["length"]
    return f"Context: tokens of a hole of {length} that are restored, by the side that is seen, ± SE", head, rows


def _generation_table(result: dict[str, Any]) -> tuple[str, list[str], Rows]:
    generation = result["generation"]
    head = ["model", "decoding", "tokens/call", "speed", "nats under the judge", "entropy"]
    rival = _rival(result)
    rows = []
    for model, points in generation["models"].items():
        if not points:
            rows.append([model, *[_NONE] * 5])
        for point in points or []:
            speed = f"{point['tokens_per_s'] / rival:.2f}x" if rival else f"{point['tokens_per_s']:.0f}/s"
            rows.append(
                [model, point["setting"], f"{point['tokens_per_call']:.2f}", speed, *_quality(point["quality"])]
            )
    rows.append(["(the text itself)", _NONE, _NONE, _NONE, *_quality(generation["text"])])
    against = "autoregression with kept keys is 1x" if rival else "tokens/s"
    return (
        f"Generation: continuations by how many tokens a call may commit; {against}; judge: {generation['judge']}",
        head,
        rows,
    )


def _quality(quality: dict[str, Any] | None) -> list[str]:
    if quality is None:
        return [_NONE, _NONE]
    return [shown(quality[name], 3) for name in ("nats", "entropy")]


def _rival(result: dict[str, Any]) -> float | None:
    """Tokens a second of the first autoregressive model."""
    points = [point for points in result["generation"]["models"].values() for point in points or []]
    return next((point["tokens_per_s"] for point in points if point["setting"] == AUTOREGRESSION), None)


def _flexibility_table(result: dict[str, Any]) -> tuple[str, list[str], Rows]:
    lengths = result["recipe"]["flexibility"]["lengths"]
    head = ["model", *(f"hole of {n}" for n in lengths), "two holes, both", "broken tokens mended", "others kept"]
    regex = result["recipe"]["flexibility"]["regex"]
    head += [f"answers `{regex}` untold", "restored untold", "restored told"]
    rows = []
    for model, found in result["flexibility"].items():
        by_length = {hole["length"]: hole for hole in found["holes"]}
        row = [model, *(percent(by_length[n]["exact"]) if n in by_length else _NONE for n in lengths)]
        row.append(percent(found["two_holes"]["exact"]) if found["two_holes"] else _NONE)
        editing = found["editing"]
        row += [percent(editing[name]) if editing else _NONE for name in ("mended", "kept")]
        kept = found["constraint"]
        asked = (("untold", "matches"), ("untold", "exact"), ("told", "exact"))
        row += [percent(kept[how][what]) if kept else _NONE for how, what in asked]
        rows.append(row)
    title = "Flexibility: holes restored exactly, from all the context that a model sees; text mended; what must match"
    return f"{title}, ± SE", head, rows


def _task_table(result: dict[str, Any]) -> tuple[str, list[str], Rows]:
    head = ["model", "exact match", "95 % interval", "cells or digits right", "tokens/call"]
    rows = []
    for model, found in result["task"].items():
        if not found:
            rows.append([model, *[_NONE] * 4])
            continue
        exact = found["exact"]
        bounds = f"{100 * exact['low']:.1f} to {100 * exact['high']:.1f} %"
        calls = f"{found['tokens_per_call']['value']:.2f}"
        rows.append([model, f"{100 * exact['value']:.1f} %", bounds, percent(found["pieces"]), calls])
    task = result["recipe"]["task"]
    return f"Task: {task['problem']['type']}, {task['problems']} problems that training never saw", head, rows


def _nats(point: dict[str, Any]) -> str:
    return shown_nats(point["likelihood"])


def _cards(result: dict[str, Any]) -> list[tuple[str, str]]:
    finals = {model: points[-1]["likelihood"] for model, points in result["learning"].items() if points}
    cards = [(shown_nats(likelihood), f"nats/token, {model}") for model, likelihood in finals.items()]
    solved = {model: found["exact"] for model, found in (result.get("task") or {}).items() if found}
    return cards + [(f"{100 * e['value']:.1f} %", f"of the task, {model}") for model, e in solved.items()]


def _colours(result: dict[str, Any]) -> dict[str, str]:
    models = list(result["recipe"]["models"])
    return {model: _COLOURS[at % len(_COLOURS)] for at, model in enumerate(models)}


def _learning_plot(result: dict[str, Any]) -> str:
    colours, repeated = _colours(result), result.get("repetition") or {}
    figure, found = axes(1, 3 if repeated else 2, 3.8)
    for run in (run for run in result["runs"] if run["data"] == "text"):
        x, y = ([point[name] for point in run["losses"]] for name in ("tokens", "loss"))
        found[0].plot(np.array(x) / 1e6, y, lw=1.2, label=run["model"], color=colours[run["model"]])
    found[0].set(xlabel="tokens, millions", ylabel="training loss, each its own")
    figure.legend(frameon=False, fontsize=8, ncols=len(colours), loc="outside upper left")
    learned = [
        point["loss"]
        for run in result["runs"]
        if run["data"] == "text"
        for point in run["losses"][len(run["losses"]) // 10 :]
    ]
    found[0].set_ylim(top=1.05 * max(learned))  # the first steps would leave no room for the others
    for model, points in result["learning"].items():
        if points:
            _line(found[1], [p["tokens"] / 1e6 for p in points], points, model, colours[model])
    found[1].set(xlabel="tokens, millions", ylabel="held-out nats/token")
    for model, points in repeated.items():
        _line(found[2], [int(p["data"].removeprefix("small-")) for p in points], points, model, colours[model])
    if repeated:
        found[2].set(xlabel="epochs of the same small data", xscale="log", yscale="log")
        epochs = [int(p["data"].removeprefix("small-")) for p in next(iter(repeated.values()))]
        found[2].set_xticks(epochs, [str(n) for n in epochs])
        found[2].minorticks_off()
        values = [p["likelihood"]["nelbo"] for points in repeated.values() if points for p in points]
        ticks = [tick for tick in (1, 1.5, 2, 3, 4, 5, 6, 8, 10, 15, 20, 30) if min(values) < tick < max(values)]
        found[2].set_yticks(ticks, [f"{tick:g}" for tick in ticks])
    return svg(figure, "training loss and held-out likelihood over tokens, and over epochs of the same data")


def _line(axis: Any, x: Sequence[float], points: Sequence[dict[str, Any]], label: str, colour: str) -> None:
    y = [p["likelihood"]["nelbo"] for p in points]
    error = [2 * (p["likelihood"]["standard_error"] or 0) for p in points]  # one document shows no spread
    axis.errorbar(x, y, yerr=error, marker="o", ms=4, lw=1.4, capsize=3, label=label, color=colour)


def _context_plot(result: dict[str, Any]) -> str:
    colours = _colours(result)
    figure, found = axes(1, 3, 3.2)
    for axis, side in zip(found, ("left", "right", "both"), strict=True):
        for model, sides in result["context"].items():
            if sides and side in sides:
                near = sides[side]["by_distance"]
                x, y = ([part["distance"] for part in near], [100 * part["accuracy"]["value"] for part in near])
                reach = 100 * np.array(interval([part["accuracy"] for part in near]))
                axis.errorbar(x, y, yerr=reach, marker="o", ms=4, lw=1.4, capsize=3, label=model, color=colours[model])
        axis.set(xlabel="distance to what is seen", title=f"{side}{' sides' if side == 'both' else ''}", ylim=(0, None))
    found[0].set_ylabel("% of tokens right")
    found[2].legend(frameon=False, fontsize=8)
    return svg(figure, "accuracy against distance, seen from the left, the right and both sides")


def _generation_plot(result: dict[str, Any]) -> str:
    colours, generation, rival = _colours(result), result["generation"], _rival(result)
    figure, found = axes(1, 2, 3.6)
    for model, points in generation["models"].items():
        shown = [p for p in points or [] if p["quality"] is not None]
        nats = [p["quality"]["nats"]["value"] for p in shown]
        speeds = [p["tokens_per_s"] / (rival or 1) for p in shown]
        for axis, x in zip(found, ([p["tokens_per_call"] for p in shown], speeds), strict=True):
            axis.plot(x, nats, marker="o", ms=4, lw=1.2, label=model, color=colours[model])
    if generation["text"] is not None:
        for axis in found:
            axis.axhline(generation["text"]["nats"]["value"], color=INK, lw=1, ls="--", label="the text itself")
    found[0].set(xlabel="tokens per call", ylabel="nats/token under the judge")
    found[1].set(xlabel="tokens/s, autoregression = 1" if rival else "tokens/s")
    found[0].legend(frameon=False, fontsize=8)
    return svg(figure, "quality against tokens per call and against speed")


def _examples(result: dict[str, Any]) -> str:
    rows = [
        [model, example["prompt"], example["answer"], "right" if example["is_correct"] else "wrong"]
        for model, found in result["task"].items()
        if found
        for example in found["examples"]
    ]
    return grid(["model", "problem", "answer", ""], rows)
