"""Print the exactness table: balanced training on every kind of engine against a float64 single-process reference.

    python benchmarks/exactness.py                 # every case on 1, 2 and 4 ranks: the table in docs/exactness.md
    python benchmarks/exactness.py --world 2 --only zero2

Each case takes 5 SGD steps on 3 tasks whose losses differ by 3,000x and compares all weights and norms.
The figure for fp32 is the largest difference of a weight from float64. 16-bit rows are compared with the same steps
done by hand in that type (forward and backward in 16 bit, sums in float64), relative to the largest change of a weight.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

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
GROUPS = {
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
    checkpointing: bool = False
    zero: dict = field(default_factory=dict)
    apart: bool = False
    """Tasks on different ranks; `GROUPS` of the world size, in turns."""

    def config(self) -> dict:
        """The DeepSpeed config."""
        zero = {"stage": self.stage, "reduce_bucket_size": 400, "allgather_bucket_size": 400, **self.zero}
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
        return config


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
    cases.append(Case("zero2 bf16 fp32-accumulation tasks apart", 2, "bf16", "fp32", apart=True))
    cases.append(Case("zero2 fp32 round robin", 2, zero={"round_robin_gradients": True}))
    cases.append(Case("zero3 fp32 sub-groups", 3, zero={"sub_group_size": 150}))
    return cases


def weightings_for(case: Case) -> tuple[str, ...]:
    """All weightings on fp32 engines with defaults, the ladder on every precision and offload, TBGC on variants."""
    if case.name.removesuffix(" tasks apart") == f"zero{case.stage} fp32":
        return tuple(WEIGHTINGS)
    variant = case.zero or case.one_group or case.checkpointing
    return ("tbgc",) if variant else LADDER


def run_case(case: Case, weighting: dict, micro_steps: tuple[int, ...]) -> dict:
    """Train on this rank's engine and compare with the reference; collective. Returns the differences."""
    import deepspeed
    import torch
    import torch.distributed as dist
    import toy

    from allinone_ds import TaskBalancer, weighting_from_config

    world = dist.get_world_size()
    counts = dict(zip(toy.TASKS, micro_steps, strict=True))
    model = toy.make_model(checkpointing=case.checkpointing).float()
    optimizer = torch.optim.SGD(toy.param_groups(model, per_head=not case.one_group), lr=toy.rate(weighting))
    engine = deepspeed.initialize(model=model, optimizer=optimizer, config=case.config())[0]
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[case.dtype]
    parallel = "tasks" if case.apart else "data"
    balancer = TaskBalancer(engine, toy.TASKS, "backbone", weighting_from_config(weighting), parallel=parallel)
    reports = []
    for step in range(STEPS):
        if case.apart:
            balancer.regroup(GROUPS[world][step % len(GROUPS[world])])
        for task in balancer.tasks:
            mine = balancer.share(task, counts[task])
            with balancer.task(task, micro_steps=len(mine)):
                for k, rank in mine:
                    x = toy.inputs(task, step, k, rank).to(engine.device, dtype)
                    balancer.backward(engine(task, x, k == counts[task] - 1))
        reports.append(balancer.step())
    wanted = toy.reference_run(weighting, STEPS, counts, world, torch.float64 if case.dtype == "fp32" else dtype)
    start = dict(toy.make_model().named_parameters())
    largest = max(float((wanted.params[n] - p.detach()).abs().max()) for n, p in start.items())
    worst = 0.0
    for name, param in engine.module.named_parameters():
        if param.requires_grad:
            worst = max(worst, float((master_weights(engine, param) - wanted.params[name]).abs().max()))
    norms = max(
        abs(float(report.norms[t]) / want[t] - 1)
        for report, want in zip(reports, wanted.norms, strict=True)
        for t in want
    )
    scales = max(
        abs(float(report.scales[t]) / want[t] - 1)
        for report, want in zip(reports, wanted.scales, strict=True)
        for t in want
    )
    overflows = sum(report.overflow for report in reports)
    balancer.detach()
    engine.destroy()
    return {
        "weights": worst,
        "weights_relative": worst / largest,
        "norms": norms,
        "scales": scales,
        "overflows": overflows,
    }


