"""A small variant of every head."""

from tests.tiny import LIGHT, tiny_model

HEADS = {
    "fcos": ("det", *LIGHT["det"]),
    "fcos-pyramid": ("det", "fcos", {"width": 32, "num_convs": 1, "scales": [2.0, 1.0, 0.5]}),
    "rf_detr": (
        "det",
        "rf_detr",
        {
            "width": 32,
            "num_queries": 16,
            "groups": 3,
            "decoder_layers": 2,
            "ffn_dim": 64,
            "self_attention_heads": 4,
            "cross_attention_heads": 4,
        },
    ),
    "light": ("seg", *LIGHT["seg"]),
    "upernet": ("seg", "upernet", {"width": 16, "scales": [2.0, 1.0, 0.5]}),
    "mask2former": (
        "seg",
        "mask2former",
        {
            "width": 32,
            "num_queries": 8,
            "encoder_layers": 1,
            "decoder_layers": 4,
            "attention_heads": 4,
            "encoder_ffn_dim": 64,
            "ffn_dim": 64,
            "points": 256,
        },
    ),
    "linear": ("cls", *LIGHT["cls"]),
    "arcface": ("cls", "arcface", {"width": 32, "scale": 16.0}),
    "sub-center": ("cls", "arcface", {"width": 32, "scale": 16.0, "sub_centers": 3, "class_counts": [50, 10, 2]}),
}


def build(head):
    name, kind, options = HEADS[head]
    model = tiny_model({name: (kind, options)})
    return model, name, model.tasks[name]
