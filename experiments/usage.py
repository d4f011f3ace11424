"""What --help says of an entrypoint: what it is for, its flags, and the keys of its config."""

from __future__ import annotations

import dataclasses
import inspect
import sys
import typing
from collections.abc import Iterator, Sequence
from typing import Any

from absl import flags


def usage(names: Sequence[str], config_class: type | None = None) -> str:
    """The words of the module that was started, the flags `names`, its own, and the config's."""
    main = sys.modules["__main__"]
    own = [flag.name for flag in flags.FLAGS.get_key_flags_for_module(main.__name__)]

    lines = [inspect.cleandoc(main.__doc__ or ""), "", "Flags:"]
    for name in dict.fromkeys([*names, *own]):
        lines.append(f"  --{name}: {' '.join(flags.FLAGS[name].help.split())}")
    if config_class is not None:
        lines += ["", "Keys of the config, each also a flag (--config.steps=100), and defaults:"]
        lines += [f"  --config.{key}" for key in _keys(config_class)]
    return "\n".join(lines)


def _keys(config_class: type, prefix: str = "", base: Any = None) -> Iterator[str]:
    """`name: type = default`, sections by dotted names."""
    hints = typing.get_type_hints(config_class)
    for field in dataclasses.fields(config_class):
        hint, default = hints[field.name], default_of(field, base)
        if dataclasses.is_dataclass(hint) and isinstance(hint, type):
            inner = default if is_instance(default) else None
            yield from _keys(hint, f"{prefix}{field.name}.", inner)
            continue
        name = hint.__name__ if isinstance(hint, type) else str(hint)
        given = "" if default is dataclasses.MISSING else f" = {default!r}"
        yield f"{prefix}{field.name}: {name}{given}"


def default_of(field: dataclasses.Field[Any], base: Any = None) -> Any:
    """The value of a field that is not given, that of `base` first; MISSING if it must be."""
    if base is not None:
        return getattr(base, field.name)
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return field.default


def is_instance(value: Any) -> bool:
    """Whether a value is of a dataclass, and not one itself."""
    return dataclasses.is_dataclass(value) and not isinstance(value, type)
