"""Does this Python satisfy `requirements.lock`? Standard library only, since it runs before anything is installed."""

import re
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

# what results depend on
LIBRARIES = ("torch", "transformers", "sae-lens", "lm-eval", "datasets", "peft", "scipy", "numpy")
PIN = re.compile(r"^([A-Za-z0-9._-]+)==([^\s;+]+)")


def pins(lock: str) -> dict[str, str]:
    """Package names and versions of a lock's text."""
    return {match[1]: match[2] for line in lock.splitlines() if (match := PIN.match(line))}


def differences(lock: str) -> list[str]:
    """What the running interpreter lacks or has in another version, one line each; local version tags do not count."""
    found = []
    for name, wanted in pins(lock).items():
        try:
            present = version(name).split("+")[0]
        except PackageNotFoundError:
            found.append(f"{name} is missing, {wanted} is wanted")
            continue
        if present != wanted:
            found.append(f"{name} is {present}, {wanted} is wanted")
    return found


if __name__ == "__main__":
    missing = differences((Path(__file__).parent.parent / "requirements.lock").read_text(encoding="utf-8"))
    if missing and "--warn" in sys.argv:
        sys.stderr.write(f"environment: {len(missing)} packages differ from requirements.lock ({'; '.join(missing[:3])} ...)\n")
    sys.exit(bool(missing))
