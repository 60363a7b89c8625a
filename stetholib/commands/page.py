"""One page that needs nothing: the story, the miniature live, every set of layers, and the ledger: `make page`.

Here is gathered what the page holds; how it looks, and the model that runs in it, lie in `stetholib/page/` as HTML, CSS and plain
JavaScript, and are put into one file. What the page says is computed in the browser, from the tables and outcomes in it."""

import base64
import html
import json
import re
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

import stetholib
from stetholib import layer_sets, leaderboard
from stetholib.commands.reproduce import opened
from stetholib.data.prompts import STOP, boxed_answer
from stetholib.editing import TaskVector
from stetholib.errors import UserError
from stetholib.models.subspaces import split_loss
from stetholib.models.weights import Checkpoint, weight_names
from stetholib.plots import style
from stetholib.significance import ALL, Margins, metrics_of

SOURCES = Path(stetholib.__file__).parent / "page"
SCRIPTS = ("gemma", "statistics", "scoring", "ledger", "drawing", "story", "live", "game", "start")
LARGEST = 12 * 2**20
PAGE = "stethoscope.html"
LIVE = ("raw", "projected")  # the vectors that the page can make from what is in it
AGAINST = ("base", "full_shrunk")  # what the ledger's claims hold a variant against


def write(profile: str, device: str, organism: str) -> Path:
    """Write figures/<profile>/stethoscope.html and return its path; what it stands on is found or computed.
    organism: the profile whose layers of mathematics are known. Raises UserError where the profile's model is not of the
    miniature's kind, or the page would be larger than 12 MiB."""
    with opened(profile, device) as study:
        check(study)
        page = assembled(payload(study, stetholib.Study.open(organism, device=device)))
        return study.workspace.text(PAGE, page)


def check(study: Any) -> None:
    """Refuse a profile whose model, tokenizer or prompts the page's own forward pass cannot reproduce."""
    folder, p = study.world.base_folder, study.profile
    read = json.loads((folder / "config.json").read_text()), json.loads((folder / "tokenizer.json").read_text())
    size = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    wrong = {
        "its model is no Gemma 3 of text alone": read[0]["model_type"] != "gemma3_text",
        "its tokenizer does not cut texts into whole words": read[1]["model"]["type"] != "WordLevel",
        "its weights are too large": 2.7 * size > LARGEST,  # the base and its vector, in letters
        "it asks with examples or a chat template": p.evaluation.num_fewshot or p.evaluation.chat_template,
    }
    if found := [what for what, so in wrong.items() if so]:
        raise UserError(f"page: profile {p.name} cannot run in a browser ({found[0]}); take mini, or a profile that extends it")


def assembled(data: Mapping[str, Any]) -> str:
    """The page as one text: HTML with its style, scripts and data inside."""
    template, css = ((SOURCES / f"page.{kind}").read_text(encoding="utf-8") for kind in ("html", "css"))
    said = json.dumps(data, ensure_ascii=False, separators=(",", ":"), allow_nan=False).replace("</", "<\\/")
    code = "\n".join((SOURCES / f"{name}.js").read_text(encoding="utf-8") for name in SCRIPTS)
    parts = {"title": html.escape(data["profile"]["title"]), "style": css, "data": said, "script": code}
    page = re.sub(r"\{\{ (\w+) \}\}", lambda hole: parts[hole[1]], template)
    if (size := len(page.encode())) > LARGEST:
        raise UserError(f"page: it would hold {size / 2**20:.1f} MiB, more than 12; lower data.test_problems")
    return page


def payload(study: Any, organism: Any) -> dict[str, Any]:
    """All that the page holds, as plain data."""
    p, size = study.profile, study.layer_selection.selected_count
    return dict(
        profile=dict(name=p.name, title=p.title, seed=p.seed, headline=study.minerva_math.headline_subject),
        palette={name: getattr(style, name.upper()) for name in ("orange", "sky", "green", "red", "violet", "grey")},
        model=packed_model(study.world.base_folder, study.task_vectors.vector),
        scalpel={str(at): packed(basis, "f8") for at, basis in scalpel_bases(study).items()},
        edits=[dict(asdict(v), layers=list(v.layers)) for v in study.minerva_math.variants().values() if v.vector in LIVE],
        limits=dict(limit=p.evaluation.max_new_tokens, stops=[STOP]),
        story=story(study),
        problems=[problem(row) for row in study.world.problems("test")],
        ledger=ledger(study),
        games=[game(organism, size), game(study, size)],
    )


