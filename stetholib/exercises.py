"""Exercises of the notebooks: what a reader predicts is held against the study at hand, never against a number that is typed here.

`facts` of an exercise computes the truth, and what likely wrong answers are worth; each of these has a hint of its own.
"""

from collections.abc import Callable, Collection, Iterable, Mapping
from contextlib import suppress
from functools import partial
from typing import Any

import numpy as np
import pandas as pd
from IPython.display import Markdown

from stetholib import layer_sets, leaderboard
from stetholib.claims import HOLDS, SAME
from stetholib.errors import UserError
from stetholib.models import subspaces
from stetholib.profiles import nearest
from stetholib.sae_features import best_features
from stetholib.significance import ALL
from stetholib.statistics import minimum_detectable
from stetholib.study.layer_selection import DEFINITIONS

NUMBER, SHARE, TRUE, NAME = "a number", "a share between 0 and 1", "True or False", "a name in quotation marks"
EMPTY = "*Yours to answer: write it where `None` stands, and run this cell again (Shift and Enter).*"
SCALES = (0.5, 1.0, 1.5, 2.0, 3.0)
Facts = Callable[[Any], dict[str, Any]]
GOOD = 0.9  # the share of other sets that a good pick beats


class Exercise:
    """wants: what an answer must be; facts: of an open study, `truth` and what else texts and hints name; right: said of the right
    answer; near: how close counts as equal; hints: by the fact that a wrong answer equals, and `otherwise`, kept as `else`, in
    which `side` is whether the truth is more or less."""

    def __init__(self, wants: str, facts: Facts, right: str, near: float = 0.005, *, otherwise: str, **hints: str) -> None:
        """A question's texts and numbers."""
        self.wants, self.facts, self.right, self.near = wants, facts, right, near
        self.hints = hints | {"else": otherwise}


def check(study: Any, question: str, answer: Any) -> Markdown:
    """Whether an answer is right, by the study: the number, or the hint that this answer deserves. study: an open `Study`. An answer
    that is empty or of another kind gets a friendly line. Raises UserError for a question that does not exist."""
    if question not in EXERCISES:
        raise UserError(f"exercises: no question {question!r}{nearest(question, EXERCISES)}; there are: {', '.join(EXERCISES)}")
    one = EXERCISES[question]
    if _is_empty(answer):
        return Markdown(EMPTY)
    if (given := _read(one.wants, answer)) is None:
        return Markdown(f"**Not an answer yet.** Here {one.wants} is wanted; this is {_named(answer)}.")
    facts = _facts(one, study)
    if facts["truth"] is None:
        return Markdown('**Not to be told here.** This study has nothing to check it by; the miniature has (`profile = "mini"`).')
    if _same(given, facts["truth"], one.near):
        return Markdown(f"**Right.** {one.right.format(**facts)}")
    side = "more" if isinstance(given, float) and given < facts["truth"] else "less"
    return Markdown(f"**Not yet.** {_hint(one, given, facts).format(**facts, side=side)}")


def pick(study: Any, layers: Any) -> Markdown:
    """Where a reader's own set of layers stands: among every set of as many, where the layers of mathematics are known by
    construction (which needs no SAE), else among the study's random sets, with an interval over problems.

    study: an open `Study`; layers: as many as the stethoscope selects. Anything else gets a friendly line.
    """
    if _is_empty(layers):
        return Markdown(EMPTY)
    count, every = study.layer_selection.selected_count, study.world.layers
    chosen = _layers(layers, every)
    if chosen is None or len(chosen) != count:
        wanted = f"{count} different layers from 0 to {every - 1}, as `{tuple(range(count))}`"
        return Markdown(f"**Not an answer yet.** Here {wanted}, are wanted; this is {_named(layers)}.")
    known = study.profile.finetune.blocks
    share, said = _among_all(study, chosen, known) if known and len(known) == count else _among_random(study, chosen)
    largest = layer_sets.select(layer_sets.layer_energies(study.task_vectors.energies()), count)
    last = tuple(range(every - count, every))
    habits = {
        last: "These are the last layers: they write the closing sentence, and sets are judged by the solution.",
        largest: "These are the layers that changed most: how far a layer moved does not say what that is worth.",
    }
    if share >= GOOD:
        return Markdown(f"**Well picked.** {said}")
    hint = habits.get(chosen, "What does each layer bring alone? The figure of effects shows it.")
    return Markdown(f"**Not yet**: a good set beats {GOOD:.0%} of the others. {said} {hint}")


