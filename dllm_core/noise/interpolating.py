"""What every forward process here shares: q(xt | x0) mixes x0 with noise that does not know x0.

    q(xt | x0) = keep [xt = x0] + mask [xt = mask_id] + text / N for each of the N = V - 1 text ids

with weights that only t decides (GIDD, arXiv:2503.04482). Marginals, transitions, posteriors and the bound follow from
the three weights alone, so a process states those and how to draw.

The denoiser's law p enters where x0 would stand: p(xs | xt) = q(xs | xt, x0 = p), the plug-in of UDLM
(arXiv:2412.10193), Duo (arXiv:2506.10892) and GIDD. It is the true reverse, and the bound is tight, when p is each
token's law given all *other* noised tokens. For absorbing noise that is the plain posterior, since a mask tells nothing
of its token; where tokens are replaced, p(x0 | whole xt) is another law, `posterior(p, xt, 0, t)`, and plugging that in
counts a token's own evidence twice (arXiv:2605.22765).
"""

from dataclasses import dataclass
from typing import ClassVar

from dllm_core.config.base import Frozen
from dllm_core.noise.arrays import Array, array_namespace, cast, log_softmax_without, softplus, vocabulary, widened
from dllm_core.noise.law import Law, Reading, law_of
from dllm_core.noise.schedule import AnySchedule, LinearSchedule

LEAST = 1e-300  # stands for a weight of 0 under a logarithm; always multiplied by that 0
_EDGE = 1e-12  # the rates' limits at t = 0 and 1 are taken this far inside
_LARGEST_LOG = 80.0  # exp of it fits float32; beyond, the weight in front is 0


@dataclass(frozen=True)
class Mixture:
    """keep + mask + text = 1: the clean token's weight, the mask's, and that of all text ids together. float64."""

    keep: Array
    mask: Array
    text: Array

    def since(self, early: "Mixture") -> "Mixture":
        """The weights of q(xt | xs), this one's t after the s of `early`."""
        clip = array_namespace(self.keep).clip  # of rounding: a difference of equal weights may be -1e-17
        keep = self.keep / early.keep
        return Mixture(keep, clip(self.mask - keep * early.mask, 0, 1), clip(self.text - keep * early.text, 0, 1))


class InterpolatingProcess(Frozen):
    """Base of the processes. Ids and times are [...], laws over the vocabulary [... V]; t broadcasts to the ids."""

    replaces: ClassVar[bool]
    mask_id: int
    schedule: AnySchedule = LinearSchedule()

    def mix(self, alpha: Array) -> Mixture:
        """The weights at which the schedule stands at `alpha`, float64."""
        raise NotImplementedError

    def corrupt(self, x0: Array, t: Array, u: Array, v: Array | None = None) -> Array:
        """Draw xt [B L]; as `NoiseProcess` has it."""
        raise NotImplementedError

    def prior(self, like: Array, v: Array | None = None) -> Array:
        """The canvas of pure noise; as `NoiseProcess` has it."""
        raise NotImplementedError

    def text_inflow(self, alpha: Array) -> Array:
        """Rate at which the text ids' noise is refilled, per weight it has and per unit of falling alpha."""
        return 1 / (alpha * (1 - alpha))

    def mixture(self, t: Array) -> Mixture:
        """The weights at time t.

        In float64, so that numpy's and torch's last bits, which differ, are gone once rounded to float32; in float32
        a sine or a power differs between the two, and between processors, for one time in ten.
        """
        return self.mix(self.schedule.alpha(widened(t)))

    def x0_log_probs(self, logits: Array) -> Array:
        """Log-softmax over V without the mask (SUBS, MDLM section 3.2.3). logits [... V] are not changed."""
        return log_softmax_without(logits, self.mask_id)

    def marginal(self, x0_probs: Array, t: Array) -> Array:
        """q(xt | x0 ~ p) [... V] of p [... V], which gives the mask nothing."""
        mixture = self.mixture(t)
        is_mask = vocabulary(x0_probs) == self.mask_id
        mask, text = (cast(weight, x0_probs)[..., None] for weight in (mixture.mask, mixture.text))
        noise = array_namespace(x0_probs).where(is_mask, mask, text / (x0_probs.shape[-1] - 1))
        return cast(mixture.keep, x0_probs)[..., None] * x0_probs + noise

    def posterior(self, x0_probs: Array, xt: Array, s: Array, t: Array) -> Array:
        """q(xs | xt, x0 ~ p) [... V] for s < t, by Bayes: q(xt | xs) q(xs | p) / q(xt | p).

        With a one-hot p it is the true posterior; with a denoiser's p it is one step of the reverse process (see the
        module's note on which p makes that exact). A token that p rules out stays what it is.
        """
        xp = array_namespace(x0_probs)
        step = self.mixture(t).since(self.mixture(s))
        into = xp.where(xt == self.mask_id, step.mask, step.text / (x0_probs.shape[-1] - 1))  # q(xt | xs) if xs != xt
        own = vocabulary(x0_probs) == xt[..., None]
        likelihood = cast(into, x0_probs)[..., None] + cast(step.keep, x0_probs)[..., None] * own
        joint = likelihood * self.marginal(x0_probs, s)
        total = joint.sum(-1)[..., None]
        is_possible = total > 0
        return xp.where(is_possible, joint / xp.where(is_possible, total, 1.0), cast(own, x0_probs))

    def nelbo_rate(self, law: Array | Law, x0: Array, xt: Array, t: Array) -> Array:
        """Nats [...] per unit of time: their mean over xt, integrated over t in (0, 1), bounds -log p(x0).

        The limit of the T-step bound: r / q(xt) (KL(q || p) + q/p - 1 - log(q/p)) where q = q(xt | x0), p = q(xt | p)
        and r is the forward rate into xt (GIDD, theorem on the ELBO; UDLM's formula and MDLM's are cases of it).
        law: log-probs [... V] as `x0_log_probs` gives them, or a `Law`. Never negative, 0 for a one-hot p on x0, finite
        at t = 0 and 1; one [... V] tensor is kept for the gradient.
        """
        xp, law = array_namespace(x0), law_of(law)
        alpha, fall = self._inside(t)
        mixture = self.mix(alpha)
        text = mixture.text / law.num_text
        of_text = self.text_inflow(alpha) * xp.where(xt == x0, text / (mixture.keep + text), 1.0)
        weight = xp.where(xt == self.mask_id, 1 / (alpha * (1 - alpha)), of_text) * fall
        found = law.read(x0, xt, log_odds(mixture, law.num_text))
        ratio = log_ratio(mixture, law.num_text, found, x0, xt, t)
        excess = xp.expm1(xp.clip(-ratio, None, _LARGEST_LOG)) + ratio
        return cast(weight, t) * (divergence(mixture, law.num_text, found, t) + excess)

    def fall(self, t: Array) -> Array:
        """-alpha'(t), kept off t = 0, float64: what every rate is a multiple of."""
        return -self.schedule.dalpha_dt(array_namespace(t).clip(widened(t), _EDGE, 1))

    def _inside(self, t: Array) -> tuple[Array, Array]:
        """alpha(t), kept off 0 and 1, and -alpha'(t)."""
        alpha = self.schedule.alpha(widened(t))
        return array_namespace(t).clip(alpha, _EDGE, 1 - _EDGE), self.fall(t)


