"""The run folder: what a run writes, where, and how it says how it is doing."""

import json
from pathlib import Path
from typing import Any, Literal, Self

from mmssl.config import dump_yaml
from mmssl.errors import UserError
from mmssl.files import replacing_file, to_json, write_json
from mmssl.locks import Lock

State = Literal["running", "done", "stopped", "failed"]


class Run:
    """A run folder.

    It holds ``config.yaml``, ``metrics.jsonl``, ``checkpoints/``, ``objective/``, ``encoder/``, ``status.json``,
    ``ledger.jsonl``, ``report.html`` and, if asked for, ``samples.jsonl``.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.checkpoints = self.path / "checkpoints"
        self.metrics_file = self.path / "metrics.jsonl"
        self.samples_file = self.path / "samples.jsonl"
        self.ledger_file = self.path / "ledger.jsonl"
        self.config_file = self.path / "config.yaml"
        self.report_file = self.path / "report.html"
        self._held: Lock | None = None

    def create(self, config: dict[str, Any]) -> None:
        """Make the folder and write the resolved configuration; UserError where something is in the way."""
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"{self.path}: cannot be a run folder ({error.strerror})") from None
        if any(self.path.iterdir()):
            hint = (
                "give --resume to continue it or another --out" if self.config_file.exists() else "give another --out"
            )
            raise UserError(f"{self.path} is not empty; {hint}")
        self.checkpoints.mkdir()
        with replacing_file(self.config_file) as aside:
            aside.write_text(dump_yaml(config), encoding="utf-8")

    def hold(self) -> None:
        """Keep other processes out of the folder for as long as this one lives; UserError where one is in it."""
        self._held = Lock(self.path / ".lock")
        if not self._held.take():
            self.__exit__()
            raise UserError(f"{self.path}: another process is writing this run; wait for it or stop it")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_error: object) -> None:
        """Let other processes in again."""
        if self._held is not None:
            self._held.release()

    def encoder_folder(self, modality: str, alone: bool) -> Path:
        """Return where an encoder goes: ``encoder/``, or ``encoder-MODALITY/`` where there are several."""
        return self.path / ("encoder" if alone else f"encoder-{modality}")

    def status(self, state: State, step: int, steps: int, **more: Any) -> None:
        """Write ``status.json``."""
        write_json(self.path / "status.json", {"state": state, "step": step, "steps": steps, **more})

    @property
    def steps(self) -> int | None:
        """The steps that the whole run takes, as ``status.json`` says; None where there is none."""
        file = self.path / "status.json"
        return json.loads(file.read_text(encoding="utf-8"))["steps"] if file.is_file() else None

    def metrics(self) -> list[dict[str, Any]]:
        """Return the lines of ``metrics.jsonl``; a last line that was cut off by a kill is left out."""
        return read_lines(self.metrics_file)

    def log(self, record: dict[str, Any]) -> None:
        """Append one line to ``metrics.jsonl``."""
        with self.metrics_file.open("a", encoding="utf-8") as file:
            file.write(to_json(record) + "\n")

    def rewind(self, step: int) -> None:
        """Drop the metrics and the samples after ``step``: a resumed run will write them again."""
        for file in filter(Path.exists, (self.metrics_file, self.samples_file)):
            kept = [record for record in read_lines(file) if record["step"] <= step]
            with replacing_file(file) as aside:
                aside.write_text("".join(to_json(record) + "\n" for record in kept), encoding="utf-8")


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Return the objects in a file of JSON lines, none where there is no file; a line cut off by a kill ends it."""
    lines = []
    for text in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        try:
            lines.append(json.loads(text))
        except ValueError:
            break
    return lines
