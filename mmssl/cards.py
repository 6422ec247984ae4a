"""What graphics cards can do at most, to say how much of it a run uses and how long one would take.

Dense products with an fp32 sum, in TFLOP/s (10^12 floating-point operations per second), from the vendors' data sheets:
where these name sparse products, half of it. fp32 means fp32 outside the tensor cores, as torch multiplies unless it is
told to round.
"""

import re
from collections.abc import Mapping
from typing import NamedTuple

from mmssl.errors import UserError, nearest


class Card(NamedTuple):
    """A kind of card."""

    memory: float
    """In GB."""
    tflops: Mapping[str, float]
    """By precision; one that it lacks is left out."""


def _card(memory: float, half: float, fp32: float, bf16: bool = True) -> Card:
    return Card(memory, {"fp32": fp32, "fp16": half} | ({"bf16": half} if bf16 else {}))


CARDS: Mapping[str, Card] = {
    "b200": _card(180, 2250, 75),
    "h200": _card(141, 989, 67),
    "h100": _card(80, 989, 67),
    "h100-nvl": _card(94, 835, 60),
    "h100-pcie": _card(80, 756, 51),
    "a100": _card(80, 312, 19.5),
    "a100-40gb": _card(40, 312, 19.5),
    "a40": _card(48, 149.7, 37.4),
    "a10": _card(24, 125, 31.2),
    "l40s": _card(48, 362, 91.6),
    "l4": _card(24, 121, 30.3),
    "rtx-a6000": _card(48, 154.8, 38.7),
    "rtx-4090": _card(24, 165.2, 82.6),
    "rtx-3090": _card(24, 71, 35.6),
    "v100": _card(32, 125, 15.7, bf16=False),
    "t4": _card(16, 65, 8.1, bf16=False),
}
"""By the words that a driver's name for the card holds."""


def card(name: str) -> Card:
    """Return a card of the table; UserError, with the nearest name, for any other."""
    if name not in CARDS:
        hint = nearest(name, CARDS)
        raise UserError(f"'{name}' is not a card that is known here{hint}; of another, give --tflops and --memory")
    return CARDS[name]


def recognised(device: str) -> Card | None:
    """Return the card that a driver calls ``device``, such as "NVIDIA H100 80GB HBM3"; None if it is none of these."""
    words = set(re.split(r"[\s-]+", device.lower()))
    found = [name for name in CARDS if words >= set(name.split("-"))]
    return CARDS[max(found, key=lambda name: name.count("-"))] if found else None
