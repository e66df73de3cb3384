"""The optimizer step and the lifecycle of a run: trainer, checkpoints, signals, stalled ranks, launcher.

May import every other folder.
"""

from allinone_ds._lazy import lazy_names

__getattr__, __all__ = lazy_names(
    __name__,
    {
        "trainer": ["AllInOneTrainer"],
        "..run_config.arguments": ["AllInOneArguments"],
        "..run_config.schema": ["RunConfig", "load_config"],
    },
)
