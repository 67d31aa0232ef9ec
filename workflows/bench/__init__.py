"""The bench verb: a load on any OpenAI-shaped endpoint, and what it made of it."""
