"""How a run is doing, in words, from its lines of metrics alone: which signs are bad, what helps, and why it is well.

Rules go by the names of metrics, so that an objective only has to report them:

``trivial``: the loss of the best guess that ignores the input, of the same batch. ``scale`` (of similarities: one over
the temperature), ``teacher_entropy`` (nats) and ``queue_age`` (steps) each with ``NAME_most``: the limit of the scale,
the entropy of a uniform teacher, and the age from which keys are too old. ``padding``: the share of what is predicted
that is padding. The loop and the engines report ``loss``, ``lr``, ``grad_norm``, ``wait`` and ``skipped``, and
``mmssl.health`` the encoders' ``health.rank`` and ``health.std``.
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from statistics import fmean, median
from typing import Any, NamedTuple

FEW = 3
"""So many lines in a row must agree before something is called bad."""
KEPT = 20
"""Lines at either end of a run that are looked at."""
SETTLED = 100
"""Steps after the warm-up from which on something should have been learned."""
LEAST_STD = 0.02
LEAST_RANK = 2.0
NOTHING = 0.01
"""A loss that is not lower than guessing by more than this share has learned nothing."""
AT_LIMIT = 0.995
STEEP, FLAT = 100.0, 1e-4
"""Times the usual gradient norm that it has grown to or fallen to."""
WAITING, SKIPPING = 0.5, 0.1


class Finding(NamedTuple):
    """A bad sign."""

    key: str
    """Which, so that each is told once."""
    what: str
    """In words, with numbers."""
    hint: str
    """What to do about it."""

    def __str__(self) -> str:
        return f"{self.what}: {self.hint}"


class Verdict(NamedTuple):
    """What a run's metrics say of it."""

    word: str
    """healthy, doubtful, or unknown."""
    grounds: str
    """What is good, or why nothing can be said."""
    findings: tuple[Finding, ...] = ()

    def __str__(self) -> str:
        parts = [str(finding) for finding in self.findings] or [self.grounds]
        return f"{'health unknown' if self.word == 'unknown' else self.word}: {'; '.join(parts)}"

    def as_dict(self) -> dict[str, Any]:
        """Return plain values."""
        findings = [finding._asdict() for finding in self.findings]
        return {"verdict": self.word, "grounds": self.grounds, "findings": findings}


Line = Mapping[str, float]


class History:
    """What is remembered of a run's lines of metrics: some at its beginning and some at its end."""

    def __init__(self, steps: int | None = None) -> None:
        """``steps`` are those of the whole run, where that is known."""
        self.steps = steps
        self.first: list[Line] = []
        self.recent: deque[Line] = deque(maxlen=KEPT)
        self.settled_at: float | None = None
        """The step from which on the learning rate has not grown."""

    def add(self, line: Line) -> None:
        """Take the next line."""
        before = self.recent[-1].get("lr", 0.0) if self.recent else -1.0
        if line.get("lr", 0.0) > before:
            self.settled_at = None
        elif self.settled_at is None:
            self.settled_at = line["step"]
        if len(self.first) < KEPT:
            self.first.append(line)
        self.recent.append(line)

    def last(self, key: str, count: int = FEW) -> list[float]:
        """Return a metric's last ``count`` values; none where it is not in each of these lines."""
        lines = list(self.recent)[-count:]
        return [line[key] for line in lines] if len(lines) == count and all(key in line for line in lines) else []

    @property
    def settled(self) -> bool:
        """Whether the warm-up has been over for long enough to have learned something."""
        return self.settled_at is not None and self.recent[-1]["step"] - self.settled_at >= SETTLED

    @property
    def ended(self) -> bool:
        """Whether the last step of the run was taken."""
        return self.steps is not None and bool(self.recent) and self.recent[-1]["step"] >= self.steps

    @property
    def guessing(self) -> bool:
        """Whether the loss is still no better than that of guessing."""
        loss, trivial = self.last("loss"), self.last("trivial")
        return bool(trivial) and fmean(trivial) > 0 and fmean(loss) >= (1 - NOTHING) * fmean(trivial)

    @property
    def names(self) -> list[str]:
        """The metrics of the last line."""
        return list(self.recent[-1]) if self.recent else []


