"""Tasks whose answers are known: where filling in parallel should shine (sudoku) or fail (carries of an addition).

`problem.py` (what a task is) -> `sudoku.py`, `addition.py` -> `corpus.py` (a corpus to train on)
-> `measure.py` (exact match by the engine). Law: problems are a pure function of (task, seed), and no problem of the
training side is on the test side.
"""
