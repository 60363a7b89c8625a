"""The command line behind the Makefile: `python -m stetholib reproduce --profile mini`, `python -m stetholib seeds`."""

import argparse
import sys
from typing import NoReturn

from safetensors import SafetensorError

from stetholib.errors import UserError
from stetholib.hub import full_disk


class Parser(argparse.ArgumentParser):
    """A parser whose complaints are one line."""

    def error(self, message: str) -> NoReturn:
        """Refuse what was typed."""
        raise UserError(f"{message}; see: make help")


def main(arguments: list[str] | None = None) -> int:
    """Run a command; a user's mistake is one line on standard error and exit status 2."""
    parser = Parser(prog="stetholib", description="Run the six notebooks, or several worlds.")
    parser.add_argument("command", choices=["reproduce", "seeds", "doctor", "rehearse", "answer"])
    parser.add_argument("--profile", default="mini")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--count", type=int, default=5, help="how many worlds")
    parser.add_argument("--into", default="seeds", help="folder below figures/ for what several worlds say")
    parser.add_argument("--scale", type=float, default=1.0, help="of the true shapes, in a rehearsal")
    parser.add_argument("--processes", type=int, default=1, help="how many processes answer the test, one a GPU")
    try:
        options = parser.parse_args(arguments)
        if options.command == "doctor":
            from stetholib import doctor, profiles

            return 0 if doctor.report(profiles.load(options.profile), options.device, print) else 1
        if options.command == "rehearse":
            from stetholib.rehearse import rehearse

            rehearse(options.profile, options.device, options.scale)
        elif options.command == "seeds":
            from stetholib import worlds

            worlds.run(options.profile, options.device, options.count, options.into)
        elif options.command == "answer":
            from stetholib.reproduce import answer

            answer(options.profile, options.device)
        else:
            from stetholib.reproduce import reproduce

            reproduce(options.profile, options.device, processes=options.processes)
    except UserError as error:
        print(f"stetholib: {error}", file=sys.stderr)
        return 2
    except (OSError, SafetensorError) as error:
        full = full_disk(str(error))
        if isinstance(error, SafetensorError) and not full:
            raise
        mend = "free some space" if full else "give this folder room and rights to write"
        print(f"stetholib: {error}; {mend}, then run the same command again: what is finished is kept", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stetholib: stopped; what was finished is kept, the same command goes on from there", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
