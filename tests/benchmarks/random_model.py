"""A denoiser of random weights that never ends an answer: decoding costs what it would with trained ones."""

import torch

from dllm_core.model.config import DenoiserConfig, ModelConfig
from dllm_core.model.denoiser import Denoiser

BASE = ModelConfig(dim=768, layers=12, heads=12, ffn_dim=2048, tie_embeddings=False)  # 110 M with BASE_VOCABULARY
BASE_VOCABULARY = 16384


def random_denoiser(
    model: ModelConfig,
    vocabulary: int,
    context: int,
    dtype: torch.dtype = torch.float32,
    device: torch.device = torch.device("cpu"),  # noqa: B008 (a constant)
) -> Denoiser:
    """Made where and as it computes. model: untied, so that the end token's row of the head can be 0, whose logit is
    never the largest of thousands.
    """
    config = DenoiserConfig(model=model, vocab_size=vocabulary, context_length=context, mask_id=0, eos_id=1, pad_id=2)
    torch.manual_seed(0)
    torch.set_default_dtype(dtype)
    try:
        with device:
            denoiser = Denoiser(config).eval().requires_grad_(False)
    finally:
        torch.set_default_dtype(torch.float32)
    denoiser.head.weight[1] = 0
    return denoiser
