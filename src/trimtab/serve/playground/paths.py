"""The paths of the page, and the security headers of its responses.

Gradio has more routes than the page needs: files by path, uploads, a proxy. They can't be reached: a path that isn't
listed here goes to the API, which answers 404.
"""

from __future__ import annotations

import re

PAGE = re.compile(
    r"/(?:|config|theme\.css|favicon\.ico|manifest\.json"
    r"|(?:assets|static|svelte)/[A-Za-z0-9_@][A-Za-z0-9_@.-]*(?:/[A-Za-z0-9_@][A-Za-z0-9_@.-]*)*"
    r"|gradio_api/(?:info|app_id|startup-events|cancel|reset|queue/join|queue/data|heartbeat/[A-Za-z0-9]+))"
)

JOIN = "/gradio_api/queue/join"
"""Where the page requests work."""
DATA = "/gradio_api/queue/data"
"""Where it reads the results."""
STREAMS = re.compile(r"/gradio_api/(?:queue/data|heartbeat/[A-Za-z0-9]+)")
"""Where its responses stay open."""

HEADERS = (
    (
        b"content-security-policy",
        b"default-src 'self' data: blob:; script-src 'self' 'unsafe-inline' 'unsafe-eval' blob:;"
        b" style-src 'self' 'unsafe-inline'; connect-src 'self'; frame-ancestors 'none'; form-action 'none'",
    ),
    (b"referrer-policy", b"no-referrer"),
)
"""The page loads nothing from other hosts and sends no referrer, whatever Gradio's own page asks for."""


def is_page(path: str) -> bool:
    """Whether this path belongs to the page."""
    return PAGE.fullmatch(path) is not None
