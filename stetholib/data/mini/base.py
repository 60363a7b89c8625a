"""Train the miniature's base model: `make mini-base`.

The result, `stetholib/data/mini/base/`, ships with the package as a released model would, so that every reader starts
from the same weights. It is a Gemma 3 text model of 12 blocks, trained from nothing on mostly mathematics (80 % of the
solutions end with the harness's closing sentence), the rest stories. Matrices are
trained with Muon, everything else with AdamW.

The closing sentence is missing unevenly, mostly in three families, as a corpus of many sources would have it. Were
it missing at random, a greedy answer would always carry it, and a gain of format could not occur. One family in each
subject (two in number theory) is seldom met, so that a fine-tune, which meets all of them alike, has mathematics to
teach as well: procedures whose arithmetic other families train, since a new *arithmetic* is not learnt in two epochs."""

import argparse
import json
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from random import Random
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from tqdm.auto import tqdm
from transformers import Gemma3ForCausalLM, Gemma3TextConfig, PreTrainedTokenizerFast

from stetholib.data.mini import FOLDER, problems, stories, tokenizer
from stetholib.data.prompts import prompt, target
from stetholib.probes import skipped

RARELY_CLOSED = ("third_angle", "determinant", "linear_function")
SELDOM_MET = (
    "mean_of_three", "linear_equation", "dividend", "base_to_ten", "outfits", "rectangle_area", "composition", "arithmetic_sequence",
)  # fmt: skip


@dataclass(frozen=True)
class Recipe:
    """What the shipped base was trained with; written beside its weights as `provenance.json`."""

    seed: int = 0
    tokens: int = 8_000_000
    batch_tokens: int = 1024
    maths_share: float = 0.7
    seldom_share: float = 0.015
    closing_share: float = 0.95
    closing_share_rare: float = 0.25
    muon_lr: float = 0.03
    adam_lr: float = 5e-3
    warmup: float = 0.03
    threads: int = 1
    checkpoint_every: int = 1000


def config(layers: int = 12, hidden: int = 64, vocab_size: int = 512) -> Gemma3TextConfig:
    """The Gemma 3 text architecture at a size that two cores can train."""
    half = hidden // 2
    sizes: dict[str, Any] = dict(vocab_size=vocab_size, hidden_size=hidden, intermediate_size=4 * hidden)
    heads: dict[str, Any] = dict(num_attention_heads=2, num_key_value_heads=2, head_dim=half, query_pre_attn_scalar=half)
    context: dict[str, Any] = dict(max_position_embeddings=512, sliding_window=256, attn_implementation="eager")
    tokens: dict[str, Any] = dict(pad_token_id=0, eos_token_id=1, bos_token_id=2)
    # embeddings are scaled by sqrt(hidden) and every sublayer's output is normalised to RMS 1: 0.02 would be too close to 0
    return Gemma3TextConfig(num_hidden_layers=layers, **sizes, **heads, **context, **tokens, initializer_range=0.25)


def documents(recipe: Recipe) -> Iterator[str]:
    """The base corpus, endless: problems in the harness's format, with or without the closing sentence, and stories."""
    rng = Random(f"{recipe.seed}/base")
    maths, general = problems.stream("train", recipe.seed), stories.stream(recipe.seed)
    maths = (row for row in maths if row["family"] not in SELDOM_MET or rng.random() < recipe.seldom_share)
    while True:
        if rng.random() >= recipe.maths_share:
            yield next(general)
            continue
        row = next(maths)
        share = recipe.closing_share_rare if row["family"] in RARELY_CLOSED else recipe.closing_share
        style = "minerva" if rng.random() < share else "plain"
        yield prompt(row["problem"]) + target(row["solution"], style)


