"""A reproducible companion to 'SAEs as Stethoscopes, Not Scalpels' (arXiv 2605.28649).

Six steps, one module and one notebook each: `task_vectors`, `sae_features`, `subspace_projection`, `layer_selection`,
`minerva_math`, `significance`. `Study` wires them to a profile and keeps what they make.
"""

import os
from typing import Any

# Before PyTorch is loaded. Threads that spin while they wait collapse on a busy machine, those that sleep at once take twice the time
# on an idle one: these spin for some microseconds, then sleep. Results are the same bits.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("GOMP_SPINCOUNT", "800")


def __getattr__(name: str) -> Any:
    """`Study`, imported when it is asked for: it brings PyTorch and transformers with it."""
    if name == "Study":
        from stetholib.study import Study  # here, so that a command line that needs no model starts at once

        return Study
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
