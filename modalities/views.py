"""Signals of several sizes, and several views of one file: how a function of batches goes over them."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor


def in_groups(signals: Sequence[Tensor], function: Callable[[Tensor], Tensor]) -> list[Tensor]:
    """Return the rows of ``function([B, C, *size])`` for signals [C, *size], in their order.

    Signals of one size go through together, and nothing is padded.
    """
    groups: dict[torch.Size, list[int]] = {}
    for i, signal in enumerate(signals):
        groups.setdefault(signal.shape, []).append(i)
    rows: dict[int, Tensor] = {}
    for group in groups.values():
        rows.update(zip(group, function(torch.stack([signals[i] for i in group])), strict=True))
    return [rows[i] for i in range(len(signals))]


def over_views(function: Callable[[Tensor], Tensor], signal: Tensor, axes: int, limit: int | None = None) -> Tensor:
    """Return ``function`` of signals [B, C, *size] with so many axes; of several views [B, V, C, *size] a row for each.

    So [B, ...], or [B, V, ...]. Of several views at most ``limit`` signals go through at a time; all if None.
    """
    if signal.ndim == axes + 2:
        return function(signal)
    views = signal.flatten(0, 1)
    rows = torch.cat([function(part) for part in views.split(limit or len(views))])
    return rows.unflatten(0, signal.shape[:2])  # type: ignore[no-any-return]


def one_view(signal: Tensor, axes: int) -> Tensor:
    """Return a signal [C, *size]; of several views [V, C, *size] the middle one."""
    return signal if signal.ndim == axes + 1 else signal[len(signal) // 2]
