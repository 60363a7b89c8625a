"""Step 05. What does each edited model score, subject by subject?

lm-evaluation-harness asks, extracts and scores (`adapters.harness`); the model object that answers is ours
(`models.answering`), and so is a record of every answer. Here is what is made of the records.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from math import nan
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch.utils.flop_counter import FlopCounterMode

from stetholib.data.prompts import INVALID, problem_id
from stetholib.editing import Edit, TaskVector, edited
from stetholib.errors import UserError
from stetholib.layer_sets import LayerSet
from stetholib.models.answering import Answer, Limits, answer_some
from stetholib.models.loading import LanguageModel
from stetholib.models.weights import weight_hash
from stetholib.significance import SPOKEN, interval


def records(
    variant: str, rows: Sequence[Mapping[str, str]], answers: Mapping[str, Answer], verdicts: pd.DataFrame
) -> list[dict[str, Any]]:
    """The contract's records of one variant, in the order of the test set."""
    by_id = verdicts.drop_duplicates("problem_id").set_index("problem_id").to_dict("index")
    found = []
    for row in rows:
        name = problem_id(row["subject"], row["problem"])
        about = dict(variant=variant, subject=row["subject"], level=row.get("level", "-"))
        found.append(about | asdict(answers[name]) | by_id[name])
    return found


def tokens_to_answer(completion: str, extracted: str, count: Callable[[str], int]) -> int | None:
    """How many new tokens it took until the harness could read an answer; None where it never could. That is where Minerva's
    closing sentence ends; an answer read without it is taken to need the whole completion."""
    before, sentence, _ = completion.partition("I hope it is correct.")
    return None if extracted == INVALID else count(before + sentence)


def accuracy_by_limit(all_records: pd.DataFrame, needed: Sequence[int | None], limits: Sequence[int]) -> pd.DataFrame:
    """Accuracy had the token limit been lower: columns variant, limit, accuracy. Greedy answers under a lower limit are the same
    answers cut short, so nothing has to be asked again. needed: of each record, `tokens_to_answer`."""
    tokens = pd.Series(np.array(needed, float), index=all_records.index)
    parts = []
    for limit in limits:
        right = (all_records["exact_match"] == 1) & (tokens <= limit)
        parts.append(right.groupby(all_records["variant"]).mean().rename("accuracy").reset_index().assign(limit=limit))
    return pd.concat(parts, ignore_index=True)


def measure(all_records: pd.DataFrame, general_loss: Mapping[str, float]) -> pd.DataFrame:
    """The table of step 05: one row a variant and subject, and `all`; general_loss in nats a token, by variant."""
    rows = []
    for variant, whole in all_records.groupby("variant"):
        for subject, part in (("all", whole), *whole.groupby("subject")):
            n, correct, readable = len(part), int(part["exact_match"].sum()), part["extracted"] != INVALID
            accuracy = correct / n
            row = dict(
                variant=str(variant),
                subject=str(subject),
                n=n,
                correct=correct,
                accuracy=accuracy,
                stderr=(accuracy * (1 - accuracy) / (n - 1)) ** 0.5 if n > 1 else nan,
                math_verify=part["math_verify"].mean(),
                extractable=readable.mean(),
                truncated=(part["stopped_by"] == "length").mean(),
                accuracy_given_extractable=part.loc[readable, "exact_match"].mean() if readable.any() else nan,
                mean_tokens=part["completion_tokens"].mean(),
                general_loss=general_loss[str(variant)],
            )
            rows.append(row)
    return pd.DataFrame(rows)


@dataclass(frozen=True)
class Variant:
    """An edited model that answers the test: which vector, into which layers. `finetuned` loads theta_1 itself."""

    name: str
    vector: str = "raw"
    layers: LayerSet = ()
    alpha: float = 1.0


NEEDED = ("base", "full", "full_shrunk", "scalpel", "stethoscope", "stethoscope_matched", "random_1")  # by the ledger of claims


