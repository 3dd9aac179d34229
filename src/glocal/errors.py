"""What glocal raises when the user can do something about it."""


class GlocalError(Exception):
    """A problem the user can solve: one clear sentence that says what, where and the way out.

    The command line prints the sentence and exits with code 2; a traceback is for our own mistakes only.
    """


class Busy(GlocalError):  # noqa: N818
    """Another process is working there: it can be tried again when that one has ended."""
