"""How a problem is asked and a solution given, in the words that Minerva Math and its scorer expect."""

import re
from hashlib import sha256

from stetholib.errors import UserError

STOP = "Problem:"
INVALID = "[invalidanswer]"
CLOSING = "\nFinal Answer: The final answer is $"


def prompt(problem: str) -> str:
    """A problem as the harness asks it (`minerva_math.utils.doc_to_text`)."""
    return f"Problem:\n{problem}\n\nSolution:"


def target(solution: str, style: str = "minerva") -> str:
    """A solution as a model should complete the prompt; `minerva` ends with the sentence `exact_match` looks for."""
    if style == "plain":
        return f" {solution}"
    return f" {solution}{CLOSING}{boxed_answer(solution)}$. I hope it is correct."


def closing(target: str) -> str:
    """The closing sentence at the end of a target, its line break included; empty where there is none, as in style `plain`."""
    _, opening, rest = target.rpartition(CLOSING)
    return opening + rest if opening else ""


def boxed_answer(solution: str) -> str:
    r"""What stands in the last `\boxed{...}` or `\fbox{...}` (or after `\boxed `) of a solution, braces balanced."""
    openings = list(re.finditer(r"\\(?:boxed|fbox)\s*", solution))
    if not openings:
        raise UserError(f"no \\boxed answer in the solution {solution[:60]!r}")
    rest = solution[openings[-1].end() :]
    if not rest.startswith("{"):
        return rest.split("$")[0].strip()
    depth = 0
    for index, sign in enumerate(rest):
        depth += (sign == "{") - (sign == "}")
        if depth == 0:
            return rest[1:index]
    raise UserError(f"an unclosed \\boxed answer in the solution {solution[:60]!r}")


def problem_id(subject: str, problem: str) -> str:
    """A hash of subject and problem: the same in every variant, run and world."""
    return sha256(f"{subject}\n{problem}".encode()).hexdigest()[:16]