def variants(
    layers: int, part: Sequence[int], chosen: dict[str, LayerSet], drawn: Sequence[LayerSet], wanted: Sequence[str], shrunk: float
) -> dict[str, Variant]:
    """The edited models that answer the test, in the order wanted; part: the layers that the scalpel has directions for;
    chosen: layers by selector; drawn: random sets; shrunk: the alpha at which the whole vector, in all layers, has the energy of
    the stethoscope's. Raises UserError for a name that does not exist, and where one that the claims need is left out."""
    every, part = tuple(range(layers)), tuple(part)
    selected = ("stethoscope", "stethoscope_matched", "least_specific", "largest_norm")
    known = [
        Variant("base"),
        Variant("finetuned", "finetuned"),
        Variant("full", "raw", every),
        Variant("full_shrunk", "raw", every, alpha=shrunk),
        Variant("scalpel", "projected", part),
        Variant("scalpel_rescaled", "projected_rescaled", part),
        Variant("raw_shrunk", "raw_shrunk", part),
        *(Variant(name, "raw", chosen[name]) for name in selected),
        *(Variant(f"random_{i + 1}", "raw", one) for i, one in enumerate(drawn)),
    ]
    by_name = {variant.name: variant for variant in known}
    if odd := [name for name in wanted if name not in by_name]:
        few = f", since {len(part)} layers make {len(drawn)} random sets" if odd[0].startswith("random_") else ""
        raise UserError(f"evaluation.variants: unknown variant {odd[0]!r}{few}; there are: {', '.join(by_name)}")
    if absent := [name for name in NEEDED if name not in wanted]:
        raise UserError(f"evaluation.variants: {absent[0]} is not there; the ledger of claims needs {', '.join(NEEDED)}")
    return {name: by_name[name] for name in wanted}


def running_cost(model: LanguageModel) -> dict[str, int]:
    """Parameters of a model and FLOPs of one forward pass over 32 tokens."""
    ids = torch.zeros(1, 32, dtype=torch.long, device=model.device)  # any token costs the same
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model.model(input_ids=ids, use_cache=False)
    return dict(parameters=sum(p.numel() for p in model.model.parameters()), flops=counter.get_total_flops())


def repetition(
    base: LanguageModel, vector: TaskVector, layers: Sequence[int], prompts: Mapping[str, str], limits: Limits
) -> dict[str, Any]:
    """What C8 and C9 rest on: the same edit made and answered twice, weights before and after, and what a pass costs."""
    before, runs, costs = weight_hash(base.model), [], []
    for _ in range(2):
        with edited(base.model, Edit(vector, tuple(layers))):
            runs.append(answer_some(base, prompts, limits))
            costs.append(running_cost(base))
    return dict(
        answered_twice=len(runs[0]),
        identical_answers=sum(a == b for a, b in zip(*runs, strict=True)),
        weights_restored=before == weight_hash(base.model),
        base_cost=running_cost(base),
        edited_cost=costs[0],
    )


def flips(base: pd.DataFrame, again: pd.DataFrame, change: str) -> dict[str, Any]:
    """How many verdicts of the unedited model flip under a change of how it computes; both with problem_id, exact_match."""
    one, other = (t.drop_duplicates("problem_id").set_index("problem_id")["exact_match"] for t in (base, again))
    flipped = int((one[other.index] != other).sum())
    return dict(change=change, problems=len(again), flips=flipped, share=flipped / len(again))


def token_limits(records: pd.DataFrame, base: LanguageModel, limit: int, points: int = 12) -> pd.DataFrame:
    """Accuracy of the variants on record had the token limit, in tokens of the base model, been lower."""

    def length(text: str) -> int:
        return len(base.tokenizer(text, add_special_tokens=False).input_ids)

    limits = sorted({max(1, round(limit * step / points)) for step in range(1, points + 1)})
    pairs = zip(records["completion"], records["extracted"], strict=True)
    return accuracy_by_limit(records, [tokens_to_answer(*pair, length) for pair in pairs], limits)


def judged(of: pd.DataFrame) -> tuple[str, pd.Series]:
    """By what the headline is judged, in words, and the accuracies: Math-Verify where a task has it, else exact match. of: rows of
    one subject, by variant."""
    judge = SPOKEN["math_verify" if of["math_verify"].notna().any() else "exact_match"]
    return judge, of["math_verify"].fillna(of["accuracy"]).astype(float)


def headline_title(table: pd.DataFrame, subject: str, name: str) -> str:
    """The finding of one half of the headline's figure: is the stethoscope ahead of random sets, and of the whole vector, shrunk?"""
    judge, metric = judged(table[table["subject"] == subject].set_index("variant"))
    random = metric[metric.index.str.startswith("random_")]
    if not {"stethoscope", "full_shrunk"} <= {*metric.index} or random.empty:
        return name
    ahead = f"ahead of {(random < metric['stethoscope']).sum()} of {len(random)} random set{'s' * (len(random) > 1)}"
    behind = ", behind shrinking" if metric["full_shrunk"] > metric["stethoscope"] else ""
    return f"{name}, by {judge}: the stethoscope is\n{ahead}{behind}"


