"""Encoders with a way into a space that several modalities share: what CLIP leaves behind."""

import hashlib
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any, TypeAlias

import torch
from pydantic import Field
from torch import Tensor, nn

from mmssl.config import Piece, validate
from mmssl.contracts import Modality
from mmssl.data.guard import guarded
from mmssl.errors import UnusableData, UserError, nearest
from mmssl.files import digest
from mmssl.objectives.clip import SIGMOID_BIAS, Loss, Temperature, projection, unit
from modalities.encoder import MODALITIES, Encoder, encoder_folder, load
from modalities.heads import OnEncoder, has_head, read_head, write_head
from modalities.views import in_groups, over_views

NAME = "joint"


class JointFacts(Piece):
    """What a way into a joint space is made from."""

    dim: int = Field(gt=0)
    """Width of the joint space."""
    loss: Loss
    """What it was learned with."""
    projected: bool = True
    """Whether pooled vectors are projected, or are those of the joint space already."""
    towers: tuple[str, ...] = Field(min_length=2)
    """The modalities that share the space, the centre first."""
    export: str
    """What only towers that were written together have in common."""
    config: str
    """SHA-256 of the encoder's ``config.json``: that weights fit it does not say what the numbers of tokens mean."""


class JointEncoder(OnEncoder):
    """Turns files or signals of one modality into unit vectors that compare with those of the others."""

    def __init__(self, path: str | Path, signal: Mapping[str, Any] | None = None) -> None:
        """Load it, on the CPU, as ``mmssl.load`` does; raises UserError where the encoder has no way into such a space.

        ``path`` is an encoder folder of a run with several towers.
        """
        folder = encoder_folder(Path(path))
        self.reader = self.encoder = load(folder, signal)
        if not has_head(folder, NAME):
            raise UserError(
                f"{path} holds an encoder of modality {self.encoder.modality} alone, which compares with no other; one "
                "that was trained with objective.name 'clip' is needed"
            )
        stored, tensors = read_head(folder, NAME)
        self.facts = validate(JointFacts, stored, str(folder / f"{NAME}.json"))
        if self.facts.config != _config_digest(folder):
            raise UserError(f"{folder / 'config.json'} is not what it was when the encoder was written; copy it anew")
        head = nn.ModuleDict(
            {
                "projection": projection(self.encoder.dim, self.facts.dim) if self.facts.projected else nn.Identity(),
                "temperature": Temperature(1.0, SIGMOID_BIAS if self.facts.loss == "sigmoid" else None),
            }
        )
        try:
            head.load_state_dict(tensors)
        except RuntimeError as error:
            words = str(error).splitlines()[-1].strip()
            raise UserError(f"{folder}: {NAME}.safetensors does not fit {NAME}.json ({words})") from None
        bad = [name for name, tensor in tensors.items() if not tensor.isfinite().all()]
        if bad:
            raise UserError(f"{folder / NAME}.safetensors: {bad[0]} is NaN or infinite, so nothing can be compared")
        self.head = head.eval()
        if not self.temperature.scale() > 0:
            raise UserError(f"{folder}: the temperature in {NAME}.safetensors makes all similarities zero")

    @property
    def modality(self) -> str:
        """The encoder's."""
        return self.encoder.modality

    @property
    def kind(self) -> Modality:
        """The encoder's."""
        return self.encoder.kind

    @property
    def dim(self) -> int:
        """Width of the joint space."""
        return self.facts.dim

    @property
    def temperature(self) -> Temperature:
        """What similarities are to be multiplied with, as learned."""
        found = self.head["temperature"]
        assert isinstance(found, Temperature)
        return found

    def to(self, device: torch.device) -> "JointEncoder":
        """Move it to a device."""
        self.encoder.to(device)
        self.head.to(device)
        return self

    def embed(self, inputs: Any, batch_size: int | None = None) -> Tensor:
        """Return one unit vector per input, float32 [n, dim] on the CPU; inputs and errors as ``Encoder.embed``.

        Also raises ValueError for a signal with other channels, and UnusableData where a vector is NaN or infinite.
        """
        vectors: list[Tensor] = []
        for signals in self.encoder.batches(inputs, batch_size):
            for signal in signals:
                self._check(signal)
            vectors += in_groups(signals, lambda batch: self.features(batch).cpu())
        for i, vector in enumerate(vectors):
            if not vector.isfinite().all():
                raise UnusableData(f"input {i + 1} of {len(vectors)}: its vector is NaN or infinite")
        return torch.stack(vectors) if vectors else torch.empty(0, self.dim)

    def _check(self, signal: Tensor) -> None:
        axes, channels = self.encoder.axes, self.encoder.tokenizer.channels
        if signal.ndim not in (axes + 1, axes + 2) or signal.shape[-axes - 1] != channels:
            raise ValueError(
                f"a signal of modality {self.modality} has {channels} channels and {axes} more axes, but this one is "
                f"{list(signal.shape)}"
            )

    def seen(self, path: str) -> bytes:
        """Return a digest of what the encoder gets to see of a file or a text: one for all that it cannot tell apart.

        Raises BrokenFile.
        """
        signal = guarded(lambda name: self.transform(self.decode(name)), path, timeout=None)
        values = signal.contiguous().numpy().tobytes()
        return hashlib.sha256(f"{list(signal.shape)}".encode() + values).digest()

    @torch.no_grad()
    def features(self, signal: Tensor) -> Tensor:
        """Return unit vectors float32 [B, dim] for preprocessed signals [B, C, *size]; of several views the mean's."""

        def joint(x: Tensor) -> Tensor:
            return unit(self.head["projection"](self.encoder.features(x)))

        vectors = over_views(joint, signal, self.encoder.axes, self.encoder.most_signals)
        return unit(vectors.mean(1)) if vectors.ndim == 3 else vectors

    def fingerprint(self) -> str:
        """Return a SHA-256 over encoder and projection: what two share if they embed alike."""
        return self._fingerprint

    @cached_property
    def _fingerprint(self) -> str:
        return digest(self.head["projection"].state_dict(), f"{NAME} {self.encoder.fingerprint()}")


