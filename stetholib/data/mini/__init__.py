"""The miniature world: problems, stories, a tokenizer and a small Gemma-3 base model that ships with the package."""

from pathlib import Path

FOLDER = Path(__file__).parent / "base"  # of the base model's files
