"""Which models can be used here: architectures by `model_type`, and what the small files beside the weights rule out.

Nothing is guessed from names of tensors: an architecture that is not in the table is refused before it is measured."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from stetholib.errors import ModelError

BEFORE = dict.fromkeys("qkv", "input_layernorm") | dict.fromkeys(("gate", "up"), "post_attention_layernorm")
AROUND = dict.fromkeys("qkv", "input_layernorm") | dict.fromkeys(("gate", "up"), "pre_feedforward_layernorm")
AROUND |= {"o": "post_attention_layernorm", "down": "post_feedforward_layernorm"}


@dataclass(frozen=True)
class Architecture:
    """norms: the RMSNorm that stands between each matrix and the residual stream, none where it is not named; one_plus: whether
    its gain is 1 + w, w being what is stored, and not w."""

    name: str
    norms: Mapping[str, str]
    one_plus: bool


ARCHITECTURES = {  # by config.json's model_type
    "gemma": Architecture("Gemma", BEFORE, one_plus=True),
    "gemma2": Architecture("Gemma 2", AROUND, one_plus=True),
    "gemma3": Architecture("Gemma 3", AROUND, one_plus=True),
    "gemma3_text": Architecture("Gemma 3", AROUND, one_plus=True),
    "llama": Architecture("Llama", BEFORE, one_plus=False),
    "mistral": Architecture("Mistral", BEFORE, one_plus=False),
    "qwen2": Architecture("Qwen2", BEFORE, one_plus=False),
    "qwen3": Architecture("Qwen3", BEFORE, one_plus=False),
    "smollm3": Architecture("SmolLM3", BEFORE, one_plus=False),
}


def architecture(model_type: object, what: str) -> Architecture:
    """What is known of a model type. Raises ModelError for one that is not in the table; what: whose type it is."""
    if not isinstance(model_type, str) or model_type not in ARCHITECTURES:
        known = ", ".join(dict.fromkeys(one.name for one in ARCHITECTURES.values()))
        said = f"{what}: its architecture ({model_type!r}) is not known here, and code that it may bring is never run"
        raise ModelError(f"{said}; take a model of {known}")
    return ARCHITECTURES[model_type]


def check_folder(folder: Path) -> None:
    """Refuse a folder that holds an adapter, a configuration that cannot be read, another architecture, or quantised weights."""
    if (folder / "adapter_config.json").is_file():
        raise ModelError(
            f"model {folder}: it is an adapter (adapter_config.json), not a whole model; load it with peft's "
            "AutoPeftModelForCausalLM, merge it by merge_and_unload(), then save_pretrained() into a folder, and give that"
        )
    path = folder / "config.json"
    if not path.is_file():
        raise ModelError(f"model {folder}: there is no config.json; give a folder as transformers saves it, or a Hub id")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        kind, text = config.get("model_type"), config.get("text_config") or {}
        quantised = config.get("quantization_config") or text.get("quantization_config")
    except (OSError, ValueError, AttributeError, RecursionError):
        raise ModelError(f"model {folder}: config.json cannot be read; give a folder as transformers saves it") from None
    architecture(kind, f"model {folder}")
    if quantised:
        method = quantised.get("quant_method") if isinstance(quantised, dict) else quantised
        raise ModelError(
            f"model {folder}: config.json has a quantization_config ({str(method)[:40]}); quantised weights cannot be edited, "
            "take the checkpoint that it was made from, in float32 or bfloat16"
        )
