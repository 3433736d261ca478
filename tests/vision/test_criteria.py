"""Scores of weights and feature ranks against plain loops."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn
from vision.architectures import images, lively

from moe_fair.vision.collect import collect
from moe_fair.vision.criteria import criteria, criterion
from moe_fair.vision.proof import find_groups
from moe_fair.vision.unit_outputs import MeasureConfig

LABELS = torch.tensor([0, 1, 2, 0, 1, 2])


def test_weight_norms_are_summed_over_the_producers_of_a_stream() -> None:
    model = lively("resnet20")
    graph = find_groups(model, images(2))
    found = collect(model, graph, images(6), LABELS, needs=["l1_norm", "l2_norm", "bn_scale"])
    scores = {n: criterion(n)(found).values["conv1"] for n in ("l1", "l2", "bn-scale")}
    stage = [model.blocks[i] for i in range(3)]  # of the first stage: all write to one stream
    filters = [model.conv1, *(b.conv2 for b in stage)]
    norms = [model.bn1, *(b.bn2 for b in stage)]
    for c in range(model.conv1.out_channels):
        w = [f.weight[c].detach().double() for f in filters]
        assert float(scores["l1"][c]) == pytest.approx(float(sum(t.abs().sum() for t in w)))
        assert float(scores["l2"][c]) == pytest.approx(
            float(sum(t.square().sum().sqrt() for t in w))
        )
        scales = float(sum(n.weight[c].detach().abs() for n in norms))
        assert float(scores["bn-scale"][c]) == pytest.approx(scales, rel=1e-6)


def test_bn_scale_needs_batch_normalisation() -> None:
    model = lively("vit")
    graph = find_groups(model, images(2))
    with pytest.raises(ValueError, match=r"needs batch normalisation.*has none"):
        collect(model, graph, images(6), LABELS, needs=["bn_scale"])


def test_feature_rank_is_the_mean_rank_of_the_maps() -> None:
    model = lively("vgg16_bn")
    graph = find_groups(model, images(2))
    found = collect(
        model, graph, images(6), LABELS, needs=["feature_rank"], watch=MeasureConfig(batch_size=4)
    )
    scores = criterion("hrank")(found).values
    with torch.no_grad():
        maps = model.features[:3](images(6)).numpy()  # convolution, normalisation, ReLU
        last = model.features(images(6)).mean((2, 3)).numpy()
    order = torch.argsort(LABELS, stable=True).numpy()
    wanted = [
        np.mean([np.linalg.matrix_rank(maps[i, c]) for i in order]) for c in range(maps.shape[1])
    ]
    np.testing.assert_allclose(scores["features.0"], wanted, atol=0.35)  # tolerances differ
    # after pooling no map is left: the share of images in which the unit is on
    np.testing.assert_allclose(scores["features.40"], (last > 0).mean(0), rtol=1e-6)


def test_random_follows_the_seed() -> None:
    model = lively("vgg16_bn")
    graph = find_groups(model, images(2))
    drawn = [
        criterion("random")(
            collect(model, graph, images(6), LABELS, needs=["seed"], watch=MeasureConfig(seed=s))
        ).values["features.3"]
        for s in (1, 1, 2)
    ]
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])


def test_every_criterion_names_its_source_and_unknown_ones_the_nearest() -> None:
    assert all(c.source for c in criteria().values())
    with pytest.raises(ValueError, match="taylor-sq"):
        criterion("taylor-sqr")


def test_a_dead_unit_scores_lowest() -> None:
    model = lively("resnet20")
    bn: nn.BatchNorm2d = model.blocks[1].bn1
    with torch.no_grad():
        bn.weight[2], bn.bias[2] = 0, 0
    graph = find_groups(model, images(2))
    needs = ["u_score", "rows", "feature_rank", "bn_scale"]
    found = collect(model, graph, images(6), LABELS, needs=needs)
    for name in ("u-score", "taylor", "taylor-sq", "hrank", "bn-scale"):
        scores = criterion(name)(found).values["blocks.1.conv1"]
        assert float(scores[2]) == 0 == float(scores.min()), name
