"""What a denoiser has learned: a likelihood bound with its error bar, and what decoding costs.

`config.py` -> `likelihood.py` (held-out NELBO, unigram entropy) -> `generation.py` (tokens per call).
Law: a figure comes with its standard error and the setting it was measured in.
"""
