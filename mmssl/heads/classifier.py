"""The heads that turn an encoder's tokens into class scores."""

from typing import Literal

from torch import Tensor, nn

from mmssl.config import Piece


class HeadConfig(Piece):
    """What stands between an encoder and its class scores."""

    pool: Literal["mean", "cls"] | None = None
    """How tokens become one vector; none is the encoder's own way."""

    def build(self, dim: int, num_prefix: int, pool: Literal["mean", "cls"], num_classes: int) -> "ClassifierHead":
        """Make the head for an encoder of width ``dim`` that pools by ``pool`` itself."""
        return ClassifierHead(dim, num_prefix, self.pool or pool, num_classes)


class ClassifierHead(nn.Module):
    """Maps the latents of an encoder's last blocks to class scores."""

    layers = 1
    """How many of the last blocks' latents it takes."""

    def __init__(self, dim: int, num_prefix: int, pool: Literal["mean", "cls"], num_classes: int) -> None:
        super().__init__()
        self.num_prefix, self.pool = num_prefix, pool
        self.linear = nn.Linear(dim, num_classes)
        # Small, so that the first steps do not push random directions through the encoder.
        nn.init.trunc_normal_(self.linear.weight, std=0.01)
        nn.init.zeros_(self.linear.bias)

    def forward(self, latents: list[Tensor]) -> Tensor:
        """Map ``layers`` latents [B, num_prefix + N, dim], the last block's last, to class scores [B, classes]."""
        (latent,) = latents
        return self.linear(latent[:, 0] if self.pool == "cls" else latent[:, self.num_prefix :].mean(1))  # type: ignore[no-any-return]
