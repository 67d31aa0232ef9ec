"""report.html: one self-contained page with the loss curve, the noise, one decode unfolding, and the lineage."""

import html
from typing import Any

import numpy as np

from dllm_core.checkpoints.bundle import ModelBundle, read_bundle
from dllm_core.checkpoints.run_dir import JsonLines, RunDir
from dllm_core.data.loader import Loader
from dllm_core.data.manifest import read_manifest
from dllm_core.decoding.engine import Engine
from workflows.drawing import ACCENT, INK, SOFT, axes, cell, figures, page, png, table
from workflows.generate.unfold import Frame, request_for, unfold
from workflows.recipe import Recipe


def write_report(recipe: Recipe, run: RunDir) -> None:
    """Draw the run's report from its own files."""
    bundle = read_bundle(run)
    evaluation = run.read_json("evaluation.json")
    answers = (run.read_json("stages/serve.json") or {"result": {"answers": []}})["result"]["answers"]
    records = JsonLines(run, "metrics.jsonl").read()
    frames = _frames(recipe, bundle)
    parts = [
        _figures(records, evaluation),
        "<h2>Training</h2>",
        _loss_curve(records, evaluation),
        "<h2>The forward process: what the denoiser is shown</h2>",
        _noise(recipe, run, bundle),
        "<h2>The reverse: one decode, call by call</h2>",
        _canvas(frames, recipe),
        "<h2>What the endpoint answered</h2>",
        _answers(answers),
        "<h2>Lineage</h2>",
        table(bundle.manifest.lineage.model_dump(mode="json")),
        "<h2>Recipe</h2>",
        f"<pre class=canvas>{html.escape(recipe.to_yaml())}</pre>",
    ]
    run.store.put(run.key("report.html"), page(run.name, run.url, *parts))


def _figures(records: list[dict[str, Any]], evaluation: dict[str, Any]) -> str:
    cards = [
        (f"{evaluation['nelbo']:.3f} ± {evaluation['standard_error']:.3f}", "held-out NELBO, nats/token (upper bound)"),
        (f"{evaluation['unigram_entropy']:.3f}", "unigram entropy of the same rows, nats/token"),
        (f"{evaluation['gain']:.2f}", "nats/token learned"),
    ]
    if "decoding" in evaluation:
        decoding = evaluation["decoding"]
        policy = " ".join(str(part) for part in decoding["policy"].values())
        cards.append((f"{decoding['tokens_per_call']:.2f}", f"tokens per denoiser call ({policy})"))
    if records:
        rate = float(np.median([record["tokens_per_s"] for record in records]))
        cards.append((f"{rate / 1000:.1f}k", "training tokens/s (median)"))
        cards.append((f"{records[-1]['tokens'] / 1e6:.2f}M", f"tokens in {records[-1]['step']:,} steps"))
    return figures(cards)


