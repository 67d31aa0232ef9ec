"""The bound of a chain of T steps: nothing is integrated, so it is exact for decoding in T calls too.

    -log p(x0) <= E sum over i of step_nats(x at i/T, s = (i - 1)/T, t = i/T) + terminal_nats

The first step (s = 0) is the reconstruction term: its posterior is the law of x0 itself. As T grows the sum becomes the
integral of `nelbo_rate`. D3PM, arXiv:2107.03006, eq. 1; MDLM, arXiv:2406.07524, section 3.
"""

from dllm_core.noise.arrays import Array, array_namespace, cast, widened
from dllm_core.noise.interpolating import LEAST, InterpolatingProcess, divergence, log_odds, log_ratio
from dllm_core.noise.law import Law, law_of


def snapped(t: Array, steps: int) -> Array:
    """The end (floor(t T) + 1) / T of the step that t lies in; t = 1 belongs to the last one."""
    xp = array_namespace(t)
    return cast(xp.clip(xp.floor(widened(t) * steps) + 1, None, steps) / steps, t)


def step_nats(process: InterpolatingProcess, law: Array | Law, x0: Array, xt: Array, s: Array, t: Array) -> Array:
    """KL(q(xs | xt, x0) || p(xs | xt)) [...] for s < t, where p is `posterior` of the denoiser's law [... V].

    law: as `nelbo_rate` takes it. Both share q(xt | xs), so what is left are the log-ratios of the marginals at s and,
    at xt, t. Differences of nats: float32 holds a step of 1/T to about T 1e-7 of its size.
    """
    xp, law = array_namespace(x0), law_of(law)
    num_text = law.num_text
    early, late = process.mixture(s), process.mixture(t)
    step = late.since(early)
    is_mask, is_clean = xt == process.mask_id, xt == x0
    before, after = (
        xp.where(is_mask, weights.mask, weights.text / num_text) + xp.where(is_clean, weights.keep, 0.0)
        for weights in (early, late)
    )
    into = xp.where(is_mask, step.mask, step.text / num_text)
    after = xp.clip(after, LEAST, 1)
    found = law.read(x0, xt, log_odds(early, num_text))
    stayed = cast(step.keep * before / after, t) * -log_ratio(early, num_text, found, x0, xt, t)
    jumped = cast(into / after, t) * divergence(early, num_text, found, t)
    return stayed + jumped + log_ratio(late, num_text, found, x0, xt, t)


def terminal_nats(process: InterpolatingProcess, law: Array | Law, x0: Array) -> Array:
    """The prior term [...]: KL(q(x1 | x0) || p(x1 | canvas)), with the law [... V] seen on `prior`'s canvas.

    0 where alpha(1) = 0. A schedule that stops at alpha(1) = eps still starts from pure noise, one step earlier.
    """
    law = law_of(law)
    end = process.mixture(widened(array_namespace(x0).ones_like(x0)))
    found = law.read(x0, x0, log_odds(end, law.num_text))
    return divergence(end, law.num_text, found, found.of_x0)
