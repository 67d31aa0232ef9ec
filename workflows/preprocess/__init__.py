"""Corpus -> tokens -> noise -> manifest, as Ray tasks over `dllm_core.data.build`."""
