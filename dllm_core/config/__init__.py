"""How a recipe section is written, checked and identified.

`base.py` (Frozen: what every section is) -> `overrides.py` (YAML and `a.b=c`) -> `fingerprint.py` (identity).
Law: a value that means nothing is refused with its dotted path, the value and the remedy, before work starts.
The sections themselves stand beside their nouns; `workflows/recipe.py` puts them into one tree.
"""
