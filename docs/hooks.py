"""Hooks of MkDocs: formulas become MathML, so pages need no script from a server; reports are added."""

from __future__ import annotations

import html
import re
import sys
from pathlib import Path

from latex2mathml.converter import convert
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

sys.path.insert(0, str(Path(__file__).parent))
import experiment_pages

INLINE = re.compile(r'<span class="arithmatex">\\\((.*?)\\\)</span>', re.DOTALL)
BLOCK = re.compile(r'<div class="arithmatex">\s*\\\[(.*?)\\\]\s*</div>', re.DOTALL)


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the report of each experiment to the site, one page with everything inline."""
    for folder in experiment_pages.experiments():
        files.append(
            File.generated(
                config, f"experiments/{folder.name}-report.html", content=experiment_pages.html(folder)
            )
        )
    return files


def on_page_content(content: str, **_: object) -> str:
    """Replace the formulas that the arithmatex extension has marked."""
    content = BLOCK.sub(lambda match: convert(html.unescape(match[1]), display="block"), content)
    return INLINE.sub(lambda match: convert(html.unescape(match[1])), content)
