"""What a denoiser has learned: a likelihood with its error, what it fills, writes and solves, and what decoding costs.

`config.py` -> `estimators.py` (one draw of a row's nats; `dllm_core/estimate.py` makes a figure of many) ->
`likelihood.py` (held-out figures) -> `answers.py` (an answer behind its context) -> `calibration.py`, `infill.py`,
`writers.py` -> `samples.py` under `scorers.py`, `tasks/` -> `models.py` (a bundle, asked for any of these) ->
`generation.py` (tokens per call).
Law: a figure comes with its standard error and the setting it was measured in.
"""
