"""A user's mistake, told in one line: what is wrong, where, and how to mend it."""


class UserError(ValueError):
    """Shown without a traceback, on the command line and in a notebook; signs that cannot be printed are spelled out in it."""

    def __init__(self, message: str) -> None:
        """message: what is wrong, where, and how to mend it."""
        super().__init__("".join(sign if sign.isprintable() else repr(sign)[1:-1] for sign in message))

    def _render_traceback_(self) -> list[str]:
        """What IPython prints instead of a traceback."""
        return [f"{type(self).__name__}: {self}"]


class ModelError(UserError):
    """A model or checkpoint that cannot be used; its message is one line."""


MEMORY = "there is not enough memory; take a larger machine or a smaller profile, or raise the limit (ulimit -v): see make doctor"
SIGNS = ("[Errno 12]", "allocate memory", "not enough memory", "MemoryError", "failed to map segment", "out of memory")


def want_of_memory(error: object) -> bool:
    """Whether an error, or what a library says, means that memory ran out."""
    return isinstance(error, MemoryError) or any(sign in str(error) for sign in SIGNS)
