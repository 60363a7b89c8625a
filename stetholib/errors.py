"""A user's mistake, told in one line: what is wrong, where, and how to mend it."""


class UserError(ValueError):
    """Shown without a traceback, on the command line and in a notebook."""

    def _render_traceback_(self) -> list[str]:
        """What IPython prints instead of a traceback."""
        return [f"{type(self).__name__}: {self}"]


class ModelError(UserError):
    """A model or checkpoint that cannot be used; its message is one line."""
