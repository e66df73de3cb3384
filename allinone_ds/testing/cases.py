"""Cases of the exactness table: engine kinds, weightings, micro-steps, and divisions of ranks among tasks."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

STEPS = 5
WEIGHTINGS = {
    "sum": {"name": "sum"},
    "global_clip": {"name": "global_clip", "max_norm": 0.1},
    "task_clip": {"name": "task_clip", "max_norm": 0.1},
    "tbgc": {"name": "tbgc", "max_norm": 0.1},
    "tbgc always": {"name": "tbgc", "max_norm": 0.1, "rescale": "always"},
    "tbgc heads none": {"name": "tbgc", "max_norm": 0.1, "heads": "none"},
    "tbgc max": {"name": "tbgc", "target": "max", "rescale": "always"},
    "tbgc mean": {"name": "tbgc", "target": "mean"},
    "tbgc median": {"name": "tbgc", "target": "median"},
    "tbgc min": {"name": "tbgc", "target": "min"},
}
LADDER = ("sum", "global_clip", "task_clip", "tbgc")
MICRO_STEPS = {"1/1/1": (1, 1, 1), "1/2/4": (1, 2, 4)}
GROUPS: dict[int, list[dict[str, Any]]] = {
    1: [{"det": (0,), "seg": (0,), "cls": (0,)}],
    2: [{"det": (0,), "seg": (1,), "cls": (0,)}, {"det": (1,), "seg": (0,), "cls": (1,)},
        {"det": (0, 1), "seg": (0, 1), "cls": (0, 1)}],
    4: [{"det": 2, "seg": 1, "cls": 1}, {"det": (1,), "seg": (0, 2, 3), "cls": (1,)}, {"det": 1, "seg": 1, "cls": 2}],
}  # fmt: skip
"""Divisions of R ranks among the tasks; those of "tasks apart" change from step to step."""


@dataclass(frozen=True)
class Case:
    """One engine: ZeRO stage, precision, offload, and what else differs from DeepSpeed's defaults."""

    name: str
    stage: int
    dtype: str = "fp32"
    accumulate: str | None = None
    offload: bool = False
    one_group: bool = False
    checkpointing: bool | str = False
    """Recompute the backbone's blocks in backward, through torch, or through DeepSpeed ("deepspeed")."""
    zero: dict = field(default_factory=dict)
    apart: bool = False
    """Tasks on different ranks; `GROUPS` of the world size, in turns."""
    joint_at: str | None = None
    """All tasks in one joint block, balanced at the backbone or at the features."""
    norm: str = "exact"
    """Of the balancer; "features" balances there too."""

    optimizer: str = "sgd"
    """A name of `exactness.OPTIMIZERS`; those in `KERNELS` need kernels that DeepSpeed compiles."""
    rate: float = 1.0
    """Factor of the learning rate: above 1 where weights that are rounded must move far beside the rounding."""
    keys: dict = field(default_factory=dict)
    """Further keys of the DeepSpeed config."""

    @property
    def rounds(self) -> str:
        """The type that the engine rounds to: "fp32", "bf16" or "fp16"."""
        return self.keys.get("torch_autocast", {}).get("dtype", self.dtype)

    @property
    def at(self) -> str:
        """Where tasks are balanced."""
        return "features" if self.norm == "features" else self.joint_at or "backbone"

    def config(self) -> dict:
        """The DeepSpeed config."""
        zero = {"stage": self.stage, "reduce_bucket_size": 400, "allgather_bucket_size": 400, **self.zero}
        if "muon" in self.optimizer and self.stage == 3:
            zero["reduce_scatter"] = False  # DeepSpeed requires it
        if self.stage == 3:
            zero |= {"stage3_param_persistence_threshold": 20, "stage3_prefetch_bucket_size": 100}
        if self.offload:
            zero["offload_optimizer"] = {"device": "cpu"}
        config = {
            "train_micro_batch_size_per_gpu": 4, "gradient_accumulation_steps": 1, "gradient_clipping": 0.0,
            "zero_allow_untested_optimizer": True, "zero_force_ds_cpu_optimizer": False,
            "steps_per_print": 10**9, "zero_optimization": zero,
        }  # fmt: skip
        if self.dtype == "bf16":
            config["bf16"] = {"enabled": True}
        if self.dtype == "fp16":
            config["fp16"] = {"enabled": True, "loss_scale": 0, "initial_scale_power": 2}
        if self.accumulate:
            config["data_types"] = {"grad_accum_dtype": self.accumulate}
        return {**config, **self.keys}


