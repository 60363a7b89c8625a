"""Every plot once, from the committed tables or from a few made-up numbers."""

import inspect

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from conftest import ROOT
from matplotlib.text import Text

from stetholib import plots
from stetholib.claims import BUILT, HOLDS, SAME
from stetholib.commands.seeds import spread
from stetholib.models.subspaces import LossSplit, default_rows
from stetholib.plots import style
from stetholib.plots import worlds as worlds_drawn

FIGURES = {"small", "panels", "described", "labelled", "save", "readable", "words"}  # what is no plot
NAMES = {"base": "base", "full": "whole vector", "stethoscope": "stethoscope", "my_own": "a variant of one's own"}


CURVES = pd.DataFrame(dict(layer=[0, 0, 1, 1], tokens=[100, 200] * 2, fvu=[0.9, 0.4, 0.8, 0.3], l0=[2.0, 8, 3, 7], dead=0.1))
LAYERS = pd.DataFrame(dict(layer=[0, 1], contrast="corpus", closing_alone=[0.1, 0.2], closing_left_out=[0.0, 0.1]))
SCALES = pd.DataFrame([(0.01, -0.1, -0.2, 0.0), (1.0, -0.5, -0.6, 0.1)], columns=["energy", "solution", "closing", "general"])
SETS = pd.DataFrame(
    [("random", -0.1), ("random", -0.2), ("greedy", -0.2), ("greedy", -0.3), ("stethoscope", -0.15), ("full_shrunk", -0.3)],
    columns=["selector", "loss_change"],
).assign(draw=[0, 1, 0, 1, 0, 0], contrast="-", layers="0 1", energy=0.3, closing_change=-0.2, general_change=0.01)


def table(stem, folder="mini"):
    return pd.read_csv(ROOT / "figures" / folder / f"{stem}.csv", keep_default_na=False, na_values=[""])


def draw(name, ax):
    draws = np.linspace(0, 1, 40)
    effects = pd.DataFrame({"effect": [0.1, 0.4], "power": [0.2, 0.9], "top": [0.3, 1.0], "chance": 0.1})
    curve = pd.DataFrame({"changed": [60, 242, 370], "z": [6.8, 3.4, 2.8], "unpaired": 3.4, "crossing": 242.0})
    limits = pd.DataFrame([(v, limit, limit / 20) for v in NAMES for limit in (2, 4)], columns=["variant", "limit", "accuracy"])
    shown = ["base", "full", "stethoscope", "scalpel"]
    calls = {
        "loss_curve": lambda f: f(pd.DataFrame({"step": [0, 1], "loss": [2.0, 1.0]}), ax),
        "matrix_heatmap": lambda f: f(table("01_task_vectors"), "relative", "change", ax),
        "layer_bars": lambda f: f([0.1, 0.3], "share", ax, even=0.2),
        "self_test": lambda f: f(table("02_sae_features").query("contrast == 'corpus'"), ax),
        "training": lambda f: f(CURVES, 8, [ax, *ax.figure.subplots(1, 2)])[0],
        "by_layer": lambda f: f(table("02_sae_features"), "top_specificity", "d", ax),
        "energy_by_rank": lambda f: f(energies(), 64, ax),
        "projection_in_a_plane": lambda f: f(ax),
        "chance_by_width": lambda f: f(ax),
        "loss_split": lambda f: f({"all": LossSplit(0.05, 0.2, 0.03, 0.01), "readers": LossSplit(0.06, 0.3, 0.03, 0.01)}, ax),
        "bars_with_zero": lambda f: f({"full": -0.1, "raw_shrunk": 0.0, "scalpel": 0.02}, "change", ax),
        "overlap_by_basis": lambda f: f(energies(["side"]).rename(columns={"energy_retained": "overlap"}), ax),
        "layer_scores": lambda f: f(table("04_layer_selection"), np.tile(draws, (12, 1)), "matched", ax),
        "effects": lambda f: f(LAYERS, "closing", ax),
        "scales": lambda f: f(SCALES, SETS, ax),
        "score_against_effect": lambda f: f(table("04_layer_selection"), ax),
        "layer_sets": lambda f: f(SETS, ax),
        "rules": lambda f: f(table("04_layer_sets"), ax),
        "uniform_check": lambda f: f(draws, ax),
        "power": lambda f: f(effects, ax),
        "accuracies": lambda f: f(table("05_minerva_math"), "all", shown, ax),
        "headline": lambda f: f(table("05_minerva_math"), "number_theory", ax),
        "loss_parts": lambda f: f(pd.DataFrame(dict(solution=[3, 2, 1], closing=[1, 1, 0.5]), index=[*BENCH]), ax),
        "answered": lambda f: f(bench(), ax),
        "gain_split": lambda f: f(table("06_significance").query("metric == 'exact_match'"), shown[1:], ax),
        "token_limits": lambda f: f(limits, NAMES, ax),
        "forest": lambda f: f(
            table("06_significance").query("metric == 'math_verify'"), {name: name for name in [*shown[1:], "finetuned"]}, ax
        ),
        "discordance": lambda f: f(curve, ax),
        "claims_by_world": lambda f: f(table("claims", "seeds"), "verdict_strict", ax),
        "gains_by_world": lambda f: f(worlds := gains(), spread(worlds), ax),
        "percentiles_by_world": lambda f: f(table("worlds", "seeds"), ax),
    }
    return calls[name](getattr(plots, name))


