"""RMSNorm, SwiGLU, and layers that initialise themselves, so that ZeRO-3 can partition them when made."""

import torch
from torch import Tensor, nn
from torch.nn import functional

# Below 12 rows (2 threads; 4 with one) a CPU's matrix product takes other kernels, which sum in another order: the last
# bit of a row would depend on how many others are read with it. Measured for fan-ins of 32 to 512.
MIN_ROWS = 16
# A longer sum is cut over threads by how many rows there are: from 1,024 on two threads gave a row other bits beside
# others (MKL 2024.2). In sums of 768 one after another it has the same for any number of rows and threads.
LONGEST_SUM = 768


def pad_rows(x: Tensor) -> Tensor:
    """The rows x [n D] and zeros behind them, 16 at least; in training, where no row's bits are promised, x alone."""
    missing = max(0, MIN_ROWS - len(x)) if not torch.is_grad_enabled() else 0
    return functional.pad(x, (0, 0, 0, missing))


def draw(tensor: Tensor, std: float) -> None:
    """Draw from N(0, std^2), in place. On the meta device nothing: torch would import its compiler for it."""
    if not tensor.is_meta:
        nn.init.normal_(tensor, std=std)


class Embedding(nn.Embedding):
    """Token ids to vectors; drawn twice, from N(0, 1) and from N(0, std^2), as every golden loss has it."""

    def __init__(self, num_embeddings: int, dim: int, std: float) -> None:
        self.init_std = std
        super().__init__(num_embeddings, dim)

    def reset_parameters(self) -> None:
        """Called by nn.Embedding's own constructor."""
        for std in (1.0, self.init_std):
            draw(self.weight, std)


class Linear(nn.Linear):
    """y = x W^T, W ~ N(0, scale^2 / fan_in); with a bias y = x W^T + b, b = 0 at first."""

    def __init__(self, fan_in: int, fan_out: int, scale: float = 1.0, *, bias: bool = False) -> None:
        self.init_std = scale * fan_in**-0.5
        super().__init__(fan_in, fan_out, bias=bias)

    def reset_parameters(self) -> None:
        """Called by nn.Linear's own constructor."""
        draw(self.weight, self.init_std)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def forward(self, x: Tensor) -> Tensor:
        """[... fan_in] -> [... fan_out]."""
        return product(x, self.weight, self.bias)


def product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """The product x W^T + b: [... K], [N K], [N] -> [... N]. In inference in fp32 on a CPU in sums of LONGEST_SUM."""
    length = weight.shape[1]
    is_short = length <= LONGEST_SUM or x.dtype != torch.float32 or x.device.type != "cpu"
    # A graph cannot ask the last: a compiled block would be cut at each of its matrices.
    if is_short or torch.compiler.is_compiling() or not torch.is_inference_mode_enabled():
        return functional.linear(x, weight, bias)
    rows = x.flatten(0, -2)
    out = rows[:, :LONGEST_SUM] @ weight[:, :LONGEST_SUM].T
    for begin in range(LONGEST_SUM, length, LONGEST_SUM):
        part = slice(begin, begin + LONGEST_SUM)
        out.addmm_(rows[:, part], weight[:, part].T)
    return (out if bias is None else out.add_(bias)).view(*x.shape[:-1], -1)


class RMSNorm(nn.Module):
    """x / rms(x) * weight, statistics in fp32. arXiv:1910.07467."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(dim)), eps

    def forward(self, x: Tensor) -> Tensor:
        """[... D] -> [... D], in the type of x."""
        return functional.rms_norm(x.float(), self.weight.shape, self.weight.float(), self.eps).to(x.dtype)


class SwiGLU(nn.Module):
    """down(silu(gate(x)) * up(x)). arXiv:2002.05202."""

    def __init__(self, dim: int, ffn_dim: int, scale: float) -> None:
        super().__init__()
        self.gate_up = Linear(dim, 2 * ffn_dim)
        self.down = Linear(ffn_dim, dim, scale)

    def forward(self, x: Tensor) -> Tensor:
        """[B L D] -> [B L D]."""
        gate, up = self.gate_up(x).chunk(2, dim=-1)
        mixed: Tensor = self.down(functional.silu(gate) * up)
        return mixed
