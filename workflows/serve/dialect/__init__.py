"""What the endpoint's requests may hold, and what its answers and errors look like: OpenAI's dialect, Mercury's, ours.

A parameter that we do not implement is refused by name unless it has its neutral value: silently ignoring
`presence_penalty` would be a wrong answer.
"""
