"""Errors that the user can correct. They form one tree, so that one `except UserError` covers them all."""

import re

FIELD = re.compile(r"[A-Za-z_][\w.]*(?==)")
"""The key at the start of a message of the form `<field>=<value>: expected ...`."""


class UserError(ValueError):
    """A mistake that the user can correct. The message is one line: what was found, where, and what was expected.

    Attributes:
        field: the configuration key at fault, e.g. `model.dim`. It is read from the start of the message, and is None
            where the message does not start with `<field>=<value>`.
    """

    def __init__(self, message: str) -> None:
        super().__init__(message)
        found = FIELD.match(message)
        self.field = found[0] if found else None


class ConfigError(UserError):
    """A value in the configuration cannot be used. The message starts with the key."""


class RunError(UserError):
    """The run cannot be written where the configuration says."""


class DataError(UserError):
    """Text, tokens or a token store cannot be used."""


class ModelError(UserError):
    """A model directory or file cannot be read, or does not have the expected content."""


class CheckpointError(UserError):
    """A checkpoint cannot be written, is damaged, or does not fit the model it is loaded into."""


class PreflightError(UserError):
    """The ranks were not started alike, or some did not start. Every rank that started raises the same message."""
