"""Errors of models on disk."""


class ModelError(ValueError):
    """A model directory or file that cannot be read, or that is not what was expected; the message is one line."""
