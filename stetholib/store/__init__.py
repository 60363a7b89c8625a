"""What is kept on disk: files whole or not at all, artefacts under keys, tables by contract, progress."""
