"""The nouns of a diffusion language model: corpus, noise, denoiser, objective, checkpoint, bundle, decoder.

Everything here runs on a laptop: no Ray, no HTTP, no tracker. Read in the order in which text flows:
`data` -> `noise` -> `model` -> `objective` -> `training` -> `checkpoints` -> `decoding` -> `evaluation`.
Why things are as they are: DECISIONS.md. What is on disk and on the wire: FORMATS.md, both in this folder.
"""