BENCH = ("base", "setting", "full")


def bench():
    """Accuracies as the live bench has them, of ten problems, none right of the base's."""
    ends = dict(
        n=10, accuracy=[0.0, 0.4, 1.0], low=[1e-17, 0.2, 0.7], high=[0.3, 0.7, 1.0], gain=0.4, gain_low=0.1, gain_high=0.7
    )
    return pd.concat([pd.DataFrame(dict(metric=metric, variant=[*BENCH]) | ends) for metric in ("exact_match", "math_verify")])


def gains():
    """Gains by math_verify in three worlds, made up."""
    shares = dict(full=0.2, full_shrunk=0.15, stethoscope=0.1, stethoscope_matched=0.05)
    return pd.DataFrame({"world": [0, 1, 2]} | {f"gain_{v}_math_verify": [g, g + 0.02, g - 0.01] for v, g in shares.items()})


def energies(by=()):
    rows = default_rows(table("03_subspace_projection"))
    return rows.groupby(["basis", "rank", *by])[["energy_retained", "chance"]].mean().reset_index()


PLOTS = sorted({name for name, thing in vars(plots).items() if inspect.isfunction(thing)} - FIGURES)


@pytest.mark.parametrize("name", PLOTS)
def test_a_plot_gives_its_axis_back_named_and_twice_the_same_bytes(name, tmp_path):
    made = []
    for _ in range(2):
        figure, ax = plots.panels()
        settings = dict(mpl.rcParams)
        assert draw(name, ax) is ax and dict(mpl.rcParams) == settings
        assert ax.get_xlabel() and (ax.get_ylabel() or all(label.get_text() for label in ax.get_yticklabels()))
        legend = ax.get_legend()
        assert legend is None or not any("_" in text.get_text() for text in legend.get_texts())
        for kind in ("png", "svg"):
            plots.save(plots.labelled(figure, "Ours, a test"), tmp_path / f"plot.{kind}")
            made.append((tmp_path / f"plot.{kind}").read_bytes())
        plt.close(figure)
    assert made[:2] == made[2:] and made[0].startswith(b"\x89PNG") and b"Ours, a test" in made[1]


