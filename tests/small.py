"""What the laws of the objectives are proven on: three or four tokens of text, and a denoiser that knows their law."""

import itertools
from collections.abc import Callable
from functools import lru_cache

import numpy as np
import torch

from dllm_core.data.batch import Batch
from dllm_core.model.config import DenoiserConfig, ModelConfig
from dllm_core.model.denoiser import Denoiser
from dllm_core.model.pattern import FULL, AttentionPattern
from dllm_core.noise.absorbing import AbsorbingProcess
from dllm_core.noise.hybrid import HybridProcess
from dllm_core.noise.interpolating import InterpolatingProcess
from dllm_core.noise.schedule import CosineSchedule, PolynomialSchedule
from dllm_core.noise.uniform import UniformProcess
from dllm_core.objective.autoregressive import Autoregressive
from dllm_core.objective.config import (
    AutoregressiveConfig,
    BlockDiffusionConfig,
    DiffusionConfig,
    DiffusionOptions,
    MaskedLMConfig,
)
from dllm_core.objective.diffusion import Diffusion
from dllm_core.objective.loss import LossSum, Objective
from dllm_core.objective.masked_lm import MaskedLM

CPU = torch.device("cpu")
VOCAB, MASK = 4, 1  # the mask stands among the text ids
TEXT = np.array([0, 2, 3])
LINEAR = AbsorbingProcess(mask_id=MASK)
PROCESSES: dict[str, InterpolatingProcess] = {
    "absorbing": LINEAR,
    "absorbing-cosine": AbsorbingProcess(mask_id=MASK, schedule=CosineSchedule()),
    "absorbing-square": AbsorbingProcess(mask_id=MASK, schedule=PolynomialSchedule(exponent=2)),
    "uniform": UniformProcess(mask_id=MASK, vocab_size=VOCAB),
    "uniform-cosine": UniformProcess(mask_id=MASK, vocab_size=VOCAB, schedule=CosineSchedule()),
    "hybrid": HybridProcess(mask_id=MASK, vocab_size=VOCAB, p_u=0.2, gamma=1),
}
ABSORBING = {name: process for name, process in PROCESSES.items() if not process.replaces}


def batch_of(x0: np.ndarray, xt: np.ndarray, t: np.ndarray | float, **others: np.ndarray) -> Batch:
    """Rows that all count, unless `others` says more."""
    times = np.broadcast_to(np.asarray(t, np.float32), x0.shape)
    known = {"loss_mask": np.ones(x0.shape, bool), "counters": np.arange(len(x0))}
    return Batch(x0=x0, xt=xt, t=times.copy(), **{**known, **others})


def rows_at(batch: Batch, rows: slice) -> Batch:
    fields = {name: value if value is None else value[rows] for name, value in vars(batch).items()}
    return Batch(**fields)


def new_denoiser(seed: int = 0, vocab_size: int = VOCAB, **sizes: object) -> Denoiser:
    model = ModelConfig(**{"dim": 16, "layers": 2, "heads": 2, "ffn_dim": 24, "tie_embeddings": False, **sizes})
    config = DenoiserConfig(
        model=model, vocab_size=vocab_size, context_length=32, mask_id=MASK, eos_id=0, pad_id=vocab_size - 1
    )
    torch.manual_seed(seed)
    denoiser = Denoiser(config).eval()
    torch.nn.init.normal_(denoiser.head.weight, std=0.6)
    return denoiser


def diffusion(process: InterpolatingProcess = LINEAR, block_length: int | None = None, **options: object) -> Diffusion:
    steps, t_min = options.pop("steps", None), options.pop("t_min", 0.0)
    timed = options.pop("time_conditioning", False)
    kind: type[DiffusionOptions] = DiffusionConfig if block_length is None else BlockDiffusionConfig
    return Diffusion(
        kind(**options), process, CPU, block_length=block_length, steps=steps, t_min=t_min, time_conditioning=timed
    )


def autoregressive(**options: object) -> Autoregressive:
    return Autoregressive(AutoregressiveConfig(**options), MASK, CPU)


def masked_lm(vocab_size: int = VOCAB, seed: int = 0, **options: object) -> MaskedLM:
    return MaskedLM(MaskedLMConfig(**options), MASK, vocab_size, CPU, seed=seed)


def every_objective() -> dict[str, Objective]:
    """Each kind under each normalization and weight."""
    uniform, hybrid = PROCESSES["uniform"], PROCESSES["hybrid"]
    found: dict[str, Objective] = {"masked_lm": masked_lm(rate=0.5)}
    for normalize in ("tokens", "noised", "answer"):
        found[f"diffusion-{normalize}"] = diffusion(normalize=normalize)
        found[f"blocks-{normalize}"] = diffusion(block_length=2, normalize=normalize)
        found[f"complementary-{normalize}"] = diffusion(complementary=True, normalize=normalize)
        found[f"context-{normalize}"] = diffusion(weight="context", normalize=normalize)
        found[f"uniform-{normalize}"] = diffusion(uniform, normalize=normalize)
        found[f"hybrid-blocks-{normalize}"] = diffusion(hybrid, 2, normalize=normalize)
        found[f"uniform-chain-{normalize}"] = diffusion(uniform, steps=4, normalize=normalize)
    found["plain"] = diffusion(weight="none", normalize="noised")
    found["clipped"] = diffusion(max_weight=3)
    for normalize in ("tokens", "answer"):
        found[f"autoregressive-{normalize}"] = autoregressive(normalize=normalize)
    return found


