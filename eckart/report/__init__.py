"""What a run leaves for people to read: one HTML file, the same data as JSON, and a model card.

Example:
    >>> from eckart.report import check, model_card, render, save
"""

from .card import model_card
from .check import check
from .html import render, save
from .schema import Report

__all__ = ["Report", "check", "model_card", "render", "save"]