def verdict(history: History) -> Verdict:
    """Judge a run by what is remembered of it."""
    if len(history.recent) < FEW:
        return Verdict("unknown", f"{len(history.recent)} lines of metrics are too few to tell")
    findings = tuple(finding for rule in RULES for finding in rule(history))
    if not findings and (history.guessing or not history.settled):
        return Verdict("unknown", f"too early to tell: {grounds(history)}")
    return Verdict("doubtful" if findings else "healthy", grounds(history), findings)


def judge(lines: Iterable[Line], steps: int | None = None) -> Verdict:
    """Judge a run by all its lines; ``steps`` are those of the whole run, where that is known."""
    history = History(steps)
    for line in lines:
        history.add(line)
    return verdict(history)


def grounds(history: History) -> str:
    """Return what speaks for a run."""
    loss, trivial = history.last("loss"), history.last("trivial")
    if trivial and fmean(trivial) > 0:
        share, of_guessing = 1 - fmean(loss) / fmean(trivial), f"{fmean(trivial):.3g} of guessing without a look at the"
        where = f"{100 * share:.0f} % below" if share >= NOTHING else "above" if share < 0 else "about"
        words = [f"the loss is {fmean(loss):.3g}, {where} the {of_guessing} input"]
        if share < NOTHING and fmean(loss) < (1 - NOTHING) * history.first[0]["loss"]:
            words = [f"{words[0]}, and falls"]
    else:
        words = [f"the loss went from {history.first[0]['loss']:.3g} to {fmean(loss):.3g}"]
    for name in history.names:
        tower, dot, rest = name.rpartition("health.")
        if dot and rest == "rank" and (rank := history.last(name)) and (std := history.last(f"{tower}health.std")):
            whose = f"{tower.rstrip('.')} features" if tower else "features"
            words.append(f"{whose} spread in {fmean(rank):.1f} directions (deviation {fmean(std):.2f} of 1)")
    return ", ".join(words)


def _collapse(history: History) -> Iterator[Finding]:
    for name in history.names:
        tower, dot, rest = name.rpartition("health.")
        if not dot or rest != "std":
            continue
        std, rank = history.last(name), history.last(f"{tower}health.rank")
        whose = f"the {tower.rstrip('.')} encoder" if tower else "the encoder"
        if std and max(std) < LEAST_STD:
            yield Finding(
                name, f"{whose} says nearly the same of everything (feature deviation {std[-1]:.2g} of 1)",
                "its features have collapsed; lower optim.lr, or lengthen optim.warmup",
            )  # fmt: skip
        elif rank and max(rank) < LEAST_RANK:
            yield Finding(
                f"{tower}health.rank", f"{whose}'s features differ in {rank[-1]:.1f} directions only",
                "they have collapsed onto a line; lower optim.lr, or look whether the files differ in one thing alone",
            )  # fmt: skip


def _guessing(history: History) -> Iterator[Finding]:
    loss, trivial = history.last("loss", 3 * FEW), history.last("trivial", 3 * FEW)
    if not loss or not history.settled:
        return
    if trivial and min(trivial) > 0:
        shares = [one / guess for one, guess in zip(loss, trivial, strict=True)]
        falls = fmean(shares[-FEW:]) < (1 - NOTHING) * fmean(shares[:FEW])
        if history.guessing and falls and history.ended:
            yield Finding(
                "trivial", f"the loss, {fmean(loss[-FEW:]):.4g}, ends no better than guessing without a look at the "
                f"input ({fmean(trivial[-FEW:]):.4g}), but falls", "train longer, or raise optim.lr",
            )  # fmt: skip
        elif history.guessing and not falls:
            yield Finding(
                "trivial", f"the loss, {fmean(loss[-FEW:]):.4g}, is no better than guessing without a look at the "
                f"input ({fmean(trivial[-FEW:]):.4g}), as if it were explained by the mean",
                "raise optim.lr or train longer, and look whether targets can be predicted from what is seen",
            )  # fmt: skip
    elif fmean(loss[-FEW:]) >= (1 - NOTHING) * fmean([line["loss"] for line in history.first[:FEW]]):
        yield Finding(
            "loss", f"the loss has not fallen since the beginning ({fmean(loss[-FEW:]):.4g})",
            "raise optim.lr, or look at a few samples as they are trained on",
        )  # fmt: skip


