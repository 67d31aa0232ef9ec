"""The whole river, in order: preprocess -> train -> bundle -> evaluate -> serve -> report.

    dllm run workflows/recipes/quickstart.yaml

A stage whose inputs have not changed is skipped; one that was killed goes on. The bundle comes before the evaluation,
so that what is measured is, byte for byte, what is served.
"""

import contextlib
import time
from collections.abc import Iterator
from typing import Any

from rich.markup import escape

from dllm_core.checkpoints.bundle import read_bundle
from dllm_core.checkpoints.bundle_manifest import FOLDER, is_whole
from dllm_core.checkpoints.run_dir import JsonLines, RunDir
from dllm_core.checkpoints.store import CHECKPOINTS
from dllm_core.config.fingerprint import fingerprint
from dllm_core.data.manifest import CorpusManifest, read_manifest, read_tokenizer
from dllm_core.decoding.config import NO_SUFFIX
from dllm_core.errors import CheckpointError, ConfigError, DataError
from dllm_core.evaluation.config import AutoregressiveScorerConfig
from dllm_core.evaluation.scorers import check_scorer
from dllm_core.model.config import LAYOUT_NAME
from dllm_core.objective.config import PreferenceConfig
from workflows.console import Console
from workflows.env import ray_cluster
from workflows.evaluate.flow import evaluate
from workflows.evaluate.show import lines, shown_nats
from workflows.exported import Exported
from workflows.fan_out import fan_out
from workflows.pipeline.bundle import bundle_inputs, make_bundle
from workflows.pipeline.demo import demonstrate
from workflows.pipeline.receipts import Events, Receipts
from workflows.pipeline.report import EVALUATION, about_policy, write_report
from workflows.preprocess.flow import Preprocessing, summary
from workflows.recipe import Recipe
from workflows.serve.app import check_port
from workflows.serve.flow import cpus_needed, gpus_needed
from workflows.target import Target
from workflows.train.flow import checkpoint_bytes, final_step, step_line, train
from workflows.train.session import METRICS


