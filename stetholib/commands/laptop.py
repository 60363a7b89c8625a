"""Will this laptop do? `make check-laptop`, or this file given to any Python from 3.8 on.

Standard library only, and nothing of the package: it runs before there is an environment, on a Python that may be too old."""

from __future__ import annotations

import hashlib
import os
import platform
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import webbrowser
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Iterator, NamedTuple, Sequence  # noqa: UP035 (a Python 3.8 reads this)

CHECKOUT = Path(__file__).resolve().parents[2]
PYTHONS = ((3, 11), (3, 12))
GIB = 2**30
DISK, DISK_AFTER, MEMORY = 3.5, 0.5, 3.5  # GiB: the environment takes 2.6, before and after; JupyterLab, a kernel and a browser
SUMS = "SHA256SUMS"
USED = re.compile(r"(notebooks|figures)/|runs/.*\.jsonl$")  # what a reader's own work changes, or a run adds to
OLD_NAMES = {"manylinux1_": "manylinux_2_5_", "manylinux2010_": "manylinux_2_12_", "manylinux2014_": "manylinux_2_17_"}


class Laptop(NamedTuple):
    """What can be told of a machine; `release` is of glibc on Linux (none with musl), else of macOS. Disk and memory in bytes."""

    system: str
    machine: str
    release: tuple[int, ...]
    python: tuple[int, ...]
    others: Sequence[str] = ()
    venv: bool = True
    disk: int = 100 * GIB
    memory: int = 8 * GIB
    cores: int = 4
    browser: bool = True
    wsl: bool = False
    writable: bool = True
    port: bool = True
    installed: bool = False


class Line(NamedTuple):
    """One finding: `ok`, `note` (it does, but), or `MEND`, when `said` holds the mend."""

    mark: str
    name: str
    said: str


def numbers(version: str) -> tuple[int, ...]:
    """The first two numbers of a version."""
    return tuple(int(part) for part in re.findall(r"\d+", version)[:2])


def fits(wheel: str, laptop: Laptop) -> bool:
    """Whether a wheel can be installed on a laptop, by the file's name."""
    pythons, abi, platforms = wheel[: -len(".whl")].rsplit("-", 3)[1:]
    if not any(reads(tag, abi, laptop.python[1]) for tag in pythons.split(".")):
        return False
    for tag in platforms.split("."):
        for old, new in OLD_NAMES.items():
            tag = tag.replace(old, new)
        built = re.match(r"(manylinux|macosx)_(\d+)_(\d+)_(\w+)$", tag)
        if tag == "any" or (tag == f"linux_{laptop.machine}" and laptop.system == "Linux"):
            return True
        if built and built[1] == {"Linux": "manylinux", "Darwin": "macosx"}.get(laptop.system):
            if built[4] in (laptop.machine, "universal2") and (int(built[2]), int(built[3])) <= laptop.release:
                return True
    return False


def reads(tag: str, abi: str, minor: int) -> bool:
    """Whether Python 3.<minor> takes what is built for a Python (py3, cp311) and its interface (none, abi3, cp311)."""
    from_then_on = (tag[:3], abi) in (("py3", "none"), ("cp3", "abi3")) and tag[3:].isdigit() and int(tag[3:]) <= minor
    return from_then_on or tag in ("py3", f"cp3{minor}")


def lacking(lock: str, wheels: Sequence[str], laptop: Laptop) -> list[str]:
    """The packages of a lock's text for which no wheel fits a laptop."""
    there = {tuple(wheel.split("+")[0].split("-")[:2]) for wheel in wheels if fits(wheel, laptop)}
    known = {(re.sub("[-_.]+", "_", name).lower(), version) for name, version in there}
    wanted = re.findall(r"^([\w.-]+)==([^\s;+]+)", lock, re.M)
    return [name for name, version in wanted if (re.sub("[-_.]+", "_", name).lower(), version) not in known]


def sums(folder: Path) -> list[str]:
    """Files of SHA256SUMS that are missing or altered, but for those that use changes, which may not be missing."""
    found = []
    for line in (folder / SUMS).read_text(encoding="utf-8").splitlines():
        known, name = line.split("  ", 1)
        path = folder / name
        if not path.is_file() or (not USED.match(name) and known != sha256(path)):
            found.append(name)
    return found


