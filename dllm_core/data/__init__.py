"""From a corpus to batches: documents, tokens, rows, written noise.

`sources.py` -> `corpus.py` -> `tokenizer.py` -> `packing.py` -> `shard.py` -> `order.py` -> `noising.py` -> `build.py`
-> `manifest.py` -> `loader.py`.
Law: a batch is a pure function of (manifest, seed, sample counter); what is stored equals what is computed.
"""
