"""Files of configuration: found by name, read as YAML or JSON, dotted overrides laid over them. Quick to import."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from allinone_ds.errors import ConfigError
from allinone_ds.strict import did_you_mean

_SECRET = re.compile(r"://[^/\s@]*:[^/\s@]+@|[?&][^=&\s]*(?:token|key|secret|sig|password)[^=&\s]*=", re.IGNORECASE)


def find_config(path: str | Path) -> Path:
    """The configuration file of this name: as given, or among the configurations that come with the package.

    In a checkout those lie in configs/ at its top, in an installed package in allinone_ds/configs.

    Args:
        path: for example "configs/runs/demo.yaml"; the leading "configs" stands for either place.

    Raises:
        ConfigError: there is no such file.
    """
    given = Path(path)
    if given.is_file():
        return given
    package = Path(__file__).resolve().parent.parent
    homes = (package / "configs", package.parent / "configs")
    inner = Path(*given.parts[1:]) if given.parts[:1] == ("configs",) else given
    if not given.is_absolute():
        for home in homes:
            if (home / inner).is_file():
                return home / inner
    shipped = sorted({f"configs/{f.relative_to(h)}" for h in homes for f in h.glob("*/*") if f.is_file()})
    raise ConfigError(f"no configuration file '{path}'; those that come with the package: {', '.join(shipped)}")


def read_yaml(path: str | Path, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """Read a run's YAML file and lay dotted overrides over it, without looking at names or types.

    A file whose key `base` names another is laid over that one: mappings are merged, anything else is replaced. A data
    source of another `format` replaces the one below it, of which only `expect` and `classes` stay.

    Args:
        path: the file, or the name of one that comes with the package.
        overrides: for example ["trainer.max_steps=50"].
    """
    for item in overrides:
        if "=" not in item or item.startswith("-"):
            raise ConfigError(f"override '{item}': write KEY=VALUE, for example trainer.max_steps=50")
    file = find_config(path)
    try:
        base = _with_bases(file)
        _check_tasks(base, overrides)
        single_keys = any(item.startswith("deepspeed.") for item in overrides)
        if single_keys and isinstance(base, DictConfig) and isinstance(base.get("deepspeed"), str):
            base["deepspeed"] = read_deepspeed(base["deepspeed"])
        merged = _merged(base, OmegaConf.from_dotlist(list(overrides)))
        content = OmegaConf.to_container(merged, resolve=True)
    except (yaml.YAMLError, OmegaConfBaseException, TypeError) as error:  # TypeError: a list over a mapping
        raise ConfigError(f"{file}: {error}") from error
    if not isinstance(content, dict):
        raise ConfigError(f"{file}: a run is a mapping of keys, found {type(content).__name__}")
    _refuse_secrets(content, str(file))
    return {str(key): value for key, value in content.items()}


def _check_tasks(base: Any, overrides: Sequence[str]) -> None:
    """Refuse an override of a task that the run does not have, unless the overrides give that task whole."""
    tasks = base.get("tasks") if isinstance(base, DictConfig) else None
    if not isinstance(tasks, DictConfig):
        return
    keys = [item.split("=")[0].split(".") for item in overrides]
    known = {*map(str, tasks), *(key[1] for key in keys if key[0] == "tasks" and key[2:] == ["type"])}
    for item, key in zip(overrides, keys, strict=True):
        if key[0] == "tasks" and len(key) > 2 and key[1] not in known:
            raise ConfigError(f"override '{item}': the run has no task '{key[1]}'; {did_you_mean(key[1], known)}")


def _refuse_secrets(content: Any, file: str, key: str = "") -> None:
    """No address with a password or token: a run writes its configuration into checkpoints, logs and trackers."""
    if isinstance(content, dict):
        for name, value in content.items():
            _refuse_secrets(value, file, f"{key}.{name}" if key else str(name))
    elif isinstance(content, list):
        for value in content:
            _refuse_secrets(value, file, key)
    elif isinstance(content, str) and _SECRET.search(content):
        raise ConfigError(
            f"{file}: {key} is an address with a password or token in it, which would be written into the run's "
            "checkpoints and logs; take it out, and log in on the hosts (hf auth login) or set it in the environment "
            "(HF_TOKEN)"
        )


def _with_bases(file: Path) -> Any:
    content: Any = OmegaConf.load(file)
    files = [file.resolve()]
    while isinstance(content, DictConfig) and "base" in content:
        file = find_config(content.pop("base"))
        if file.resolve() in files:
            raise ConfigError(f"{files[0]}: base leads back to {file}; a chain of bases must end")
        files.append(file.resolve())
        content = _merged(OmegaConf.load(file), content)
    return content


def _merged(below: Any, above: Any) -> Any:
    _make_room(below, above)
    return OmegaConf.merge(below, above)


def _make_room(below: Any, above: Any) -> None:
    """Empty every source in `below` that gets another `format` from `above`: the keys of the old one would stay."""
    if not (isinstance(below, DictConfig) and isinstance(above, DictConfig)):
        return
    formats = below.get("format"), above.get("format")
    if None not in formats and formats[0] != formats[1]:
        kept = ("expect",) if formats[1] == "class_folders" else ("expect", "classes")  # its folders are the classes
        for key in [key for key in below if key not in kept]:
            del below[key]
    else:
        for key in above:
            _make_room(below.get(key), above.get(key))


def read_deepspeed(path: str | Path) -> dict[str, Any]:
    """The content of a DeepSpeed config file."""
    file = find_config(path)
    try:
        return json.loads(file.read_text())
    except json.JSONDecodeError as error:
        raise ConfigError(f"{file}: not JSON: {error}") from error
