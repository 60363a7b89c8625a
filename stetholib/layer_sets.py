"""Step 04, second half. Sets of layers: who picks them, and what they are worth.

Sets are judged by the loss of gold solutions of the validation split after injection, before the closing sentence, whose loss
stands beside: layers that write the one need not write the other. No test problem is read here.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import combinations, groupby
from math import comb
from random import Random
from typing import Any

import numpy as np
import pandas as pd
from scipy import stats

from stetholib import selectors
from stetholib.errors import UserError
from stetholib.models.streams import DocumentLosses, Watch, unwatched
from stetholib.models.weights import Key
from stetholib.statistics import Values

LayerSet = tuple[int, ...]
LossOf = Callable[[LayerSet, float], DocumentLosses]  # (layers, alpha) -> losses with the vector injected there
SETS_OF_MANY = ("random", "only", "without", "window", "stethoscope_shifted", "stethoscope_rise_shifted")
IN_ALL = ("full", "full_shrunk")
SEEING = ("greedy", "small_step")  # rules that see losses, so they choose on one half of the problems and are judged on the other
FEWEST = 10  # random sets, below which a fit to them says nothing
HALVINGS = 100  # of the problems, over which reliability is a mean
RELIABLE, RESOLVED = 0.5, 0.1  # what `tells_apart` asks of two halves, fixed before any result


def select(scores: Values, count: int) -> LayerSet:
    """The `count` layers with the largest scores, in order of depth; ties go to the earlier layer, NaN is never selected."""
    scored = [layer for layer in range(len(scores)) if scores[layer] == scores[layer]]
    if count > len(scored):
        raise UserError(f"selection: {count} layers are wanted but {len(scored)} have a score; lower selection.layer_share")
    ranked = sorted(scored, key=lambda layer: (-scores[layer], layer))
    return tuple(sorted(ranked[:count]))


def check_layers(layers: Sequence[int], count: int) -> None:
    """Raise UserError where layers of one's own are not so many different ones of the model's `count`."""
    if odd := [layer for layer in layers if layer >= count]:
        raise UserError(f"edit.layers: there is no layer {odd[0]}; this model has {count}, 0 to {count - 1}")
    if len({*layers}) < len(layers):
        raise UserError(f"edit.layers: {' '.join(map(str, layers))} names a layer twice; leave one out")


def layer_count(layers: int, share: float) -> int:
    """m = round(L * share), at least one; a third by default, fixed before any result."""
    return max(1, round(layers * share))


def sampled_sets(layers: Sequence[int], count: int, wanted: int, seed: int) -> list[LayerSet]:
    """All sets of `count` of these layers where there are at most `wanted`, else that many different ones drawn at random."""
    if comb(len(layers), count) <= wanted:
        return list(combinations(layers, count))
    rng = Random(f"{seed}/sets")
    found: dict[LayerSet, None] = {}
    while len(found) < wanted:
        found[tuple(sorted(rng.sample(layers, count)))] = None
    return list(found)


def greedy(loss_of: Callable[[LayerSet], float], layers: int, count: int) -> LayerSet:
    """Add, one at a time, the layer that lowers the loss most: the best set found with sight of the losses."""
    chosen: LayerSet = ()
    while len(chosen) < count:
        rest = [layer for layer in range(layers) if layer not in chosen]
        chosen = tuple(sorted((*chosen, min(rest, key=lambda layer: loss_of(tuple(sorted((*chosen, layer))))))))
    return chosen


Rules = Mapping[str, tuple[str, Values]]  # selector -> (contrast, a score for each layer)


def fixed_rules(scores: Mapping[str, Values], energies: Values) -> dict[str, tuple[str, Values]]:
    """The rules that the ledger knows. scores: layer scores by contrast; energies: |tau_l|^2."""
    found: dict[str, tuple[str, Values]] = {
        "stethoscope": ("corpus", scores["corpus"]),
        "stethoscope_matched": ("matched", scores["matched"]),
        "least_specific": ("corpus", -np.asarray(scores["corpus"], float)),
        "largest_norm": ("-", energies),
    }
    return found | {name: ("-", score) for name, score in selectors.place(len(energies)).items()}


def chosen_sets(rules: Rules, count: int) -> dict[str, tuple[str, LayerSet]]:
    """What each rule picks: selector -> (contrast, its `count` layers)."""
    return {name: (contrast, select(score, count)) for name, (contrast, score) in rules.items()}


def layer_energies(energies: Mapping[Key, float]) -> np.ndarray:
    """Energy of a task vector by layer, [layer]."""
    layers = 1 + max(layer for layer, _ in energies)
    return np.array([sum(e for (layer, _), e in energies.items() if layer == at) for at in range(layers)])


def shrunk_to(layer_energy: np.ndarray, layers: Sequence[int]) -> float:
    """The alpha at which the whole vector has the energy that it has in these layers at alpha 1."""
    return float(np.sqrt(layer_energy[list(layers)].sum() / layer_energy.sum()))


def halving(subjects: Sequence[str], seed: int) -> np.ndarray:
    """A random half of the problems, [problem], True in it; stratified, so that a subject's two parts differ by one at most."""
    rng = np.random.default_rng(seed)
    names, code = np.unique(np.asarray(subjects), return_inverse=True)
    order = np.lexsort((rng.random(len(code)), rng.permutation(len(names))[code]))
    half = np.zeros(len(code), bool)
    half[order[::2]] = True
    return half


