"""Wiring of step 02: SAEs, and one pass over all documents."""

import random
from collections.abc import Mapping, Sequence
from dataclasses import asdict
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
from stetholib.layer_selection import ScoreRule
from stetholib.sae_features import CONTRASTS, Dictionary, DocumentSums, FeatureSums
from stetholib.study.task_vectors import TaskVectorSteps
from stetholib.texts import SUBJECTS
from stetholib.workspace import Artefact, progress

CORPORA = (*SUBJECTS, sae_features.GENERAL)
SELF_TEST_TOKENS = 20_000


class FeatureSteps(TaskVectorSteps):
    """Adds the instrument and what it hears."""

    @cached_property
    def documents(self) -> pd.DataFrame:
        """The texts that features are heard on: corpus, context and text; validation split only."""
        data = self.profile.data
        rows = [
            dict(corpus=CORPORA.index(row["subject"]), context="", text=row["problem"] + "\n\n" + row["solution"])
            for row in self._per_subject(self.problems("validation"), data.feature_problems)
        ]
        general = texts.general(data, "validation", data.general_documents, self._seed("general"))
        rows += [dict(corpus=len(SUBJECTS), context="", text=text) for text in general]
        return pd.DataFrame(rows)

    @cached_property
    def _training_activations(self) -> dict[int, torch.Tensor]:
        """Residual streams of content tokens to train SAEs on: training problems and stories in equal parts."""
        p = self.profile
        wanted = p.sae.training_tokens
        maths = [(minerva_math.prompt(r["problem"]), minerva_math.target(r["solution"])) for r in self.problems("train")]
        stories = [("", text) for text in texts.general(p.data, "train", len(maths), self._seed("stories"))]
        pairs = [pair for both in zip(maths, stories, strict=True) for pair in both]
        tokens = [(ids, 1) for ids, _ in models.tokenize(self.base, pairs, p.data.max_tokens)]
        total, kept = 0, []
        for pair in tokens:
            if total >= wanted:
                break
            kept.append(pair)
            total += len(pair[0]) - 1
        found: dict[int, list[torch.Tensor]] = {layer: [] for layer in range(self.layers)}
        for _, _, streams in self._streams(kept, "02 activations for SAEs"):
            for layer, x in streams.items():
                found[layer].append(x.cpu())
        return {layer: torch.cat(parts) for layer, parts in found.items()}

    def _streams(self, pairs: Sequence[tuple[list[int], int]], label: str) -> Any:
        """Run texts through theta_0: (batch, document of each content token, residual stream by layer)."""
        pool = models.batches(pairs, self.profile.selection.batch_tokens, self.device)
        with torch.no_grad(), models.residual_stream(self.base.model) as taken:
            for batch in progress(pool, label):
                self.base.model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False)
                keep = batch.scored.bool()
                document = torch.tensor(batch.documents, device=keep.device).unsqueeze(1).expand_as(keep)[keep]
                yield batch, document, {layer: x[keep].float() for layer, x in taken.items()}

    def sae(self, layer: int) -> Artefact:
        """One block's SAE in SAELens' own format: `folder` is what `saes.load` reads."""
        from stetholib import saes

        p = self.profile
        params = [asdict(p.sae), asdict(p.data), p.seed, layer]
        make = partial(self._make_sae, layer)
        return self._stage("sae", params, [self.base_key], [saes, models, *self._text_code], make)

    def _make_sae(self, layer: int, folder: Path) -> Artefact:
        from stetholib import saes

        if self.profile.sae.release != "train":
            sae_id = self.profile.sae.sae_id.format(layer=layer)
            saes.load_release(self.profile.sae.release, sae_id).save_model(folder)
        else:
            seed = self._seed(f"sae {self.profile.sae.seed} {layer}")
            saes.train(self._training_activations[layer], self.profile.sae, seed, folder, self.device)
        return Artefact()

    @cached_property
    def dictionaries(self) -> dict[int, Dictionary]:
        """Every block's SAE as plain tensors."""
        return {layer: self._dictionary(layer) for layer in progress(range(self.layers), "02 SAEs")}

    def _dictionary(self, layer: int) -> Dictionary:
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

    def features(self) -> Artefact:
        """One pass over all documents: per-document feature sums of every block and contrast, self-tests, moments."""
        p = self.profile
        params = [asdict(p.features), asdict(p.data), asdict(p.selection), p.seed]
        return self._stage(
            "features", params, [self.base_key, *self._sae_keys], [sae_features, layer_selection, models, *self._text_code]
        )

    def _make_features(self, folder: Path) -> Artefact:
        p, docs = self.profile, self.documents
        corpus_of = torch.tensor(docs["corpus"].to_numpy())
        pairs = [
            (ids, 1)
            for ids, _ in models.tokenize(self.base, list(zip(docs["context"], docs["text"], strict=True)), p.data.max_tokens)
        ]
        content = [torch.tensor(ids[1:]) for ids, _ in pairs]
        matched = sae_features.matched_weights(content, [c < len(SUBJECTS) for c in docs["corpus"]], p.features.matched_minimum)
        sample = self._sample(pairs)
        tests, sums = {}, {}
        randoms = {}
        for layer, dictionary in self.dictionaries.items():
            x = sample[layer]
            tests[layer] = sae_features.self_test(dictionary, x)
            randoms[layer] = sae_features.random_dictionary(
                x, dictionary.d_sae, tests[layer].l0, self._seed(f"random dictionary {layer}")
            )
            for name, one in (("sae", dictionary), ("random", randoms[layer])):
                sums[name, layer] = FeatureSums(one.d_sae, corpus_of, float(one.encode(x).max()))
        second = {layer: torch.zeros(x.shape[1], x.shape[1], dtype=torch.float64) for layer, x in sample.items()}
        first = {layer: torch.zeros(x.shape[1], dtype=torch.float64) for layer, x in sample.items()}
        for batch, document, streams in self._streams(pairs, "02 feature statistics"):
            weights = self._token_weights(batch, matched)
            maths = (corpus_of[document.cpu()] < len(SUBJECTS)).to(document.device)
            for layer, x in streams.items():
                for name, one in (("sae", self.dictionaries[layer]), ("random", randoms[layer])):
                    sums[name, layer].add(one.encode(x), document, weights)
                heard = x[maths].double().cpu()
                second[layer] += heard.T @ heard
                first[layer] += heard.sum(0)
        count = float(sum(len(ids) for ids, c in zip(content, docs["corpus"], strict=True) if c < len(SUBJECTS)))
        return self._features_artefact(
            corpus_of,
            sums,
            tests,
            randoms,
            sample,
            {layer: second[layer] / count - torch.outer(first[layer], first[layer]) / count**2 for layer in second},
        )

    def _token_weights(self, batch: models.Batch, matched: Sequence[torch.Tensor]) -> dict[str, torch.Tensor]:
        """Weights of a batch's content tokens under each contrast."""
        joined = torch.cat([matched[document] for document in batch.documents])
        return {"corpus": torch.ones_like(joined), "matched": joined}

    def _sample(self, pairs: Sequence[tuple[list[int], int]]) -> dict[int, torch.Tensor]:
        """Activations of a random part of the documents, for self-tests and the random dictionaries."""
        order = list(range(len(pairs)))
        random.Random(self._seed("self-test")).shuffle(order)
        total, kept = 0, []
        for index in order:
            if total >= SELF_TEST_TOKENS:
                break
            kept.append(pairs[index])
            total += len(pairs[index][0]) - 1
        found: dict[int, list[torch.Tensor]] = {layer: [] for layer in range(self.layers)}
        for _, _, streams in self._streams(kept, "02 self-test"):
            for layer, x in streams.items():
                found[layer].append(x)
        return {layer: torch.cat(parts) for layer, parts in found.items()}

    def _features_artefact(
        self, corpus_of: torch.Tensor, sums: Mapping, tests: Mapping, randoms: Mapping, sample: Mapping, covariance: Mapping
    ) -> Artefact:
        """Everything step 02 keeps; of the random dictionaries only their self-tests and layer scores."""
        tensors = {"corpus_of": corpus_of}
        labels = sae_features.one_hot(corpus_of, len(CORPORA))
        rows = []
        for layer in tests:
            tensors[f"activation_covariance.{layer}"] = covariance[layer]
            zero = sae_features.self_test(randoms[layer], sample[layer])
            row = dict(layer=layer, d_sae=self.dictionaries[layer].d_sae) | asdict(tests[layer])
            row |= {f"{name}_random": value for name, value in asdict(zero).items()}
            for contrast in CONTRASTS:
                for name, part in vars(sums["sae", layer].sums[contrast]).items():
                    tensors[f"{contrast}.{layer}.{name}"] = part
                baseline = self._rule().score(sums["random", layer].sums[contrast], labels, contrast == "matched")
                row[f"score_random_{contrast}"] = float(baseline[0])
            rows.append(row)
        return Artefact(tensors=tensors, tables={"self_tests": pd.DataFrame(rows)})

    def _rule(self, kind: str | None = None) -> ScoreRule:
        p = self.profile
        return ScoreRule(
            kind or p.features.specificity, p.selection.score_share, p.selection.score_minimum, p.features.minimum_firing
        )

    def document_sums(self, contrast: str) -> list[DocumentSums]:
        """Per-document sums of every layer under one contrast."""
        tensors = self.features().tensors
        names = DocumentSums.__dataclass_fields__
        return [DocumentSums(**{n: tensors[f"{contrast}.{layer}.{n}"] for n in names}) for layer in range(self.layers)]

    def specificities(self, contrast: str, kind: str | None = None) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """(specificity, whether it fires) of every feature, layer by layer."""
        rule, labels = self._rule(kind), sae_features.one_hot(self.features().tensors["corpus_of"], len(CORPORA))
        found = []
        for sums in self.document_sums(contrast):
            m = sae_features.moments(sums, labels, contrast == "matched")
            found.append((sae_features.specificity(rule.kind, sums, m)[0], sae_features.firing(m, rule.minimum_firing)[0]))
        return found

    def sae_features(self) -> pd.DataFrame:
        """Step 02's table, written and returned."""
        tests = self.features().tables["self_tests"].set_index("layer")
        rows = []
        for contrast in CONTRASTS:
            for layer, (values, fires) in enumerate(self.specificities(contrast)):
                top = int(sae_features.most_specific(values, fires, 1)[0])
                rows.append(dict(layer=layer, contrast=contrast, top_feature=top, top_specificity=float(values[top])))
        table = pd.DataFrame(rows).join(tests[["d_sae", "l0", "fvu", "fvu_random", "alive", "l0_random"]], on="layer")
        self.workspace.table("02_sae_features", table)
        return table

    def top_tokens(self, layer: int, feature: int, count: int = 12) -> pd.DataFrame:
        """The surface forms on which a feature is most active, with mean activation and occurrences."""
        docs = self.documents
        pairs = [
            (ids, 1)
            for ids, _ in models.tokenize(
                self.base, list(zip(docs["context"], docs["text"], strict=True)), self.profile.data.max_tokens
            )
        ]
        d, parts = self.dictionaries[layer], []
        one = Dictionary(d.W_enc[:, [feature]], d.b_enc[[feature]], d.W_dec[[feature]], d.b_dec, d.threshold[[feature]])
        for batch, _, streams in self._streams(pairs, "02 top tokens"):
            ids = batch.input_ids[batch.scored.bool()].cpu()
            parts.append(pd.DataFrame({"id": ids, "activation": one.encode(streams[layer])[:, 0].cpu()}))
        heard = pd.concat(parts).groupby("id")["activation"].agg(["mean", "size"]).query("size >= 20")
        best = heard.sort_values("mean", ascending=False).head(count).reset_index()
        best.insert(0, "token", [self.base.tokenizer.decode([i]) for i in best["id"]])
        return best.drop(columns="id").rename(columns={"mean": "mean_activation", "size": "occurrences"})
