"""Wiring of step 02: SAEs, and one pass over all documents."""

import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, fields
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from stetholib import (
    layer_selection,
    minerva_math,
    models,
    sae_features,
    texts,
)
from stetholib.errors import UserError
from stetholib.layer_selection import ScoreRule
from stetholib.sae_features import CONTRASTS, Dictionary, DocumentSums, FeatureSums
from stetholib.study.stages import files_key, wiring
from stetholib.study.task_vectors import TaskVectorSteps
from stetholib.workspace import Artefact, digest_of, progress, source_hash

SELF_TEST_TOKENS = 20_000
NEIGHBOUR_TOKENS = 2_000


class FeatureSteps(TaskVectorSteps):
    """Adds the instrument and what it hears."""

    @property
    def corpora(self) -> tuple[str, ...]:
        """Names of the corpora that features are heard on: the subjects, and general text."""
        return (*self.profile.data.subjects, sae_features.GENERAL)

    @cached_property
    def documents(self) -> pd.DataFrame:
        """The texts that features are heard on: corpus, context and text; validation split only."""
        data = self.profile.data
        rows = [
            dict(corpus=self.corpora.index(row["subject"]), context="", text=row["problem"] + "\n\n" + row["solution"])
            for row in self._per_subject(self.problems("validation"), data.feature_problems)
        ]
        general = texts.general(data, "validation", data.general_documents, self._seed("general"))
        rows += [dict(corpus=len(self.corpora) - 1, context="", text=text) for text in general]
        return pd.DataFrame(rows)

    @cached_property
    def _training_activations(self) -> dict[int, torch.Tensor]:
        """Residual streams of content tokens to train SAEs on: training problems and stories in equal parts."""
        p = self.profile
        wanted = p.sae.training_tokens
        maths = [
            (minerva_math.prompt(r["problem"]), minerva_math.target(r["solution"], p.finetune.target))
            for r in self.problems("train")
        ]
        stories = [("", text) for text in texts.general(p.data, "train", len(maths), self._seed("stories"), or_fewer=True)]
        pairs = [pair for both in zip(maths, stories, strict=False) for pair in both]
        tokens = [(ids, 1) for ids, _ in models.tokenize(self.base, pairs, p.data.max_tokens)]
        total, kept = 0, []
        for pair in tokens:
            if total >= wanted:
                break
            kept.append(pair)
            total += len(pair[0]) - 1
        if total < wanted:
            raise UserError(f"sae.training_tokens is {wanted}, but the texts to train SAEs on hold {total}; lower it")
        found: dict[int, list[torch.Tensor]] = {layer: [] for layer in range(self.layers)}
        for _, _, streams in self._streams(kept, "02 activations for SAEs", range(self.layers)):
            for layer, x in streams.items():
                found[layer].append(x.cpu())
        return {layer: torch.cat(parts) for layer, parts in found.items()}

    def _streams(self, pairs: Sequence[tuple[list[int], int]], label: str, layers: Iterable[int]) -> Any:
        """Run texts through theta_0: (batch, document of each content token, residual stream of each of the layers)."""
        pool = models.batches(pairs, self.profile.selection.batch_tokens, self.device)
        with torch.no_grad(), models.residual_stream(self.base.model) as taken:
            for batch in progress(pool, label):
                models.run_blocks(self.base.model, batch)
                keep = batch.scored.bool()
                models.check_finite({f"the output of layer {layer}": taken[layer][keep] for layer in layers})
                document = torch.tensor(batch.documents, device=keep.device).unsqueeze(1).expand_as(keep)[keep]
                yield batch, document, {layer: taken[layer][keep].float() for layer in layers}

    def sae(self, layer: int) -> Artefact:
        """One block's SAE in SAELens' own format: `folder` is what `saes.load` reads."""
        from stetholib import saes

        p, make = self.profile, partial(self._make_sae, layer)
        if p.sae.release != "train":  # what is only fetched depends on nothing else
            params = [p.model.base, p.sae.release, p.sae.sae_id, p.sae.revision, layer]
            return self._stage("sae", params, self._own_saes[layer], [saes], make)
        params = [asdict(p.sae), self.data_key, p.selection.batch_tokens, p.seed, layer]
        return self._stage("sae", params, [self.base_key], [saes, models, minerva_math, *self._text_code], make)

    @cached_property
    def _own_saes(self) -> list[list[str]]:
        """Hashes of the files of each block's SAE, where they are in a folder of one's own."""
        from stetholib import saes

        spec = self.profile.sae
        return [files_key(Path(spec.release) / saes.id_of(spec.sae_id, layer), "*") for layer in range(self.layers)]

    def _make_sae(self, layer: int, folder: Path) -> Artefact:
        from stetholib import saes

        spec = self.profile.sae
        if spec.release == "train":
            seed = self._seed(f"sae {spec.seed} {layer}")
            saes.train(self._training_activations[layer], spec, seed, folder, self.device)
        else:
            saes.check_release(spec.release, self.profile.model.base)
            saes.fetch(spec.release, spec.sae_id, layer, spec.revision).save_model(folder)
        return Artefact()

    def dictionary(self, layer: int) -> Dictionary:
        """Plain tensors of one SAE, kept as a stage so that SAELens is imported only where one is made."""
        from stetholib import saes

        upstream = self.sae(layer)
        make = partial(self._make_dictionary, upstream)
        tensors = self._stage("dictionary", layer, [upstream.key], [saes, sae_features], make).tensors
        return Dictionary(**{name: tensor.to(self.device) for name, tensor in tensors.items()})

    def _make_dictionary(self, upstream: Artefact, folder: Path) -> Artefact:
        from stetholib import saes

        return Artefact(tensors=vars(saes.dictionary(saes.load(upstream.folder))))

    @property
    def _sae_keys(self) -> list[str]:
        return [self.sae(layer).key for layer in range(self.layers)]

    @cached_property
    def _groups(self) -> list[range]:
        """Blocks whose sums fit into memory together: of the SAE and its random double, under both contrasts."""
        each = 2 * sae_features.sums_bytes(self.dictionary(0).d_sae, len(self.documents), len(self.corpora))
        size = max(1, int(self.profile.features.memory_gib * 2**30 / each))
        return [range(start, min(start + size, self.layers)) for start in range(0, self.layers, size)]

    @property
    def _heard(self) -> list[Any]:
        """The profile's values that what is heard depends on, however layers are scored by it."""
        p = self.profile
        counts = [p.data.feature_problems, p.data.general_documents, p.selection.batch_tokens]
        return [*counts, p.features.specificity, p.features.minimum_firing, p.features.matched_minimum, self.data_key, p.seed]

    @cached_property
    def _heard_key(self) -> str:
        """Identity of what is heard, for those who ask for directions and not for scores."""
        code = source_hash([sae_features, models, *self._text_code, *wiring(FeatureSteps)])
        return digest_of(self._heard, self.base_key, self._sae_keys, code)

    def features(self, layer: int) -> Artefact:
        """Per-document feature sums, self-tests and moments of the group of blocks that this one belongs to."""
        group = next(group for group in self._groups if layer in group)
        params = [*self._heard, asdict(self._rule()), [group.start, group.stop]]
        upstream = [self.base_key, *(self.sae(at).key for at in group)]
        modules = [sae_features, layer_selection, models, *self._text_code]
        return self._stage("features", params, upstream, modules, partial(self._make_features, group))

    @property
    def _feature_keys(self) -> list[str]:
        return [self.features(group.start).key for group in self._groups]

    @property
    def corpus_of(self) -> torch.Tensor:
        """Index of each document's corpus."""
        return torch.tensor(self.documents["corpus"].to_numpy())

    @cached_property
    def _document_tokens(self) -> list[tuple[list[int], int]]:
        docs = self.documents
        texts_of = list(zip(docs["context"], docs["text"], strict=True))
        return [(ids, 1) for ids, _ in models.tokenize(self.base, texts_of, self.profile.data.max_tokens)]

    def _make_features(self, group: range, folder: Path) -> Artefact:
        """One pass over all documents for a group of blocks."""
        pairs, corpus_of = self._document_tokens, self.corpus_of
        content, is_maths = [torch.tensor(ids[1:]) for ids, _ in pairs], (corpus_of < len(self.corpora) - 1).tolist()
        matched = sae_features.matched_weights(content, is_maths, self.profile.features.matched_minimum)
        tests, instruments, sums = self._tested(group, pairs)
        width = next(iter(instruments.values())).W_dec.shape[1]
        moment = {layer: sae_features.Covariance(width) for layer in group}
        for batch, document, streams in self._streams(pairs, "02 feature statistics", group):
            weights = self._token_weights(batch, matched)
            maths = (corpus_of[document.cpu()] < len(self.corpora) - 1).to(document.device)
            for layer, x in streams.items():
                for name in ("sae", "random"):
                    sums[name, layer].add(instruments[name, layer].encode(x), document, weights)
                moment[layer].add(x[maths])
        labels = sae_features.one_hot(corpus_of, len(self.corpora))
        tensors, rows = {}, []
        for layer in group:  # of the random dictionaries only their self-tests and layer scores are kept
            tensors[f"activation_covariance.{layer}"] = moment[layer].value()
            for contrast in CONTRASTS:
                for name, part in vars(sums["sae", layer].sums[contrast]).items():
                    tensors[f"{contrast}.{layer}.{name}"] = part
                baseline = self._rule().score(sums["random", layer].sums[contrast], labels, contrast == "matched")
                tests[layer][f"score_random_{contrast}"] = float(baseline[0])
            rows.append(tests[layer])
        return Artefact(tensors=tensors, tables={"self_tests": pd.DataFrame(rows)})

    def _tested(self, group: range, pairs: Sequence[tuple[list[int], int]]) -> tuple[dict, dict, dict]:
        """Self-tests of a group's SAEs, the SAEs with their random doubles, and empty sums for both.

        An SAE that was not trained here is refused where it cannot be this block's.
        """
        from stetholib import saes

        spec, tests, instruments, sums = self.profile.sae, {}, {}, {}
        sample = self._sample(pairs, range(max(0, group.start - 1), min(self.layers, group.stop + 1)))
        generator = torch.Generator().manual_seed(self._seed("neighbours"))
        some = torch.randperm(len(sample[group.start]), generator=generator)[:NEIGHBOUR_TOKENS].to(self.device)
        for layer in group:
            one, x = self.dictionary(layer), sample[layer]
            sae_features.check_width(layer, one, x)
            found = sae_features.self_test(one, x)
            sae_features.check_fires(layer, found)
            sites = [at for at in (layer - 1, layer, layer + 1) if at in sample]
            near = {at: sae_features.self_test(one, sample[at][some]).fvu for at in sites}
            own = near.pop(layer)
            if spec.release != "train":
                sae_features.check_site(layer, own, near, found.l0, saes.expected_l0(spec.release, spec.sae_id, layer))
            double = sae_features.random_dictionary(x, one.d_sae, found.l0, self._seed(f"random dictionary {layer}"))
            tests[layer] = dict(layer=layer, d_sae=one.d_sae) | asdict(found)
            chance = sae_features.self_test(double, x)
            tests[layer] |= {f"{name}_random": value for name, value in asdict(chance).items()}
            tests[layer]["fvu_neighbour"] = min(near.values(), default=float("nan"))
            for name, instrument, said in (("sae", one, found), ("random", double, chance)):
                models.check_finite({f"what the {name} dictionary of layer {layer} hears": torch.tensor(said.largest)})
                instruments[name, layer] = instrument
                sums[name, layer] = FeatureSums(one.d_sae, self.corpus_of, said.largest)
        return tests, instruments, sums

    def _token_weights(self, batch: models.Batch, matched: Sequence[torch.Tensor]) -> dict[str, torch.Tensor]:
        """Weights of a batch's content tokens under each contrast."""
        joined = torch.cat([matched[document] for document in batch.documents])
        return {"corpus": torch.ones_like(joined), "matched": joined}

    def _sample(self, pairs: Sequence[tuple[list[int], int]], layers: range) -> dict[int, torch.Tensor]:
        """Activations of a random part of the documents, for self-tests and the random dictionaries."""
        order = list(range(len(pairs)))
        random.Random(self._seed("self-test")).shuffle(order)
        total, kept = 0, []
        for index in order:
            if total >= SELF_TEST_TOKENS:
                break
            kept.append(pairs[index])
            total += len(pairs[index][0]) - 1
        found: dict[int, list[torch.Tensor]] = {layer: [] for layer in layers}
        for _, _, streams in self._streams(kept, "02 self-test", layers):
            for layer, x in streams.items():
                found[layer].append(x)
        return {layer: torch.cat(parts) for layer, parts in found.items()}

    def self_tests(self) -> pd.DataFrame:
        """One row a block: what its SAE and its random double explain, how sparsely, and the doubles' layer scores."""
        return pd.concat([self.features(group.start).tables["self_tests"] for group in self._groups], ignore_index=True)

    def _rule(self, kind: str | None = None) -> ScoreRule:
        p = self.profile
        return ScoreRule(
            kind or p.features.specificity, p.selection.score_share, p.selection.score_minimum, p.features.minimum_firing
        )

    def document_sums(self, contrast: str) -> Iterator[DocumentSums]:
        """Per-document sums under one contrast, block by block; each is read when its turn comes."""
        names = [field.name for field in fields(DocumentSums)]
        for layer in range(self.layers):
            tensors = self.features(layer).tensors
            yield DocumentSums(**{name: tensors[f"{contrast}.{layer}.{name}"] for name in names})

    def specificities(self, contrast: str, kind: str | None = None) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """(specificity, whether it fires) of every feature, layer by layer."""
        rule, labels = self._rule(kind), sae_features.one_hot(self.corpus_of, len(self.corpora))
        found = []
        for sums in self.document_sums(contrast):
            m = sae_features.moments(sums, labels, contrast == "matched")
            found.append((sae_features.specificity(rule.kind, sums, m)[0], sae_features.firing(m, rule.minimum_firing)[0]))
        return found

    def sae_features(self) -> pd.DataFrame:
        """Step 02's table, written and returned."""
        tests = self.self_tests().set_index("layer")
        rows = []
        for contrast in CONTRASTS:
            for layer, (values, fires) in enumerate(self.specificities(contrast)):
                top = int(sae_features.most_specific(values, fires, 1)[0])
                rows.append(dict(layer=layer, contrast=contrast, top_feature=top, top_specificity=float(values[top])))
        table = pd.DataFrame(rows).join(
            tests[["d_sae", "l0", "fvu", "fvu_random", "alive", "l0_random", "fvu_neighbour"]], on="layer"
        )
        self.workspace.table("02_sae_features", table)
        return table

    def top_tokens(self, layer: int, feature: int, count: int = 12) -> pd.DataFrame:
        """The surface forms on which a feature is most active, with mean activation and occurrences."""
        d, parts = self.dictionary(layer), []
        one = Dictionary(d.W_enc[:, [feature]], d.b_enc[[feature]], d.W_dec[[feature]], d.b_dec, d.threshold[[feature]])
        for batch, _, streams in self._streams(self._document_tokens, "02 top tokens", [layer]):
            ids = batch.input_ids[batch.scored.bool()].cpu()
            parts.append(pd.DataFrame({"id": ids, "activation": one.encode(streams[layer])[:, 0].cpu()}))
        heard = pd.concat(parts).groupby("id")["activation"].agg(["mean", "size"]).query("size >= 20")
        best = heard.sort_values("mean", ascending=False).head(count).reset_index()
        best.insert(0, "token", [self.base.tokenizer.decode([i]) for i in best["id"]])
        return best.drop(columns="id").rename(columns={"mean": "mean_activation", "size": "occurrences"})
