"""Step 04, second half. Sets of layers: who picks them, and what they are worth.

Sets are judged by the loss of gold solutions of the validation split after injection: no test problem is read here.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import combinations
from math import comb
from random import Random

import numpy as np
import pandas as pd

from stetholib.editing import Edit, TaskVector, edited, losses_by_document
from stetholib.errors import UserError
from stetholib.models.loading import LanguageModel
from stetholib.models.streams import Batch, Watch, mean_loss, unwatched
from stetholib.models.weights import Key
from stetholib.statistics import Values, bootstrap_ratio

LayerSet = tuple[int, ...]
SETS_OF_MANY = ("random", "random_energy", "only", "without")


def select(scores: Values, count: int) -> LayerSet:
    """The `count` layers with the largest scores, in order of depth; ties go to the earlier layer."""
    if count > len(scores):
        raise UserError(f"selection: {count} layers are wanted but the model has {len(scores)}; lower selection.layer_share")
    ranked = sorted(range(len(scores)), key=lambda layer: (-scores[layer], layer))
    return tuple(sorted(ranked[:count]))


def layer_count(layers: int, share: float) -> int:
    """m = round(L * share), at least one; a third by default, fixed before any result."""
    return max(1, round(layers * share))


def sampled_sets(layers: int, count: int, wanted: int, seed: int) -> list[LayerSet]:
    """All sets of `count` layers where there are at most `wanted`, else that many different ones drawn at random."""
    if comb(layers, count) <= wanted:
        return list(combinations(range(layers), count))
    rng = Random(f"{seed}/sets")
    found: dict[LayerSet, None] = {}
    while len(found) < wanted:
        found[tuple(sorted(rng.sample(range(layers), count)))] = None
    return list(found)


def percentile(value: float, others: Values) -> float:
    """Share of the other sets whose loss change is worse (higher) than this one's, ties counted half; chance is 0.5."""
    worse = np.asarray(others)
    return float(((worse > value).sum() + 0.5 * (worse == value).sum()) / len(worse))


def greedy(loss_of: Callable[[LayerSet], float], layers: int, count: int) -> LayerSet:
    """Add, one at a time, the layer that lowers the loss most: the best set found with sight of the losses."""
    chosen: LayerSet = ()
    while len(chosen) < count:
        rest = [layer for layer in range(layers) if layer not in chosen]
        chosen = tuple(sorted((*chosen, min(rest, key=lambda layer: loss_of(tuple(sorted((*chosen, layer))))))))
    return chosen


def fixed_selectors(
    scores: Mapping[str, Values], energies: Values, small_step: Values, count: int
) -> dict[str, tuple[str, LayerSet]]:
    """Every rule that picks `count` layers without trying them out, as selector -> (contrast, layers).

    scores: layer scores by contrast; energies: |tau_l|^2; small_step: loss change of each block at a small alpha.
    """
    depth = len(energies)
    first = (depth - count) // 2
    return {
        "stethoscope": ("corpus", select(scores["corpus"], count)),
        "stethoscope_matched": ("matched", select(scores["matched"], count)),
        "least_specific": ("corpus", select([-s for s in scores["corpus"]], count)),
        "largest_norm": ("-", select(energies, count)),
        "middle": ("-", tuple(range(first, first + count))),
        "last": ("-", tuple(range(depth - count, depth))),
        "small_step": ("-", select([-s for s in small_step], count)),
    }


def layer_energies(energies: Mapping[Key, float]) -> np.ndarray:
    """Energy of a task vector by layer, [layer]."""
    layers = 1 + max(layer for layer, _ in energies)
    return np.array([sum(e for (layer, _), e in energies.items() if layer == at) for at in range(layers)])


def solution_loss(base: LanguageModel, vector: TaskVector, pool: Sequence[Batch], layers: LayerSet, alpha: float) -> float:
    """Loss of gold solutions, nats a token, with `alpha` times the vector in these layers."""
    with edited(base.model, Edit(vector, tuple(layers), alpha=alpha)) as model:
        return mean_loss(model, pool)


@dataclass(frozen=True)
class PlannedSet:
    """A set of layers that is to be scored, and who picked it: selector, draw, contrast, layers, alpha."""

    selector: str
    draw: int
    contrast: str
    layers: LayerSet
    alpha: float = 1.0


