"""Files inside other files, whose paths say where: members of tars and cells of tables."""

from collections.abc import Hashable
from typing import Any, TypeAlias

from mmssl.data import paths
from mmssl.data.cells import Cell
from mmssl.data.tars import TarMember

Part: TypeAlias = TarMember | Cell
"""A file of ``size`` bytes inside another one, its ``container``; its ``str`` is its path, ``read`` gives its bytes."""


def part(file: str) -> Part | None:
    """Return what is inside another file, or None for a path that is a file by itself; not for pieces (``#t=``)."""
    return TarMember.parse(file) or Cell.parse(file)


def container(file: str) -> str:
    """Return the file that there is: the one that a part is inside of, else the path itself."""
    found = part(file)
    return file if found is None else found.container


def stamp(file: str) -> list[Any]:
    """Return what changes when a file, or the one that it is inside of, is written anew; see ``paths.stamp``."""
    return paths.stamp(container(file))


def block(file: str) -> Hashable:
    """Return what is the same for files that are read together: their tar, or their row group; else the file itself."""
    found = part(file)
    if isinstance(found, Cell):
        return found.table, found.group()
    return file if found is None else found.container
