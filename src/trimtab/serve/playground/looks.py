"""How the page looks, and the little that it does in the browser itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gradio as gr

HERE = Path(__file__).parent


def theme() -> gr.themes.Base:
    """Gradio's plainest theme in the system's own fonts: nothing is fetched from elsewhere."""
    return gr.themes.Base(
        primary_hue=gr.themes.colors.blue,
        neutral_hue=gr.themes.colors.gray,
        font=["system-ui", "-apple-system", "Segoe UI", "sans-serif"],
        font_mono=["ui-monospace", "SFMono-Regular", "Menlo", "monospace"],
    )


def options() -> dict[str, Any]:
    """Theme, style and scripts, as `mount_gradio_app` takes them."""
    stream = (HERE / "stream.js").read_text(encoding="utf-8")
    return {
        "theme": theme(),
        "head": f"<script>{stream}</script>",  # at the head it runs before Gradio asks for anything
        "css": (HERE / "page.css").read_text(encoding="utf-8"),
        "js": (HERE / "page.js").read_text(encoding="utf-8"),
    }