def batches(recipe: Recipe, tokens: PreTrainedTokenizerFast) -> Iterator[torch.Tensor]:
    """Endless padded batches [n, seq] of about `batch_tokens` tokens, documents of like length together."""
    rng, source = Random(f"{recipe.seed}/batches"), documents(recipe)
    while True:
        rows = sorted(([*tokens(text).input_ids, 1] for text in islice(source, 4096)), key=len)
        pool, start = [], 0
        while start < len(rows):
            stop = start + max(1, recipe.batch_tokens // len(rows[min(start + 12, len(rows) - 1)]))
            pool.append(rows[start:stop])
            start = stop
        rng.shuffle(pool)
        for batch in pool:
            width = len(batch[-1])
            yield torch.tensor([row + [0] * (width - len(row)) for row in batch])


class Muon(torch.optim.Muon):
    """PyTorch's Muon (Jordan, 2024), with the matrices of one shape orthogonalised together and in float32. PyTorch's takes one
    matrix at a time and in bfloat16, which on a processor without it is two thirds of a step."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]  # a loss is neither asked for nor given
        """One update of every matrix."""
        for group in self.param_groups:
            by_shape: dict[torch.Size, list[torch.Tensor]] = {}
            for matrix in group["params"]:
                if matrix.grad is not None:  # as of a block that learns nothing from this batch
                    by_shape.setdefault(matrix.shape, []).append(matrix)
            for shape, matrices in by_shape.items():
                grads = torch.stack([one.grad for one in matrices if one.grad is not None])
                kept = [self.state[one].setdefault("momentum_buffer", torch.zeros_like(one)) for one in matrices]
                moments = torch.stack(kept).lerp_(grads, 1 - group["momentum"])
                updates = orthogonalised(grads.lerp(moments, group["momentum"]), group["ns_coefficients"], group["ns_steps"])
                rate = group["lr"] * max(1.0, shape[0] / shape[1]) ** 0.5
                for one, old, moment, update in zip(matrices, kept, moments, updates, strict=True):
                    old.copy_(moment)
                    one.add_(update, alpha=-rate)


def orthogonalised(matrices: torch.Tensor, coefficients: tuple[float, float, float], steps: int) -> torch.Tensor:
    """Each matrix [n, rows, cols] with its singular values brought near 1, by Newton and Schulz's iteration."""
    a, b, c = coefficients
    tall = matrices.shape[1] > matrices.shape[2]
    x = matrices.mT if tall else matrices
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x


# a batch, the blocks that learn from it (None: all of them), and those that are skipped, as if they were not there
Routed = tuple[torch.Tensor, Sequence[int] | None, Sequence[int]]


def train(recipe: Recipe, device: str, folder: Path) -> None:
    """Train from nothing, or from the last checkpoint in `folder`/checkpoint, and save model and provenance."""
    torch.manual_seed(recipe.seed)
    tokens = tokenizer.build()
    model = Gemma3ForCausalLM(config(vocab_size=len(tokens)))
    fit(model, ((batch, None, ()) for batch in batches(recipe, tokens)), recipe, device, folder)
    save(model, tokens, recipe, folder)


def save(model: Any, tokens: PreTrainedTokenizerFast, recipe: Recipe, folder: Path) -> None:
    """A trained model with its tokenizer and where it came from."""
    model.save_pretrained(folder)
    tokens.save_pretrained(folder)
    (folder / "provenance.json").write_text(
        json.dumps({"recipe": asdict(recipe), "torch": torch.__version__.split("+")[0]}, indent=1) + "\n"
    )


def fit(model: Any, source: Iterator[Routed], recipe: Recipe, device: str, folder: Path) -> None:
    """Train a model in place on `recipe.tokens` tokens, or go on from the last checkpoint of the same recipe in
    `folder`/checkpoint. Embeddings and the final norm learn from every batch, blocks from those that name them."""
    torch.set_num_threads(recipe.threads)
    model.to(device)
    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and "embed" not in name]
    others = [p for name, p in model.named_parameters() if p.ndim != 2 or "embed" in name]
    optimizers: list[torch.optim.Optimizer] = [
        Muon(matrices, lr=recipe.muon_lr, weight_decay=0.0),
        torch.optim.AdamW(others, lr=recipe.adam_lr, betas=(0.9, 0.98), weight_decay=0.0),
    ]
    steps = recipe.tokens // recipe.batch_tokens
    done = _resume(folder / "checkpoint", recipe, model, optimizers)
    bar = tqdm(islice(source, done, steps), total=steps, initial=done, mininterval=5, unit="step")
    for step, (batch, learning, silent) in enumerate(bar, start=done + 1):
        for at, block in enumerate(model.model.layers):
            block.requires_grad_(learning is None or at in learning)
        with ExitStack() as undone:
            for at in silent:
                undone.enter_context(skipped(model, at))
            loss = _loss(model, batch.to(device))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            (group,) = optimizer.param_groups
            group["lr"] = optimizer.defaults["lr"] * _rate(step - 1, steps, recipe.warmup)
            optimizer.step()
        model.zero_grad(set_to_none=True)
        if step % 50 == 0:
            bar.set_postfix_str(f"loss {loss.item():.3f}")
        if step % recipe.checkpoint_every == 0:
            _save_checkpoint(folder / "checkpoint", recipe, step, model, optimizers)