class Pipeline:
    """Runs stages of one target. The cluster starts when the first stage needs it and ends with the `with` block."""

    def __init__(self, target: Target, console: Console) -> None:
        self.target, self._console = target, console
        self._receipts = Receipts(target.run)
        self._stack = contextlib.ExitStack()
        self._has_cluster = False

    def __enter__(self) -> "Pipeline":
        with contextlib.ExitStack() as stack:
            self._is_lost = stack.enter_context(self.target.run.locked())
            self._events = Events(self.target.run)  # not before: the driver that was here wrote until then
            stack.callback(self._send_events)
            self._stack = stack.pop_all()
        return self

    def _send_events(self) -> None:
        if not self._is_lost():
            self._events.sync()

    def _keep_recipe(self) -> None:
        """The recipe of the weights. A verb that only looks at them, with overrides of its own, leaves it alone."""
        run = self.target.run
        run.store.put(run.key("recipe.yaml"), self.target.recipe.to_yaml().encode())

    def __exit__(self, *error: Any) -> None:
        self._stack.close()

    def run(self) -> dict[str, Any]:
        """Every stage; what each reported."""
        if self.target.recipe.can_be_decoded:
            self._check_decoding()
        if self._serve_missing():
            check_port(self.target.recipe.serve)  # now, not after minutes of training
        self._check_room(self._corpus_bytes() + self._training_bytes())
        preprocessed = self.preprocess()
        if self.target.recipe.can_be_decoded:
            self._check_examples()
        self._check_scorer()
        return {
            "run": self.target.run.url,
            "preprocess": preprocessed,
            "train": self.train(),
            "bundle": self.bundle(),
            "evaluate": self.evaluate(),
            "serve": self.serve(),
            "report": self.report(),
        }

    def preprocess(self) -> dict[str, Any]:
        """Corpus -> shards and manifest."""
        plan, name = self.target.plan, "preprocess"
        manifest = plan.existing()
        if manifest is not None:
            self._console.skipped(name, _about_corpus(manifest))
            return summary(manifest, 0)
        self._check_room(self._corpus_bytes())
        with self._stage(name) as bar:
            self._cluster()
            shown = Exported(plan.fingerprint)

            def tell(what: str, done: float, total: float) -> None:
                bar.update(what, done, total)
                shown.progress(what, done, total)

            work = Preprocessing(plan, fan_out, tell)
            manifest = work.run()
            count = manifest.accounting
            shown.corpus(count.documents_in, count.num_quarantined, manifest.train.tokens)
        self._console.done(name, _about_corpus(manifest), self._took)
        self._events.add(name, "done", tasks=work.ran, corpus=plan.fingerprint)
        return summary(manifest, work.ran)

    def train(self) -> dict[str, Any]:
        """Shards -> checkpoints."""
        recipe, run, name = self.target.recipe, self.target.run, "train"
        if recipe.start is None and run.store.exists(run.key(f"{FOLDER}/{LAYOUT_NAME}")):
            remedy = f"a recipe with start.run={run.url} trains on from them"
            raise ConfigError(run.name, "its weights were imported, and stay as they are", remedy=remedy)
        result = self._trained()
        if result is not None:
            self._console.skipped(name, _about_training(result, recipe))
            return result
        last: dict[str, Any] = {}
        self._keep_recipe()
        self._check_room(self._training_bytes())
        with self._stage(name) as bar:
            self._cluster()
            bar.update("starting the workers")
            shown = Exported(run.name)

            def take(message: dict[str, Any]) -> None:
                kind = message.pop("kind")
                if kind == "step":
                    last.update(message)
                    progress = message["step"] / recipe.train.steps
                    if recipe.train.seconds is not None:
                        progress = max(progress, message["seconds"] / recipe.train.seconds)
                    bar.update(step_line(message), min(progress, 1), 1)
                    shown.step(message, recipe.train.steps, recipe.placement.train.workers)
                else:
                    shown.event(kind, message)
                    self._events.add(name, kind, **message)
                    if kind == "checkpoint":  # what was told until here outlives this machine, as metrics do
                        with contextlib.suppress(DataError):  # a storage that is gone now may be back at the next one
                            self._send_events()

            train(recipe, run, self.target.corpus, take)
        if not last:  # one that was ended behind its last save takes no step, and has told what it was in its log
            last = (JsonLines(run, METRICS).read() or [{}])[-1]
        result = {**last, "step": final_step(run), "workers": recipe.placement.train.workers}
        self._receipts.write(name, run.name, result)
        self._console.done(name, _about_training(result, recipe), self._took)
        self._events.add(name, "done", step=result["step"])
        return result

    def bundle(self) -> dict[str, Any]:
        """Newest checkpoint that is whole -> bundle."""
        recipe, run, name = self.target.recipe, self.target.run, "bundle"
        inputs = bundle_inputs(recipe, run, final_step(run) or 0)
        result = self._receipts.read(name, inputs)
        if result is not None and is_whole(run):
            self._console.skipped(name, escape(f"{run.url}/bundle"))
            return result
        self._keep_recipe()
        refused = list[CheckpointError]()
        self._receipts.take_back(name)
        result = make_bundle(recipe, run, self.target.corpus, refused.append).model_dump(mode="json")
        if not refused:  # else it is made again, and this told again, until there is no doubt whose weights they are
            self._receipts.write(name, inputs, result)
        for error in refused:
            self._console.print(
                f"[yellow]passed over, the bundle is of {result['checkpoint']}:[/yellow] {escape(str(error))}"
            )
            self._events.add(name, "checkpoint_refused", reason=str(error))
        self._console.done(name, escape(f"{run.url}/bundle"))
        self._events.add(name, "done", step=result["step"])
        return result

    def evaluate(self) -> dict[str, Any]:
        """Bundle -> held-out likelihood and decoding cost."""
        recipe, run, name = self.target.recipe, self.target.run, "evaluate"
        inputs = fingerprint([self._bundle_identity(), recipe.evaluate, recipe.decode])
        result = self._receipts.read(name, inputs)
        if result is not None:
            if run.read_json(EVALUATION) != result:  # it is gone, or of another evaluation, killed before its receipt
                run.write_json(EVALUATION, result)
            self._console.skipped(name, _about_evaluation(result))
        else:
            if recipe.can_be_decoded and recipe.evaluate.prompts:
                recipe.check_decodable()
            self._check_scorer()
            with self._stage(name) as bar:
                self._cluster()
                result = evaluate(recipe, run, fan_out, bar.update)
            run.write_json(EVALUATION, result)
            self._receipts.write(name, inputs, result)
            self._console.done(name, _about_evaluation(result), self._took)
            self._events.add(name, "done", nelbo=result["nelbo"], standard_error=result["standard_error"])
        for measure, told in lines(result):
            self._console.print(f"    {measure:<11} {escape(told)}")
        return result

    def serve(self) -> list[dict[str, Any]]:
        """Bundle -> endpoint -> answers, and the endpoint is stopped again. Nothing where there is no decoder."""
        recipe, run, name = self.target.recipe, self.target.run, "serve"
        if not recipe.can_be_decoded:
            self._console.left_out(name, "there is no decoder for such a model yet")
            return []
        inputs = self._serve_inputs()
        found = self._receipts.read(name, inputs)
        if found is not None:
            self._console.skipped(name, f"{len(found['answers'])} examples answered")
            answers: list[dict[str, Any]] = found["answers"]
        else:
            with self._stage(name) as bar:
                self._cluster()
                answers = demonstrate(recipe, run, bar)
            self._receipts.write(name, inputs, {"answers": answers})
            self._console.done(name, f"{len(answers)} examples answered, endpoint stopped", self._took)
            self._events.add(name, "done", examples=len(answers))
        for answer in answers:
            shown = f"[dim]{_line(answer['prompt'])}[/dim][bold]{_line(answer['text'])}[/bold]"
            shown += f"[dim]{_line(answer['suffix'] or '')}[/dim]"
            cost = f"{answer['num_tokens']} tokens in {answer['num_calls']} calls"
            self._console.print(
                f"    {shown}\n    [cyan]{cost}: {answer['tokens_per_call']:.2f} tokens per call[/cyan]"
            )
        return answers

    def report(self) -> str:
        """All figures -> report.html."""
        run = self.target.run
        url = f"{run.url}/report.html"
        receipts = [run.read_json(f"stages/{stage}.json") for stage in ("train", "bundle", "evaluate", "serve")]
        inputs = fingerprint(receipts)
        if self._receipts.read("report", inputs) is None or not run.store.exists(run.key("report.html")):
            with self._stage("report") as bar:
                bar.update("drawing")
                write_report(self.target.recipe, run)
            self._receipts.write("report", inputs, {})
            self._console.done("report", escape(url), self._took)
        else:
            self._console.skipped("report", escape(url))
        return url

    def _check_decoding(self) -> None:
        """Refuse a decode section and examples that the model cannot be asked before anything is started."""
        recipe = self.target.recipe
        recipe.check_decodable()
        for number, example in enumerate(recipe.serve.examples):
            if example.suffix and recipe.decoding_pattern.kind != "full":
                raise ConfigError(f"serve.examples.{number}.suffix", NO_SUFFIX, example.suffix, "leave it out")

    def _check_examples(self) -> None:
        """Refuse an example that leaves no room for its answer now, not after minutes of training."""
        store, recipe = self.target.run.store, self.target.recipe
        tokenizer = read_tokenizer(store, read_manifest(store, self.target.corpus))
        for number, example in enumerate(recipe.serve.examples):
            given = len(tokenizer.encode(example.prompt)) + len(tokenizer.encode(example.suffix or ""))
            room = recipe.packing.seq_len - given
            if room < (example.max_tokens or 1):
                problem = f"its {given} tokens leave {max(room, 0)} of packing.seq_len={recipe.packing.seq_len}"
                raise ConfigError(f"serve.examples.{number}.prompt", problem, example.prompt, "shorten it")

    def _check_scorer(self) -> None:
        """Refuse another run as a scorer that does not fit now, not after minutes of training."""
        store, section = self.target.run.store, self.target.recipe.evaluate.samples
        if section.rows and isinstance(section.scorer, AutoregressiveScorerConfig):
            tokenizer = read_tokenizer(store, read_manifest(store, self.target.corpus))
            context = self.target.recipe.packing.seq_len
            check_scorer(read_bundle(RunDir.at(section.scorer.run)), tokenizer.digest, context)

    def _check_room(self, needed: int) -> None:
        """Refuse a disk on which what is still to be made will not fit, before anything is started."""
        if needed:
            self.target.plan.store.check_writable("storage.root", needed)

    def _corpus_bytes(self) -> int:
        return 0 if self.target.plan.is_made else self.target.plan.bytes_needed

    def _training_bytes(self) -> int:
        run = self.target.run
        if self._trained() is not None:
            return 0
        return checkpoint_bytes(self.target.recipe, sum(item.size for item in run.store.list(run.key(CHECKPOINTS))))

    def _trained(self) -> dict[str, Any] | None:
        """What the finished training reported."""
        result = self._receipts.read("train", self.target.run.name)
        return result if result is not None and final_step(self.target.run) == result["step"] else None

    def _bundle_identity(self) -> Any:
        run = self.target.run
        values = run.read_json("bundle/bundle.json")
        return {name: value for name, value in values.items() if name not in {"decode", "sha256"}}

    def _serve_inputs(self) -> str:
        recipe = self.target.recipe
        return fingerprint([self._bundle_identity(), recipe.decode, recipe.seed, list(recipe.serve.examples)])

    def _serve_missing(self) -> bool:
        if not self.target.recipe.can_be_decoded:
            return False
        if self.target.run.read_json("bundle/bundle.json") is None:
            return True
        return self._receipts.read("serve", self._serve_inputs()) is None

    @contextlib.contextmanager
    def _stage(self, name: str) -> Iterator[Any]:
        self._events.add(name, "started")
        begun = time.monotonic()
        try:
            with self._console.stage(name) as bar:
                yield bar
        except BaseException as error:
            self._console.stopped(name)
            with contextlib.suppress(OSError):  # a disk that is full may be what ended it
                self._events.add(name, "failed", error=f"{type(error).__name__}: {error}")
            raise
        finally:
            self._took = time.monotonic() - begun

    def _cluster(self) -> None:
        if self._has_cluster:
            return
        placement = self.target.recipe.placement
        training = placement.train.workers * placement.train.cpus_per_worker
        gpus = max(
            placement.train.workers * placement.train.gpus_per_worker,
            placement.evaluate.gpus_per_worker,
            gpus_needed(self.target.recipe),
        )
        self._stack.enter_context(ray_cluster(max(training, cpus_needed(self.target.recipe)), gpus))
        self._has_cluster = True


