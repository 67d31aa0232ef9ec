"""What a denoiser is trained to do: batch -> sum of nats and number of tokens.

`config.py` (without torch), `loss.py` (LossSum, Objective, Rows), `vocabulary.py` (the passes over logits) ->
`context.py`, `diffusion.py`, `autoregressive.py`, `masked_lm.py`, `preference.py` -> `build.py`.
Law: sum and divisor are divided once, after the all-reduce.
"""