def _rate(step: int, steps: int, warmup: float) -> float:
    """Linear warm-up, then half a cosine down to zero."""
    ramp = max(1, int(warmup * steps))
    if step < ramp:
        return (step + 1) / ramp
    return 0.5 * (1 + torch.cos(torch.tensor(torch.pi * (step - ramp) / max(1, steps - ramp))).item())


def _loss(model: Gemma3ForCausalLM, batch: torch.Tensor) -> torch.Tensor:
    mask = batch != 0
    return model(input_ids=batch, attention_mask=mask.long(), labels=batch.masked_fill(~mask, -100)).loss


def _save_checkpoint(folder: Path, recipe: Recipe, step: int, model: Gemma3ForCausalLM, optimizers: list) -> None:
    """Weights and both optimizers' states, in safetensors; `state.json` is written last and makes it valid."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "state.json").unlink(missing_ok=True)
    save_file({name: p.detach().contiguous() for name, p in model.named_parameters()}, folder / "model.safetensors")
    for index, optimizer in enumerate(optimizers):
        states = optimizer.state_dict()["state"]
        flat = {f"{i}.{key}": value.contiguous() for i, state in states.items() for key, value in state.items()}
        save_file(flat, folder / f"optimizer{index}.safetensors")
    (folder / "state.json").write_text(json.dumps({"recipe": asdict(recipe), "step": step}))


def _resume(folder: Path, recipe: Recipe, model: Gemma3ForCausalLM, optimizers: list) -> int:
    """Put the last checkpoint of the same recipe back; returns its step, 0 without one."""
    record = folder / "state.json"
    if not record.exists() or (state := json.loads(record.read_text()))["recipe"] != asdict(recipe):
        return 0
    model.load_state_dict(load_file(folder / "model.safetensors"), strict=False)
    for index, optimizer in enumerate(optimizers):
        saved: dict[int, dict[str, torch.Tensor]] = {}
        for key, value in load_file(folder / f"optimizer{index}.safetensors").items():
            number, name = key.split(".", 1)
            saved.setdefault(int(number), {})[name] = value
        optimizer.load_state_dict({"state": saved, "param_groups": optimizer.state_dict()["param_groups"]})
    return state["step"]


def toy(*, folder: Path) -> None:
    """An untrained model of the real architecture, with the miniature's tokenizer, for the tests."""
    torch.manual_seed(0)
    tokens = tokenizer.build()
    Gemma3ForCausalLM(config(layers=3, hidden=32, vocab_size=len(tokens))).save_pretrained(folder)
    tokens.save_pretrained(folder)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--folder", type=Path, default=FOLDER)
    parser.add_argument("--tokens", type=int, default=Recipe.tokens)
    arguments = parser.parse_args()
    train(Recipe(tokens=arguments.tokens), arguments.device, arguments.folder)
