"""Step 02, before all else. Can an instrument be believed? Verdicts on SAEs before anything is scored with them.

An SAE is refused where it explains its layer's stream no better than answering the mean, or than a random dictionary of the
same L0; where its L0 is far from what was declared; or where it seems to be of another layer or site. A refused layer is left
out of the selection, of its chance and of the scalpel, and named in the table of step 02. A run in which fewer than two thirds
of the layers pass stops.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import pandas as pd

from stetholib.errors import UserError

CLEARLY = 0.8  # neighbouring blocks are alike; a shifted SAE explains its true one far better than this
APART = 3.0  # how far both L0 and FVU of one layer may be off those of the layers beside it
ENOUGH = 2 / 3  # of the layers
ALIKE = 0.02  # how far the L0 of the random dictionary that an SAE is held against may be off its own


@dataclass(frozen=True)
class Declared:
    """What is said of SAEs. l0: by layer, where anything is; within: the factor by which it may be off; fetched: whether they
    come from elsewhere, so that their site has to be checked; mend: what to do about one that is refused."""

    l0: Mapping[int, float] = field(default_factory=dict)
    within: float = 3.0  # an SAE on its own site keeps its L0 within this factor on other text
    fetched: bool = True
    mend: str = "mend sae.release or sae.sae_id"

    @classmethod
    def trained(cls, layers: int, k: float) -> "Declared":
        """Of SAEs that are trained on the spot, on text as they are heard on."""
        mend = "train on more tokens (sae.training_tokens), in smaller batches, or at another sae.learning_rate"
        return cls(dict.fromkeys(range(layers), k), 2.0, False, mend)


def explains(row: Any) -> bool:
    """Whether an SAE explains more than the mean and than a random dictionary of its L0; row: its self-test."""
    return bool(row["fvu"] < min(1, row["fvu_random"]))


def refusals(tests: pd.DataFrame, declared: Declared) -> dict[int, str]:
    """Why a layer's SAE is not believed, by layer; empty where all are. tests: of `sae_features.hear`, one row a layer."""
    rows = tests.set_index("layer")
    found = {int(str(at)): _why(int(str(at)), row, rows, declared) for at, row in rows.iterrows()}
    return {layer: why for layer, why in found.items() if why}


def _why(layer: int, row: Any, rows: Any, declared: Declared) -> str:
    """The first reason not to believe an SAE; nothing where there is none."""
    left, chance, l0 = row["fvu"], row["fvu_random"], declared.l0.get(layer)
    if not row["largest"] > 0:
        return "no feature fires on these texts; it is of another model or site"
    if declared.fetched and row["fvu_neighbour"] < CLEARLY * row["fvu_here"]:
        unexplained = f"unexplained {row['fvu_neighbour']:.2f} against {row['fvu_here']:.2f}"
        return f"it explains a layer beside it better than its own ({unexplained}); the set is shifted or of another model"
    if not explains(row):
        return (
            f"it leaves {left:.2f} of the variance unexplained, the mean leaves 1 and a random dictionary of its L0 {chance:.2f}"
        )
    if abs(row["l0_random"] / row["l0"] - 1) > ALIKE:
        return f"{row['l0']:.1f} features fire a token, {row['l0_random']:.1f} of a random dictionary at most: it has no zero to stand against"
    if l0 and not l0 / declared.within <= row["l0"] <= l0 * declared.within:
        return f"{row['l0']:.1f} features fire a token, {l0:g} are declared"
    near = rows.loc[rows.index.intersection([layer - 1, layer + 1])]
    sparser, denser = row["l0"] * APART < near["l0"], row["l0"] > APART * near["l0"]
    if len(near) and ((sparser | denser) & (left > APART * near["fvu"])).all():
        beside = f"L0 {row['l0']:.1f} against {near['l0'].mean():.1f}, unexplained {left:.2f} against {near['fvu'].mean():.2f}"
        return f"it stands apart from the layers beside it ({beside}); it is of another site"
    return ""


def check_enough(refused: Mapping[int, str], layers: int, declared: Declared) -> None:
    """Raise UserError where fewer than two thirds of the layers can be believed."""
    if layers - len(refused) < ENOUGH * layers:
        first, why = next(iter(refused.items()))
        raise UserError(f"SAEs of {len(refused)} of {layers} layers cannot be believed; layer {first}: {why}; {declared.mend}")
