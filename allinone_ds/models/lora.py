"""LoRA (arXiv 2106.09685) on the backbone, through `peft`: the backbone is frozen and small adapters are trained."""

from __future__ import annotations

import contextlib
import re
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, PositiveFloat, PositiveInt
from safetensors.torch import save_file
from torch import nn

from allinone_ds.errors import ConfigError
from allinone_ds.models.backbone import Backbone
from allinone_ds.strict import Strict

_BASE = ".base_layer."
_ADAPTER = re.compile(r"\.lora_[^.]+\.([^.]+)")
SHARED = "default"
"""Name of the adapters that all tasks share, in `peft`; those of one task have its name."""


class LoraOptions(Strict):
    """Adapters of the backbone: their size and place.

    Example:
        >>> LoraOptions(rank=4).target_modules
        'all-linear'
    """

    rank: PositiveInt = 8
    """Rank r of the update B A of a weight."""
    alpha: PositiveFloat = 16.0
    """The update is multiplied by alpha / rank."""
    dropout: float = Field(default=0.0, ge=0, lt=1)
    """Dropout before A."""
    target_modules: list[str] | Literal["all-linear"] = "all-linear"
    """Ends of the names of the modules with adapters, such as [q_proj, v_proj]; "all-linear": all linear layers."""


def add_lora(backbone: Backbone, options: LoraOptions, task: str | None = None) -> None:
    """Freeze the backbone and add adapters, which change nothing until they are trained.

    Args:
        backbone: what `build_backbone` returned; under ZeRO-3 its parameters may already be partitioned.
        options: size and place of the adapters.
        task: the task whose forwards alone use them; None: all tasks share them.

    Raises:
        ConfigError: `peft` is missing, the backbone has no such modules, or the task has a name that adapters cannot
            have.

    Example:
        >>> from allinone_ds.models.backbone import BackboneConfig, build_backbone
        >>> sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "patch_size": 8}
        >>> backbone = build_backbone(BackboneConfig(config=sizes))
        >>> add_lora(backbone, LoraOptions(rank=4, target_modules=["q_proj", "v_proj"]))
        >>> sum(p.numel() for p in backbone.parameters() if p.requires_grad)
        1024
    """
    where = "model.lora" if task is None else f"tasks.{task}.lora"
    if task in (SHARED, _BASE.strip(".")) or hasattr(nn.ModuleDict(), task or ""):
        raise ConfigError(f"{where}: '{task}' cannot name adapters in peft; choose a different name for the task")
    config = _peft_config(options)
    if options.target_modules == "all-linear" and adapters_of(backbone):  # peft would look for them inside adapters
        config.target_modules = {name_without_lora(f"{n}.").rstrip(".") for n, m in backbone.net.named_modules()
                                 if isinstance(m, nn.Linear) and not is_adapter(n)}  # fmt: skip
    from peft import inject_adapter_in_model

    net: Any = backbone.net
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Already found a `peft_config`")
            inject_adapter_in_model(config, net, SHARED if task is None else task)
    except ValueError as error:
        linear = {name.rpartition(".")[2] for name, module in net.named_modules() if isinstance(module, nn.Linear)}
        raise ConfigError(
            f"{where}.target_modules = {options.target_modules}: {error} The linear layers of this backbone end in: "
            f"{', '.join(sorted(linear))}."
        ) from error
    for name, parameter in net.named_parameters():  # peft freezes adapters that are not active
        if is_adapter(name):
            parameter.requires_grad_(True)
    _activate(backbone, None)


def adapters_of(backbone: Any) -> tuple[str, ...]:
    """Return the names of a backbone's adapters: `SHARED`, and tasks with adapters of their own."""
    return tuple(getattr(getattr(backbone, "net", None), "peft_config", None) or ())


def adapter_of(name: str) -> str | None:
    """Return the adapters that a parameter belongs to; None if it belongs to none.

    Example:
        >>> adapter_of("net.layer.0.query.lora_A.det.weight")
        'det'
    """
    found = _ADAPTER.search(name)
    return found and found[1]


def task_of(name: str) -> str | None:
    """Return the task whose head or own adapters a tensor of an AllInOneModel is of; None: all tasks share it.

    Example:
        >>> task_of("tasks.seg.fuse.weight"), task_of("backbone.net.layer.0.query.lora_A.det.weight")
        ('seg', 'det')
    """
    first, _, rest = name.partition(".")
    adapter = adapter_of(name) if first == "backbone" else None
    return rest.partition(".")[0] if first == "tasks" else adapter if adapter != SHARED else None