def log_odds(mixture: Mixture, num_text: int) -> Array:
    """log(keep / weight of one text id) [...], float64: the `shift` of what is read of a law."""
    xp = array_namespace(mixture.keep)
    log_keep, log_text = (xp.log(xp.clip(part, LEAST, 1)) for part in (mixture.keep, mixture.text / num_text))
    return log_keep - log_text


def log_ratio(mixture: Mixture, num_text: int, found: Reading, x0: Array, xt: Array, like: Array) -> Array:
    """The log of p/q [...] at the ids xt, with p and q the marginals of `mixture`, in the type of `like`.

    At x0 the ratio is 1 + keep (p(x0) - 1) / q(x0), whose digits near 1 log1p keeps; elsewhere 1 + keep p / noise.
    """
    elsewhere = softplus(found.of_xt + cast(log_odds(mixture, num_text), like))
    return array_namespace(x0).where(xt == x0, _log_ratio_at_x0(mixture, num_text, found, like), elsewhere)


def _log_ratio_at_x0(mixture: Mixture, num_text: int, found: Reading, like: Array) -> Array:
    xp = array_namespace(found.of_x0)
    keep, text = mixture.keep, mixture.text / num_text
    log_keep, log_text = (xp.log(xp.clip(part, LEAST, 1)) for part in (keep, text))
    q_x0 = xp.clip(keep + text, LEAST, 1)
    change = cast(keep / q_x0, like) * xp.expm1(found.of_x0)
    far = xp.logaddexp(cast(log_keep, like) + found.of_x0, cast(log_text, like)) - cast(xp.log(q_x0), like)
    return xp.where(change > -0.5, xp.log1p(xp.clip(change, -0.5, None)), far)


def divergence(mixture: Mixture, num_text: int, found: Reading, like: Array) -> Array:
    """KL(q || p) [...] of the marginals of `mixture`, of a law read at `log_odds` of the same mixture."""
    text = mixture.text / num_text
    at_x0 = _log_ratio_at_x0(mixture, num_text, found, like)
    return -cast(mixture.keep + text, like) * at_x0 - cast(text, like) * found.others


def text_ids(v: Array, mask_id: int, vocab_size: int, like: Array) -> Array:
    """Ids in the type of `like`, even over the N = vocab_size - 1 that are not the mask, of v [...] in [0, 1).

    v is float64 on a grid of 2^-32, so every id's share is within 2^-32 of 1/N; float32's 2^-24 would favour some of
    50,000 ids by 0.3 %.
    """
    ids = cast(v * (vocab_size - 1), like)
    return ids + cast(ids >= mask_id, like)
