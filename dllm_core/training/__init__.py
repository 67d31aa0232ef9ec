"""From batches to weights: one loop, one optimizer, an EMA, checkpoints that any world size resumes.

`config.py`, `start.py` (no torch) -> `started.py` (weights of another run) -> `backend.py` (who holds them) ->
`deepspeed_backend.py` (the only file that imports DeepSpeed) -> `ema.py` -> `events.py` -> `loop.py`.
Law: global batch and seed decide the steps; world size does not.
"""
