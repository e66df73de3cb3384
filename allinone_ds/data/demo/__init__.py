"""Demo data: images with labels that are composed from photos which come with the package."""

from allinone_ds.data.demo.folders import DEMO_SIZES, FULL_SIZES, TASKS, DemoData, DemoSizes, make_demo_data
from allinone_ds.data.demo.joint import JointSizes, make_joint_demo_data
from allinone_ds.data.demo.scenes import CLASSES, IGNORE, Pool, Scene, SceneLook, compose_scene, load_pool, make_pool

__all__ = [
    "CLASSES",
    "DEMO_SIZES",
    "FULL_SIZES",
    "IGNORE",
    "TASKS",
    "DemoData",
    "DemoSizes",
    "JointSizes",
    "Pool",
    "Scene",
    "SceneLook",
    "compose_scene",
    "load_pool",
    "make_demo_data",
    "make_joint_demo_data",
    "make_pool",
]