@dataclass(frozen=True)
class PlannedSet:
    """A set of layers that is to be scored, and who picked it: selector, draw, contrast, layers, alpha."""

    selector: str
    draw: int
    contrast: str
    layers: LayerSet
    alpha: float = 1.0


def planned_sets(
    chosen: Mapping[str, tuple[str, LayerSet]], layer_energy: np.ndarray, eligible: Sequence[int], random_sets: int, seed: int
) -> list[PlannedSet]:
    """Every set that is scored without sight of a loss; chosen: of the rules, selector -> (contrast, layers). `full_shrunk` is
    the control of equal energy: the whole vector in all layers, at the energy of the stethoscope's. Random sets are drawn from
    the layers that the stethoscope may select, `eligible`."""
    every, stethoscope = tuple(range(len(layer_energy))), chosen["stethoscope"][1]
    plan = [PlannedSet("full", 0, "-", every), PlannedSet("full_shrunk", 0, "-", every, shrunk_to(layer_energy, stethoscope))]
    plan += [PlannedSet("only", layer, "-", (layer,)) for layer in every]
    plan += [PlannedSet("without", layer, "-", tuple(x for x in every if x != layer)) for layer in every]
    plan += [PlannedSet(name, 0, contrast, layers) for name, (contrast, layers) in chosen.items()]
    drawn = sampled_sets(eligible, len(stethoscope), random_sets, seed)
    return plan + [PlannedSet("random", draw, "-", layers) for draw, layers in enumerate(drawn)]


def smooth_sets(chosen: Mapping[str, LayerSet], layers: int, at_most: int = 12) -> list[PlannedSet]:
    """The null of a smooth score, which picks neighbours: windows of as many layers as the sets have, and circular shifts of
    each set, as a profile shifted round the depth would pick; evenly spaced where there are more than `at_most`."""
    count = len(next(iter(chosen.values())))
    plan = [PlannedSet("window", at, "-", tuple(range(at, at + count))) for at in _spaced(0, layers - count + 1, at_most)]
    for name, one in chosen.items():
        for step in _spaced(1, layers, at_most):
            plan.append(PlannedSet(f"{name}_shifted", step, "-", tuple(sorted((at + step) % layers for at in one))))
    return plan


def _spaced(start: int, stop: int, at_most: int) -> list[int]:
    """At most so many of range(start, stop), evenly."""
    return sorted({int(at) for at in np.linspace(start, stop - 1, min(at_most, stop - start)).round()})


def standing(sets: pd.DataFrame) -> pd.DataFrame:
    """How every rule stands in one world: columns selector, contrast, layers, share (of the whole vector's fall of the solution's
    loss) and percentile among random sets."""
    named = named_sets(sets).drop(index=["full"])
    whole = named_sets(sets)["loss_change"]["full"]
    found = named.assign(share=named["loss_change"] / whole if whole < 0 else np.nan)
    return found[["contrast", "layers", "share", "percentile"]].reset_index()


