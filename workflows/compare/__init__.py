"""`dllm compare RECIPE`: the same denoiser, data and budget under several objectives, and what differs.

`recipe.py` (what is compared) -> `flow.py` (the order) -> `training.py` (one run a task) -> `measures.py` (one model a
task), with `speakers.py` (how each model writes and fills holes) -> `report.py` (table and plots).
"""
