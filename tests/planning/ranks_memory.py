"""What a rank holds in a balanced step, part by part, compared with the plan. Started by test_memory.py."""

import sys
from functools import partial

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus
from deepspeed.runtime.zero.partitioned_param_coordinator import PartitionedParameterCoordinator
from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer

from allinone_ds import TBGC, TaskBalancer
from allinone_ds.balance.combiners.sketch import default_size
from allinone_ds.data.augmentation.transforms import stack_pixels
from allinone_ds.planning.memory import JointTasks, kept_shards, memory_parts, sizes_of
from allinone_ds.planning.traffic import moved_parts
from allinone_ds.run_config.engine_settings import read_engine
from allinone_ds.training.optimizer import parameter_groups
from allinone_ds.zero.engines.choose import open_engine
from tests.launcher import run_checks
from tests.tiny import samples, tiny_model

SIZE = {"hidden_size": 96, "num_hidden_layers": 8}  # so that padding is a small part
CASES = [
    (0, "bf16", "exact"),
    (1, "fp32", "exact"),
    (1, "bf16 fp32-accumulation", "exact"),
    (2, "bf16", "exact"),
    (2, "bf16 fp32-accumulation", "exact"),
    (3, "bf16 fp32-accumulation", "exact"),
    (1, "bf16", "sketch"),
    (2, "bf16", "delayed"),
    (3, "fp32", "sketch"),
    (3, "bf16", "delayed"),
    (1, "bf16", "features"),
    (2, "bf16", "features"),
    (3, "fp32", "features"),
    (1, "fp32", "exact, apart"),
    (2, "bf16", "exact, apart"),
    (2, "bf16", "sketch, apart"),
    (3, "bf16 masters", "exact"),
    (3, "bf16", "exact, half kept"),
    (3, "bf16", "exact, copied"),  # last: DeepSpeed's later engines in a process have copies too
]


def bytes_of(tensors) -> int:
    """Bytes of the storages behind tensors, each once."""
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors if t is not None}
    return sum(storages.values())


def weights(engine):
    return [getattr(p, "ds_tensor", p.data) for p in engine.module.parameters()]


def gradients(engine) -> list[torch.Tensor]:
    optimizer = engine.optimizer
    found = [getattr(p, name, None) for p in engine.module.parameters() for name in ("grad", "grad_accum")]
    found.append(getattr(optimizer, "grad_partitions_flat_buffer", None))
    found += getattr(optimizer, "fp32_groups_gradients_flat", [])
    found += [g for group in getattr(optimizer, "all_grad_tensors", {}).values() for g in group or ()]
    averaged = getattr(optimizer, "averaged_gradients", {})
    for group in averaged.values() if engine.zero_optimization_stage() in (1, 2) else ():
        found += [getattr(group, "flat_partition", None)] if hasattr(group, "flat_partition") else list(group or ())
    return [g for g in found if isinstance(g, torch.Tensor)]


def copies(engine) -> int:
    return bytes_of(getattr(p, "ds_secondary_tensor", None) for p in engine.module.parameters())


def gathered(engine) -> int:
    params = [p for p in engine.module.parameters() if p.ds_status == ZeroParamStatus.AVAILABLE]
    return bytes_of(p.data for p in params)


def buffers(engine) -> list[torch.Tensor]:
    """Those in which gradients wait to be reduced; allocated in a backward only."""
    return [tensor for bucket in getattr(engine.optimizer, "ipg_buckets", {}).values() for tensor in bucket.buffer]


def optimizer_tensors(engine):
    inner = getattr(engine.optimizer, "optimizer", engine.optimizer)
    states = [v for state in inner.state.values() for v in state.values() if isinstance(v, torch.Tensor)]
    masters = [] if inner is engine.optimizer else open_engine(engine).masters()
    return [*masters, *states]


