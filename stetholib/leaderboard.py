"""Every set of so many layers, ranked by validation loss: the board on which a reader's own pick, or a rule's, finds its place.

The losses are the study's own, each measured once and kept in its store (some 0.2 s a set of the miniature; 495 sets of four of
twelve layers). No test problem is read here.
"""

from collections.abc import Sequence
from itertools import combinations
from typing import Any

import numpy as np
import pandas as pd
from scipy import stats

from stetholib.errors import UserError
from stetholib.store.progress import progress


def all_sets(study: Any, size: int = 4) -> pd.DataFrame:
    """Every set of `size` layers with the raw vector injected there, the best first.

    Columns layers (as "2 3 8 9"), loss (of gold solutions of the validation split, nats a token of the whole solution) and share
    (of the other sets, those that it beats, equals counted half: 1 is the best set, 0 the worst, chance .5). study: an open
    `Study`. Raises UserError for a size that leaves nothing to choose.
    """
    if not 0 < size < study.world.layers:
        raise UserError(f"leaderboard: of {study.world.layers} layers, {size} leave nothing to choose; take a size in between")
    sets = [*combinations(range(study.world.layers), size)]
    loss = np.array([study.losses.of(one).mean() for one in progress(sets, f"all sets of {size} layers")])
    share = (stats.rankdata(-loss.round(9)) - 1) / (len(loss) - 1)  # rounded: sums of the same numbers differ in last bits
    table = pd.DataFrame(dict(layers=[" ".join(map(str, one)) for one in sets], loss=loss, share=share))
    return table.sort_values(["loss", "layers"], ignore_index=True)


def by_problem(study: Any, sets: Sequence[str]) -> np.ndarray:
    """The loss of each problem's solution under each set, in nats, [set, problem]; sets: as in the column layers."""
    return np.stack([study.losses.of(tuple(map(int, one.split()))).nats() for one in sets])


def paired_errors(study: Any, sets: Sequence[str]) -> np.ndarray:
    """The standard error, over problems, of the difference of each two sets' mean losses, in nats a token, [set, set]: the same
    problems are read under both, so that what is hard about a problem cancels. sets: as in the column layers."""
    covariance = np.cov(by_problem(study, sets))
    own = np.diag(covariance)
    spread = np.maximum(own[:, None] + own[None] - 2 * covariance, 0)  # of sets alike, rounding may go below 0
    return np.sqrt(len(study.losses.subjects) * spread) / study.losses.of(()).tokens.sum()
