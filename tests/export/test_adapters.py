"""Exports of a run with adapters: merged, apart, and alone for `peft`."""

from __future__ import annotations

from pathlib import Path

import torch
from peft import PeftModel
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoModel

from allinone_ds import load
from allinone_ds.export.folders import export_run
from allinone_ds.model import AllInOneModel
from allinone_ds.models.lora import is_adapter
from allinone_ds.run_folder.names import WEIGHTS_FILE
from tests.export.untrained import untrained_run


def features(model: AllInOneModel, task: str) -> Tensor:
    """Return what the head of a task reads."""
    seen: list[Tensor] = []
    hook = model.tasks[task].register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0][-1]))
    model(task, torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(5)))
    hook.remove()
    return seen[0]


@torch.no_grad()
def test_each_export_computes_what_the_run_does(home: Path) -> None:
    untrained_run(home / "before", home=home)
    run, exported = home / "run", home / "run" / "export"
    shared = {"lora": {"rank": 4, "target_modules": ["q_proj", "v_proj"]}, "start_from": str(home / "before")}
    model = untrained_run(run, heads={"det": {"lora": {"rank": 2, "alpha": 8}}}, home=home, model=shared)
    for name, parameter in model.named_parameters():
        if is_adapter(name):
            parameter.normal_(std=0.3)
    save_file(model.state_dict(), run / WEIGHTS_FILE)
    expected = {task: features(load(run).model, task) for task in ("det", "seg")}
    plain = load(home / "before").model  # a different seed's heads, the same backbone without adapters
    assert not torch.allclose(expected["det"], expected["seg"], atol=0.1)  # the task's own adapters
    assert not torch.allclose(expected["seg"], features(plain, "seg"), atol=0.1)  # the shared ones

    done = export_run(run)
    folders = {str(folder.relative_to(exported)) for folder in done.folders}
    assert folders == {"adapter", "adapter/det", "tasks/det", "tasks/seg", "tasks/cls", "model", "backbone"}
    for task, value in expected.items():
        single = load(exported / "tasks" / task).model
        assert not any(is_adapter(name) for name in single.state_dict())
        torch.testing.assert_close(features(single, task), value, rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(features(load(exported / "model").model, task), value)

    adapted = PeftModel.from_pretrained(plain.backbone.net, exported / "adapter").eval()
    plain.backbone.net = adapted.base_model.model
    torch.testing.assert_close(features(plain, "seg"), expected["seg"])
    adapted.load_adapter(exported / "adapter" / "det", "own")
    adapted.base_model.set_adapter(["default", "own"])
    torch.testing.assert_close(features(plain, "seg"), expected["det"])
    q_proj = "encoder.layer.0.attention.q_proj.weight"
    merged = AutoModel.from_pretrained(exported / "backbone").get_parameter(q_proj)
    torch.testing.assert_close(merged, load(exported / "tasks" / "seg").backbone.net.get_parameter(q_proj))