def answers(study: Any) -> pd.DataFrame:
    """What whoever teaches wants beforehand: columns question, truth, and likely_wrong, the answers that have a hint of their own."""
    rows = []
    for question, one in EXERCISES.items():
        facts = _facts(one, study)
        wrong = ", ".join(_shown(facts[name]) for name in one.hints if name in facts)
        rows.append(dict(question=question, truth=_shown(facts["truth"]), likely_wrong=wrong))
    return pd.DataFrame(rows)


def _facts(one: Exercise, study: Any) -> dict[str, Any]:
    """An exercise's facts; the truth is None where the study cannot tell, as where it asked no such variant."""
    try:
        facts = one.facts(study)
    except (KeyError, IndexError):
        return dict(truth=None)
    return facts if facts["truth"] == facts["truth"] else dict(truth=None)


def _shown(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, int | float) and not isinstance(value, bool) else str(value)


def _is_empty(answer: Any) -> bool:
    """None, an empty text, list or set; 0 and False are answers."""
    with suppress(TypeError):  # of what has no length
        return len(answer) == 0
    return answer is None or answer is ...


def _named(answer: Any) -> str:
    return f"`{' '.join(repr(answer).split()):.60}` ({type(answer).__name__})"


def _read(wants: str, answer: Any) -> Any:
    """An answer as what is wanted, None where it is not that."""
    if wants == TRUE:
        return bool(answer) if isinstance(answer, bool | np.bool_) else None
    if wants == NAME:
        return answer.strip().lower() if isinstance(answer, str) else None
    if isinstance(answer, bool) or not isinstance(answer, int | float | np.integer | np.floating):
        return None
    return float(answer) if -1e9 < answer < 1e9 else None


def _layers(layers: Any, every: int) -> layer_sets.LayerSet | None:
    """Different layers in order of depth, None where they are not that."""
    if isinstance(layers, str | Mapping) or not isinstance(layers, Iterable):
        return None
    given = list(layers)
    if not all(isinstance(one, int | np.integer) and not isinstance(one, bool) and 0 <= one < every for one in given):
        return None
    return tuple(sorted(map(int, given))) if len(set(given)) == len(given) else None


def _same(given: Any, fact: Any, near: float) -> bool:
    return bool(abs(given - fact) <= near) if isinstance(given, float) and isinstance(fact, int | float) else given == fact


def _hint(one: Exercise, given: Any, facts: Mapping[str, Any]) -> str:
    """The hint that this wrong answer deserves."""
    other = one.hints["else"]
    if one.wants == SHARE and not 0 <= given <= 1:
        other = "A share lies between 0 and 1; of so many per cent take the hundredth part."
    return next((hint for name, hint in one.hints.items() if name in facts and _same(given, facts[name], one.near)), other)


def _among_all(study: Any, chosen: layer_sets.LayerSet, known: Collection[int]) -> tuple[float, str]:
    board = leaderboard.all_sets(study, len(chosen)).set_index("layers")
    own, meant = (list(board.index).index(" ".join(map(str, one))) for one in (chosen, known))
    share, common = float(board["share"].iloc[own]), len({*chosen} & {*known})
    said = f"Layers {layer_sets.ranges(' '.join(map(str, chosen)))} stand at place {own + 1} of {len(board)} and beat {share:.0%} of the others. "
    told = f"{common} of them are among the layers that mathematics was put into, whose own set stands at place {meant + 1}."
    return share, said + told


def _among_random(study: Any, chosen: layer_sets.LayerSet) -> tuple[float, str]:
    sets = study.layer_selection.sets()
    drawn = sets.loc[sets["selector"] == "random", "layers"].tolist()
    before, (own, *others) = study.losses.of(()).nats(), leaderboard.by_problem(study, [" ".join(map(str, chosen)), *drawn])
    found = layer_sets.percentiles((own - before)[None], np.stack(others) - before, study.world.seed("percentiles"))
    share, low, high = map(float, found[0])
    noise = f"Other problems could have given {low:.0%} to {high:.0%}; chance is 50 %."
    return share, f"Layers {layer_sets.ranges(' '.join(map(str, chosen)))} beat {share:.0%} of {len(drawn)} random sets. {noise}"


def _twice(study: Any) -> dict[str, Any]:
    vector = study.task_vectors.vector
    energy = vector.energy()
    return dict(truth=(2 * vector).energy() / energy if energy else None, twice=2.0, same=1.0)


