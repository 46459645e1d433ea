"""The errors that trimtab raises for bad input. Their messages name the input, the reason and the fix."""


class TrimtabError(ValueError):
    """Bad input or an impossible request. The command line prints it on one line and exits with 2."""


class UnsupportedError(TrimtabError):
    """The engine or the model doesn't support the request. Raised before anything runs."""


class LengthError(TrimtabError):
    """A prompt, a text or an answer is empty, or doesn't fit the model's context."""


class UntestedVersionWarning(UserWarning):
    """An installed library is newer than the newest version that trimtab's test suite has passed on."""
