"""The error that trimtab raises for bad input: it names the input, the reason and the fix."""


class TrimtabError(ValueError):
    """Bad input or an impossible request. The command line prints it on one line and exits with 2."""


class UnsupportedError(TrimtabError):
    """An engine or a model can't honour what was asked. Raised before anything runs."""
