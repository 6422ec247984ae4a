"""What everything that reads files raises where one cannot be used."""


class BrokenFile(Exception):
    """A file that cannot be decoded; ``reason`` is one clause such as "truncated" or "empty file"."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason
