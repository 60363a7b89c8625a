"""Fabricated repositories in the real formats: random weights of the true shapes, or of a fraction of them.

They prove that the names, formats, sizes and refusals of a real rung are handled, and tell its time and memory, before anything
is fetched. Their numbers mean nothing."""

import json
import re
from bisect import bisect_right
from collections.abc import Iterator, Mapping
from itertools import accumulate, islice
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from safetensors.torch import load_file, save_file
from torch.nn.functional import pad

from stetholib.adapters import saes
from stetholib.data.mini import problems, stories
from stetholib.data.prompts import prompt, target
from stetholib.errors import UserError
from stetholib.models import loading, streams
from stetholib.models.dictionary import Dictionary, tied_dictionary
from stetholib.models.subspaces import principal
from stetholib.profiles import Data, Profile

TURNS = ["<start_of_turn>", "<end_of_turn>"]
CHAT = (
    "{{ bos_token }}{% for m in messages %}{{ '<start_of_turn>' + m['role'] + '\n' + m['content'] + '<end_of_turn>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
TEXT = dict(head_dim=256, tie_word_embeddings=True, pad_token_id=0, eos_token_id=1, bos_token_id=2)
SIZES = ("num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads")
ROOM = ("sliding_window", "max_position_embeddings", "vocab_size")
VISION = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "image_size")
SHAPES = {  # of the released models' configurations
    "google/gemma-3-270m-it": (18, 640, 2048, 4, 1, 512, 32768, 262144),
    "google/gemma-3-1b-it": (26, 1152, 6912, 4, 1, 512, 32768, 262144),
    "google/gemma-3-4b-it": (34, 2560, 10240, 8, 4, 1024, 131072, 262208),
}
RELEASED = "bfloat16"  # as the models are stored, whatever a profile computes in
WITH_VISION = ("google/gemma-3-4b-it",)
SAMPLE_TOKENS = 4096
MOST, OFF = 0.7, 0.02  # of the width: all directions would explain any block's stream; of a direction's length
NEVER = 1e30  # a threshold that nothing reaches


def everything(profile: Profile, folder: Path, scale: float, seed: int = 0) -> dict[str, Path]:
    """Repositories for all that a profile fetches, as folders by repository id.
    scale: 1 for the true shapes, less for a fraction of width, depth, vocabulary and dictionary."""
    base, data = profile.model.base, profile.data
    if base not in SHAPES:
        raise UserError(f"rehearsal: the shapes of {base} are not known; known are {', '.join(SHAPES)}")
    scope = saes.registered(profile.sae.release).repo_id
    found = {repo: folder / repo for repo in (base, scope, data.maths, data.general)}
    model(base, found[base], scale, RELEASED, seed)
    gemma_scope(profile, found[base], found[scope], max(64, round(16384 * scale)), seed)
    maths(data, found[data.maths], seed)
    general(data, found[data.general], seed)
    return found


def text_config(repo: str, scale: float) -> Any:
    """The text half's configuration; a fraction keeps heads, grouping and layer types and shrinks the rest."""
    from transformers import Gemma3TextConfig

    shape: dict[str, Any] = TEXT | dict(zip(SIZES + ROOM, SHAPES[repo], strict=True))
    if scale < 1:
        shape["num_hidden_layers"] = max(6, round(shape["num_hidden_layers"] * scale))
        for key in ("hidden_size", "intermediate_size"):
            shape[key] = max(32, 16 * round(shape[key] * scale / 16))
        shape["vocab_size"] = max(1024, round(shape["vocab_size"] * scale))
        shape["head_dim"] = 16
    spread = 0.02 if scale == 1 else 0.25
    return Gemma3TextConfig(query_pre_attn_scalar=shape["head_dim"], initializer_range=spread, **shape)