def _last_layers(study: Any) -> dict[str, Any]:
    energies, count = layer_sets.layer_energies(study.task_vectors.energies()), study.layer_selection.selected_count
    whole = float(energies.sum())
    return dict(truth=float(energies[-count:].sum()) / whole if whole else None, even=count / len(energies))


def _scale(study: Any) -> dict[str, Any]:
    count = study.layer_selection.selected_count
    middle = tuple(range(count, 2 * count))
    falls = {alpha: study.losses.of(()).mean() - study.losses.of(middle, alpha).mean() for alpha in SCALES}
    best = max(falls, key=lambda alpha: falls[alpha])
    return dict(truth=best, one=1.0, farthest=SCALES[-1], best=falls[best], at_one=falls[1.0], at_end=falls[SCALES[-1]])


def _random_dictionary(study: Any) -> dict[str, Any]:
    once = study.sae_features.table().query("contrast == 'corpus'")
    return dict(truth=float(once["fvu_random"].mean()), mean=1.0, trained=float(once["fvu"].mean()), nothing=0.0)


def _matched(study: Any) -> dict[str, Any]:
    top = study.sae_features.table().groupby("contrast")["top_specificity"].max()
    return dict(truth=bool(top["matched"] < top["corpus"]), corpus=top["corpus"], matched=top["matched"])


def _foreign_words(study: Any) -> dict[str, Any]:
    step, tokenizer = study.sae_features, study.world.base.tokenizer
    heard, words = step.listening, step.top_tokens(*best_features(step.table())["corpus"])["token"]
    general = [text for text, corpus in zip(heard.texts, heard.corpus_of, strict=True) if corpus == max(heard.corpus_of)]
    known = {tokenizer.decode([word]) for text in general for word in tokenizer(text).input_ids}
    foreign = [word for word in words if word not in known]
    listed = ", ".join(f"`{word.strip() or repr(word)}`" for word in foreign) or "none"
    return dict(truth=len(foreign), none=0, all=len(words), words=listed)


def _chance(study: Any) -> dict[str, Any]:
    step, energies = study.subspace_projection, study.task_vectors.energies()
    pooled = subspaces.pooled(step.table(), energies).set_index(["rank", "basis"])["energy_retained"][step.ranks.default]
    share = step.ranks.default / step.width
    return dict(truth=float(pooled["random"]), nothing=0.0, length=share**0.5, sae=float(pooled["sae_decoder"]), share=share)


def _by_energy(name: str, study: Any) -> dict[str, Any]:
    rows = study.subspace_projection.energy_or_direction().set_index("variant")
    part = rows["loss_change"] / rows["loss_change"]["full"]
    energy = float(rows["energy"]["scalpel"])
    return dict(truth=float(part[name]), scalpel=float(part["scalpel"]), energy=energy, length=energy**0.5, all=1.0)


def _in_common(study: Any) -> dict[str, Any]:
    rows = study.layer_selection.agreement().query("contrast == 'corpus'").set_index("definition")["layers"]
    common = set.intersection(*({*str(rows[kind]).split()} for kind in DEFINITIONS))
    return dict(truth=len(common), all=study.layer_selection.selected_count)


def _unclosed(study: Any) -> dict[str, Any]:
    records = study.minerva_math.records(["base"])
    unread = records[(records["extracted"] == "[invalidanswer]") & (records["math_verify"] == 1)]
    return dict(truth=bool(unread["exact_match"].any()) if len(unread) else None, count=len(unread))


def _unread(study: Any) -> dict[str, Any]:
    base = study.minerva_math.records(["base"])
    right = (base["math_verify"] == 1) & (base["exact_match"] == 0)
    unreadable = float((base["extracted"] == "[invalidanswer]").mean())
    return dict(truth=float(right.mean()), none=0.0, unreadable=unreadable, count=int(right.sum()))


def _beside_random(study: Any) -> dict[str, Any]:
    table = study.minerva_math.table()
    rows = table[table["subject"] == ALL].set_index("variant")
    random = [name for name in rows.index if name.startswith("random_")]
    by = {name: float(rows[name]["stethoscope"] - rows[name][random].mean()) for name in ("accuracy", "math_verify")}
    base = float(rows["math_verify"]["stethoscope"] - rows["math_verify"]["base"])
    in_points = dict(points=100 * by["math_verify"], base_points=100 * base)
    return dict(truth=by["math_verify"] if random else None, base=base, exact=by["accuracy"], count=len(random)) | in_points


