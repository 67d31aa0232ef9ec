"""What a denoiser is trained to do: batch -> sum of nats and number of tokens.

`loss.py` (LossSum, Objective) -> `diffusion.py`. Law: sum and count are divided once, after the all-reduce.
"""
