"""Text generation with a model on one device or on several.

In reading order:

- `sampling`: how the next token is chosen from its logits.
- `generate`: the loop, which feeds prompts in chunks and then one token per row and step, through the key/value cache.
"""
