"""The whole river: every stage of a run, in order, each skipped where its inputs have not changed.

`flow.py` (the order) -> `receipts.py` (what is done) -> `bundle.py` -> `demo.py` (asks the endpoint) -> `report.py`.
"""
