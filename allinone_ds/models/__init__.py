"""The shared backbone, its heads' building blocks, and the model that holds backbone and tasks."""

from allinone_ds.models.model import AllInOneModel

__all__ = ["AllInOneModel"]
