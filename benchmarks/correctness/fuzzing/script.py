"""Writes a program as a script of its own, for torchrun: the model, the engine's config and the loop, line by line."""

from __future__ import annotations

import inspect
from pprint import pformat

from benchmarks.correctness.fuzzing import model
from benchmarks.correctness.fuzzing.program import Program

HEAD = '''"""{problem}

Run it: OMP_NUM_THREADS=1 DS_ACCELERATOR=cpu torchrun --nproc_per_node={world} THIS_FILE
The whole program, with its reference: python -m benchmarks.correctness.fuzz --program THIS_FILE with the suffix .json
"""

{model}

import deepspeed
import torch.distributed as dist
from allinone_ds import TaskBalancer, weighting_from_config

deepspeed.init_distributed("gloo")
deepspeed.accelerator.get_accelerator().is_fp16_supported = lambda: True
RANK = dist.get_rank()
PROGRAM_MODEL = {shape}
CONFIG = {config}


{optimizer}

def open_all(seed=0):
    net = make_model(PROGRAM_MODEL, seed).float()
    optimizer = make_optimizer(net, param_groups(net, {one_group}))
    engine = deepspeed.initialize(model=net, optimizer=optimizer, config=CONFIG)[0]
    balancer = TaskBalancer(engine, {tasks}, net.shared, weighting_from_config({weighting}), **{options})
    return engine, balancer


engine, balancer = open_all()
dtype = next(engine.module.parameters()).dtype


def run(task, number, step, micro_steps, batch):
    mine = balancer.share(task, micro_steps)
    with balancer.task(task, micro_steps=len(mine)):
        for k, rank in mine:
            loss = {forward}(task, inputs(number, step, k, rank, batch).to(dtype), k == micro_steps - 1)
            balancer.backward(loss)


def show(report):
    if RANK == 0:
        print({{t: float(v) for t, v in report.norms.items()}}, {{t: float(v) for t, v in report.scales.items()}},
              report.skipped, report.applied)

'''


def write_script(program: Program, problem: str) -> str:
    """Return the text of the script.

    Args:
        program: what to do.
        problem: what went wrong, for the docstring.
    """
    last = problem.strip().split("\n")[-1].replace('"""', "'''").replace("\\", "/")
    optimizer = {
        "sgd": "torch.optim.SGD(groups, lr=LR)",
        "momentum": "torch.optim.SGD(groups, lr=LR, momentum=0.9, weight_decay=0.1)",
        "adamw": "torch.optim.AdamW(groups, lr=LR, weight_decay=0.1, eps=1e-4)",
    }[program.optimizer]
    text = HEAD.format(
        problem=last,
        world=program.world,
        model=inspect.getsource(model).split('"""', 2)[2].strip().replace("from __future__ import annotations\n\n", ""),
        shape=pformat(program.model, sort_dicts=False),
        config=pformat(program.case.config(), sort_dicts=False),
        optimizer=f"def make_optimizer(net, groups):\n    return {optimizer}\n".replace("LR", "0.003"),
        one_group=program.case.one_group,
        tasks=program.tasks,
        weighting=program.weighting,
        options={**program.options, "groups": program.steps[0].get("groups")},
        forward="engine.module" if program.loss_from == "module" else "engine",
    )
    lines = []
    for index, step in enumerate(program.steps):
        event = step["event"] or {"kind": None}
        if event["kind"]:
            lines.append(f"# here: {event['kind']}, task {event['task']}, {event['place']}")
        if event["kind"] == "reload":
            lines += [
                f'engine.save_checkpoint("fuzz", tag="{index}", client_state={{"balancer": balancer.state_dict()}})',
                "balancer.detach()",
                "engine.destroy()",
                "engine, balancer = open_all(seed=1)",
                f'_, client = engine.load_checkpoint("fuzz", tag="{index}")',
                'balancer.load_state_dict(client["balancer"])',
            ]
        if "groups" in step:
            lines.append(f"balancer.regroup({step['groups']})")
        for task, micro_steps in step["tasks"]:
            number = program.tasks.index(task)
            lines.append(f'if "{task}" in balancer.tasks:')
            lines.append(f'    run("{task}", {number}, {index}, {micro_steps}, {step["batch"]})')
        lines.append("show(balancer.step(require_all=False))")
    return text + "\n".join(lines) + "\n"
