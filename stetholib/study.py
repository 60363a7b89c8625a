"""The one room where everything is wired together: a profile, a workspace, and the six steps as cached stages.

    study = Study.open("mini")
    study.layer_selection()        # makes, or finds, all that it stands on

A stage is a method `_make_<name>` that turns what came before into an `Artefact`; it is keyed by its parameters, its
upstream artefacts, the code it runs and the libraries' versions. Any notebook can therefore be opened first.
"""

import inspect
import json
import os
import random
import textwrap
from collections.abc import Callable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import cached_property, partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from stetholib import (
    claims,
    editing,
    figures,
    layer_selection,
    minerva_math,
    models,
    planted,
    profiles,
    sae_features,
    significance,
    subspace_projection,
    task_vectors,
    texts,
)
from stetholib.editing import Edit, edited, matched_scales
from stetholib.layer_selection import ScoreRule
from stetholib.models import Checkpoint, LanguageModel
from stetholib.sae_features import CONTRASTS, Dictionary, DocumentSums, FeatureSums
from stetholib.subspace_projection import Directions, Ranks
from stetholib.task_vectors import TaskVector
from stetholib.texts import SUBJECTS
from stetholib.workspace import Artefact, Workspace, append_json, code_text, digest_of, progress, read_json_lines, source_hash

PARAMETERS = ("profile", "device", "overrides")
LIBRARIES = ("torch", "transformers", "sae-lens", "lm-eval", "datasets", "peft", "scipy", "numpy")
CORPORA = (*SUBJECTS, sae_features.GENERAL)
SELF_TEST_TOKENS = 20_000


@dataclass(frozen=True)
class Variant:
    """An edited model that answers the test: which vector, into which layers. `finetuned` loads theta_1 itself."""

    name: str
    vector: str = "raw"
    layers: tuple[int, ...] = ()
    alpha: float = 1.0


