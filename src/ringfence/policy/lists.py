"""The kinds of fields that hold lists and mappings: names, addresses, devices, kernel parameters, mounts."""

from __future__ import annotations

from collections.abc import Callable

import msgspec

from ringfence.errors import PolicyError
from ringfence.policy import addresses, capabilities, paths, sysctls
from ringfence.policy.document import BadValueError, Node, Plain
from ringfence.policy.kinds import Kind, Schema, choice, flag, nearest, scalar, shown
from ringfence.policy.model import Mount


def texts(parse: Callable[[object], str], item: Schema, *, order: tuple[str, ...] = ()) -> Kind:
    """A list of texts without repeats, in the given or alphabetic order, so that equal lists are equal."""

    def read(node: Node, _directory: str) -> object:
        found: list[str] = []
        for child in _items(node):
            try:
                text = parse(scalar(child))
            except PolicyError as err:
                raise BadValueError(child.place, err.message, err.hint) from err
            found += [] if text in found else [text]
        return tuple(sorted(found, key=order.index if order else None))

    return Kind(read, _list, {"type": "array", "items": item})


def _pattern(pattern: str) -> Schema:
    return {"type": "string", "pattern": pattern}


def capability_names() -> Kind:
    """Linux capabilities."""
    names = "|".join(name.removeprefix("CAP_") for name in capabilities.CAPABILITIES)
    either = "|".join((names, names.lower()))
    return texts(
        capabilities.canonical, _pattern(rf"^(?:CAP_|cap_)?(?:{either})$"), order=capabilities.CAPABILITIES
    )


def destinations() -> Kind:
    """Names, addresses or networks, each with a port."""
    return texts(
        addresses.destination, _pattern(r"^(?:\[[0-9a-fA-F:.]+(?:/[0-9]+)?\]|[A-Za-z0-9./-]+):[0-9]{1,5}$")
    )


def published_ports() -> Kind:
    """Host ports and the ports inside that they lead to."""
    port = "[0-9]{1,5}"
    return texts(
        addresses.published, _pattern(rf"^(?:(?:\[[0-9a-fA-F:.]+\]|[0-9.]+):)?{port}:{port}(?:/tcp)?$")
    )


def device_nodes() -> Kind:
    """Device nodes with their access."""
    return texts(paths.device, _pattern("^/dev/[^:]+(?::(?:r|rw|rwm))?$"))


def registries() -> Kind:
    """Registries that images may come from, or null for all."""
    some = texts(addresses.registry, _pattern(addresses.REGISTRY_PATTERN))

    def read(node: Node, directory: str) -> object:
        return None if node.value is None else some.read(node, directory)

    def write(value: object) -> Plain:
        return None if value is None else some.write(value)

    return Kind(read, write, {"anyOf": [some.schema, {"type": "null"}]})


def secret_names() -> Kind:
    """Nothing yet: any entry is an error."""

    def parse(_value: object) -> str:
        raise PolicyError("secrets are not built yet", hint="leave the list empty")

    return Kind(texts(parse, {}).read, _list, {"type": "array", "maxItems": 0})


def kernel_parameters() -> Kind:
    """A mapping of sysctl names to values."""

    def read(node: Node, _directory: str) -> object:
        found: dict[str, str] = {}
        for name, child in sorted(_mapping(node).items()):
            try:
                sysctls.check_name(name)
            except PolicyError as err:
                raise BadValueError(node.keys[name], err.message, err.hint) from err
            value = child.value
            if (
                isinstance(value, bool | float)
                or not isinstance(value, int | str)
                or not 1 <= len(str(value)) <= 256
            ):
                raise BadValueError(
                    child.place, f"{shown(child)} is not a value for {name}", "write text or a number"
                )
            found[name] = str(value)
        return found

    schema: Schema = {
        "type": "object",
        "propertyNames": {"pattern": sysctls.NAME_PATTERN},
        "additionalProperties": {"type": ["string", "integer"], "minLength": 1, "maxLength": 256},
    }
    return Kind(read, lambda value: {**msgspec.convert(value, dict[str, str])}, schema)


def mounts() -> Kind:
    """Bind mounts, in the order of their targets, so that a parent comes before what is inside it."""

    def read(node: Node, directory: str) -> object:
        found = [_mount(child, directory) for child in _items(node)]
        return tuple(sorted(found, key=lambda mount: mount.target))

    def write(value: object) -> Plain:
        return [msgspec.to_builtins(mount) for mount in msgspec.convert(value, tuple[Mount, ...])]

    item: Schema = {
        "type": "object",
        "properties": {key: kind.schema for key, kind in _MOUNT_KEYS.items()},
        "required": ["source", "target"],
        "additionalProperties": False,
    }
    return Kind(read, write, {"type": "array", "items": item})


_MOUNT_KEYS: dict[str, Kind] = {
    "source": Kind(lambda node, directory: paths.host_path(scalar(node), directory), str, {"type": "string"}),
    "target": Kind(lambda node, _directory: paths.target(scalar(node)), str, _pattern("^/")),
    "mode": choice("ro", "rw"),
    "allow_dangerous": flag(),
}


def _mount(node: Node, directory: str) -> Mount:
    values: dict[str, object] = {}
    fields = _mapping(node)
    for key, child in fields.items():
        if key not in _MOUNT_KEYS:
            raise BadValueError(node.keys[key], f"unknown key {key!r}", nearest(key, list(_MOUNT_KEYS)))
        try:
            values[key] = _MOUNT_KEYS[key].read(child, directory)
        except PolicyError as err:
            raise BadValueError(child.place, f"{key}: {err.message}", err.hint) from err
    for key in ("source", "target"):
        if key not in values:
            hint = "write for example {source: ./data, target: /data, mode: ro}"
            raise BadValueError(node.place, f"a mount needs {key}", hint)
    mount = msgspec.convert(values, Mount)
    why = paths.dangerous(mount.source)
    if why and not mount.allow_dangerous:
        hint = "add allow_dangerous: true to that mount if you mean it"
        raise BadValueError(fields["source"].place, f"source {mount.source} is or holds {why}", hint)
    return mount


def _items(node: Node) -> list[Node]:
    if not isinstance(node.value, list):
        raise PolicyError(f"{shown(node)} is not a list", hint="write [] or [one, two]")
    return node.value


def _mapping(node: Node) -> dict[str, Node]:
    if not isinstance(node.value, dict):
        raise BadValueError(node.place, f"{shown(node)} is not a mapping", "write {key: value}")
    return node.value


def _list(value: object) -> Plain:
    return [*msgspec.convert(value, list[str])]
