"""Progress: a bar in a notebook, sparse lines with a time estimate in a log."""

import os
import sys
import time
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from functools import partialmethod
from typing import Any, TypeVar

from IPython import get_ipython
from IPython.display import display
from tqdm import tqdm
from tqdm.notebook import tqdm_notebook

T = TypeVar("T")


@contextmanager
def libraries_quiet() -> Iterator[None]:
    """Inside, bars that libraries draw as widgets are not shown, which no setting of theirs does: they would stay, dead."""
    loud = tqdm_notebook.__init__
    tqdm_notebook.__init__ = partialmethod(loud, disable=True)
    try:
        yield
    finally:
        tqdm_notebook.__init__ = loud


class Line:
    """A line of text in a notebook that a bar writes anew and leaves empty: a widget would stay there, and be dead."""

    _shown: Any = None

    def write(self, text: str) -> None:
        """Show this text in the place of the last."""
        said = {"text/plain": text.strip()}
        if self._shown is None:
            self._shown = display(said, raw=True, display_id=True)
        else:
            self._shown.update(said, raw=True)

    def flush(self) -> None:
        """Shown at once as it is."""


def progress(items: Collection[T], label: str) -> Iterator[T]:
    """Iterate with progress and a time estimate: a bar, or sparse lines in the log that `make reproduce` follows."""
    name, total = os.environ.get("STETHOLIB_PROGRESS"), len(items)
    if not name:
        shown = Line() if hasattr(get_ipython(), "kernel") else sys.stderr  # a kernel has a front end that shows the line
        yield from tqdm(items, desc=label, leave=False, ncols=90, file=shown)
        return
    with open(name, "a", encoding="utf-8") as log:
        started = said = time.monotonic()
        for done, item in enumerate(items):
            now = time.monotonic()
            if done and now - said > 5:
                left = (now - started) / done * (total - done)
                log.write(f"  {label}: {done}/{total}, {now - started:.0f} s, about {left:.0f} s left\n")
                log.flush()
                said = now
            yield item
