"""The miniature world: problems, stories, a tokenizer and a small Gemma-3 base model that ships with the package."""