def rules_title(sets: pd.DataFrame, reliability: pd.DataFrame) -> str:
    """The finding of the figure of rules: which does best, where this world can tell."""
    shares: Any = named_sets(sets)["percentile"].drop(list(IN_ALL), errors="ignore").dropna()
    best = shares.drop(["known"], errors="ignore").idxmax()
    told = f"{str(best).replace('_', ' ')} {shares[best]:.1%}, stethoscope {shares['stethoscope']:.1%}"
    return f"Random sets beaten: {told}" if tells_apart(reliability) else f"Rules cannot be told apart here ({told})"


def smooth_null(sets: pd.DataFrame) -> pd.DataFrame:
    """How the sets of smooth scores stand among windows and among their own circular shifts: columns selector, null, n and better,
    the share of those that are worse, equals counted half. Chance is .5. sets: the table of sets of layers."""
    change, rows = sets.groupby("selector")["loss_change"], []
    for name in ("stethoscope", "stethoscope_rise"):
        own = float(change.get_group(name).iloc[0])
        for null in ("window", f"{name}_shifted"):
            theirs = change.get_group(null).to_numpy()
            better = float((np.sign((theirs - own).round(9)) / 2 + 0.5).mean())
            rows.append(dict(selector=name, null=null.removeprefix(f"{name}_"), n=len(theirs), better=better))
    return pd.DataFrame(rows)


def additivity(sets: pd.DataFrame, layers: int, seed: int) -> pd.DataFrame:
    """Do layers add up? R^2 of random sets' solution loss as predicted by what layers do alone (not fitted), by a sum over layers
    and by a sum over layers and pairs, both fitted by ridge regression and cross-validated in ten parts; NaN of fewer than ten sets, as sparse interactions
    are looked for in arXiv 2502.13870. Where a sum fails, no score by layer can be right."""
    from sklearn.linear_model import RidgeCV
    from sklearn.model_selection import KFold, cross_val_predict

    random, alone = sets[sets["selector"] == "random"], sets[sets["selector"] == "only"].set_index("draw")["loss_change"]
    y = random["loss_change"].to_numpy()
    if len(y) < FEWEST:
        return pd.DataFrame(dict(model=["alone", "layers", "pairs"], n=len(y), r2=np.nan))
    members = [set(map(int, one.split())) for one in random["layers"]]
    x = np.array([[layer in one for layer in range(layers)] for one in members], float)
    pairs = np.column_stack([x, *(x[:, i] * x[:, j] for i, j in combinations(range(layers), 2))])
    parts = KFold(min(10, len(y)), shuffle=True, random_state=seed)
    ridge, spread = RidgeCV(np.logspace(-3, 3, 13)), ((y - y.mean()) ** 2).sum()
    told = {"alone": x @ alone.reindex(range(layers)).to_numpy()}
    told |= {name: cross_val_predict(ridge, of, y, cv=parts) for name, of in (("layers", x), ("pairs", pairs))}
    r2 = [1 - ((y - one) ** 2).sum() / spread if spread else np.nan for one in told.values()]
    return pd.DataFrame(dict(model=[*told], n=len(y), r2=r2))


def seeing_sets(
    loss_of: LossOf, seen: np.ndarray, draw: int, layers: int, count: int, small_step: float, with_greedy: bool
) -> list[PlannedSet]:
    """Sets of the rules that see losses of the solution, where the mask `seen` [problem] is True; to be judged on the others.
    `small_step` takes the layers that do most at that alpha; draw: the half's number."""

    def worth(chosen: LayerSet, alpha: float = 1.0) -> float:
        return loss_of(chosen, alpha).mean(where=seen)

    small = select([-worth((layer,), small_step) for layer in range(layers)], count)
    best = {"greedy": greedy(worth, layers, count)} if with_greedy else {}
    return [PlannedSet(name, draw, "-", chosen) for name, chosen in ({"small_step": small} | best).items()]


