"""Firecracker's published API definition as something to hold documents and requests against."""

import re
from pathlib import Path

import jsonschema_rs
import yaml

_DEFINITION = yaml.safe_load((Path(__file__).parent / "data/firecracker.yaml").read_text())


def _strict(schema: object) -> object:
    """Return a schema in which what is not defined is not allowed."""
    if isinstance(schema, list):
        return [_strict(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    found = {key: _strict(value) for key, value in schema.items()}
    if found.get("type") == "object" and "properties" in found:
        found.setdefault("additionalProperties", False)
    return found


_STRICT = _strict(_DEFINITION["definitions"])


def validator(name: str) -> jsonschema_rs.Draft4Validator:
    """Return a validator of the definition `name`, for which an unknown word is an error."""
    return jsonschema_rs.Draft4Validator({"$ref": f"#/definitions/{name}", "definitions": _STRICT})


def problem(method: str, path: str, body: object) -> str:
    """Return why this is no request of the API, "" if it is one."""
    operation = _operation(method, path)
    if operation is None:
        return f"no {method} {path}"
    parameters = [item for item in operation.get("parameters", ()) if item["in"] == "body"]
    if not parameters:
        return "" if body is None else "a body where there is none"
    if body is None:
        return "no body" if parameters[0].get("required") else ""
    name = parameters[0]["schema"]["$ref"].rpartition("/")[2]
    return "; ".join(error.message for error in validator(name).iter_errors(body))


def status(method: str, path: str) -> int:
    """Return the status of an answer that all is well."""
    operation = _operation(method, path)
    assert operation is not None
    return int(min(code for code in operation["responses"] if code != "default"))


def _operation(method: str, path: str) -> dict | None:
    for template, operations in _DEFINITION["paths"].items():
        pattern = re.sub(r"\{\w+\}", "[A-Za-z0-9_]+", template)
        if re.fullmatch(pattern, path) and method.lower() in operations:
            return operations[method.lower()]
    return None
