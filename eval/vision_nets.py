"""How `moe-fair vision prune` fares on nets as people have them: torchvision's, timm's,
transformers' and such as are written by hand (`own_nets.py`, `odd_nets.py`).

    python eval/vision_nets.py -o nets.json [--only resnet,vit] [--seconds 120]

Needs an environment with torchvision, timm and `moe_fair[vision]`. Every net has random weights;
its groups are found and proven as a run does, a tenth to two thirds of every group is cut, and the
cut net is compared in float64 with the original whose units are silenced where they are *made* (the
package's proof silences them where they are read; what a response normalisation, as ConvNeXt V2's,
adds to a silent channel is taken out too), saved, built again from its files and compared
once more. One line a net:

    ok        all that can be cut is
    partly    layers stay whole for a reason that the net itself does not give
    refused   one line says why nothing can be cut
    slow      not done after --seconds
    crash     any other error: a defect
    wrong     the cut net is not the silenced one: a defect
"""

from __future__ import annotations

import argparse
import json
import signal
import tempfile
import time
import traceback
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import odd_nets
import own_nets
import small_transformers
import torch
from torch import nn

from moe_fair.vision.checkpoint import open_pruned, save_pruned
from moe_fair.vision.graph import TRANSPOSED, ChannelGroup, logits
from moe_fair.vision.inputs import classes_of
from moe_fair.vision.load import example
from moe_fair.vision.proof import find_groups, uneven_plan
from moe_fair.vision.reload import check_reloads
from moe_fair.vision.response_norm import response_norms
from moe_fair.vision.size import Sizes
from moe_fair.vision.source import open_source
from moe_fair.vision.surgery import cut, cuts_of
from moe_fair.vision.trace import copied

# what a net itself gives as reason: these layers stay whole in every pruning
OF_THE_NET = ("sets the model's outputs", "attention heads")
TORCHVISION = """
alexnet vgg11 vgg16_bn resnet18 resnet50 resnext50_32x4d wide_resnet50_2 densenet121 squeezenet1_1
googlenet inception_v3 mobilenet_v2 mobilenet_v3_small mobilenet_v3_large mnasnet0_5 mnasnet1_0
shufflenet_v2_x0_5 shufflenet_v2_x1_0 efficientnet_b0 efficientnet_v2_s regnet_x_400mf
regnet_y_400mf convnext_tiny vit_b_16 swin_t swin_v2_t maxvit_t
"""
TIMM = """
resnet26d resnet50d seresnet50 skresnet18 ecaresnet26t resnest14d res2net50_26w_4s resnetv2_50
gernet_s hrnet_w18_small dla34 dpn48b vovnet39a ese_vovnet19b_dw selecsls42b repvgg_a0
mobilenetv1_100 mobilenetv2_100 mobilenetv3_small_100 mobilenetv4_conv_small mnasnet_small
fbnetc_100 spnasnet_100 tinynet_e lcnet_050 ghostnet_100 ghostnetv2_100 hardcorenas_a mixnet_s
tf_efficientnet_b0 efficientnet_lite0 efficientnetv2_rw_t regnetx_002 regnety_002 regnetz_005
rexnet_100 cspresnet50 cspdarknet53 darknet53 xception41 inception_v4 inception_resnet_v2
nfnet_f0 dm_nfnet_f0 eca_nfnet_l0 convnext_atto convnextv2_atto convmixer_768_32
inception_next_atto fasternet_t0 starnet_s1 repghostnet_050 repvit_m0_9 edgenext_xx_small
efficientformer_l1 efficientformerv2_s0 mobileone_s0 mobilevit_xxs mobilevitv2_050 fastvit_t8
levit_128s cait_xxs24_224 coat_tiny convit_tiny crossvit_9_240 deit_tiny_patch16_224
deit3_small_patch16_224 beit_base_patch16_224 eva02_tiny_patch14_224 mixer_s32_224 resmlp_12_224
gmlp_ti16_224 pit_ti_224 poolformer_s12 poolformerv2_s12 pvt_v2_b0
swin_tiny_patch4_window7_224 tnt_s_legacy_patch16_224 twins_pcpvt_small visformer_tiny volo_d1_224
xcit_nano_12_p16_224 vit_tiny_patch16_224 vit_small_patch32_224 nextvit_small tiny_vit_5m_224
efficientvit_b0 efficientvit_m0 hiera_tiny_224 focalnet_tiny_srf gcvit_xxtiny davit_tiny
maxvit_pico_rw_256 caformer_s18 sequencer2d_s lambda_resnet26t halonet26t botnet26t_256
bat_resnext26ts
test_vit test_vit2 test_vit3 test_vit4 test_vit_relpos test_resnet test_convnext test_convnext2
test_convnext3 test_coatnet test_maxvit test_efficientnet test_efficientnet_gn
test_efficientnet_ln test_efficientnet_evos test_byobnet test_nfnet test_mambaout
hgnetv2_b0 ghostnetv3_050 convformer_s18 mambaout_femto shvit_s1 cs3darknet_focus_s swiftformer_xs
legacy_seresnet18 resnetblur18 gmixer_12_224 mvitv2_tiny swinv2_cr_tiny_ns_224 nest_tiny rdnet_tiny
coatnet_nano_rw_224 csatv2 fastvit_mci0 densenetblur121d
resnet10t convnext_zepto_rms starnet_s050 dla46_c vit_pwee_patch16_reg1_gap_256
vit_tiny_r_s16_p8_224 mobilenet_edgetpu_v2_xs coat_lite_tiny gcresnext26ts nf_regnet_b0
"""
# parts of own nets that are none by themselves
PARTS = (
    "conv",
    "Lambda",
    "Lora",
    "Swish",
    "StandardisedConv",
    "BinaryConv",
    "FrozenBatchNorm",
    "Around",
    "Response",
)
ARGUMENTS = (
    "Discriminator(True)", "Checkpointed(True)", "Blur(False)", "own_convolutions('binary')",
    "parametrised('weight_norm')", "Fixed(4)",
    *(f"wrapped({how!r})" for how in ("bfloat16", "half", "double", "channels_last", "fx", "ema",
                                      "frozen", "exported")),
)  # fmt: skip
# of torchvision, but no classifiers of images
OTHERS = (
    "torchvision.models.segmentation:lraspp_mobilenet_v3_large(num_classes=10, "
    "weights_backbone=None)",
    "torchvision.models.segmentation:fcn_resnet50(num_classes=10, weights_backbone=None)",
    "torchvision.models.video:r3d_18(num_classes=10)",
    "torchvision.models.detection:ssdlite320_mobilenet_v3_large(weights_backbone=None)",
)


