"""What objectives ask of logits [n V], in one pass forward and one back, some rows at a time.

An operation over all of [n V] moves it through memory; here each works on rows that a processor's cache still holds,
and nothing of that size is kept but the logits. As single operations, cross-entropy took 3 times and the divergence
of replaced tokens 10 times as long at [1024 8192].
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dllm_core.noise.law import Reading

_CPU_ELEMENTS, _GPU_ELEMENTS = 1 << 18, 1 << 25  # 1 MiB a thread and array; few launches
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
    found: tuple[Tensor, Tensor] = _Read.apply(logits, mask_id, ids, shift)  # type: ignore[no-untyped-call]
    return found


class _Read(torch.autograd.Function):
    """(log p(ids) [n K], sum over v other than ids[:, 0] of log(1 + exp(shift) p_v) [n]); p without the mask."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, mask_id: int, ids: Tensor, shift: Tensor | None) -> tuple[Tensor, Tensor]:
        odds, folds = None, 0
        if shift is not None and len(ids):
            shift = shift.clamp(max=_LARGEST_SHIFT)
            odds = shift.exp().float()[:, None]
            folds = next(n for least, n in _FOLDS if shift.max() <= least)
        ctx.save_for_backward(logits, ids, odds)
        ctx.mask_id, ctx.is_callers = mask_id, logits.is_leaf
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

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        logits, ids, odds = ctx.saved_tensors
        of_ids, of_others = gradients[0].float(), gradients[1].float()[:, None]
        # The pages of a new array cost more than the gradient itself, so it takes the place of the logits, unless they
        # are a caller's own. Autograd knows: it refuses whatever would read them once more.
        found = torch.empty_like(logits) if ctx.is_callers else logits.detach()
        for at, probs, gained, total in _some_rows(logits, ctx.mask_id, arrays=2 if odds is None else 3):
            own = of_ids[at]
            torch.softmax(probs, -1, out=probs)
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
    """(rows, their logits in fp32 with the mask's at -inf, two scratch arrays of that shape), overwritten each time."""
    elements = _CPU_ELEMENTS * torch.get_num_threads() if logits.device.type == "cpu" else _GPU_ELEMENTS
    rows = max(1, elements // max(1, logits.shape[1]))
    scratch = [torch.empty(min(rows, len(logits)), logits.shape[1], device=logits.device) for _ in range(arrays)]
    for start in range(0, len(logits), rows):
        at = slice(start, min(start + rows, len(logits)))
        shown, *others = (array[: at.stop - start] for array in scratch)
        shown.copy_(logits[at])
        shown[:, mask_id] = -torch.inf
        yield (at, shown, *others, None)[:4]


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
