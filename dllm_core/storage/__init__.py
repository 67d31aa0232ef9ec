"""Where bytes live: one protocol over a local folder and `s3://bucket/prefix`.

`store.py` (Store, LocalStore, open_store) -> `s3.py` (the only file that imports boto3); `claim.py`: one driver a run.
Law: an object is there whole or not at all; pointers and manifests are written last.
"""
