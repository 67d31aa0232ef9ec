"""Noise that replaces tokens, run backwards: the engine's answers have the law of the reverse chain, listed whole.

Kernels, posteriors and the denoiser that knows a law of texts follow their definitions, apart from the product.
"""

import itertools
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import draws
from hypothesis import given, settings
from hypothesis import strategies as st
from rows import EOS, MASK, PAD, VOCABULARY, new_denoiser, requests

from dllm_core.decoding.config import DecodeConfig
from dllm_core.decoding.engine import Engine
from dllm_core.decoding.request import Request
from dllm_core.noise.hybrid import HybridProcess
from dllm_core.noise.interpolating import InterpolatingProcess
from dllm_core.noise.schedule import CosineSchedule
from dllm_core.noise.uniform import UniformProcess

pytestmark = pytest.mark.usefixtures("one_thread")
V, LENGTH, WORDS = 5, 3, np.array([3, 4])  # mask, end and padding are 0, 1, 2: noise may be the latter two, text not
TEXTS = np.array(list(itertools.product(WORDS, repeat=LENGTH)))
CANVASES = np.array(list(itertools.product(range(V), repeat=LENGTH)))
OF_TEXT = np.array([np.flatnonzero((text == CANVASES).all(1))[0] for text in TEXTS])
LAW = np.array([0.27, 0.02, 0.05, 0.16, 0.03, 0.2, 0.17, 0.1])
PROCESSES = {
    "uniform": UniformProcess(mask_id=MASK, vocab_size=V),
    "uniform-cosine": UniformProcess(mask_id=MASK, vocab_size=V, schedule=CosineSchedule()),
    "hybrid": HybridProcess(mask_id=MASK, vocab_size=V, p_u=0.4, gamma=1),
}
EVERY_PROCESS = pytest.mark.parametrize("name", PROCESSES)
GIVEN = pytest.mark.parametrize(("prompt", "suffix"), [((), ()), ((4,), ()), ((), (3,))], ids=["all", "prompt", "hole"])


def kernel(process: InterpolatingProcess, t: float) -> np.ndarray:
    """q(xt | x0) [V V] from the papers' definitions."""
    alpha = float(process.schedule.alpha(np.float64(t)))
    to_text, stay = (np.arange(V) != MASK) / (V - 1), np.eye(V)
    if isinstance(process, HybridProcess):
        c = 2**process.gamma * process.p_u / (1 - process.p_u) * (alpha * (1 - alpha)) ** (process.gamma / 2)
        return (alpha * stay + (1 - alpha) * stay[MASK] + c * to_text) / (1 + c)
    return alpha * stay + (1 - alpha) * to_text


