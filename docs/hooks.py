"""Hooks of MkDocs: formulas become MathML while the site is built, so pages need no script from a server."""

from __future__ import annotations

import html
import re

from latex2mathml.converter import convert

INLINE = re.compile(r'<span class="arithmatex">\\\((.*?)\\\)</span>', re.DOTALL)
BLOCK = re.compile(r'<div class="arithmatex">\s*\\\[(.*?)\\\]\s*</div>', re.DOTALL)


def on_page_content(content: str, **_: object) -> str:
    """Replace the formulas that the arithmatex extension has marked."""
    content = BLOCK.sub(lambda match: convert(html.unescape(match[1]), display="block"), content)
    return INLINE.sub(lambda match: convert(html.unescape(match[1])), content)
