"""Image classifiers of transformers' registry, small, with random weights, for `vision_nets.py`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

VIT = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
       "intermediate_size": 48, "image_size": 64, "patch_size": 16}  # fmt: skip
DINO = {**{k: v for k, v in VIT.items() if k != "intermediate_size"}, "mlp_ratio": 2}
TEXT = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 1,
        "intermediate_size": 16}  # fmt: skip
FOUR = {"hidden_sizes": [8, 16, 24, 32], "depths": [1, 1, 2, 1]}
WINDOWS = {"embed_dim": 16, "depths": [2, 1, 1], "num_heads": [1, 2, 4], "image_size": 64,
           "window_size": 4}  # fmt: skip
# model type -> what makes its configuration small
CONFIGS: dict[str, dict[str, Any]] = {
    "beit": VIT,
    "bit": {"embedding_size": 16, "hidden_sizes": [16, 32, 64, 64], "depths": [1, 1, 1, 1],
            "num_groups": 8},
    "clip": {"vision_config": VIT, "text_config": TEXT},
    "convnext": FOUR,
    "convnextv2": FOUR,
    "cvt": {"embed_dim": [16, 32, 48], "num_heads": [1, 2, 3], "depth": [1, 2, 3]},
    "data2vec-vision": VIT,
    "deit": VIT,
    "dinov2": DINO,
    "dinov2_with_registers": DINO,
    "donut-swin": WINDOWS,
    "efficientnet": {"width_coefficient": 0.25, "depth_coefficient": 0.3, "hidden_dim": 320,
                     "image_size": 64},
    "focalnet": {"embed_dim": 16, "depths": [1, 1, 1, 1], "image_size": 64},
    "hgnet_v2": {"stem_channels": [3, 8, 12], "stage_in_channels": [12, 24, 48, 64],
                 "stage_mid_channels": [8, 12, 16, 24], "stage_out_channels": [24, 48, 64, 96],
                 "hidden_sizes": [24, 48, 64, 96], "embedding_size": 12},
    "hiera": {"embed_dim": 24, "depths": [1, 1, 2, 1], "num_heads": [1, 2, 4, 8]},
    "ijepa": VIT,
    "imagegpt": {"n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 64, "vocab_size": 32},
    "levit": {"image_size": 64, "hidden_sizes": [32, 48, 64], "num_attention_heads": [2, 3, 4],
              "depths": [1, 1, 1], "key_dim": [8, 8, 8]},
    "metaclip_2": {"vision_config": VIT, "text_config": TEXT},
    "mobilenet_v1": {"depth_multiplier": 0.25, "image_size": 64},
    "mobilenet_v2": {"depth_multiplier": 0.25, "image_size": 64},
    "mobilevit": {"hidden_sizes": [16, 24, 32], "neck_hidden_sizes": [8, 8, 16, 16, 16, 24, 64],
                  "image_size": 64},
    "mobilevitv2": {"width_multiplier": 0.25, "image_size": 64},
    "poolformer": FOUR,
    "pp_lcnet": {},
    "pvt": {"hidden_sizes": [8, 16, 32, 64], "num_attention_heads": [1, 2, 4, 8],
            "depths": [1, 1, 1, 1], "image_size": 64},
    "pvt_v2": {"hidden_sizes": [8, 16, 40, 64], "depths": [1, 1, 1, 1], "image_size": 64},
    "regnet": {"embedding_size": 8, "hidden_sizes": [16, 32, 48, 64], "depths": [1, 1, 1, 1],
               "groups_width": 8},
    "resnet": {"embedding_size": 8, "hidden_sizes": [8, 16, 24, 32], "depths": [1, 1, 1, 1]},
    "segformer": {"hidden_sizes": [8, 16, 40, 64], "depths": [1, 1, 1, 1]},
    "siglip": {"vision_config": VIT},
    "siglip2": {"vision_config": {k: v for k, v in VIT.items() if k != "image_size"}},
    "swiftformer": {"embed_dims": [8, 16, 24, 32], "depths": [1, 1, 1, 1]},
    "swin": WINDOWS,
    "swinv2": {**WINDOWS, "depths": [2, 1], "num_heads": [1, 2], "image_size": 32},
    "textnet": {"stem_out_channels": 8, "hidden_sizes": [8, 8, 16, 16, 24]},
    "vit": VIT,
    "vit_msn": VIT,
}  # fmt: skip


def write(kind: str, folder: Path) -> int:
    """A model of this type in a folder; the side of its images."""
    import torch
    import transformers
    from transformers.models.auto.modeling_auto import (
        MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES as CLASSES,
    )

    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(kind, **CONFIGS[kind])
    config.num_labels = 10
    names = CLASSES[kind]
    name = names if isinstance(names, str) else names[0]
    model = getattr(transformers, name)(config)
    for p in model.parameters():  # its own are so small that streams hardly notice their branches
        if p.dim() > 1:
            torch.nn.init.normal_(p, std=(p.numel() / p.shape[0]) ** -0.5)
    model.save_pretrained(folder)
    size = getattr(getattr(config, "vision_config", config), "image_size", None) or 64
    return int(size if isinstance(size, int) else size[0])
