"""The page's theme, style and scripts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gradio as gr

HERE = Path(__file__).parent


STATES = """
html[data-tt-said] #tt-examples { display: none; }
html:not([data-tt-busy]) #tt-stop { visibility: hidden; }
@media (max-width: 700px) { html:not([data-tt-busy]) #tt-stop { display: none; } }
#tt-teller {
  position: absolute; width: 1px; height: 1px; overflow: hidden; clip-path: inset(50%); white-space: nowrap;
}
"""
"""Styles that depend on the attributes that the script sets on the root; Gradio restricts other styles to its own
elements.
"""


def theme() -> gr.themes.Base:
    """Gradio's plainest theme in the system's own fonts: nothing is loaded from other hosts.

    It only changes colors with a contrast below 4.5:1.
    """
    base = gr.themes.Base(
        primary_hue=gr.themes.colors.blue,
        neutral_hue=gr.themes.colors.gray,
        font=["system-ui", "-apple-system", "Segoe UI", "sans-serif"],
        font_mono=["ui-monospace", "SFMono-Regular", "Menlo", "monospace"],
    )
    soft, soft_dark = "*neutral_600", "*neutral_300"
    return base.set(
        body_text_color_subdued=soft,
        body_text_color_subdued_dark=soft_dark,
        block_info_text_color=soft,
        block_info_text_color_dark=soft_dark,
        block_title_text_color="*neutral_700",
        block_title_text_color_dark="*neutral_200",
        block_label_text_color="*neutral_700",
        block_label_text_color_dark="*neutral_200",
        input_placeholder_color=soft,
        input_placeholder_color_dark="*neutral_400",
        button_primary_background_fill="*primary_700",
        button_primary_background_fill_dark="*primary_700",
        button_primary_background_fill_hover="*primary_800",
        button_primary_background_fill_hover_dark="*primary_600",
        color_accent="*primary_700",
        slider_color="*primary_600",
    )


def options() -> dict[str, Any]:
    """Theme, style and scripts, as arguments of `mount_gradio_app`."""
    stream = (HERE / "stream.js").read_text(encoding="utf-8")
    return {
        "theme": theme(),
        "head": f"<style>{STATES}</style><script>{stream}</script>",  # runs before Gradio sends a request
        "css": (HERE / "page.css").read_text(encoding="utf-8"),
        "js": (HERE / "page.js").read_text(encoding="utf-8"),
    }
