"""Instructions without an image, so that what is tuned to look goes on to answer in words alone."""

from __future__ import annotations

import random

OPPOSITES = {
    "hot": "cold", "big": "small", "up": "down", "old": "new", "early": "late", "full": "empty", "hard": "soft",
    "dark": "light", "fast": "slow", "high": "low", "wet": "dry", "open": "closed", "first": "last", "rich": "poor",
}  # fmt: skip
KINDS = {
    "dog": "animal", "horse": "animal", "eagle": "animal", "trout": "animal", "apple": "fruit", "pear": "fruit",
    "plum": "fruit", "hammer": "tool", "saw": "tool", "pliers": "tool", "oak": "tree", "birch": "tree", "pine": "tree",
    "violin": "instrument", "flute": "instrument", "drum": "instrument",
}  # fmt: skip
DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")


def _sum(rng: random.Random) -> tuple[str, str]:
    a, b = rng.randint(1, 30), rng.randint(1, 30)
    return rng.choice((f"What is {a} plus {b}?", f"Add {a} and {b}.")), str(a + b)


def _larger(rng: random.Random) -> tuple[str, str]:
    a, b = rng.sample(range(100), 2)
    return rng.choice((f"Which is larger, {a} or {b}?", f"Take the larger of {a} and {b}.")), str(max(a, b))


def _opposite(rng: random.Random) -> tuple[str, str]:
    word = rng.choice(list(OPPOSITES))
    return rng.choice((f"What is the opposite of {word}?", f"Name the opposite of the word {word}.")), OPPOSITES[word]


def _kind(rng: random.Random) -> tuple[str, str]:
    word, kinds = rng.choice(list(KINDS)), sorted(set(KINDS.values()))
    return f"Is {word} one of these: {', '.join(kinds)}? Answer with one word.", KINDS[word]


def _next_day(rng: random.Random) -> tuple[str, str]:
    index = rng.randrange(7)
    return rng.choice((f"Which day comes after {DAYS[index]}?", f"Yesterday was {DAYS[index]}. What is today?")), DAYS[
        (index + 1) % 7
    ]


def _first_letter(rng: random.Random) -> tuple[str, str]:
    word = rng.choice([*OPPOSITES, *KINDS])
    return f"With which letter does the word {word} begin?", word[0].upper()


INSTRUCTIONS = (_sum, _larger, _opposite, _kind, _next_day, _first_letter)


def instruction(rng: random.Random) -> tuple[str, str]:
    """An instruction of one of the kinds, and its answer."""
    return rng.choice(INSTRUCTIONS)(rng)
