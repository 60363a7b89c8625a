"""A folder, or a tar, from which `make env`, `make reproduce` and `make lab` work in a room without a network.

It holds a clone of the commit, wheels of `requirements.lock` for one or more platforms, what notebooks of the miniature open
warm with, and a hash of every file. Where wheels come from is pip's own matter: its settings name indexes and folders."""

import email
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import NormalizedName, canonicalize_name

from stetholib.commands import laptop
from stetholib.commands.environment import CHECKOUT, pins
from stetholib.commands.laptop import Laptop
from stetholib.errors import UserError

# the oldest glibc and macOS that today's wheels are built for, as pip and Python call them
PLATFORMS = {
    "linux-x86_64": ("Linux", "x86_64", (2, 28)),
    "linux-aarch64": ("Linux", "aarch64", (2, 28)),
    "macos-arm64": ("Darwin", "arm64", (14, 0)),
}
STORE = Path("runs", "mini", "store")
CPU = "the CPU build of PyTorch is on an index of its own, which its site names: set PIP_EXTRA_INDEX_URL or PIP_FIND_LINKS to it"


def bundle(into: str | None, platforms: Sequence[str] | None, pythons: Sequence[str] | None, say: Callable[[str], None]) -> bool:
    """Make a bundle for every platform and Python (none: for this machine), and say what is in it; True when no wheel is lacking.
    into: a new folder, or a new file that ends in .tar. Raises UserError where the checkout cannot be bundled."""
    place = Path(into or "dist/stetholib").absolute()
    running = "{}.{}".format(*sys.version_info)
    targets = [target(platform, python) for platform in platforms or [here()] for python in pythons or [running]]
    if place.exists():
        raise UserError(f"{place} is there already; remove it, or give another place: make bundle INTO=...")
    place.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=place.parent, prefix=".bundle-") as draft:
        folder = Path(draft, place.stem)
        clone(CHECKOUT, folder, say)
        lacking = list(wheels(folder, targets, say))
        for line in lacking:
            say(f"MEND {line}")
        say(warm(CHECKOUT, folder))
        write_sums(folder)
        size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
        if place.suffix == ".tar":
            with tarfile.open(Path(draft, place.name), "w") as tar:
                tar.add(folder, place.stem, filter=nobodys)
            folder = Path(draft, place.name)
        folder.rename(place)
    say(f"{size / 2**20:.0f} MiB in {place}; copy it to each laptop, then there: make check-laptop, make env, make lab")
    return not lacking


def nobodys(one: tarfile.TarInfo) -> tarfile.TarInfo:
    """A member of a tar without the name of whoever made it."""
    one.uid, one.gid, one.uname, one.gname = 0, 0, "", ""
    return one


def here() -> str:
    """This machine's platform."""
    there = laptop.look(CHECKOUT)
    found = [name for name, known in PLATFORMS.items() if known[:2] == (there.system, there.machine)]
    if not found:
        raise UserError(f"PLATFORM: no wheels are known for this machine; give some of {', '.join(PLATFORMS)}")
    return found[0]


def target(platform: str, python: str) -> Laptop:
    """The oldest laptop that a bundle is to serve. Raises UserError for a platform or a Python that is not known."""
    if platform not in PLATFORMS:
        raise UserError(f"PLATFORM={platform} is not known; give some of {', '.join(PLATFORMS)}")
    if laptop.numbers(python) not in laptop.PYTHONS:
        raise UserError(f"PYTHONS={python} is not 3.11 or 3.12")
    return Laptop(*PLATFORMS[platform], python=laptop.numbers(python))


def clone(checkout: Path, folder: Path, say: Callable[[str], None]) -> None:
    """The checkout's commit with git's own copy of it, so that a file can be restored; nothing in it says where it came from."""
    git("clone", "--quiet", "--no-local", "--depth", "1", "--config", "core.logAllRefUpdates=false", str(checkout), str(folder))
    git("-C", str(folder), "remote", "remove", "origin")
    if changed := git("-C", str(checkout), "status", "--porcelain", "--untracked-files=no").splitlines():
        say(f"note {len(changed)} files differ from the last commit ({changed[0][3:]}); the bundle holds the commit")


def git(*arguments: str) -> str:
    """What git says; raises UserError with its last line where it fails."""
    done = subprocess.run(["git", *arguments], capture_output=True, text=True)
    if done.returncode:
        raise UserError(f"a bundle is made from a git clone, but git says: {done.stderr.strip().splitlines()[-1]}")
    return done.stdout


