"""The forward process: how text is corrupted, step by step, until nothing is left.

`schedule.py` (alpha(t)) -> `process.py` (what every process promises) -> `absorbing.py` -> `times.py` (t along the order).
Law: randomness is handed in as arrays, so the same lines run on numpy while pre-noising and on torch in a decoder.
"""
