"""From noise to text: a canvas of masks is filled, whole, block by block or token by token, or one of random text is
cleaned, as the model was trained.

`unmask.py` (which positions to commit), `revise.py` (which to take back) -> `config.py` -> `state.py` (one row) ->
`step.py` (one denoiser call) -> `engine.py` (many rows at once). Token ids only; text and HTTP stay at the edge.
Laws: every open position is filled within its budget; prompt and suffix are never touched; a row's answer does not
depend on its neighbours in the batch, nor on whether keys and values are kept.
"""