def example_pair(all_records: pd.DataFrame, one: str = "base", other: str = "full") -> tuple[str, dict[str, str]]:
    """A problem's id and two variants' completions of it: the first that `other` solves and `one` does not, else the first."""
    both = all_records[all_records["variant"].isin([one, other])].drop_duplicates(["variant", "problem_id"])
    wide = both.pivot(index="problem_id", columns="variant", values=["exact_match", "completion"])
    turned = wide[(wide["exact_match"][one] == 0) & (wide["exact_match"][other] == 1)]
    shown = (turned if len(turned) else wide).iloc[0]
    return str(shown.name), {name: str(shown["completion"][name]) for name in (one, other)}


def enough_tokens(limits: pd.DataFrame, share: float = 0.99) -> int:
    """The lowest of the limits under which every variant keeps this share of its best accuracy; of `accuracy_by_limit`."""
    best = limits.groupby("variant")["accuracy"].transform("max")
    return int(limits[limits["accuracy"] >= share * best].groupby("variant")["limit"].min().max())


def limit_title(limits: pd.DataFrame, truncated: float) -> str:
    """The finding of the figure of token limits: how many are enough, or that more might be wanted; truncated: the largest share
    of a variant's answers that the limit cuts."""
    enough, used = enough_tokens(limits), int(limits["limit"].max())
    if enough < used and not truncated:
        return f"No answer is cut off: {enough} of {used} tokens are enough"
    if enough < used:
        return f"{enough} tokens are enough; at most {truncated:.1%} of a variant's answers are truncated"
    return f"{used} tokens may be too few: up to {truncated:.0%} of a variant's answers are cut"


def overall(table: pd.DataFrame, variants: Sequence[str]) -> pd.DataFrame:
    """The rows over all subjects, by variant, in this order."""
    return table[table["subject"] == "all"].set_index("variant").loc[list(variants)]


def price(table: pd.DataFrame, variants: Sequence[str]) -> pd.Series:
    """What each variant's loss on general text is above the base's, nats a token."""
    loss = overall(table, variants)["general_loss"]
    return (loss - loss["base"]).drop("base")


SHOWN = dict(base="{} base", full="{} whole vector", stethoscope="**{}** stethoscope")
SHOWN |= dict(full_shrunk="{} whole vector shrunk to its energy", own="{} your own edit")


def summary(table: pd.DataFrame, significance: pd.DataFrame, noise: pd.DataFrame, headline: str, against: pd.DataFrame) -> str:
    """What step 05 saw, as Markdown.

    table: of `measure`; significance: the table of step 06, for paired intervals; noise: verdicts that flip by rounding
    alone; headline: the subject that the paper's headline is about; against: of `pairs_table`, the stethoscope minus the
    whole vector shrunk to its energy. A task without Math-Verify is judged by exact match alone.
    """
    judges = ["exact_match", "math_verify"] if table["math_verify"].notna().all() else ["exact_match"]
    accuracy = table.pivot(index="variant", columns="subject", values="accuracy")
    paired: Any = significance.set_index(["variant", "subject", "metric"]).sort_index()
    of, whole = accuracy[headline], accuracy["all"]
    verified = " (by Math-Verify)" if len(judges) > 1 else ""
    published = "(Paper: 29.6 % to 39.4 %)" if headline == "number_theory" else "(a subject of one's own)"
    spoken = {"stethoscope": "all tokens", "stethoscope_matched": "matched words"}
    unlifted = _within({SPOKEN[judge]: paired.loc[("full", headline, judge)] for judge in judges})
    untold = _within({words: paired.loc[(name, headline, "exact_match")] for name, words in spoken.items()})
    flat = f" The whole vector **lifts nothing there that can be told from none** by {unlifted}." if unlifted else ""
    null = f" The stethoscope shows **no gain there that can be told from none** on {untold}." if untold else ""
    randoms = whole[[name for name in whole.index if name.startswith("random_")]]
    no_better = _beside_random(table, judges)
    drawn = {1: "one random set of as many layers gives", 3: "three random sets of as many layers give"}
    sets = drawn.get(len(randoms), f"{len(randoms)} random sets of as many layers give")
    flips = f"{noise['share'].min():.1%} to {noise['share'].max():.1%}" if noise["flips"].any() else "none"
    return f"""
- {headline.replace("_", " ").title()} {published}, by exact match{verified}: {_by(judges, table, headline)}; {of["stethoscope_matched"]:.1%} on matched words, {of["scalpel"]:.1%} with the scalpel.{flat}{null}
- Over all subjects: {_by(judges, table, "all")}; {sets} {randoms.min():.1%} to {randoms.max():.1%}.{no_better}
- {_shrunk(against.xs(judges[-1], level="metric").iloc[0], SPOKEN[judges[-1]])}
- {_format(overall(table, ["base", "full"]), paired.loc[("full", "all")], judges)}
- Rounding alone flips {flips} of the verdicts.
""".strip()


