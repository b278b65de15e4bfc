"""What the data room raises for a mistake of the user's."""


class DataError(ValueError):
    """Text, tokens or a store that cannot be used. One line: what was found, where, and what was expected."""
