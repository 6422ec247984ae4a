"""How a rank's part of the batch can be cut to fit into memory, and what each way takes."""

from bisect import bisect_right
from collections.abc import Callable, Sequence

from mmssl.cost import Footprint, between
from mmssl.errors import UserError
from tasks.build import Recipe, measure_memory, sketch_objective
from tasks.fit import dividing

TOLERANCE = 0.01
"""By so much, relative, may a peak differ from the line through two others for lines to be trusted."""


class Cuts:
    """The sizes into which a rank's part of the batch can be cut: micro-batches that are accumulated, or the chunks of
    an objective that compares the samples of a micro-batch, which must stay whole.

    Tracing a step of a large model takes seconds, and its bytes are all but linear in the size. So two sizes are
    traced, a third tells whether those between lie on the line, and where they do not, each is traced.
    """

    def __init__(self, recipe: Recipe, ranks: int) -> None:
        """Raises UserError where the batch does not divide by the ranks, with the nearest sizes that do."""
        self.recipe, self.ranks = recipe, ranks
        self.whole = _part(recipe, ranks)
        multiple, chunk = recipe.objective.micro_batch_multiple, getattr(recipe.objective, "chunk", None)
        most = min(self.whole, chunk or self.whole)
        self.sizes: Sequence[int] = [
            n
            for n in range(1, self.whole + 1)
            if self.whole % n == 0 and n % multiple == 0 and (n < most or n == self.whole)
        ]
        self._traced: dict[int, Footprint] = {}
        self._line: tuple[int, int] | None = None
        self._looked = False

    def recipe_of(self, size: int) -> Recipe:
        """Return the recipe with the part of the batch cut into pieces of ``size``."""
        recipe = self.recipe
        if recipe.objective.several:
            if size == self.whole:
                return recipe
            return recipe.model_copy(update={"objective": recipe.objective.model_copy(update={"chunk": size})})
        return recipe.model_copy(update={"train": recipe.train.model_copy(update={"accumulate": self.whole // size})})

    def micro(self, size: int) -> int:
        """Return the samples of a micro-batch."""
        return self.whole if self.recipe.objective.several else size

    def trace(self, size: int) -> Footprint:
        """Return what a step takes, traced."""
        if size not in self._traced:
            recipe = self.recipe_of(size)
            self._traced[size] = measure_memory(recipe, sketch_objective(recipe), self.micro(size))
        return self._traced[size]

    def footprint(self, size: int) -> Footprint:
        """Return what a step takes, traced or on the line between two that were."""
        line = self._find_line() if size < self.whole and size not in self._traced else None
        return self.trace(size) if line is None else self._on_line(*line, size) or self.trace(size)

    def _find_line(self) -> tuple[int, int] | None:
        # The whole part is left out: with several micro-batches gradients are there when the second begins.
        cut = self.sizes[:-1]
        if not self._looked and len(cut) > 3:
            low, middle, high = cut[len(cut) // 4], cut[len(cut) // 2], cut[-1]
            guess = self._on_line(low, high, middle)
            true = self.trace(middle).peak()
            if guess is not None and abs(guess.peak() - true) <= TOLERANCE * true:
                self._line = low, high
        self._looked = True
        return self._line

    def _on_line(self, low: int, high: int, size: int) -> Footprint | None:
        return between(self.trace(low), self.trace(high), (size - low) / (high - low))

    def greatest(self, fits: Callable[[Footprint], bool]) -> int | None:
        """Return the greatest size that ``fits``; None if none does."""
        if fits(self.footprint(self.whole)):
            return self.whole
        found = bisect_right(self.sizes, 0, key=lambda size: int(not fits(self.footprint(size))))
        return self.sizes[found - 1] if found else None


def _part(recipe: Recipe, ranks: int) -> int:
    batch, multiple = recipe.train.batch_size, recipe.objective.micro_batch_multiple
    accumulate = recipe.train.accumulate if recipe.objective.several else 1
    least = ranks * accumulate * multiple
    if batch % least:
        ways = f" x train.accumulate {accumulate}" if accumulate > 1 else ""
        pairs = f" into multiples of {multiple}" if multiple > 1 else ""
        raise UserError(
            f"train.batch_size {batch} does not divide by {ranks} ranks{ways}{pairs}, but {dividing(batch, least)}"
        )
    return batch // (ranks * accumulate)
