"""What our side costs as it grows: problems, variants, layers that are listened to, and width of the SAEs."""

import time
from collections.abc import Callable, Mapping
from functools import partial
from statistics import median
from typing import Any

from bench import ours
from bench.features import Heard
from bench.inputs import MAX_NEW_TOKENS, Plan, miniature, rows
from bench.timing import slope
from bench.works import layer_sets
from stetholib.adapters import harness
from stetholib.models import loading

PROBLEMS, VARIANTS, LAYERS, WIDTHS = (64, 128, 256, 512), (1, 2, 4, 8), (2, 4, 8, 12), (256, 512, 1024, 2048)


def size(plan: Plan) -> list[dict[str, Any]]:
    """Rows `of, size, seconds, slope`, the slope of log(seconds) against log(size), the same for all sizes of a kind."""
    works = dict(problems=_problems(plan), variants=_variants(plan)) | _listening(plan)
    return [one for of, by_size in works.items() for one in grown(of, by_size, plan.runs)]


def grown(
    of: str, by_size: Mapping[int, Callable[[], Any]], runs: int, clock: Callable[[], float] = time.perf_counter
) -> list[dict[str, Any]]:
    """The rows of one kind: all sizes in turn, as often as there are runs, and their medians."""
    seconds: dict[int, list[float]] = {size: [] for size in by_size}
    for _ in range(runs):
        for size, work in by_size.items():
            started = clock()
            work()
            seconds[size].append(clock() - started)
    medians = {size: median(took) for size, took in seconds.items()}
    rising = slope([*medians], [*medians.values()])
    return [dict(of=of, size=size, seconds=took, slope=rising) for size, took in medians.items()]


def _problems(plan: Plan) -> dict[int, Callable[[], Any]]:
    """Answers of the miniature to more and more problems."""
    model = loading.load(miniature(plan).base)
    found: dict[int, Callable[[], Any]] = {}
    for count in sorted({plan.count(one, at + 4) for at, one in enumerate(PROBLEMS)}):
        asked = harness.asked(harness.Tasks(rows(count), 0, harness.MINERVA), None)
        found[count] = partial(ours.answered, model, asked.prompts, asked.stops, MAX_NEW_TOKENS, ours.SLOTS)
    return found


def _variants(plan: Plan) -> dict[int, Callable[[], Any]]:
    """Records of more and more edits, each of 56 problems, loading and scoring included."""
    two, asked = miniature(plan), rows(plan.count(56, 4))
    edits = layer_sets(len(two.vector().layers), len(two.third()), max(VARIANTS))
    return {count: partial(ours.verdicts, two, edits[:count], asked) for count in VARIANTS}


def _listening(plan: Plan) -> dict[str, dict[int, Callable[[], Any]]]:
    """Feature sums of more and more layers, and of four layers with wider and wider SAEs."""
    heard = Heard(plan.count(980, 14))
    encoders: dict[int, dict[int, Any]] = {}
    for width in WIDTHS:
        every = heard.instruments(range(heard.layers), width)
        encoders[width] = {layer: one.encode for layer, (one, _) in every.items()}
    first = lambda count, width: {layer: encoders[width][layer] for layer in range(count)}  # noqa: E731
    return dict(
        layers={count: partial(heard.sums, first(count, 512), 512) for count in LAYERS},
        width={width: partial(heard.sums, first(4, width), width) for width in WIDTHS},
    )
