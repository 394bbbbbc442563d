"""Addresses, ports and network interfaces of this machine."""

from __future__ import annotations

import socket
import struct
from contextlib import closing, suppress

_SIOCGIFADDR = 0x8915
_ELSEWHERE = "192.0.2.1"  # reserved for documentation: any address beyond this machine's own networks


def own_address(towards: str = _ELSEWHERE) -> str:
    """This machine's address on the way to another one. Nothing is sent."""
    try:
        family = socket.getaddrinfo(towards, 9)[0][0]
        with closing(socket.socket(family, socket.SOCK_DGRAM)) as probe:
            probe.connect((towards, 9))
            return str(probe.getsockname()[0])
    except OSError:  # no route: a machine of its own
        return "127.0.0.1"


def is_own_address(host: str) -> bool:
    """Whether this machine has the address, and so can listen on it."""
    try:
        family, kind, _, _, address = socket.getaddrinfo(host, 0, type=socket.SOCK_STREAM)[0]
        with closing(socket.socket(family, kind)) as probe:
            probe.bind(address)
    except OSError:
        return False
    return True


def free_port() -> int:
    """A port that nobody uses now."""
    with closing(socket.socket()) as probe:
        probe.bind(("", 0))
        return int(probe.getsockname()[1])


def interface_towards(host: str) -> str | None:
    """The network interface that leads to a host, if that is another one than this machine's own loopback.

    gloo takes the interface that the machine's own name stands for, which on many machines is loopback.
    """
    try:
        host = socket.gethostbyname(host)
    except OSError:
        return None
    address = host if is_own_address(host) else own_address(host)
    if address.startswith("127."):
        return None
    return next((name for _, name in socket.if_nameindex() if _address_of(name) == address), None)


def _address_of(interface: str) -> str | None:
    with suppress(OSError, ImportError), closing(socket.socket(socket.AF_INET, socket.SOCK_DGRAM)) as probe:
        import fcntl

        answer = fcntl.ioctl(probe.fileno(), _SIOCGIFADDR, struct.pack("256s", interface[:15].encode()))
        return socket.inet_ntoa(answer[20:24])
    return None
