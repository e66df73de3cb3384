"""Find and read YAML and JSON configuration files, and apply dotted overrides. Imports no torch."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import InterpolationKeyError, OmegaConfBaseException

from allinone_ds.errors import ConfigError, printable
from allinone_ds.strict import did_you_mean, expand_path

_SECRET = re.compile(r"://[^/\s@]*:[^/\s@]+@|[?&][^=&\s]*(?:token|key|secret|sig|password)[^=&\s]*=", re.IGNORECASE)


def find_config(path: str | Path, beside: Path | None = None) -> Path:
    """Return a configuration file: the given path if it exists, else the file of this name in the package.

    A relative path starts at the working directory, or at `beside`.

    The files of the package are in configs/ of a checkout and in allinone_ds/configs of an installed package.

    Args:
        path: for example "configs/runs/demo.yaml"; the leading "configs" stands for either folder.
        beside: folder of the file that names this one.

    Raises:
        ConfigError: there is no such file.
    """
    given = Path(expand_path(path))
    for candidate in (given, *([beside / given] if beside else [])):
        if candidate.is_file():
            return candidate
    package = Path(__file__).resolve().parent.parent
    folders = (package / "configs", package.parent / "configs")
    inner = Path(*given.parts[1:]) if given.parts[:1] == ("configs",) else given
    if not given.is_absolute():
        for folder in folders:
            if (folder / inner).is_file():
                return folder / inner
    shipped = sorted({f"configs/{f.relative_to(top)}" for top in folders for f in top.glob("*/*") if f.is_file()})
    raise ConfigError(f"no configuration file '{path}'; files of the package: {', '.join(shipped)}")


def read_yaml(path: str | Path, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """Read the YAML file of a run and apply dotted overrides, without validating names or types.

    If the key `base` names a second file, the content is merged into that of the base: mappings are merged, other
    values are replaced. A data source with a different `format` replaces that of the base, except `expect` and
    `classes`.

    Args:
        path: the file, or the name of one that comes with the package.
        overrides: for example ["trainer.max_steps=50"].

    Raises:
        ConfigError: the file or an override cannot be read, or a value holds a password or token.
    """
    for item in overrides:
        if "=" not in item or item.startswith("-"):
            raise ConfigError(f"override '{item}': write KEY=VALUE, for example trainer.max_steps=50")
        if printable(item) != item:
            raise ConfigError(f"override '{item}': is not UTF-8; rename the folder, or make a link with another name")
    file = find_config(path)
    try:
        base = _with_bases(file)
        _check_tasks(base, overrides)
        single_keys = any(item.startswith("deepspeed.") for item in overrides)
        if single_keys and isinstance(base, DictConfig) and isinstance(base.get("deepspeed"), str):
            base["deepspeed"] = read_deepspeed(base["deepspeed"])
        merged = _merged(base, OmegaConf.from_dotlist(list(overrides)))
        content = OmegaConf.to_container(merged, resolve=True)
    except yaml.reader.ReaderError as error:
        raise ConfigError(f"{file}: is not text in UTF-8 or UTF-16 ({error.reason}); save it as UTF-8") from error
    except InterpolationKeyError as error:
        hint = "for a variable of the environment write $NAME or ${oc.env:NAME}"
        raise ConfigError(f"{file}: {error}; {hint}") from error
    except (yaml.YAMLError, OmegaConfBaseException, TypeError) as error:  # TypeError: a list replaces a mapping
        raise ConfigError(f"{file}: {error}") from error
    if not isinstance(content, dict):
        raise ConfigError(f"{file}: expected a mapping of keys, found {type(content).__name__}")
    _refuse_secrets(content, str(file))
    return {str(key): value for key, value in content.items()}


def _check_tasks(base: Any, overrides: Sequence[str]) -> None:
    """Refuse an override of a task that the run does not have, unless the overrides define that task."""
    tasks = base.get("tasks") if isinstance(base, DictConfig) else None
    if not isinstance(tasks, DictConfig):
        return
    keys = [item.split("=")[0].split(".") for item in overrides]
    known = {*map(str, tasks), *(key[1] for key in keys if key[0] == "tasks" and key[2:] == ["type"])}
    for item, key in zip(overrides, keys, strict=True):
        if key[0] == "tasks" and len(key) > 2 and key[1] not in known:
            raise ConfigError(f"override '{item}': the run has no task '{key[1]}'; {did_you_mean(key[1], known)}")


def _refuse_secrets(content: Any, file: str, key: str = "") -> None:
    """Refuse a URL with a password or token, because the configuration is written to checkpoints, logs and trackers."""
    if isinstance(content, dict):
        for name, value in content.items():
            _refuse_secrets(value, file, f"{key}.{name}" if key else str(name))
    elif isinstance(content, list):
        for value in content:
            _refuse_secrets(value, file, key)
    elif isinstance(content, str) and _SECRET.search(content):
        raise ConfigError(
            f"{file}: {key} is an address with a password or token, which would be written to the checkpoints and logs "
            "of the run; remove it, and log in on the hosts (hf auth login) or set it in the environment (HF_TOKEN)"
        )


def _with_bases(file: Path) -> Any:
    content: Any = _load(file)
    files = [file.resolve()]
    while isinstance(content, DictConfig) and "base" in content:
        file = find_config(content.pop("base"), beside=file.parent)
        if file.resolve() in files:
            raise ConfigError(f"{files[0]}: base leads back to {file}; remove one of these base keys")
        files.append(file.resolve())
        content = _merged(_load(file), content)
    return content


def _load(file: Path) -> Any:
    with file.open("rb") as stream:  # from bytes, yaml recognises UTF-16 and a byte order mark
        return OmegaConf.load(stream)  # type: ignore[arg-type]


def _merged(below: Any, above: Any) -> Any:
    _drop_replaced_sources(below, above)
    return OmegaConf.merge(below, above)


def _drop_replaced_sources(below: Any, above: Any) -> None:
    """Remove the keys of every source in `below` whose `format` differs in `above`, so that they are not merged."""
    if not (isinstance(below, DictConfig) and isinstance(above, DictConfig)):
        return
    formats = below.get("format"), above.get("format")
    if None not in formats and formats[0] != formats[1]:
        kept = ("expect",) if formats[1] == "class_folders" else ("expect", "classes")  # names of folders are classes
        for key in [key for key in below if key not in kept]:
            del below[key]
    else:
        for key in above:
            if isinstance(below.get(key), DictConfig | ListConfig) and type(below.get(key)) is not type(above[key]):
                del below[key]  # one source replaces a list of sources, or the reverse
                continue
            _drop_replaced_sources(below.get(key), above.get(key))


def read_deepspeed(path: str | Path) -> dict[str, Any]:
    """Return the content of a DeepSpeed config file."""
    file = find_config(path)
    try:
        return json.loads(file.read_bytes())  # from bytes, json recognises UTF-16 and a byte order mark
    except ValueError as error:  # also of text in no such encoding
        raise ConfigError(f"{file} is not valid JSON: {error}") from error
