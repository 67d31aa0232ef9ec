"""What outlives a process: a run's folder, its checkpoints, and the bundle that a replica loads.

`run_dir.py` -> `store.py` (checkpoints: everything a trainer needs) -> `bundle_manifest.py`
(no torch) -> `bundle.py` (all a replica needs, nothing else).
Law: a manifest with the sha256 of every file is written last; what it does not vouch for does not exist.
"""
