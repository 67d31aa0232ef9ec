"""What the laws of the noise are proven on: a vocabulary so small that every text and every noise can be listed.

The kernels here are written from the papers' definitions, apart from the product's code.
"""

import itertools

import numpy as np
from hypothesis import strategies as st

from dllm_core.noise.absorbing import AbsorbingProcess
from dllm_core.noise.hybrid import HybridProcess
from dllm_core.noise.schedule import CosineSchedule, LinearSchedule, LogLinearSchedule, PolynomialSchedule
from dllm_core.noise.uniform import UniformProcess

VOCAB, MASK = 4, 1  # the mask stands among the text ids, so that a replacement has to step over it
TEXT = np.array([0, 2, 3])
IDS = np.arange(VOCAB)

SCHEDULES = {
    "linear": LinearSchedule(),
    "cosine": CosineSchedule(),
    "log_linear": LogLinearSchedule(eps=0.03),
    "square": PolynomialSchedule(exponent=2),
    "root": PolynomialSchedule(exponent=0.6),
}


def bound_processes(schedule, mask_id=MASK, vocab_size=VOCAB):
    """One process of each kind, two hybrids among them, over a vocabulary."""
    known = {"mask_id": mask_id, "schedule": schedule}
    return {
        "absorbing": AbsorbingProcess(**known),
        "uniform": UniformProcess(**known, vocab_size=vocab_size),
        "hybrid": HybridProcess(**known, vocab_size=vocab_size, p_u=0.3, gamma=1),
        "steep_hybrid": HybridProcess(**known, vocab_size=vocab_size, p_u=0.1, gamma=2),
    }


PROCESSES = {
    f"{kind}-{name}": process
    for name, schedule in SCHEDULES.items()
    for kind, process in bound_processes(schedule).items()
}
REPLACING = {name: process for name, process in PROCESSES.items() if process.replaces}


@st.composite
def any_process(draw):
    """A process of any kind with any schedule and any parameters."""
    schedule = draw(
        st.one_of(
            st.just(LinearSchedule()),
            st.just(CosineSchedule()),
            st.builds(LogLinearSchedule, eps=st.floats(1e-4, 0.5)),
            st.builds(PolynomialSchedule, exponent=st.floats(0.4, 5)),
        )
    )
    processes = bound_processes(schedule)
    kind = draw(st.sampled_from(["absorbing", "uniform", "hybrid"]))
    if kind != "hybrid":
        return processes[kind]
    parameters = {"p_u": draw(st.floats(0, 0.95)), "gamma": draw(st.floats(0.2, 2))}
    return processes[kind].model_copy(update=parameters)


def kernel(process, t):
    """q(xt | x0) as matrices [... V V], rows x0, of times [...]; the mask's own row is no text's."""
    alpha = np.asarray(process.schedule.alpha(np.asarray(t, np.float64)))[..., None, None]
    to_mask, to_text, stay = np.eye(VOCAB)[MASK], (IDS != MASK) / len(TEXT), np.eye(VOCAB)
    if isinstance(process, HybridProcess):  # GIDD with its t = 1 - alpha
        b = 2**process.gamma * process.p_u / (1 - process.p_u)
        c = b * (1 - alpha) ** (process.gamma / 2) * alpha ** (process.gamma / 2)
        return (alpha * stay + (1 - alpha) * to_mask + c * to_text) / (1 + c)
    return alpha * stay + (1 - alpha) * (to_text if isinstance(process, UniformProcess) else to_mask)


def one_hot(ids):
    """Laws [... V] that are sure of ids [...]."""
    return np.eye(VOCAB)[ids]


def some_log_probs(shape, seed, spread=1.5):
    """Random log-laws [*shape V] over the text ids."""
    logits = np.random.default_rng(seed).normal(0, spread, (*shape, VOCAB))
    logits[..., MASK] = -np.inf
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


def quadrature(start, nodes=181, reach=3.2):
    """Nodes and weights of tanh-sinh integration over (start, 1): both ends may be singular."""
    y = np.linspace(-reach, reach, nodes)
    spread = np.pi * np.sinh(y)
    inside = 1 / (1 + np.exp(-spread))
    weights = (y[1] - y[0]) * np.pi * np.cosh(y) * inside / (1 + np.exp(spread))
    return start + (1 - start) * inside, (1 - start) * weights


def texts(length):
    """Every text of so many tokens, [N^length length]."""
    return np.array(list(itertools.product(TEXT, repeat=length)))


def canvases(length):
    """Every noised row of so many tokens, masks among them, [V^length length]."""
    return np.array(list(itertools.product(IDS, repeat=length)))
