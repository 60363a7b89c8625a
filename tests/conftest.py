"""Every test is offline (only loopback sockets), seeded, and leaves the checkout as it was."""

import gc
import os
import socket
from pathlib import Path

import numpy as np
import pytest
import torch
from filelock import FileLock
from jaxtyping import install_import_hook

PACKAGE = Path(__file__).parents[1] / "stetholib"
if not os.environ.get("STETHOLIB_NO_SHAPES"):  # shapes and types of every call are checked, in this process only
    parts = {f"stetholib.{path.stem}" for path in PACKAGE.iterdir() if path.suffix == ".py" or path.is_dir()}
    parts |= {f"stetholib.data.{path.stem}" for path in (PACKAGE / "data").glob("[!_]*.py")}
    parts -= {"stetholib.data", "stetholib.__init__", "stetholib.__main__"}  # data.mini makes a million calls a tokenizer
    install_import_hook(sorted(parts), "beartype.beartype(conf=beartype.BeartypeConf(is_pep484_tower=True))")

from stetholib.data.mini import base as mini_base
from stetholib.data.mini import tokenizer as mini_tokenizer
from stetholib.models.loading import LanguageModel

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
ROOT = Path(__file__).parent.parent


COVERED: list[str] = []


@pytest.fixture()
def covered():
    """Say in the run's last lines what a test has covered."""
    return COVERED.append


# the files that take longest, first: begun last, one of them would run alone while the other worker waits
LONGEST = ("test_real_rungs", "test_corruption", "test_whole_runs", "test_bad_input", "test_browser", "test_edits")


def pytest_collection_modifyitems(items):
    """Whole files keep their order within; the long ones are begun first."""
    rank = {name: at for at, name in enumerate(LONGEST)}
    items.sort(key=lambda item: rank.get(item.path.stem, len(LONGEST)))


def pytest_collection_finish(session):
    """What was imported stays: statsmodels collects garbage at each correction by Holm, and looks at all of it."""
    gc.freeze()


def pytest_sessionfinish(session):
    """A worker hands what its tests have covered to whoever prints the last lines."""
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["covered"] = COVERED


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node):
    COVERED.extend(getattr(node, "workeroutput", {}).get("covered", []))


def pytest_terminal_summary(terminalreporter):
    for line in COVERED:
        terminalreporter.write_line(f"covered: {line}")


@pytest.fixture(scope="session")
def undisturbed(tmp_path_factory):
    """A clone in which the smoke profile ran to its end; to be read and copied only. Both workers share the one that is made."""
    import runs

    base = tmp_path_factory.getbasetemp()
    shared = base.parent if os.environ.get("PYTEST_XDIST_WORKER") else base
    folder, done = shared / "undisturbed", shared / "undisturbed.done"
    with FileLock(shared / "undisturbed.lock"):
        if not done.exists():
            runs.run(runs.clone(folder))
            done.touch()
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


@pytest.fixture(scope="session", params=["<bos>", None], ids=["BOS that is not added", "no BOS"])
def bare(request, tmp_path_factory):
    """A Llama whose tokenizer opens no text with BOS, as SmolLM2's, or has none, as Qwen's; to be read only."""
    import toys

    from stetholib.models import loading

    folder = tmp_path_factory.mktemp("bare")
    toys.checkpoints(folder), toys.opening(folder / "base", bos=request.param)
    return loading.load(folder / "base")


@pytest.fixture(scope="session")
def mini():
    """The shipped base model."""
    from stetholib.models import loading

    return loading.load(mini_base.FOLDER)
