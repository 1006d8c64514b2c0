"""What the header of a mechanism's file says of it: what is scored, shared, trained, remembered."""

from __future__ import annotations

import importlib
import re

FACTS = ("Scored", "Shared", "Trained by", "Remembered")
MECHANISMS = ("dense", "window", "moba", "infllm2", "nsa", "dsa", "msa")


def header_of(mechanism: str) -> str:
    """The whole header of openmsa/mechanisms/`mechanism`.py."""
    return importlib.import_module(f"openmsa.mechanisms.{mechanism}").__doc__


def facts_of(mechanism: str) -> dict[str, str]:
    """{"Scored": "blocks of keys ...", ...}: the sentences of its paragraph that begin so.

    Raises ValueError for a header that lacks one of FACTS.
    """
    names = "|".join(FACTS)
    pattern = rf"(?:^|(?<=[.;] ))({names}): (.*?)(?=(?: (?:{names}): )|$)"
    for paragraph in header_of(mechanism).split("\n\n"):
        found = dict(re.findall(pattern, " ".join(paragraph.split())))
        if found:
            if missing := [fact for fact in FACTS if fact not in found]:
                raise ValueError(f"the header of {mechanism} does not say {missing[0]!r}")
            return found
    raise ValueError(f"the header of {mechanism} has no paragraph that begins with 'Scored:'")


def title_of(mechanism: str) -> str:
    """The first line of its header, without the equations' sources."""
    first = " ".join(header_of(mechanism).strip().split("\n\n")[0].split())
    return re.sub(r",(?: equations \d+ to \d+)? in our letters.*", "", first).rstrip(".")
