"""The stethoscope as a tool: a model, SAEs and two lists of texts in, a table of layers with its null out.

No profile, no files: for whoever wants to know where a model of their own hears a subject, mathematics or any other.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
import torch

from stetholib import layer_sets
from stetholib.belief import Declared, check_enough, refusals
from stetholib.errors import UserError
from stetholib.layer_selection import calibrated, drawn_scores
from stetholib.models.dictionary import Dictionary
from stetholib.models.loading import LanguageModel
from stetholib.models.sums import CONTRASTS, sums_bytes
from stetholib.sae_features import Listening, ScoreRule, groups, hear

RULE = ScoreRule()
DECLARED = Declared(mend="give SAEs of the outputs of these blocks")
SHOWN = ["layer", "d_sae", "l0", "fvu", "fvu_random"]


@torch.no_grad()
def listen(
    model: Any,
    tokenizer: Any,
    saes: Mapping[int, Any],
    maths: Sequence[str],
    general: Sequence[str],
    *,
    rule: ScoreRule = RULE,
    count: int | None = None,
    max_tokens: int = 256,
    batch_tokens: int = 8192,
    matched_minimum: int = 20,
    permutations: int = 1000,
    resamples: int = 200,
    memory_gib: float = 4.0,
    seed: int = 0,
) -> pd.DataFrame:
    """How specific each layer is to one kind of text, `maths`, beside another, `general`, and what chance would say.

    model, tokenizer: of transformers, in evaluation mode; saes: by layer, a JumpReLU or ReLU SAE of SAELens, or a `Dictionary`,
    that reads the output of that block. count: m, how many layers to select, a third of those with an SAE by default.
    matched_minimum: how often a word must occur on both sides to count in the contrast of matched words. memory_gib: for sums
    over documents; layers are heard in groups that fit. Returns one row a contrast and layer: the SAE's L0 and FVU beside a
    random dictionary's, why it is refused (its scores are then NaN, and it is not selected), score, the random dictionary's
    score, p_value (permuted documents), p_max (against the largest score of any layer), selection_share (of document resamples)
    and whether the layer is selected.
    Raises UserError for texts, layers or SAEs that cannot be used. Source: arXiv 2605.28649, whose formula of specificity is not
    public; the README says what was chosen.
    """
    layers, blocks = sorted(saes), model.config.get_text_config().num_hidden_layers
    _check(model, layers, blocks, maths, general)
    base = LanguageModel(model, tokenizer)
    dictionaries = {layer: _placed(one, layer, base.device) for layer, one in saes.items()}
    corpus_of = torch.tensor([0] * len(maths) + [1] * len(general))
    doubles = {layer: seed + 2 + layer for layer in range(blocks)}
    sizes = (max_tokens, batch_tokens, matched_minimum)
    listening = Listening([*maths, *general], corpus_of.tolist(), *sizes, seed, seed + 1, doubles)
    tests: list[pd.DataFrame] = []
    found: dict[str, list[list[np.ndarray]]] = {contrast: [] for contrast in CONTRASTS}
    needed = sums_bytes(max(one.d_sae for one in dictionaries.values()), len(corpus_of), 2)
    for group in groups(tuple(layers), needed, memory_gib):
        heard = hear(base, listening, dictionaries, rule, group)
        tests.append(heard.tests)
        weak = refusals(heard.tests, DECLARED)
        for contrast, parts in found.items():
            sums = (None if layer in weak else heard.sums[f"{contrast}.{layer}"] for layer in group)
            parts += drawn_scores(sums, corpus_of, rule, contrast == "matched", permutations, resamples, seed)
    return _table(pd.concat(tests, ignore_index=True), found, layers, count or layer_sets.layer_count(len(layers), 1 / 3), rule)


def _table(
    tests: pd.DataFrame, found: Mapping[str, list[list[np.ndarray]]], layers: Sequence[int], count: int, rule: ScoreRule
) -> pd.DataFrame:
    """One row a contrast and layer; found: by contrast, what `drawn_scores` gives. No score of a layer that is refused is shown."""
    refused = refusals(tests, DECLARED)
    check_enough(refused, len(layers), DECLARED)
    parts = []
    for contrast, draws in found.items():
        by_layer = zip(layers, draws, strict=True)
        kept = [[one * np.nan for one in drawn] if layer in refused else drawn for layer, drawn in by_layer]
        scores = calibrated(kept, rule, count)
        part = tests[SHOWN].assign(contrast=contrast, score=scores.score, score_random=tests[f"score_random_{contrast}"])
        part["refused"] = [refused.get(layer, "") for layer in layers]
        for name in ("p_value", "p_max", "selection_share"):
            part[name] = getattr(scores, name)
        chosen = [layers[at] for at in layer_sets.select(scores.score, count)]
        parts.append(part.assign(selected=part["layer"].isin(chosen).astype(int)))
    return pd.concat(parts, ignore_index=True)


def _placed(sae: Any, layer: int, device: torch.device) -> Dictionary:
    """The plain tensors of a layer's SAE on a device."""
    if not isinstance(sae, Dictionary):
        from stetholib.adapters import saes  # here, so that a `Dictionary` can be heard without SAELens

        saes.check_statement(sae.cfg.metadata.to_dict(), f"of layer {layer}", layer)
        sae = saes.dictionary(sae)
    return Dictionary(**{name: tensor.to(device) for name, tensor in vars(sae).items()})


def _check(model: Any, layers: Sequence[int], blocks: int, maths: Sequence[str], general: Sequence[str]) -> None:
    """Refuse what cannot be listened to."""
    if model.training:
        raise UserError("listen: the model is in training mode, whose dropout would be heard; call model.eval() first")
    if not layers or layers[0] < 0 or layers[-1] >= blocks:
        raise UserError(f"listen: SAEs are given for layers {layers}; the model has {blocks}, counted from 0")
    for name, texts in (("maths", maths), ("general", general)):
        if isinstance(texts, str) or len(texts) < 2 or not all(isinstance(text, str) and text.strip() for text in texts):
            raise UserError(f"listen: {name} must be a list of at least two texts, none of them empty")
