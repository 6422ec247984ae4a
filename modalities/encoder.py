"""The encoder: tokenizer + backbone + pooling. All that pre-training leaves behind and downstream work needs."""

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
import torch.nn.functional as F
from pydantic import Field, SerializeAsAny, create_model
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from mmssl.backbones import BACKBONES
from mmssl.backbones.vit import ViTConfig
from mmssl.config import BackboneConfig, Piece, one_of, override, validate
from mmssl.contracts import Backbone, Batch, Grid, Modality, Pooling, State, Streams, StreamsSignal, Tokenizer, Widens
from mmssl.data.guard import BrokenFile, guarded
from mmssl.data.listing import Listing, list_files
from mmssl.errors import UnusableData, UserError, nearest, sibling
from mmssl.files import digest, replacing_folder, save_tensors, write_json
from mmssl.heads.classifier import pooled
from modalities.audio import Audio
from modalities.image import Image
from modalities.text import Text
from modalities.video import Video
from modalities.views import in_groups, one_view, over_views

MODALITIES: dict[str, Modality] = {"image": Image(), "video": Video(), "audio": Audio(), "text": Text()}
FORMAT = 1
DECODE_TIMEOUT = 30.0
BATCH_VALUES = 64 * 3 * 224 * 224
"""Numbers in a batch of signals that an encoder is given at once, where nobody says how many: 64 pictures, 4 clips."""
CHUNK = 1000
"""Tokens above which a signal goes through chunk by chunk where an encoder can: 10 s of sound, as in CPC."""


class ModelConfig(Piece):
    """What is learned: a tokenizer (typed by the modality), a backbone and how its tokens become one vector."""

    tokenizer: SerializeAsAny[Piece] = Piece()
    backbone: SerializeAsAny[BackboneConfig] = ViTConfig()
    cls_token: bool = True
    """Put a learned class token in front; a backbone that reads tokens in their order has none."""
    output: Literal["context", "latent"] = "context"
    """What the encoder gives for a token: what the backbone made of it, or the embedded patch itself, as for pictures
    in CPC, whose backbone (the context, of the rows above alone) is then needed in pre-training only."""
    pool: Pooling = "mean"
    """One vector per signal: the mean of its tokens, the class token, or the last token that is no padding (the end of
    a text)."""

    @property
    def blocks(self) -> int:
        """Through how many blocks tokens go to become what the encoder gives."""
        return self.backbone.depth if self.output == "context" else 0


class EncoderConfig(Piece):
    """Everything that an encoder is made from. ``signal`` and ``model.tokenizer`` are typed by ``modality``."""

    modality: str
    signal: SerializeAsAny[Piece]
    model: ModelConfig


C = TypeVar("C", bound=EncoderConfig)


def typed(base: type[C], modality: str, where: str, **fields: Any) -> type[C]:
    """Return ``base`` with ``signal`` and ``model.tokenizer`` typed by the modality, and further typed ``fields``."""
    if not isinstance(modality, str) or modality not in MODALITIES:
        raise UserError(f"{where}: '{modality}' is not a modality{nearest(str(modality), MODALITIES)}")
    kind = MODALITIES[modality]
    model = create_model(
        "Model",
        __base__=ModelConfig,
        tokenizer=(one_of(*kind.tokenizer_types), Field(default_factory=kind.tokenizer_types[0])),
        backbone=(one_of(*BACKBONES), Field(default_factory=BACKBONES[0])),
    )
    return create_model(
        base.__name__,
        __base__=base,
        signal=(kind.signal_type, Field(default_factory=kind.signal_type)),
        model=(model, Field(default_factory=model)),
        **fields,
    )