def measure_sets(
    plan: Sequence[PlannedSet],
    loss_of: LossOf,
    general_of: Callable[[LayerSet, float], float],
    half: np.ndarray,
    layer_energy: np.ndarray,
    seed: int,
    watch: Watch = unwatched,
) -> pd.DataFrame:
    """The table of sets of layers: changes of validation losses after injection, nats a token, and what they are worth.

    loss_of, general_of: losses of (layers, alpha); half: what `seeing_sets` saw in draw 0, not in draw 1. Percentiles are those
    of `percentiles` on the problems that a set is judged on, for sets of as many layers and `full_shrunk`; general_change is
    of sets that a rule picked.
    """
    before, general = loss_of((), 1.0), general_of((), 1.0)
    losses = [loss_of(one.layers, one.alpha) for one in watch(plan, "04 sets of layers")]
    table = pd.DataFrame([asdict(one) | dict(layers=" ".join(map(str, one.layers))) for one in plan])
    table["energy"] = [one.alpha**2 * layer_energy[list(one.layers)].sum() / layer_energy.sum() for one in plan]
    chance = (table["selector"] == "random").to_numpy()
    ranked = [len(one.layers) == len(plan[int(chance.argmax())].layers) or one.selector == "full_shrunk" for one in plan]
    judged = np.where(table["selector"].isin(SEEING), 1 + table["draw"], 0)
    for part, column in (("solution", ""), ("closing", "closing_")):
        change = np.stack([loss.nats(part) - before.nats(part) for loss in losses])
        for at, where in enumerate((np.ones_like(half), ~half, half)):
            if not (rows := judged == at).any():
                continue
            table.loc[rows, f"{column or 'loss_'}change"] = change[rows][:, where].sum(1) / before.tokens[where].sum()
            names = [f"{column}percentile", *([] if column else ["percentile_low", "percentile_high"])]
            draws = 1 if column else 1000  # an interval is wanted of the solution only
            found = percentiles(change[rows][:, where], change[chance][:, where], seed, draws)[:, : len(names)]
            table.loc[rows, names] = np.where(np.array(ranked)[rows, None], found, np.nan)
    named = ~table["selector"].isin(SETS_OF_MANY)
    table["general_change"] = [general_of(p.layers, p.alpha) - general if n else np.nan for p, n in zip(plan, named, strict=True)]
    return table


def percentiles(changes: np.ndarray, chance: np.ndarray, seed: int, draws: int = 1000) -> np.ndarray:
    """Percentile of each set among random ones, with a 95 % bootstrap interval over problems: [set, (percentile, low, high)].

    The share of random sets that are worse, equals counted half; chance is 0.5. changes, chance: what each set, and each
    random one, does to each problem's summed loss, [set, problem]. Resampling adds noise, so that intervals lean towards 0.5.
    """
    n = changes.shape[1]
    weights = np.vstack([np.ones(n), np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), size=draws)])
    ours, theirs = weights @ changes.T, weights @ chance.T
    worse = [np.sign((theirs - one[:, None]).round(9)) for one in ours.T]  # rounded: sums of the same numbers differ in last bits
    found = 0.5 + 0.5 * np.stack([one.mean(1) for one in worse])
    return np.column_stack([found[:, 0], *np.quantile(found[:, 1:], [0.025, 0.975], axis=1)])


