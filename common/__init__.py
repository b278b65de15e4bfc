"""Helpers that every package may import. This package imports nothing of the project and does not import torch.

In reading order:

- `text`: values, names and numbers as text, and strict parsing of a JSON object.
- `errors`: the errors that a user can correct, in one tree, and the checks that raise them.
- `files`: durable and atomic file operations.
- `strict`: strict conversion between plain containers and configuration dataclasses.
- `registry`: named implementations that a plugin can add to.
- `plugins`: loading a user's own modules.
"""
