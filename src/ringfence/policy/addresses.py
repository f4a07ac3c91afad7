"""Who may be reached, where ports are published, and where images come from.

The text of ``network.allow``, ``network.publish`` and ``image.allowed_registries``.
"""

from __future__ import annotations

import ipaddress
import re

from ringfence.errors import PolicyError
from ringfence.policy.units import show

_NAME = re.compile(
    r"(?=.{1,253}$)(?:[a-z0-9](?:[a-z0-9-]{0,61}[a-z0-9])?\.)*[a-z](?:[a-z0-9-]{0,61}[a-z0-9])?"
)
ALLOW_EXAMPLES = "api.example.com:443, 10.1.0.0/16:5432 or [2001:db8::/32]:443"
PUBLISH_EXAMPLES = "8080:80, 127.0.0.1:8080:80 or [::1]:8080:80/tcp"

REGISTRY_EXAMPLES = "registry.example.com, 127.0.0.1:5000/team or local"
_HOST = r"[A-Za-z0-9](?:[A-Za-z0-9-]*[A-Za-z0-9])?(?:\.[A-Za-z0-9](?:[A-Za-z0-9-]*[A-Za-z0-9])?)*"
_PORT = r"(?::[0-9]{1,5})?"
_PART = r"[a-z0-9]+(?:(?:\.|_|__|-+)[a-z0-9]+)*"
# As in references: the first part of a name is a registry if it has a dot or a port, or is localhost.
REGISTRY_PATTERN = (
    rf"^(?:local|(?:localhost{_PORT}|(?=[^/]*[.:]){_HOST}{_PORT}|\[[0-9A-Fa-f:]+\]{_PORT})(?:/{_PART})*)$"
)


def destination(value: object) -> str:
    """Return canonical ``host:port`` where host is a DNS name, an address or a network; IPv6 in brackets."""
    host, colon, port = value.rpartition(":") if isinstance(value, str) else ("", "", "")
    if not colon or not _is_port(port):
        raise _wrong(value, "a destination with a port", ALLOW_EXAMPLES)
    bracketed = re.fullmatch(r"\[(.+)\]", host)
    if bracketed or re.fullmatch(r"[0-9./]+", host):
        return f"{_network(bracketed[1] if bracketed else host, value, 6 if bracketed else 4)}:{int(port)}"
    name = host.lower().removesuffix(".")
    if not _NAME.fullmatch(name):
        raise _wrong(value, "a destination with a port", ALLOW_EXAMPLES)
    return f"{name}:{int(port)}"


def published(value: object) -> str:
    """Return canonical ``address:host_port:port/tcp``; without an address it is 127.0.0.1."""
    match = re.fullmatch(
        r"(?:(\[[0-9a-fA-F:.]+\]|[0-9.]+):)?([0-9]+):([0-9]+)(?:/tcp)?",
        value if isinstance(value, str) else "",
    )
    if match is None or not (_is_port(match[2]) and _is_port(match[3])):
        raise _wrong(value, "a published TCP port", PUBLISH_EXAMPLES)
    try:
        address = ipaddress.ip_address((match[1] or "127.0.0.1").strip("[]"))
    except ValueError:
        raise _wrong(value, "a published TCP port", PUBLISH_EXAMPLES) from None
    if address.version != (6 if "[" in (match[1] or "") else 4):
        raise _wrong(value, "a published TCP port", PUBLISH_EXAMPLES)
    host = f"[{address}]" if address.version == 6 else str(address)
    return f"{host}:{int(match[2])}:{int(match[3])}/tcp"


def registry(value: object) -> str:
    """Return a registry, perhaps with the beginning of a name in it, or "local", this host's own images."""
    if isinstance(value, str) and len(value) <= 255 and re.fullmatch(REGISTRY_PATTERN, value):
        return value
    raise _wrong(value, "a registry", REGISTRY_EXAMPLES)


def _network(text: str, value: object, version: int) -> str:
    try:
        network = ipaddress.ip_network(text, strict=False)
    except ValueError:
        raise _wrong(value, "an address or network with a port", ALLOW_EXAMPLES) from None
    if network.version != version:
        raise _wrong(value, "an address or network with a port", ALLOW_EXAMPLES)
    if "/" in text and str(network.network_address) != str(ipaddress.ip_address(text.partition("/")[0])):
        raise PolicyError(f"{show(value)} has bits set beyond its prefix", hint=f"the network is {network}")
    # One address reads better without its /32 or /128.
    host = str(network.network_address) if network.num_addresses == 1 else str(network)
    return f"[{host}]" if version == 6 else host


def _is_port(text: str) -> bool:
    return re.fullmatch("[0-9]{1,5}", text) is not None and 1 <= int(text) <= 65535


def _wrong(value: object, wanted: str, examples: str) -> PolicyError:
    return PolicyError(f"{show(value)} is not {wanted}", hint=f"write for example {examples}")
