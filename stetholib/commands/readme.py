"""Write the generated parts of the READMEs from committed tables: what was found, in each notebook too, how claims were judged, the
ledger, which rule one would bet on, what organisms and real weights say, the table of `make bench`, a vote sheet and answers. A part stands between `<!-- name -->` and `<!-- /name -->`."""

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from stetholib import known_layers
from stetholib.claims import BUILT, HOLDS, SAME, percent
from stetholib.layer_selection import sets_title
from stetholib.layer_sets import IN_ALL, named_sets, reliability_of_sets, standing, tells_apart
from stetholib.models.subspaces import split_loss
from stetholib.plots import words
from stetholib.statistics import mean_interval
from stetholib.store.tables import Workspace

WORLDS = {"mini": "miniature", "smollm2": "SmolLM2-135M-Instruct", "gemma-3-270m-q4": "Gemma 3 270M, base"}
SCALPEL = "energy that the scalpel keeps; chance; ceiling"
CONTRASTS = {"-": "", "corpus": " *(all tokens)*", "matched": " *(matched words)*"}


def read(root: Path, name: str) -> pd.DataFrame:
    """A committed table, by its place below figures/."""
    return pd.read_csv(root / "figures" / f"{name}.csv")


def table_of(heads: str, rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table, one row a line; heads: with ` | ` between them."""
    lines = [f"| {' | '.join(cells)} |\n" for cells in rows]
    return f"| {heads} |\n{'|---' * (heads.count('|') + 1)}|\n{''.join(lines)}"


def found(root: Path) -> str:
    """What was found, in sentences: the scalpel, the stethoscope, what chance would have done, and real weights."""
    worlds, own = read(root, "seeds/worlds"), named_sets(read(root, "mini/04_layer_sets")).loc["stethoscope"]
    said, real = (_number_theory(read(root, f"{name}/05_minerva_math")) for name in ("mini", "smollm2"))
    kept, chance, ceiling = _kept(facts(root / "figures" / "mini"))
    chosen, less = (mean_interval(worlds[name]) for name in ("percentile_corpus", "stethoscope_minus_full_shrunk_math_verify"))
    random = ", ".join(said[name] for name in said if name.startswith("random_"))
    there = _on_real_weights(root)["smollm2"].loc["stethoscope", "percentile"]
    every, apart = _every_rule(root), tells_apart(read(root, "smollm2/04_reliability"))
    beaten = every["percentile"]
    judged = read(root, "seeds/claims").query("contrast != 'matched'").groupby("claim")["verdict_strict"]
    strictly = {claim: in_worlds(column) for claim, column in judged}
    lines = [
        f"**In short**, over {len(worlds)} worlds: the scalpel is misaligned, and loses to the raw vector at equal energy (C3 holds strictly in "
        f"{strictly['C3']}); the stethoscope's layers lift Number Theory (C5, in {strictly['C5']}); they gain more than the whole vector shrunk "
        f"to their energy in {int((worlds['stethoscope_minus_full_shrunk_math_verify'] > 0).sum())} of {len(worlds)}. Gemma 3 4B has not run here.",
        f"**The scalpel keeps {kept} of the task vector's energy**; a random subspace of its rank keeps {chance}, the best one {ceiling}. "
        f"It leaves Number Theory where it was: {said['base']} before, {said['scalpel']} after, {said['full']} with the whole vector.",
        f"**The stethoscope takes Number Theory from {said['base']} to {said['stethoscope']}.** Three random sets of as many layers take it to "
        f"{random}; the whole vector, shrunk to the same energy, to {said['full_shrunk']}.",
        f"**Would chance have done as well?** By validation loss its layers beat {percent(own['percentile'])} of random sets; over "
        f"{len(worlds)} worlds {percent(chosen[0])} on average ({percent(chosen[1])} to {percent(chosen[2])}), where chance is 50 %. The shrunk "
        f"whole vector gets {100 * -less[0]:.1f} points more of all answers right than these layers, by Math-Verify ({100 * -less[2]:.1f} to {100 * -less[1]:.1f}).",
        f"**On real weights**, SmolLM2-135M-Instruct, the scalpel's geometry is the same, but the stethoscope's layers beat {percent(there)} of random "
        f"sets{'' if apart else ', which hardly differ there,'} and take Number Theory from {real['base']} to {real['stethoscope']}, where the whole vector reaches {real['full']}, and the "
        f"same shrunk to their energy {real['full_shrunk']}.",
        f"**Which rule would you bet on?** {words(known_layers.bet(every))} {_carried(root, every)} In the worlds, a random dictionary in the SAE's place beats "
        f"{percent(beaten['random_dictionary'])} of random sets; a difference of means, without any SAE, {percent(beaten['mean_difference'])}; and simply taking "
        f"the first layers {percent(beaten['first'])}.",
    ]  # fmt: skip
    return "".join(f"- {line}\n" for line in lines)


def _number_theory(answers: pd.DataFrame) -> dict[str, str]:
    """The accuracy of each variant in Number Theory by math_verify, in words."""
    rows = answers[answers["subject"] == "number_theory"]
    return {name: percent(value) for name, value in zip(rows["variant"], rows["math_verify"], strict=True)}


def ledger(table: pd.DataFrame, worlds: pd.DataFrame) -> str:
    """The nine claims as a Markdown table: the paper's figure, the miniature's, both verdicts, and in how many worlds they hold."""
    rows = []
    for row in table.to_dict("records"):
        same = worlds[(worlds["claim"] == row["claim"]) & (worlds["contrast"] == row["contrast"])]
        holds, strictly = (in_worlds(same[column]) for column in ("verdict", "verdict_strict"))
        cells = [f"**{row['claim']}** {row['statement']}{CONTRASTS[row['contrast']]}", row["published"], words(row["measured"])]
        cells += [row["verdict"], row["verdict_strict"]]
        rows.append([*cells, "not counted" if holds == strictly == "-" else f"{holds}, strictly {strictly}"])
    return table_of("claim | paper | miniature | verdict | strictly | worlds in which it holds", rows)


def in_worlds(verdicts: pd.Series) -> str:
    """In how many worlds a verdict holds; `-` where no world has one of its own, but by construction or as its twin."""
    own = verdicts[~verdicts.isin([BUILT, SAME])]
    return f"{int(own.isin(HOLDS).sum())} of {len(own)}" if len(own) else "-"


def verdicts(root: Path) -> str:
    """How the nine claims were judged, in two sentences: by the paper's own test, and by what a sceptic would ask."""
    table = read(root, "mini/06_claims")
    test, sceptic = (_judged(table, column) for column in ("verdict", "verdict_strict"))
    about = "C1 to C3 speak of the scalpel, C4 to C7 of the stethoscope, C8 of determinism and C9 of cost."
    return f"By the paper's own test, {test}. By what a sceptic would ask, {sceptic}. {about}\n"


def _judged(table: pd.DataFrame, column: str) -> str:
    """Which claims got which verdict, those of two contrasts once where both say the same."""
    own = table[table[column] != SAME].assign(said=table[column].replace("reproduced", "consistent"))
    both = own.groupby("claim")["said"].transform("nunique") == 1
    own = own.assign(name=own["claim"].where(both, own["claim"] + own["contrast"].map(CONTRASTS)))
    names = own.drop_duplicates("name").groupby("said")["name"].agg(", ".join)
    forms = {"consistent": "hold", "contradicted": "**contradicted**", "not testable": "not testable", BUILT: BUILT}
    return "; ".join(f"{names[said]} {form}" for said, form in forms.items() if said in names)


def steps(root: Path) -> str:
    """The six notebooks, each with its question and a sentence of what was found on the miniature, as a Markdown table."""
    vectors, heard, sets = (read(root, f"mini/{stem}") for stem in ("01_task_vectors", "02_sae_features", "04_layer_sets"))
    heard = heard[heard["contrast"] == "corpus"]
    sound = heard[heard["refused"].isna()]
    layers, told = vectors.groupby("layer")["energy_share"].sum(), sets_title(sets, read(root, "mini/04_reliability"))
    kept, chance, ceiling = facts(root / "figures/mini")[SCALPEL].split("; ")
    number = _number_theory(read(root, "mini/05_minerva_math"))
    found = {
        "01_task_vectors": ("What did the fine-tune change, and where?", f"A layer holds {percent(layers.min())} to {percent(layers.max())} of the energy."),
        "02_sae_features": ("Can the instrument be trusted?", f"{len(sound)} of {len(heard)} SAEs pass their test; they leave {percent(sound['fvu'].median())} of the variance unexplained, random directions {percent(sound['fvu_random'].median())}."),
        "03_subspace_projection": ("The scalpel: what survives the filter, and why so little?", f"It keeps {kept}; chance keeps {chance}, the best subspace {ceiling}."),
        "04_layer_selection": ("The stethoscope: would chance have done as well?", f"{told}."),
        "05_minerva_math": ("What does each edited model score?", f"Number Theory: base {number['base']}, scalpel {number['scalpel']}, stethoscope {number['stethoscope']}, whole vector {number['full']}."),
        "06_significance": ("Which claims hold up?", f"Strictly: {_judged(read(root, 'mini/06_claims'), 'verdict_strict')}."),
    }  # fmt: skip
    rows = [(f"[{name}](notebooks/{name}.ipynb)", *told) for name, told in found.items()]
    return table_of("notebook | question | found on the miniature", rows)


def whole_ledger(root: Path) -> str:
    """The ledger, and what SAEs of another seed would have chosen."""
    stability = read(root, "seeds/stability")
    common = stability.groupby("contrast")["common"].mean()
    chosen = f"{common['corpus']:.1f} (all tokens) and {common['matched']:.1f} (matched words) of the same layers on average"
    said = f"SAEs of another seed in the same world choose {chosen}; chance is {stability['chance'].iloc[0]:.1f}."
    return f"{ledger(read(root, 'mini/06_claims'), read(root, 'seeds/claims'))}\n{said}\n"


def _every_rule(root: Path) -> pd.DataFrame:
    """Every rule over the worlds of `make seeds`, or in the default one, and over those of `make organisms`, or in the first, of
    those that have run."""
    worlds, organisms = Workspace("mini", root).over_worlds()
    told = pd.read_csv(worlds) if worlds.is_file() else standing(read(root, "mini/04_layer_sets")).assign(world=0)
    first = (root / "figures" / "organism").is_dir()
    known = pd.read_csv(organisms) if organisms.is_file() else _organism(root) if first else None
    return known_layers.over_worlds(told, known)


def rules(root: Path) -> str:
    """Which rule one would bet on, and every rule as a Markdown table, with how its one set does on real weights."""
    table, real, rows = _every_rule(root), _on_real_weights(root), []
    for name, row in table.drop(index=[*IN_ALL], errors="ignore").to_dict("index").items():
        place = _asked(row.get("auroc"), row.get("auroc_low"), row.get("auroc_high"), ".2f")
        exact = f"{row['exact']:.0f} of {row['runs']:.0f}" if pd.notna(row.get("auroc")) else ""
        beaten = [_asked(row["percentile"], row["low"], row["high"])]
        beaten += [_asked(*sets[STANDS].reindex([name]).iloc[0]) for sets in real.values()]
        rows.append([words(name), *beaten, place, exact])
    asked = [f"on {WORLDS[name]}" for name in real]
    heads = " | ".join(["rule", "random sets that it beats", *asked, "AUROC of the known layers", "exactly these"])
    return f"**{words(known_layers.bet(table))} {_carried(root, table)}**\n\n{table_of(heads, rows)}"


STANDS = ["percentile", "percentile_low", "percentile_high"]


def _asked(mean: Any, low: Any, high: Any, form: str = ".1%") -> str:
    """A mean over worlds with its interval, of a rule that was asked."""
    return known_layers.between(mean, low, high, form) if pd.notna(mean) else "not asked"


def _on_real_weights(root: Path) -> dict[str, pd.DataFrame]:
    """The sets that rules picked on real weights, by the folder of a run that got so far."""
    found = {name: root / "figures" / name / "04_layer_sets.csv" for name in WORLDS if name != "mini"}
    return {name: named_sets(pd.read_csv(path)) for name, path in found.items() if path.is_file()}


def _carried(root: Path, table: pd.DataFrame) -> str:
    """How the best rules of the worlds, and those that find known layers, do on real weights, in a sentence a network."""
    rules, right = known_layers.favourites(table)
    names, told = dict.fromkeys([*right.index, rules.index[0], "stethoscope"]), []
    for name, sets in _on_real_weights(root).items():
        beaten = sets["percentile"].loc[[*names]].sort_values(ascending=False, kind="stable")
        each = "; ".join(f"*{words(rule)}*, {percent(share)}" for rule, share in beaten.items())
        apart = tells_apart(read(root, f"{name}/04_reliability"))
        told.append(f"Random sets beaten on {WORLDS[name]}{'' if apart else ', which does not tell sets apart'}: {each}.")
    return " ".join(told)


def organisms(root: Path) -> str:
    """What the worlds of `make organisms` are, and whether each can test a rule, as a Markdown table."""
    heads = (
        "world | mathematics in | energy of a layer | the known layers bring | the others | sets beaten | reliability; held out"
    )
    bars: Any = read(root, "seeds-organism/bars").drop_duplicates("world").itertuples()
    rows = []
    for row in bars:
        energy = f"{row.energy_lowest:.2f} to {row.energy_highest:.2f} of the mean"
        fell, shares = row.full < 0 < row.share_known, (row.share_known, row.share_outside)
        parts = [f"{share:.0%} of the fall" if fell else "no fall to share" for share in shares]
        told = f"{row.reliability:.2f}; {row.r_held_out:.2f}"
        cells = [str(row.world), str(row.known).replace(" ", ", "), energy, *parts, percent(row.percentile_known), told]
        rows.append([*cells, "yes" if row.holds else "no"])
    return table_of(f"{heads} | tests rules", rows)


def _organism(root: Path) -> pd.DataFrame:
    """What each rule finds in the first organism, and whether that world can test a rule."""
    sets, reliability = (read(root, f"organism/{stem}") for stem in ("04_layer_sets", "04_reliability"))
    return read(root, "organism/04_known_layers").assign(world="organism", holds=known_layers.holds(sets, reliability))


def real_weights(root: Path) -> str:
    """What the miniature and real weights say to the same questions, a column each, as a Markdown table."""
    found = {title: facts(root / "figures" / name) for name, title in WORLDS.items() if (root / "figures" / name).is_dir()}
    rows = [(what, *(said.get(what, "not run") for said in found.values())) for what in found[WORLDS["mini"]]]
    return table_of(f"| {' | '.join(found)}", rows)


def facts(folder: Path) -> dict[str, str]:
    """Each question with its answer, from those of a profile's tables that are there."""
    table: dict[str, Any] = {path.stem: pd.read_csv(path) for path in sorted(folder.glob("0*.csv"))}
    sections: dict[Callable[..., dict[str, str]], tuple[str, ...]] = {
        _instrument: ("02_sae_features",),
        _scalpel: ("01_task_vectors", "03_subspace_projection"),
        _effects: ("04_layer_selection", "04_layer_sets"),
        _sets: ("04_layer_sets", "04_reliability"),
        _answers: ("05_minerva_math",),
        _verdicts: ("06_claims",),
    }
    known = [section(*map(table.get, stems)) for section, stems in sections.items() if table.keys() >= {*stems}]
    return {what: said for one in known for what, said in one.items()}


def _instrument(features: pd.DataFrame) -> dict[str, str]:
    """Whether the SAEs can be believed, and what they leave unexplained."""
    heard = features.query("contrast == 'corpus'")
    believed, sound = heard["refused"].isna(), heard[heard["refused"].isna()]
    fvu = f"{sound['fvu'].median():.2f} (random directions: {sound['fvu_random'].median():.2f})"
    return {"layers whose SAE passed its test; unexplained variance, median": f"{believed.sum()} of {len(heard)}; {fvu}"}


def _kept(said: dict[str, str]) -> list[str]:
    """What the scalpel, chance and the ceiling keep, of `facts`, without the rank."""
    return [part.split(" at ")[0] for part in said[SCALPEL].split("; ")]


def _scalpel(vectors: pd.DataFrame, kept: pd.DataFrame) -> dict[str, str]:
    """What the scalpel keeps of a vector's energy; its rank is the second of the grid."""
    energies = dict(zip(zip(vectors["layer"], vectors["matrix"], strict=True), vectors["delta_norm"] ** 2, strict=True))
    rank = int(sorted(kept["rank"].unique())[1])
    whole, *sides = (split_loss(kept, energies, rank, side) for side in (None, "reader", "writer"))
    ends = f"{percent(whole.retained)} at rank {rank}; {percent(whole.chance)}; {percent(whole.ceiling)}"
    return {
        SCALPEL: ends,
        "misalignment index (readers, writers); 1 is chance": f"{whole.index:.2f} ({', '.join(f'{side.index:.2f}' for side in sides)})",
    }


def _effects(layers: Any, sets: Any) -> dict[str, str]:
    """What the whole vector does to both losses, and which layers alone do most of it."""
    full, once = sets.set_index("selector").loc["full"], layers.query("contrast == 'corpus'").set_index("layer")
    best = (", ".join(map(str, once[name].nlargest(3).index)) for name in ("effect_alone", "closing_alone"))
    changes = f"{full['loss_change']:+.3f}; {full['closing_change']:+.3f}"
    return {
        "change of loss by the whole vector, nats a token: solution; closing sentence": changes,
        "best layers alone: solution; closing sentence": "; ".join(best),
    }


def _sets(table: pd.DataFrame, reliability: pd.DataFrame) -> dict[str, str]:
    """Of how many random sets each rule's set is better, with intervals."""
    sets: Any = named_sets(table)
    told, others = reliability_of_sets(reliability), ("taylor", "fisher", "largest_norm", "small_step")
    beaten = {name: "{:.0%} ({:.0%} to {:.0%})".format(*row) for name, row in sets[STANDS].iterrows()}
    return {
        "rank correlation of sets between two halves of the problems": f"{told['reliability']:.2f}",
        "random sets that the stethoscope beats, all tokens": beaten["stethoscope"],
        "the same on matched words": beaten["stethoscope_matched"],
        "random sets that other rules beat": ", ".join(f"{words(name)} {sets.loc[name, 'percentile']:.0%}" for name in others),
    }


def _answers(table: Any) -> dict[str, str]:
    """Accuracy by math_verify, which asks for no closing sentence, of the main variants."""
    named = {"base": "base", "full": "whole", "stethoscope": "stethoscope", "full_shrunk": "whole, shrunk", "scalpel": "scalpel"}
    told = {"number_theory": "Number Theory by `math_verify`", "all": "all subjects by `math_verify`"}
    rows = table.set_index(["subject", "variant"])["math_verify"]
    said = lambda subject: "; ".join(f"{title} {rows[subject, name]:.0%}" for name, title in named.items())  # noqa: E731
    return {title: said(subject) for subject, title in told.items()}


def _verdicts(ledger: Any) -> dict[str, str]:
    """The ledger's words, all tokens where a claim has two contrasts."""
    rows = ledger[ledger["contrast"] != "matched"].itertuples()
    told = (f"{row.claim} {row.verdict}" + f" ({row.verdict_strict})" * (row.verdict != row.verdict_strict) for row in rows)
    return {"verdicts (strictly)": "; ".join(told)}


def peers(root: Path) -> str:
    """The rows of `make bench` as a Markdown table; what is no time is in MiB."""
    rows = []
    for row in read(root, "bench/bench").to_dict("records"):
        unit = "MiB" if row["work"].endswith("_memory") else "s"
        ours, theirs = ("-" if pd.isna(row[side]) else f"{_three(row[side])} {unit}" for side in ("ours", "theirs"))
        ratio = "-" if pd.isna(row["ratio"]) else _three(row["ratio"])
        rows.append([f"`{row['work']}`", row["peer"], ours, theirs, ratio, row["equal"]])
    return table_of("work | peer | ours | theirs | ratio | equal", rows)


def _three(value: float) -> str:
    """Three digits, or all of a whole number."""
    return f"{value:.3g}" if value < 999.5 else f"{value:.0f}"


def votes(root: Path) -> str:
    """A sheet for votes on the nine claims, before and after."""
    claims = read(root, "mini/06_claims").drop_duplicates("claim")
    vote = "yes · no · ?"
    rows = [(f"**{row.claim}** {row.statement}", str(row.published), vote, f"{vote} |") for row in claims.itertuples()]
    return table_of("claim | paper | before | after | what changed my mind", rows)


def questions(root: Path) -> str:
    """The likeliest questions of a workshop, answered by what was found."""
    answers: Any = read(root, "mini/05_minerva_math").query("subject == 'all'").set_index("variant")
    exact, verify = (answers[name].map(percent) for name in ("accuracy", "math_verify"))
    sets, said = named_sets(read(root, "mini/04_layer_sets")), facts(root / "figures" / "mini")
    worlds = read(root, "seeds/claims").query("claim == 'C4' and contrast == 'corpus'")
    kept, chance, ceiling = _kept(said)
    alone, closing = said["best layers alone: solution; closing sentence"].split("; ")
    return f"""1. **Why not simply fine-tune?** Do: the whole vector *is* the fine-tune, and no set of layers chosen here does as well ({exact["full"]} of all answers right by exact match, the stethoscope's layers {exact["stethoscope"]}). The question is what SAEs can say about a vector, not whether to have one.
2. **Are the 97 % only the rank?** Mostly. On the miniature a random subspace of that rank keeps {chance} of the energy, the scalpel {kept}, the best one {ceiling}. So most is lost whatever the directions are, and what could have been kept is missed as well: notebook 03 splits the two.
3. **Why a third of the layers?** The paper does not say how many. A third was fixed before any result; `overrides = {{"selection.layer_share": ...}}` in notebook 04 tries another.
4. **Why paired tests?** The same problems are answered twice, so that only those whose verdict changed say anything. Two groups of different problems, as the published test has it, are another experiment: notebook 06.
5. **Is it format?** In part. The base gets {exact["base"]} by exact match and {verify["base"]} by Math-Verify, which needs no closing sentence; the whole vector gets {exact["full"]} and {verify["full"]}. The first gap is what format alone could bring.
6. **Does it hold for Gemma 3 4B?** Not known: that rung has not run here. Its profile is ready (`make doctor PROFILE=paper`). On the real weights that have run, the geometry carries over and the choice of layers does not: [what real weights say](../figures/README.md).
7. **How can a claim be "consistent" without a small p?** A claim that says "no effect" (C2, C7) is consistent when the paper's test finds none. That is no evidence of none, which is why the strict verdict asks for an interval inside a margin, and may say "not testable".
8. **What is energy?** The sum of the squares of all entries of a change: it adds up over layers and matrices. It says how much was changed, not what that does: [glossary](GLOSSARY.md).
9. **What would change your mind?** Each notebook says at its top what would refute its claim, and the ledger says by which rule it is judged. For the stethoscope, it would have to beat the shrunk whole vector. C4 held strictly in {int(worlds["verdict_strict"].isin(HOLDS).sum())} of {len(worlds)} worlds.
10. **Why the middle layers?** Not here: alone, layers {alone} bring most to the solution and {closing} to its closing sentence, and the middle third beats {percent(sets["percentile"]["middle"])} of random sets. For another network, look at its own figure of effects.
"""


# name -> (file, what stands there)
PARTS: dict[str, tuple[str, Callable[[Path], str]]] = {
    "found": ("README.md", found),
    "verdicts": ("README.md", verdicts),
    "notebooks": ("README.md", steps),
    "ledger": ("figures/README.md", whole_ledger),
    "rules": ("figures/README.md", rules),
    "organisms": ("figures/README.md", organisms),
    "real weights": ("figures/README.md", real_weights),
    "bench": ("bench/README.md", peers),
    "votes": ("notebooks/README.md", votes),
    "questions": ("notebooks/README.md", questions),
}


def part(text: str, name: str) -> str:
    """What stands in a text between the marks of this name. Raises ValueError where they are not there once each."""
    start, end = f"<!-- {name} -->\n", f"<!-- /{name} -->"
    if (text.count(start), text.count(end)) != (1, 1):
        raise ValueError(f"the marks of {name} are not there once each")
    return text.split(start)[1].split(end)[0]


def written(root: Path, name: str) -> tuple[Path, str]:
    """The file of one part, and its text with that part anew."""
    file, content = PARTS[name]
    text = (root / file).read_text(encoding="utf-8")
    start = f"<!-- {name} -->\n"
    return root / file, text.replace(start + part(text, name), start + content(root))


if __name__ == "__main__":
    here = Path(__file__).parents[2]
    for name in PARTS:
        path, text = written(here, name)
        path.write_text(text, encoding="utf-8")