class Encoder(nn.Module):
    """Turns files or tensors into vectors. ``load`` makes it from what a run wrote."""

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        kind, model = MODALITIES[config.modality], config.model
        settings: BackboneConfig = model.backbone
        self._tokenizer = kind.tokenizer(config.signal, model.tokenizer, settings.reads)
        # An encoder sees one signal at a time, whatever it was trained on.
        config = config.model_copy(update={"signal": kind.alone(config.signal)})
        self.config, self.kind = config, kind
        self.modality = config.modality
        self.pooling: Pooling = model.pool
        self.output: Literal["context", "latent"] = model.output
        self.backbone: Backbone = settings.build()
        self.dim = settings.dim if model.output == "context" else settings.reads
        self.num_prefix = int(model.cls_token)
        if model.pool == "cls" and not model.cls_token:
            raise ValueError("model.pool 'cls' needs model.cls_token true")
        if model.cls_token and (settings.causal or model.output == "latent"):
            raise ValueError(
                f"model.cls_token true needs a backbone that looks at all tokens, and its output; with backbone "
                f"'{settings.name}' and output '{model.output}' set model.cls_token=false"
            )
        self.cls_token = nn.Parameter(torch.randn(self.dim) * 0.02) if model.cls_token else None

    @property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer, which cuts, embeds and restores patches."""
        return self._tokenizer

    @property
    def preprocess(self) -> dict[str, Any]:
        """What is done to a decoded file before it is cut into tokens: sizes, statistics, interpolation."""
        return self.config.signal.model_dump(mode="json")

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.parameters()).device

    def forward(
        self,
        patches: Tensor,
        index: Tensor | None = None,
        seeds: Tensor | None = None,
        grid: Grid | None = None,
        pad: Tensor | None = None,
    ) -> Tensor:
        """Encode the patches [B, N, P] at ``index`` [B, K] (all if None): [B, num_prefix + K, dim].

        Nobody attends to the patches where ``pad`` [B, N] is True.
        """
        if pad is not None:
            pad = F.pad(pad if index is None else pad.gather(1, index), (self.num_prefix, 0))
        tokens = self._embed(patches, index, grid)
        return tokens if self.output == "latent" else self.backbone(tokens, pad, seeds, grid)

    def new_backbone(self) -> Backbone:
        """Return another backbone of the same settings, freshly initialised."""
        settings: BackboneConfig = self.config.model.backbone
        return settings.build()

    @torch.no_grad()
    def step(self, chunk: Tensor, state: tuple[State, State] | None = None) -> tuple[Tensor, tuple[State, State]]:
        """Encode the next chunk of preprocessed signals as it comes in: a vector per token, and what to remember.

        ``chunk`` is [B, C, n * hop], the vectors are [B, n, dim]; without ``state`` it is the first chunk. However a
        signal is cut, its vectors are those of the whole. Raises ValueError for an encoder that looks at whole signals,
        for a chunk of another shape or type, and for a state of other signals.
        """
        tokenizer, backbone = self._tokenizer, self.backbone
        if not isinstance(tokenizer, StreamsSignal) or not isinstance(backbone, Streams):
            raise ValueError("this encoder looks at whole signals: to stream, tokenizer and backbone must be causal")
        if chunk.ndim != 3 or chunk.shape[1] != self._tokenizer.channels or not chunk.is_floating_point():
            raise ValueError(
                f"a chunk must be float [B, {self._tokenizer.channels}, n * {tokenizer.hop}], but this one is "
                f"{chunk.dtype} {list(chunk.shape)}"
            )
        for part in () if state is None else (*state[0], *state[1]):
            if len(part) != len(chunk):
                raise ValueError(f"a chunk of {len(chunk)} signals cannot go on from a state of {len(part)}")
        before, past = (None, None) if state is None else state
        tokens, before = tokenizer.step(chunk.to(self.device, torch.float32), before)
        if self.output == "latent":
            return tokens, (before, ())
        vectors, past = backbone.step(tokens, past)
        return vectors, (before, past)

    def _embed(self, patches: Tensor, index: Tensor | None, grid: Grid | None) -> Tensor:
        tokens = self._tokenizer.embed(patches, index, grid)
        if self.cls_token is None:
            return tokens
        return torch.cat([self.cls_token.to(tokens.dtype).expand(tokens.shape[0], 1, -1), tokens], dim=1)

    def pool(self, latent: Tensor, pad: Tensor | None = None) -> Tensor:
        """Pool [B, num_prefix + N, dim] to [B, dim]; tokens where ``pad`` [B, N] is True do not count."""
        return pooled(latent, self.num_prefix, self.pooling, pad)

    @torch.no_grad()
    def features(self, signal: Tensor) -> Tensor:
        """Return float32 [B, dim] for preprocessed signals [B, C, *size] of any size that the patches divide.

        Of several views, [B, V, C, *size], the vectors are averaged.
        """
        vectors = over_views(lambda x: self.pool(*self._latent(x)).float(), signal, self.axes, self.most_signals)
        return vectors.mean(1) if vectors.ndim == 3 else vectors

    def _latent(self, signal: Tensor) -> tuple[Tensor, Tensor | None]:
        training = self.training
        self.eval()
        try:
            batch = {"signal": signal.to(self.device, torch.float32)}
            grid, pad = self._tokenizer.grid_of(signal.shape[2:]), self._tokenizer.pad(batch)
            if grid[0] > CHUNK and isinstance(self._tokenizer, StreamsSignal) and isinstance(self.backbone, Streams):
                return self._chunked(batch["signal"]), pad
            return self(self._tokenizer.patches(batch), grid=grid, pad=pad), pad
        finally:
            self.train(training)

    def _chunked(self, signal: Tensor) -> Tensor:
        # In halves: what is kept for the next chunk is views of inner layers, so that those of two chunks are there.
        state, vectors = None, []
        for chunk in signal.split(CHUNK // 2 * self._tokenizer.patch_dim, -1):
            found, state = self.step(chunk, state)
            vectors.append(found)
        return torch.cat(vectors, 1)

    @property
    def axes(self) -> int:
        """How many axes a signal has besides its channels."""
        return len(self._tokenizer.size)

    @property
    def batch_size(self) -> int:
        """How many files to encode at once where nobody says so: 64 pictures of 224 pixels, fewer large ones."""
        return max(1, min(256, self.most_signals // math.prod(getattr(self.config.signal, "views", ()))))

    @property
    def most_signals(self) -> int:
        """How many signals, also views of one file, go through together: about the memory of 64 pictures."""
        signal, tokenizer = self.config.signal, self._tokenizer
        longer = (getattr(signal, "longest", None) or 0) / getattr(signal, "seconds", 1)
        widens = tokenizer.widens if isinstance(tokenizer, Widens) else 1
        return max(1, int(BATCH_VALUES // (tokenizer.channels * math.prod(tokenizer.size) * max(1.0, longer) * widens)))

    @property
    def decode(self) -> Callable[[str], Any]:
        """The modality's decoder: a path to a decoded signal; raises ``BrokenFile``."""
        return self.kind.decode

    @cached_property
    def transform(self) -> Callable[[Any], Tensor]:
        """The evaluation transform: a decoded signal to float32 [C, *size]."""
        return self.kind.eval_transform(self.config.signal, self.config.model.tokenizer)

    def read(self, path: str) -> Tensor:
        """Return a file's evaluation signal, [C, *size] or several views of it; raises UnusableData naming the file."""
        try:
            return guarded(lambda name: self.transform(self.decode(name)), path, DECODE_TIMEOUT)
        except BrokenFile as error:
            raise UnusableData(f"{path}: {error.reason}") from None

    def embed(self, inputs: Any, batch_size: int | None = None) -> Tensor:
        """Return one vector per input: float32 [n, dim] on the CPU.

        ``inputs`` is a list of paths, decoded signals (PIL pictures) or preprocessed float tensors [C, *size]; or one
        such tensor [n, C, *size]; or one of any of these. Raises UnusableData naming the first file that is broken.
        """
        vectors: list[Tensor] = []
        for signals in self.batches(inputs, batch_size):
            vectors += in_groups(signals, lambda batch: self.features(batch).cpu())
        return torch.stack(vectors) if vectors else torch.empty(0, self.dim)

    @torch.no_grad()
    def tokens(self, inputs: Any, batch_size: int | None = None) -> tuple[Tensor, Grid]:
        """Return one vector per patch, float32 [n, N, dim] on the CPU, and their grid; inputs as ``embed``.

        Of a file with several views it is the middle one's. Raises ValueError where the inputs have different grids.
        """
        parts: list[Tensor] = []
        grids: set[Grid] = set()
        for signals in self.batches(inputs, batch_size):
            signals = [one_view(signal, self.axes) for signal in signals]
            grids |= {self._tokenizer.grid_of(signal.shape[1:]) for signal in signals}
            if len(grids) > 1:
                raise ValueError(f"the inputs have different token grids ({sorted(grids)}): ask for one at a time")
            parts.append(self._latent(torch.stack(signals))[0][:, self.num_prefix :].float().cpu())
        return torch.cat(parts) if parts else torch.empty(
            0, 0, self.dim
        ), grids.pop() if grids else self._tokenizer.grid

    def files(self, path: str | Path, split: str | None = None) -> Listing:
        """Return the files of the encoder's modality in a folder, a manifest or one file: what evaluations take."""
        return list_files(path, self.kind, split=split)

    def batches(self, inputs: Any, batch_size: int | None = None) -> Iterator[list[Tensor]]:
        """Yield the preprocessed signals float [C, *size] of inputs as ``embed`` takes them, so many at a time."""
        batch_size = self.batch_size if batch_size is None else batch_size
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, but got {batch_size}")
        single = inputs.ndim == 1 + self.axes if isinstance(inputs, Tensor) else False
        if single or not isinstance(inputs, Sequence | Tensor) or isinstance(inputs, str):
            inputs = [inputs]
        for start in range(0, len(inputs), batch_size):
            signals = [self._signal(item) for item in inputs[start : start + batch_size]]
            for signal in signals:
                if not signal.is_floating_point():
                    raise ValueError(f"a tensor must be a preprocessed float signal, but this one is {signal.dtype}")
            yield signals

    def _signal(self, item: Any) -> Tensor:
        if isinstance(item, Tensor):
            return item
        return self.read(str(item)) if isinstance(item, str | Path) else self.transform(item)

    def layers(self, batch: Batch) -> list[Tensor]:
        """Return what every block puts out for the signals of a batch: tensors [B, num_prefix + N, dim], normalised.

        Each goes through the final norm, as in DINO's evaluation, so the last one is what ``forward`` returns. Where
        the encoder gives embedded patches, they are the one layer.
        """
        tokenizer = self._tokenizer
        grid, pad = tokenizer.grid_of(batch["signal"].shape[2:]), tokenizer.pad(batch)
        tokens = self._embed(tokenizer.patches(batch), None, grid)
        if self.output == "latent":
            return [tokens]
        pad = None if pad is None else F.pad(pad, (self.num_prefix, 0))
        return self.backbone.layers(tokens, pad, batch.get("seed"), grid)

    def fingerprint(self) -> str:
        """Return a SHA-256 over weights and preprocessing: what two encoders share if they embed alike."""
        return digest(self.state_dict(), json.dumps(self.config.model_dump(mode="json"), sort_keys=True))

    def save(self, folder: Path | str, state: Mapping[str, Tensor] | None = None) -> None:
        """Write an encoder folder (safetensors and JSON), with the tensors of ``state`` instead of its own if given."""
        state = self.state_dict() if state is None else state
        config = self.config.model_dump(mode="json", include={"modality", "model"})
        shape = {"dim": self.dim, "grid": list(self._tokenizer.grid)}
        with replacing_folder(Path(folder)) as aside:
            save_tensors(aside / "model.safetensors", state)
            write_json(aside / "config.json", {"format": FORMAT, **config, **shape})
            write_json(aside / "preprocess.json", self.preprocess)
            (aside / "README.md").write_text(_card(self, sum(t.numel() for t in state.values())), encoding="utf-8")


