"""General text of the miniature world: short stories that share names, items, words and numerals with the problems.

Many words of the problems (box, sum, ways, left, half) stand in other senses, so that a feature that tells stories from
mathematics has to hear more than vocabulary. They contain no formula: `$`, `=` and `\\` never occur."""

from collections.abc import Iterator
from itertools import islice
from random import Random

from stetholib.data.mini.problems import ITEMS, NAMES

PLACES = ["market", "station", "school", "library", "garden", "harbour", "museum", "bakery", "theatre", "village"]
# the blanks of the sentences, in the order in which they are drawn
WORDS = {
    "item": ITEMS,
    "colour": ["red", "blue", "green", "white", "yellow", "black"],
    "day": ["Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"],
}
NUMBERS = {"m": (2, 40), "hour": (1, 12), "hour2": (1, 12), "year": (1900, 2020), "year2": (1900, 2020)}  # both ends included
SENTENCES = (
    "{name} lives in house number {n} near the {place}.",
    "The {colour} bus {n} goes from the {place} to the {place2} every {day}.",
    "In {year} the {place} was closed for {n} days.",
    "{name} and {name2} met at the {place} at {hour} and talked until {hour2}.",
    "There are {n} {item} in the box, and most of them are {colour}.",
    "{name} pays for the {item} and gives {name2} the rest.",
    "How many {item} are left at home, {name2} asked, but {name} did not know.",
    "The old {place} is the larger of the two, and its area is well known.",
    "{name} found {n} {item} between the {place} and the {place2}.",
    "On {day} the train from platform {n} was {m} minutes late.",
    "What is the name of the {colour} boat, asked {name}.",
    "{name} has read {n} books since {year}, and each of them twice.",
    "Half of the {item} were sold before {hour} in the morning.",
    "The matrix was a film of {year}, and {name} liked it.",
    "There is no greatest common sense in that, said {name}, and left.",
    "The two friends picked one of the {colour} {item} at the {place}.",
    "Room {n} is on floor {m}, at the end of a long and wide hall.",
    "{name} was born in {year} and {name2} in {year2}.",
    "A page with the number {n} was lost, and so was the next one.",
    "So the sum of it is that {name} starts at the {place} on {day}.",
    "In many ways the {place} is divided into {m} parts, and the third is {colour}.",
    "At every angle the roots of the tree looked {colour}.",
    "The function of the {item} is to please {name}, who buys {n} at once.",
    "{name2} grows {item} with a high fence, {m} steps from the {place}.",
    "If it rains on {day}, {name} solves the matter with a {colour} umbrella.",
    "The price went up by {m} percent in {year}, and {name} was one of {n} who saw it.",
    "Their difference is old, and it is what {name} and {name2} say when asked.",
    "Then the {n} guests of the {place} had a {colour} cake for {m}.",
)


def stream(seed: int, split: str = "train") -> Iterator[str]:
    """Endless stories of five to nine sentences; different splits and seeds give different stories."""
    rng = Random(f"{seed}/{split}/stories")
    while True:
        name, name2 = rng.sample(NAMES, 2)
        sentences = rng.sample(SENTENCES, rng.randint(5, 9))
        yield " ".join(_fill(sentence, name, name2, rng) for sentence in sentences)


def generate(count: int, seed: int, split: str) -> list[str]:
    """`count` stories of a split."""
    return list(islice(stream(seed, split), count))


def _fill(sentence: str, name: str, name2: str, rng: Random) -> str:
    place, place2 = rng.sample(PLACES, 2)
    words = {blank: rng.choice(choices) for blank, choices in WORDS.items()}
    n = rng.choice((rng.randint(2, 30), rng.randint(2, 300)))
    numbers = {blank: rng.randint(low, high) for blank, (low, high) in NUMBERS.items()}
    return sentence.format(name=name, name2=name2, place=place, place2=place2, n=n, **words, **numbers)
