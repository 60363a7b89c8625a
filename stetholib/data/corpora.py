"""Texts: problems in MATH's fields and general documents, generated, installed or from the Hub, by split.

A fine-tune may see train; whatever is chosen or tuned sees validation; test is first asked in step 05; until then it is
looked at only to keep its problems out of the others. On the Hub, validation is a part of the training split picked by hash, and
kept out of the fine-tune."""

import re
from collections.abc import Iterable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from contextlib import suppress
from hashlib import sha256
from pathlib import Path

from stetholib.data import hub, installed
from stetholib.data.mini import problems as mini_problems
from stetholib.data.mini import stories as mini_stories
from stetholib.data.prompts import boxed_answer
from stetholib.data.source import Source
from stetholib.errors import UserError
from stetholib.profiles import Data

Row = Mapping[str, str]
INSTALLED = ("installed", FORMAL := "installed_formal")
SPLITS = ("train", "validation", "test")
HEADING = re.compile(r"\s*= [^=]+ =\s*")  # WikiText's, of the first order
SHARES = ("train",) * 6 + ("validation",) * 2 + ("test",) * 2  # of installed packages, by the hash of their names


def problems(spec: Data, split: str, seed: int, boxed: bool = True) -> list[Row]:
    """Problems of a split, with `problem, level, type, solution, subject`, shuffled; the counts are the profile's. Those of
    a data set are its own test split, or a part of its training split, at most so many of each subject, picked by hash.
    boxed: leave out training problems whose solution has no boxed answer, which a Minerva target needs."""
    wanted = spec.test_problems if split == "test" else dict.fromkeys(spec.subjects, getattr(spec, f"{split}_problems"))
    source = Source.of(spec.maths, spec.maths_revision, "dataset")
    if source.name in INSTALLED:
        raise UserError(f"data.maths is {source.name}, but packages hold general text and no problems; mend data.maths")
    if source.where == "shipped":
        if unknown := sorted(set(wanted) - set(mini_problems.SUBJECTS)):
            known = ", ".join(mini_problems.SUBJECTS)
            raise UserError(f"data.test_problems: there are no generated problems of {unknown[0]!r}; there are: {known}")
        return [*mini_problems.generate(split, wanted, seed)]
    found: list[Row] = []
    for subject, ranked in _ranked(source, spec, split, boxed)[0].items():
        if len(ranked) < wanted[subject] and split != "train":  # train takes what there is, up to so many
            mend = f"lower data.{split}_problems"
            if boxed and split != "test":
                mend += "; only solutions with a \\boxed answer count: if yours have none, set finetune.target to plain"
            lacking = f"{len(ranked)} {split} problems of {subject}, {wanted[subject]} are wanted"
            raise UserError(f"data: {spec.maths} has {lacking}; {mend}")
        found += ranked[: wanted[subject]]
    return sorted(found, key=lambda row: _bucket(row["problem"]))


def general(
    spec: Data, split: str, count: int, seed: int, or_fewer: bool = False, key: str = "data.general_documents"
) -> list[str]:
    """General documents; splits never share one. Raises UserError where there are not so many, unless fewer do (`or_fewer`).
    key: of the profile, which wants so many."""
    source = Source.of(spec.general, spec.general_revision, "dataset")
    if source.name == "generated":
        return mini_stories.generate(count, seed, split)
    shares = SHARES if source.name in INSTALLED else SPLITS
    texts = [text for text, article in _articles(source, spec).items() if shares[_bucket(article) % len(shares)] == split]
    if len(texts) < count and not or_fewer:
        raise UserError(
            f"data: {spec.general} has {len(texts)} general documents for {split}, its share of those with 40 words or more (shorter "
            f"texts are left out), {count} are wanted; lower {key}"
        )
    return sorted(texts, key=_bucket)[:count]


def articles(spec: Data, texts: Sequence[str]) -> list[str]:
    """What each general document is a part of: a package, an article of WikiText, or nothing but itself."""
    source = Source.of(spec.general, spec.general_revision, "dataset")
    known = {} if source.name == "generated" else _articles(source, spec)
    return [known.get(text, text) for text in texts]


def _articles(source: Source, spec: Data) -> Mapping[str, str]:
    """General documents, those with 40 words or more, each with what it is a part of; what follows a heading of the first order
    is its article's."""
    if source.name in INSTALLED:
        return installed.paragraphs(source.name == FORMAL)
    found: dict[str, str] = {}
    article = ""
    for text in (row["text"] for row in _parquet(source, spec.general_config, "validation", ["text"])):
        if HEADING.fullmatch(text):
            article = text
        elif len(text.split()) >= 40:
            found.setdefault(text, article or text)
    return found