def nets() -> Iterator[tuple[str, str]]:
    """Name and the MODEL that a user would give."""
    for name in TORCHVISION.split():
        extra = ", init_weights=False" if name in ("googlenet", "inception_v3") else ""
        yield f"torchvision {name}", f"torchvision.models:{name}(num_classes=10{extra})"
    for name in TIMM.split():
        yield f"timm {name}", f"timm:create_model('{name}', num_classes=10)"
    for spec in OTHERS:
        yield f"torchvision.{spec.partition(':')[2].partition('(')[0]}", spec
    own = [n for n, o in vars(own_nets).items() if getattr(o, "__module__", "") == "own_nets"]
    for name in (*(n for n in own if n not in PARTS), *ARGUMENTS):
        yield f"own {name}", f"own_nets:{name}"
    odd = [n for n, o in vars(odd_nets).items() if getattr(o, "__module__", "") == "odd_nets"]
    for name in (n for n in odd if n not in PARTS):
        yield f"own {name}", f"odd_nets:{name}"
    for kind in small_transformers.CONFIGS:
        yield f"transformers {kind}", kind


def side(name: str, spec: str) -> int:
    """Side of the images that a net takes."""
    if "inception_v3" in spec:
        return 299
    if name.startswith("timm"):
        import timm

        return int(timm.get_pretrained_cfg(name.split()[1]).input_size[-1])
    return 32 if name.startswith("own") else 224


def try_net(spec: str, size: int) -> dict[str, Any]:
    """What became of one net."""
    torch.manual_seed(0)
    source = open_source(spec, image_size=size)
    liven(source.model)
    x = example(source)
    classes_of(source.model, x)
    check_reloads(source, x)
    started = time.perf_counter()
    graph = find_groups(source.model, x)
    found = {
        "groups": len(graph.groups),
        "units": sum(u.size for u in graph.units),
        "seconds": round(time.perf_counter() - started, 1),
        "whole": {n: w for n, w in graph.whole.items() if not w.startswith(OF_THE_NET)},
    }
    kept = uneven_plan(graph.groups, seed=5)
    found["removed"] = share_removed(source.model, graph.groups, kept, x)
    try:
        with torch.no_grad():
            logits(source.model.double(), x.double())
        x, most = x.double(), 1e-9
    except RuntimeError:  # it turns its images into float32
        source.model.float()
        most = 1e-4
    if any(norm.epsilon is None for _, _, norm in response_norms(source.model)):
        most = max(most, 1e-5)  # a cut cannot change an ε that stands in the code
    silent = silenced(source.model, graph.groups, kept)
    cuts = cuts_of(graph.groups, kept)
    with torch.no_grad():
        dense, wanted = logits(source.model, x), logits(silent, x)
        cut(source.model, cuts)
        got = logits(source.model, x)
    scale = float(dense.abs().max())
    found["error"] = float((got - wanted).abs().max()) / scale
    found["change"] = float((dense - wanted).abs().max()) / scale
    if not found["error"] <= most:
        return {"what": "wrong", **found}
    with tempfile.TemporaryDirectory() as folder:
        source.model.float()
        save_pruned(source.model, source, [cuts], Path(folder))
        again = open_pruned(Path(folder), trust_remote_code=True).model
        with torch.no_grad():
            if not torch.equal(logits(again, x.float()), logits(source.model, x.float())):
                return {"what": "wrong", "said": "another model is read again", **found}
    return {"what": "partly" if found["whole"] else "ok", **found}