def _about_corpus(manifest: CorpusManifest) -> str:
    count = manifest.accounting
    return (
        f"{count.documents_in:,} documents, {manifest.train.tokens:,} + {manifest.heldout.tokens:,} held-out tokens, "
        f"vocabulary {manifest.vocab_size:,}, {len(manifest.noise_epochs)} epochs of noise"
        + (f", [yellow]{count.num_quarantined:,} bad records in quarantine[/yellow]" if count.num_quarantined else "")
    )


def _about_training(result: dict[str, Any], recipe: Recipe) -> str:
    if "loss" not in result:
        return f"step {result['step']}"
    unit = "a pair" if isinstance(recipe.objective, PreferenceConfig) else "nats/token"
    return f"step {result['step']:,}, {result['tokens']:,} tokens, loss {result['loss']:.2f} {unit}"


def _about_evaluation(result: dict[str, Any]) -> str:
    entropy = f"unigram entropy {result['unigram_entropy']:.3f}"
    if result["nelbo"] is None:
        text = f"a masked language model has no likelihood; {entropy}"
    else:
        name = "negative log-likelihood" if result["estimator"] == "exact" else "NELBO"
        figure = f"{shown_nats(result)} nats/token"
        text = f"held-out {name} {figure}, {entropy}: [bold]{_gain(result['gain'])}[/bold]"
    decoding = result["decoding"]
    if decoding is not None:
        text += f"; {decoding['tokens_per_call']:.2f} tokens per call ({about_policy(decoding)})"
    return text


def _gain(nats: float) -> str:
    return f"{nats:.2f} below" if nats > 0 else f"{-nats:.2f} above, nothing was learned"


def _line(text: str) -> str:
    """Text in one line, its brackets not taken for markup."""
    return escape(text.replace("\n", " ⏎ "))
