"""The only room that knows DeepSpeed's private fields: gradient shards in and out of every engine kind."""

from .gate import CHECKED_RELEASES, UnsupportedEngine, checked_release, open_shards, refuse_unsupported
from .guard import EngineGuard
from .local import LocalGradients
from .masters import master_shards, publish_masters
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
    "UnsupportedEngine",
    "checked_release",
    "cut",
    "master_shards",
    "open_shards",
    "publish_masters",
    "refuse_unsupported",
]
