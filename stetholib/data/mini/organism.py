"""Train an organism, a model in which mathematics lives in known layers: `make organism BLOCKS="2 3 8 9"`.

A specialist of a few blocks learns mathematics alone. Its blocks are put into a deeper model, whose other blocks begin silent,
so that this model gives the specialist's logits. Then batches are routed (gradient routing, arXiv 2410.04332): mathematics
teaches the known blocks only, stories only the others; embeddings and the final norm learn from both. In each batch of
mathematics a random half of the others is skipped, or the known blocks would come to rely on the first of them, which write
into all that follows. Which blocks are known is our construction, and is written beside the weights, with what skipping each
block costs."""

import argparse
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from random import Random

import pandas as pd
import torch
from transformers import Gemma3ForCausalLM, PreTrainedTokenizerFast

from stetholib.data.mini import base, problems, stories, tokenizer
from stetholib.data.mini.base import Recipe, Routed
from stetholib.data.prompts import closing, prompt, target
from stetholib.errors import UserError
from stetholib.models.loading import LanguageModel
from stetholib.models.streams import document_losses, pool_of
from stetholib.probes import losses_skipping

LAYERS = 12
KNOWN = "known.json"


@dataclass(frozen=True)
class Organism(Recipe):
    """How an organism is made: `tokens` and the rates are those of the routed phase, maths_share is of its batches, and
    silent_share how likely one of the other blocks is skipped in a batch of mathematics."""

    blocks: tuple[int, ...] = (2, 3, 8, 9)
    tokens: int = 4_500_000
    maths_share: float = 0.6
    closing_share: float = 1.0
    closing_share_rare: float = 1.0
    muon_lr: float = 0.015
    adam_lr: float = 3e-3
    specialist_tokens: int = 10_000_000
    silent_share: float = 0.5

    @property
    def specialist(self) -> Recipe:
        """The recipe of the few blocks that learn mathematics alone, at higher rates."""
        kept = {field.name: getattr(self, field.name) for field in fields(Recipe)}
        rates = dict(muon_lr=2 * self.muon_lr, adam_lr=5 / 3 * self.adam_lr)
        return Recipe(**kept | rates | dict(tokens=self.specialist_tokens, maths_share=1.0))


def drawn(seed: int, count: int = 4) -> tuple[int, ...]:
    """Known blocks drawn by seed, of those whose attention is local, as a specialist's is."""
    local = [at for at, kind in enumerate(base.config(LAYERS).layer_types or ()) if kind == "sliding_attention"]
    return tuple(sorted(Random(f"{seed}/organism").sample(local, count)))


def grafted(specialist: Gemma3ForCausalLM, blocks: Sequence[int], seed: int) -> Gemma3ForCausalLM:
    """A model of twelve blocks with a specialist's at these places; the others add nothing yet, since their output's norm has a
    gain of 0. Raises UserError for a block whose attention is not local."""
    torch.manual_seed(seed)
    model = Gemma3ForCausalLM(base.config(LAYERS, specialist.config.hidden_size, specialist.config.vocab_size))
    kinds = model.config.layer_types or []
    if odd := [at for at in blocks if not 0 <= at < LAYERS or kinds[at] != "sliding_attention"]:
        raise UserError(f"organism: block {odd[0]} is not among those of local attention; take other blocks")
    with torch.no_grad():
        for block in model.model.layers:
            for norm in (block.post_attention_layernorm, block.post_feedforward_layernorm):
                norm.weight.fill_(-1.0)
    for at, block in zip(blocks, specialist.model.layers, strict=True):
        model.model.layers[at].load_state_dict(block.state_dict())
    for name in ("embed_tokens", "norm"):
        getattr(model.model, name).load_state_dict(getattr(specialist.model, name).state_dict())
    return model


def routed(recipe: Organism, tokens: PreTrainedTokenizerFast) -> Iterator[Routed]:
    """Batches of mathematics, for the known blocks, and of stories, for the others; other ones than the specialist has seen."""
    later = replace(recipe.specialist, seed=recipe.seed + 1000)
    maths, general = (base.batches(replace(later, maths_share=share), tokens) for share in (1.0, 0.0))
    others, rng = [at for at in range(LAYERS) if at not in recipe.blocks], Random(f"{recipe.seed}/routes")
    while True:
        if rng.random() < recipe.maths_share:
            yield next(maths), recipe.blocks, [at for at in others if rng.random() < recipe.silent_share]
        else:
            yield next(general), others, ()


def train(recipe: Organism, device: str, folder: Path) -> None:
    """Train specialist and organism, each from its last checkpoint, and save the organism with what skipping a block costs."""
    tokens = tokenizer.build()
    torch.manual_seed(recipe.seed)
    specialist = Gemma3ForCausalLM(base.config(len(recipe.blocks), vocab_size=len(tokens)))
    lone = ((batch, None, ()) for batch in base.batches(recipe.specialist, tokens))
    base.fit(specialist, lone, recipe.specialist, device, folder / "specialist")
    model = grafted(specialist.cpu(), recipe.blocks, recipe.seed + 1)
    base.fit(model, routed(recipe, tokens), recipe, device, folder)
    base.save(model, tokens, recipe, folder)
    skips = skip_table(LanguageModel(model.cpu().eval().requires_grad_(False), tokens))
    skips.to_csv(folder / "skips.csv", index=False, float_format="%.6g", lineterminator="\n")
    (folder / KNOWN).write_text(json.dumps(list(recipe.blocks)) + "\n")


def skip_table(model: LanguageModel, count: int = 10) -> pd.DataFrame:
    """What skipping each block adds to the losses of validation problems, before their closing sentence, and of stories, nats a
    token: columns layer, maths, general. count: problems a subject; as many stories as problems."""
    rows = problems.generate("validation", dict.fromkeys(problems.SUBJECTS, count), seed=0)
    solved = [(prompt(row["problem"]), target(row["solution"])) for row in rows]
    told = [("", text) for text in stories.generate(len(rows), 0, "validation")]
    pools = [pool_of(model, solved, 256, 4096, [closing(text) for _, text in solved]), pool_of(model, told, 256, 4096)]
    before = [document_losses(model.model, pool).mean() for pool in pools]
    added = [[losses_skipping(model, layer, pool).mean() - loss for pool, loss in zip(pools, before)] for layer in range(LAYERS)]
    return pd.DataFrame(added, columns=["maths", "general"]).rename_axis("layer").reset_index()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--blocks", type=int, nargs="*", help="those that mathematics lives in; drawn by the seed where none is given"
    )
    given = parser.parse_args()
    train(Organism(seed=given.seed, blocks=tuple(given.blocks or drawn(given.seed))), given.device, given.folder)