def liven(model: nn.Module) -> None:
    """Give heads and branches that start at zero something to say."""
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() > 1 and not bool(p.any()):
                p.normal_(std=0.02)


def share_removed(
    model: nn.Module,
    groups: Sequence[ChannelGroup],
    kept: Mapping[str, Sequence[int]],
    x: torch.Tensor,
) -> float:
    """Of the multiply-adds, by the plan."""
    sizes = Sizes(model, groups, x)
    after = sizes.at({n: len(k) for n, k in kept.items()})
    return 1 - after.operations / sizes.whole.operations


def silenced(
    model: nn.Module, groups: Sequence[ChannelGroup], kept: Mapping[str, Sequence[int]]
) -> nn.Module:
    """A copy in which what makes the other units makes zeros."""
    masked = copied(model)
    with torch.no_grad():
        for g in groups:
            gone = set(range(g.units.size)) - set(kept[g.name])
            for m in g.members:
                layer: Any = masked.get_submodule(m.module)
                rows = [i for unit in gone for i in m.index[unit]]
                if m.side == "norm":
                    for p in layer.parameters():
                        p.view(-1)[rows] = 0
                elif m.side == "in":  # an activation that is not 0 at 0 makes something of silence
                    weight = layer.weight
                    weight = weight if isinstance(layer, TRANSPOSED) else weight.transpose(0, 1)
                    weight[columns(layer, rows)] = 0
                elif layer.weight is not None:
                    weight = layer.weight
                    (weight.transpose(0, 1) if isinstance(layer, TRANSPOSED) else weight)[rows] = 0
                    if getattr(layer, "bias", None) is not None:
                        layer.bias[rows] = 0
    return masked


def columns(layer: nn.Module, rows: list[int]) -> list[int]:
    """Of a weight; none where a grouped convolution's columns are of several inputs."""
    return rows if getattr(layer, "groups", 1) == 1 else []


@contextmanager
def limit(seconds: int) -> Iterator[None]:
    """TimeoutError after so many seconds."""

    def stop(*_: object) -> None:
        raise TimeoutError

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def judged(spec: str, size: int, seconds: int) -> dict[str, Any]:
    """`try_net`, whatever happens."""
    try:
        with limit(seconds), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return try_net(spec, size)
    except TimeoutError:
        return {"what": "slow"}
    except ValueError as e:
        return {"what": "refused", "said": str(e)[:400]}
    except Exception as e:
        place = traceback.extract_tb(e.__traceback__)[-1]
        said = f"{type(e).__name__}: {' '.join(str(e).split())[:200]}"
        return {"what": "crash", "said": f"{said} ({Path(place.filename).name}:{place.lineno})"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--only", help="parts of names, with commas")
    parser.add_argument("--seconds", type=int, default=120)
    options = parser.parse_args()
    rows = {}
    for name, spec in nets():
        if options.only and not any(o in name for o in options.only.split(",")):
            continue
        with tempfile.TemporaryDirectory() as folder:
            size = side(name, spec)
            if name.startswith("transformers"):
                size, spec = small_transformers.write(spec, Path(folder)), folder
            rows[name] = judged(spec, size, options.seconds)
        options.output.write_text(json.dumps(rows, indent=1) + "\n")
        row = rows[name]
        said = row.get("said") or f"{row.get('groups')} groups, removed {row.get('removed', 0):.0%}"
        print(f"{name:40} {row['what']:8} {said}", flush=True)
    kinds = [r["what"] for r in rows.values()]
    print({k: kinds.count(k) for k in sorted(set(kinds))})


if __name__ == "__main__":
    main()
