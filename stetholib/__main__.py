"""The command line, `stetholib` or `python -m stetholib`; the Makefile's targets call it."""

import argparse
import sys
from collections.abc import Callable
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any, NoReturn

from safetensors import SafetensorError

from stetholib.commands.environment import check_imported_from
from stetholib.data.hub import full_disk
from stetholib.errors import MEMORY, UserError, want_of_memory

# command -> (a line for the list, what its own help says)
COMMANDS = {
    "reproduce": (
        "run the six notebooks; every table and figure",
        "Run the six notebooks in order and leave tables and figures in figures/<profile>/. Only what has something to do is run: "
        "a notebook whose text, profile, code and libraries are those of its last run is passed over. What was interrupted goes "
        "on from where it was when the same command is given again.",
    ),
    "doctor": (
        "say what this machine lacks for a profile",
        "Look at packages, models, SAEs and texts, token and network, memory, disk and device, one line each. Nothing is fetched "
        "and nothing computed. The exit status is 0 when all is well.",
    ),
    "rehearse": (
        "run a profile that fetches on fabricated weights",
        "Run a profile's notebooks on random weights of the true shapes, with few of everything, and say how much time and memory "
        "each step took. It needs no network and no token, and its numbers mean nothing. Everything lies in "
        "runs/<profile>-rehearsal/.",
    ),
    "seeds": (
        "run the experiment in several worlds",
        "Repeat a profile under the seeds 0, 1, 2, ... (new data, fine-tune and SAEs) and leave in figures/<into>/ how often each "
        "claim holds.",
    ),
    "claim": (
        "check one claim of the paper alone",
        "Measure what the rule of one claim reads, and nothing else, and print the rule, what was measured, whether it can be "
        "tested here, and both verdicts. No figure is written; what was measured is kept.",
    ),
    "organisms": (
        "ask every rule for layers that are known",
        "Run profiles whose fine-tune names blocks, with SAEs of several seeds, and write what each rule finds of these blocks, and "
        "whether such a world can test a rule at all, into figures/seeds-organism.",
    ),
    "listen": (
        "score the layers of a model of your own",
        "Say how specific each layer of a model is to one kind of text beside another, with what chance would say, from SAEs of "
        "its blocks. No profile is needed and nothing is kept, but for the file of --into.",
    ),
    "export": (
        "write an edited model as a folder that any tool loads",
        "Write the model of a variant with a card, its provenance and, where there is one, a recipe for mergekit; the base's files "
        "are kept, but for the matrices that were edited. What the variant stands on is found, or computed.",
    ),
    "page": (
        "write one page that needs nothing",
        "Write figures/<profile>/stethoscope.html: the story, the miniature run live in the browser, every set of layers, and the "
        "ledger, in one file that opens without a network. What it shows is found, or computed: run reproduce first.",
    ),
    "bundle": (
        "make a folder for laptops without a network",
        "Clone the commit and add what a laptop needs to set up, run and open the notebooks without a network: wheels of "
        "requirements.lock for each platform, what the miniature's notebooks open warm with, and a hash of every file. What has no "
        "wheel is named. The exit status is 0 when nothing is lacking.",
    ),
}


ORGANISMS = ("organism", "organism-drawn", "organism-other", "organism-negative")


class Parser(argparse.ArgumentParser):
    """A parser whose complaints are one line."""

    def error(self, message: str) -> NoReturn:
        """Refuse what was typed."""
        raise UserError(f"{message}; see: {self.prog} --help")


