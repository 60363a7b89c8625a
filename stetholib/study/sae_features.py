"""Step 02 wired to a world: SAEs, and one pass over all documents."""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import cached_property
from math import nan
from pathlib import Path

import pandas as pd
import torch
from torch import Tensor

from stetholib import sae_features
from stetholib.adapters import own_code, saes
from stetholib.belief import Declared, check_enough, refusals
from stetholib.data import corpora, hub
from stetholib.data.source import Source
from stetholib.editing import Lazy
from stetholib.models.dictionary import Dictionary
from stetholib.models.loading import LanguageModel
from stetholib.models.sums import CONTRASTS, DocumentSums, sums_bytes
from stetholib.profiles import Sae
from stetholib.sae_features import GENERAL, Heard, Listening, ScoreRule
from stetholib.store.artefacts import Artefact
from stetholib.store.values import Input, hashed
from stetholib.study.world import Step, World


class SaeFeatures(Step):
    """The instrument, and what it hears."""

    def __init__(self, world: World, spec: Sae | None = None, general: str | None = None) -> None:
        """spec: other SAEs than the profile's; general: other general text to hear."""
        super().__init__(world)
        self._spec, data = spec or world.profile.sae, world.profile.data
        self._data = replace(data, general=general, general_config=None, general_revision=None) if general else data

    @property
    def _corpora(self) -> tuple[str, ...]:
        """Names of the corpora that features are heard on: the subjects, and general text."""
        return (*self._profile.data.subjects, GENERAL)

    @cached_property
    def listening(self) -> Listening:
        """The texts that features are heard on, of the validation split only, and how they are heard."""
        data, world = self._data, self._world
        rows = world.per_subject("validation", data.feature_problems)
        general = corpora.general(data, "validation", data.general_documents, world.seed("general"))
        return Listening(
            texts=[row["problem"] + "\n\n" + row["solution"] for row in rows] + general,
            corpus_of=[self._corpora.index(row["subject"]) for row in rows] + [len(self._corpora) - 1] * len(general),
            max_tokens=data.max_tokens,
            batch_tokens=self._profile.selection.batch_tokens,
            matched_minimum=self._profile.features.matched_minimum,
            sample_seed=world.seed("self-test"),
            neighbour_seed=world.seed("neighbours"),
            dictionary_seeds={layer: world.seed(f"random dictionary {layer}") for layer in range(world.layers)},
        )

    @cached_property
    def _activations(self) -> Input[dict[int, Tensor]]:
        """What SAEs are trained on: training problems and general text in equal parts."""
        p, world = self._profile, self._world
        maths = world.solved(world.problems("train"))
        stories = [("", text) for text in corpora.general(p.data, "train", len(maths), world.seed("stories"), or_fewer=True)]
        texts = [pair for both in zip(maths, stories, strict=False) for pair in both]
        sizes = (p.sae.training_tokens, p.data.max_tokens, p.selection.batch_tokens)
        return self._store.derived(saes.activations, world.model, texts, *sizes)

    def _sae(self, layer: int) -> Artefact:
        """A layer's SAE in SAELens' own format."""
        world, spec, base = self._world, self._spec, self._profile.model.base
        if spec.release == "train":
            drawn = world.seed(f"sae {spec.seed} {layer}")
            named = base if Source.of(base).where == "hub" else None
            return self._store.made(saes.trained_sae, self._activations, layer, spec, drawn, world.device, named)
        files = hub.files_key(Path(spec.release) / saes.id_of(spec.sae_id, layer), "*")
        source = (spec.release, spec.sae_id, layer, spec.revision, base, files)
        made = self._store.made(saes.fetched_sae, *source)
        saes.check_commit(self._store.folder, spec, made.value)
        return made

    @cached_property
    def dictionaries(self) -> Input[Mapping[int, Dictionary]]:
        """All layers' SAEs as an input of stages, each read when it is asked for."""
        return self._of(range(self._world.layers))

    @cached_property
    def _every(self) -> dict[int, Artefact]:
        """Each layer's SAE: its files are hashed once in a process."""
        layers = range(self._world.layers)
        return {layer: self._store.made(saes.dictionary_of, self._sae(layer).files) for layer in layers}

    def _of(self, layers: range) -> Input[Mapping[int, Dictionary]]:
        kept = {layer: self._every[layer] for layer in layers}
        return Input.of(hashed(list(kept.values())), lambda: Lazy(kept, lambda layer: self._placed(kept[layer].value)))

    def _placed(self, one: Dictionary) -> Dictionary:
        return Dictionary(**{name: tensor.to(self._world.device) for name, tensor in vars(one).items()})

    @cached_property
    def _groups(self) -> list[range]:
        """Layers whose sums fit into memory together: of the SAE and its random double, under both contrasts."""
        width, layers = self._every[0].value.d_sae, self._world.layers
        each = sums_bytes(width, len(self.listening.texts), len(self._corpora))
        return sae_features.groups(range(layers), each, self._profile.features.memory_gib)

    @cached_property
    def heard(self) -> Input[dict[int, Heard]]:
        """What every layer heard, as an input of stages: by layer, what its group left."""

        def fetch() -> dict[int, Heard]:
            found = {group: artefact.value for group, artefact in self._left.items()}
            return {layer: found[group] for group in found for layer in group}

        return Input.of(hashed(list(self._left.values())), fetch)

    @cached_property
    def _left(self) -> dict[range, Artefact]:
        """What each group of layers heard."""
        found = {}
        for group in self._groups:
            inputs = (self._world.model, self.listening, self._of(group), self.rule(), list(group))
            found[group] = self._store.made(sae_features.hear, *inputs)
        return found

    @cached_property
    def _refused(self) -> dict[int, str]:
        """Why a layer's SAE is not believed, by layer. Raises UserError where fewer than two thirds of the layers can be."""
        spec, layers = self._spec, self._world.layers
        declared = Declared.trained(layers, spec.k) if spec.release == "train" else saes.declared(spec, layers)
        found = refusals(self.self_tests(), declared)
        check_enough(found, layers, declared)
        return found

    @property
    def believed(self) -> list[int]:
        """The layers that can be selected, and that the scalpel filters."""
        return [layer for layer in range(self._world.layers) if layer not in self._refused]

    def rule(self, kind: str | None = None) -> ScoreRule:
        """How features become a layer's score."""
        p = self._profile
        share, minimum = p.selection.score_share, p.selection.score_minimum
        return ScoreRule(own_code.specificity(kind or p.features.specificity), share, minimum, p.features.minimum_firing)

    def sums(self, contrast: str) -> Input[Iterator[DocumentSums | None]]:
        """Document sums under one contrast as an input of stages: layer by layer, each read when its turn comes; None where a
        layer is refused."""
        refused = self._refused

        def fetch() -> Iterator[DocumentSums | None]:
            with self.heard.opened() as found:
                for layer, one in found.items():
                    yield None if layer in refused else one.sums[f"{contrast}.{layer}"]

        return Input.of(hashed([self.heard, contrast, sorted(refused)]), fetch)

    def self_tests(self) -> pd.DataFrame:
        """One row a layer: what its SAE and its random double explain, how sparsely, and the doubles' layer scores."""
        return pd.concat([artefact.value.tests for artefact in self._left.values()], ignore_index=True)

    def specificities(self, contrast: str, kind: str | None = None) -> list[tuple[Tensor, Tensor] | None]:
        """(specificity, whether it fires) of every feature, layer by layer; None where a layer is refused."""
        rule, corpus_of = self.rule(kind), torch.tensor(self.listening.corpus_of)
        with self.sums(contrast).opened() as sums:
            return list(sae_features.specificities(sums, corpus_of, rule.kind, rule.minimum_firing, contrast == "matched"))

    def best_auroc(self) -> dict[str, list[float]]:
        """The best feature's AUROC in each layer, by contrast; 0.5 is chance, NaN a layer that is refused."""
        found = {c: self.specificities(c, "auroc") for c in CONTRASTS}
        return {c: [float(one[0][one[1]].max()) if one else nan for one in layers] for c, layers in found.items()}

    def table(self) -> pd.DataFrame:
        """Step 02's table."""
        heard = {contrast: self.specificities(contrast) for contrast in CONTRASTS}
        return sae_features.measure(self.self_tests(), heard, self._refused)

    def top_tokens(self, layer: int, feature: int, count: int = 12) -> pd.DataFrame:
        """The surface forms on which a feature is most active, with mean activation and occurrences."""
        inputs = (self._world.model, self.listening, self.dictionaries, layer, feature, count)
        return self._store.made(sae_features.top_tokens, *inputs).value


def training(step: SaeFeatures) -> pd.DataFrame | None:
    """How the SAEs that were trained here went: columns layer, tokens, fvu, l0, dead. None where they are fetched."""
    if step._spec.release != "train":
        return None
    curves = {layer: step._sae(layer).value for layer in range(step._world.layers)}
    return pd.concat(curves, names=["layer"]).reset_index("layer").reset_index(drop=True)


def beside(step: SaeFeatures, spec: Sae | None = None, general: str | None = None) -> SaeFeatures:
    """Other SAEs than a step's, or other general text, on the same problems; believed or not as the step's own are."""
    other = SaeFeatures(step._world, spec or step._spec, general)
    other._refused = step._refused
    return other


def again(step: SaeFeatures, tuned: Input[LanguageModel]) -> Iterator[DocumentSums]:
    """What the same SAEs hear of another model on the same mathematics, layer by layer: sums of all tokens of each document."""
    tests = step.self_tests()
    for group in step._groups:
        rows = tests[tests["layer"].isin(group)].reset_index(drop=True)
        inputs = (tuned, step.listening, step._of(group), rows, list(group))
        found = step._store.made(sae_features.hear_again, *inputs).value
        yield from (found[layer] for layer in group)
