"""The evaluate stage: what a run's bundle has learned, measured on held-out rows and on problems, as Ray tasks.

`job.py` (what driver and tasks hold) -> `measures.py` (all but the likelihood) -> `flow.py`; `show.py` tells people.
"""
