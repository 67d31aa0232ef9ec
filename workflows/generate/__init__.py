"""Decode in this process, without a cluster, and watch the canvas: `unfold.py` (frames) -> `flow.py` (the verb)."""
