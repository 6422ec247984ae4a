"""The list of files that were skipped and why, one JSON object per line."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any


class Ledger:
    """An append-only JSON-lines file with one line per broken file, however often the file is met.

    An existing file is read first, so that a resumed run goes on counting; a line that a killed run left half written
    is passed over. With ``path`` None the ledger lives in memory only; with ``write`` False, as on all ranks but the
    first, the file is read and then counted on in memory.
    """

    def __init__(self, path: Path | None, write: bool = True) -> None:
        self.path = path if write else None
        self._seen: set[str] = set()
        self._torn = False
        if path is not None and path.exists():
            text = path.read_text(encoding="utf-8", errors="replace")
            self._torn = not text.endswith("\n") and text != ""
            self._seen = {name for line in text.splitlines() if (name := _path_of(line)) is not None}

    @property
    def count(self) -> int:
        """How many different files are in the ledger."""
        return len(self._seen)

    def add(self, path: str, reason: str, **more: Any) -> None:
        """Note that ``path`` is broken, with JSON values ``more`` on its line; a path already there is left alone."""
        if path in self._seen:
            return
        self._seen.add(path)
        self._write({"path": path, "reason": reason, **more})

    def note(self, text: str) -> None:
        """Write down what is to be known of the files as a whole; it counts as none."""
        self._write({"note": text})

    def _write(self, entry: Mapping[str, Any]) -> None:
        if self.path is None:
            return
        # Opened and closed each time: broken files are rare, and what is written survives a kill.
        with self.path.open("a", encoding="utf-8") as file:
            file.write("\n" * self._torn + json.dumps(entry) + "\n")
        self._torn = False


def _path_of(line: str) -> str | None:
    try:
        entry = json.loads(line)
    except json.JSONDecodeError:
        return None
    return entry["path"] if isinstance(entry, dict) and isinstance(entry.get("path"), str) else None
