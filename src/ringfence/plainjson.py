"""Write plain data as JSON without importing `json`, whose decoder loads `re` and `enum`: 7 ms of every start.

Only for what Ringfence itself makes on the way of every run (the OCI config.json, records of sandboxes); everything
that reads JSON uses the standard library. A test holds the two against each other.
"""

try:
    from _json import encode_basestring_ascii as _quoted
except ImportError:  # not CPython
    from json.encoder import encode_basestring_ascii as _quoted


def dumps(value: object) -> str:
    """Return compact JSON of dicts with text keys, lists, tuples, text, numbers, booleans and None.

    Raises TypeError for anything else, ValueError for a number that JSON does not have.
    """
    if isinstance(value, str):
        return _quoted(value)
    if value is None:
        return "null"
    if value is True:
        return "true"
    if value is False:
        return "false"
    if isinstance(value, int):
        return int.__repr__(value)
    if isinstance(value, dict):
        return "{" + ",".join([f"{_quoted(key)}:{dumps(item)}" for key, item in value.items()]) + "}"
    if isinstance(value, list | tuple):
        return "[" + ",".join([dumps(item) for item in value]) + "]"
    if isinstance(value, float):
        if not float("-inf") < value < float("inf"):
            raise ValueError(f"{value!r} is not a JSON number")
        return float.__repr__(value)
    raise TypeError(f"{type(value).__name__} is not plain data")
