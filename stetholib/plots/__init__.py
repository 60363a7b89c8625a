"""Plots: each takes tidy data and an axis, draws, and returns the axis.

`style` holds what all share; one file a step draws that step's figures, and `worlds` those over many worlds.
"""

from stetholib.plots.layer_selection import (
    effects,
    layer_scores,
    layer_sets,
    power,
    rules,
    scales,
    score_against_effect,
    uniform_check,
)
from stetholib.plots.minerva_math import accuracies, answered, gain_split, headline, loss_parts, token_limits
from stetholib.plots.sae_features import by_layer, self_test, training
from stetholib.plots.significance import discordance, forest
from stetholib.plots.style import BASES, SELECTORS, bars_with_zero, described, labelled, panels, save, small, words
from stetholib.plots.subspace_projection import (
    chance_by_width,
    energy_by_rank,
    loss_split,
    overlap_by_basis,
    projection_in_a_plane,
)
from stetholib.plots.tables import readable
from stetholib.plots.task_vectors import layer_bars, loss_curve, matrix_heatmap
from stetholib.plots.worlds import claims_by_world, gains_by_world, percentiles_by_world