def _loss_curve(records: list[dict[str, Any]], evaluation: dict[str, Any]) -> str:
    if not records:
        return "<p>No steps were logged.</p>"
    name = "bound" if records[0]["bound"] is not None else "loss"
    figure, [axis] = axes(1, 1, 3.6)
    tokens = np.array([record["tokens"] for record in records]) / 1e6
    bound = np.array([record[name] for record in records])
    width = max(1, len(bound) // 40)
    kernel = np.ones(width) / width
    smooth = np.convolve(np.pad(bound, (width - 1, 0), mode="edge"), kernel, mode="valid")
    axis.plot(tokens, bound, color=SOFT, lw=0.7, label=f"training {name}")
    axis.plot(tokens, smooth, color=ACCENT, lw=1.8, label=f"mean of {width} records")
    axis.axhline(evaluation["unigram_entropy"], color=INK, lw=1, ls="--", label="unigram entropy, held out")
    axis.errorbar(
        [tokens[-1]],
        [evaluation["nelbo"]],
        yerr=[2 * evaluation["standard_error"]],
        fmt="o",
        color="#c2410c",
        capsize=4,
        label="held-out NELBO ± 2 SE (EMA)",
    )
    top = float(np.quantile(bound, 0.995))
    axis.set(xlabel="tokens seen, millions", ylabel="nats/token", ylim=(0, top * 1.05), xlim=(0, None))
    axis.legend(frameon=False, fontsize=9)
    return png(figure, "training and held-out NELBO over tokens seen")


def _noise(recipe: Recipe, run: RunDir, bundle: ModelBundle) -> str:
    """Mask rate against t for the rows of an epoch's beginning, and one row at four times."""
    manifest = read_manifest(run.store, bundle.manifest.lineage.corpus)
    tokenizer = bundle.tokenizer()
    loader = Loader.open(run.store, manifest, tokenizer.mask_id)
    batch = loader.batch(0, min(512, manifest.train.rows))
    t = batch.t[:, 0]
    rate = (batch.xt != batch.x0).mean(1)
    figure, (left, right) = axes(1, 2, 3.0)
    grid = np.linspace(0, 1, 101, dtype=np.float32)
    left.scatter(t, rate, s=6, color=SOFT, label="rows")
    left.plot(grid, 1 - recipe.noise.process.schedule.alpha(grid), color=ACCENT, label="1 - alpha(t)")
    left.set(xlabel="t", ylabel="share of masked tokens")
    left.legend(frameon=False, fontsize=9)
    right.hist(t, bins=20, range=(0, 1), color=SOFT, edgecolor="white")
    right.set(xlabel="t", ylabel="rows", title=f"t of the first {len(t)} rows: stratified along the order")
    right.title.set_fontsize(9)
    process = manifest.process.bind(tokenizer.mask_id, manifest.vocab_size)
    x0 = batch.x0[:1]
    u = np.random.default_rng(0).random(x0.shape, dtype=np.float32)
    lines = []
    for time in (0.1, 0.4, 0.7, 1.0):
        xt = process.corrupt(x0, np.full((1, 1), time, np.float32), u)[0]
        shown = [
            "<span class=open>░</span>" if int(token) == tokenizer.mask_id else cell(tokenizer.token_text(int(token)))
            for token in xt
        ]
        lines.append(f"<div><i>t = {time:.1f}  </i>{''.join(shown)}</div>")
    return png(figure, "mask rate against t") + f"<div class=canvas>{''.join(lines)}</div>"


def _frames(recipe: Recipe, bundle: ModelBundle) -> list[Frame]:
    """The first example (or an empty prompt) decoded here: the same tokens as the endpoint's, for the same seed."""
    tokenizer = bundle.tokenizer()
    engine = Engine.of(bundle)
    examples = recipe.serve.examples
    prompt, suffix, config = "", None, recipe.decode
    if examples:
        prompt, suffix = examples[0].prompt, examples[0].suffix
        config = config.model_copy(update={"max_tokens": examples[0].max_tokens or config.max_tokens})
    request = request_for(tokenizer, prompt, suffix, config, engine.context_length, recipe.seed)
    return list(unfold(engine, tokenizer, request))


def _canvas(frames: list[Frame], recipe: Recipe) -> str:
    lines = []
    for frame in frames:
        cells = []
        for i, token in enumerate(frame.texts):
            if frame.is_open[i]:
                cells.append("<span class=open>░</span>")
            elif not frame.first <= i < frame.stop:
                cells.append(f"<span class=given>{cell(token)}</span>")
            elif frame.committed_at[i] == frame.num_calls:
                cells.append(f"<span class=new>{cell(token)}</span>")
            else:
                cells.append(cell(token))
        lines.append(f"<div><i>{frame.num_calls:>3}  </i>{''.join(cells)}</div>")
    answer = frames[-1].answer
    assert answer is not None
    policy = " ".join(str(part) for part in recipe.decode.policy.model_dump(mode="json").values())
    told = (
        f"{answer.num_committed} tokens in {answer.num_calls} calls, {answer.tokens_per_call:.2f} per call; "
        f"{policy}, blocks of {recipe.decode.block_length}. ░ is open, blue was filled by this call, grey was given."
    )
    return f"<p>{html.escape(told)}</p><div class=canvas>{''.join(lines)}</div>"


def _answers(answers: list[dict[str, Any]]) -> str:
    rows = "".join(
        f"<tr><td><code><span class=given>{cell(a['prompt'])}</span>{cell(a['text'])}"
        f"<span class=given>{cell(a['suffix'] or '')}</span></code></td>"
        f"<td>{a['num_tokens']} tokens</td><td>{a['num_calls']} calls</td>"
        f"<td>{a['tokens_per_call']:.2f} per call</td></tr>"
        for a in answers
    )
    return f"<table>{rows}</table>"
