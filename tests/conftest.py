"""Every test is offline (only loopback sockets), seeded, and leaves the checkout as it was."""

import os
import socket
from pathlib import Path

import numpy as np
import pytest
import torch

from stetholib.mini import base as mini_base
from stetholib.mini import tokenizer as mini_tokenizer
from stetholib.models import LanguageModel

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
ROOT = Path(__file__).parent.parent


COVERED: list[str] = []


@pytest.fixture()
def covered():
    """Say in the run's last lines what a test has covered."""
    return COVERED.append


def pytest_terminal_summary(terminalreporter):
    for line in COVERED:
        terminalreporter.write_line(f"covered: {line}")


@pytest.fixture(scope="session")
def undisturbed(tmp_path_factory):
    """A clone in which the smoke profile ran to its end; to be read and copied only."""
    import runs

    folder = runs.clone(tmp_path_factory.mktemp("undisturbed"))
    runs.run(folder)
    return folder


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    connect = socket.socket.connect

    def guarded(self, address):
        host = address[0] if isinstance(address, tuple) else "unix"
        if host not in ("127.0.0.1", "::1", "localhost", "unix"):
            raise RuntimeError(f"tests are offline, but something connects to {host}")
        return connect(self, address)

    monkeypatch.setattr(socket.socket, "connect", guarded)


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)
    np.random.seed(0)


@pytest.fixture(scope="session")
def tokens():
    return mini_tokenizer.build()


@pytest.fixture()
def toy(tokens):
    """An untrained Gemma 3 of two blocks, fresh for each test."""
    from transformers import Gemma3ForCausalLM

    torch.manual_seed(0)
    model = Gemma3ForCausalLM(mini_base.config(layers=2, hidden=32, vocab_size=len(tokens)))
    return LanguageModel(model.eval().requires_grad_(False), tokens)


@pytest.fixture(scope="session")
def mini():
    """The shipped base model."""
    from stetholib import models

    return models.load(mini_base.FOLDER)
