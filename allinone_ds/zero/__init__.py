"""The only room that knows DeepSpeed's private fields: gradient shards in and out of every engine kind."""

from .files import Take, own_checkpoint_files, save_engine
from .gate import CHECKED_RELEASES, UnsupportedEngine, checked_release, open_shards, refuse_unsupported
from .guard import EngineGuard
from .local import LocalGradients
from .masters import master_shards, publish_masters
from .reshard import load_resharded, reshard_flats
from .shards import GradientShards, Piece, Span, cut
from .traces import ParameterTraces

__all__ = [
    "CHECKED_RELEASES",
    "EngineGuard",
    "GradientShards",
    "LocalGradients",
    "ParameterTraces",
    "Piece",
    "Span",
    "Take",
    "UnsupportedEngine",
    "checked_release",
    "cut",
    "load_resharded",
    "master_shards",
    "open_shards",
    "own_checkpoint_files",
    "publish_masters",
    "refuse_unsupported",
    "reshard_flats",
    "save_engine",
]
