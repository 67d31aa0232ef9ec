"""Fifty steps of a small run as they once were: a change of data, noise, model, objective or optimizer shows here.

One that is meant writes the curve anew: python tests/unit/training/test_golden_losses.py
"""

import json
import sys
import tempfile
from pathlib import Path

import pytest

sys.path += [str(Path(__file__).parent), str(Path(__file__).parents[2])]  # when it is run as a script
from conftest import SmallCorpus, make_small_corpus
from trainers import make_trainer, run_dir

from dllm_core.checkpoints.store import CheckpointStore

CURVE = Path(__file__).parents[2] / "golden" / "losses.json"
FIELDS = ("loss", "bound", "grad_norm", "learning_rate", "tokens")


def curve(corpus: SmallCorpus, root: Path) -> dict[str, list[float]]:
    fields = {"steps": 50, "log_every": 1, "checkpoint_every": 99, "precision": "fp32"}
    trainer, _, told = make_trainer(corpus, CheckpointStore(run_dir(root, "golden")), **fields)
    trainer.run()
    return {name: [getattr(record, name) for record in told.records] for name in FIELDS}


@pytest.mark.usefixtures("one_thread")
def test_the_losses_are_those_that_were_written_down(small_corpus, tmp_path):
    golden, found = json.loads(CURVE.read_text()), curve(small_corpus, tmp_path)
    for name in FIELDS:
        assert found[name] == pytest.approx(golden[name], rel=1e-3), name  # other processors round otherwise


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as scratch:
        told = curve(make_small_corpus(Path(scratch, "corpus")), Path(scratch))
    CURVE.parent.mkdir(exist_ok=True)
    CURVE.write_text(json.dumps({name: [float(f"{x:.7g}") for x in told[name]] for name in FIELDS}) + "\n")