def planned_sets(
    chosen: Mapping[str, tuple[str, LayerSet]], layer_energy: np.ndarray, random_sets: int, random_energy_sets: int, seed: int
) -> list[PlannedSet]:
    """Every set that is scored: the whole, each layer alone and left out, each selector's, random ones, and random ones
    scaled to the energy of the stethoscope's.

    chosen: selector -> (contrast, layers).
    """
    every, count = tuple(range(len(layer_energy))), len(chosen["stethoscope"][1])
    plan = [PlannedSet("full", 0, "-", every)]
    plan += [PlannedSet("only", layer, "-", (layer,)) for layer in every]
    plan += [PlannedSet("without", layer, "-", tuple(x for x in every if x != layer)) for layer in every]
    plan += [PlannedSet(name, 0, contrast, layers) for name, (contrast, layers) in chosen.items()]
    drawn = sampled_sets(len(every), count, random_sets, seed)
    plan += [PlannedSet("random", draw, "-", layers) for draw, layers in enumerate(drawn)]
    wanted = layer_energy[list(chosen["stethoscope"][1])].sum()
    for draw, layers in enumerate(drawn[:random_energy_sets]):
        plan.append(PlannedSet("random_energy", draw, "-", layers, float(np.sqrt(wanted / layer_energy[list(layers)].sum()))))
    return plan


def measure_sets(
    plan: Sequence[PlannedSet],
    loss_of: Callable[[LayerSet, float], float],
    layer_energy: np.ndarray,
    count: int,
    with_greedy: bool,
    watch: Watch = unwatched,
) -> pd.DataFrame:
    """The table of sets of layers; loss_of(layers, alpha) is the validation loss after injection, nats a token."""
    before = loss_of((), 1.0)

    def row(one: PlannedSet) -> dict[str, object]:
        share = one.alpha**2 * layer_energy[list(one.layers)].sum() / layer_energy.sum()
        change = loss_of(one.layers, one.alpha) - before
        return asdict(one) | dict(layers=" ".join(map(str, one.layers)), energy=share, loss_change=change)

    rows = [row(one) for one in watch(plan, "04 sets of layers")]
    if with_greedy:
        best = greedy(lambda layers: loss_of(layers, 1.0), len(layer_energy), count)
        rows.append(row(PlannedSet("greedy", 0, "-", best)))
    table = pd.DataFrame(rows)
    chance = table.loc[table["selector"] == "random", "loss_change"]
    same = table["layers"].map(lambda layers: len(layers.split())) == count
    table["percentile"] = table["loss_change"].map(lambda value: percentile(value, chance)).where(same)
    return table


def gains_by_document(
    base: LanguageModel, pool: Sequence[Batch], vector: TaskVector, sets: Sequence[tuple[str, str]]
) -> dict[str, np.ndarray]:
    """Fall of each document's summed loss, [document], with the vector in each set of layers; sets: (name, `0 3 4`)."""
    before = losses_by_document(base.model, Edit(vector, ()), pool)[0]
    edits = {name: Edit(vector, tuple(map(int, layers.split()))) for name, layers in sets}
    return {name: before - losses_by_document(base.model, edit, pool)[0] for name, edit in edits.items()}


def greedy_share(gains: Mapping[str, np.ndarray], seed: int) -> pd.DataFrame:
    """Each set's fall of the loss as a share of what `greedy` reaches, with a bootstrap interval over problems.

    gains: by selector, the fall of each problem's summed loss, [problem]; no rows without `greedy` among them.
    """
    columns = ["selector", "share", "low", "high"]
    if "greedy" not in gains:
        return pd.DataFrame(columns=columns)
    rows = [(name, *bootstrap_ratio(gain, gains["greedy"], seed)) for name, gain in gains.items()]
    return pd.DataFrame(rows, columns=columns).sort_values("share", ascending=False, ignore_index=True)


def named_sets(sets: pd.DataFrame) -> pd.DataFrame:
    """The sets that a rule picked, and the full one, by selector."""
    return sets[~sets["selector"].isin(SETS_OF_MANY)].set_index("selector")


def at_equal_energy(sets: pd.DataFrame) -> dict[str, float]:
    """Random sets scaled to the energy of the stethoscope's: their median loss change, and the share that it beats."""
    equal = sets[sets["selector"] == "random_energy"]["loss_change"]
    beaten = float((equal > named_sets(sets).loc["stethoscope", "loss_change"]).mean())
    return {"median at equal energy": float(equal.median()), "share that the stethoscope beats": beaten}
