"""The schema of a run's YAML file. Every checkpoint holds the resolved file."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

from pydantic import (
    BeforeValidator,
    Field,
    NonNegativeFloat,
    PositiveFloat,
    PositiveInt,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)

from allinone_ds.balance.assignment import check_groups
from allinone_ds.balance.joint.block import feature_weighting
from allinone_ds.balance.options import BalancerConfig, combination_error, sampling_error
from allinone_ds.data.loading.sampling import Sampling
from allinone_ds.errors import ConfigError
from allinone_ds.models.backbone import BackboneConfig
from allinone_ds.models.freezing import Freeze, check_stages
from allinone_ds.models.lora import LoraOptions
from allinone_ds.run_config.engine_settings import read_engine
from allinone_ds.run_config.task_config import ImagesConfig, JointConfig, TaskConfig
from allinone_ds.run_config.yaml_files import DEEPSPEED, read_deepspeed, read_yaml
from allinone_ds.strict import ConfigPath, Strict, check_task_name, did_you_mean, explain


def _named_callback(value: Any) -> Any:
    if isinstance(value, str):
        return {value: {}}
    if isinstance(value, dict) and len(value) == 1:
        return {name: options or {} for name, options in value.items()}
    raise ConfigError(f"{value!r}: give 'module.Class', or one pair {{module.Class: {{argument: value}}}}")


def _no_none(value: Any) -> Any:
    return {} if value is None else value


class EarlyStopping(Strict):
    """When a run ends before its length, as in transformers' `EarlyStoppingCallback`."""

    patience: PositiveInt = 3
    """Evaluations in a row that may fail to improve `trainer.metric_for_best_model`."""
    threshold: NonNegativeFloat = 0.0
    """Improvement that counts."""


class ModelConfig(Strict):
    """The part of the model that all tasks share."""

    backbone: BackboneConfig
    """The shared backbone."""
    freeze: Freeze | None = None
    """What of the backbone keeps its weights: "embeddings", N (the embeddings and the first N layers) or "backbone"."""
    thaw: dict[PositiveInt, Freeze | None] = Field(default_factory=dict)
    """{optimizer step: what keeps its weights from this step on, as in `freeze`; null: nothing}."""
    lora: LoraOptions | None = None
    """Train adapters (LoRA) instead of the backbone's weights, which are frozen; null: train the weights."""
    start_from: ConfigPath | None = None
    """Folder of an earlier run or checkpoint with the same backbone, whose weights the run starts from. The head of a
    task whose name or classes differ starts from random weights."""

    @model_validator(mode="after")
    def _lora_adapts_something(self) -> ModelConfig:
        if self.lora is not None and self.freeze is not None:
            raise ConfigError("'freeze' and 'lora' are both set; remove 'freeze': with adapters all weights are frozen")
        if self.thaw and self.freeze is None:
            raise ConfigError("'thaw' is set, but nothing is frozen; set 'freeze' to what is frozen at first")
        check_stages(self.freeze_stages)
        if self.lora is not None and self.start_from is None and self.backbone.checkpoint is None:
            raise ConfigError("'lora' would adapt a backbone of random weights; set backbone.checkpoint or start_from")
        return self

    @property
    def freeze_stages(self) -> dict[int, Freeze | None]:
        """Optimizer step -> what is frozen from it on; empty if nothing is thawed."""
        return {0: self.freeze, **self.thaw} if self.thaw else {}

    @property
    def never_trained(self) -> Freeze | None:
        """What of the backbone stays frozen to the end of the run."""
        return self.thaw[max(self.thaw)] if self.thaw else self.freeze


_OF_GROUP = {
    "image_size": 1,
    "batch_size": 1,
    "train": {"format": "script", "dataset": "joint", "samples": 0, "reason": "its images are those of a joint group"},
}
"""What a task of a joint group has until it joins the group."""


