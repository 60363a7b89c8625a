"""Watching a step from outside its kernel: peaks of memory, and what it says of its progress."""

import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil


def say(text: str, end: str = "\n") -> None:
    """Tell who runs a command, on standard error and at once."""
    print(text, end=end, file=sys.stderr, flush=True)  # noqa: T201


@contextmanager
def _meanwhile(look: Callable[[], Any], every: float) -> Iterator[None]:
    """Look again and again in a thread, `every` so many seconds, until the block ends."""
    done = threading.Event()

    def watch() -> None:
        while not done.wait(every):
            look()

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


@contextmanager
def peaks(device: str) -> Iterator[dict[str, float]]:
    """Watch the memory of a step's processes, and of the GPU: the dict holds the peaks in GiB when it is over."""
    found = {"ram": 0.0, "gpu": 0.0}

    def look() -> None:
        resident = 0
        for child in psutil.Process().children(recursive=True):
            with suppress(psutil.Error):
                resident += child.memory_info().rss
        found["ram"] = max(found["ram"], resident / 2**30)
        if device == "cuda":
            asked = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits"]
            with suppress(OSError, ValueError, subprocess.SubprocessError):
                used = subprocess.run(asked, capture_output=True, text=True, timeout=5, check=True).stdout.split()
                found["gpu"] = max([found["gpu"], *(int(mib) / 1024 for mib in used)])

    with _meanwhile(look, 0.3):
        yield found


@contextmanager
def progress(log: Path) -> Iterator[None]:
    """Pass on what the notebook's kernel says of its progress."""
    log.write_text("")
    os.environ["STETHOLIB_PROGRESS"] = str(log)
    with log.open(encoding="utf-8") as handle, _meanwhile(lambda: say(handle.read(), end=""), 1):
        yield
