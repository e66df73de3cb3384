"""DeepSpeed's checkpoint files: written so that every rank ends its save, read without running code from them."""

from __future__ import annotations

import argparse
import contextlib
import os
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.runtime.checkpoint_engine.torch_checkpoint_engine import TorchCheckpointEngine
from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
from deepspeed.runtime.zero.config import ZeroStageEnum
from deepspeed.utils.tensor_fragment import fragment_address

from .gate import UnsupportedEngine

# Classes that DeepSpeed 0.19.8 pickles into its checkpoints beside tensors and plain containers.
KNOWN_CLASSES = (LossScaler, DynamicLossScaler, ZeroStageEnum, fragment_address)
STEPS_FILE = "steps"


class CheckpointFiles(TorchCheckpointEngine):
    """DeepSpeed's own reader and writer of files, with two differences.

    Reading is `torch.load(weights_only=True)` with `KNOWN_CLASSES` allowed: DeepSpeed's own would run any code that a
    file holds. And during `save_engine` a failed write is noted, not raised: a rank that left `save_checkpoint` in its
    middle would leave the others waiting in its barriers.
    """

    def __init__(self, own: TorchCheckpointEngine) -> None:
        super().__init__()
        self.zipfile_serialization = own.zipfile_serialization
        self.errors: list[str] | None = None
        """Where failed writes are noted; None: they are raised."""

    def save(self, state_dict: Any, path: str) -> None:
        try:
            super().save(state_dict, path)
        except (OSError, RuntimeError) as error:  # torch's own file writer raises the second
            if self.errors is None:
                raise
            self.errors.append(f"{Path(path).name}: {error}")

    def load(self, path: str, map_location: Any = None) -> Any:
        with torch.serialization.safe_globals(list(KNOWN_CLASSES)):
            return torch.load(path, map_location=map_location, weights_only=True)


def own_checkpoint_files(engine: Any) -> CheckpointFiles:
    """Give an engine `CheckpointFiles`; returns them.

    Args:
        engine: a DeepSpeedEngine.

    Raises:
        UnsupportedEngine: its config asks for a writer whose files may not be complete when the save returns.
    """
    own = engine.checkpoint_engine
    if isinstance(own, CheckpointFiles):
        return own
    if type(own) is not TorchCheckpointEngine:
        raise UnsupportedEngine(
            f"DeepSpeed's {type(own).__name__} is not supported: checkpoints must be complete when the save returns; "
            "take 'checkpoint.writer' and 'datastates_ckpt' out of the DeepSpeed config"
        )
    engine.checkpoint_engine = CheckpointFiles(own)
    return engine.checkpoint_engine


def save_engine(engine: Any, folder: Path) -> list[str]:
    """`engine.save_checkpoint`, which every rank leaves at its end even when it could not write. Collective.

    Args:
        engine: a DeepSpeedEngine.
        folder: where to; it exists.

    Returns:
        What this rank could not write, one line a file.
    """
    files = own_checkpoint_files(engine)
    errors: list[str] = []

    def copy_recovery_script(save_path: str) -> None:
        try:
            type(engine)._copy_recovery_script(engine, save_path)
        except OSError as error:
            errors.append(f"the recovery scripts: {error}")

    files.errors = errors
    engine._copy_recovery_script = copy_recovery_script
    try:
        engine.save_checkpoint(str(folder), save_latest=False)
    finally:
        files.errors = None
        del engine._copy_recovery_script
    if dist.get_rank() == 0:
        try:
            (folder / "latest").write_text(f"global_step{engine.global_steps}")
        except OSError as error:
            errors.append(f"latest: {error}")
    return errors


