"""report.html: one self-contained page with the loss curve, the noise, one decode unfolding, and the lineage."""

import html
from typing import Any

import numpy as np

from dllm_core.checkpoints.bundle import ModelBundle, read_bundle
from dllm_core.checkpoints.run_dir import JsonLines, RunDir
from dllm_core.data.loader import Loader
from dllm_core.decoding.engine import Engine
from workflows.drawing import ACCENT, INK, SOFT, axes, cell, figures, noise_figure, noised_cell, page, svg, table
from workflows.evaluate.job import corpus_of
from workflows.evaluate.show import sections, shown_nats
from workflows.generate.asked import Asked
from workflows.generate.unfold import Frame, unfold
from workflows.recipe import Recipe

EVALUATION = "evaluation.json"


def write_report(recipe: Recipe, run: RunDir) -> None:
    """Draw the run's report from its own files."""
    bundle = read_bundle(run)
    evaluation = run.read_json(EVALUATION)
    answers = (run.read_json("stages/serve.json") or {"result": {"answers": []}})["result"]["answers"]
    records = JsonLines(run, "metrics.jsonl").read()
    parts = [
        _figures(records, evaluation),
        "<h2>Training</h2>",
        _loss_curve(records, evaluation),
        *sections(evaluation),
        "<h2>The forward process: what the denoiser is shown</h2>",
        _noise(run, bundle),
        *_decoded(recipe, bundle, answers),
        "<h2>Lineage</h2>",
        table(bundle.manifest.lineage.model_dump(mode="json")),
        "<h2>Recipe</h2>",
        f"<pre class=canvas>{html.escape(recipe.to_yaml())}</pre>",
    ]
    run.store.put(run.key("report.html"), page(run.name, run.url, *parts))


def _figures(records: list[dict[str, Any]], evaluation: dict[str, Any]) -> str:
    cards = [(f"{evaluation['unigram_entropy']:.3f}", "unigram entropy of the held-out rows, nats/token")]
    if evaluation["nelbo"] is None:
        cards.insert(0, ("none", "likelihood: a masked language model bounds none"))
    else:
        told = shown_nats(evaluation)
        cards.insert(0, (told, f"held-out {_name_of(evaluation)}, nats/token"))
        cards.append((f"{evaluation['gain']:.2f}", "nats/token learned"))
    if evaluation["bits_per_byte"] is not None:
        cards.append(
            (f"{evaluation['bits_per_byte']:.3f}", f"bits per byte of the same text ({evaluation['estimator']})")
        )
    if evaluation["decoding"] is not None:
        decoding = evaluation["decoding"]
        cards.append((f"{decoding['tokens_per_call']:.2f}", f"tokens per denoiser call ({about_policy(decoding)})"))
    if records:
        rate = float(np.median([record["tokens_per_s"] for record in records]))
        cards.append((f"{rate / 1000:.1f}k", "training tokens/s (median)"))
        cards.append((f"{records[-1]['tokens'] / 1e6:.2f}M", f"tokens in {records[-1]['step']:,} steps"))
    return figures(cards)


def about_policy(told: dict[str, Any]) -> str:
    """The policy in `DecodeConfig.told`, in words."""
    return " ".join(str(part) for part in told["policy"].values()) if told["policy"] else "token by token"


def _name_of(evaluation: dict[str, Any]) -> str:
    return "negative log-likelihood" if evaluation["estimator"] == "exact" else "NELBO (upper bound)"


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
    top = float(np.quantile(bound, 0.995))
    if evaluation["nelbo"] is not None:
        error = 2 * (evaluation["standard_error"] or 0)
        top = max(top, evaluation["nelbo"] + error)  # of what was learned by heart it is above all of the training
        axis.errorbar(
            [tokens[-1]],
            [evaluation["nelbo"]],
            yerr=[error],
            fmt="o",
            color="#c2410c",
            capsize=4,
            label=f"held-out {_name_of(evaluation)} ± 2 SE (EMA)",
        )
    axis.set(xlabel="tokens seen, millions", ylabel="nats/token", ylim=(0, top * 1.05), xlim=(0, None))
    axis.legend(frameon=False, fontsize=9)
    return svg(figure, "training loss and held-out likelihood over tokens seen")


def _noise(run: RunDir, bundle: ModelBundle) -> str:
    """The noise of an epoch's beginning, and one row at four times."""
    manifest = corpus_of(run, bundle)
    tokenizer, process = bundle.tokenizer(), bundle.process
    batch = Loader.open(run.store, manifest, tokenizer.mask_id).batch(0, min(512, manifest.train.rows))
    x0, rng = batch.x0[:1], np.random.default_rng(0)
    u, v = rng.random(x0.shape, dtype=np.float32), rng.random(x0.shape)
    mask, lines = tokenizer.token_text(tokenizer.mask_id), []
    for time in (0.1, 0.4, 0.7, 1.0):
        xt = process.corrupt(x0, np.full((1, 1), time, np.float32), u, v)
        texts = [[tokenizer.token_text(int(token)) for token in ids[0]] for ids in (xt, x0)]
        shown = [noised_cell(noised, clean, mask) for noised, clean in zip(*texts, strict=True)]
        lines.append(f"<div><i>t = {time:.1f}  </i>{''.join(shown)}</div>")
    return noise_figure(process, batch) + f"<div class=canvas>{''.join(lines)}</div>"


def _decoded(recipe: Recipe, bundle: ModelBundle, answers: list[dict[str, Any]]) -> list[str]:
    """One decode and the endpoint's answers, or that there is no decoder."""
    title = "<h2>The reverse: one decode, call by call</h2>"
    if not recipe.can_be_decoded:
        return [title, "<p>There is no decoder for such a model yet.</p>"]
    return [
        title,
        _canvas(_frames(recipe, bundle), recipe),
        "<h2>What the endpoint answered</h2>",
        _answers(answers),
    ]


def _frames(recipe: Recipe, bundle: ModelBundle) -> list[Frame]:
    """The first example (or an empty prompt) decoded here: the same tokens as the endpoint's, for the same seed."""
    tokenizer = bundle.tokenizer()
    engine = Engine(bundle)
    examples = recipe.serve.examples
    asked, config = Asked(seed=recipe.seed), recipe.decode
    if examples:
        asked = Asked(prompt=examples[0].prompt, suffix=examples[0].suffix or "", seed=recipe.seed)
        config = config.model_copy(update={"max_tokens": examples[0].max_tokens or config.max_tokens})
    request, _ = asked.given(tokenizer, config, engine.context_length)
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
    told = recipe.decode_told
    blocks = f", blocks of {told['block_length']}" if told["block_length"] else ""
    about = (
        f"{answer.num_committed} tokens in {answer.num_calls} calls, {answer.tokens_per_call:.2f} per call; "
        f"{about_policy(told)}{blocks}. ░ is open, blue was filled by this call, grey was given."
    )
    return f"<p>{html.escape(about)}</p><div class=canvas>{''.join(lines)}</div>"


def _answers(answers: list[dict[str, Any]]) -> str:
    rows = "".join(
        f"<tr><td><code><span class=given>{cell(a['prompt'])}</span>{cell(a['text'])}"
        f"<span class=given>{cell(a['suffix'] or '')}</span></code></td>"
        f"<td>{a['num_tokens']} tokens</td><td>{a['num_calls']} calls</td>"
        f"<td>{a['tokens_per_call']:.2f} per call</td></tr>"
        for a in answers
    )
    return f"<table>{rows}</table>"
