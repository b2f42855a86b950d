"""The page to try the server on, at ``/``: one file, which asks nobody but this server."""

from __future__ import annotations

import base64
import hashlib
import re
from importlib.resources import files
from typing import TYPE_CHECKING

from fastapi.responses import HTMLResponse

if TYPE_CHECKING:
    from synthia_vllm.http.application import Application


def attach(app: Application) -> None:
    """Add the route. The page holds no secret, so it needs no key; what it asks for does."""
    html = files("synthia_vllm.api").joinpath("playground.html").read_text(encoding="utf-8")
    headers = {
        "content-security-policy": _policy(html),
        "cache-control": "no-cache",
        "referrer-policy": "no-referrer",
        "x-content-type-options": "nosniff",
        "x-frame-options": "DENY",
    }

    @app.get("/", include_in_schema=False)
    async def page() -> HTMLResponse:
        return HTMLResponse(html, headers=headers)


def _policy(html: str) -> str:
    """What the page may do: run its own script and style, known by their hashes, and ask us."""

    def own(tag: str) -> str:
        [content] = re.findall(rf"<{tag}>(.*?)</{tag}>", html, re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
        return f"'sha256-{digest}'"

    return "; ".join(
        (
            "default-src 'none'",
            f"script-src {own('script')}",
            f"style-src {own('style')}",
            "connect-src 'self'",
            "img-src data:",  # the empty icon, which keeps browsers from asking for one
            "base-uri 'none'",
            "form-action 'none'",
            "frame-ancestors 'none'",
        )
    )
