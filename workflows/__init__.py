"""Verbs over dllm_core's nouns: preprocess, train, evaluate, generate, serve, and the pipeline that runs them all.

Read `cli.py`, then `pipeline/flow.py`. Ray, HTTP and the terminal exist here only.
"""
