"""The evaluate stage: held-out likelihood of a run's bundle as Ray tasks, and what decoding costs."""