def _within(rows: Mapping[str, Any]) -> str:
    """Which of these paired gains cannot be told from none, each with its interval; empty where all can."""
    return " and ".join(f"{words} ({interval(row)})" for words, row in rows.items() if row["ci_low"] <= 0)


def _by(judges: Sequence[str], table: pd.DataFrame, subject: str) -> str:
    """A subject's accuracy of the variants that the claim turns on, by exact match and in brackets by Math-Verify."""
    rows: Any = table[table["subject"] == subject].set_index("variant")
    shown = {name: text for name, text in SHOWN.items() if name in rows.index}
    verify = {name: f" ({rows.loc[name, 'math_verify']:.1%})" if "math_verify" in judges else "" for name in shown}
    return ", ".join(text.format(f"{rows.loc[name, 'accuracy']:.1%}{verify[name]}") for name, text in shown.items())


def _beside_random(table: pd.DataFrame, judges: Sequence[str]) -> str:
    """By which metrics the stethoscope's layers are no better than the best random set, over all subjects; empty where by none."""
    rows: Any = table[table["subject"] == "all"].set_index("variant")
    random = rows.index.str.startswith("random_")
    worse = []
    for judge, column in zip(judges, ("accuracy", "math_verify"), strict=False):
        if rows.loc["stethoscope", column] <= rows.loc[random, column].max():
            worse.append(SPOKEN[judge])
    return f" The stethoscope's layers are **no better** than those by {' or by '.join(worse)}." if worse else ""


def _shrunk(row: Any, judge: str) -> str:
    """What selecting layers is worth beside the same energy in all of them."""
    verdict = "no difference can be told, so **shrinking does as well as selecting**"
    if row["ci_low"] > 0:
        verdict = "selecting layers does better than shrinking"
    elif row["ci_high"] < 0:
        verdict = "**shrinking does better than selecting**"
    return (
        f"The same energy in chosen layers or, shrunk, in all: by {judge} the stethoscope differs by {100 * row['difference']:+.1f} points from "
        f"the whole vector shrunk to its energy ({interval(row)}): {verdict}."
    )


def split_gain(gain: Any) -> str:
    """A gain in points, and how much of it where answers are readable under both models, and where that changed."""
    whole, bound = 100 * gain["difference"], 100 * gain["gain_format_bound"]
    return f"{whole:.1f} points, {whole - bound:+.1f} where answers are readable under both and {bound:+.1f} where readability changed"


def gain_title(gain: Any) -> str:
    """The finding of the figure that splits gains: the whole vector's. gain: its row of step 06, by exact match."""
    return (
        f"The whole vector gains {split_gain(gain)}" if gain["ci_low"] > 0 else "The whole vector's gain cannot be told from none"
    )


def _format(whole: pd.DataFrame, gains: Any, judges: Sequence[str]) -> str:
    """How much of the whole vector's gain can be format; that there is no gain to split is said. gains: by metric."""
    base, full, gain = whole.loc["base"], whole.loc["full"], gains.loc["exact_match"]
    split = f"it gains {split_gain(gain)}"
    if gain["ci_low"] <= 0:
        split = f"but it gains **nothing that can be told from chance** ({100 * gain['difference']:+.1f} points, {interval(gain)}), so there is no gain to split"
    elif gain["gain_format_bound"] >= gain["difference"]:
        split += ", **which is all of it**"
    said = (
        f"The base closes {base['extractable']:.0%} of its answers readably, the whole vector {full['extractable']:.0%}: {split}."
    )
    if "math_verify" not in judges:
        return said
    verify = "goes" if gains.loc["math_verify", "ci_low"] > 0 else "**does not rise beyond chance**: it goes"
    return f"{said} Math-Verify, which needs no sentence, {verify} from {base['math_verify']:.1%} to {full['math_verify']:.1%}."