def all_cases() -> list[Case]:
    """Every engine kind that is served."""
    cases = []
    for stage in (0, 1, 2, 3):
        cases += [Case(f"zero{stage} fp32", stage), Case(f"zero{stage} bf16", stage, "bf16")]
        if stage:
            cases.append(Case(f"zero{stage} bf16 fp32-accumulation", stage, "bf16", "fp32"))
        cases.append(Case(f"zero{stage} fp16", stage, "fp16"))
        cases.append(Case(f"zero{stage} fp32 one param group", stage, one_group=True))
        cases.append(Case(f"zero{stage} fp32 checkpointing", stage, checkpointing=True))
    for stage in (1, 2, 3):
        for overlap in (True, False):
            for contiguous in (True, False):
                zero = {"overlap_comm": overlap, "contiguous_gradients": contiguous}
                cases.append(Case(f"zero{stage} fp32 overlap={overlap:d} contiguous={contiguous:d}", stage, zero=zero))
    for stage in (1, 2, 3):
        cases += [
            Case(f"zero{stage} fp32 offload", stage, offload=True),
            Case(f"zero{stage} bf16 offload", stage, "bf16", offload=True),
            Case(f"zero{stage} bf16 fp32-accumulation offload", stage, "bf16", "fp32", offload=True),
            Case(f"zero{stage} fp16 offload", stage, "fp16", offload=True),
            Case(f"zero{stage} fp32 offload one param group", stage, offload=True, one_group=True),
        ]
    for stage in (1, 2):
        cases += [
            Case(f"zero{stage} fp32 tasks apart", stage, apart=True),
            Case(f"zero{stage} bf16 tasks apart", stage, "bf16", apart=True),
            Case(f"zero{stage} fp16 tasks apart", stage, "fp16", apart=True),
            Case(f"zero{stage} fp32 offload tasks apart", stage, offload=True, apart=True),
            Case(f"zero{stage} fp32 one param group tasks apart", stage, one_group=True, apart=True),
            Case(f"zero{stage} fp32 checkpointing tasks apart", stage, checkpointing=True, apart=True),
            Case(f"zero{stage} fp32 overlap=1 contiguous=0 tasks apart", stage, apart=True,
                 zero={"overlap_comm": True, "contiguous_gradients": False}),
        ]  # fmt: skip
    cases += _joint_cases()
    cases.append(Case("zero2 bf16 fp32-accumulation tasks apart", 2, "bf16", "fp32", apart=True))
    cases.append(Case("zero2 fp32 round robin", 2, zero={"round_robin_gradients": True}))
    cases.append(Case("zero3 fp32 sub-groups", 3, zero={"sub_group_size": 150}))
    return [*cases, *_muon_cases(), *_option_cases(), *_hpz_cases()]


KERNELS = ("cpu adam", "cpu adam in bf16", "fused adam")
"""Optimizers with kernels that DeepSpeed compiles at their first use, in about a minute."""


def _option_cases() -> list[Case]:
    """Options of DeepSpeed's config that change how it computes, stores or accumulates."""
    cases = []
    for stage in (0, 1, 2, 3):
        for dtype in ("bf16", "fp16"):
            keys = {"torch_autocast": {"enabled": True, "dtype": dtype}}
            cases.append(Case(f"zero{stage} torch_autocast {dtype}", stage, keys=keys))
            if stage:
                cases.append(Case(f"zero{stage} torch_autocast {dtype} offload", stage, offload=True, keys=keys))
        name = f"zero{stage} fp32 checkpointing of DeepSpeed"
        cases += [Case(name, stage, checkpointing="deepspeed"),
                  Case(f"{name} norm=features", stage, checkpointing="deepspeed", norm="features")]  # fmt: skip
        cases.append(Case(f"zero{stage} fp32 managed_gradient_accumulation=0", stage,
                          keys={"managed_gradient_accumulation": False}))  # fmt: skip
        cases.append(Case(f"zero{stage} fp32 adamw", stage, optimizer="adamw"))
        cases.append(Case(f"zero{stage} fp32 fused adam", stage, optimizer="fused adam"))
        if not stage:
            continue
        low = {"bf16": {"enabled": True, "bf16_master_weights_and_grads": True, "bf16_optimizer_states": True}}
        masters = {"bf16": {"enabled": True, "bf16_master_weights_and_grads": True}}
        cases += [
            Case(f"zero{stage} bf16 masters and states", stage, "bf16", keys=low, rate=20.0),
            Case(f"zero{stage} fp32 offload cpu adam", stage, offload=True, optimizer="cpu adam"),
            Case(f"zero{stage} bf16 offload cpu adam", stage, "bf16", offload=True, optimizer="cpu adam"),
            Case(f"zero{stage} bf16 masters offload cpu adam", stage, "bf16", offload=True, optimizer="cpu adam",
                 keys=masters, rate=20.0),
            Case(f"zero{stage} fp16 masters offload cpu adam", stage, "fp16", offload=True, optimizer="cpu adam",
                 rate=20.0, keys={"fp16": {"enabled": True, "fp16_master_weights_and_grads": True, "loss_scale": 0,
                                           "initial_scale_power": 2}}),
            Case(f"zero{stage} bf16 masters and states offload cpu adam", stage, "bf16", offload=True,
                 optimizer="cpu adam in bf16", keys=low, rate=20.0),
        ]  # fmt: skip
    cases += [
        Case("zero3 fp32 offload sub-groups", 3, offload=True, zero={"sub_group_size": 150}),
        Case("zero3 bf16 sub-groups", 3, "bf16", zero={"sub_group_size": 150}),
        Case("zero3 fp32 adamw sub-groups", 3, optimizer="adamw", zero={"sub_group_size": 150}),
        Case("zero3 fp32 offload cpu adam sub-groups", 3, offload=True, optimizer="cpu adam",
             zero={"sub_group_size": 150}),
    ]  # fmt: skip
    return cases


