"""From a corpus to batches: sources, documents, tokens, rows, written noise.

`corpus.py` (what a corpus is) -> `sources.py` -> `units.py` -> `readers.py` -> `records.py` -> `filters.py` ->
`dedup.py` -> `tokenizer.py` -> `encoding.py` -> `packing.py` -> `shard.py` -> `quarantine.py` -> `order.py` ->
`noising.py` -> `build.py` (the steps) -> `manifest.py` -> `verify.py` -> `loader.py`.
Law: a batch is a pure function of (manifest, seed, sample counter); what is stored equals what is computed.
"""
