"""A hook of the site: Sphinx roles in docstrings become plain code, ``:func:`~fasc.a.b``` → ``b``."""

import re
from typing import Any

_ROLE = re.compile(r":(?:func|class|meth|mod|attr|data):\s*<code>(~?)([^<]*)</code>")


def on_page_content(html: str, **_: Any) -> str:
    """Called by mkdocs with each page."""
    return _ROLE.sub(lambda role: f"<code>{role[2].rpartition('.')[2] if role[1] else role[2]}</code>", html)
