"""From batches to weights: one loop, one optimizer, an EMA, checkpoints that any world size resumes.

`config.py` (no torch) -> `backend.py` (who holds the weights) -> `deepspeed_backend.py` (the only file that imports
DeepSpeed) -> `ema.py` -> `events.py` -> `loop.py`.
Law: global batch and seed decide the steps; world size does not.
"""
