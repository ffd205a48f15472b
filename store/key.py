"""The cache key: a digest of everything that changes a stored value, and the difference of two such specs in words."""

import hashlib
import json
import math
from collections.abc import Mapping
from typing import Any

KEY_LENGTH = 16  # hex digits: 64 bits, so among a million stores two share a key with probability 3e-8


def canonical_json(document: Mapping[str, Any]) -> str:
    """One text for one meaning: keys sorted, no spaces, ASCII, tuples as lists.

    Raises:
        TypeError: a value that JSON cannot hold exactly (a Path, a NumPy number, NaN, a key that is no string).
    """
    return _dump(_checked(document, ""))


def cache_key(spec: Mapping[str, Any]) -> str:
    """First 16 hex digits of the SHA-256 of the spec's canonical JSON. 1 and 1.0 are different values here."""
    return hashlib.sha256(canonical_json(spec).encode()).hexdigest()[:KEY_LENGTH]


def spec_difference(a: Mapping[str, Any], b: Mapping[str, Any]) -> list[tuple[str, Any, Any]]:
    """Where two specs differ: (dotted field, value in a, value in b), sorted by field; None stands for an absent field.

    spec_difference({"crop": {"size": 224}}, {"crop": {"size": 336}})  ->  [("crop.size", 224, 336)]
    """
    leaves_a, leaves_b = _leaves(_checked(a, "")), _leaves(_checked(b, ""))
    return [
        (field, leaves_a.get(field), leaves_b.get(field))
        for field in sorted(leaves_a.keys() | leaves_b.keys())
        if _dump(leaves_a.get(field, ...)) != _dump(leaves_b.get(field, ...))
    ]


def _dump(value: Any) -> str:
    if value is ...:
        return "absent"
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)


def _checked(value: Any, field: str) -> Any:
    """The value with tuples as lists, if JSON gives exactly this value back."""
    if isinstance(value, Mapping):
        if not_text := [key for key in value if type(key) is not str]:
            raise TypeError(f"{field or 'spec'}: key {not_text[0]!r} is not a string")
        return {key: _checked(item, f"{field}.{key}" if field else key) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_checked(item, f"{field}[{position}]") for position, item in enumerate(value)]
    if value is None or type(value) in (str, int, bool) or (type(value) is float and math.isfinite(value)):
        return value
    raise TypeError(f"{field}: {value!r} ({type(value).__name__}) is not a string, finite number, bool or None")


def _leaves(value: Any, field: str = "") -> dict[str, Any]:
    """Dotted field -> value, down to what is not a dict; an empty dict is a leaf."""
    if not isinstance(value, dict) or (not value and field):
        return {field: value}
    leaves: dict[str, Any] = {}
    for key, item in value.items():
        leaves |= _leaves(item, f"{field}.{key}" if field else key)
    return leaves
