"""What a service can do: the towers, classifier or encoder in a folder, behind the calls that its routes make.

It decides nothing that the Python API does not: names, scores and vectors come from ``ZeroShotClassifier``,
``JointEncoder``, ``Classifier`` and ``Encoder``.
"""

import asyncio
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from mmssl.data import inline
from mmssl.data.guard import BrokenFile, guarded
from mmssl.errors import MmsslError, UserError, is_out_of_memory, nearest
from modalities.classifier import NAME as CLASSIFIER
from modalities.classifier import Classifier, Prediction
from modalities.encoder import MODALITIES, Encoder, encoder_folder
from modalities.heads import has_head
from modalities.joint import JointEncoder, Tower, towers
from tasks.build import default_device
from tasks.serve_batch import Batcher
from tasks.serve_limits import Limits
from tasks.serve_media import LARGE, Decoders
from tasks.serve_problem import Problem
from tasks.templates import chosen, fill
from tasks.zero_shot_classifier import TEXT, ZeroShotClassifier

T = TypeVar("T")
PIECE = 32
"""Prompts that are embedded at a time, about: between two pieces others have their turn."""
WORDS = {"image": "pictures", "video": "videos", "audio": "sounds", "text": "texts"}
Key = tuple[str, tuple[str, ...], tuple[str, ...]]


class Upload(NamedTuple):
    """A file that came with a request."""

    data: bytes
    name: str
    """As its sender calls it: only its suffix is looked at."""
    media_type: str


class Opened(NamedTuple):
    """What is in a folder: towers of one space, or an encoder alone, perhaps with a classifier on it."""

    towers: Mapping[str, Tower]
    joint: Mapping[str, JointEncoder]
    """The same where they share a space, else nothing."""
    classifier: Classifier | None


def opened(path: str | Path) -> Opened:
    """Return what a run's or an encoder's folder holds, on the device that there is; raises UserError, one sentence."""
    found, device, classifier = towers(path), default_device(), None
    # One of several towers compares with no names, but with others of its kind.
    joint = {name: tower for name, tower in found.items() if isinstance(tower, JointEncoder) and len(found) > 1}
    if all(isinstance(tower, Encoder) for tower in found.values()):
        folder = encoder_folder(Path(path))
        if has_head(folder, CLASSIFIER):
            classifier = Classifier(folder).to(device)
            found = {classifier.encoder.modality: classifier.encoder}
    for tower in found.values():
        tower.to(device)
    return Opened(found, joint, classifier)


@dataclass
class _Making:
    """Vectors of class names on their way, and how many requests wait for them."""

    task: "asyncio.Task[ZeroShotClassifier]"
    waiting: int = 0


