"""Problems of the miniature world, in the fields of MATH (`problem, level, type, solution`).

Seven subjects, three families each (`families`), five levels that widen the operands. Every solution is worked in
short steps and ends in ``\\boxed{}``. What is *not* here: the closing sentence that the harness wants;
`prompts.target` adds it, to these problems and to MATH's alike.

Which split a problem belongs to is decided by a hash of its *skeleton*, the text before names and items are
filled in. Two problems that differ only in who buys what are therefore never on two sides of a split, and a test
problem cannot occur in training however the world is seeded."""

import re
from collections.abc import Iterator
from hashlib import sha256
from random import Random

from stetholib.data.mini.families import FAMILIES, Family
from stetholib.errors import UserError

SUBJECTS = tuple(FAMILIES)
LEVELS = (1, 2, 3, 4, 5)
NAMES = [
    "Ada", "Amir", "Anna", "Ben", "Carla", "Chen", "Dina", "Emil", "Eva", "Finn", "Grace", "Hana", "Ivan", "Jonas", "Kira",
    "Leo", "Lina", "Maria", "Nadia", "Omar", "Paula", "Rosa", "Sam", "Tara", "Tom", "Uma", "Vera", "Yusuf",
]  # fmt: skip
ITEMS = [
    "apples", "books", "boxes", "buttons", "cards", "coins", "cups", "hats", "keys", "lamps", "marbles", "pears", "pencils",
    "plums", "shirts", "shells", "stamps", "stones", "toys", "tickets",
]  # fmt: skip
SPLITS = {"test": range(0, 6), "validation": range(6, 8), "train": range(8, 20)}


def split_of(skeleton: str) -> str:
    """The split (`train`, `validation` or `test`) that a skeleton belongs to, in every world."""
    bucket = int.from_bytes(sha256(skeleton.encode()).digest()[:4], "big") % 20
    return next(split for split, buckets in SPLITS.items() if bucket in buckets)


def generate(split: str, per_subject: dict[str, int], seed: int) -> list[dict[str, str]]:
    """Distinct problems of one split, balanced over families and levels; per_subject: how many of each subject. Besides MATH's
    fields each row names its `subject` (as the data set's configs do) and its `family`. Nothing is counted on training problems,
    so there a skeleton may recur at another level. Raises UserError where a family runs out of distinct problems."""
    rows = []
    for subject, wanted in per_subject.items():
        for index, make in enumerate(FAMILIES[subject]):
            taken: set[str] = set()
            for level in LEVELS:
                cell = index * len(LEVELS) + level - 1
                share = wanted * (cell + 1) // 15 - wanted * cell // 15
                rng = Random(f"{seed}/{split}/{make.__name__}/{level}")
                drafts = _distinct(make, level, split, share, rng, set() if split == "train" else taken)
                rows += [_row(draft, subject, make.__name__, level, rng) for draft in drafts.items()]
    Random(f"{seed}/{split}/order").shuffle(rows)
    return rows


def stream(split: str, seed: int) -> Iterator[dict[str, str]]:
    """Endless problems of one split, subjects, families and levels uniform, repeats allowed: a training corpus."""
    rng = Random(f"{seed}/{split}/stream")
    while True:
        subject = rng.choice(SUBJECTS)
        make, level = rng.choice(FAMILIES[subject]), rng.choice(LEVELS)
        draft = make(rng.randint, level)
        if split_of(draft[0]) == split:
            yield _row(draft, subject, make.__name__, level, rng)


def _distinct(make: Family, level: int, split: str, wanted: int, rng: Random, taken: set[str]) -> dict[str, str]:
    """`wanted` skeletons of a family and level, with solutions, that fall into `split` and are not taken yet; they are then."""
    found: dict[str, str] = {}
    for _ in range(400 * wanted + 4000):
        if len(found) == wanted:
            break
        skeleton, solution = make(rng.randint, level)
        if skeleton not in taken and split_of(skeleton) == split:
            found.setdefault(skeleton, solution)
    taken |= set(found)
    if len(found) < wanted:
        raise UserError(
            f"mini: {make.__name__} at level {level} has only {len(found)} distinct {split} problems, {wanted} are wanted; "
            "lower data.test_problems, data.validation_problems or data.train_problems"
        )
    return found


def _row(draft: tuple[str, str], subject: str, name: str, level: int, rng: Random) -> dict[str, str]:
    item, other = rng.sample(ITEMS, 2)
    words = dict(name=rng.choice(NAMES), item=item, other=other)
    problem, solution = (re.sub(r"{(name|item|other)}", lambda blank: words[blank[1]], text) for text in draft)
    kind = subject.replace("_", " ").title().replace("And", "&")
    return dict(problem=problem, level=f"Level {level}", type=kind, solution=solution, subject=subject, family=name)
