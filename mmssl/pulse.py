"""The pulse of this process: whatever takes long says now and then that it gets on, and ``engine.watch`` counts."""

_beats = 0


def beat() -> None:
    """Say that this process gets on."""
    global _beats
    _beats += 1


def beats() -> int:
    """Return how often it got on by now."""
    return _beats
