"""The live bench of step 05 as a panel of widgets; where nobody can touch it, as in a run of make, as a figure."""

import html
import math
from base64 import b64encode
from collections.abc import Iterator
from contextlib import contextmanager
from io import BytesIO
from typing import Any

import ipywidgets as widgets
import matplotlib.pyplot as plt
import pandas as pd
from IPython import get_ipython
from IPython.display import display
from matplotlib.figure import Figure

from stetholib.errors import UserError
from stetholib.plots.minerva_math import answered, loss_parts
from stetholib.plots.style import described, labelled, panels, words
from stetholib.study.live_bench import LiveBench, Setting

SCALE = (0.0, 2.0)  # of alpha, wider where a variant of the notebook is
PATIENCE = 5.0  # seconds: a loss that takes longer is measured when it is asked for, not at every change
DEFAULT = "stethoscope"


def show(bench: LiveBench) -> None:
    """The panel where a reader can touch it; else the figure of the default setting, from what steps 04 and 05 have measured."""
    if not touched_by_a_reader():
        figure(bench)
        return
    panel = BenchPanel(bench)
    display(panel.whole)
    panel.open()


def touched_by_a_reader() -> bool:
    """Whether somebody sits before this kernel: a front end that can be asked for input, which nbclient and papermill cannot."""
    kernel = getattr(get_ipython(), "kernel", None)
    return bool(kernel and kernel.get_parent("shell").get("content", {}).get("allow_stdin"))


def figure(bench: LiveBench) -> Figure:
    """The default setting as step 05 has it: losses of the bench's few validation problems, accuracies of all test problems."""
    (fig, (left, right)), name = panels(columns=2, width=5.8, height=3.2), f"the {DEFAULT}"
    loss_parts(bench.loss_table(bench.variants[DEFAULT], live=False), left, name)
    answered(bench.accuracy_table(DEFAULT), right, name)
    return labelled(fig, f"Ours, {bench.title}")


def spoken(seconds: float) -> str:
    """About how long something takes."""
    return f"about {max(seconds, 1):.0f} s" if seconds < 90 else f"about {seconds / 60:.0f} minutes"


