"""Does this Python satisfy `requirements.lock`, and is the package that it imports this checkout's?

Standard library only, since it runs before anything is installed."""

import json
import re
import sys
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, distribution, version
from pathlib import Path
from urllib.parse import unquote, urlparse

from stetholib.errors import UserError

# what results depend on
LIBRARIES = ("torch", "transformers", "sae-lens", "lm-eval", "datasets", "peft", "scipy", "numpy")
PIN = re.compile(r"^([A-Za-z0-9._-]+)==([^\s;+]+)")
CHECKOUT = Path(__file__).resolve().parents[2]


def pins(lock: str) -> dict[str, str]:
    """Package names and versions of a lock's text."""
    return {match[1]: match[2] for line in lock.splitlines() if (match := PIN.match(line))}


def differences(lock: str) -> list[str]:
    """What the running interpreter lacks or has in another version, one line each; local version tags do not count."""
    found = []
    for name, wanted in pins(lock).items():
        present = "missing"
        with suppress(PackageNotFoundError):
            present = version(name).split("+")[0]
        if present != wanted:
            found.append(f"{name} is {present}, {wanted} is wanted")
    return found


def elsewhere(checkout: Path, name: str = "stetholib") -> list[str]:
    """A line where the package is not installed in place from this checkout: it is missing, or the clone was moved."""
    try:
        said = json.loads(distribution(name).read_text("direct_url.json") or "{}")
    except PackageNotFoundError:
        return [f"{name} is not installed"]
    except ValueError:
        said = {}
    place = Path(unquote(urlparse(said.get("url", "")).path))
    if said.get("dir_info", {}).get("editable") and place.resolve() == checkout.resolve():
        return []
    return [f"{name} is installed from {place}, not from {checkout}"]


def check_imported_from(folder: Path, imported: Path = CHECKOUT) -> None:
    """Raise UserError where a folder lies in another checkout of the package than the one that is imported."""
    above = (folder.resolve(), *folder.resolve().parents)
    place = next((place for place in above if (place / "stetholib" / "__init__.py").is_file()), None)
    if place and place != imported.resolve():
        raise UserError(
            f"this folder belongs to {place}, but the stetholib of {imported} is imported; "
            f"run there, or install this one: make env in {place}"
        )


if __name__ == "__main__":
    missing = differences((CHECKOUT / "requirements.lock").read_text(encoding="utf-8"))
    if "--installed" in sys.argv:
        missing += elsewhere(CHECKOUT)
    if missing and "--warn" in sys.argv:
        sys.stderr.write(f"environment: {len(missing)} packages differ from requirements.lock ({'; '.join(missing[:3])} ...)\n")
    sys.exit(bool(missing))