def in_any_task(name: str) -> str:
    """Return the name of a tensor of a task with "*" in the place of the task; `in_task` puts a task there.

    Example:
        >>> in_any_task("tasks.seg.fuse.weight"), in_any_task("backbone.net.layer.0.query.lora_A.det.weight")
        ('tasks.*.fuse.weight', 'backbone.net.layer.0.query.lora_A.*.weight')
    """
    if name.startswith("tasks."):
        return ".".join(["tasks", "*", *name.split(".")[2:]])
    return _ADAPTER.sub(lambda found: f"{_without_name(found)}.*", name)


def in_task(name: str, task: str) -> str:
    """Return the name that a tensor called `name` by `in_any_task` has in a task."""
    return name.replace("*", task)


def shared_parameters(backbone: nn.Module) -> list[nn.Parameter]:
    """Return what all tasks share of a backbone: all but the adapters of single tasks, which count as their heads."""
    return [p for name, p in backbone.named_parameters() if adapter_of(name) in (None, SHARED)]


@contextlib.contextmanager
def adapters_in_use(backbone: Any, task: str | None) -> Iterator[None]:
    """Let forwards inside this block use the shared adapters and those of one task; outside, the shared ones.

    Args:
        backbone: any backbone.
        task: name of the task; None: the shared adapters alone.
    """
    if task not in adapters_of(backbone):
        yield
        return
    before = _activate(backbone, task)
    try:
        yield
    finally:
        _activate(backbone, before)


def checkpoint_contexts(backbone: Any) -> tuple[contextlib.AbstractContextManager, contextlib.AbstractContextManager]:
    """Return contexts of a checkpointed forward and of its recomputation, which then uses the same adapters."""
    return contextlib.nullcontext(), adapters_in_use(backbone, backbone.net.adapters_task)


def _activate(backbone: Any, task: str | None) -> str | None:
    """Use the shared adapters and those of a task; return the task whose adapters were in use."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    before = getattr(backbone.net, "adapters_task", None)
    for module in backbone.net.modules():
        if isinstance(module, BaseTunerLayer):
            # not `set_adapter`, which also freezes all other adapters; a layer ignores names that it does not have
            module._active_adapter = [SHARED] if task is None else [SHARED, task]
    backbone.net.adapters_task = task
    return before


def _peft_config(options: LoraOptions) -> Any:
    try:
        from peft import LoraConfig
    except ImportError as error:
        raise ConfigError("model.lora: needs the package peft; pip install peft, or the extra 'lora'") from error
    return LoraConfig(
        r=options.rank,
        lora_alpha=options.alpha,  # type: ignore[arg-type]  # it is only divided by the rank
        lora_dropout=options.dropout,
        target_modules=options.target_modules,
    )


def save_adapter(backbone: Backbone, options: LoraOptions, folder: Path, adapter: str = SHARED) -> None:
    """Write adapters alone, for `peft.PeftModel.from_pretrained` on the backbone that they were trained on.

    Args:
        backbone: a backbone with adapters.
        options: of these adapters.
        folder: folder to write adapter_config.json and adapter_model.safetensors to.
        adapter: one of `adapters_of(backbone)`.
    """
    state = backbone.net.state_dict()
    names = [name for name, _ in backbone.net.named_parameters() if adapter_of(name) == adapter]
    weights = {f"base_model.model.{_ADAPTER.sub(_without_name, n)}": state[n].contiguous() for n in names}
    folder.mkdir(parents=True, exist_ok=True)
    save_file(weights, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    _peft_config(options).save_pretrained(str(folder))


def _without_name(found: re.Match[str]) -> str:
    return found[0].rpartition(".")[0]


def merge_lora(backbone: Backbone, adapters: Sequence[str] = (SHARED,)) -> None:
    """Add adapters to the weights that they belong to, and drop all others: the modules are ordinary ones again.

    Args:
        backbone: a backbone with adapters.
        adapters: names of those that are added.
    """
    from peft.tuners.lora import LoraLayer

    net: Any = backbone.net
    for name, module in list(net.named_modules()):
        if isinstance(module, LoraLayer):
            module.merge(adapter_names=[adapter for adapter in adapters if adapter in module.lora_A])
            net.set_submodule(name, module.get_base_layer())
    if hasattr(net, "peft_config"):
        del net.peft_config
    backbone.requires_grad_(True)


def name_without_lora(name: str) -> str:
    """Return the name that a parameter has in a model without adapters.

    Example:
        >>> name_without_lora("net.layer.0.query.base_layer.weight")
        'net.layer.0.query.weight'
    """
    return name.replace(_BASE, ".")


def is_adapter(name: str) -> bool:
    """Return whether a parameter belongs to an adapter."""
    return ".lora_" in name