def packed(values: Any, kind: str = "f4") -> str:
    """Numbers as text: little-endian float32 (`f4`) or float64 (`f8`) in base 64."""
    return base64.b64encode(np.ascontiguousarray(np.asarray(values), f"<{kind}").tobytes()).decode()


def packed_model(folder: Path, vector: TaskVector) -> dict[str, Any]:
    """A Gemma 3 with its tokenizer and a task vector, for the page's own forward pass: names are the checkpoint's, matrices are
    float32, one after another."""
    base = Checkpoint(folder)
    config, read = (json.loads((folder / f"{name}.json").read_text()) for name in ("config", "tokenizer"))
    eos = config["eos_token_id"]
    ids = {one["content"]: one["id"] for one in read["added_tokens"] if one["special"]}
    specials = dict(all=sorted(ids.values()), bos=config["bos_token_id"], eos=eos if isinstance(eos, list) else [eos])
    names, full = sorted(base), weight_names(base)
    return dict(
        config=config,
        tokenizer=dict(
            pattern=read["pre_tokenizer"]["pattern"]["Regex"],
            vocabulary=read["model"]["vocab"],
            specials=specials | dict(unknown=read["model"]["vocab"][read["model"]["unk_token"]]),
        ),
        shapes=[[_short(name), list(base.shape(name))] for name in names],
        weights=packed(torch.cat([base[name].float().flatten() for name in names])),
        changed=[[_short(full[where]), list(delta.shape)] for where, delta in vector.deltas.items()],
        vector=packed(torch.cat([delta.flatten() for delta in vector.deltas.values()])),
    )


def _short(name: str) -> str:
    return name.removeprefix("model.").removesuffix(".weight")


def scalpel_bases(study: Any) -> dict[int, np.ndarray]:
    """The scalpel's subspace of each layer, [d_model, rank]."""
    step = study.subspace_projection
    return {layer: step.sites[layer].by_name["sae_decoder"][:, : step.ranks.default].numpy() for layer in step.layers}


def problem(row: Mapping[str, str]) -> dict[str, str]:
    """What the page shows of a test problem, and the answer that it is scored against."""
    shown = dict(subject=row["subject"], level=row.get("level", "-"), problem=row["problem"], solution=row["solution"])
    return shown | dict(answer=boxed_answer(row["solution"]))


def story(study: Any) -> dict[str, Any]:
    """The tables behind the five pictures: by layer, of sets of layers, and of accuracies."""
    step, energies = study.subspace_projection, study.task_vectors.energies()
    table, rank = step.table(), step.ranks.default
    kept = [{"layer": at} | asdict(split_loss(rows, energies, rank)) for at, rows in table.groupby("layer")]
    sets, size = study.layer_selection.sets(), study.layer_selection.selected_count
    same = sets[(sets["layers"].str.split().str.len() == size) | sets["selector"].isin(layer_sets.IN_ALL)]
    return dict(
        rank=rank,
        width=step.width,
        energy=records(study.task_vectors.table().groupby(["layer", "side"])["energy_share"].sum().unstack().reset_index()),
        kept=kept,
        kept_of_all=asdict(split_loss(table, energies, rank)),
        scores=records(study.layer_selection.table()),
        sets=records(same[["selector", "draw", "layers", "loss_change", "percentile", "percentile_low", "percentile_high"]]),
        accuracy=records(study.minerva_math.table()),
    )


def records(table: pd.DataFrame) -> list[dict[str, Any]]:
    """The rows of a table; what is NaN is null."""
    return json.loads(table.to_json(orient="records", double_precision=15))


