"""Names of weights: those of original repositories and of tools, and what they are in diffusers. One file a family."""

from __future__ import annotations

from collections.abc import Collection

from hasten.core.errors import HastenError, UnknownName
from hasten.formats.format import Reader
from hasten.formats.keys import dit, flux, qwen_image, sd3, text_encoders, unet, vae, wan, z_image
from hasten.formats.keys.naming import Naming, Recognized, Renamed, from_diffusers, recognize, to_diffusers

NAMINGS: tuple[Naming, ...] = tuple(
    naming
    for family in (flux, sd3, wan, qwen_image, z_image, unet, dit, text_encoders, vae)
    for naming in family.NAMINGS
)
"""All namings, the more particular first."""


def architectures() -> list[str]:
    """Names of the architectures whose weights are known by name."""
    return list(dict.fromkeys(naming.architecture for naming in NAMINGS))


def recognized(names: Collection[str], architecture: str = "auto") -> Recognized:
    """Which architecture and naming a file has. Raises HastenError, which names what is known, if none fits."""
    if architecture != "auto" and architecture not in architectures():
        raise UnknownName("architecture", architecture, architectures())
    chosen = [naming for naming in NAMINGS if architecture in ("auto", naming.architecture)]
    found = recognize(names, chosen)
    if found is None:
        raise HastenError(_unrecognized(names, architecture, chosen))
    return found


def in_scheme(reader: Reader, scheme: str, architecture: str = "auto") -> Reader:
    """The same weights under the names of a scheme, such as "diffusers" or "original"."""
    found = recognized(reader.names(), architecture)
    same = found.naming.scheme == scheme
    if same and not found.prefix:
        return reader
    ours = Renamed(reader, to_diffusers(reader.names(), found))
    if scheme == "diffusers":
        return ours
    naming = _of_scheme(found.naming.architecture, scheme)
    return Renamed(ours, from_diffusers(ours.names(), naming))


def _of_scheme(architecture: str, scheme: str) -> Naming:
    known = {naming.scheme: naming for naming in NAMINGS if naming.architecture == architecture}
    if scheme not in known:
        raise UnknownName(f"naming of {architecture}", scheme, known)
    return known[scheme]


def _unrecognized(names: Collection[str], architecture: str, chosen: list[Naming]) -> str:
    first = ", ".join(sorted(names)[:3])
    if architecture == "auto":
        return f"No architecture is known whose weights have names like {first}. Known: {', '.join(architectures())}."
    marks = " or ".join(naming.marks[0] for naming in chosen)
    return f"These are no weights of {architecture}: there is no {marks}, but {first}."