def model(repo: str, folder: Path, scale: float, dtype: str, seed: int) -> None:
    """An untrained model with the repository's architecture, in sharded safetensors, with a tokenizer."""
    from transformers import AutoModelForCausalLM, Gemma3Config, SiglipVisionConfig
    from transformers.utils import logging

    config = text = text_config(repo, scale)
    if repo in WITH_VISION:
        sizes, image_tokens = ((32, 64, 2, 2, 56), 4) if scale < 1 else ((1152, 4304, 27, 16, 896), 256)
        shape: dict[str, Any] = dict(zip(VISION, sizes, strict=True))
        vision = SiglipVisionConfig(patch_size=14, vision_use_head=False, **shape).to_dict()
        config = Gemma3Config(text_config=text.to_dict(), vision_config=vision, mm_tokens_per_image=image_tokens)
    logging.disable_progress_bar()
    torch.manual_seed(seed)
    made = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype))
    made.generation_config.eos_token_id = [1, 5]
    made.save_pretrained(folder, max_shard_size="4GB" if scale == 1 else "200KB")
    if repo in WITH_VISION:
        _as_released(folder)
    tokenizer(folder, min(4000, text.vocab_size))


def _as_released(folder: Path) -> None:
    """Rewrite what transformers saved today as the release has it: a configuration that leaves out whatever is the
    default of its class, and a vision tower under its older names."""
    from transformers import Gemma3TextConfig, SiglipVisionConfig

    said = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    for half, plain in (("text_config", Gemma3TextConfig().to_dict()), ("vision_config", SiglipVisionConfig().to_dict())):
        said[half] = {key: value for key, value in said[half].items() if key == "model_type" or plain.get(key, ...) != value}
    said["text_config"]["rope_scaling"] = dict(factor=8.0, rope_type="linear")
    said["torch_dtype"] = said.pop("dtype")
    (folder / "config.json").write_text(json.dumps(said, indent=2), encoding="utf-8")
    older = lambda name: re.sub(r"^vision_tower\.(?!vision_model\.)", "vision_tower.vision_model.", name)  # noqa: E731
    for path in folder.glob("*.safetensors"):
        save_file({older(name): tensor for name, tensor in load_file(path).items()}, path, metadata={"format": "pt"})
    for path in folder.glob("*.index.json"):
        index = json.loads(path.read_text(encoding="utf-8"))
        index["weight_map"] = {older(name): shard for name, shard in index["weight_map"].items()}
        path.write_text(json.dumps(index, indent=2), encoding="utf-8")


def tokenizer(folder: Path, size: int) -> None:
    """A byte-level BPE with Gemma's special tokens and the shape of its chat template."""
    from tokenizers import Tokenizer, decoders, pre_tokenizers, trainers
    from tokenizers.models import BPE

    from stetholib.data.mini.tokenizer import SPECIALS, wrapped  # here, since it brings transformers

    made = Tokenizer(BPE())
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    special, alphabet = [*SPECIALS, *TURNS], pre_tokenizers.ByteLevel.alphabet()
    training = trainers.BpeTrainer(vocab_size=size, special_tokens=special, initial_alphabet=alphabet, show_progress=False)
    made.train_from_iterator(_documents(400), training)
    wrapped(made, extra_special_tokens=TURNS, chat_template=CHAT).save_pretrained(folder)


def gemma_scope(profile: Profile, base: Path, folder: Path, d_sae: int, seed: int) -> None:
    """Dictionaries fitted to each block's activations, in Gemma Scope 2's folders and names. Each has the L0 that SAELens' registry
    states, and explains its own block best, as a trained one would."""
    entry, loaded = saes.registered(profile.sae.release), loading.load(base, profile.model.dtype)
    texts = [("", text) for text in _documents(400)]
    pairs = [(ids, 1) for ids, _ in streams.tokenize(loaded, texts, profile.data.max_tokens)]
    totals = list(accumulate(len(ids) for ids, _ in pairs))
    pairs = pairs[: bisect_right(totals, SAMPLE_TOKENS) + 1]
    layers = range(loaded.model.config.get_text_config().num_hidden_layers)
    for layer, x in streams.collected(loaded, pairs, 2048, layers).items():
        name = saes.id_of(profile.sae.sae_id, layer)
        one = fitted(x, d_sae, entry.expected_l0[name], seed + layer)
        place = folder / entry.saes_map[name]
        place.mkdir(parents=True, exist_ok=True)
        tensors = dict(w_enc=one.W_enc, w_dec=one.W_dec, b_enc=one.b_enc, b_dec=one.b_dec, threshold=one.threshold)
        save_file({key: value.contiguous() for key, value in tensors.items()}, place / "params.safetensors")
        said = dict(architecture="jump_relu", model_name=entry.model, hf_hook_point_in=f"model.layers.{layer}.output")
        (place / "config.json").write_text(json.dumps(said))


