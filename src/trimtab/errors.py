"""The error that trimtab raises for bad input: it names the input, the reason and the fix."""


class TrimtabError(ValueError):
    """Bad input or an impossible request. The command line prints it on one line and exits with 2."""


class UnsupportedError(TrimtabError):
    """An engine or a model can't honour the request. Raised before anything runs."""


class UntestedVersionWarning(UserWarning):
    """An installed library is newer than the newest version that trimtab's test suite has passed on."""
