"""Names and addresses, and which of them are this machine's."""

import pytest

from tasks.serve_address import host_name, is_loopback


@pytest.mark.parametrize(
    ("header", "name"),
    [
        ("localhost", "localhost"),
        ("LOCALHOST:1", "localhost"),
        ("localhost.", "localhost"),
        ("127.0.0.1:80", "127.0.0.1"),
        ("[::1]", "::1"),
        ("[0:0:0:0:0:0:0:1]:99", "::1"),
        ("a-b.example:", "a-b.example"),
        ("", None),
        ("[::1].evil.com", None),
        ("[::1", None),
        ("[1:2]", None),
        ("[127.0.0.1]", None),
        ("localhost:evil.com", None),
        ("127.0.0.1:80:90", None),
        ("127.0.0.1, evil.com", None),
        ("evil.com@localhost", None),
        ("l\u00f3calhost", None),
        ("localhost\n", None),
    ],
)
def test_a_host_header_is_read_strictly(header, name):
    assert host_name(header) == name


def test_addresses_of_this_machine_are_known_in_every_spelling():
    for host in ("127.0.0.1", "127.9.9.9", "::1", "::ffff:127.0.0.1", "localhost"):
        assert is_loopback(host)
    for host in ("0.0.0.0", "::", "::ffff:8.8.8.8", "127.1", "2130706433", "localhost.evil.com"):
        assert not is_loopback(host)
