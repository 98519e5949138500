"""The report of a comparison: a table for the terminal and one self-contained HTML file."""

from __future__ import annotations

from hasten.measure.report.html import render_html
from hasten.measure.report.table import render_table

__all__ = ["render_html", "render_table"]