def master_weights(engine, param):
    """The fp32 weights the optimizer steps on, whole, as float64: the parameter itself in an fp32 engine."""
    import deepspeed
    import torch
    from deepspeed.utils import safe_get_full_fp32_param

    if param.dtype == torch.float32:
        with deepspeed.zero.GatheredParameters([param]):
            return param.detach().double().cpu().clone()
    if engine.zero_optimization_stage():
        return safe_get_full_fp32_param(param).detach().double().cpu().view(getattr(param, "ds_shape", param.shape))
    for low, high in zip(engine.optimizer.fp16_groups, engine.optimizer.fp32_groups, strict=True):
        for p, master in zip(low, high, strict=True):
            if p is param:
                return master.detach().double().view_as(param)
    raise KeyError("the optimizer does not hold this parameter")


def _worker(args: argparse.Namespace) -> None:
    import deepspeed
    import torch.distributed as dist

    deepspeed.init_distributed()
    # DeepSpeed refuses fp16 on CPUs without fp16 instructions; torch computes it there all the same, only slower
    deepspeed.accelerator.get_accelerator().is_fp16_supported = lambda: True
    rows = []
    for case in all_cases():
        if args.only and not any(word in case.name for word in args.only):
            continue
        for weighting in args.weighting or weightings_for(case):
            for label, micro_steps in MICRO_STEPS.items():
                result = run_case(case, WEIGHTINGS[weighting], micro_steps)
                rows.append({"case": asdict(case), "weighting": weighting, "micro_steps": label,
                             "world": dist.get_world_size(), **result})  # fmt: skip
                if dist.get_rank() == 0:
                    print(f"{case.name:42s} {weighting:16s} {label} R={rows[-1]['world']} "
                          f"weights {result['weights']:.1e} (of update {result['weights_relative']:.1e}) "
                          f"norms {result['norms']:.1e}", flush=True)  # fmt: skip
    if dist.get_rank() == 0:
        Path(args.out).write_text(json.dumps(rows))
    dist.barrier()


def launch(world: int, only: list[str], weighting: list[str], out: Path) -> list[dict]:
    """Run the cases on `world` ranks through torchrun."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={world}", __file__,
               "--worker", "--out", str(out), "--only", *only, "--weighting", *weighting]  # fmt: skip
    subprocess.run(command, check=True, env={**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"})
    return json.loads(out.read_text())


def table(rows: list[dict]) -> str:
    """Two markdown tables: engines by world size (worst over weightings, micro-steps), and weightings by ZeRO stage."""
    worlds = sorted({row["world"] for row in rows})
    names = dict.fromkeys(row["case"]["name"] for row in rows)
    lines = [_row(["engine", *(f"R = {w}" for w in worlds), "norms", "runs"]), "|---" * (len(worlds) + 3) + "|"]
    for name in names:
        mine = [row for row in rows if row["case"]["name"] == name]
        cells = [_worst([r for r in mine if r["world"] == w]) for w in worlds]
        lines.append(_row([name, *cells, f"{max(r['norms'] for r in mine):.1e}", str(len(mine))]))
    stages = [n for n in names if n in {f"zero{stage} fp32" for stage in range(4)}]
    labels = [(w, m) for w in WEIGHTINGS for m in MICRO_STEPS if any(r["weighting"] == w for r in rows)]
    lines += ["", _row(["weighting", "micro-steps", *stages]), "|---" * (len(stages) + 2) + "|"]
    for weighting, micro_steps in labels:
        mine = [r for r in rows if (r["weighting"], r["micro_steps"]) == (weighting, micro_steps)]
        lines.append(
            _row([weighting, micro_steps, *(_worst([r for r in mine if r["case"]["name"] == s]) for s in stages)])
        )
    return "\n".join(lines)


def _row(cells: list[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _worst(rows: list[dict]) -> str:
    keys = {"fp32": "weights"}
    return f"{max(r[keys.get(r['case']['dtype'], 'weights_relative')] for r in rows):.1e}" if rows else ""


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--world", type=int, nargs="*", default=[1, 2, 4], help="numbers of ranks")
    parser.add_argument("--only", nargs="*", default=[], help="cases whose name contains one of these")
    parser.add_argument("--weighting", nargs="*", default=[], choices=list(WEIGHTINGS), help="these weightings only")
    parser.add_argument("--json", type=Path, help="write all rows here")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--out", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        _worker(args)
        return
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for world in args.world:
            rows += launch(world, args.only, args.weighting, Path(folder) / f"{world}.json")
    print(table(rows))
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(rows) + "\n")


if __name__ == "__main__":
    main()