def joint_encoders(path: str | Path) -> dict[str, JointEncoder]:
    """Return the encoders of a run with several towers, by modality, the centre of their space first.

    They are in the folders ``encoder-MODALITY``; of other names none counts. Raises UserError for anything else, and
    for towers that were not written together; of one tower's own folder it names the run.
    """
    run = Path(path)
    if run.exists() and has_head(run, NAME):
        raise UserError(f"{path} is one of several towers; name the run that they are in: {run.absolute().parent}")
    found = {name: JointEncoder(folder) for name in MODALITIES if has_head(folder := run / f"encoder-{name}", NAME)}
    if not found:
        folder = encoder_folder(run)
        raise UserError(
            f"{path} has one encoder, {load(folder).modality}, and nothing to compare it with; a run with several "
            "towers (objective.name 'clip') is needed"
        )
    check_together(found, path)
    towers = next(iter(found.values())).facts.towers
    if set(found) != set(towers):
        raise UserError(
            f"{path} holds the towers {', '.join(found)}, but they were trained as {', '.join(towers)}; "
            "copy the run as a whole"
        )
    return {name: found[name] for name in towers}


Tower: TypeAlias = Encoder | JointEncoder
"""What turns files of one modality into vectors, with or without others of its space."""


def towers(path: str | Path) -> dict[str, Tower]:
    """Return what is in a folder, by modality: the towers of a run, one of them, or an encoder alone.

    Raises UserError, one sentence, where there is none.
    """
    run = Path(path)
    if has_head(run, NAME):
        one = JointEncoder(run)
        return {one.modality: one}
    if any(has_head(run / f"encoder-{name}", NAME) for name in MODALITIES):
        return dict(joint_encoders(run))
    alone = load(run)
    return {alone.modality: alone}


def check_together(encoders: Mapping[str, JointEncoder], path: str | Path) -> None:
    """Raise UserError, naming the two, where towers are not of one space as it was at one step of one run."""
    for name, one in encoders.items():
        if one.modality != name:
            raise UserError(f"{path}: what is called tower {name} is an encoder of modality {one.modality}")
    (first, centre), *others = encoders.items()
    for name, other in others:
        for key in ("towers", "dim", "loss", "export"):
            own, its = getattr(centre.facts, key), getattr(other.facts, key)
            if own != its:
                how = "another step or another run" if key == "export" else f"{key} {_said(own)} and {_said(its)}"
                raise UserError(
                    f"{path}: the towers {first} and {name} were not written together ({how}), so that their vectors "
                    "do not compare; copy a run as a whole, or --resume one that was cut off"
                )


def _said(value: Any) -> str:
    return ",".join(value) if isinstance(value, tuple) else str(value)


def of_modality(encoders: Mapping[str, JointEncoder], modality: str, path: str | Path) -> JointEncoder:
    """Return the tower of a modality; raises UserError naming those that there are."""
    if modality not in encoders:
        raise UserError(f"{path} has no tower of modality '{modality}'{nearest(modality, encoders)}")
    return encoders[modality]


def save_joint(folder: Path, facts: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Write a way into a joint space (see ``Keeps.kept``) into an encoder folder."""
    others = ", ".join(facts["towers"])
    write_head(
        folder,
        NAME,
        {**facts, "config": _config_digest(folder)},
        tensors,
        f"the way into a space of {facts['dim']} dimensions that {others} share",
        "vectors of its `JointEncoder` compare by their inner products.\n\n"
        '```python\nfrom mmssl import JointEncoder\nvectors = JointEncoder("this/folder").embed(["a-file"])\n```',
    )


def _config_digest(folder: Path) -> str:
    return hashlib.sha256((folder / "config.json").read_bytes()).hexdigest()