def sha256(path: Path) -> str:
    """SHA-256 of a file's bytes."""
    digest = hashlib.sha256()
    with path.open("rb") as handle:
        for part in iter(lambda: handle.read(2**20), b""):
            digest.update(part)
    return digest.hexdigest()


def examine(laptop: Laptop, folder: Path) -> Iterator[Line]:
    """Every check of a laptop and of the checkout in `folder`, a line each."""
    yield system(laptop)
    if laptop.system not in ("Linux", "Darwin"):
        return
    yield python(laptop)
    yield from room(laptop, folder)
    wheels = sorted(path.name for path in (folder / "wheels").glob("*.whl"))
    yield packages(laptop, wheels, (folder / "requirements.lock").read_text(encoding="utf-8"))
    yield from files(folder)


def system(laptop: Laptop) -> Line:
    """Linux or macOS, with a processor and a C library that the packages are built for."""
    name = {"Darwin": "macOS"}.get(laptop.system, laptop.system) + (" (WSL)" if laptop.wsl else "")
    said = f"{name} {'.'.join(map(str, laptop.release))} on {laptop.machine}"
    if laptop.system not in ("Linux", "Darwin"):
        mend = "Windows itself will not do, its Linux will: in PowerShell, wsl --install -d Ubuntu-24.04;"
        return Line("MEND", "system", f"{mend} then open Ubuntu, copy this folder into its home and run make check-laptop there")
    if (laptop.system, laptop.machine) == ("Darwin", "x86_64"):
        return Line(
            "MEND", "system", f"{said}: PyTorch is no longer built for Intel Macs; look on with a neighbour, or use Colab"
        )
    if laptop.machine not in ("x86_64", "aarch64", "arm64") or not laptop.release:
        return Line("MEND", "system", f"{said}: packages are built for 64-bit Intel, AMD and ARM, on Linux with glibc")
    return Line("ok", "system", said)


def python(laptop: Laptop) -> Line:
    """Python 3.11 or 3.12 that can make an environment."""
    said = "Python " + ".".join(map(str, laptop.python[:2]))
    if laptop.installed:
        return Line("ok", "python", f"{said}; the environment is there")
    if tuple(laptop.python[:2]) in PYTHONS and laptop.venv:
        return Line("ok", "python", said)
    if laptop.others:
        return Line("MEND", "python", f"{said} will not do, {laptop.others[0]} will: make env PYTHON={laptop.others[0]}")
    if tuple(laptop.python[:2]) in PYTHONS:
        return Line("MEND", "python", f"{said} lacks venv: sudo apt install python{said.split()[1]}-venv")
    here = "brew install python@3.12" if laptop.system == "Darwin" else "sudo apt install python3.12-venv (or python3.11-venv)"
    return Line("MEND", "python", f"{said}, but 3.11 or 3.12 is wanted: {here}, then make env PYTHON=python3.12")


def room(laptop: Laptop, folder: Path) -> Iterator[Line]:
    """Disk, memory, cores, rights to write, a browser and a port."""
    wanted = DISK_AFTER if laptop.installed else DISK
    for name, there, least, mend in (
        ("disk", laptop.disk, wanted, "free some"),
        ("memory", laptop.memory, MEMORY, "look on with a neighbour, or use Colab"),
    ):
        said = f"{there / GIB:.1f} GiB {'free' if name == 'disk' else 'in all'}, {least:g} wanted"
        yield Line("ok", name, said) if there >= least * GIB else Line("MEND", name, f"{said}: {mend}")
    few = Line("note", "cores", "1 core: what is not kept takes twice as long")
    yield few if laptop.cores < 2 else Line("ok", "cores", str(laptop.cores))
    if not laptop.writable:
        yield Line("MEND", "folder", f"{folder} cannot be written to, or holds no links: copy it into your home and run there")
    elif laptop.wsl and str(folder).startswith("/mnt/"):
        yield Line("note", "folder", "it lies on Windows' disk, which is slow from here: copy it into your home")
    else:
        yield Line("ok", "folder", "can be written to")
    if laptop.browser or laptop.wsl:
        yield Line("ok", "browser", "Windows' own: give it the address that make lab prints" if laptop.wsl else "one is there")
    else:
        yield Line("MEND", "browser", "none was found on a desktop: install Firefox or Chromium")
    free = Line("ok", "port", "one is free for JupyterLab on 127.0.0.1")
    yield free if laptop.port else Line("MEND", "port", "none from 8888 to 8938 is free: close other servers of Jupyter")


