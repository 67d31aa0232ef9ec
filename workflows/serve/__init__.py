"""A bundle behind an endpoint that speaks OpenAI's dialect.

`config.py` -> `protocol.py` (requests, answers, errors) -> `gateway.py` (HTTP and text) -> `replica.py` (tokens, one
decoding loop) -> `app.py` (the Ray Serve application) -> `flow.py` (the verb).
Law: the same seed gives the same text, alone or in any batch.
"""