@pytest.mark.parametrize("name", PLOTS)
def test_whatever_is_written_in_a_plot_can_be_read_and_is_among_its_words(name):
    figure, ax = plots.panels()
    draw(name, ax)
    plots.labelled(figure, "Ours, a test")
    figure.draw_without_rendering()
    written = [text for text in figure.findobj(Text) if text.get_text().strip() and text.get_visible()]
    signs = {sign: colour for sign, (_, colour) in worlds_drawn.SIGNS.items()} if name == "claims_by_world" else {}
    assert len(written) >= 5
    for text in written:
        ground = signs.get(text.get_text(), "white")
        assert style.contrast_of(text.get_color(), ground) >= style.READABLE, text.get_text()
    words = plots.described(figure)
    for one in (ax.get_title("left"), ax.get_xlabel(), ax.get_ylabel(), "Ours, a test"):
        assert one.replace("\n", " ").replace("$", "") in words
    plt.close(figure)


def test_contrast_is_wcags_and_ink_is_no_darker_than_it_must_be():
    assert (
        style.contrast_of("black") == pytest.approx(21) == style.contrast_of("white", "black")
        and style.contrast_of("red", "red") == 1
    )
    assert style.contrast_of("#767676") == pytest.approx(4.54, abs=0.01) and style.ink(style.BLUE) == style.BLUE.lower()
    for look in [*style.VARIANTS.values(), *style.BASES.values(), *style.LOSSES.values()]:
        assert style.READABLE <= style.contrast_of(style.ink(look.colour)) < max(5.0, style.contrast_of(look.colour) + 0.01)


def test_a_notebook_keeps_a_figure_with_its_words():
    from IPython.core.interactiveshell import InteractiveShell

    shell = InteractiveShell.instance()
    try:
        figure, ax = plots.panels()
        ax.set(xlabel="layer", title="A finding")
        data, about = shell.display_formatter.format(figure, include=["image/png"])
        assert data["image/png"] and about == {"image/png": {"alt": "A finding. Across: layer."}}
    finally:
        InteractiveShell.clear_instance()
        plt.close("all")


@pytest.mark.parametrize("columns", [1, 2, 3])
@pytest.mark.parametrize("words", [4, 11, 30])
def test_a_title_is_broken_between_words_until_each_line_fits_its_panel(columns, words):
    title = " ".join(["By", "Math-Verify"] * words)[: 11 * words].rsplit(" ", 1)[0]
    figure, axes = plots.panels(columns=columns, width=4.2)
    for ax in np.atleast_1d(axes):
        ax.set_title(title)
    plots.labelled(figure, "Ours, a test")
    figure.draw_without_rendering()
    for ax in np.atleast_1d(axes):
        assert ax.get_title("left").split() == title.split(), "words stay whole, in order"
        drawn = next(text for text in ax.get_children() if isinstance(text, Text) and text.get_text() == ax.get_title("left"))
        assert drawn.get_window_extent().width <= 1.02 * ax.get_window_extent().width
    plt.close(figure)


def test_a_title_that_fits_and_one_with_a_formula_stay_as_they_are():
    figure, (one, other) = plots.panels(columns=2, width=4.2)
    one.set_title("All subjects:\nthe stethoscope")
    other.set_title("$S_l - S_{l-1}$ " + "beside the paper's score " * 4)
    before = other.get_title("left")
    plots.labelled(figure, "Ours, a test")
    assert one.get_title("left") == "All subjects:\nthe stethoscope" and other.get_title("left") == before
    plt.close(figure)


def test_sets_of_layers_stand_in_rows_of_their_own_best_first():
    figure, ax = plots.panels()
    draw("layer_sets", ax)
    named = [text.get_text() for text in ax.get_yticklabels()]
    assert named == ["2 random sets", "whole vector, shrunk", "greedy", "stethoscope"]
    points = {int(line.get_ydata()[0]): line.get_xdata()[0] for line in ax.lines if len(line.get_xdata()) == 1}
    assert points == pytest.approx({1: -0.3, 2: -0.25, 3: -0.15}), "greedy is the mean of its halves"
    plt.close(figure)


