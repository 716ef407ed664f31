"""One page about one scaling law: what it says, how far it can be trusted, and the full record of how it was made."""

from __future__ import annotations

from html import escape
from pathlib import Path

from landscape_ray.analysis.scaling import PAGE_NAME, ScalingFit
from landscape_ray.files import write_atomic
from landscape_ray.reports import fit_figures, fit_section
from landscape_ray.reports.figures import Figure
from landscape_ray.reports.markup import head
from landscape_ray.reports.page import block, page_of

ANCHORS = (
    ("law", "The law"),
    ("measured", "Against what was measured"),
    ("unseen", "On what it has not seen"),
    ("record", "How it was made and checked"),
)


def write_page(found: ScalingFit, folder: Path) -> Path:
    """Write the page into a folder and return its path."""
    path = folder / PAGE_NAME
    write_atomic(path, render(found))
    return path


def render(found: ScalingFit) -> str:
    """Return the page as HTML."""
    drawn = figures(found)
    by_key = {figure.key: figure for figure in drawn}
    bodies = {
        "law": block(by_key["law"]) + fit_section.numbers(found),
        "measured": "".join(block(figure) for figure in drawn if figure.key not in ("law", "regret")),
        "unseen": fit_section.beyond(found) + (block(by_key["regret"]) if "regret" in by_key else ""),
        "record": fit_section.record(found.fit) + fit_section.excluded(found.excluded),
    }
    facts = ["landscape_ray law", found.source, found.law.name]
    title = (found.law.title or found.law.name).capitalize()
    parts = [head(title, facts, ANCHORS), fit_section.summary(found)]
    parts += [f'<section><h2 id="{key}">{escape(name)}</h2>{bodies[key]}</section>' for key, name in ANCHORS]
    return page_of(f"{found.law.name}: {found.source}", parts, drawn)


def figures(found: ScalingFit) -> list[Figure]:
    """Return the figures of the page, in order."""
    return fit_figures.figures(found)
