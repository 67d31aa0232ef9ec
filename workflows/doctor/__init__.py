"""`dllm doctor`: is all here that a run needs? A line for each thing, and what to do about it."""
