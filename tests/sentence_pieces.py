"""A tokenizer of words with their spaces, and of bytes, as SentencePiece's are, such as Llama's."""

import json

import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

from dllm_core.data.tokenizer import Tokenizer, TokenizerConfig


def sentence_pieces(text: str) -> Tokenizer:
    """Of the words of a text; it writes a space before the first word of any."""
    core = tokenizers.Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    core.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    strip = [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    core.decoder = decoders.Sequence(strip)
    specials = TokenizerConfig().special_tokens
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=specials, show_progress=False)
    core.pre_tokenizer = pre_tokenizers.Split("\u2581", "merged_with_next")
    core.train_from_iterator([text] * 9, trainer)
    values = json.loads(core.to_str()) | {"pre_tokenizer": None}
    for piece in ("<unk>", *(f"<0x{byte:02X}>" for byte in range(256))):
        values["model"]["vocab"][piece] = len(values["model"]["vocab"])
    return Tokenizer(json.dumps(values), TokenizerConfig())
