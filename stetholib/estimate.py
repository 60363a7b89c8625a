"""How long the steps of a profile take on a machine: a roofline of the large terms, good to a factor of a few.

The doctor says it as it is; a rehearsal corrects it by what it measured. Sizes of texts are means of MATH's, or what
the caller measured.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from math import ceil

import torch

from stetholib.profiles import Profile

SHOT_TOKENS = 170  # of one worked example in Minerva's prompt, about
FIXED = 10.0  # seconds of a notebook's kernel before it does anything
EFFICIENCY = 0.4  # of the speeds that bare kernels reach
STEP = 0.0008  # seconds a block and generated token cost whatever their size: Python, and launching kernels


@dataclass(frozen=True)
class Size:
    """What a model's time depends on: weights, bytes of one, blocks, width, features of an SAE, tokens of a text."""

    parameters: int
    bytes_each: int
    layers: int
    width: int
    d_sae: int
    text_tokens: float = 270.0  # a problem of MATH with its solution, about


@dataclass(frozen=True)
class Machine:
    """Floating-point operations and bytes of memory a second, on the device; and the CPU's in float64."""

    flops: float
    bandwidth: float
    cpu_flops: float

    @classmethod
    def measured(cls, device: str, dtype: str, size: int = 1536) -> "Machine":
        """A matrix product and a copy, timed on the device."""
        one = torch.ones(size, size, dtype=getattr(torch, dtype), device=device)
        much = torch.ones(2**26, dtype=torch.uint8, device=device)
        wide = torch.ones(size // 2, size // 2, dtype=torch.float64)
        other = torch.empty_like(much)
        product, copy = _seconds(lambda: one @ one, device), _seconds(lambda: other.copy_(much), device)
        exact = _seconds(lambda: wide @ wide, "cpu")
        return cls(
            EFFICIENCY * 2 * size**3 / product, EFFICIENCY * 2 * len(much) / copy, EFFICIENCY * 2 * (size // 2) ** 3 / exact
        )


def _seconds(act: Callable[[], object], device: str, times: int = 4) -> float:
    """The shortest of a few runs after a first one."""
    found = []
    for _ in range(1 + times):
        started = time.perf_counter()
        act()
        if device == "cuda":
            torch.cuda.synchronize()
        found.append(time.perf_counter() - started)
    return max(min(found[1:]), 1e-6)


def seconds(p: Profile, size: Size, machine: Machine) -> dict[str, float]:
    """Expected seconds of each step."""
    forward = 2 * size.parameters / machine.flops  # of one token
    weights = size.parameters * size.bytes_each / machine.bandwidth  # read once
    text, subjects = size.text_tokens, len(p.data.subjects)
    documents = subjects * p.data.feature_problems + p.data.general_documents
    sae = 8 * size.layers * size.width * size.d_sae / machine.flops  # an SAE and its random double, of one token
    trained = subjects * p.data.train_problems * p.finetune.epochs * (p.finetune.finetuned is None)
    chosen = size.layers * p.selection.layer_share
    sets = 3 * size.layers + 6 + p.selection.random_sets + p.selection.random_energy_sets
    sets += size.layers * chosen * p.selection.greedy
    problems = sum(p.data.test_problems.values())
    prompt = text / 3 + SHOT_TOKENS * p.evaluation.num_fewshot
    new = p.evaluation.max_new_tokens
    answering = problems * (prompt + new) * forward
    answering += ceil(problems / p.evaluation.batch_size) * new * (weights + STEP * size.layers)
    found = {
        "01_task_vectors": 3 * trained * text * forward + 20 * weights,
        "02_sae_features": 1.3 * documents * text * (forward + sae),
        "03_subspace_projection": 3 * subjects * p.projection.gradient_problems * text * forward
        + 7 * size.layers * (p.projection.random_draws + 60) * size.width**3 / machine.cpu_flops,
        "04_layer_selection": sets * (subjects * p.selection.loss_problems * text * forward + 4 * weights),
        "05_minerva_math": len(p.evaluation.variants) * (answering + 8 * weights),
        "06_significance": 0.0,
    }
    return {step: FIXED + expected for step, expected in found.items()}