def ledger(study: Any) -> dict[str, Any]:
    """Each answer's outcome, by metric and variant, in the order of the test's problems; the bootstrap's draws, by which intervals
    are computed at any level; and what the claims stand on that does not hang on a level or a margin."""
    step, answers = study.significance, study.minerva_math.records()
    chosen, claims = study.layer_selection.chosen(), step.claims()
    sets = study.layer_selection.sets().query("draw == 0").set_index("selector")
    names = ("stethoscope", "stethoscope_matched")
    return dict(
        margins={name: value for name, value in asdict(step.margins).items() if name != "draws"},
        variants=list(study.minerva_math.variants()),
        outcomes={
            metric: {str(name): outcomes(part[metric]) for name, part in answers.groupby("variant")}
            for metric in metrics_of(answers)
        },
        draws=drawn(answers, step.margins),
        claims=records(claims),
        tells_apart=layer_sets.tells_apart(study.layer_selection.reliability()),
        percentile_low={name: float(sets.loc[name, "percentile_low"]) for name in names},
        same_layers=chosen[names[0]][1] == chosen[names[1]][1],
        published_rung=study.profile.published_rung,
        carried=step._carried(),
    )


def outcomes(right: pd.Series) -> str:
    """Zeros and ones, eight a byte, the first in the lowest bit, in base 64."""
    return packed(np.packbits(right.astype(int).to_numpy().astype(np.uint8), bitorder="little"), "u1")


def drawn(answers: pd.DataFrame, margins: Margins) -> dict[str, dict[str, Any]]:
    """How often each net gain occurs among the bootstrap's draws of `significance.compare`, by metric, variant, what it is held
    against, and subject: key "metric/variant/against/subject" -> {lowest, counts}."""
    subjects = answers[answers["variant"] == AGAINST[0]]["subject"].to_numpy()
    found: dict[str, dict[str, Any]] = {}
    for metric in metrics_of(answers):
        by = {str(name): part[metric].astype(int).to_numpy() for name, part in answers.groupby("variant")}
        pairs = [(name, AGAINST[0]) for name in by] + [(name, AGAINST[1]) for name in ("stethoscope", "stethoscope_matched")]
        for name, against in (pair for pair in pairs if pair[0] != pair[1]):
            for subject in (ALL, *sorted(set(subjects))):
                change = (by[name] - by[against])[(subjects == subject) | (subject == ALL)]
                found[f"{metric}/{name}/{against}/{subject}"] = _histogram(change, margins)
    return found


def _histogram(change: np.ndarray, margins: Margins) -> dict[str, Any]:
    gained, lost, n = int((change > 0).sum()), int((change < 0).sum()), len(change)
    shares = [gained / n, lost / n, (n - gained - lost) / n]
    counts = np.random.default_rng(margins.seed).multinomial(n, shares, size=margins.draws)
    net = counts[:, 0] - counts[:, 1]
    return dict(lowest=int(net.min()), counts=np.bincount(net - net.min()).tolist())


def game(study: Any, size: int) -> dict[str, Any]:
    """Every set of so many layers with its loss, the standard error of each two sets' difference (of the upper triangle, row by
    row), what rules pick, and the layers of mathematics where they are known."""
    board, p = leaderboard.all_sets(study, size), study.profile
    errors = leaderboard.paired_errors(study, board["layers"].tolist())
    energy = layer_sets.layer_energies(study.task_vectors.energies())
    rules = {"largest norm": layer_sets.select(energy, size)}
    if not p.finetune.blocks:  # where layers are known, no SAE is asked
        rules |= {name.replace("_", " "): layers for name, (_, layers) in study.layer_selection.chosen().items()}
    return dict(
        name=p.name,
        title=p.title.split(",")[0],
        known=" ".join(map(str, p.finetune.blocks or ())),
        layers=board["layers"].tolist(),
        loss=board["loss"].tolist(),
        base=study.losses.of(()).mean(),
        whole=study.losses.of(tuple(range(study.world.layers))).mean(),
        problems=len(study.losses.subjects),
        errors=packed(errors[np.triu_indices(len(errors), 1)]),
        rules={name: " ".join(map(str, layers)) for name, layers in rules.items() if len(layers) == size},
    )
