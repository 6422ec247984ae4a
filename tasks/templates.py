"""Prompt templates: the sentences that a class's name is put into, so that it reads like what was trained on."""

from collections.abc import Iterable, Mapping

from mmssl.errors import UserError, nearest

PLACE = "{}"
"""Where the name goes."""
BARE = (PLACE,)
"""The name by itself: what is taken where nobody says otherwise, as it claims nothing of what the files are."""
SETS: Mapping[str, tuple[str, ...]] = {
    "photo": (
        "a photo of a {}.",
        "a picture that shows a {}.",
        "a {}, seen from close by.",
        "a {} in the distance.",
        "a {} in poor light.",
        "part of a {}.",
        "several of a kind: {}.",
    ),
    "drawing": ("a drawing of a {}.", "an icon of a {}.", "a sketch that shows a {}.", "a {}, painted in few colours."),
    "video": ("a video of {}.", "a clip that shows {}.", "someone films {}.", "{}, recorded as it happens."),
    "sound": ("the sound of {}.", "a recording of {}.", "{} is heard.", "{}, with noise in the background."),
}
"""Templates of one kind of files, to be taken together, by the name of the set."""


def texts(what: str, given: str | Iterable[str]) -> list[str]:
    """Return one text or several as a list; raises UserError, beginning with ``what`` they are, for anything else."""
    if isinstance(given, str):
        return [given]
    if not isinstance(given, Iterable):
        raise UserError(f"{what} a list of texts, but got {given!r}")
    found = list(given)
    for one in found:
        if not isinstance(one, str):
            raise UserError(f"{what} a list of texts, but there is {one!r} among them")
    return found


def chosen(templates: str | Iterable[str] | None) -> tuple[str, ...]:
    """Return the templates that are meant: those given, each a template or the name of a set; None is the bare name.

    Raises UserError where one has not exactly one ``{}`` and is no set, and where none is given or one is given twice.
    """
    if templates is None:
        return BARE
    given = texts("templates are", templates)
    found = [one for words in given for one in (SETS[words] if words in SETS else (_checked(words),))]
    if not found:
        raise UserError(f"no template is given; the name by itself is '{PLACE}'")
    for one in found:
        if found.count(one) > 1:
            raise UserError(f"the template '{one}' is given twice")
    return tuple(found)


def _checked(template: str) -> str:
    places = template.count(PLACE)
    if places == 1:
        return template
    if places == 0 and " " not in template.strip():
        raise UserError(
            f"template '{template}': it has no {PLACE} for the name, and is no set{nearest(template, SETS)}"
        )
    raise UserError(
        f"template '{template}': the name goes where {PLACE} stands, and it must stand there once, but does {places} "
        "times; such as 'a photo of a {}.'"
    )


def fill(template: str, name: str) -> str:
    """Return the template with the name in it, whatever letters that has, braces included."""
    return template.replace(PLACE, name)
