"""Names and files of a run: runs/NAME/ and the config.json in it."""

import dataclasses
import json
import os
import types
import typing
from pathlib import Path
from typing import Any, TypeVar

from ssd_torchrec.errors import CheckpointError, ConfigError

T = TypeVar("T")


def write_json(path: Path, content: Any) -> None:
    """Write beside and rename, so that a reader never sees half a file."""
    beside = path.with_name(path.name + ".writing")
    beside.write_text(json.dumps(content, indent=2) + "\n")
    os.replace(beside, path)


KIND = "kind"  # of a field that may hold one of several configs: the name of the class it holds


def as_json(config: Any) -> dict[str, Any]:
    """A config dataclass as what json.dumps takes; `from_json` is its inverse."""
    content = json.loads(json.dumps(dataclasses.asdict(config)))
    for name, hint in typing.get_type_hints(type(config)).items():
        if len(_configs_of(hint)) > 1:
            content[name] = {KIND: type(getattr(config, name)).__name__, **content[name]}
    return content


def from_json(kind: type[T], content: dict[str, Any]) -> T:
    """Rebuild a (nested) config dataclass, validating it again.

    Raises:
        CheckpointError: `content` has a field that `kind` does not know, as when a newer version wrote it.
    """
    types_of = typing.get_type_hints(kind)
    hints = {field.name: types_of[field.name] for field in dataclasses.fields(kind)}  # pyright: ignore[reportArgumentType]
    if unknown := sorted(content.keys() - hints.keys()):
        raise CheckpointError(f"{kind.__name__} has no {unknown}; use the version of ssd_torchrec that wrote the file")
    return kind(**{name: _restored(hints[name], value) for name, value in content.items()})


def _restored(hint: Any, value: Any) -> Any:
    if value is None:
        return None
    if configs := _configs_of(hint):
        kind = value.get(KIND, next(iter(configs)))  # without one it was written when there was only the first
        if kind not in configs:
            raise CheckpointError(f"{kind} must be one of {', '.join(configs)}; use the version that wrote the file")
        return from_json(configs[kind], {name: of for name, of in value.items() if name != KIND})
    if isinstance(hint, types.UnionType):
        (hint,) = (arm for arm in typing.get_args(hint) if arm is not type(None))
    return tuple(value) if typing.get_origin(hint) is tuple else value


def _configs_of(hint: Any) -> dict[str, type]:
    """The config dataclasses that a field may hold, by name."""
    arms = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    return {arm.__name__: arm for arm in arms if isinstance(arm, type) and dataclasses.is_dataclass(arm)}


def claim(folder: Path, config: Any, *, resume: bool) -> None:
    """Make a run's folder and note its config, or refuse to mix two runs in one.

    Raises:
        ConfigError: the folder holds a run already and this one is not to resume it, or cannot be written.
    """
    noted = folder / "config.json"
    if noted.exists() and not resume:
        raise ConfigError(
            f"{folder} holds a run already; give another --name, or --training.resume auto to go on with it"
        )
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_json(noted, as_json(config))
    except OSError as error:
        raise ConfigError(f"{folder} must be writable, got {error}; give another --output") from error
