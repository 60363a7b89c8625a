"""The peers, in an environment of their own (`bench/peers.txt`), and how each is asked.

mergekit 0.1.5 asks for transformers 5 and so takes the version of `requirements.lock`. The harness's model object is asked in
this process where only answering is measured: it is the same version there, and both sides then answer with one loaded model.
"""

import json
import sys
import time
import venv
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bench.inputs import MAX_NEW_TOKENS
from bench.timing import ROOT, process
from stetholib.data.prompts import problem_id
from stetholib.models.loading import LanguageModel

FOLDER, PINS = ROOT / "runs" / "bench" / "peers", ROOT / "bench" / "peers.txt"
BATCHES = (64, 128, 256)


def pins() -> dict[str, str]:
    """Names and versions of the peers."""
    lines = PINS.read_text(encoding="utf-8").split()
    return {name.split("[")[0]: version for name, version in (line.split("==") for line in lines)}


MERGEKIT, HARNESS = (f"{name} {pins()[name]}" for name in ("mergekit", "lm_eval"))


def install() -> None:
    """Make the peers' environment where it is not there, or has other pins. PyTorch goes first: a range would take another."""
    mark, wanted = FOLDER / "peers.txt", PINS.read_text(encoding="utf-8")
    if mark.is_file() and mark.read_text(encoding="utf-8") == wanted:
        return
    sys.stderr.write("bench: installing the peers (once, some minutes) ...\n")
    venv.create(FOLDER, clear=True, with_pip=True)
    pip = [FOLDER / "bin" / "python", "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    log = FOLDER.parent / "logs" / "pip.log"
    process([*pip, f"torch=={pins()['torch']}"], log)
    process([*pip, "-r", PINS, "-c", ROOT / "requirements.lock"], log)
    mark.write_text(wanted, encoding="utf-8")


def merge(recipe: Path, into: Path) -> float:
    """Let mergekit make a recipe's model from a shell; returns its peak memory in MiB."""
    return process([FOLDER / "bin" / "mergekit-yaml", recipe, into], FOLDER.parent / "logs" / "mergekit.log")


def ask(model: Path, tasks: Path, names: Sequence[str], batch: int, into: Path) -> dict[str, dict[str, Any]]:
    """Let `lm_eval --model hf` answer tasks from a shell: its verdicts and completions by problem id.
    Attention is eager, as in the miniature's profile, where it is faster than the fused kernels."""
    command = [FOLDER / "bin" / "lm_eval", "run", "--model", "hf", "--device", "cpu", "--batch_size", batch]
    command += ["--model_args", f"pretrained={model},dtype=float32,attn_implementation=eager"]
    command += ["--tasks", ",".join(names), "--include_path", tasks, "--gen_kwargs", f"max_gen_toks={MAX_NEW_TOKENS}"]
    process([*command, "--log_samples", "--output_path", into], FOLDER.parent / "logs" / "lm_eval.log")
    found = {}
    for path in into.rglob("samples_*.jsonl"):
        subject = next(name for name in names if path.name.startswith(f"samples_{name}_")).removeprefix("stetholib_")
        for sample in map(json.loads, path.read_text(encoding="utf-8").splitlines()):
            said = dict(exact_match=int(sample["exact_match"]), math_verify=int(sample["math_verify"]))
            found[problem_id(subject, sample["doc"]["problem"])] = said
    return found


def completions(
    model: LanguageModel, prompts: Mapping[str, str], stops: Sequence[str], max_new_tokens: int, batch: int
) -> dict[str, str]:
    """Completions by the harness's `hf` model over a model that is loaded, by problem id."""
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    asked = dict(until=list(stops), max_gen_toks=max_new_tokens, do_sample=False, temperature=0)
    requests = [Instance("generate_until", {}, (prompt, asked), at) for at, prompt in enumerate(prompts.values())]
    hf = HFLM(pretrained=model.model, tokenizer=model.tokenizer, batch_size=batch)
    return dict(zip(prompts, hf.generate_until(requests, disable_tqdm=True), strict=True))


def best_batch(
    model: LanguageModel, prompts: Mapping[str, str], stops: Sequence[str], max_new_tokens: int, sizes: Sequence[int] = BATCHES
) -> int:
    """The batch size at which the harness's `hf` model answers these prompts fastest."""
    seconds = {}
    for size in sizes:
        started = time.perf_counter()
        completions(model, prompts, stops, max_new_tokens, size)
        seconds[size] = time.perf_counter() - started
    return min(seconds, key=seconds.__getitem__)
