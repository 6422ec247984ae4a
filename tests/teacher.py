"""An objective for tests with all the state besides parameters that there is: a momentum teacher, a queue, a mean.

It is small and of no use but for that: everything a rank could get wrong in ``after_step`` and in buffers is in it.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mmssl.contracts import Batch, Progress, Step
from mmssl.distributed import all_gather, all_reduce, ranks

WIDTH, DIM, QUEUE = 10, 6, 16
MOMENTUM = 0.8


class TeacherObjective(nn.Module):
    """A student that follows its own average: x [B, 10] is to be told from the queue by what the teacher says of it."""

    inputs = ("signal",)

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        # Odd sizes: no rank's share is a whole row.
        self.first, self.second = nn.Linear(WIDTH, 7), nn.Linear(7, DIM)
        for parameter in self.parameters():
            with torch.no_grad():
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
        for name, parameter in self.named_parameters():
            self.register_buffer(teacher_name(name), parameter.detach().clone())
        self.register_buffer("queue", F.normalize(torch.randn(QUEUE, DIM, generator=generator), dim=1))
        self.register_buffer("pointer", torch.zeros((), dtype=torch.long))
        self.register_buffer("centre", torch.zeros(DIM))
        self._seen: Tensor | None = None

    def forward(self, batch: Batch) -> Step:
        """Return the loss of telling each row's own key from those in the queue."""
        x = batch["signal"]
        query = F.normalize(self.second(torch.tanh(self.first(x))), dim=1)
        with torch.no_grad():
            key = F.normalize(self._teacher(x), dim=1)
        own = (query * key).sum(1, keepdim=True)
        logits = torch.cat([own, query @ self.queue.T], 1).float() / 0.2
        loss = -logits.log_softmax(1)[:, 0].mean()
        # The whole batch's keys: those of all ranks and of all micro-batches of this step, in the order of the batch.
        self._seen = key if self._seen is None else torch.cat([self._seen, key])
        return Step(loss, {"own": own.detach().float().mean()})

    def _teacher(self, x: Tensor) -> Tensor:
        teacher = dict(self.named_buffers())
        weights = {name: teacher[teacher_name(name)] for name, _ in self.named_parameters()}
        hidden = torch.tanh(F.linear(x, weights["first.weight"], weights["first.bias"]))
        return F.linear(hidden, weights["second.weight"], weights["second.bias"]) - self.centre

    @torch.no_grad()
    def after_step(self, progress: Progress) -> None:
        """Move the teacher along, put this step's keys into the queue and their mean into the running one."""
        teacher = dict(self.named_buffers())
        for name, parameter in self.named_parameters():
            assert parameter.numel(), f"{name} is not whole"
            teacher[teacher_name(name)].lerp_(parameter, 1 - MOMENTUM)
        assert self._seen is not None
        keys = all_gather(self._seen.float())
        # Each rank has its rows of every micro-batch; the mean and the queue do not depend on who had which.
        keys = keys[keys[:, 0].argsort()]
        self.centre.lerp_(all_reduce(self._seen.float().mean(0)) / ranks(), 1 - MOMENTUM)
        places = (self.pointer + torch.arange(len(keys))) % QUEUE
        self.queue[places] = keys
        self.pointer.copy_((self.pointer + len(keys)) % QUEUE)
        self._seen = None


def teacher_name(name: str) -> str:
    """Return the buffer that follows a parameter; names of buffers have no dots."""
    return "teacher_" + name.replace(".", "_")


def teacher_batch(step: int, size: int = 8) -> Batch:
    """Draw the step's whole batch."""
    generator = torch.Generator().manual_seed(1000 + step)
    index = torch.arange(size) + step * size
    return {"signal": torch.randn(size, WIDTH, generator=generator), "index": index, "seed": index}
