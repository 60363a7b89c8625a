"""Watching a step from outside its kernel: peaks of memory, and what it says of its progress."""

import os
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil


@contextmanager
def peaks(device: str) -> Iterator[dict[str, float]]:
    """Watch the memory of a step's processes, and of the GPU: the dict holds the peaks in GiB when it is over."""
    found, done = {"ram": 0.0, "gpu": 0.0}, threading.Event()

    def resident() -> int:
        total = 0
        for child in psutil.Process().children(recursive=True):
            with suppress(psutil.Error):
                total += child.memory_info().rss
        return total

    def watch() -> None:
        while not done.wait(0.3):
            found["ram"] = max(found["ram"], resident() / 2**30)
            if device == "cuda":
                asked = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits"]
                with suppress(OSError, ValueError, subprocess.SubprocessError):
                    used = subprocess.run(asked, capture_output=True, text=True, timeout=5, check=True).stdout.split()
                    found["gpu"] = max([found["gpu"], *(int(mib) / 1024 for mib in used)])

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield found
    finally:
        done.set()
        thread.join()


@contextmanager
def progress(log: Path, out: Any) -> Iterator[None]:
    """Pass on what the notebook's kernel says of its progress."""
    log.write_text("")
    os.environ["STETHOLIB_PROGRESS"] = str(log)
    done = threading.Event()

    def follow() -> None:
        with log.open(encoding="utf-8") as handle:
            while not done.wait(1):
                out.write(handle.read())
                out.flush()

    thread = threading.Thread(target=follow, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