def load_resharded(engine: Any, checkpoint: Path, weights: dict[str, torch.Tensor], scratch: Path) -> None:
    """Load a checkpoint that other ranks, or another ZeRO stage, wrote: DeepSpeed's universal checkpoint. Collective.

    DeepSpeed reads these files as pickles: give it checkpoints of your own only.

    Args:
        engine: a DeepSpeedEngine, ZeRO stage 1, 2 or 3.
        checkpoint: what `save_engine` wrote.
        weights: of the whole model, as saved with it.
        scratch: an empty folder that all ranks see, for as much as the checkpoint holds.
    """
    universal = scratch / "universal"
    if dist.get_rank() == 0:
        shapes = {name: getattr(p, "ds_shape", p.shape) for name, p in engine.module.named_parameters()}
        _convert(checkpoint / (checkpoint / "latest").read_text().strip(), universal, shapes)
    dist.barrier()
    groups = engine.optimizer.optimizer.param_groups
    own = [{key: value for key, value in group.items() if key != "params"} for group in groups]
    engine._config.load_universal_checkpoint = True
    try:
        engine.load_checkpoint(str(scratch), tag=universal.name)
    finally:
        engine._config.load_universal_checkpoint = False
    # stage 3 gives every group the first one's rates and decays, and all of them one and the same step counter, which
    # each would count up; stages 1 and 2 find no counter in what stage 3 wrote
    for group, values in zip(groups, own, strict=True):
        group.update(values)
    count = float((universal / STEPS_FILE).read_text())
    for state in engine.optimizer.optimizer.state.values():
        if isinstance(state.get("step"), torch.Tensor):
            state["step"] = torch.full_like(state["step"], count)
    _load_the_rest(engine.module, weights)


def _load_the_rest(module: torch.nn.Module, weights: dict[str, torch.Tensor]) -> None:
    """Buffers and frozen parameters, which a universal checkpoint leaves out."""
    with torch.no_grad():
        for name, buffer in module.named_buffers():
            if name in weights:
                buffer.copy_(weights[name])
        for name, param in module.named_parameters():
            if not param.requires_grad and name in weights:
                with deepspeed.zero.GatheredParameters([param], modifier_rank=0):
                    if param.numel():  # of a partitioned one only rank 0's change counts
                        param.copy_(weights[name].view(param.shape))


def _convert(source: Path, target: Path, shapes: dict[str, torch.Size]) -> None:
    """`source`, as a universal checkpoint that engines of stages 1, 2 and 3 can read, in `target`."""
    from deepspeed.checkpoint import ds_to_universal

    wanted = argparse.Namespace(
        input_folder=str(source),
        output_folder=str(target),
        num_extract_workers=1,
        num_merge_workers=1,
        keep_temp_folder=False,
        strict=True,
        inject_missing_state=True,
    )
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere), contextlib.redirect_stderr(nowhere):
        ds_to_universal.main(wanted)
    states = target / "zero" / "optimizer_state.pt"
    with torch.serialization.safe_globals(list(KNOWN_CLASSES)):
        state = torch.load(states, weights_only=True)
        counts = [torch.load(path, weights_only=True) for path in (target / "zero").glob("*/step.pt")]
    if "optimizer_state_dict" not in state:  # of stage 1 or 2; what stage 3 looks for
        count = max((float(c["param"] if isinstance(c, dict) else c) for c in counts), default=0.0)
        state["optimizer_state_dict"] = {
            "state": {0: {"step": torch.tensor(count)}},
            "param_groups": state["param_groups"],
        }
    else:  # of stage 3, which writes flat tensors; what stages 1 and 2 look for
        count = float(state["optimizer_state_dict"]["state"][0]["step"])
        state.setdefault("ds_version", deepspeed.__version__)
        for name in (name for name in shapes if (target / "zero" / name).is_dir()):  # frozen ones have no folder
            shape = shapes[name]
            for path in (target / "zero" / name).glob("*.pt"):
                content = torch.load(path, weights_only=True)
                if isinstance(content, torch.Tensor) and content.numel() == shape.numel():
                    torch.save({"param": content.view(shape)}, path)
            torch.save(torch.tensor(count), target / "zero" / name / "step.pt")
    torch.save(state, states)
    (target / STEPS_FILE).write_text(str(count))
    # an engine looks for its own stage's name of the file with counters and schedule
    files = [target / "mp_rank_00_model_states.pt", target / "zero_pp_rank_0_mp_rank_00_model_states.pt"]
    found = next(file for file in files if file.exists())
    for file in files:
        if not file.exists():
            file.symlink_to(found.name)
