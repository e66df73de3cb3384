"""A task of your own, outside the package: predict whether an image was rotated by 0, 90, 180 or 270 degrees.

`python examples/own_task.py` trains it on noise. In a run's YAML file its type is "own_task:RotationTask".
"""

import torch
from transformers.modeling_outputs import ImageClassifierOutput

from allinone_ds.data.augmentation.transforms import stack_images
from allinone_ds.model import AllInOneModel
from allinone_ds.models.backbone import BackboneConfig, build_backbone
from allinone_ds.tasks import Task, build_task
from allinone_ds.tasks.classification import ClassificationMetric
from allinone_ds.tasks.drawing import caption, enlarge


class Top1(ClassificationMetric):
    def update(self, predictions, samples):
        super().update(predictions, [{"label": sample["index"] % 4} for sample in samples])


class RotationTask(Task):
    kind, main_metric = "classification", "top1"

    def __init__(self, name, classes, channels, *args, **options):
        super().__init__(name, ["0", "90", "180", "270"], channels, *args, **options)
        self.classifier = torch.nn.Linear(channels, 4)

    def forward(self, features, pixel_values, labels=None):
        logits = self.classifier(features[-1].mean((-2, -1))).float()  # (B, 4)
        loss = None if labels is None else torch.nn.functional.cross_entropy(logits, labels)
        return ImageClassifierOutput(loss=loss, logits=logits)

    @staticmethod
    def collate(samples):  # the target depends only on the sample, so that training and evaluation agree
        turns = [sample["index"] % 4 for sample in samples]
        images = [image.rot90(k, (-2, -1)) for image, k in zip(stack_images(samples), turns, strict=True)]
        return {"pixel_values": torch.stack(images), "labels": torch.tensor(turns)}

    def predict(self, outputs, sizes):
        return [{"label": int(k)} for k in outputs.logits.argmax(-1)]

    def metric(self):
        return Top1(len(self.classes))

    def draw(self, image, prediction, sample=None):
        return caption(enlarge(image.cpu())[0], [f"rotated by {self.classes[prediction['label']]}"])


if __name__ == "__main__":
    backbone = build_backbone(BackboneConfig(config={"hidden_size": 48, "num_hidden_layers": 2, "image_size": 28}))
    model = AllInOneModel(backbone, {"rot": build_task("__main__:RotationTask", "rot", [], backbone, (28, 28))})
    batch = RotationTask.collate([{"image": torch.randint(255, (3, 28, 28)).byte(), "index": i} for i in range(8)])
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for _ in range(20):
        (loss := model("rot", **batch).loss).backward()
        optimizer.step()
        optimizer.zero_grad()
    print(f"loss {loss.item():.4f}")