def wheels(folder: Path, targets: Sequence[Laptop], say: Callable[[str], None]) -> Iterator[str]:
    """Fill wheels/ for all targets; yields a line for what has no wheel."""
    lock, place = (folder / "requirements.lock").read_text(encoding="utf-8"), folder / "wheels"
    place.mkdir()
    say("wheels: those that serve every platform ...")
    with tempfile.TemporaryDirectory() as built:  # pip builds what has no wheel; what is not pure is fetched for each target
        asked = [f"{name}=={version}" for name, version in pins(lock).items() if name != "torch"]
        pip("wheel", "--no-deps", "--wheel-dir", built, *asked, needed=True)
        for path in Path(built).glob("*-none-any.whl"):
            shutil.copy2(path, place)
    for one in targets:
        name = f"{one.system} {one.machine}, Python {one.python[0]}.{one.python[1]}"
        say(f"wheels: {name} ...")
        wanted = [f"{package}=={pins(lock)[package]}" for package in laptop.lacking(lock, names(place), one)]
        missing = fetch(wanted, place, one) + complete(place, one, list(pins(lock)))
        if missing:
            yield f"{name}: no wheel for {', '.join(missing)}"


def complete(place: Path, one: Laptop, locked: Sequence[str] = ()) -> list[str]:
    """Fetch what the wheels for a laptop ask for beside the lock; returns what is not to be had, PyTorch where only CUDA's is.
    locked: the lock's names, which are never fetched in another version."""
    missing: list[str] = []
    tried = {canonicalize_name(name) for name in locked}
    while further := {name: need for name, need in required(place, one).items() if name not in tried}:
        if any(name.startswith(("nvidia-", "cuda-")) for name in further):
            next(path for path in place.glob("torch-*.whl") if laptop.fits(path.name, one)).unlink()
            missing.append(f"torch ({CPU})")
        else:
            tried |= further.keys()
            missing += fetch(list(further.values()), place, one)
    return missing


def fetch(wanted: Sequence[str], place: Path, one: Laptop) -> list[str]:
    """Fetch wheels that fit a laptop, all at once or else one by one; returns those that are not to be had."""
    if not wanted:
        return []
    tags = [f"macosx_{one.release[0]}_0_{one.machine}"]
    if one.system == "Linux":
        tags = [f"manylinux_2_{minor}_{one.machine}" for minor in range(one.release[1], 4, -1)] + [f"manylinux2014_{one.machine}"]
    only = ["--only-binary=:all:", "--no-deps", "--dest", str(place), "--python-version", f"{one.python[0]}.{one.python[1]}"]
    asked = ["download", *only, *(f"--platform={tag}" for tag in tags)]
    if pip(*asked, *wanted):
        return []
    return [package for package in wanted if not pip(*asked, package)]


def pip(*arguments: str, needed: bool = False) -> bool:
    """Whether pip does something; where it fails and is needed, raises UserError with its last line."""
    done = subprocess.run([sys.executable, "-m", "pip", "--quiet", *arguments], capture_output=True, text=True)
    if done.returncode and needed:
        raise UserError(f"pip: {(done.stderr.strip() or 'it failed').splitlines()[-1]}; is there a network?")
    return not done.returncode


def names(place: Path) -> list[str]:
    """The wheels of a folder."""
    return sorted(path.name for path in place.glob("*.whl"))


def required(place: Path, one: Laptop) -> dict[NormalizedName, str]:
    """What wheels that fit a laptop ask for there and the folder lacks, so that pip would stop at it, by name."""
    fitting = [path for path in sorted(place.glob("*.whl")) if laptop.fits(path.name, one)]
    there = {canonicalize_name(path.name.split("-")[0]) for path in fitting}
    version = f"{one.python[0]}.{one.python[1]}"
    words = dict(sys_platform=one.system.lower(), platform_system=one.system, platform_machine=one.machine, os_name="posix")
    words |= dict(python_version=version, python_full_version=f"{version}.1", extra="")
    found: dict[NormalizedName, str] = {}
    for path in fitting:
        with zipfile.ZipFile(path) as wheel:
            about = next(name for name in wheel.namelist() if name.endswith(".dist-info/METADATA"))
            asked = email.message_from_bytes(wheel.read(about)).get_all("Requires-Dist", [])
        for need in map(Requirement, asked):
            name = canonicalize_name(need.name)
            if name not in there and (need.marker is None or need.marker.evaluate(dict(words))):
                found[name] = f"{name}{need.specifier}"
    return found


def warm(checkout: Path, folder: Path) -> str:
    """Copy what the miniature's notebooks read, without what says where and when it was made; returns a line about it."""
    if not (checkout / STORE).is_dir():
        return "note there is no runs/mini here: notebooks will compute, some twenty minutes for all six; make reproduce first"
    shutil.copytree(checkout / STORE, folder / STORE, ignore=shutil.ignore_patterns("*.lock", ".*", "unfinished-*"))
    size = sum(path.stat().st_size for path in (folder / STORE).rglob("*") if path.is_file())
    return f"store: {size / 2**20:.0f} MiB, with which notebooks open in seconds"


def write_sums(folder: Path) -> None:
    """Write SHA256SUMS, as sha256sum reads it, of every file but git's own."""
    files = [path.relative_to(folder) for path in sorted(folder.rglob("*")) if path.is_file()]
    lines = [f"{laptop.sha256(folder / path)}  {path.as_posix()}\n" for path in files if path.parts[0] != ".git"]
    (folder / laptop.SUMS).write_text("".join(lines), encoding="utf-8")