class Models:
    """The models of a service. Its coroutines raise Problem, for whatever is wrong with a request."""

    def __init__(
        self,
        opened: Opened,
        limits: Limits,
        batched: Callable[[int], None] = lambda size: None,
        looked_up: Callable[[bool], None] = lambda found: None,
    ) -> None:
        """Start the threads; ``batched`` gets the size of every batch, ``looked_up`` whether classes were known."""
        self.towers, self.joint, self.classifier = opened
        self.limits = limits
        self.decoders = Decoders(limits)
        self.decoders.warm()
        self.batcher = Batcher(limits.window, limits.batch, batched)
        self._texts = ThreadPoolExecutor(1, thread_name_prefix="classes")
        self._looked_up = looked_up
        # Both are the event loop's: a look costs nothing, and what several ask for at once is made once.
        self._known: OrderedDict[Key, ZeroShotClassifier] = OrderedDict()
        self._making: dict[Key, _Making] = {}

    def close(self) -> None:
        """Finish what is there and end the threads."""
        self._texts.shutdown(cancel_futures=True)
        self.batcher.close()
        self.decoders.close()

    @property
    def able(self) -> dict[str, bool]:
        """What can be asked for, by the route's name."""
        return {
            "zero-shot": TEXT in self.joint and len(self.joint) > 1,
            "classify": self.classifier is not None,
            "embed": True,
        }

    @property
    def suffixes(self) -> list[str]:
        """Which files can be read, by their suffixes."""
        return sorted(set().union(*(tower.kind.suffixes for tower in self.towers.values())))

    async def zero_shot(
        self, upload: Upload, classes: Sequence[str], templates: Sequence[str], top: int | None, modality: str | None
    ) -> list[Prediction]:
        """Return [{"label", "score"}, ...] for a file, best first."""
        if not self.able["zero-shot"]:
            what = f"an encoder of modality {next(iter(self.towers))} alone"
            raise Problem(404, f"this service has {what}, which compares with no class names; embed answers for it")
        tower = self.tower(upload, modality, [name for name in self.towers if name != TEXT], "names")
        self._check_prompts(classes, templates)
        with self.batcher.coming():
            # The classes first: names that cannot be told apart cost no decoding.
            classify = await self._classifier((tower.modality, tuple(classes), tuple(templates)))
            signal = await self._signal(tower, upload)
        vector = await self._vector(tower, signal)
        return classify.ranked(vector[None] @ classify.class_vectors.T, top)[0]

    async def classify(self, upload: Upload, top: int | None) -> list[Prediction]:
        """Return [{"label", "score"}, ...] of the classes that the encoder was fine-tuned on."""
        if self.classifier is None:
            raise Problem(404, "this service has no encoder that was fine-tuned on classes; zero-shot takes your own")
        self.tower(upload, None, [self.classifier.encoder.modality], "names")
        with self.batcher.coming():
            signal = await self._signal(self.classifier.encoder, upload)
        logits = await self._vector(self.classifier, signal)
        return self.classifier.ranked(logits[None], top)[0]

    async def embed(self, upload: Upload | None, text: str | None, modality: str | None) -> tuple[str, Tensor]:
        """Return the modality and the vector float32 [d] of a file or a text."""
        if (upload is None) == (text is None):
            raise Problem(422, "give a file or a text" + (", not both" if upload is not None else ""))
        if text is not None:
            tower = self._of_texts(modality)
            signal = await self._asked(lambda: self._text_signal(tower, text))
            return TEXT, await self._vector(tower, signal)
        assert upload is not None
        tower = self.tower(upload, modality, list(self.towers), "reads")
        with self.batcher.coming():
            signal = await self._signal(tower, upload)
        return tower.modality, await self._vector(tower, signal)

    def tower(self, upload: Upload, modality: str | None, names: Sequence[str], does: str) -> Tower:
        """Return the tower that reads a file: of ``modality``, else by suffix, else by media type, else the first one.

        Raises Problem for a suffix that is of another modality; ``does`` is what the service does with those ``names``.
        """
        if modality is not None:
            if modality not in names:
                raise Problem(422, f"modality '{modality}' is none that is read here{nearest(modality, names)}")
            return self.towers[modality]
        suffix, kind = Path(upload.name).suffix.lower(), upload.media_type.partition("/")[0]
        # A GIF is a picture and a video: of equals, the first tower is meant.
        fit = [name for name in names if suffix in self.towers[name].kind.suffixes]
        if not fit and any(suffix in one.suffixes for one in MODALITIES.values()):
            what = " and ".join(", ".join(WORDS[name] for name in names).rsplit(", ", 1))
            raise Problem(415, f"this service {does} {what}, and {Path(upload.name).name} is a {suffix} file")
        return self.towers[(fit or [name for name in names if name == kind] or names)[0]]

    # What the parts of a request become

    async def _signal(self, tower: Tower, upload: Upload) -> Tensor:
        if not upload.data:
            raise Problem(422, "the file is empty")
        suffix = Path(upload.name).suffix.lower()
        suffix = suffix if suffix in tower.kind.suffixes else ""
        try:
            return await self.decoders.signal(tower, upload.data, suffix)
        except BrokenFile as error:
            large = error.reason.startswith((LARGE, "absurdly l"))
            words = error.reason.removesuffix(": cannot identify image file")
            raise Problem(413 if large else 422, f"the file cannot be read as {tower.modality}: {words}") from None

    async def _vector(self, model: Tower | Classifier, signal: Tensor) -> Tensor:
        try:
            vector = await self.batcher.features(model, signal)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            raise Problem(413, "the file is too large for the memory of this service") from None
        if not vector.isfinite().all():
            raise Problem(422, "the model's answer to this file is NaN or infinite")
        return vector

    async def _asked(self, function: Callable[[], T]) -> T:
        with _told():
            return await self.batcher.call(function)

    def _of_texts(self, modality: str | None) -> Tower:
        if TEXT not in self.towers:
            raise Problem(422, f"this service reads no texts, but {' and '.join(self.towers)}; give a file")
        if modality not in (None, TEXT):
            raise Problem(422, f"a text is of modality text, not '{modality}'")
        return self.towers[TEXT]

    def _text_signal(self, tower: Tower, text: str) -> Tensor:
        # As the path that it is itself: what a stranger writes must never be taken for the name of a file.
        return guarded(lambda path: tower.transform(tower.decode(path)), inline.join(text), timeout=None)

    def _check_prompts(self, classes: Sequence[str], templates: Sequence[str]) -> None:
        try:
            sentences = chosen(templates or None)
        except UserError as error:
            raise Problem(422, str(error)) from None
        prompts = len(classes) * len(sentences)
        if prompts > self.limits.prompts:
            raise Problem(422, f"classes times templates are {prompts} prompts, and {self.limits.prompts} are allowed")
        letters = sum(len(fill(sentence, name)) for sentence in sentences for name in classes)
        if letters > self.limits.letters:
            raise Problem(422, f"the prompts have {letters} letters, and {self.limits.letters} are allowed")

    async def _classifier(self, key: Key) -> ZeroShotClassifier:
        known = self._known.get(key)
        self._looked_up(known is not None)
        if known is not None:
            self._known.move_to_end(key)
            return known
        if key not in self._making:
            self._making[key] = _Making(asyncio.create_task(self._made(key)))
            self._making[key].task.add_done_callback(partial(self._keep, key))
        making = self._making[key]
        making.waiting += 1
        try:
            with _told():
                # Whoever asked first may leave while others wait.
                return await asyncio.shield(making.task)
        finally:
            making.waiting -= 1
            if making.waiting == 0 and self._making.get(key) is making:
                del self._making[key]  # who comes now begins anew
                making.task.cancel()

    async def _made(self, key: Key) -> ZeroShotClassifier:
        modality, classes, templates = key
        # Nothing of what a stranger sends is kept on the disk.
        make = partial(ZeroShotClassifier, self.joint, templates=templates or None, modality=modality, cache=None)
        # This reads all prompts, but no model is asked.
        made = await asyncio.get_running_loop().run_in_executor(self._texts, make, classes)

        def vectors(some: Sequence[str]) -> Tensor:
            return make(some).class_vectors

        # The vector of a class is its own prompts' alone.
        pieces = _split(classes, max(2, PIECE // len(made.templates)))
        parts = [await self.batcher.call(partial(vectors, some)) for some in pieces]
        made.class_vectors = torch.cat(parts)
        return made

    def _keep(self, key: Key, made: "asyncio.Task[ZeroShotClassifier]") -> None:
        if key in self._making and self._making[key].task is made:
            del self._making[key]
        if made.cancelled() or made.exception() is not None:
            return
        self._known[key] = made.result()
        while len(self._known) > self.limits.kept_classes:
            self._known.popitem(last=False)


def _split(classes: Sequence[str], least: int) -> list[Sequence[str]]:
    """Return the classes in parts of at least so many, where there are so many: one alone is told from nothing."""
    parts = max(1, len(classes) // least)
    return [classes[i * len(classes) // parts : (i + 1) * len(classes) // parts] for i in range(parts)]


@contextmanager
def _told() -> Iterator[None]:
    """Make problems of what is wrong with the words of a request."""
    try:
        yield
    except BrokenFile as error:
        raise Problem(422, f"the text cannot be used: {error.reason}") from None
    except MmsslError as error:
        raise Problem(422, str(error)) from None
