"""Functions that ``torch.compile`` leaves alone."""

import sys
from collections.abc import Callable
from functools import wraps
from typing import Any, ParamSpec, TypeVar

import torch

P = ParamSpec("P")
T = TypeVar("T")


def uncompiled(function: Callable[P, T]) -> Callable[P, T]:
    """Return the function, to be called by compiled code as it is.

    That is what ``torch.compiler.disable`` does, which however loads the compiler at once: seconds, in every command.
    """
    disabled: Any = None

    @wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> T:
        nonlocal disabled
        if disabled is None:
            if "torch._dynamo" not in sys.modules:  # nothing has been compiled
                return function(*args, **kwargs)
            disabled = torch.compiler.disable(function)
        found: T = disabled(*args, **kwargs)
        return found

    return call