class Study:
    """One profile on one device, with everything that its six steps make."""

    def __init__(self, profile: profiles.Profile, device: str = "cpu", root: Path | None = None) -> None:
        """device: `cpu` or `cuda`; root: where `runs/` and `figures/` lie."""
        self.profile, self.device = profile, device
        self.workspace = Workspace(profile.name, root)
        self._memo: dict[str, Artefact] = {}
        torch.set_num_threads(profile.threads)
        torch.use_deterministic_algorithms(True, warn_only=device != "cpu")

    @classmethod
    def open(cls, name: str = "mini", overrides: dict[str, Any] | None = None, device: str = "cpu", root: Path | None = None) -> "Study":
        """Open a profile by name, with single keys overridden; overridden runs keep their files apart."""
        if device not in ("cpu", "cuda"):
            raise profiles.ProfileError(f"unknown device {device!r}; it is cpu or cuda")
        if device == "cuda" and not torch.cuda.is_available():
            raise profiles.ProfileError("device cuda: PyTorch sees no CUDA GPU on this machine; use DEVICE=cpu")
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        profile = profiles.load(name, overrides)
        study = cls(profile, device, root)
        if overrides:
            study.workspace = Workspace(f"{profile.name}-{profile.digest}", root)
            study.workspace.store = Workspace(profile.name, root).store
        return study

    @classmethod
    def for_notebook(cls, namespace: dict[str, Any]) -> "Study":
        """Open the study that a notebook's `parameters` cell asks for; refuses a parameter that does not exist.

        Call it right after that cell. Papermill only warns about unknown names and then ignores them.
        """
        plain = (str, int, float, bool, list, dict, tuple, type(None))
        names = {name for name, value in namespace.items() if isinstance(value, plain) and name[0].islower()}
        if unknown := sorted(names - set(PARAMETERS)):
            raise profiles.ProfileError(f"unknown notebook parameter {unknown[0]!r}{profiles.nearest(unknown[0], PARAMETERS)}; there are: {', '.join(PARAMETERS)}")
        return cls.open(namespace["profile"], namespace["overrides"], namespace["device"])

    def figure(self, stem: str, figure: Any) -> None:
        """Write a figure as PNG and SVG into `figures/<profile>/`, with whose numbers it shows."""
        figures.labelled(figure, self.profile.title)
        for kind in ("png", "svg"):
            self.workspace.file(f"{stem}.{kind}", partial(figures.save, figure))

    # ---------------------------------------------------------------- stages

    def _stage(self, name: str, params: Any, upstream: Sequence[str] = (), modules: Sequence[Any] = (), make: Callable[[Path], Artefact] | None = None) -> Artefact:
        """The artefact of `_make_<name>`, from this process, from the store, or made now."""
        method = getattr(type(self), f"_make_{name}")
        code = code_text(textwrap.dedent(inspect.getsource(method)))
        params = asdict(params) if hasattr(params, "__dataclass_fields__") else params
        libraries = [version(library).split("+")[0] for library in LIBRARIES]
        key = digest_of(name, params, list(upstream), code, source_hash(modules), libraries, self.device, self.profile.threads)
        if key not in self._memo:
            self._memo[key] = self.workspace.cached(name, key, make or partial(method, self))
        return self._memo[key]

    def _seed(self, purpose: str) -> int:
        """A seed of its own for each use of chance, derived from the profile's."""
        return int(digest_of(self.profile.seed, purpose), 16) % 2**31

    # ------------------------------------------------------ models and texts

    @cached_property
    def base_folder(self) -> Path:
        """Where the base model's files are."""
        return self._folder(self.profile.model.base, self.profile.model.revision)

    def _folder(self, name: str, revision: str | None) -> Path:
        if name == "mini":
            from stetholib.mini import base

            return base.FOLDER
        if name == "toy":
            return self._stage("toy", name).folder
        if Path(name).is_dir():
            return Path(name)
        from huggingface_hub import snapshot_download

        return Path(snapshot_download(name, revision=revision, allow_patterns=["*.json", "*.safetensors", "tokenizer*"]))

    def _make_toy(self, folder: Path) -> Artefact:
        """An untrained model of the real architecture, for the tests."""
        from transformers import Gemma3ForCausalLM

        from stetholib.mini import base, tokenizer

        torch.manual_seed(0)
        tokens = tokenizer.build()
        Gemma3ForCausalLM(base.config(layers=3, hidden=32, vocab_size=len(tokens))).save_pretrained(folder)
        tokens.save_pretrained(folder)
        return Artefact()

    @cached_property
    def base_key(self) -> str:
        """Identity of the base model: its name and revision, and the bytes of a local one."""
        model = self.profile.model
        local = [p.stat().st_size for p in sorted(self.base_folder.glob("*.safetensors"))]
        return digest_of(model.base, model.revision, model.dtype, local, _first_bytes(self.base_folder))

    @cached_property
    def base(self) -> LanguageModel:
        """theta_0 with its tokenizer."""
        return models.load(self.base_folder, self.profile.model.dtype, self.device)

    @cached_property
    def layers(self) -> int:
        """How many blocks the model has."""
        return 1 + max(layer for layer, _ in models.weight_names(Checkpoint(self.base_folder)))

    def problems(self, split: str) -> list[texts.Row]:
        """Problems of a split; the test split is read by step 05 and after only."""
        return texts.problems(self.profile.data, split, self._seed("problems"))

    def _per_subject(self, rows: Sequence[texts.Row], count: int) -> list[texts.Row]:
        """The first `count` problems of each subject; the rows are shuffled, so that is a random subset."""
        return [row for subject in SUBJECTS for row in [r for r in rows if r["subject"] == subject][:count]]

    # --------------------------------------------------------- 01 task vector

    def finetuned(self) -> Artefact:
        """theta_1: the second checkpoint, or the fine-tune made here; `folder` holds it, table `loss` its curve."""
        p = self.profile
        if p.finetune.finetuned:
            return Artefact(folder=self._folder(p.finetune.finetuned, p.finetune.finetuned_revision), key=digest_of(asdict(p.finetune)))
        from stetholib import finetuning

        params = [asdict(p.finetune), asdict(p.data), p.seed]
        return self._stage("finetuned", params, [self.base_key], [finetuning, models, minerva_math, *self._text_code])

    def _make_finetuned(self, folder: Path) -> Artefact:
        from stetholib.finetuning import finetune

        p = self.profile
        base = models.load(self.base_folder, p.model.dtype, self.device)
        with trainer_progress("01 fine-tune") as callbacks:
            curve = finetune(base, self.problems("train"), p.finetune, folder, self._seed("finetune"), p.data.max_tokens, callbacks)
        return Artefact(tables={"loss": curve})

    @property
    def _text_code(self) -> list[Any]:
        from stetholib.mini import problems, stories

        return [texts, problems, stories]

    @cached_property
    def task_vector(self) -> TaskVector:
        """tau = theta_1 - theta_0; held in memory where it fits in a gibibyte, else read when asked for."""
        vector = TaskVector.between(Checkpoint(self.base_folder), Checkpoint(self.finetuned().folder))
        size = 4 * sum(p.numel() for p in models.edit_weights(self.base.model).values())
        return vector.in_memory() if size < 2**30 else vector

    @cached_property
    def energies(self) -> dict[models.Key, float]:
        """Energy of each matrix of the task vector."""
        return self.task_vector.energies()

    def task_vectors(self) -> pd.DataFrame:
        """Step 01's table, written and returned."""
        table = task_vectors.measure(models.edit_weights(self.base.model), self.task_vector)
        self.workspace.table("01_task_vectors", table)
        return table

    def energy_elsewhere(self) -> dict[str, float]:
        """Energy of the change outside the seven matrices, by kind."""
        return task_vectors.energy_elsewhere(Checkpoint(self.base_folder), Checkpoint(self.finetuned().folder))

    # -------------------------------------------------------- 02 SAE features

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
        make = partial(Study._make_sae, self, layer)
        return self._stage("sae", params, [self.base_key], [saes, models, *self._text_code], make)

    def _make_sae(self, layer: int, folder: Path) -> Artefact:
        from stetholib import saes

        if self.profile.sae.release != "train":
            sae_id = self.profile.sae.sae_id.format(layer=layer)
            saes.load_release(self.profile.sae.release, sae_id).save_model(folder)
        else:
            with quiet_training():
                saes.train(self._training_activations[layer], self.profile.sae, self._seed(f"sae {layer}"), folder, self.device)
        return Artefact()

    @cached_property
    def dictionaries(self) -> dict[int, Dictionary]:
        """Every block's SAE as plain tensors."""
        return {layer: self._dictionary(layer) for layer in progress(range(self.layers), "02 SAEs")}

    def _dictionary(self, layer: int) -> Dictionary:
        """Plain tensors of one SAE, kept as a stage so that SAELens is imported only where one is made."""
        from stetholib import saes

        upstream = self.sae(layer)
        make = partial(Study._make_dictionary, self, upstream)
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
        return self._stage("features", params, [self.base_key, *self._sae_keys], [sae_features, layer_selection, models, *self._text_code])

    def _make_features(self, folder: Path) -> Artefact:
        p, docs = self.profile, self.documents
        corpus_of = torch.tensor(docs["corpus"].to_numpy())
        pairs = [(ids, 1) for ids, _ in models.tokenize(self.base, list(zip(docs["context"], docs["text"], strict=True)), p.data.max_tokens)]
        content = [torch.tensor(ids[1:]) for ids, _ in pairs]
        matched = sae_features.matched_weights(content, [c < len(SUBJECTS) for c in docs["corpus"]], p.features.matched_minimum)
        sample = self._sample(pairs)
        tests, sums = {}, {}
        randoms = {}
        for layer, dictionary in self.dictionaries.items():
            x = sample[layer]
            tests[layer] = sae_features.self_test(dictionary, x)
            randoms[layer] = sae_features.random_dictionary(x, dictionary.d_sae, tests[layer].l0, self._seed(f"random dictionary {layer}"))
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
        return self._features_artefact(corpus_of, sums, tests, randoms, sample, {
            layer: second[layer] / count - torch.outer(first[layer], first[layer]) / count**2 for layer in second
        })

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

    def _features_artefact(self, corpus_of: torch.Tensor, sums: Mapping, tests: Mapping, randoms: Mapping, sample: Mapping, covariance: Mapping) -> Artefact:
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
        return ScoreRule(kind or p.features.specificity, p.selection.score_share, p.selection.score_minimum, p.features.minimum_firing)

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
        pairs = [(ids, 1) for ids, _ in models.tokenize(self.base, list(zip(docs["context"], docs["text"], strict=True)), self.profile.data.max_tokens)]
        d, parts = self.dictionaries[layer], []
        one = Dictionary(d.W_enc[:, [feature]], d.b_enc[[feature]], d.W_dec[[feature]], d.b_dec, d.threshold[[feature]])
        for batch, _, streams in self._streams(pairs, "02 top tokens"):
            ids = batch.input_ids[batch.scored.bool()].cpu()
            parts.append(pd.DataFrame({"id": ids, "activation": one.encode(streams[layer])[:, 0].cpu()}))
        heard = pd.concat(parts).groupby("id")["activation"].agg(["mean", "size"]).query("size >= 20")
        best = heard.sort_values("mean", ascending=False).head(count).reset_index()
        best.insert(0, "token", [self.base.tokenizer.decode([i]) for i in best["id"]])
        return best.drop(columns="id").rename(columns={"mean": "mean_activation", "size": "occurrences"})

    # -------------------------------------------------- 03 subspace projection

    @cached_property
    def width(self) -> int:
        """d_model."""
        return next(iter(self.dictionaries.values())).W_dec.shape[1]

    @cached_property
    def ranks(self) -> Ranks:
        """The default rank and the grid."""
        p = self.profile.projection
        return Ranks.of(self.width, p.rank_share, p.rank_shares)

    def gradients(self) -> Artefact:
        """Second moments of the loss gradient at each block's output, on training problems."""
        p = self.profile
        params = [p.projection.gradient_problems, asdict(p.data), p.finetune.target, p.seed]
        return self._stage("gradients", params, [self.base_key], [models, minerva_math, *self._text_code])

    def _make_gradients(self, folder: Path) -> Artefact:
        p = self.profile
        rows = self._per_subject(self.problems("train"), p.projection.gradient_problems)
        pairs = [(minerva_math.prompt(r["problem"]), minerva_math.target(r["solution"], p.finetune.target)) for r in rows]
        pool = models.batches(models.tokenize(self.base, pairs, p.data.max_tokens), p.selection.batch_tokens, self.device)
        moments: dict[int, torch.Tensor] = {}
        embedding = self.base.model.get_input_embeddings().weight
        embedding.requires_grad_(True)
        try:
            for batch in progress(pool, "03 gradients"):
                with models.residual_stream(self.base.model) as taken:
                    loss = models.token_losses(self.base.model, batch).sum()
                layers = sorted(taken)
                for layer, grad in zip(layers, torch.autograd.grad(loss, [taken[layer] for layer in layers]), strict=True):
                    g = grad[batch.attention_mask.bool()].double().cpu()
                    moments[layer] = moments.get(layer, 0) + g.T @ g
        finally:
            embedding.requires_grad_(False)
        return Artefact(tensors={f"gradient_moment.{layer}": moment for layer, moment in moments.items()})

    @cached_property
    def sites(self) -> dict[int, Directions]:
        """The directions at each block's output: of the most specific features (contrast `corpus`), activations, gradients."""
        count = max(self.ranks.grid)
        found = {}
        covariance, gradient = self.features().tensors, self.gradients().tensors
        for layer, (values, fires) in enumerate(self.specificities("corpus")):
            top = sae_features.most_specific(values, fires, count)
            dictionary = self.dictionaries[layer]
            found[layer] = Directions(
                {
                    "sae_decoder": subspace_projection.orthonormal(dictionary.W_dec[top]),
                    "sae_encoder": subspace_projection.orthonormal(dictionary.W_enc[:, top].T),
                    "activation_pca": subspace_projection.principal(covariance[f"activation_covariance.{layer}"])[:, :count],
                    "gradient_pca": subspace_projection.principal(gradient[f"gradient_moment.{layer}"])[:, :count],
                }
            )
        return found

    def subspace_projection(self) -> pd.DataFrame:
        """Step 03's table, written and returned."""
        p = self.profile
        params = [asdict(p.projection), asdict(p.features), p.seed]
        upstream = [self.finetuned().key, self.features().key, self.gradients().key, *self._sae_keys]
        table = self._stage("projection", params, upstream, [subspace_projection, sae_features, task_vectors]).tables["table"]
        self.workspace.table("03_subspace_projection", table)
        return table

    def _make_projection(self, folder: Path) -> Artefact:
        watch = partial(progress, label="03 projections")
        table = subspace_projection.measure(
            self.task_vector,
            self.sites,
            models.norm_gains(self.base.model),
            self.ranks,
            self.profile.projection.random_draws,
            self._seed("random subspaces"),
            watch,
        )
        return Artefact(tables={"table": table})

    def mechanism(self) -> pd.DataFrame:
        """Overlap of each side's best subspace with the directions at the places it touches, at the default rank."""
        return subspace_projection.mechanism(self.task_vector, self.sites, self.ranks.default)

    def energy_or_direction(self) -> pd.DataFrame:
        """Validation loss of the scalpel and its controls: did it lose energy, or direction?

        Columns variant, energy (share of the whole vector's), loss_change (nats a token; negative is better).
        """
        params = [asdict(self.profile.selection), asdict(self.profile.projection), self.profile.seed]
        upstream = [self.finetuned().key, self.features().key, *self._sae_keys]
        modules = [subspace_projection, editing, models, task_vectors]
        return self._stage("energy_or_direction", params, upstream, modules).tables["table"]

    def _make_energy_or_direction(self, folder: Path) -> Artefact:
        every, whole = tuple(range(self.layers)), sum(self.energies.values())
        names = {"full": "raw", "scalpel": "projected", "scalpel_rescaled": "projected_rescaled", "raw_shrunk": "raw_shrunk"}
        base = models.mean_loss(self.base.model, self._loss_pool)
        rows = []
        for name, source in names.items():
            vector = self.vector(source)
            with edited(self.base.model, Edit(vector, every)) as model:
                change = models.mean_loss(model, self._loss_pool) - base
            rows.append(dict(variant=name, energy=vector.energy() / whole, loss_change=change))
        return Artefact(tables={"table": pd.DataFrame(rows)})

    # ---------------------------------------------------- 04 layer selection

    def calibration(self) -> tuple[np.ndarray, pd.DataFrame]:
        """The instrument on planted truth: p-values without signal, and power against the planted effect."""
        found = self._stage("calibration", [], [], [planted, layer_selection, sae_features])
        return found.tables["null"]["p"].to_numpy(), found.tables["power"]

    def _make_calibration(self, folder: Path) -> Artefact:
        null = pd.DataFrame({"p": planted.null_p_values(200)})
        return Artefact(tables={"null": null, "power": planted.power_curve((0.0, 0.1, 0.2, 0.3, 0.4, 0.6), worlds=60)})

    def agreement(self) -> pd.DataFrame:
        """Layers that each definition of specificity selects under each contrast, and its rank correlation with the default's scores."""
        rows = []
        for contrast in CONTRASTS:
            default = self.scores(contrast).score
            for kind in ("cohen_d", "firing_log_ratio", "auroc"):
                rule = self._rule(kind)
                labels = sae_features.one_hot(self.features().tensors["corpus_of"], len(CORPORA))
                score = [float(rule.score(sums, labels, contrast == "matched")[0]) for sums in self.document_sums(contrast)]
                chosen = layer_selection.select(score, self.selected_count)
                rho = layer_selection.spearman(score, default)[0]
                rows.append(dict(contrast=contrast, definition=kind, layers=" ".join(map(str, chosen)), rho_with_default=rho))
        return pd.DataFrame(rows)

    def relations(self) -> pd.DataFrame:
        """How layer scores go with effects over layers: Spearman with an interval, and given depth and |tau_l|."""
        table = self.layer_selection()
        depth, energy = np.arange(self.layers), self._layer_energy
        rows = []
        for effect in ("effect_alone", "effect_left_out"):
            one = table[table["contrast"] == "corpus"].sort_values("layer")
            scores = {c: table[table["contrast"] == c].sort_values("layer")["score"].to_numpy() for c in CONTRASTS}
            for name, x in {**scores, "|tau|": energy, "depth": depth}.items():
                rho, low, high = layer_selection.spearman(x, one[effect], seed=self._seed("spearman"))
                given = [v for other, v in (("|tau|", energy), ("depth", depth)) if other != name]
                rows.append(dict(predictor=name, effect=effect, rho=rho, low=low, high=high, partial=layer_selection.partial_spearman(x, one[effect], given)))
        return pd.DataFrame(rows)

    def greedy_share(self) -> pd.DataFrame:
        """Each selector's loss change as a share of what `greedy` reaches, with a bootstrap interval over problems."""
        sets = self.layer_sets()
        chosen = sets[~sets["selector"].isin(["full", "only", "without", "random", "random_energy"])].set_index("selector")["layers"]
        if "greedy" not in chosen:
            return pd.DataFrame(columns=["selector", "share", "low", "high"])
        base, counts = self._document_losses(())
        gains = {name: base - self._document_losses(tuple(map(int, layers.split())))[0] for name, layers in chosen.items()}
        rng = np.random.default_rng(self._seed("greedy share"))
        picks = rng.integers(0, len(counts), (1000, len(counts)))
        best = gains["greedy"]
        rows = []
        for name, gain in gains.items():
            draws = gain[picks].sum(1) / best[picks].sum(1)
            low, high = np.quantile(draws, [0.025, 0.975])
            rows.append(dict(selector=name, share=gain.sum() / best.sum(), low=low, high=high))
        return pd.DataFrame(rows).sort_values("share", ascending=False, ignore_index=True)

    def _document_losses(self, layers: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
        """Summed loss and scored tokens of each validation problem with the raw vector in these layers."""
        with edited(self.base.model, Edit(self.task_vector, layers)) as model:
            losses, counts = models.document_losses(model, self._loss_pool)
        return losses.numpy(), counts.numpy()

    @property
    def selected_count(self) -> int:
        """m, the number of layers to select."""
        return layer_selection.layer_count(self.layers, self.profile.selection.layer_share)

    def scores(self, contrast: str, kind: str | None = None) -> layer_selection.Scores:
        """Layer scores under one contrast, with permutations and resamples."""
        p = self.profile.selection
        rule = self._rule(kind)
        upstream = [self.features().key, contrast]
        params = [asdict(rule), p.permutations, p.resamples, self.selected_count, self.profile.seed]
        make = partial(Study._make_scores, self, contrast, rule)
        found = self._stage("scores", params, upstream, [layer_selection, sae_features], make)
        return layer_selection.Scores(**{name: tensor.numpy() for name, tensor in found.tensors.items()})

    def _make_scores(self, contrast: str, rule: ScoreRule, folder: Path) -> Artefact:
        p = self.profile.selection
        corpus_of = self.features().tensors["corpus_of"]
        result = layer_selection.score_layers(
            self.document_sums(contrast), corpus_of, rule, contrast == "matched", self.selected_count, p.permutations, p.resamples,
            self._seed("permutations"),
        )
        return Artefact(tensors={name: torch.from_numpy(np.ascontiguousarray(value)) for name, value in vars(result).items()})

    @cached_property
    def _loss_pool(self) -> list[models.Batch]:
        """Validation problems with gold solutions, in batches."""
        p = self.profile
        rows = self._per_subject(self.problems("validation"), p.selection.loss_problems)
        pairs = [(minerva_math.prompt(r["problem"]), minerva_math.target(r["solution"], p.finetune.target)) for r in rows]
        return models.batches(models.tokenize(self.base, pairs, p.data.max_tokens), p.selection.batch_tokens, self.device)

    @cached_property
    def _loss_ledger(self) -> tuple[Path, dict[str, float]]:
        """Losses already measured, by layers and scale; each is on disk as soon as it is known."""
        p = self.profile
        params = [p.selection.loss_problems, p.selection.batch_tokens, asdict(p.data), p.finetune.target, p.seed]
        code = source_hash([models, editing, task_vectors, minerva_math, *self._text_code])
        key = digest_of(params, code, self.base_key, self.finetuned().key, self.device, p.threads)
        path = self.workspace.store / f"losses-{key}.jsonl"
        return path, {row["set"]: row["loss"] for row in read_json_lines(path)}

    def solution_loss(self, layers: Sequence[int], alpha: float = 1.0) -> float:
        """Loss of gold solutions (validation, nats a token) with the raw vector in these layers."""
        path, known = self._loss_ledger
        name = json.dumps([list(layers), alpha])
        if name not in known:
            with edited(self.base.model, Edit(self.task_vector, tuple(layers), alpha=alpha)) as model:
                known[name] = models.mean_loss(model, self._loss_pool)
            append_json(path, [{"set": name, "loss": known[name]}])
        return known[name]

    def layer_sets(self) -> pd.DataFrame:
        """Step 04's table of sets of layers, each scored by validation loss after injection."""
        sets = self._planned_sets()
        base = self.solution_loss(())
        layer_energy = self._layer_energy
        rows = []
        for selector, draw, contrast, layers, alpha in progress(sets, "04 sets of layers"):
            share = alpha**2 * layer_energy[list(layers)].sum() / layer_energy.sum()
            change = self.solution_loss(layers, alpha) - base
            rows.append(dict(selector=selector, draw=draw, contrast=contrast, layers=" ".join(map(str, layers)), alpha=alpha, energy=share, loss_change=change))
        if self.profile.selection.greedy:
            rows.append(self._greedy_row(base))
        table = pd.DataFrame(rows)
        chance = table.loc[table["selector"] == "random", "loss_change"]
        same = table["layers"].str.split().str.len() == self.selected_count
        table["percentile"] = [layer_selection.percentile(v, chance) if s else float("nan") for v, s in zip(table["loss_change"], same, strict=True)]
        self.workspace.table("04_layer_sets", table)
        return table

    @cached_property
    def _layer_energy(self) -> np.ndarray:
        return np.array([sum(e for (layer, _), e in self.energies.items() if layer == at) for at in range(self.layers)])

    def chosen_layers(self) -> dict[str, tuple[str, tuple[int, ...]]]:
        """selector -> (contrast, layers) for every rule that picks m layers without trying sets."""
        p = self.profile.selection
        steps = [self.solution_loss((layer,), p.small_step) for layer in progress(range(self.layers), "04 small steps")]
        scores = {contrast: self.scores(contrast).score for contrast in CONTRASTS}
        return layer_selection.fixed_selectors(scores, self._layer_energy, steps, self.selected_count)

    def _planned_sets(self) -> list[tuple[str, int, str, tuple[int, ...], float]]:
        """(selector, draw, contrast, layers, alpha) of every set that is scored."""
        p, every = self.profile.selection, tuple(range(self.layers))
        plan = [("full", 0, "-", every, 1.0)]
        plan += [("only", layer, "-", (layer,), 1.0) for layer in every]
        plan += [("without", layer, "-", tuple(x for x in every if x != layer), 1.0) for layer in every]
        plan += [(name, 0, contrast, layers, 1.0) for name, (contrast, layers) in self.chosen_layers().items()]
        drawn = layer_selection.sampled_sets(self.layers, self.selected_count, p.random_sets, self._seed("random sets"))
        plan += [("random", draw, "-", layers, 1.0) for draw, layers in enumerate(drawn)]
        energy = self._layer_energy
        wanted = energy[list(self.chosen_layers()["stethoscope"][1])].sum()
        plan += [
            ("random_energy", draw, "-", layers, float(np.sqrt(wanted / energy[list(layers)].sum())))
            for draw, layers in enumerate(drawn[: p.random_energy_sets])
        ]
        return plan

    def _greedy_row(self, base: float) -> dict[str, Any]:
        best = layer_selection.greedy(self.solution_loss, self.layers, self.selected_count)
        energy = self._layer_energy
        share = energy[list(best)].sum() / energy.sum()
        return dict(selector="greedy", draw=0, contrast="-", layers=" ".join(map(str, best)), alpha=1.0, energy=share, loss_change=self.solution_loss(best) - base)

    def layer_selection(self) -> pd.DataFrame:
        """Step 04's table of layers, written and returned."""
        scores = {contrast: self.scores(contrast) for contrast in CONTRASTS}
        tests = self.features().tables["self_tests"]
        randoms = {contrast: tests[f"score_random_{contrast}"].tolist() for contrast in CONTRASTS}
        table = layer_selection.measure(scores, randoms, self.selected_count, self.layer_sets())
        self.workspace.table("04_layer_selection", table)
        return table

    # ------------------------------------------------------- 05 Minerva Math

    def variants(self) -> dict[str, Variant]:
        """The edited models that answer the test, in the profile's order."""
        every, chosen = tuple(range(self.layers)), self.chosen_layers()
        drawn = layer_selection.sampled_sets(self.layers, self.selected_count, 3, self._seed("random variants"))
        known = [
            Variant("base"),
            Variant("finetuned", "finetuned"),
            Variant("full", "raw", every),
            Variant("scalpel", "projected", every),
            Variant("scalpel_rescaled", "projected_rescaled", every),
            Variant("raw_shrunk", "raw_shrunk", every),
            *(Variant(name, "raw", chosen[name][1]) for name in ("stethoscope", "stethoscope_matched", "least_specific", "largest_norm")),
            *(Variant(f"random_{i + 1}", "raw", layers) for i, layers in enumerate(drawn)),
        ]
        by_name = {variant.name: variant for variant in known}
        for name in self.profile.evaluation.variants:
            if name not in by_name:
                raise profiles.ProfileError(f"profile {self.profile.name}.evaluation.variants: unknown variant {name!r}; there are: {', '.join(by_name)}")
        return {name: by_name[name] for name in self.profile.evaluation.variants}

    def vector(self, name: str) -> TaskVector:
        """raw; projected (the scalpel); projected_rescaled (to the full energy); raw_shrunk (to the scalpel's)."""
        if name == "raw":
            return self.task_vector
        bases = {layer: site.by_name["sae_decoder"][:, : self.ranks.default] for layer, site in self.sites.items()}
        projected = subspace_projection.scalpel(self.task_vector, bases)
        if name == "projected":
            return projected
        kept = projected.energies()
        if name == "projected_rescaled":
            return projected * matched_scales(self.energies, kept)
        return self.task_vector * matched_scales(kept, self.energies)

    def _variant_key(self, variant: Variant) -> str:
        """Identity of an edited model: two variants with one key are the same model."""
        if not variant.layers and variant.vector != "finetuned":
            return digest_of(self.base_key, "base")
        made = [self.finetuned().key, variant.vector, variant.layers, variant.alpha]
        if variant.vector not in ("raw", "finetuned"):
            p = self.profile
            made += [self.features().key, asdict(p.projection), asdict(p.features), *self._sae_keys, source_hash([subspace_projection])]
        return digest_of(self.base_key, made, source_hash([editing, task_vectors]))

    @contextmanager
    def edited_model(self, variant: Variant) -> Any:
        """The model of a variant; the base model is itself again afterwards."""
        if variant.vector == "finetuned":
            yield models.load(self.finetuned().folder, self.profile.model.dtype, self.device)
            return
        edit = Edit(self.vector(variant.vector) if variant.layers else self.task_vector, variant.layers, alpha=variant.alpha)
        with edited(self.base.model, edit):
            yield self.base

    @cached_property
    def test_problems(self) -> list[texts.Row]:
        """The test split. First read in step 05."""
        return self.problems("test")

    @cached_property
    def _tasks(self) -> Any:
        """The harness's tasks on the local test problems."""
        key = digest_of([row["problem"] + row["solution"] for row in self.test_problems], self.profile.evaluation.num_fewshot, version("lm-eval"))
        folder = self.workspace.runs / "tasks" / key
        names = minerva_math.write_tasks(folder, self.test_problems, self.profile.evaluation.num_fewshot)
        return minerva_math.load_tasks(folder, names)

    @cached_property
    def _prompts(self) -> dict[str, str]:
        return minerva_math.prompts_of(self._tasks)

    def answers(self, variant: Variant) -> dict[str, minerva_math.Answer]:
        """Every answer of a variant, by problem id; each was asked once and is on disk."""
        p = self.profile.evaluation
        params = [p.num_fewshot, p.max_new_tokens, p.batch_size, p.chat_template, self.device, self.profile.threads]
        key = digest_of(self._variant_key(variant), params, source_hash([minerva_math, models]))
        path = self.workspace.store / f"answers-{key}.jsonl"
        known = {row["problem_id"]: minerva_math.Answer(**row) for row in read_json_lines(path)}
        missing = {name: text for name, text in self._prompts.items() if name not in known}
        if missing:

            def keep(batch: list[minerva_math.Answer]) -> None:
                append_json(path, [asdict(answer) for answer in batch])
                known.update({answer.problem_id: answer for answer in batch})

            with self.edited_model(variant) as model:
                watch = partial(progress, label=f"05 {variant.name}")
                minerva_math.answer_all(model, missing, p.max_new_tokens, p.batch_size, keep, watch)
        return known

    def records(self, variant: Variant) -> Artefact:
        """Scored records of one variant; also written as the contract's JSON lines."""
        upstream = [self._variant_key(variant), digest_of([row["problem"] for row in self.test_problems])]
        make = partial(Study._make_records, self, variant)
        found = self._stage("records", [variant.name, asdict(self.profile.evaluation)], upstream, [minerva_math, models], make)
        path = self.workspace.records / f"{variant.name}.jsonl"
        text = (found.folder / "records.jsonl").read_text(encoding="utf-8")
        if not path.is_file() or path.read_text(encoding="utf-8") != text:
            from stetholib.workspace import atomic

            atomic(path, lambda draft: draft.write_text(text, encoding="utf-8"))
        return found

    def _make_records(self, variant: Variant, folder: Path) -> Artefact:
        answers = self.answers(variant)
        verdicts, errors = minerva_math.score(self._tasks, answers)
        rows = minerva_math.records(variant.name, self.test_problems, answers, verdicts)
        append_json(folder / "records.jsonl", rows)
        return Artefact(tables={"records": pd.DataFrame(rows)}, values={"harness_stderr": errors})

    def all_records(self) -> pd.DataFrame:
        """Records of every variant, one row an answer."""
        return pd.concat([self.records(v).tables["records"] for v in self.variants().values()], ignore_index=True)

    def general_loss(self, variant: Variant) -> float:
        """Loss on held-out general text, nats a token."""
        p = self.profile
        params = [p.evaluation.general_documents, asdict(p.data), p.seed]
        make = partial(Study._make_general_loss, self, variant)
        return self._stage("general_loss", params, [self._variant_key(variant)], [models, *self._text_code], make).values["loss"]

    def _make_general_loss(self, variant: Variant, folder: Path) -> Artefact:
        p = self.profile
        documents = texts.general(p.data, "test", p.evaluation.general_documents, self._seed("general"))
        pairs = models.tokenize(self.base, [("", text) for text in documents], p.data.max_tokens)
        with self.edited_model(variant) as model:
            return Artefact(values={"loss": models.mean_loss(model.model, models.batches(pairs, p.selection.batch_tokens, self.device))})

    def minerva_math(self) -> pd.DataFrame:
        """Step 05's table, written and returned."""
        losses = {name: self.general_loss(variant) for name, variant in self.variants().items()}
        table = minerva_math.measure(self.all_records(), losses)
        self.workspace.table("05_minerva_math", table)
        return table

    def checks(self) -> dict[str, Any]:
        """What C8 and C9 rest on: a repetition compared bit by bit, and what an edited model costs to run."""
        stethoscope = self.variants()["stethoscope"]
        params = [self.profile.evaluation.noise_problems, asdict(self.profile.evaluation), self.profile.seed]
        modules = [minerva_math, models, editing]
        return self._stage("checks", params, [self._variant_key(stethoscope), self.features().key], modules).values

    def _make_checks(self, folder: Path) -> Artefact:
        """Answers twice, scores twice, weights before and after; parameters and FLOPs of base and edited model."""
        p, variant = self.profile.evaluation, self.variants()["stethoscope"]
        some = dict(sorted(self._prompts.items())[: p.noise_problems])
        before, runs, costs = models.weight_hash(self.base.model), [], []
        for _ in range(2):
            found: list[minerva_math.Answer] = []
            with self.edited_model(variant) as model:
                minerva_math.answer_all(model, some, p.max_new_tokens, p.batch_size, found.extend)
                costs.append(running_cost(model))
            runs.append(found)
        rule, labels = self._rule(), sae_features.one_hot(self.features().tensors["corpus_of"], len(CORPORA))
        again = [float(rule.score(sums, labels, False)[0]) for sums in self.document_sums("corpus")]
        return Artefact(
            values=dict(
                answered_twice=len(some),
                identical_answers=sum(a == b for a, b in zip(*runs, strict=True)),
                identical_scores=again == self.scores("corpus").score.tolist(),
                weights_restored=before == models.weight_hash(self.base.model),
                base_cost=running_cost(self.base),
                edited_cost=costs[0],
            )
        )

    def noise(self) -> pd.DataFrame:
        """The noise floor: how many of the base model's verdicts flip with another batch size or precision."""
        p = self.profile.evaluation
        return self._stage("noise", asdict(p), [self.base_key, digest_of(sorted(self._prompts))], [minerva_math, models]).tables["noise"]

    def _make_noise(self, folder: Path) -> Artefact:
        p = self.profile.evaluation
        some = dict(sorted(self._prompts.items())[: p.noise_problems])
        kept = self.records(self.variants()["base"]).tables["records"].set_index("problem_id")["exact_match"]
        rows = []
        for what, dtype, batch_size in (("batch size", self.profile.model.dtype, max(1, p.batch_size // 8)), ("bfloat16", "bfloat16", p.batch_size)):
            found: list[minerva_math.Answer] = []
            model = models.load(self.base_folder, dtype, self.device)
            minerva_math.answer_all(model, some, p.max_new_tokens, batch_size, found.extend)
            verdicts, _ = minerva_math.score(self._tasks, {a.problem_id: a for a in found}, partial=True)
            again = verdicts.set_index("problem_id")["exact_match"]
            flips = int((kept[again.index] != again).sum())
            rows.append(dict(change=what, problems=len(some), flips=flips, share=flips / len(some)))
        return Artefact(tables={"noise": pd.DataFrame(rows)})

    # ------------------------------------------------------- 06 significance

    @property
    def margins(self) -> significance.Margins:
        """Level and margins, from the profile."""
        p = self.profile.significance
        return significance.Margins(p.level, p.margin, p.margin_subject, p.bootstrap, self._seed("bootstrap"))

    def paired(self, one: str, other: str) -> dict[str, Any]:
        """Two variants on the same test problems, `other` minus `one`, over all subjects."""
        return significance.paired_against(self.all_records(), one, other, self.margins)

    def significance(self) -> pd.DataFrame:
        """Step 06's table, written and returned."""
        params = [asdict(self.profile.significance), self.profile.seed]
        upstream = [self.records(variant).key for variant in self.variants().values()]
        table = self._stage("significance", params, upstream, [significance]).tables["table"]
        self.workspace.table("06_significance", table)
        return table

    def _make_significance(self, folder: Path) -> Artefact:
        return Artefact(tables={"table": significance.measure(self.all_records(), self.margins)})

    def published(self) -> pd.DataFrame:
        """The published figure by three tests, written and returned."""
        table = significance.published()
        self.workspace.table("06_published", table)
        return table

    def claims(self) -> pd.DataFrame:
        """The ledger of the paper's nine claims, written and returned."""
        evidence = claims.Evidence(
            projection=self.subspace_projection(),
            energies=self.energies,
            rank=self.ranks.default,
            sets=self.layer_sets(),
            scores=self.layer_selection(),
            accuracy=self.minerva_math(),
            significance=self.significance(),
            checks=self.checks(),
            published_rung=self.profile.published_rung,
            level=self.profile.significance.level,
        )
        table = claims.ledger(evidence)
        self.workspace.table("06_claims", table)
        return table

    def manifest(self) -> dict[str, Any]:
        """What is stable about this run, written as `manifest.json` and returned."""
        p = self.profile
        stable = dict(
            profile=p.name,
            profile_hash=p.digest,
            seed=p.seed,
            threads=p.threads,
            device=self.device,
            libraries={library: version(library).split("+")[0] for library in LIBRARIES},
            model=dict(base=p.model.base, revision=p.model.revision, dtype=p.model.dtype, key=self.base_key),
            sae=dict(release=p.sae.release, id=p.sae.sae_id, d_sae=p.sae.d_sae),
            data=dict(maths=p.data.maths, maths_revision=p.data.maths_revision, general=p.data.general, general_revision=p.data.general_revision),
        )
        self.workspace.text("manifest.json", json.dumps(stable, indent=1, sort_keys=True) + "\n")
        return stable


def running_cost(model: LanguageModel) -> dict[str, int]:
    """Parameters of a model and FLOPs of one forward pass over 32 tokens."""
    from torch.utils.flop_counter import FlopCounterMode

    ids = torch.full((1, 32), model.tokenizer.bos_token_id, device=model.device)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model.model(input_ids=ids, use_cache=False)
    return dict(parameters=sum(p.numel() for p in model.model.parameters()), flops=counter.get_total_flops())


def _first_bytes(folder: Path) -> str:
    """A hash of a local checkpoint's tensors' names, shapes and offsets, and of the first megabyte of each file."""
    parts = []
    for path in sorted(folder.glob("*.safetensors")):
        with path.open("rb") as handle:
            parts.append(handle.read(2**20).hex())
    return digest_of(parts)


@contextmanager
def trainer_progress(label: str) -> Any:
    """A transformers callback that reports steps through `progress`."""
    from transformers import TrainerCallback

    class Report(TrainerCallback):
        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            self.steps = progress(range(state.max_steps), label)

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            next(self.steps, None)

    yield [Report()]


@contextmanager
def quiet_training() -> Any:
    """SAELens' own bar is one too many here: the study reports SAEs one by one."""
    import tqdm.auto

    before = os.environ.get("TQDM_DISABLE")
    os.environ["TQDM_DISABLE"] = "1"
    try:
        yield tqdm.auto
    finally:
        os.environ.pop("TQDM_DISABLE") if before is None else os.environ.update(TQDM_DISABLE=before)
