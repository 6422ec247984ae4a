"""Texts that are their own path: what a manifest's caption or a person's prompt says, where a file would hold it.

Such a path is a data URL (RFC 2397), ``data:,a%20cat``. So a text is a path like any other: in listings, ledgers,
caches of features, tables of results and data workers.
"""

from urllib.parse import quote, unquote

PREFIX = "data:,"


def join(text: str) -> str:
    """Return the path that is ``text`` itself."""
    return PREFIX + quote(text, safe="", errors="surrogatepass")


def text(path: str) -> str | None:
    """Return the text that a path is, or None for the path of a file."""
    return unquote(path.removeprefix(PREFIX), errors="surrogatepass") if path.startswith(PREFIX) else None