def _limits(history: History) -> Iterator[Finding]:
    scale, most = history.last("scale", 2 * FEW), history.last("scale_most", 2 * FEW)
    if scale and min(scale) >= AT_LIMIT * most[-1]:
        yield Finding(
            "scale", f"the temperature has been at its limit ({1 / most[-1]:.3g}) for {2 * FEW} lines",
            "similarities can get no sharper, which is usual late in a long run; early in one, lower optim.lr or start "
            "from a higher objective.temperature",
        )  # fmt: skip
    entropy, uniform = history.last("teacher_entropy"), history.last("teacher_entropy_most")
    if entropy and uniform and max(entropy) < NOTHING * uniform[-1]:
        yield Finding(
            "teacher_entropy", f"the teacher gives everything one prototype (entropy {entropy[-1]:.2g} nats)",
            "it has collapsed; centre it faster, or raise its temperature",
        )  # fmt: skip
    elif entropy and uniform and min(entropy) > (1 - NOTHING) * uniform[-1]:
        yield Finding(
            "teacher_entropy", f"the teacher cannot tell prototypes apart (entropy {entropy[-1]:.3g} of "
            f"{uniform[-1]:.3g} nats)", "it has become uniform; lower its temperature",
        )  # fmt: skip
    age, oldest = history.last("queue_age"), history.last("queue_age_most")
    if age and oldest and min(age) > oldest[-1]:
        yield Finding(
            "queue_age", f"keys in the queue are {age[-1]:.0f} steps old on average, {oldest[-1]:.0f} is too old",
            "shorten the queue, or raise the batch or the teacher's momentum",
        )  # fmt: skip


def _padding(history: History) -> Iterator[Finding]:
    padding = history.last("padding")
    if padding and min(padding) > 0:
        yield Finding(
            "padding", f"{100 * padding[-1]:.0f} % of what is predicted is padding, which explains part of the loss",
            "do not score padding",
        )  # fmt: skip


def _gradient(history: History) -> Iterator[Finding]:
    norm = history.last("grad_norm")
    usual = median([line["grad_norm"] for line in history.first if "grad_norm" in line] or [0.0])
    if not norm or usual <= 0 or not history.settled:
        return
    if min(norm) > STEEP * usual:
        yield Finding(
            "grad_norm", f"the gradient norm has grown from {usual:.2g} to {norm[-1]:.2g}",
            "training is about to diverge; lower optim.lr, or set optim.clip",
        )  # fmt: skip
    elif max(norm) < FLAT * usual:
        yield Finding(
            "grad_norm", f"the gradient norm has fallen from {usual:.2g} to {norm[-1]:.2g}",
            "nothing is learned any more; stop here, or make the task harder",
        )  # fmt: skip


def _pace(history: History) -> Iterator[Finding]:
    wait, skipped = history.last("wait", 2 * FEW), history.last("skipped", 2 * FEW)
    if wait and median(wait) > WAITING:
        yield Finding(
            "wait", f"{100 * median(wait):.0f} % of the time goes into waiting for data",
            "raise data.workers, make files smaller (mmssl data shrink) or pack them into shards (mmssl data pack)",
        )  # fmt: skip
    if skipped and fmean(skipped) > SKIPPING:
        yield Finding(
            "skipped", f"{100 * fmean(skipped):.0f} % of the steps are left out, for their gradient overflows float16",
            "use train.precision=bf16, or lower optim.lr",
        )  # fmt: skip


RULES: tuple[Callable[[History], Iterator[Finding]], ...] = (_collapse, _guessing, _limits, _padding, _gradient, _pace)