def cost(objective: Objective, denoiser: Callable[..., torch.Tensor], *batch: object, **others: object) -> float:
    """Nats of a batch before anything is divided, fp32."""
    return float(objective.loss(denoiser, batch_of(*batch, **others)).nats)


def texts(length: int, of: np.ndarray = TEXT) -> np.ndarray:
    return np.array(list(itertools.product(of, repeat=length)))


def kernel(process: InterpolatingProcess, t: float) -> np.ndarray:
    """q(xt | x0) [V V] from the papers' definitions, apart from the product's code."""
    alpha = float(process.schedule.alpha(np.float64(t)))
    to_text, stay = np.isin(np.arange(VOCAB), TEXT) / len(TEXT), np.eye(VOCAB)
    if isinstance(process, HybridProcess):
        c = 2**process.gamma * process.p_u / (1 - process.p_u) * (alpha * (1 - alpha)) ** (process.gamma / 2)
        return (alpha * stay + (1 - alpha) * stay[MASK] + c * to_text) / (1 + c)
    return alpha * stay + (1 - alpha) * (to_text if isinstance(process, UniformProcess) else stay[MASK])


def nodes(number: int = 12, start: float = 0.0) -> list[tuple[float, float]]:
    """Times and weights of Gauss-Legendre quadrature over (start, 1): exact for what is a polynomial in t."""
    t, weights = np.polynomial.legendre.leggauss(number)
    return list(zip(start + (1 - start) * (t + 1) / 2, (1 - start) * weights / 2, strict=True))


def smooth_nodes(number: int) -> list[tuple[float, float]]:
    """Over (0, 1) with t = sin^2(pi s/2), for rates that grow like a root at the ends."""
    angles = [(np.pi / 2 * s, weight) for s, weight in nodes(number)]
    return [(np.sin(angle) ** 2, weight * np.pi / 2 * np.sin(2 * angle)) for angle, weight in angles]


def expected(
    objective: Objective,
    denoiser: Callable[..., torch.Tensor],
    process: InterpolatingProcess,
    text: np.ndarray,
    times: list[tuple[float, float]],
    of: Callable[[LossSum], float] = lambda loss: float(loss.nats),
) -> float:
    """E over t of `times` and every xt of a text's cost."""
    total, x0 = 0.0, text[None]
    canvases = texts(len(text), np.arange(VOCAB))
    for t, weight in times:
        t = float(np.float32(t))
        chances = kernel(process, t)[text, canvases].prod(1)
        for xt, chance in zip(canvases, chances, strict=True):
            if chance > 0:
                total += weight * chance * of(objective.loss(denoiser, batch_of(x0, xt[None], t)))
    return total


class Oracle:
    """A denoiser that knows a law over texts: p(x0_i | what it is shown), for masks, under every pattern."""

    def __init__(self, length: int, seed: int = 0, of: np.ndarray = TEXT) -> None:
        self.texts = texts(length, of)
        law = np.random.default_rng(seed).dirichlet(np.full(len(self.texts), 0.5)).clip(1e-3)
        self.law = law / law.sum()
        self._known = lru_cache(maxsize=None)(self._posterior)

    def _posterior(self, position: int, *evidence: int) -> torch.Tensor:
        fits = np.ones(len(self.texts), bool)
        for place, token in enumerate(evidence):
            fits &= (token == MASK) | (self.texts[:, place] == token)
        of_token = np.bincount(self.texts[fits, position], self.law[fits], minlength=VOCAB)
        return torch.from_numpy(np.log(of_token.clip(1e-300) / of_token.sum())).float()

    def __call__(
        self, ids: torch.Tensor, *, read: torch.Tensor, pattern: AttentionPattern = FULL, **ignored: object
    ) -> torch.Tensor:
        laws = []
        for row, i in read.nonzero().tolist():
            length = read.shape[1]
            shown = ids[row].tolist()
            if pattern.kind == "causal":
                evidence = [shown[j + 1] if j < i else MASK for j in range(length)]
            elif pattern.has_clean_half:
                own = i // pattern.block_length
                blocks = [j // pattern.block_length for j in range(length)]
                noised, clean = shown[:length], shown[length:]
                evidence = [clean[j] if blocks[j] < own else MASK for j in range(length)]
                evidence = [noised[j] if blocks[j] == own else evidence[j] for j in range(length)]
            else:
                evidence = shown
            laws.append(self._known(i, *evidence))
        return torch.stack(laws) if laws else torch.empty(0, VOCAB)


class Recorded:
    """Another denoiser, and all that it was asked."""

    def __init__(self, denoiser: Callable[..., torch.Tensor]) -> None:
        self._denoiser = denoiser
        self.asked: list[tuple[np.ndarray, np.ndarray, torch.Tensor]] = []

    def __call__(self, ids: torch.Tensor, **options: object) -> torch.Tensor:
        logits = self._denoiser(ids, **options)
        self.asked.append((ids.numpy(), options["read"].numpy(), logits.detach()))
        return logits
