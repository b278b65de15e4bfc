"""The one way this package refuses how a run was started; imported by those who must not wait for torch."""


class AgreementError(ValueError):
    """The ranks were not started alike, or not all; the message is one line, the same on every rank that is there."""
