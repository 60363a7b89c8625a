"""Texts and where they are: prompts, corpora by split, the Hub, and the miniature world."""