class Oracle:
    """A denoiser that is told t: p(x0_i | all other tokens of xt), where the given positions are clean."""

    device = torch.device("cpu")
    config = SimpleNamespace(
        model=SimpleNamespace(time_conditioning=True, shifted=False),
        vocab_size=V,
        context_length=LENGTH,
        mask_id=MASK,
        eos_id=EOS,
        pad_id=PAD,
    )

    def __init__(self, process: InterpolatingProcess, is_given: np.ndarray) -> None:
        self._process, self._is_given = process, is_given
        self._laws: dict[float, np.ndarray] = {}

    def laws(self, t: float) -> np.ndarray:
        """Of every canvas and position [canvases L V]."""
        if t not in self._laws:
            noised = kernel(self._process, t)
            seen = np.stack([np.eye(V)[:, :] if clean else noised for clean in self._is_given])
            evidence = seen[np.arange(LENGTH), TEXTS[:, None], CANVASES[None]]  # [texts canvases L]
            laws = np.zeros((len(CANVASES), LENGTH, V))
            for i in range(LENGTH):
                weight = LAW[:, None] * np.delete(evidence, i, axis=2).prod(2)
                for word in WORDS:
                    laws[:, i, word] = weight[TEXTS[:, i] == word].sum(0)
            with np.errstate(invalid="ignore"):  # a canvas that cannot be: no text agrees with what is given
                self._laws[t] = laws / laws.sum(-1, keepdims=True)
        return self._laws[t]

    def __call__(
        self, ids: torch.Tensor, is_real: torch.Tensor, read: torch.Tensor, *, t: torch.Tensor, **_: object
    ) -> torch.Tensor:
        [time] = set(t.tolist())
        code = ids[:, :LENGTH].numpy() @ V ** np.arange(LENGTH)[::-1]
        laws = self.laws(time)[code]
        return torch.from_numpy(np.log(laws.clip(1e-300))[read // ids.shape[1], read % ids.shape[1]])


def chain_law(
    process: InterpolatingProcess, oracle: Oracle, is_given: np.ndarray, text: tuple, steps: int
) -> np.ndarray:
    """The law over texts of `steps` steps of the reverse chain, by enumeration of all canvases."""
    law = np.ones(len(CANVASES))
    prior = np.eye(V)[MASK] if isinstance(process, HybridProcess) else (np.arange(V) != MASK) / (V - 1)
    for i in range(LENGTH):
        law *= np.eye(V)[text[i]][CANVASES[:, i]] if is_given[i] else prior[CANVASES[:, i]]
    for k in range(steps, 0, -1):
        early, late = kernel(process, (k - 1) / steps), kernel(process, k / steps)
        into = np.linalg.solve(early, late)  # q(xt | xs)
        moves = np.ones((len(CANVASES), len(CANVASES)))
        for i in range(LENGTH):
            if is_given[i]:
                moves *= CANVASES[:, i][:, None] == CANVASES[:, i]
                continue
            p = np.nan_to_num(oracle.laws(float(np.float32(k / steps)))[:, i])
            joint = (p @ early) * into[:, CANVASES[:, i]].T
            total = joint.sum(1, keepdims=True)
            step = np.divide(joint, total, out=np.zeros_like(joint), where=total > 0)
            moves *= step[:, CANVASES[:, i]]
        law = law @ moves
    assert law[OF_TEXT].sum() == pytest.approx(1, abs=1e-6)
    return law[OF_TEXT]


def setting(name: str, prompt: tuple, suffix: tuple) -> tuple[InterpolatingProcess, Oracle, np.ndarray, tuple]:
    middle = LENGTH - len(prompt) - len(suffix)
    is_given = np.array([True] * len(prompt) + [False] * middle + [True] * len(suffix))
    text = (*prompt, *[MASK] * middle, *suffix)
    return PROCESSES[name], Oracle(PROCESSES[name], is_given), is_given, text


def counts(
    process: InterpolatingProcess, oracle: Oracle, prompt: tuple, suffix: tuple, steps: int, rows: int
) -> np.ndarray:
    """How often each text is answered."""
    config = DecodeConfig(temperature=1, steps=steps, max_tokens=LENGTH - len(prompt) - len(suffix))
    engine = Engine.over(oracle, process, max_batch_tokens=1 << 20, max_rows=rows, is_ancestral=True)
    answers = engine.generate([Request(prompt, config, suffix, seed) for seed in range(rows)])
    assert {answer.num_calls for answer in answers} == {steps}
    texts = np.array([(*prompt, *answer.tokens, *suffix) for answer in answers])
    found = (texts[:, None] == TEXTS).all(2)
    assert found.any(1).all()
    return found.sum(0)


def assert_fits(found: np.ndarray, law: np.ndarray) -> None:
    """Chi-square, exceeded once in 100,000 (Wilson and Hilferty, PNAS 1931)."""
    possible = law > 0
    expected, freedom = found.sum() * law[possible], possible.sum() - 1
    assert not found[~possible].any()
    limit = freedom * (1 - 2 / (9 * freedom) + 4.265 * (2 / (9 * freedom)) ** 0.5) ** 3
    assert ((found[possible] - expected) ** 2 / expected).sum() < limit


@EVERY_PROCESS
@GIVEN
@pytest.mark.parametrize("steps", [1, 3])
def test_answers_have_the_law_of_the_reverse_chain(name, prompt, suffix, steps):
    process, oracle, is_given, text = setting(name, prompt, suffix)
    expected = chain_law(process, oracle, is_given, text, steps)
    assert_fits(counts(process, oracle, prompt, suffix, steps, rows=draws(2000)), expected)


def truth(is_given: np.ndarray, text: tuple) -> np.ndarray:
    law = LAW * (text == TEXTS)[:, is_given].all(1)
    return law / law.sum()


@EVERY_PROCESS
@GIVEN
def test_the_reverse_chain_of_an_exact_oracle_comes_to_its_law_as_steps_grow(name, prompt, suffix):
    process, oracle, is_given, text = setting(name, prompt, suffix)
    law = truth(is_given, text)
    gaps = [abs(chain_law(process, oracle, is_given, text, n) - law).sum() / 2 for n in (16, 64, 256)]
    assert gaps[0] > 2 * gaps[1] > 4 * gaps[2]
    # All positions move at once, each by itself: an error of 1 / steps. Hybrid noise grows like a root at both ends.
    assert gaps[2] < (0.02 if name == "hybrid" else 0.0035)


@pytest.mark.parametrize(
    ("name", "steps"),
    [
        ("uniform", 64),
        pytest.param("uniform-cosine", 64, marks=pytest.mark.long),
        pytest.param("hybrid", 1024, marks=pytest.mark.long),
    ],
)
@GIVEN
def test_ancestral_decoding_of_an_exact_oracle_returns_the_law(name, steps, prompt, suffix):
    """In steps enough that 500 rows do not tell the chain's error."""
    process, oracle, is_given, text = setting(name, prompt, suffix)
    assert_fits(counts(process, oracle, prompt, suffix, steps, rows=500), truth(is_given, text))


def test_the_first_step_draws_apart_from_the_canvas_that_it_starts_from():
    process, oracle, _, _ = setting("uniform", (), ())
    engine = Engine.over(oracle, process, max_batch_tokens=1 << 20, max_rows=2000, is_ancestral=True)
    for seed in range(2000):
        engine.add(Request((), DecodeConfig(temperature=1, steps=1, max_tokens=LENGTH), (), seed))
    noise = [state.canvas[0] for _, state in engine._waiting]
    words = [update.state.canvas[0] for update in engine.step()]
    found = np.histogram2d(noise, words, bins=[[1, 2, 3, 4, 5], [3, 4, 5]])[0]
    first = LAW[TEXTS[:, 0] == WORDS[0]].sum()
    assert_fits(found.ravel(), np.outer(np.full(V - 1, 1 / (V - 1)), [first, 1 - first]).ravel())


@pytest.fixture(scope="module", params=[False, True], ids=["untold", "timed"])
def denoiser(request):
    return new_denoiser(is_tied=False, time_conditioning=request.param)


NOISES = [
    UniformProcess(mask_id=MASK, vocab_size=VOCABULARY),
    HybridProcess(mask_id=MASK, vocab_size=VOCABULARY, p_u=0.3, gamma=1),
]
some_steps = st.integers(1, 9)


@st.composite
def stepped(draw: st.DrawFn) -> Request:
    request = draw(requests(guidance=False))
    config = request.config.model_copy(update={"steps": draw(some_steps)})
    return Request(request.prompt, config, request.suffix, request.seed)


@settings(max_examples=draws(40), deadline=None)
@given(batch=st.lists(stepped(), min_size=2, max_size=7), process=st.sampled_from(NOISES))
def test_a_row_gets_the_same_tokens_alone_and_in_a_batch(denoiser, batch, process):
    """Rows at different times among them."""
    together = Engine.over(denoiser, process, 300, is_ancestral=True).generate(batch)
    assert together == [Engine.over(denoiser, process, 300, is_ancestral=True).generate([one])[0] for one in batch]


@settings(max_examples=draws(40), deadline=None)
@given(request=stepped(), process=st.sampled_from(NOISES))
def test_what_is_given_is_never_noised_and_nothing_is_told_before_the_last_step(denoiser, request, process):
    one = Engine.over(denoiser, process, is_ancestral=True)
    one.add(request)
    for call in range(1, request.config.steps + 1):
        [update] = one.step()
        state = update.state
        assert tuple(state.canvas[: len(request.prompt)]) == request.prompt
        assert tuple(state.canvas[state.canvas_stop :]) == request.suffix
        if call < request.config.steps:
            assert not len(update.committed)
            assert state.answer(EOS) == []
    assert one.step() == []
    assert state.finish_reason is not None
    assert not {MASK, PAD} & set(state.canvas[state.block].tolist())
    assert len(update.committed) == request.config.max_tokens
    assert ((update.confidence > 0) & (update.confidence <= 1 + 1e-6)).all()
    if request.suffix:
        assert EOS not in state.answer(EOS)
        assert len(state.answer(EOS)) == request.config.max_tokens


@pytest.mark.parametrize("process", NOISES, ids=["uniform", "hybrid"])
def test_at_temperature_0_the_last_step_takes_the_likeliest_token_of_a_canvas_of_noise(denoiser, process):
    config = DecodeConfig(steps=1, max_tokens=12)
    request = Request((5, 6), config, seed=3)
    one = Engine.over(denoiser, process, is_ancestral=True)
    one.add(request)
    canvas = one._waiting[0][1].canvas.copy()
    assert MASK not in canvas[2:] or isinstance(process, HybridProcess)
    [update] = one.step()
    t = {"t": torch.ones(1)} if denoiser.config.model.time_conditioning else {}
    with torch.no_grad():
        logits = denoiser(torch.from_numpy(canvas)[None], **t)[0, 2:]
    logits[:, [MASK, PAD]] = -torch.inf
    assert update.state.canvas[2:].tolist() == logits.argmax(-1).tolist()
    np.testing.assert_allclose(update.confidence, 1)
