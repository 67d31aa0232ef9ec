"""The forward process: how text is corrupted, step by step, until nothing is left, and what undoing it costs.

`schedule.py` (alpha(t)), `law.py` (what is asked of a denoiser's law) -> `process.py` (what a process promises) ->
`interpolating.py` (what all of them share) -> `absorbing.py`, `uniform.py`, `hybrid.py` -> `discrete.py` (the bound of
T steps) -> `times.py` (t along the order).
Law: randomness is handed in as arrays, so the same lines run on numpy when pre-noising and on torch in a decoder.
"""
