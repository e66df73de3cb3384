"""Train two tasks on one ViT with balanced gradients and ZeRO-2; callbacks and `report_to` are those of transformers.

torchrun --nproc_per_node 2 examples/trainer_script.py
allinone-ds eval runs/trainer_script                    # also: report, export, predict
"""

import argparse
from pathlib import Path

from transformers import TrainerCallback, set_seed

from allinone_ds import TBGC, AllInOneArguments, AllInOneTrainer, finish_run
from allinone_ds.data import CocoSource, ImageListSource, TaskData, eval_transform, open_source, train_transform
from allinone_ds.data.demo import DemoSizes, make_demo_data
from allinone_ds.model import AllInOneModel
from allinone_ds.models.backbone import BackboneConfig, build_backbone
from allinone_ds.tasks import build_task

SIZE = (48, 48)  # H, W in pixels
VIT = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "patch_size": 8, "image_size": 48}
KINDS = {"boxes": "detection", "labels": "classification"}  # name of a task -> its kind


class PrintMetrics(TrainerCallback):
    def on_log(self, args, state, control, logs, **kwargs):
        if state.is_world_process_zero:
            print(state.global_step, {k: v for k, v in logs.items() if k.startswith(("loss/", "grad_norm/", "eval_"))})


parser = argparse.ArgumentParser()
parser.add_argument("--steps", type=int, default=60)
parser.add_argument("--output", default="runs/trainer_script")
script = parser.parse_args()
args = AllInOneArguments(  # starts the process group, which ZeRO-3 needs before the model is built
    output_dir=script.output, max_steps=script.steps, logging_steps=20, learning_rate=1e-3, backbone_lr_factor=1.0,
    deepspeed="configs/deepspeed/zero2.json", save_strategy="no", per_device_train_batch_size=16,
)  # fmt: skip
set_seed(args.seed)
with args.main_process_first():
    sizes = DemoSizes(detection=(200, 41), segmentation=(1, 1), classification=(200, 41))
    demo = make_demo_data(Path(script.output) / "data", sizes=sizes, progress=False)


def task_data(task, split, classes=None):
    source = (CocoSource if task == "boxes" else ImageListSource)(**demo.sources(KINDS[task], split))
    transform = train_transform(["RandomHorizontalFlip"], SIZE) if split == "train" else eval_transform(SIZE)
    return TaskData(open_source(source, demo.root, classes=classes), transform, tasks[task].collate, batch_size=8)


backbone = build_backbone(BackboneConfig(stem="conv", config=VIT))
tasks = {task: build_task(kind, task, demo.classes, backbone, SIZE) for task, kind in KINDS.items()}
trainer = AllInOneTrainer(
    AllInOneModel(backbone, tasks), args,
    train_dataset={task: task_data(task, "train") for task in tasks},
    eval_dataset={task: task_data(task, "test", demo.classes) for task in tasks},
    weighting=TBGC(max_norm=0.1), callbacks=[PrintMetrics()],
)  # fmt: skip
finish_run(trainer, trainer.train().metrics)  # evaluates, and writes weights, metrics.json and report.html
trainer.accelerator.end_training()
