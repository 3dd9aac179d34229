"""Settings from people: `key=value` words and YAML, turned into typed options or into one clear sentence."""

from collections.abc import Iterable, Mapping, Sequence
from difflib import get_close_matches
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ValidationError

from glocal.errors import GlocalError

Options = TypeVar("Options", bound=BaseModel)


def closest(name: str, known: Iterable[str]) -> str:
    """`did you mean 'x'?` where something known is close, else the list of what is known."""
    known = list(known)
    match = get_close_matches(name, known, n=1)
    return f"did you mean {match[0]!r}?" if match else f"choose one of {', '.join(known)}."


def parse_words(words: Sequence[str]) -> dict[str, Any]:
    """`["seed=3", "views.rotation=15"]` as nested settings; values are read as YAML.

    Raises:
        GlocalError: a word without `=`, or a value that is not YAML.
    """
    settings: dict[str, Any] = {}
    for word in words:
        key, equals, text = word.partition("=")
        if not equals or not key:
            raise GlocalError(f"{word!r} is not understood: settings are written key=value, for example seed=1.")
        try:
            value = yaml.safe_load(text) if text.strip() else text
        except yaml.YAMLError as error:
            raise GlocalError(f"The value of {key} ({text!r}) cannot be read.") from error
        level = settings
        *path, last = key.split(".")
        for name in path:
            level = level.setdefault(name, {})
            if not isinstance(level, dict):
                raise GlocalError(f"{key} cannot be set beside a value of {name}.")
        level[last] = _number(value)
    return settings


def _number(value: Any) -> Any:
    # YAML 1.1 reads 1e-3 as text, people mean a number.
    if isinstance(value, str):
        try:
            return float(value) if "e" in value.lower() and value[:1] in "+-.0123456789" else value
        except ValueError:
            return value
    return [_number(item) for item in value] if isinstance(value, list) else value


def merged(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """`base` with the values of `over`, level by level."""
    result = dict(base)
    for key, value in over.items():
        below = result.get(key)
        result[key] = merged(below, value) if isinstance(below, Mapping) and isinstance(value, Mapping) else value
    return result


def validated(kind: type[Options], settings: Mapping[str, Any], where: str) -> Options:
    """Typed options from settings.

    Raises:
        GlocalError: an unknown key (suggests the right one) or a value that does not fit, by its full name.
    """
    try:
        return kind.model_validate(settings)
    except ValidationError as error:
        raise GlocalError(_sentence(kind, error, where)) from error


def _sentence(kind: type[BaseModel], error: ValidationError, where: str) -> str:
    first = error.errors()[0]
    path = [str(part) for part in first["loc"]]
    key = ".".join([where, *path] if where else path)
    if first["type"] == "extra_forbidden":
        return f"{key} is not a setting: {closest(path[-1], _fields(kind, path[:-1]))}"
    if first["type"] == "missing":
        return f"{key} is missing."
    return f"{key}={first['input']} does not fit: {first['msg'][0].lower()}{first['msg'][1:]}."


def _fields(kind: type[BaseModel], path: Sequence[str]) -> list[str]:
    """Names of the settings at `path` below `kind`."""
    for name in path:
        annotation = kind.model_fields[name].annotation if name in kind.model_fields else None
        if not (isinstance(annotation, type) and issubclass(annotation, BaseModel)):
            break
        kind = annotation
    return list(kind.model_fields)
