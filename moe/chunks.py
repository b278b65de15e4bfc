"""Division of rows into chunks, for work whose intermediate results should be small."""


def chunks(rows: int, width: int, elements: int) -> list[slice]:
    """Divide rows of `width` numbers into equal chunks of up to about `elements` numbers, at least one.

    >>> chunks(10, 4, 20)
    [slice(0, 5, None), slice(5, 10, None)]
    """
    number = max(1, -(-rows * width // elements))
    size = max(1, -(-rows // number))
    return [slice(start, min(start + size, rows)) for start in range(0, max(1, rows), size)]
