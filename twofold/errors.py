"""What goes wrong for a user: a wrong file, a wrong name, no network. One sentence each, and what to do about it."""


class TwofoldError(ValueError):
    """A sentence for the user, who sees no traceback. The command line prints it and exits with status 2.

    It is a ``ValueError``, as those of the ops are: a caller who wants both catches one.

    Example:
        >>> str(TwofoldError("model.gguf: not a GGUF file"))
        'model.gguf: not a GGUF file'
    """
