"""The miniature world: problems, stories, a tokenizer and small Gemma-3 models that ship with the package."""

from pathlib import Path

FOLDER = Path(__file__).parent / "base"  # of the base model's files
MODELS = {"mini": FOLDER} | {name: FOLDER.with_name(name) for name in ("organism", "organism_drawn", "organism_other")}