def _card(encoder: Encoder, parameters: int) -> str:
    return f"""# An encoder made with mmssl (modality: {encoder.modality})

{parameters:,} parameters, {encoder.dim} values per vector, token grid {" x ".join(map(str, encoder._tokenizer.grid))}.

```python
from mmssl import load
encoder = load("this/folder")
vectors = encoder.embed(["a-file", "another"])  # float32 [2, {encoder.dim}]
```

`model.safetensors` holds the weights, `config.json` what they fit into, `preprocess.json` what is done to a file first.
"""


def load(path: str | Path, signal: Mapping[str, Any] | None = None) -> Encoder:
    """Return the encoder in an encoder folder, a run folder (its last encoder) or a ``model.safetensors`` file.

    ``signal`` are settings of ``preprocess`` to read files otherwise than it was trained with, such as more views.
    Raises UserError, one sentence, for anything else; needs neither DeepSpeed nor the data.
    """
    folder = encoder_folder(Path(path))
    changes = {key.removeprefix("signal."): value for key, value in (signal or {}).items()}
    try:
        stored = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        preprocess = json.loads((folder / "preprocess.json").read_text(encoding="utf-8"))
        tensors = load_file(folder / "model.safetensors")
    except (OSError, ValueError, SafetensorError) as error:
        raise UserError(f"{folder}: not a readable encoder folder ({error})") from None
    if not isinstance(stored, dict):
        raise UserError(f"{folder}/config.json: not a mapping")
    if stored.get("format") != FORMAT:
        raise UserError(f"{folder}: written in format {stored.get('format')}, but this mmssl reads format {FORMAT}")
    config = validate(
        typed(EncoderConfig, str(stored.get("modality")), str(folder)),
        {"modality": stored["modality"], "model": stored.get("model"), "signal": override(preprocess, changes)},
        f"{folder}/config.json",
    )
    try:
        encoder = Encoder(config)
        # Signals of another size have the positions that the encoder's own size makes of them.
        encoder.tokenizer.learned_on(tuple(stored["grid"]))
    except (KeyError, TypeError) as error:
        raise UserError(f"{folder}/config.json: its token grid cannot be read ({error})") from None
    except ValueError as error:
        raise UserError(f"{folder}: {error}") from None
    try:
        encoder.load_state_dict(tensors)
    except RuntimeError as error:
        raise UserError(
            f"{folder}: the weights do not fit the configuration ({str(error).splitlines()[-1].strip()})"
        ) from None
    return encoder.eval()


def encoder_folder(path: Path) -> Path:
    """Return the encoder folder that a path means; raises UserError where there is none or more than one."""
    if not path.exists():
        raise UserError(f"{path} does not exist{sibling(path)}")
    if path.is_file():
        if path.suffix not in (".safetensors", ".json"):
            raise UserError(f"{path} is a {path.suffix or 'nameless'} file, but an encoder folder or a run is needed")
        path = path.parent
    if (path / "model.safetensors").is_file() and (path / "config.json").is_file():
        return path
    found = sorted(p for p in path.glob("encoder*") if (p / "model.safetensors").is_file())
    if len(found) == 1:
        return found[0]
    if found:
        raise UserError(f"{path} holds {len(found)} encoders: name one of {', '.join(map(str, found))}")
    if (path / "config.yaml").is_file():
        raise UserError(f"{path} is a run that has written no encoder yet")
    inside = sorted(p.parent.parent for p in path.glob("*/encoder*/model.safetensors"))
    if inside:
        raise UserError(f"{path} holds {len(inside)} runs: name one of {', '.join(map(str, inside[:8]))}")
    raise UserError(f"{path} is neither an encoder folder nor a run (no model.safetensors in it)")
