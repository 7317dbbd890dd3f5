"""Addresses on the page: those of papers, and nothing that a browser would run."""

from __future__ import annotations

import re

from .check import is_web
from .markup import Markup, escape, tag


def paper_address(text: str) -> str | None:
    """The web address of an arXiv number, a DOI or an address; None for other words.

    Example:
        >>> paper_address("arXiv:2403.07378"), paper_address("a talk")
        ('https://arxiv.org/abs/2403.07378', None)
    """
    words = text.strip()
    if match := re.fullmatch(r"arxiv:\s*([\w./-]+)", words, re.IGNORECASE):
        return f"https://arxiv.org/abs/{match[1]}"
    if match := re.fullmatch(r"doi:\s*(10\.[\w./;()-]+)", words, re.IGNORECASE):
        return f"https://doi.org/{match[1]}"
    return words if is_web(words) else None


def link(href: str, text: str) -> Markup:
    """A link that names no referrer; other schemes than http stay text."""
    return tag("a", {"href": href, "rel": "noopener noreferrer"}, text) if is_web(href) else escape(text)