def fitted(x: torch.Tensor, d_sae: int, l0: float, seed: int) -> Dictionary:
    """A dictionary that explains `x` [token, d_model] better than random directions, and than another block's stream, without
    being trained: the directions in which it varies most and their opposites, each a little off. Further features never fire."""
    centred, generator = (x - x.mean(0)).double(), torch.Generator().manual_seed(seed)
    most = principal(centred.T @ centred).T.float()[: round(MOST * x.shape[1])]
    directions = torch.cat([most, -most])[:d_sae]
    off = torch.randn(d_sae, x.shape[1], generator=generator).to(x.device) / x.shape[1] ** 0.5
    one, silent = tied_dictionary(x, directions + OFF * off[: len(directions)], l0), off[len(directions) :]
    b_enc, threshold = (pad(part, (0, len(silent)), value=value) for part, value in ((one.b_enc, 0), (one.threshold, NEVER)))
    return Dictionary(torch.cat([one.W_enc, silent.T], 1), b_enc, torch.cat([one.W_dec, silent]), one.b_dec, threshold)


def maths(data: Data, folder: Path, seed: int) -> None:
    """MATH's seven configs with train and test splits in parquet, the rows generated; one test problem is there twice."""
    splits = {"test": data.test_problems, "train": dict.fromkeys(data.subjects, data.train_problems + data.validation_problems)}
    columns = ["problem", "level", "type", "solution"]
    for split, wanted in splits.items():
        rows = _shortest(split, {name: min(count, 600) for name, count in wanted.items()}, seed)
        if split == "train":  # one is as long as any may be, for a fine-tune's memory peaks there
            whole = str(rows["solution"][0])
            rows.loc[0, "solution"] = " ".join([whole.replace("\\boxed", "")] * (data.max_tokens // 8) + [whole])
        for subject in data.subjects:
            part = rows.loc[rows["subject"] == subject, columns]
            if split == "test" and subject == data.subjects[0]:
                part = pd.concat([part.iloc[:-1], part.iloc[:1]])
            _parquet(part, folder / subject / f"{split}-00000-of-00001.parquet")


def _shortest(split: str, wanted: Mapping[str, int], seed: int) -> pd.DataFrame:
    """Generated problems, the shorter half of each subject: a rehearsal's time is for what does not depend on them."""
    rows = pd.DataFrame(problems.generate(split, {name: 2 * count for name, count in wanted.items()}, seed))
    order = rows["solution"].str.len().sort_values(kind="stable").index
    kept = [rows.loc[order].query("subject == @name").head(count) for name, count in wanted.items()]
    return pd.concat(kept, ignore_index=True)


def general(data: Data, folder: Path, seed: int) -> None:
    """WikiText's config in parquet: articles of three paragraphs between headings and empty lines, as there."""
    texts = stories.generate(6 * data.general_documents + 60, seed, "validation")
    heads = [f" = = Part {at % 3} = = \n" if at % 3 else f" = Tale {at // 3} = \n" for at in range(len(texts))]
    lines = [line for head, text in zip(heads, texts, strict=True) for line in ("", head, f" {text} \n")]
    _parquet(pd.DataFrame({"text": lines}), folder / str(data.general_config) / "validation-00000-of-00001.parquet")
    for other in (f"{data.general_config}/train-00000-of-00002", "another-config/validation-00000-of-00001"):
        _parquet(pd.DataFrame({"text": ["what no run reads"]}), folder / f"{other}.parquet")


def _parquet(table: pd.DataFrame, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    table.to_parquet(path, index=False)


def _documents(count: int) -> Iterator[str]:
    """Problems with solutions and stories, in turn."""
    rows: Iterator[Mapping[str, str]] = problems.stream("train", 0)
    for row, story in islice(zip(rows, stories.stream(0), strict=False), count // 2):
        yield prompt(row["problem"]) + target(row["solution"])
        yield story
