"""`hasten techniques`: what there is, with parameters and sources."""

from __future__ import annotations

import dataclasses
from inspect import cleandoc
from typing import Annotated, get_type_hints

import typer
from rich.table import Table

from hasten.cli.common import out, reports_errors


@reports_errors
def techniques(
    name: Annotated[str | None, typer.Argument(help="Show one technique with its parameters.")] = None,
) -> None:
    """List the techniques, or show one with its parameters, source and claims."""
    from hasten.core.registry import technique

    if name is None:
        out.print(_overview())
        out.print(_recipes())
        out.print("Show one with its parameters: hasten techniques NAME", highlight=False)
        return
    cls = technique(name)
    out.print(f"[bold]{name}[/]\n{cleandoc(cls.__doc__ or '')}\n", highlight=False)
    out.print(_parameters(name))
    out.print(f"Source: {cls.paper or 'our own'}", highlight=False, soft_wrap=True)
    out.print(f"The picture {'may change' if cls.lossy else 'stays the same up to rounding'}.", highlight=False)


def _overview() -> Table:
    from hasten.core.registry import family, techniques

    table = Table("technique", "family", "picture", "what it does", title="Techniques", title_justify="left")
    for name, cls in techniques().items():
        table.add_row(name, family(cls), "may change" if cls.lossy else "same", _first_sentence(cls))
    return table


def _recipes() -> Table:
    from hasten.core.expression import named_recipes

    table = Table("recipe", "techniques", title="Recipes that have a name", title_justify="left")
    for name, recipe in named_recipes().items():
        table.add_row(name, "nothing" if not recipe.techniques else str(recipe))
    return table


def _first_sentence(cls: type) -> str:
    return cleandoc(cls.__doc__ or "").split("\n\n")[0].replace("\n", " ").split(". ")[0].rstrip(".") + "."


def _parameters(name: str) -> Table:
    from hasten.core.registry import technique
    from hasten.core.technique import describe_type

    cls = technique(name)
    hints = get_type_hints(cls)
    table = Table("parameter", "type", "default", "meaning", title="Parameters", title_justify="left")
    for item in cls.settings().values():
        default = "required" if item.default is dataclasses.MISSING else repr(item.default)
        table.add_row(item.name, describe_type(hints[item.name]), default, str(item.metadata.get("about", "")))
    return table