def _muon_cases() -> list[Case]:
    """DeepSpeed's Muon in every stage and precision, and in every way to run the tasks."""
    cases = []
    for stage in (0, 1, 2, 3):
        cases.append(Case(f"zero{stage} fp32 muon", stage, optimizer="muon"))
        if stage:
            cases += [Case(f"zero{stage} {dtype} muon", stage, dtype, optimizer="muon") for dtype in ("bf16", "fp16")]
            cases.append(Case(f"zero{stage} bf16 fp32-accumulation muon", stage, "bf16", "fp32", optimizer="muon"))
        cases += [
            Case(f"zero{stage} fp32 muon joint {at}", stage, joint_at=at, optimizer="muon")
            for at in ("backbone", "features")
        ]
        cases.append(Case(f"zero{stage} fp32 muon norm=features", stage, norm="features", optimizer="muon"))
    for stage in (1, 2):
        cases.append(Case(f"zero{stage} fp32 muon tasks apart", stage, apart=True, optimizer="muon"))
    cases.append(Case("zero2 fp32 muon standard iteration", 2, optimizer="muon standard"))
    cases.append(Case("zero2 fp32 muon round robin", 2, optimizer="muon", zero={"round_robin_gradients": True}))
    cases.append(Case("zero3 fp32 muon sub-groups", 3, optimizer="muon", zero={"sub_group_size": 150}))
    return cases


def _hpz_cases() -> list[Case]:
    """Weights copied within groups of two ranks. They come last: later engines of a process have the groups too."""
    zero = {"zero_hpz_partition_size": 2}
    cases = [Case(f"zero3 {dtype} hpz", 3, dtype, zero=zero) for dtype in ("fp32", "bf16")]
    cases.append(Case("zero3 fp32 hpz offload", 3, offload=True, zero=zero))
    return cases + [Case(f"zero3 fp32 hpz {way}", 3, zero=zero, **options) for way, options in JOINT.items()]


def _joint_cases() -> list[Case]:
    """Every stage and precision, offload and checkpointing for joint blocks, and for norm="features"."""
    cases = []
    for way, options in JOINT.items():
        for stage in (0, 1, 2, 3):
            cases += [Case(f"zero{stage} {dtype} {way}", stage, dtype, **options) for dtype in ("fp32", "bf16", "fp16")]
            if stage:
                cases += [
                    Case(f"zero{stage} bf16 fp32-accumulation {way}", stage, "bf16", "fp32", **options),
                    Case(f"zero{stage} fp32 offload {way}", stage, offload=True, **options),
                    Case(f"zero{stage} fp32 overlap=1 {way}", stage, zero={"overlap_comm": True}, **options),
                ]
            if stage == 2:
                name = f"zero2 bf16 fp32-accumulation offload {way}"
                cases.append(Case(name, 2, "bf16", "fp32", offload=True, **options))
            cases.append(Case(f"zero{stage} fp32 checkpointing {way}", stage, checkpointing=True, **options))
    return cases


JOINT: dict[str, dict[str, Any]] = {
    "joint backbone": {"joint_at": "backbone"}, "joint features": {"joint_at": "features"},
    "norm=features": {"norm": "features"}, "norm=features joint": {"norm": "features", "joint_at": "features"},
}  # fmt: skip
"""Ways to run tasks on one image set, or to balance at the features, with the fields of `Case` that say so."""


def weightings_for(case: Case) -> tuple[str, ...]:
    """All weightings on fp32 engines with defaults, the ladder on every precision and offload, TBGC on variants."""
    if case.at == "features":  # norms of whole gradients are not known there, nor those of other tasks in a block
        more = ("tbgc mean",) if case.norm == "exact" else ()
        return ("sum", "tbgc", *more) if not case.zero and not case.checkpointing else ("tbgc",)
    if case.joint_at:
        return (
            ("global_clip", "task_clip", "tbgc", "tbgc mean") if case.dtype == "fp32" and not case.zero else ("tbgc",)
        )
    if case.name.removesuffix(" tasks apart") == f"zero{case.stage} fp32":
        return tuple(WEIGHTINGS)
    variant = case.zero or case.one_group or case.checkpointing or case.keys or case.optimizer != "sgd"
    return ("tbgc",) if variant else LADDER