class RunConfig(Strict):
    """The configuration of one run; `load_config` reads it from a YAML file.

    Example:
        >>> config = load_config("configs/runs/demo.yaml")
        >>> config.tasks["detection"].batch_size, config.step_images
        (6, 34)
    """

    name: str
    """Name of the run."""
    output_dir: ConfigPath | None = None
    """Folder that the run is written to; None is runs/NAME."""
    data_root: ConfigPath = Path(".")
    """Folder that relative paths of the data sources start from."""
    model: ModelConfig
    """What all tasks share."""
    tasks: dict[str, TaskConfig] = Field(min_length=1)
    """The tasks by name; null instead of a task drops that of a base."""
    joint: dict[str, JointConfig] = Field(default_factory=dict)
    """Groups of tasks that read one image set, by name; see docs/joint.md."""
    balancer: BalancerConfig = Field(default_factory=BalancerConfig)
    """`name` of the weighting and its options, and the options of TaskBalancer."""
    epochs: dict[str, PositiveFloat] | None = Field(default=None, min_length=1, max_length=1)
    """{task: number of epochs}: length of the run as passes over the training data of one task or joint group, instead
    of `trainer.max_steps`."""
    sampling: Sampling | None = None
    """Which tasks run in an optimizer step; null: every task runs in each step."""
    early_stopping: EarlyStopping | None = None
    """End the run when its evaluations no longer improve."""
    callbacks: list[Annotated[dict[str, dict[str, Any]], BeforeValidator(_named_callback)]] = Field(default=[])
    """Trainer callbacks: "module.Class", or {module.Class: {argument: value}}."""
    trainer: Annotated[dict[str, Any], BeforeValidator(_no_none)] = Field(default_factory=dict)
    """Fields of `AllInOneArguments`, which extends `transformers.TrainingArguments`."""
    deepspeed: str | dict[str, Any] = DEEPSPEED
    """DeepSpeed config: a JSON file or its content."""
    max_broken_images: int = Field(default=100, ge=0)
    """Unreadable images, over all ranks, that are skipped and counted before the run stops."""

    @field_validator("tasks")
    @classmethod
    def _usable_names(cls, value: dict[str, TaskConfig]) -> dict[str, TaskConfig]:
        """Refuse names that cannot be part of the names of files, modules, logs and overrides."""
        for name in value:
            check_task_name(name)
        return value

    @field_validator("joint")
    @classmethod
    def _usable_group_names(cls, value: dict[str, JointConfig], info: ValidationInfo) -> dict[str, JointConfig]:
        for name in value:
            check_task_name(name)
            if name in info.data.get("tasks", {}):
                raise ConfigError(f"joint.{name}: a task has this name too; give the group a different one")
        return value

    @model_validator(mode="before")
    @classmethod
    def _complete_tasks_of_groups(cls, content: Any) -> Any:
        """Fill in the keys that tasks of joint groups take from their groups once these are validated."""
        groups, tasks = (content.get(key) if isinstance(content, dict) else None for key in ("joint", "tasks"))
        if not isinstance(groups, dict) or not isinstance(tasks, dict):
            return content
        owner: dict[str, str] = {}
        completed = dict(tasks)
        for group, keys in groups.items():
            names = keys.get("tasks") if isinstance(keys, dict) else None
            for name in names if isinstance(names, list) else []:
                where = f"joint.{group}.tasks: '{name}'"
                if name in owner:
                    again = "is listed twice" if owner[name] == group else f"is also a task of joint.{owner[name]}"
                    raise ConfigError(f"{where} {again}; a task belongs to one group, once")
                if name not in tasks:
                    raise ConfigError(f"{where} is not defined in 'tasks'; {did_you_mean(str(name), tasks)}")
                owner[name] = group
                if isinstance(tasks[name], dict):
                    own = [key for key in tasks[name] if key in (*ImagesConfig.model_fields, "train", "test")]
                    if own:
                        raise ConfigError(
                            f"tasks.{name}.{own[0]}: the task belongs to joint.{group}, whose images it reads; remove "
                            f"the key, or set joint.{group}.{own[0]}"
                        )
                    completed[name] = {**tasks[name], **_OF_GROUP}
        return {**content, "tasks": completed}

    @model_validator(mode="after")
    def _join_tasks(self) -> RunConfig:
        for name, group in self.joint.items():
            group.settle(name, self.tasks)
            for task in group.tasks:
                self.tasks[task].join(task, group)
        return self

    @model_validator(mode="after")
    def _adapters_of_tasks(self) -> RunConfig:
        for name, task in self.tasks.items():
            if task.lora is not None and self.model.lora is None and self.model.never_trained != "backbone":
                raise ConfigError(
                    f"tasks.{name}.lora: adapters need a backbone whose weights are frozen; set model.lora for "
                    "adapters that all tasks share, or model.freeze: backbone"
                )
            if task.lora is not None and self.balancer.norm == "features":
                raise ConfigError(
                    f"tasks.{name}.lora with balancer.norm: features: the gradient would be scaled before it reaches "
                    "the adapters of the task, which count as its head; use norm: exact"
                )
        return self

    @model_validator(mode="after")
    def _check_length(self) -> RunConfig:
        if self.early_stopping is not None and self.trainer.get("eval_strategy", "no") in ("no", False):
            raise ConfigError("early_stopping: it needs evaluations; set trainer.eval_strategy to steps")
        steps = self.trainer.get("max_steps")
        if isinstance(steps, int) and any(step >= steps for step in self.model.thaw):
            raise ConfigError(f"model.thaw: step {max(self.model.thaw)} is never reached: trainer.max_steps = {steps}")
        if self.sampling is not None:
            self.sampling.check_names(self.images)
        for name in self.epochs or {}:
            if name not in self.images:
                raise ConfigError(f"epochs.{name}: the run has no such task; {did_you_mean(name, self.images)}")
        return self

    @property
    def run_dir(self) -> Path:
        """Folder that the run is written to."""
        return self.output_dir if self.output_dir is not None else Path("runs") / self.name

    @property
    def step_images(self) -> int:
        """Images per rank and optimizer step."""
        return sum(part.batch_size * part.micro_steps for part in self.images.values())

    @property
    def images(self) -> dict[str, TaskConfig | JointConfig]:
        """The tasks that have images of their own and the joint groups by name, in the order in which a step runs them:
        a group in the place of its first task."""
        group_of = {task: name for name, group in self.joint.items() for task in group.tasks}
        names = dict.fromkeys(group_of.get(task, task) for task in self.tasks)
        return {name: self.joint[name] if name in self.joint else self.tasks[name] for name in names}


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Read and validate the YAML file of a run. An unknown key is an error that suggests the nearest valid key.

    Args:
        path: the YAML file, or the name of one that comes with the package.
        overrides: dotted overrides, for example ["trainer.max_steps=50"].

    Raises:
        ConfigError: one line per mistake.

    Example:
        >>> config = load_config("configs/runs/demo.yaml", ["trainer.max_steps=50"])
        >>> sorted(config.tasks), config.trainer["max_steps"], str(config.run_dir)
        (['classification', 'detection', 'segmentation'], 50, 'runs/demo')
    """
    config, mistakes = read_config(path, overrides)
    if mistakes or config is None:
        raise ConfigError("\n".join(mistakes))
    try:
        check_balancer(config)
    except ConfigError as error:
        raise type(error)(f"{path}: {error}") from error
    return config


def read_config(path: str | Path, overrides: Sequence[str] = ()) -> tuple[RunConfig | None, list[str]]:
    """Read the YAML file of a run as far as it is valid.

    Args:
        path: the YAML file, or the name of one that comes with the package.
        overrides: dotted overrides.

    Returns:
        The configuration without its invalid keys (None: what remains is no run), and one line per mistake.

    Raises:
        ConfigError: the file cannot be read.
    """
    content = read_yaml(path, overrides)
    mistakes: list[str] = []
    for _ in range(_REPAIRS):
        try:
            config = RunConfig.model_validate(content)
        except ValidationError as error:
            mistakes += [line for line in explain(error, RunConfig, str(path)).splitlines() if line not in mistakes]
            if not all([_remove(content, list(item["loc"])) for item in error.errors()]):
                return None, mistakes
        else:
            try:
                if isinstance(config.deepspeed, str):
                    config.deepspeed = read_deepspeed(config.deepspeed)
            except ConfigError as error:
                mistakes.append(f"{path}: deepspeed: {error}")
                config.deepspeed = read_deepspeed(DEEPSPEED)
            return config, mistakes
    return None, mistakes


_REPAIRS = 4
"""Times that invalid keys are removed: the rest may be invalid without them."""


def _remove(content: dict[str, Any], path: Sequence[Any]) -> bool:
    """Remove the innermost key of a path that exists (a path also holds tags, and keys that are missing)."""
    owner, key, inside = content, None, content
    tagged: Any = None
    for part in path:
        if isinstance(inside, dict) and part == inside.get("format") and inside is not tagged:
            tagged = inside  # the tag of a source, which may also be the name of one of its keys
        elif isinstance(inside, dict) and part in inside:
            owner, key, inside = inside, part, inside[part]
    if key is not None:
        del owner[key]
    return key is not None


def check_balancer(config: RunConfig) -> None:
    """Refuse a balancer that cannot run with the tasks and the DeepSpeed engine of a run.

    Args:
        config: the run, the content of its DeepSpeed file in it.

    Raises:
        ConfigError: names the option, and says what to do.
    """
    balancer = config.balancer
    if balancer.groups is not None:
        try:
            check_groups(balancer.groups, tuple(config.tasks))
        except ConfigError as error:
            raise ConfigError(f"balancer.{error}") from error
    try:
        balancer.weighting().check_tasks(tuple(config.tasks))
    except ValueError as error:
        raise ConfigError(f"balancer: {error}") from error
    engine = read_engine(config.deepspeed, bool(config.trainer.get("bf16")), bool(config.trainer.get("fp16")))
    if config.sampling is not None:
        refusal = sampling_error(balancer.norm, balancer.parallel, balancer.weighting())
        if refusal is not None:
            raise refusal
    for name, group in config.joint.items():
        if balancer.norm != "exact" or balancer.parallel != "data":
            raise ConfigError(
                f"balancer: norm = '{balancer.norm}' with parallel = '{balancer.parallel}' and joint.{name}: a joint "
                "group needs norm='exact' and parallel='data'"
            )
        if group.at == "features":
            try:
                feature_weighting(balancer.weighting())
            except ConfigError as error:
                raise ConfigError(f"joint.{name}.at = 'features': {error}") from error
    refusal = combination_error(
        balancer.norm, balancer.parallel, balancer.weighting(), engine.stage, engine.keeps_local_gradients
    )
    if refusal is not None:
        raise type(refusal)(f"balancer: {refusal}")
