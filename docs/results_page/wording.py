"""How the sides of a study are called: in charts as they are, in Markdown so that every letter of a name is seen."""

import re

from mpp.report.settings import LONGER, RANDOM, SCRATCH

_TOLD = {SCRATCH: "from scratch", LONGER: "from scratch, longer", RANDOM: "random initialisation"}
_MARKUP = re.compile(r"([\\`*_~\[\]<>&])")  # a stroke is the table's to escape


def told(side: str) -> str:
    """A side in words."""
    return _TOLD.get(side, side)


def shown(side: str) -> str:
    r"""A side in words within Markdown: "[mask] late" -> "\[mask\] late", which is no link."""
    return _MARKUP.sub(r"\\\1", told(side))
