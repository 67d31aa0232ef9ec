"""The forward process: how text is corrupted, step by step, until nothing is left.

`schedule.py` (alpha(t)) -> `process.py` (what a process promises) -> `absorbing.py` -> `times.py` (t along the order).
Law: randomness is handed in as arrays, so the same lines run on numpy when pre-noising and on torch in a decoder.
"""
