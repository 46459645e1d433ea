"""The cosines between two steerings' directions by layer, which notebooks show as a table."""

from __future__ import annotations

from typing import Any


class Cosines(dict[int, float]):
    """The cosine between two steerings' directions at each layer at which both act, `{layer: cosine}`.

    In a notebook it is displayed as a table. `to_pandas()` is a data frame, `plot()` a plot.
    """

    def to_pandas(self) -> Any:
        """A data frame with one row per layer.

        Returns:
            A data frame with the columns `layer` and `cosine`.

        Raises:
            TrimtabError: pandas is missing.
        """
        from trimtab.report.frames import frame

        return frame([{"layer": layer, "cosine": cosine} for layer, cosine in self.items()])

    def plot(self, ax: Any = None) -> Any:
        """Plot a bar for the cosine at each layer, blue above 0 and red below.

        Args:
            ax: The matplotlib axes to draw into; by default new ones.

        Returns:
            The axes.

        Raises:
            TrimtabError: matplotlib is missing, or `ax` isn't matplotlib axes.
        """
        from trimtab.report.axes import draw_cosine_bars

        return draw_cosine_bars(self, ax)

    def _repr_html_(self) -> str:
        from trimtab.report.notebook import cosines_html

        return str(cosines_html(self))
