"""What objectives ask of logits [n V], in one pass forward and one back, some rows at a time.

An operation over all of [n V] moves it through memory; here each works on rows that a processor's cache still holds,
and nothing of that size is kept but the logits. As single operations, cross-entropy took 5 times and the divergence
of replaced tokens 10 times as long at [1024 8192].
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dllm_core.noise.law import Reading

_LOG2_E = 1 / math.log(2)  # a CPU's `exp2` takes 0.4 of the time of its `exp`
_CPU_ELEMENTS, _GPU_ELEMENTS = 1 << 19, 1 << 25  # 2 MiB a thread and array; few launches
# exp(shift) p is summed by products of 1 + it, which must stay below float32's 3e38: two factors do for every shift
# below e^43, four and eight for smaller ones.
_LARGEST_SHIFT = 43.0
_FOLDS = ((11.0, 3), (21.0, 2), (_LARGEST_SHIFT, 1))


def nll(logits: Tensor, target: Tensor, mask_id: int) -> Tensor:
    """-log p(target) [n] of logits [n V] in fp32, the mask's own logit left out: no text holds it."""
    return -_read(logits, mask_id, target[:, None])[0][:, 0]


@dataclass(frozen=True)
class LogitsLaw:
    """The law whose raw logits [n V], in any float type, these are; all that is read is fp32 [n]."""

    logits: Tensor
    mask_id: int

    @property
    def num_text(self) -> int:
        """V - 1."""
        return self.logits.shape[-1] - 1

    def of(self, ids: Tensor) -> Tensor:
        """Log p of ids [n]."""
        return -nll(self.logits, ids, self.mask_id)

    def read(self, x0: Tensor, xt: Tensor, shift: Tensor) -> Reading:
        """As `Law.read`. A shift above 43 counts as 43: a text id then weighs less than 1e-18 of the clean one."""
        of_ids, others = _read(self.logits, self.mask_id, torch.stack([x0, xt], dim=1), shift)
        return Reading(of_ids[:, 0], of_ids[:, 1], others)


def _read(logits: Tensor, mask_id: int, ids: Tensor, shift: Tensor | None = None) -> tuple[Tensor, Tensor]:
    if not (torch.is_grad_enabled() and logits.requires_grad):
        return _read_alike(logits, mask_id, ids, shift)
    found: tuple[Tensor, Tensor] = _Read.apply(logits, mask_id, ids, shift)  # type: ignore[no-untyped-call]
    return found


def _read_alike(logits: Tensor, mask_id: int, ids: Tensor, shift: Tensor | None) -> tuple[Tensor, Tensor]:
    """`_Read` without a gradient, where a row's bits must not depend on its neighbours.

    The last bit of a CPU's `exp2` depends on where in an array a number stands; softmax goes row by row.
    """
    odds, folds = _odds(shift, len(ids))
    log_probs = torch.empty(ids.shape, device=logits.device)
    others = torch.zeros(len(ids), device=logits.device)
    for at, shown, probs, _ in _some_rows(logits, mask_id, arrays=2):
        if odds is None:
            torch.log_softmax(shown, -1, out=probs)
            torch.gather(probs, 1, ids[at], out=log_probs[at])
            continue
        torch.softmax(shown, -1, out=probs)
        # The largest logit and its probability tell the normalizer without another exp; p >= 1/V keeps its digits.
        log_sum = shown.amax(-1, keepdim=True) - probs.amax(-1, keepdim=True).log()
        log_probs[at] = shown.gather(1, ids[at]) - log_sum
        others[at] = _sum_log1p(probs.scatter_(1, ids[at, :1], 0.0).mul_(odds[at]), folds)
    return log_probs, others


def _odds(shift: Tensor | None, rows: int) -> tuple[Tensor | None, int]:
    """exp(shift) [n 1] and how often its products may be folded; (None, 0) where there is nothing to sum."""
    if shift is None or not rows:
        return None, 0
    shift = shift.clamp(max=_LARGEST_SHIFT)
    return shift.exp().float()[:, None], next(n for least, n in _FOLDS if shift.max() <= least)


