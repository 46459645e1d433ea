"""What is going to be removed warns, at the line that uses it, with what to use instead and until when."""

from __future__ import annotations

import inspect
import warnings

import pytest

from trimtab.deprecation import deprecated, warn_deprecated


class Shape:
    @deprecated("Shape.area()", since="1.9")
    def size(self, scale: float = 1.0) -> float:
        """The area."""
        return 2.0 * scale


def renamed(*, new: int = 0, old: int | None = None) -> int:
    if old is not None:
        warn_deprecated("renamed(…, old=…)", "renamed(…, new=…)", since="0.2")
        return old
    return new


def test_a_method_warns_and_does_what_it_did() -> None:
    with pytest.warns(DeprecationWarning, match="is deprecated") as caught:
        assert Shape().size(scale=3) == 6
    line = inspect.currentframe().f_lineno - 1  # type: ignore[union-attr]
    (warning,) = caught
    assert (warning.filename, warning.lineno) == (__file__, line)
    assert str(warning.message) == (
        "Shape.size(…) is deprecated and will be removed in trimtab 1.11; use Shape.area() instead"
    )
    assert Shape.size.__doc__ == "The area."
    assert str(inspect.signature(Shape.size)) == "(self, scale: 'float' = 1.0) -> 'float'"


def test_a_parameter_warns_where_it_is_used() -> None:
    with pytest.warns(DeprecationWarning, match=r"will be removed in trimtab 0\.4; use renamed\(…, new=…\)") as caught:
        assert renamed(old=1) == 1
    assert caught[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert renamed(new=2) == 2
