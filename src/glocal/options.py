"""Settings from people: `key=value` words and YAML, turned into typed options or into one clear sentence."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, get_args, get_origin

import yaml
from pydantic import BaseModel, Field, ValidationError, model_validator
from pydantic.fields import FieldInfo

from glocal.errors import GlocalError

Options = TypeVar("Options", bound=BaseModel)

# What a value must be, by pydantic's kind of error; anything else is said in pydantic's own words.
_MUST_BE = {
    "int_type": "a whole number",
    "int_parsing": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "float_parsing": "a number",
    "finite_number": "a finite number",
    "bool_type": "true or false",
    "bool_parsing": "true or false",
    "string_type": "text",
    "path_type": "a path",
    "tuple_type": "a list in brackets",
    "dict_type": "settings of its own (key: value)",
    "model_type": "settings of its own (key: value)",
    "model_attributes_type": "settings of its own (key: value)",
    "literal_error": "{expected}",
    "greater_than": "above {gt:g}",
    "greater_than_equal": "at least {ge:g}",
    "less_than": "below {lt:g}",
    "less_than_equal": "at most {le:g}",
    "too_short": "a list of {min_length} or more",
    "too_long": "a list of no more than {max_length}",
}


PATHS = ("data", "out")  # taken as they are written: a folder may be called 2024 or "a: b"


def closest(name: str, known: Iterable[str]) -> str:
    """`did you mean 'x'?` where something known is close, else the list of what is known."""
    known = list(known)
    match = get_close_matches(name, known, n=1)
    return f"did you mean {match[0]!r}?" if match else f"choose one of {', '.join(known)}."


def parse_words(words: Sequence[str]) -> dict[str, Any]:
    """`["seed=3", "views.rotation=15"]` as nested settings; values are read as YAML, a later word wins.

    Raises:
        GlocalError: a word that is not key=value, a value that is not YAML, or a key that is given both a value of its
            own and keys below it.
    """
    settings: dict[str, Any] = {}
    for word in words:
        key, equals, text = word.partition("=")
        *path, last = key.strip().split(".")
        if not equals or not all([*path, last]):
            raise GlocalError(f"{word!r} is not understood: settings are written key=value, for example seed=1.")
        if key in PATHS:
            settings[key] = str(Path(text).expanduser())
            continue
        try:
            value = _numbers(yaml.safe_load(text)) if text.strip() else ""
        except yaml.YAMLError as error:
            raise GlocalError(
                f"The value of {key} ({text!r}) cannot be read: put quotation marks around text with : # [ or {{."
            ) from error
        level = settings
        for name in path:
            level = level.setdefault(name, {})
            if not isinstance(level, dict):
                raise GlocalError(f"{key} cannot be set beside {name}={_as_typed(level)}: give one of them.")
        if isinstance(level.get(last), dict):
            raise GlocalError(f"{key} cannot be set beside {key}.{next(iter(level[last]), '')}: give one of them.")
        level[last] = value
    return settings


def _numbers(value: Any) -> Any:
    """YAML 1.1 reads 1e-3 as text, people mean a number."""
    if isinstance(value, dict):
        return {key: _numbers(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_numbers(item) for item in value]
    if isinstance(value, str) and "e" in value.lower() and value[:1] in "+-.0123456789":
        try:
            return float(value)
        except ValueError:
            return value
    return value


def merged(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """`base` with the values of `over`, level by level."""
    result = dict(base)
    for key, value in over.items():
        below = result.get(key)
        result[key] = merged(below, value) if isinstance(below, Mapping) and isinstance(value, Mapping) else value
    return result


# A field `preset: Preset = "adopted"` of options, beside `_preset = presets({"paper": {...}})`.
Preset = Annotated[
    Literal["adopted", "paper"],
    Field(
        exclude=True,  # what it sets is kept instead
        description="paper: as the paper's text has it, where the defaults do not; sets only what is not given itself",
    ),
]


def presets(known: Mapping[str, Mapping[str, Any]]) -> Any:
    """A validator that gives options presets: what the one named in their field `preset` sets, below what is given.

    The field is left out of what is kept of options (`exclude=True`), and what it has set is in it: so a run is what it
    computes, however that was asked for, and what was put back to its default by hand stays there when it is read.

    Args:
        known: settings by the preset's name, as a recipe would say them, a group such as `augmentation` in whole
            (`model_dump()`): what it does not say would be the default's. One that is an object instead, such as
            options of a network, is not merged with what is given at its key but gives way as a whole.
    """

    def _preset(given: Any) -> Any:
        return merged(known.get(str(given.get("preset")), {}), given) if isinstance(given, Mapping) else given

    return model_validator(mode="before")(_preset)


def completed(kind: type[BaseModel], given: Any) -> Any:
    """Settings with their groups completed, such as `augmentation`.

    What a group that is given in part does not say stays as this `kind` of options has it, like everything else that is
    not said.
    """
    if not isinstance(given, Mapping):
        return given
    defaults = {name: field.default for name, field in kind.model_fields.items() if _is_group(field)}
    parts = {name: value for name, value in given.items() if name in defaults and isinstance(value, Mapping)}
    return {**given, **{name: merged(defaults[name].model_dump(), part) for name, part in parts.items()}}


def _is_group(field: FieldInfo) -> bool:
    return isinstance(field.default, BaseModel) and field.annotation is type(field.default)


def or_none() -> Any:
    """A validator for options whose own defaults change nothing: the word `none` stands for them."""

    def _none(given: Any) -> Any:
        if given == "none":
            return {}
        if given is None or isinstance(given, str | bool):
            raise ValueError("it must be settings of its own (key: value) or none")
        return given

    return model_validator(mode="before")(_none)


def validated(kind: type[Options], settings: Mapping[str, Any], where: str) -> Options:
    """Typed options from settings.

    Raises:
        GlocalError: an unknown key (suggests the right one) or a value that does not fit, by its full name.
    """
    try:
        return kind.model_validate(settings)
    except ValidationError as error:
        raise GlocalError(_sentence(kind, settings, error, where)) from error


def _sentence(kind: type[BaseModel], settings: Mapping[str, Any], error: ValidationError, where: str) -> str:
    # An unknown key first: it may be the reason why another one is missing.
    errors = sorted(error.errors(), key=lambda found: found["type"] != "extra_forbidden")
    first = errors[0]
    path, below, fields = _located(kind, first["loc"])
    key = ".".join([where, *path] if where else path)
    if first["type"] == "extra_forbidden":
        name = str(first["loc"][-1])
        return f"{key}{'.' * bool(key)}{name} is not a setting: {closest(name, fields)}"
    if first["type"] == "missing" and not below:
        return f"{key} is missing."
    if first["type"] == "union_tag_invalid":
        tag, known = first["ctx"]["tag"], first["ctx"]["expected_tags"].strip("'").split("', '")
        return f"{key}.name={tag} does not fit: {closest(tag, known)}"
    value: Any = settings
    for name in path:
        value = value[name]
    # A value may be of several kinds: each that it is not has an error of its own.
    here = [found for found in errors if _located(kind, found["loc"])[0] == path]
    several = isinstance(next(iter(below), None), str)
    found_here = here if several else here[:1]
    reasons = dict.fromkeys(_reason(found, _located(kind, found["loc"])[1]) for found in found_here)
    given = "" if isinstance(value, Mapping) else f"={_as_typed(value)}"
    return f"{key}{given} does not fit: {' or '.join(reasons).replace(' or it must be', ' or')}."


def _located(kind: type[BaseModel], location: Sequence[int | str]) -> tuple[list[str], Sequence[int | str], list[str]]:
    """The key that pydantic's `location` lies in, what is left of the location, and the settings below this key.

    Numbers of list items and pydantic's own names for kinds of value are no part of a key.
    """
    path: list[str] = []
    models, free, done = [kind], False, 0
    for part in location:
        fields = {name: field.annotation for model in models for name, field in model.model_fields.items()}
        if part in fields:
            models, free = list(_models(fields[str(part)])), get_origin(fields[str(part)]) is dict
            path.append(str(part))
        elif free and isinstance(part, str):
            free = False  # below a key that people choose, the keys are known again
            path.append(str(part))
        elif any(part in _names(model) for model in models):
            models = [model for model in models if part in _names(model)]  # of several kinds the one that is meant
        else:
            break
        done += 1
    return path, location[done:], list(dict.fromkeys(name for model in models for name in model.model_fields))


def _names(model: type[BaseModel]) -> Sequence[Any]:
    """What may stand at the key `name` of settings that are told apart by it."""
    return get_args(model.model_fields["name"].annotation) if "name" in model.model_fields else ()


def _models(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for inner in get_args(annotation):
        yield from _models(inner)


def _reason(error: Mapping[str, Any], below: Sequence[int | str]) -> str:
    places = [part for part in below if isinstance(part, int)]
    if error["type"] == "missing" and places:
        return f"it must be a list of {places[-1] + 1} or more"
    if error["type"] not in _MUST_BE:
        text = str(error["msg"]).removeprefix("Value error, ").rstrip(".")
        return text[0].lower() + text[1:]
    text = _MUST_BE[error["type"]].format(**error.get("ctx", {}))
    return f"it must be {f'a list with {text} in every place' if places else text}"


def _as_typed(value: Any) -> str:
    """A value about as people write it."""
    return str(value).replace("'", "")