def check_plan(stage: int, kind: str, norm: str) -> None:
    config = {
        "train_micro_batch_size_per_gpu": 2,
        "gradient_clipping": 0.0,
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0, "reduce_bucket_size": 50_000},
        "bf16": {"enabled": kind.startswith("bf16")},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 1_000_000,
    }
    if "accumulation" in kind:
        config["data_types"] = {"grad_accum_dtype": "fp32"}
    if "masters" in kind:
        config["bf16"] |= {"bf16_master_weights_and_grads": True, "bf16_optimizer_states": True}
    norm, _, way = norm.partition(", ")
    apart, kept, copied = (way == word for word in ("apart", "half kept", "copied"))
    zero = config["zero_optimization"]
    if kept or copied:
        zero |= {"stage3_max_live_parameters": 500_000, "stage3_max_reuse_distance": 800_000}
        zero |= {"stage3_prefetch_bucket_size": 50_000, "reduce_bucket_size": 1_000}
    if copied:
        zero["zero_hpz_partition_size"] = 2
    model = tiny_model(**SIZE)
    sizes = sizes_of(model, dict.fromkeys(model.tasks, 2))
    optimizer = torch.optim.AdamW(parameter_groups(model, 1e-3, 0.0, 1.0))
    engine = deepspeed.initialize(model=model, optimizer=optimizer, config=config)[0]
    parallel = "tasks" if apart else "data"
    balancer = TaskBalancer(engine, tuple(model.tasks), "backbone", TBGC(0.1), norm=norm, parallel=parallel)
    most = dict.fromkeys(("gradients", "balancer"), 0)
    if stage in (1, 2) and norm == "exact" and not apart:  # else the plan adds gathered weights, or reduced gradients
        most["buffers"] = 0

        def see_buffers(_):
            most["buffers"] = max(most["buffers"], bytes_of(buffers(engine)))

        next(engine.module.backbone.parameters()).register_hook(see_buffers)
    if kept:
        most["buffers"] = 0

        def see_gathered(*_):
            most["buffers"] = max(most["buffers"], gathered(engine))

        for module in engine.module.modules():
            module.register_forward_hook(see_gathered)
    for _ in range(2):
        for name in balancer.tasks:
            batch = engine.module.tasks[name].collate(samples(2))
            with balancer.task(name, micro_steps=2):
                for _ in range(2):
                    balancer.backward(engine(task=name, **batch).loss)
                    most["gradients"] = max(most["gradients"], bytes_of(gradients(engine)))
                    if copied:
                        most["weights within a node"] = max(most.get("weights within a node", 0), copies(engine))
            most["balancer"] = max(most["balancer"], balancer.extra_bytes)
        balancer.step()
        most["balancer"] = max(most["balancer"], balancer.extra_bytes)
    measured = {"weights": bytes_of(weights(engine)), "optimizer": bytes_of(optimizer_tensors(engine)), **most}
    sketch = default_size(sizes.trained)
    if norm in ("sketch", "delayed") or apart:  # the plan counts the local gradient once, not for the balancer as well
        measured["balancer"] -= balancer._combiner.local.bytes
    groups = balancer.groups if apart else None
    planned = memory_parts(read_engine(config), sizes, dist.get_world_size(), norm, 2, 1, sketch, groups=groups)[0]
    if apart:  # the busiest rank
        busiest = torch.tensor([measured["balancer"], measured["gradients"]])
        dist.all_reduce(busiest, op=dist.ReduceOp.MAX)
        measured["balancer"], measured["gradients"] = busiest.tolist()
    wrong = {
        part: f"planned {planned[part]:,}, measured {found:,} ({planned[part] / found - 1:+.1%})"
        for part, found in measured.items()
        if abs(planned[part] - found) > 0.15 * found
    }
    balancer.detach()
    engine.destroy()
    assert not wrong, wrong


class Traffic:
    """Counts the elements of gradients that are averaged over the ranks, and of weights that are gathered."""

    weights = PartitionedParameterCoordinator, "_PartitionedParameterCoordinator__all_gather_params_"
    reduced = (
        (DeepSpeedZeroOptimizer, "average_tensor"),
        (DeepSpeedZeroOptimizer_Stage3, "_DeepSpeedZeroOptimizer_Stage3__avg_scatter_grads"),
    )

    def __enter__(self):
        self.elements = {"weights": 0, "gradients": 0}
        self._before = {place: getattr(*place) for place in (self.weights, *self.reduced)}
        for place, before in self._before.items():

            def counting(owner, given, *args, before=before, place=place, **kwargs):
                if place == self.weights:
                    missing = [p.ds_numel for p in given if p.ds_status == ZeroParamStatus.NOT_AVAILABLE]
                    self.elements["weights"] += sum(missing)
                elif isinstance(given, torch.Tensor):
                    self.elements["gradients"] += given.numel()
                else:
                    self.elements["gradients"] += sum(p.grad.numel() for p in given)
                return before(owner, given, *args, **kwargs)

            setattr(*place, counting)
        return self

    def __exit__(self, *_):
        for place, before in self._before.items():
            setattr(*place, before)