def _test(study: Any) -> dict[str, Any]:
    rows = study.significance.published().set_index("test")
    printed = {name: f"{row.z:+.2f} and {row.p:.4f}" for name, row in rows.iterrows()}
    truth = [name for name, said in printed.items() if said == "+3.41 and 0.0007"]
    return dict(truth=truth[0], **{f"of_{name}": said for name, said in printed.items()}, pooled="pooled", unpooled="unpooled")


def _strictly(study: Any) -> dict[str, Any]:
    ledger = study.significance.claims()
    count = lambda column: int(ledger[ledger[column] != SAME].groupby("claim")[column].agg(lambda of: of.isin(HOLDS).all()).sum())  # noqa: E731
    return dict(truth=count("verdict_strict"), verdict=count("verdict"), all=ledger["claim"].nunique())


def _halved(study: Any) -> dict[str, Any]:
    table, level = study.significance.table(), study.significance.margins.level
    row = table[(table["variant"] == "stethoscope") & (table["subject"] == ALL)].iloc[0]
    n, changed, mde = int(row["n"]), (row["gained"] + row["lost"]) / row["n"], float(row["mde"])
    found = (float(times) for times in np.arange(1, 17, 0.01) if minimum_detectable(changed, round(times * n), level) <= mde / 2)
    times = next(found, None) if mde <= changed else None  # with fewer changes the test finds no difference of the kind
    return dict(truth=times, twice=2.0, half=mde / 2, mde=mde, n=n, wanted=round((times or 0) * n))