def reliability(plan: Sequence[PlannedSet], loss_of: LossOf, subjects: Sequence[str], seed: int) -> pd.DataFrame:
    """Whether validation losses tell layers, and sets of layers, apart: do two halves of the problems agree?

    Columns what (alone, left_out, sets), loss, n (how many are ranked), reliability (`agreement_of_halves`) and, of sets,
    r_held_out and r_in_sample (`resolution`). Sets that a rule chose with sight of the losses are no part of it.
    """
    halves = np.stack([halving(subjects, seed + draw) for draw in range(HALVINGS)])
    at: dict[str, list[int]] = {}
    for index, one in enumerate(plan):
        at.setdefault(one.selector, []).append(index)
    random, chosen = at["random"], [i for name, (i, *_) in at.items() if name not in (*SETS_OF_MANY, *SEEING, *IN_ALL)]
    drawn = {plan[i].layers for i in random}
    others = {plan[i].layers: i for i in chosen if plan[i].layers not in drawn}
    items, rows = {"alone": at["only"], "left_out": at["without"], "sets": [*random, *others.values()]}, []
    for loss in ("solution", "closing"):
        before = loss_of((), 1.0).nats(loss)
        change = np.stack([loss_of(one.layers, one.alpha).nats(loss) - before for one in plan])
        for what, these in items.items():
            full = change[at["full"][0]]
            found = resolution(change[these], len(random), full, halves) if what == "sets" else (np.nan, np.nan)
            rows.append((what, loss, len(these), agreement_of_halves(change[these], halves), *found))
    return pd.DataFrame(rows, columns=["what", "loss", "n", "reliability", "r_held_out", "r_in_sample"])


def agreement_of_halves(changes: np.ndarray, halves: np.ndarray) -> float:
    """Mean Spearman between the rankings on one half of the problems and on the other; NaN where nothing is ranked. changes:
    [item, problem]; halves: [halving, problem], True in one half."""
    ranks = [stats.rankdata(half @ changes.T, axis=1) for half in (halves, ~halves)]
    one, other = (r - r.mean(1, keepdims=True) for r in ranks)
    size = np.sqrt((one**2).sum(1) * (other**2).sum(1))
    rho = (one * other).sum(1)[size > 0] / size[size > 0]
    return float(rho.mean()) if len(rho) else float("nan")


def resolution(changes: np.ndarray, random: int, full: np.ndarray, halves: np.ndarray) -> tuple[float, float]:
    """How much better than the median random set the best one found is, in units of the full vector's: (held out, in sample).

    The best is chosen on one half of the problems and judged on the other, both ways, or judged where it was chosen; means
    over halvings. Positive is better. changes: [set, problem], the first `random` of them random; full: [problem].
    """
    found = []
    for seen, judged in ((halves, ~halves), (~halves, halves)):
        there, here, whole = judged @ changes.T, seen @ changes.T, np.abs(full.sum())
        best = here.argmin(1)[:, None]
        gains = [np.median(x[:, :random], 1) - np.take_along_axis(x, best, 1)[:, 0] for x in (there, here)]
        found.append([2 * gain.mean() / whole if whole else np.nan for gain in gains])
    held_out, in_sample = np.mean(found, axis=0)
    return float(held_out), float(in_sample)


def reliability_of_sets(reliability: pd.DataFrame) -> Any:
    """The row of sets of layers, by the loss of solutions, in the table of `reliability`."""
    return reliability.set_index(["what", "loss"]).loc[("sets", "solution")]


def tells_apart(reliability: pd.DataFrame) -> bool:
    """Whether this world's validation loss of solutions tells sets of layers apart, by the table of `reliability`. Two halves of
    the problems must rank sets alike, and the best one found must be better on problems that did not find it."""
    row = reliability_of_sets(reliability)
    return bool(row["reliability"] >= RELIABLE and row["r_held_out"] >= RESOLVED)


def named_sets(sets: pd.DataFrame) -> pd.DataFrame:
    """The sets that a rule picked, and the full one, by selector; what was chosen on either half is averaged over both."""
    named = sets[~sets["selector"].isin(SETS_OF_MANY)].groupby("selector", sort=False)
    words = named.agg({"contrast": "first", "layers": " | ".join})
    return words.join(named[list(sets.select_dtypes("number").columns.drop("draw"))].mean())


def ranges(layers: str) -> str:
    """Layers as they are read: "0 1 2 5 | 3 4" as "0-2, 5 | 3-4"."""
    told = []
    for one in layers.split(" | "):
        at_places = enumerate(map(int, one.split()))
        # in a run of neighbours, a layer less its place in the set stays the same
        runs = [[layer for _, layer in run] for _, run in groupby(at_places, lambda pair: pair[1] - pair[0])]
        told.append(", ".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs))
    return " | ".join(told)