def packages(laptop: Laptop, wheels: Sequence[str], lock: str) -> Line:
    """Whether make env needs a network."""
    if laptop.installed:
        return Line("ok", "wheels", "not needed any more")
    if not wheels:
        return Line("note", "wheels", "there is no folder wheels/: make env will need a network, and minutes")
    missing = lacking(lock, wheels, laptop)
    if not missing:
        return Line("ok", "wheels", f"{len(wheels)}: make env needs no network")
    for other in laptop.others:
        if not lacking(lock, wheels, laptop._replace(python=numbers(other))):
            return Line("MEND", "wheels", f"none for this Python, but for {other}: make env PYTHON={other}")
    names = ", ".join(missing[:4]) + (", ..." if len(missing) > 4 else "")
    return Line("MEND", "wheels", f"{len(missing)} packages have none that fits here ({names}); with a network: make env WHEELS=")


def files(folder: Path) -> Iterator[Line]:
    """Whether the files are those that were bundled, and the warm store among them."""
    damaged = sums(folder) if (folder / SUMS).is_file() else []
    store = [name for name in damaged if name.startswith("runs/")]
    others = [name for name in damaged if name not in store]
    if others:
        yield Line("MEND", "files", f"{len(others)} missing or altered: copy again {', '.join(others[:3])}")
    elif (folder / SUMS).is_file():
        yield Line("ok", "files", f"as {SUMS} has them")
    if store:
        yield Line("MEND", "store", f"{len(store)} files are missing or altered: copy runs/ again, or let notebooks compute them")
    elif (folder / "runs" / "mini" / "store").is_dir():
        yield Line("ok", "store", "warm: notebooks open in seconds")
    else:
        yield Line("note", "store", "none: notebooks compute what they show, some twenty minutes for all six")


def look(folder: Path) -> Laptop:
    """This laptop."""
    release = platform.mac_ver()[0] if platform.system() == "Darwin" else platform.libc_ver()[1]
    pages = getattr(os, "sysconf", lambda _: 0)
    return Laptop(
        system=platform.system(),
        machine=platform.machine(),
        release=numbers(release),
        python=tuple(sys.version_info[:2]),
        others=[name for name in ("python3.12", "python3.11") if succeeds(name, "-c", "import venv, ensurepip")],
        venv=bool(find_spec("venv") and find_spec("ensurepip")),
        disk=shutil.disk_usage(str(folder)).free,
        memory=pages("SC_PAGE_SIZE") * pages("SC_PHYS_PAGES"),
        cores=os.cpu_count() or 1,
        browser=has_browser(),
        wsl="microsoft" in platform.release().lower(),
        writable=can_write(folder),
        port=any(can_bind(port) for port in range(8888, 8939)),
        installed=any(
            succeeds(one, "-m", "stetholib.commands.environment", cwd=str(folder))
            for one in (sys.executable, str(folder / ".venv/bin/python"))
        ),
    )


def succeeds(*command: str, cwd: str | None = None) -> bool:
    """Whether a command is there and ends well."""
    with suppress(OSError):
        return not subprocess.run(command, cwd=cwd, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL).returncode
    return False


def has_browser() -> bool:
    """Whether Python finds a browser with windows."""
    with suppress(webbrowser.Error):
        return getattr(webbrowser.get(), "name", "") not in ("www-browser", "links", "elinks", "lynx", "w3m")
    return False


def can_write(folder: Path) -> bool:
    """Whether a folder takes a file and a link, as an environment needs."""
    with suppress(OSError, NotImplementedError), tempfile.TemporaryDirectory(dir=str(folder)) as place:
        os.symlink("nowhere", os.path.join(place, "link"))
        return True
    return False


def can_bind(port: int) -> bool:
    """Whether a port of this machine's own address is free."""
    with socket.socket() as one, suppress(OSError):
        one.bind(("127.0.0.1", port))
        return True
    return False


def main() -> int:
    """Say what was found, a line each; 0 when this laptop will do, else 1."""
    lines = list(examine(look(CHECKOUT), CHECKOUT))
    for line in lines:
        sys.stdout.write(f"{line.mark:4} {line.name:9} {line.said}\n")
    mends = sum(line.mark == "MEND" for line in lines)
    sys.stdout.write("This laptop will do: make lab\n" if not mends else f"This laptop will not do yet: {mends} to mend\n")
    return int(mends > 0)


if __name__ == "__main__":
    sys.exit(main())