def test_small_numbers_are_read_without_an_exponent():
    assert [plots.small(value) for value in (0.0045, -6e-5, 0.0, 1e-7)] == ["+0.0045", "-0.00006", "+0", "+1e-07"]


def test_one_thing_has_one_colour():
    looks = style.VARIANTS
    assert looks["scalpel"].colour == style.BASES["sae_decoder"].colour
    assert [looks[name].colour for name in ("stethoscope", "stethoscope_matched")] == [
        look.colour for look in style.CONTRASTS.values()
    ]
    figure, ax = plots.panels()
    draw("forest", ax)
    drawn = {bars.get_label(): bars.lines[0].get_color() for bars in ax.containers}
    assert {name: looks[name].colour for name in ("full", "stethoscope", "scalpel")}.items() <= drawn.items()
    plt.close(figure)


def test_the_squares_of_the_claims_say_what_the_table_says():
    verdicts = [
        ("consistent", "reproduced"),
        ("contradicted", "consistent"),
        ("not testable", BUILT),
        (SAME, SAME),
        (BUILT, BUILT),
    ]
    claims = pd.DataFrame(
        [(f"C{i}", "-", world, verdict) for i, pair in enumerate(verdicts) for world, verdict in enumerate(pair)],
        columns=["claim", "contrast", "world", "verdict"],
    )
    figure, ax = plots.panels()
    words = [text.get_text() for text in plots.claims_by_world(claims, "verdict", ax).texts]
    assert words[:10] == ["yes", "yes", "no", "yes", "?", "-", "=", "=", "-", "-"]
    assert words[10:] == ["2 of 2", "1 of 2", "0 of 2", "0 of 2", "0 of 2"], "what is true by construction does not count"
    assert [text.get_text() for text in ax.get_legend().get_texts()] == [
        "yes  holds",
        "no  contradicted",
        "?  not testable",
        f"-  {BUILT}",
        f"=  {SAME}",
    ]
    plt.close(figure)
    claims, (figure, ax) = table("claims", "seeds"), plots.panels()
    words = [text.get_text() for text in draw("claims_by_world", ax).texts]
    assert words.count("yes") == claims["verdict_strict"].isin(HOLDS).sum()
    assert words.count("no") == (claims["verdict_strict"] == "contradicted").sum()
    plt.close(figure)


def test_both_metrics_of_an_accuracy_are_drawn():
    figure, ax = plots.panels()
    of = table("05_minerva_math").query("subject == 'all'").set_index("variant").loc[["base", "full", "stethoscope", "scalpel"]]
    marks = [line.get_xdata() for line in draw("accuracies", ax).lines]
    for metric in ("accuracy", "math_verify"):
        assert any(np.array_equal(of[metric], x) for x in marks), metric
    assert {text.get_text() for text in ax.get_legend().get_texts()} == {"exact match", "Math-Verify"}
    plt.close(figure)


def test_the_gains_over_worlds_have_a_mark_a_world_and_students_interval():
    figure, ax = plots.panels()
    worlds = gains()
    draw("gains_by_world", ax)
    full = spread(worlds).set_index("quantity").loc["gain_full_math_verify"]
    assert np.allclose(ax.lines[0].get_xdata(), worlds["gain_full_math_verify"])
    (start, end), _ = zip(*ax.containers[0].lines[2][0].get_segments()[0], strict=True)
    assert (start, end) == pytest.approx((full["low"], full["high"]))
    plt.close(figure)


def test_shares_of_energy_are_read_as_plain_percentages():
    fig, ax = plt.subplots()
    plots.energy_by_rank(energies(), 64, ax)
    told = [ax.yaxis.get_major_formatter()(share, 0) for share in (0.01, 0.0625, 0.3, 1.0)]
    plt.close(fig)
    assert told == ["1%", "6.2%", "30%", "100%"]
