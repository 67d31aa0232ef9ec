"""What a denoiser has learned: a likelihood bound with its error bar, and what decoding costs.

`config.py` -> `estimators.py` (one draw of a row's nats) -> `likelihood.py` (held-out figures and their errors)
-> `answers.py` (an answer behind its context) -> `generation.py` (tokens per call).
Law: a figure comes with its standard error and the setting it was measured in.
"""