EXERCISES: dict[str, Exercise] = {
    "energy of twice the vector": Exercise(
        NUMBER,
        _twice,
        "Twice the vector has {truth:.4g} times the energy: every entry doubles, and energy sums their squares.",
        twice="Every entry doubles, but energy sums *squares*.",
        same="Every entry changes, so the sum of their squares does too.",
        otherwise="Energy is the sum of the squares of all entries: what becomes of a square when its entry doubles?",
        near=0.01,
    ),
    "energy of the last third": Exercise(
        SHARE,
        _last_layers,
        "The last third of the layers holds {truth:.1%} of the energy; an even spread would give {even:.1%}.",
        even="That is an even spread. Do all bars of the right figure reach just that line?",
        otherwise="It is {side} than that: add up the bars of these layers in the right figure.",
    ),
    "best scale": Exercise(
        NUMBER,
        _scale,
        "At {truth:g} the loss falls by {best:.4f} nats a token; at 1 by {at_one:.4f}, at {farthest:g} by {at_end:.4f}.",
        one="At 1 *all* layers together are the fine-tuned model. Need the best scale of a third of them, alone, be the same?",
        farthest="So far out the vector has left what it was trained for: the loss is above its lowest again.",
        otherwise="Another of the five does better: ask `study.losses.of(layers, alpha).mean()` for each.",
    ),
    "unexplained by random directions": Exercise(
        SHARE,
        _random_dictionary,
        "Random directions leave {truth:.2f}, the trained SAEs {trained:.2f}: the best few of many directions explain something, whatever they are.",
        mean="1 is always answering the mean. Of many random directions the few that fit a token best are chosen: that explains something.",
        nothing="0 would be a perfect reconstruction.",
        trained="That is what the trained SAEs leave. Which column is the random dictionary's?",
        otherwise="It is {side} than that: see the column `fvu_random`.",
        near=0.05,
    ),
    "matched words lower the best feature": Exercise(
        TRUE,
        _matched,
        "The best d is {corpus:.2f} on all tokens and {matched:.2f} on matched words.",
        otherwise="The best d is {corpus:.2f} on all tokens and {matched:.2f} on matched words. "
        "What would have to be so if the best feature heard vocabulary alone?",
    ),
    "words that general text never holds": Exercise(
        NUMBER,
        _foreign_words,
        "{truth} of the {all}: {words}. On the others the feature must tell mathematics by what stands around the word.",
        none="Some of these signs no general text holds: look for them in the texts that were heard.",
        all="Then the feature would be a detector of vocabulary. Do stories not hold the plainest of these words?",
        otherwise="It is {side} than that: compare the words with those of every general text that was heard.",
    ),
    "kept by a random subspace": Exercise(
        SHARE,
        _chance,
        "A random subspace keeps {truth:.1%}, as rank by width says ({share:.1%}); the SAE's keeps {sae:.1%}.",
        nothing="Little, but not nothing: a random direction is nearly orthogonal to the vector, and there are several of them.",
        length="That is the share of the *length*. Energy is its square.",
        sae="That is what the SAE's directions keep. What would directions drawn at random keep?",
        otherwise="It is {side} than that: take the rank by the width.",
        near=0.004,
    ),
    "gain of the shrunk vector": Exercise(
        SHARE,
        partial(_by_energy, "raw_shrunk"),
        "With {energy:.1%} of the energy the raw vector keeps {truth:.0%} of the gain: its length is {length:.0%}, and the first steps bring most.",
        energy="That is its energy. The *weights* move by the square root of that share.",
        length="That is its length: right if the loss fell along a straight line. Does the first step bring as much as the last?",
        otherwise="It is {side} than that: divide `loss_change` of `raw_shrunk` by that of `full`.",
        near=0.05,
    ),
    "gain of the rescaled scalpel": Exercise(
        SHARE,
        partial(_by_energy, "scalpel_rescaled"),
        "With all the energy, the scalpel's direction brings {truth:.0%} of the gain; shrunk, {scalpel:.0%}. What was lost was direction.",
        all="It has all the *energy* again, but not the direction: what was orthogonal to the subspace does not come back.",
        scalpel="That is the scalpel before it was scaled back.",
        otherwise="It is {side} than that: divide `loss_change` of `scalpel_rescaled` by that of `full`.",
        near=0.05,
    ),
    "layers on which three definitions agree": Exercise(
        NUMBER,
        _in_common,
        "Of {all} layers, all three definitions select {truth} in common: which layers are specific is partly a choice of formula.",
        all="The three rank layers alike only in part: compare the column `layers` of their rows for all tokens.",
        otherwise="It is {side} than that: compare the column `layers` of the three rows for all tokens.",
    ),
    "exact match without the closing sentence": Exercise(
        TRUE,
        _unclosed,
        "The base has {count} such answers that Math-Verify counts as right, and exact match counts none of them.",
        otherwise="Exact match reads an answer from the closing sentence only. Where does it stand in such an answer?",
    ),
    "right but not read": Exercise(
        SHARE,
        _unread,
        "{count} answers, {truth:.1%} of all: so much can be gained without any mathematics.",
        none="Some are: count answers of the base with `math_verify` 1 and `exact_match` 0.",
        unreadable="That is every answer that cannot be read. Some of these are wrong as well.",
        otherwise="It is {side} than that: count answers of the base with `math_verify` 1 and `exact_match` 0.",
        near=0.01,
    ),
    "stethoscope minus random layers": Exercise(
        "a difference of two shares, as 0.01 for one point",
        _beside_random,
        "By Math-Verify its layers bring {points:+.1f} points more than {count} random sets of as many do on average; against the base it is {base_points:+.1f}.",
        base="That is its lead over the *base*. Random layers lead the base as well.",
        exact="That is by exact match, which counts the closing sentence too.",
        otherwise="It is {side} than that: take its `math_verify` over all subjects, less the mean of `random_1` to `random_3`.",
    ),
    "test that prints both figures": Exercise(
        NAME,
        _test,
        "Only with the harness's standard errors do z and p print as published.",
        pooled="The pooled test, that of the textbook, prints {of_pooled}.",
        unpooled="It prints {of_unpooled}: the z is as published, the p is not.",
        otherwise="The table above has three: harness, unpooled, pooled.",
    ),
    "claims that hold strictly": Exercise(
        NUMBER,
        _strictly,
        "{truth} of {all} claims hold by what a sceptic would ask, {verdict} like for like with the paper.",
        verdict="So many hold like for like, by `verdict`. The sceptic's column is `verdict_strict`.",
        all="Not every claim holds here: see the column `verdict_strict`.",
        otherwise="It is {side} than that: count the claims that `verdict_strict` calls consistent under every contrast.",
    ),
    "problems that halve the smallest difference": Exercise(
        NUMBER,
        _halved,
        "With some {truth:.1f} times the problems, {wanted} for {n}, the smallest difference falls from {mde:.1%} to {half:.1%}.",
        twice="An error shrinks with the square root of the number of problems: twice as many take off less than a third.",
        otherwise="It is {side} than that: an error shrinks with the square root of the number of problems.",
        near=0.3,
    ),
}