def parser(inner: bool = False) -> Parser:
    """Every command with its options; inner: also `answer`, which `reproduce --processes` starts and nobody types."""
    top = Parser(prog="stetholib", description="A companion to 'SAEs as Stethoscopes, Not Scalpels': runs, worlds, and checks.")
    commands = top.add_subparsers(dest="command", metavar="command", required=True)
    made = {name: commands.add_parser(name, help=line, description=said) for name, (line, said) in COMMANDS.items()}
    if inner:
        made["answer"] = commands.add_parser("answer")
    for name, one in made.items():
        if name not in ("bundle", "listen", "organisms"):
            default = "paper" if name == "rehearse" else "mini"
            said = f"a shipped profile's name, or a YAML file of your own ({default})"
            one.add_argument("--profile", default=default, help=said)
        if name != "bundle":
            one.add_argument("--device", default="cpu", choices=["cpu", "cuda"], help="where models run (cpu)")
    made["reproduce"].add_argument("--processes", type=int, default=1, help="how many processes answer the test, one a GPU (1)")
    made["seeds"].add_argument("--processes", type=int, default=1, help="how many worlds at once (1)")
    for name in made.keys() & {"reproduce", "doctor", "answer"}:
        said = "override one key of the profile, e.g. selection.layer_share=0.25"
        made[name].add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help=said)
    made["rehearse"].add_argument("--scale", type=float, default=1.0, help="of the true shapes: above 0, at most 1 (1)")
    made["seeds"].add_argument("--count", type=int, default=5, help="how many worlds (5)")
    made["seeds"].add_argument("--into", help="folder below figures/ for what they say (seeds-<profile>)")
    made["organisms"].add_argument("--profiles", nargs="+", default=ORGANISMS, help=f"which ({' '.join(ORGANISMS)})")
    made["organisms"].add_argument("--count", type=int, default=2, help="SAEs of so many seeds in each (2)")
    made["claim"].add_argument("--claim", required=True, help="which: C1 to C9")
    made["listen"].add_argument("--model", required=True, help="a folder, or a Hub id")
    made["listen"].add_argument("--revision", help="of the model on the Hub")
    made["listen"].add_argument("--saes", required=True, help="a SAELens release, or a folder with one SAE a block")
    made["listen"].add_argument("--sae-id", required=True, help="the SAE of a block, e.g. layer_{layer}_width_16k_l0_small")
    for side, what in (("maths", "of the kind to listen for"), ("general", "to hold them against")):
        made["listen"].add_argument(f"--{side}", required=True, help=f"texts {what}: .txt (one a line), .jsonl or .parquet")
    made["listen"].add_argument("--into", help="a CSV file for the table")
    made["page"].add_argument("--organism", default=ORGANISMS[0], help=f"whose layers are known ({ORGANISMS[0]})")
    made["export"].add_argument("--variant", required=True, help="which edited model, e.g. stethoscope")
    made["export"].add_argument("--into", help="a new folder, or an earlier export (runs/<profile>/export/<variant>)")
    made["export"].add_argument("--delta", action="store_true", help="only the tensors that are added, in float32")
    made["bundle"].add_argument("--into", help="a new folder, or a new file that ends in .tar (dist/stetholib)")
    made["bundle"].add_argument("--platform", nargs="+", help="linux-x86_64, linux-aarch64, macos-arm64 (this machine's)")
    made["bundle"].add_argument("--python", nargs="+", help="3.11, 3.12 (the one that runs)")
    return top


def overrides_of(given: list[str]) -> dict[str, Any]:
    """Dotted keys and their values, as YAML reads them, of what was typed as KEY=VALUE. Raises UserError for anything else."""
    import yaml

    found: dict[str, Any] = {}
    for one in given:
        key, equals, value = one.partition("=")
        if not (equals and key.strip() and value.strip()):
            raise UserError(f"--set {one}: give KEY=VALUE, e.g. selection.layer_share=0.25, without spaces in between")
        try:
            found[key.strip()] = yaml.safe_load(value)
        except yaml.YAMLError:
            raise UserError(f"--set {one}: {value} cannot be read as YAML") from None
    return found


def run(options: argparse.Namespace) -> int:
    """Run a command; its module is loaded only now: help and complaints need no PyTorch. The status is 1 where it gives False."""
    o, name = options, options.command
    module: Any = import_module(f"stetholib.commands.{'reproduce' if name == 'answer' else name}")
    asked = getattr(o, "profile", None), getattr(o, "device", None)
    calls: dict[str, Callable[[], Any]] = {
        "reproduce": lambda: module.reproduce(*asked, o.processes, overrides_of(o.set)),
        "answer": lambda: module.answer(*asked, overrides_of(o.set)),
        "doctor": lambda: module.report(*asked, print, overrides_of(o.set)),
        "rehearse": lambda: module.rehearse(*asked, o.scale),
        "seeds": lambda: module.run(*asked, o.count, o.into, o.processes),
        "claim": lambda: print(module.check(o.claim, *asked)),
        "organisms": lambda: module.run(o.profiles, o.device, o.count),
        "listen": lambda: print(module.run(o.model, o.revision, o.saes, o.sae_id, (o.maths, o.general), o.device, o.into)),
        "export": lambda: print(f"{o.variant}: {_size(module.export(o.variant, *asked, o.into, o.delta))}"),
        "page": lambda: print(_size(module.write(*asked, o.organism))),
        "bundle": lambda: module.bundle(o.into, o.platform, o.python, partial(print, flush=True)),
    }
    return int(calls[name]() is False)


def _size(place: Path) -> str:
    """How large a file, or the files of a folder, are."""
    size = sum(path.stat().st_size for path in (place.iterdir() if place.is_dir() else [place]))
    return f"{size / 2**20:.1f} MiB in {place}"


def main(arguments: list[str] | None = None) -> int:
    """Do what was typed; a user's mistake is one line on standard error and exit status 2."""
    try:
        typed = sys.argv[1:] if arguments is None else arguments
        options = parser(inner=typed[:1] == ["answer"]).parse_args(typed)
        check_imported_from(Path.cwd())
        return run(options)
    except UserError as error:
        print(f"stetholib: {error}", file=sys.stderr)
        return 2
    except (OSError, SafetensorError, MemoryError, RuntimeError, ImportError) as error:
        said, full = MEMORY, full_disk(str(error))
        if not want_of_memory(error):
            if isinstance(error, RuntimeError | ImportError) or (isinstance(error, SafetensorError) and not full):
                raise
            mend = "free some space" if full else "give this folder room and rights to write"
            said = f"{error}; {mend}, then run the same command again: what is finished is kept"
        print(f"stetholib: {said}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stetholib: stopped; what was finished is kept, the same command goes on from there", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
