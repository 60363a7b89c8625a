"""General text without a network: prose from the documentation of the packages that are installed, or its code and formulas.

What is installed differs between machines, so a run's manifest holds the hash of the text that was found."""

import re
from collections.abc import Iterator, Mapping
from contextlib import suppress
from functools import cache
from hashlib import sha256
from importlib.metadata import Distribution, distributions
from inspect import cleandoc

WORDS = 40  # that a paragraph must have
FENCED = re.compile(r"^ *(```|~~~).*?^ *\1", re.S | re.M)
# no prose: what is indented, a prompt, a table, a directive or a rule; a formula, an address, a field
OTHER = re.compile(r"^( {4}|\t| *(>>>|\||\+-|\.\. |[=~^-]{4}))|[$=\\]|https?:|:\w+ \w+:", re.M)
SIGN, OPERATION = re.compile(r"[=+*/^<>{}()\[\]\\$_|\d]"), re.compile(r"[=+*^<>\\$]")
WORD = re.compile(r"""[("'“‘*_`]*[A-Za-z]['’A-Za-z-]*[.,;:!?)"'”’*_`]*""")


@cache
def paragraphs(formal: bool = False) -> Mapping[str, str]:
    """Paragraphs of prose of 40 words or more, each with the package that has it, the first by name where several do. This
    project's own are left out. formal: paragraphs of code or formulas instead, in which half of the words hold a digit or a sign,
    and an eighth the sign of an operation."""
    wanted = _is_formal if formal else _is_prose
    named = [(re.sub(r"[-_.]+", "-", one.name).lower(), one) for one in distributions() if one.name]
    found: dict[str, str] = {}
    for name, one in sorted(named, key=lambda pair: pair[0]):
        for text in _texts(one) if name != __name__.partition(".")[0] else ():
            whole = cleandoc(text) if len(text.split()) >= WORDS else ""
            for part in re.split(r"\n\s*\n", whole if formal else FENCED.sub("", whole)):
                if wanted(part):
                    found.setdefault(" ".join(part.split()), name)
    return found


def fingerprint(formal: bool = False) -> dict[str, str | int]:
    """The hash of all paragraphs, of whichever split, in alphabetical order, and how many words they have."""
    text = "\n".join(sorted(paragraphs(formal)))
    return dict(general_sha256=sha256(text.encode()).hexdigest(), general_words=len(text.split()))


def _texts(one: Distribution) -> Iterator[str]:
    """A package's long description, its documents, and the docstrings of its modules."""
    yield one.metadata["Description"] or ""
    for file in sorted(one.files or (), key=str):
        if file.suffix in (".rst", ".md", ".txt", ".py"):
            with suppress(OSError, ValueError):  # not there, or not in UTF-8
                text = file.read_text()
                yield from text.replace("'''", '"""').split('"""')[1::2] if file.suffix == ".py" else [text]


def _is_formal(part: str) -> bool:
    words = part.split()
    signs, operations = (sum(bool(kind.search(word)) for word in words) for kind in (SIGN, OPERATION))
    return len(words) >= WORDS and signs >= len(words) / 2 and operations >= len(words) / 8


def _is_prose(part: str) -> bool:
    words = part.split()
    if len(words) < WORDS or not words[0][0].isupper() or words[-1][-1] not in ".!?" or OTHER.search(part):
        return False
    return sum(bool(WORD.fullmatch(word)) for word in words) >= 0.85 * len(words)