def check_joint(stage: int, at: str, micro_steps: int, live: int) -> None:
    """A group of three tasks: what a rank holds, and the elements that a step averages and gathers."""
    zero = {"stage": stage, "reduce_bucket_size": 50_000}
    if stage == 3:
        zero |= {"stage3_param_persistence_threshold": 0, "stage3_max_live_parameters": live,
                 "stage3_max_reuse_distance": 2 * live}  # fmt: skip
    config = {
        "train_micro_batch_size_per_gpu": 2,
        "gradient_clipping": 0.0,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 1_000_000,
    }
    model = tiny_model(**SIZE)
    tasks = tuple(model.tasks)
    sizes = sizes_of(model, dict.fromkeys(tasks, micro_steps), [JointTasks(tasks, at)])
    optimizer = torch.optim.AdamW(parameter_groups(model, 1e-3, 0.0, 1.0))
    engine = deepspeed.initialize(model=model, optimizer=optimizer, config=config)[0]
    balancer = TaskBalancer(engine, tasks, "backbone", TBGC(0.1))
    made = samples(2)
    pixels = stack_pixels(made)
    labels = {task: engine.module.tasks[task].collate(made)["labels"] for task in tasks}
    most = {"balancer": 0}
    for _ in range(3):
        with Traffic() as traffic:
            with balancer.joint(tasks, micro_steps=micro_steps, at=at):
                for _ in range(micro_steps):
                    outputs = engine(task=list(tasks), pixel_values=pixels, labels=labels)
                    balancer.backward({task: output.loss for task, output in outputs.items()})
                    most["balancer"] = max(most["balancer"], balancer.extra_bytes)
            balancer.step()
            most["balancer"] = max(most["balancer"], balancer.extra_bytes)
    read = read_engine(config)
    world, kept = dist.get_world_size(), kept_shards(TBGC(0.1), sizes)
    planned = memory_parts(read, sizes, world, "exact", 2, kept, 0)[0]
    moved = moved_parts(read, sizes, world, "exact", 0)
    factor = 2 if read.all_reduces else 1
    elements = {"gradients": moved["gradients"] / factor, "weights": moved.get("weights", 0)}
    elements = {key: value / 4 * world / (world - 1) for key, value in elements.items()}
    measured = {"weights": bytes_of(weights(engine)), "optimizer": bytes_of(optimizer_tensors(engine)), **most}
    wrong = [(key, planned[key], found) for key, found in measured.items() if abs(planned[key] - found) > 0.1 * found]
    wrong += [(key, elements[key], found) for key, found in traffic.elements.items()
              if abs(elements[key] - found) > 0.05 * found]  # fmt: skip
    balancer.detach()
    engine.destroy()
    assert not wrong, wrong


JOINT = [
    (1, "backbone", 2, 0),
    (2, "backbone", 1, 0),
    (2, "features", 2, 0),
    (3, "backbone", 2, 10**9),
    (3, "backbone", 1, 100),
    (3, "backbone", 2, 100),
    (3, "features", 2, 100),
]
"""ZeRO stage, place, micro-steps, and weights that ZeRO-3 may keep gathered."""


def name_of(case) -> str:
    if case in JOINT:
        return "check_joint zero{} {} {} {}".format(*case)
    return "check_plan zero{} {} {}".format(*case)


if __name__ == "__main__":
    checks = {name_of(case): partial(check_plan, *case) for case in CASES[:-1]}
    checks |= {name_of(case): partial(check_joint, *case) for case in JOINT}
    run_checks(checks | {name_of(CASES[-1]): partial(check_plan, *CASES[-1])}, sys.argv[1])