class BenchPanel:
    """Controls, a line that says what is running, and two pictures with their numbers."""

    def __init__(self, bench: LiveBench) -> None:
        """bench: what is measured; nothing is, before `open`."""
        self._bench, self._quiet, start = bench, False, bench.variants[DEFAULT]
        wide: Any = dict(style={"description_width": "90px"}, layout={"width": "330px"})
        names = [(words(name), name) for name in bench.variants]
        self.start = widgets.Dropdown(options=names, value=DEFAULT, description="start from", **wide)
        box: Any = dict(indent=False, layout={"width": "84px"})
        self.layers = [widgets.Checkbox(at in start.layers, description=f"layer {at}", **box) for at in bench.layers]
        scales = [*SCALE, *(variant.alpha for variant in bench.variants.values())]
        ends: Any = dict(min=math.floor(min(scales)), max=math.ceil(max(scales)), step=0.05)
        self.alpha = widgets.BoundedFloatText(start.alpha, description="scale alpha", **ends, **wide)
        slider = widgets.FloatSlider(start.alpha, readout=False, continuous_update=False, **ends)
        widgets.link((slider, "value"), (self.alpha, "value"))  # a slider has no name that a screen reader could say
        kinds = [("raw, the stethoscope's", "raw"), ("projected, the scalpel's", "projected")]
        self.vector = widgets.RadioButtons(options=kinds, value=start.vector, description="vector", **wide)
        self.measure, self.answer = (widgets.Button(layout={"width": "auto"}) for _ in range(2))
        self.status, self.loss, self.accuracy = widgets.HTML(), widgets.HTML(), widgets.HTML()
        boxes = widgets.Box(self.layers, layout={"flex_flow": "row wrap"})
        buttons = widgets.HBox([self.measure, self.answer])
        shown = widgets.Box([self.loss, self.accuracy], layout={"flex_flow": "row wrap"})
        scale = widgets.HBox([self.alpha, slider])
        self.whole = widgets.VBox([self.start, boxes, scale, self.vector, buttons, self.status, shown])
        self.whole.add_class("stetholib-bench")
        self.start.observe(self._begin, "value")
        for control in (*self.layers, self.alpha, self.vector):
            control.observe(self._change, "value")
        self.measure.on_click(lambda _: self._run("losses"))
        self.answer.on_click(lambda _: self._run("verdicts"))

    @property
    def setting(self) -> Setting:
        """What the controls say."""
        layers = tuple(layer for layer, box in zip(self._bench.layers, self.layers, strict=True) if box.value)
        return Setting("live", self.vector.value, layers, self.alpha.value)

    def open(self) -> None:
        """Show the default setting as step 05 has it, and find out how long another will take."""
        self._draw_loss(self._bench.loss_table(self.setting, live=False))
        self._draw_accuracy(self._bench.accuracy_table(DEFAULT))
        with self._saying("Loading the model ..."):
            self._label()
            self._say("Ready. The pictures show the stethoscope's layers at scale 1, as this notebook has measured them.")

    def _label(self) -> None:
        """Buttons say how long they take; the loss has one of its own only where it cannot follow every change."""
        loss, answers = (self._bench.expected(what) for what in ("losses", "verdicts"))
        self.measure.description = f"Measure the loss of {self._bench.loss_problems} problems ({spoken(loss)})"
        self.measure.layout.display = None if loss > PATIENCE else "none"
        self.answer.description = f"Answer {len(self._bench.asked)} problems ({spoken(answers)})"

    def _begin(self, change: Any) -> None:
        """Take a variant of step 05, all controls at once."""
        variant, self._quiet = self._bench.variants[change["new"]], True
        for layer, box in zip(self._bench.layers, self.layers, strict=True):
            box.value = layer in variant.layers
        self.alpha.value, self.vector.value, self._quiet = variant.alpha, variant.vector, False
        self._change(change)

    def _change(self, change: Any) -> None:
        """Follow the controls: with the loss where that is quick, with answers where they are known."""
        if self._quiet:
            return
        known = {what: self._bench.knows(what, self.setting) for what in ("losses", "verdicts")}
        self.accuracy.value = "" if known["verdicts"] else "<p>Not answered yet at this setting.</p>"
        if known["losses"] or self._bench.expected("losses") <= PATIENCE:
            self._run("losses")
        else:
            self.loss.value = "<p>Not measured yet at this setting.</p>"
            self._say("This setting has not been measured; the buttons say how long that takes.")
        if known["verdicts"]:
            self._draw_accuracy(self._bench.accuracy_table(self.setting))

    def _run(self, what: str) -> None:
        """Measure the loss, or answer, at this setting, and show it; one that is known costs nothing."""
        bench, setting, known = self._bench, self.setting, self._bench.knows(what, self.setting)
        loss: Any = ("loss", "Measuring the loss of", bench.loss_problems, bench.loss_table, self._draw_loss)
        answers: Any = ("answers", "Answering", len(bench.asked), bench.accuracy_table, self._draw_accuracy)
        said, doing, count, table_of, draw = {"losses": loss, "verdicts": answers}[what]
        with self._saying(f"{doing} {count} problems, {spoken(bench.expected(what))} ..."):
            draw(table_of(setting))
            took = "known from before" if known else f"measured in {bench.expected(what):.1f} s"
            self._label()
            self._say(f"{described_setting(setting)}: {said}: {took}.")

    @contextmanager
    def _saying(self, doing: str) -> Iterator[None]:
        """Say what is running; a user's mistake, and an interruption, become a line as well."""
        self._say(doing)
        try:
            yield
        except UserError as error:
            self._say(str(error))
        except KeyboardInterrupt:
            self._say("Interrupted; the model is as it was.")

    def _say(self, text: str) -> None:
        self.status.value = f'<p role="status"><b>{html.escape(text)}</b></p>'

    def _draw_loss(self, table: pd.DataFrame) -> None:
        named = table.rename(index={"setting": "this setting", "full": "whole vector"})
        numbers = named.to_html(float_format="{:.4f}".format, border=0)
        captioned = numbers.replace("<thead>", "<caption>loss, nats a token</caption><thead>", 1)
        self.loss.value = _picture(loss_parts, table) + captioned

    def _draw_accuracy(self, table: pd.DataFrame) -> None:
        self.accuracy.value = _picture(answered, table)


def described_setting(setting: Setting) -> str:
    """A setting in words."""
    layers = ", ".join(map(str, setting.layers)) or "none"
    return f"{setting.vector.capitalize()} vector, layers {layers}, scale {setting.alpha:.2f}"


def _picture(plot: Any, table: pd.DataFrame) -> str:
    """A plot as an image of HTML, which can say in words what it shows, as a widget's image cannot."""
    fig, ax = panels(width=4.5, height=3.0)
    plot(table, ax)
    plt.close(fig)  # or the kernel would show it below the cell
    fig.savefig(buffer := BytesIO(), format="png", dpi=100)
    words = html.escape(described(fig), quote=True)
    return f'<img alt="{words}" src="data:image/png;base64,{b64encode(buffer.getvalue()).decode()}">'