def left_out(spec: Data, boxed: bool = True) -> dict[str, int]:
    """How many training problems were left out because they are in the test split, or in validation, as well; empty for
    generated problems, whose splits cannot share one. Problems are one where their texts are, but for white space."""
    source = Source.of(spec.maths, spec.maths_revision, "dataset")
    return {} if source.where == "shipped" else _ranked(source, spec, "train", boxed)[1]


def _ranked(source: Source, spec: Data, split: str, boxed: bool) -> tuple[dict[str, list[Row]], dict[str, int]]:
    """Each subject's problems of a split, ordered by hash, and how many were left out of training. Raises UserError where a folder
    of one's own has problems of the test split among the others, which is for whoever made it to mend."""
    ranked: dict[str, list[Row]] = {}
    for name in spec.subjects:
        read = _parquet(source, name, "test" if split == "test" else "train", ["problem", "solution"])
        usable = ({**row, "subject": name} for row in read if split == "test" or not boxed or _has_answer(row))
        ranked[name] = sorted(usable, key=lambda row: _bucket(row["problem"]))
    if split == "test":
        return ranked, {}
    asked = {_same(row) for name in spec.subjects for row in _parquet(source, name, "test", ["problem"])}
    ranked, both = _without(asked, ranked)
    if both and source.where == "folder":
        raise UserError(
            f"data: {len(both)} training problems of {spec.maths} are in its test split as well, the first is {both[0][:60]!r}; "
            "leave them out of one of the two"
        )
    if split == "validation":
        return ranked, {}
    held = {_same(row) for rows in ranked.values() for row in rows[: spec.validation_problems]}
    # what validation takes is never trained on
    ranked, twice = _without(held, {name: rows[spec.validation_problems :] for name, rows in ranked.items()})
    return ranked, dict(left_out_in_test=len(both), left_out_in_validation=len(twice))


def _without(known: AbstractSet[str], ranked: Mapping[str, list[Row]]) -> tuple[dict[str, list[Row]], list[str]]:
    """The rows whose problem is not known, and the problems of the others."""
    both = [_same(row) for rows in ranked.values() for row in rows if _same(row) in known]
    return {name: [row for row in rows if _same(row) not in known] for name, rows in ranked.items()}, both


def _same(row: Row) -> str:
    """What two rows of one problem have in common: its text, but for white space."""
    return " ".join(row["problem"].split())


def patterns(spec: Data) -> dict[str, list[str]]:
    """The files that a run reads of `maths` and of `general`, as patterns below each data set's folder."""
    maths = [_pattern(subject, split) for subject in spec.subjects for split in ("train", "test")]
    return dict(maths=maths, general=[_pattern(spec.general_config, "validation")])


def _pattern(config: str | None, split: str) -> str:
    return f"{config or 'data'}/{split}-*.parquet"


def _parquet(source: Source, config: str | None, split: str, columns: Sequence[str]) -> Iterable[Row]:
    """The rows of one split of one config of a data set kept as parquet; columns: which it must have at least."""
    from datasets import load_dataset
    from datasets.exceptions import DatasetGenerationError
    from pyarrow.parquet import read_metadata

    repo, pattern = source.name, _pattern(config, split)
    files = sorted(str(path) for path in source.folder([pattern]).glob(pattern))
    if not files:
        raise UserError(f"data: {repo} has no {pattern}; mend data.maths or data.general")
    for file in files:
        hub.checked_hash(Path(file))
    try:
        any_rows = any(read_metadata(file).num_rows for file in files)
        rows = load_dataset("parquet", data_files=files, split="train") if any_rows else None
    except (DatasetGenerationError, OSError, ValueError) as error:
        cause = " ".join(str(error.__cause__ or error).split())[:120]
        raise UserError(
            f"data: {repo}: {Path(files[0]).name} is not a whole parquet file ({cause}); fetch or make it again"
        ) from None
    if rows is None:
        raise UserError(f"data: {repo}: {pattern} holds no rows; fetch or make it again")
    if absent := [name for name in columns if name not in rows.column_names]:
        raise UserError(f"data: {repo}: {pattern} has no column {absent[0]!r}, only {', '.join(rows.column_names)}")
    if empty := [name for name in columns if rows.data.column(name).null_count]:
        raise UserError(f"data: {repo}: {pattern}: some rows have no {empty[0]!r}; leave them out")
    if odd := [name for name in columns if getattr(rows.features[name], "dtype", "list") not in ("string", "large_string")]:
        kind = getattr(rows.features[odd[0]], "dtype", "lists")
        raise UserError(f"data: {repo}: {pattern}: column {odd[0]!r} holds {kind}, not text; save it as strings")
    return rows


def _has_answer(row: Row) -> bool:
    with suppress(UserError):
        return bool(boxed_answer(row["solution"]))
    return False


def _bucket(text: str) -> int:
    return int.from_bytes(sha256(text.encode()).digest()[:8], "big")