class _Read(torch.autograd.Function):
    """(log p(ids) [n K], sum over v other than ids[:, 0] of log(1 + exp(shift) p_v) [n]); p without the mask."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, mask_id: int, ids: Tensor, shift: Tensor | None) -> tuple[Tensor, Tensor]:
        odds, folds = _odds(shift, len(ids))
        log_probs = torch.empty(ids.shape, device=logits.device)
        others = torch.zeros(len(ids), device=logits.device)
        largest, log_sum = torch.empty(2, len(ids), 1, device=logits.device)
        for at, shown, *_ in _some_rows(logits, mask_id, arrays=1):
            torch.amax(shown, -1, keepdim=True, out=largest[at])
            log_probs[at] = shown.sub_(largest[at]).gather(1, ids[at])
            total = shown.mul_(_LOG2_E).exp2_().sum(-1, keepdim=True)
            torch.log(total, out=log_sum[at])
            if odds is not None:
                others[at] = _sum_log1p(shown.scatter_(1, ids[at, :1], 0.0).mul_(odds[at] / total), folds)
        ctx.save_for_backward(logits, ids, odds, largest, log_sum)
        ctx.mask_id, ctx.is_callers = mask_id, logits.is_leaf
        return log_probs.sub_(log_sum), others

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        logits, ids, odds, largest, log_sum = ctx.saved_tensors
        of_ids, of_others = gradients[0].float(), gradients[1].float()[:, None]
        # The pages of a new array cost more than the gradient itself, so it takes the place of the logits, unless they
        # are a caller's own. Autograd knows: it refuses whatever would read them once more.
        found = torch.empty_like(logits) if ctx.is_callers else logits.detach()
        for at, probs, gained, total in _some_rows(logits, ctx.mask_id, arrays=1 if odds is None else 3):
            own = of_ids[at]
            torch.add(log_sum[at] * -_LOG2_E, probs.sub_(largest[at]), alpha=_LOG2_E, out=probs).exp2_()
            down = own.sum(1, keepdim=True)
            if odds is None:
                probs.mul_(-down)
            else:
                torch.mul(probs, odds[at], out=gained).scatter_(1, ids[at, :1], 0.0)
                gained.div_(torch.add(gained, 1.0, out=total))  # d log(1 + odds p) / d log p
                down.addcmul_(gained.sum(1, keepdim=True), of_others[at])
                probs.mul_(-down).addcmul_(gained, of_others[at])
            found[at] = probs.scatter_add_(1, ids[at], own)
        return found, None, None, None


def _some_rows(logits: Tensor, mask_id: int, arrays: int) -> Any:
    """(rows, their logits in fp32 with the mask's at -inf, two more of that shape or None); overwritten each time."""
    elements = _CPU_ELEMENTS * torch.get_num_threads() if logits.device.type == "cpu" else _GPU_ELEMENTS
    rows = max(1, elements // max(1, logits.shape[1]))
    scratch = [torch.empty(min(rows, len(logits)), logits.shape[1], device=logits.device) for _ in range(arrays)]
    for start in range(0, len(logits), rows):
        at = slice(start, min(start + rows, len(logits)))
        shown, *others = (array[: at.stop - start] for array in scratch)
        shown.copy_(logits[at])
        shown[:, mask_id] = -torch.inf
        yield at, shown, *others, *[None] * (3 - arrays)


def _sum_log1p(a: Tensor, folds: int) -> Tensor:
    """Sum of log(1 + a) over rows [n V]; a is overwritten. (1 + a)(1 + b) - 1 = a + b + ab keeps small digits and
    halves the logarithms, which cost the most, with every fold.
    """
    total = torch.zeros(len(a), device=a.device)
    for _ in range(folds):
        half, is_odd = divmod(a.shape[1], 2)
        if is_odd:
            total += a[:, -1].log1p()
        first, second = a[:, :half], a[:, half : 2 * half]
        a = first.addcmul_(first, second).add_(second)
    return total + a.log1p_().sum(-1)
