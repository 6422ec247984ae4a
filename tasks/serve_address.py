"""Whose address or name is whose: what a service listens at, and by which name it is asked."""

import ipaddress
import re

_HOST = re.compile(r"(\[[0-9a-f.]*:[0-9a-f:.]*\]|[a-z0-9._-]+)(:[0-9]{0,5})?", re.ASCII)


def is_loopback(host: str) -> bool:
    """Whether an address is reached from this machine alone; of names that is ``localhost``."""
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return host.lower() == "localhost"
    # ::ffff:127.0.0.1 is 127.0.0.1, written for a socket of the other kind.
    return (getattr(address, "ipv4_mapped", None) or address).is_loopback


def host_name(header: str) -> str | None:
    """Return the name or address in a Host header, each in one spelling and without a port; None for what is none."""
    match = _HOST.fullmatch(header.lower())
    if match is None:
        return None
    name = match[1].removesuffix(".")
    try:
        return str(ipaddress.ip_address(name.strip("[]")))
    except ValueError:
        return None if name.startswith("[") else name
