"""The train stage: Ray Train starts and restarts workers, each a `dllm_core.training.Trainer` over DeepSpeed.

`flow.py` (the driver) -> `worker.py` (one rank) -> `announcements.py` (what ranks tell the driver).
"""
