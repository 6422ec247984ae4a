"""What one request to the service, and all of them together, may cost."""

from dataclasses import dataclass, fields

from mmssl.errors import UserError

MIB = 2**20


@dataclass(frozen=True)
class Limits:
    """Limits of the service; each is a number above zero. Raises UserError for others."""

    body: int = 16 * MIB
    """Bytes of a request's body."""
    pixels: int = 50_000_000
    """Height x width of a picture, or of a frame of a video."""
    seconds: float = 600.0
    """Length of a sound or a video."""
    classes: int = 200
    """Class names in a request."""
    templates: int = 20
    """Templates in a request; a set (``tasks.templates``) counts as one."""
    prompts: int = 1000
    """Class names times templates, sets taken apart: each costs a pass through the text tower."""
    letters: int = 100_000
    """Letters of all prompts together: each is split into tokens."""
    characters: int = 1000
    """Letters of a class name, a template or a text."""
    top: int = 200
    """Answers to a request."""
    queue: int = 64
    """Requests that are worked on or wait; one more is told to come again later."""
    connections: int = 500
    """That are open at a time; never more than half of the files that the process may open."""
    head_seconds: float = 10.0
    """From the opening of a connection, or a request's first byte, to the end of its headers."""
    body_seconds: float = 10.0
    """Without a byte of a body that is on its way."""
    request_seconds: float = 30.0
    """From a request's headers to its answer, and for the answer to be taken."""
    decode_seconds: float = 10.0
    """For the decoding of one upload."""
    decode_memory: int = 2048 * MIB
    """Bytes that a decoder may allocate."""
    decoders: int = 2
    """Uploads that are decoded at a time, each in a process of its own."""
    batch: int = 32
    """Signals that go through the model together."""
    window: float = 0.004
    """Seconds that a signal waits for others to go with; it does not where no other is on its way."""
    kept_classes: int = 64
    """Sets of class names whose vectors are kept."""

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if not (value > 0 or (field.name == "window" and value == 0)):
                raise UserError(f"the limit {field.name} is {value:g}; give a number above zero")
