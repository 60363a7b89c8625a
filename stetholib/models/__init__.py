"""Models: load one, name its weights, run texts through it, have it answer; and SAEs as plain tensors beside it."""
