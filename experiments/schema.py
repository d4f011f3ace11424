"""What a config's frozen dataclass says of its keys: their names, defaults and types.

`door` completes config files by it, checks flags, and turns what they give into the dataclass.
"""

from __future__ import annotations

import dataclasses
import math
import re
import types
import typing
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

from ml_collections import ConfigDict

from distillspec_jax.errors import UserError, unknown_name
from experiments.usage import default_of, is_instance

C = TypeVar("C")

_UNIONS = (typing.Union, types.UnionType)


def check_overrides(argv: Sequence[str], config_class: type) -> None:
    """Refuses `--config.a.b` for keys that `config_class` does not have."""
    for arg in argv[1:]:
        match = re.match(r"--?(?:no)?config\.([^=]*)", arg)
        here: Any = config_class
        where = "config"
        for name in match[1].split(".") if match else ():
            if not dataclasses.is_dataclass(here):
                raise UserError(f"{where} is a single value, it has no key '{name}' ({arg})")
            hints = typing.get_type_hints(here)
            if name not in hints:
                raise unknown_name("config key", name, hints, prefix=f"{where}.")
            here, where = _inner_dataclass(hints[name]) or hints[name], f"{where}.{name}"


def flag_refused(words: str, config_class: type | None = None) -> UserError:
    """What absl's parser says against a flag, in the words in which config files are refused."""
    words = " ".join(words.split())
    found = re.search(r"flag --config\.([\w.]+)=(.*?): ", words)
    if found is None or config_class is None:
        # absl knows those keys alone that are given: the nearest of them is no advice
        return UserError(f"bad flags: {re.sub(r' Did you mean: config.*', '', words)}")
    key, value = found.groups()
    hint: Any = config_class
    for name in key.split("."):
        hint = typing.get_type_hints(hint)[name]
        hint = _inner_dataclass(hint) or hint
    keys = ""
    if dataclasses.is_dataclass(hint):
        names = (field.name for field in dataclasses.fields(hint))
        keys = f", of which --config.{key}.{next(names)} sets one"
    return UserError(f"config key 'config.{key}' is '{value}', must be {_name(hint)}{keys}")


def complete(config: ConfigDict, config_class: type, base: Any = None) -> None:
    """Puts defaults that the file leaves out into `config`, so that flags know their types."""
    hints = typing.get_type_hints(config_class)
    for field in dataclasses.fields(config_class):
        default = default_of(field, base)
        inner = _inner_dataclass(hints[field.name])
        if inner is not None and default is not None:
            if field.name not in config:
                config[field.name] = ConfigDict()
            if isinstance(config[field.name], ConfigDict):
                complete(config[field.name], inner, default if is_instance(default) else None)
        elif field.name not in config and default not in (dataclasses.MISSING, None):
            config[field.name] = default
        elif isinstance(given := config.get(field.name), list):  # no flag could override it
            with config.unlocked():
                del config[field.name]  # which would make it a list again
                config[field.name] = tuple(given)


def to_dataclass(cls: type[C], values: Mapping[str, Any], where: str, base: Any = None) -> C:
    """Turns nested mappings into the frozen dataclass `cls`; `where` is the key they are under.

    Keys left out are those of `base`, or the defaults of `cls`.

    Raises UserError, with the full dotted key, for an unknown key (and the nearest valid one), a
    missing key and a value of the wrong type.
    """
    hints = typing.get_type_hints(cls)
    for name in values:
        if name not in hints:
            raise unknown_name("config key", name, hints, prefix=f"{where}.")
    arguments = {}
    for field in dataclasses.fields(cls):  # type: ignore[arg-type]
        key, default = f"{where}.{field.name}", default_of(field, base)
        if field.name in values:
            arguments[field.name] = _convert(hints[field.name], values[field.name], key, default)
        elif default is dataclasses.MISSING:
            raise UserError(f"config key '{key}' is missing; it has no default")
        else:
            arguments[field.name] = default
    try:
        return cls(**arguments)
    except UserError as error:  # which does not know where its class stands in the config
        if where == "config" or where in str(error):
            raise
        raise UserError(f"{error} ({where})") from None


def _convert(hint: Any, value: Any, key: str, default: Any = None) -> Any:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return value
    if origin in _UNIONS:
        return _convert_union(args, hint, value, key, default)
    if dataclasses.is_dataclass(hint):
        if isinstance(value, Mapping | ConfigDict):
            base = default if is_instance(default) else None
            return to_dataclass(hint, value, key, base)  # type: ignore[arg-type]
    elif hint is float:
        if type(value) in (int, float) and math.isfinite(value):
            return float(value)
    elif origin is tuple and isinstance(value, tuple | list):
        each = [args[0]] * len(value) if args[-1] is ... else list(args)
        if len(each) == len(value):
            items = enumerate(zip(each, value, strict=True))
            return tuple(_convert(hint, item, f"{key}[{i}]") for i, (hint, item) in items)
    elif isinstance(hint, type) and type(value) is hint:  # type(): True is no int here
        return value
    raise UserError(f"config key '{key}' is {value!r}, must be {_name(hint)}")


def _convert_union(options: tuple[Any, ...], hint: Any, value: Any, key: str, default: Any) -> Any:
    if value is None and type(None) in options:
        return None
    options = tuple(option for option in options if option is not type(None))
    if len(options) == 1:
        return _convert(options[0], value, key, default)
    for option in options:
        try:
            return _convert(option, value, key)
        except UserError:
            continue
    raise UserError(f"config key '{key}' is {value!r}, must be {_name(hint)}")


def flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """A nested config with dotted keys."""
    found: dict[str, Any] = {}
    for key, value in values.items():
        name = prefix + key
        found |= flat(value, name + ".") if isinstance(value, dict) else {name: value}
    return found


def _inner_dataclass(hint: Any) -> Any:
    """The dataclass that `hint` is or may be (`X | None`), else None."""
    is_union = typing.get_origin(hint) in _UNIONS
    for option in typing.get_args(hint) if is_union else (hint,):
        if dataclasses.is_dataclass(option):
            return option
    return None


def _name(hint: Any) -> str:
    if dataclasses.is_dataclass(hint):
        return "a section with keys"
    if hint is float:
        return "a finite number"
    return hint.__name__ if isinstance(hint, type) else str(hint)
