"""What the preprocess verbs print: each does its work through `verbs.py` or `inspect.py` and says it in a few lines."""

import time
from dataclasses import asdict
from typing import Any

from dllm_core.errors import DataError
from workflows.console import Console
from workflows.env import ray_cluster
from workflows.fan_out import fan_out
from workflows.preprocess import verbs
from workflows.preprocess.flow import CorpusPlan
from workflows.preprocess.inspect import inspect


def look_at_corpus(action: str, corpus: CorpusPlan, console: Console) -> dict[str, Any]:
    """Run `plan`, `verify`, `repair` or `inspect`; a corpus that is not whole is a DataError after all was said."""
    if action == "plan":
        return _plan(corpus, console)
    if action == "inspect":
        result = inspect(corpus, console)
        console.print(f"report: {result['report']}")
        return result
    begun = time.monotonic()
    workers = corpus.recipe.placement.preprocess.workers
    with console.stage(action) as bar, ray_cluster(workers):
        if action == "repair":
            result = verbs.repair(corpus, fan_out, bar.update)
        else:
            result = {"corpus": corpus.url, "problems": [asdict(p) for p in verbs.verify(corpus, fan_out, bar.update)]}
    problems = result.get("problems", result.get("repaired", []))
    for problem in problems[:20]:
        console.print(f"  [yellow]{problem['key']}[/yellow]: {problem['what']}")
    if action == "verify" and problems:
        remedy = "dllm preprocess repair, with the same recipe"
        raise DataError(corpus.url, f"{len(problems)} files are bad", problems[0]["key"], remedy)
    told = (
        f"{len(problems)} files repaired by {result['tasks_run']} tasks"
        if action == "repair"
        else "every shard is whole"
    )
    console.done(action, told, time.monotonic() - begun)
    return result


def _plan(corpus: CorpusPlan, console: Console) -> dict[str, Any]:
    found = verbs.plan(corpus)
    console.print(f"{found['corpus']}")
    console.print(f"  input    {found['files']:,} files, {found['input_bytes'] / 1e6:,.1f} MB")
    console.print(f"  work     {found['units']:,} units ({found['units_done']:,} done), {found['shards']:,} shards")
    seconds = "" if found["seconds"] is None else f"{found['seconds']:,.0f} s and "
    output = "not known: a hub does not tell how much it has"
    if found["tokens"] is not None:
        output = f"about {found['tokens']:,} tokens, {found['disk_bytes'] / 1e6:,.1f} MB"
    console.print(f"  output   {output}")
    console.print(
        f"  needs    about {seconds}{found['memory_bytes'] / 2**30:.1f} GiB "
        f"on {found['workers']} workers [dim]({found['tokenizer_engine']}, from a sample of 1 MB)[/dim]"
    )
    return found
