"""Generated exercises, whose correct continuation is known. The seed is fixed, so the documents are always the same."""

import random
from collections.abc import Callable, Iterator

NAMES = ("Ada", "Ben", "Chloe", "Dara", "Emil", "Fay", "Gus", "Hana", "Ivo", "June", "Kofi", "Lea", "Milo", "Nora")
THINGS = (
    "apples",
    "books",
    "coins",
    "eggs",
    "keys",
    "letters",
    "marbles",
    "nails",
    "pears",
    "ropes",
    "shells",
    "stamps",
)


def _number(rng: random.Random) -> int:
    """Return a number of one to four digits; each length is equally likely."""
    return rng.randrange(10 ** rng.randint(1, 4))


def _sum(rng: random.Random) -> str:
    terms = [_number(rng) for _ in range(rng.randint(2, 4))]
    return f"{' + '.join(map(str, terms))} = {sum(terms)}"


def _difference(rng: random.Random) -> str:
    a, b = _number(rng), _number(rng)
    return f"{a} - {b} = {a - b}"


def _product(rng: random.Random) -> str:
    a, b = rng.randrange(100), rng.randrange(100)
    return f"{a} * {b} = {a * b}"


def _division(rng: random.Random) -> str:
    divisor, quotient = rng.randint(2, 30), rng.randint(0, 99)
    rest = rng.randrange(divisor)
    return f"{divisor * quotient + rest} / {divisor} = {quotient} remainder {rest}"


def _comparison(rng: random.Random) -> str:
    a, b = _number(rng), _number(rng)
    return f"{a} {'<' if a < b else '>' if a > b else '='} {b}"


def _brackets(rng: random.Random) -> str:
    a, b, c = rng.randrange(50), rng.randrange(50), rng.randint(2, 9)
    return f"({a} + {b}) * {c} = {a + b} * {c} = {(a + b) * c}"


def _progression(rng: random.Random) -> str:
    start, step = rng.randrange(100), rng.choice([-9, -5, -4, -3, -2, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 25])
    return ", ".join(str(start + i * step) for i in range(rng.randint(5, 9)))


def _sorting(rng: random.Random) -> str:
    numbers = [rng.randrange(100) for _ in range(rng.randint(4, 7))]
    return f"sort {' '.join(map(str, numbers))}: {' '.join(map(str, sorted(numbers)))}"


def _gift(rng: random.Random) -> str:
    (giver, taker), thing = rng.sample(NAMES, 2), rng.choice(THINGS)
    has = rng.randint(5, 200)
    gives = rng.randint(2, has - 2)
    return f"{giver} has {has} {thing} and gives {gives} to {taker}. {giver} keeps {has - gives} {thing}."


def _price(rng: random.Random) -> str:
    name, thing, count, price = rng.choice(NAMES), rng.choice(THINGS), rng.randint(2, 20), rng.randint(2, 50)
    return f"{name} buys {count} {thing} for {price} euros each and pays {count * price} euros."


def _journey(rng: random.Random) -> str:
    speed, hours = rng.randint(3, 120), rng.randint(2, 12)
    return f"At {speed} km an hour, {rng.choice(NAMES)} travels {speed * hours} km in {hours} hours."


KINDS: tuple[Callable[[random.Random], str], ...] = (
    _sum, _difference, _product, _division, _comparison, _brackets, _progression, _sorting, _gift, _price, _journey,
)  # fmt: skip


def exercises() -> Iterator[str]:
    """Yield documents without end. Each has 8 to 40 lines, of one to three kinds of exercises."""
    rng = random.Random("arithmetic")
    while True:
        kinds = rng.sample(KINDS, rng.randint(1, 3))
        yield "".join(rng.choice(kinds)(rng) + "\n" for _ in range(rng.randint(8, 40)))
