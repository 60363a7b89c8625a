"""Problems of the miniature world, in the fields of MATH (`problem, level, type, solution`).

Seven subjects, three families each (`families`), five levels that widen the operands. Every solution is worked in
short steps and ends in ``\\boxed{}``. What is *not* here: the closing sentence that the harness wants;
`prompts.target` adds it, to these problems and to MATH's alike.

Which split a problem belongs to is decided by a hash of its *skeleton*, the text before names and items are
filled in. Two problems that differ only in who buys what are therefore never on two sides of a split, and a test
problem cannot occur in training however the world is seeded.
"""

from collections.abc import Iterator
from hashlib import sha256
from random import Random

from stetholib.data.mini.families import FAMILIES, Draft, Family
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


def split_of(draft: Draft) -> str:
    """The split (`train`, `validation` or `test`) that a skeleton belongs to, in every world."""
    bucket = int.from_bytes(sha256(draft.problem.encode()).digest()[:4], "big") % 20
    return next(split for split, buckets in SPLITS.items() if bucket in buckets)


def generate(split: str, per_subject: dict[str, int], seed: int) -> list[dict[str, str]]:
    """Distinct problems of one split, balanced over families and levels, in MATH's fields.

    per_subject: how many problems of each subject. Besides MATH's four fields each row names its `subject` (as the
    data set's configs do) and its `family`. Nothing is counted on training problems, so there a skeleton may recur
    at another level. Raises UserError where a family runs out of distinct problems.
    """
    rows = []
    for subject, wanted in per_subject.items():
        for index, make in enumerate(FAMILIES[subject]):
            taken: set[str] = set()
            for level in LEVELS:
                if split == "train":
                    taken = set()
                cell = index * len(LEVELS) + level - 1
                share = wanted * (cell + 1) // 15 - wanted * cell // 15
                rng = Random(f"{seed}/{split}/{make.__name__}/{level}")
                drafts = _distinct(make, level, split, share, rng, taken)
                rows += [_row(draft, subject, make.__name__, level, rng) for draft in drafts]
    Random(f"{seed}/{split}/order").shuffle(rows)
    return rows


def stream(split: str, seed: int) -> Iterator[dict[str, str]]:
    """Endless problems of one split, subjects, families and levels uniform, repeats allowed: a training corpus."""
    rng = Random(f"{seed}/{split}/stream")
    while True:
        subject = rng.choice(SUBJECTS)
        make, level = rng.choice(FAMILIES[subject]), rng.choice(LEVELS)
        draft = make(rng.randint, level)
        if split_of(draft) == split:
            yield _row(draft, subject, make.__name__, level, rng)


def _distinct(make: Family, level: int, split: str, wanted: int, rng: Random, taken: set[str]) -> list[Draft]:
    """`wanted` skeletons of one family and level that fall into `split` and are not taken yet, which they are then."""
    found: dict[str, Draft] = {}
    for _ in range(400 * wanted + 4000):
        if len(found) == wanted:
            break
        draft = make(rng.randint, level)
        if draft.problem not in taken and split_of(draft) == split:
            found.setdefault(draft.problem, draft)
    taken |= set(found)
    if len(found) < wanted:
        raise UserError(
            f"mini: {make.__name__} at level {level} has only {len(found)} distinct {split} problems, {wanted} are wanted; "
            "lower data.test_problems, data.validation_problems or data.train_problems"
        )
    return list(found.values())


def _row(draft: Draft, subject: str, name: str, level: int, rng: Random) -> dict[str, str]:
    item, other = rng.sample(ITEMS, 2)
    blanks = {"{name}": rng.choice(NAMES), "{item}": item, "{other}": other}
    texts = []
    for text in (draft.problem, draft.solution):
        for blank, word in blanks.items():
            text = text.replace(blank, word)
        texts.append(text)
    kind = subject.replace("_", " ").title().replace("And", "&")
    return dict(problem=texts[0], level=f"Level {level}", type=kind, solution=texts[1], subject=subject, family=name)
