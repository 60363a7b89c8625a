"""Ours beside its peers: works measured side by side in one run, and what they cost as they grow. `make bench` runs it."""
