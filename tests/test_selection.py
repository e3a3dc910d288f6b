"""Which layers decorrelate_model swaps, and what it reports of the others."""

import pytest
import torch
from plain_models import (
    ResNet,
    names,
)
from torch import nn
from torch.nn.utils import prune

import dbp_kernels as dbp
from dbp_kernels import nn as dnn

ALL = [
    "stem",
    *[f"layers.{i}.{c}" for i in range(3) for c in ("conv1", "conv2", *["down"] * (i == 1))],
    "head",
]


@pytest.mark.parametrize(
    ("include", "exclude", "expected"),
    [
        (None, None, ALL),
        ("stem", None, ["stem"]),
        (["stem", "head"], "head", ["stem"]),
        ("*.conv1", None, [f"layers.{i}.conv1" for i in range(3)]),
        ("layers.1", None, ["layers.1.conv1", "layers.1.conv2", "layers.1.down"]),
        ("again", None, ["layers.0.conv1", "layers.0.conv2"]),
        (nn.Linear, None, ["head"]),
        (None, nn.Conv2d, ["head"]),
        (None, ("layers", "stem"), ["head"]),
        (
            lambda name, m: m.weight.shape[0] == 16,
            ["head"],
            [n for n in ALL if "s.1" in n or "s.2" in n],
        ),
        ((), None, []),
    ],
)
def test_include_and_exclude(include, exclude, expected):
    model = dbp.decorrelate_model(ResNet(), include=include, exclude=exclude)
    assert names(model) == expected


def test_modules_as_filters():
    model = ResNet()
    assert names(dbp.decorrelate_model(model, include=model.layers, exclude=model.again)) == [
        n for n in ALL if "s.1" in n or "s.2" in n
    ]


def test_bad_arguments_change_nothing():
    model = ResNet()
    with pytest.raises(ValueError, match=r"include='layer1\*' matches no module"):
        dbp.decorrelate_model(model, include=["stem", "layer1*"])
    with pytest.raises(ValueError, match="exclude='heads'"):
        dbp.decorrelate_model(model, exclude="heads")
    with pytest.raises(TypeError, match="include=3"):
        dbp.decorrelate_model(model, include=3)
    with pytest.raises(TypeError, match="exclude=None"):
        dbp.decorrelate_model(model, exclude=[None])
    model.head.R = 3
    with pytest.raises(ValueError, match="'head' has an attribute R"):
        dbp.decorrelate_model(model)
    for function in (dbp.decorrelate_model, dbp.fuse_model):
        with pytest.raises(TypeError, match="got list"):
            function([model])
    assert names(model) == []


def test_the_report_says_what_was_swapped_and_what_was_not_and_why(capsys):
    pruned = nn.Linear(3, 3)
    prune.l1_unstructured(pruned, "weight", 2)
    replaced = nn.Linear(3, 3)
    replaced.forward = lambda x: x
    model = nn.Sequential()
    for name, module in {
        "conv": nn.Conv2d(4, 8, 3, groups=2),
        "norm": nn.BatchNorm2d(3),
        "embedding": nn.Embedding(3, 3),
        "outside": nn.Linear(3, 3),
        "excluded": nn.Linear(3, 3),
        "pruned": pruned,
        "replaced": replaced,
        "lazy": nn.LazyLinear(3),
        "complex": nn.Linear(3, 3, dtype=torch.complex64),
        "before": dnn.DecorLinear(3, 3),
        "head": nn.Linear(512, 3),
    }.items():
        model.add_module(name, module)
    included = lambda name, _: name != "outside"  # noqa: E731
    assert dbp.decorrelate_model(model, included, "excluded", report=True) is model
    assert capsys.readouterr().out.splitlines() == [
        "decorrelated  R             MiB",
        "conv          2 x 18 x 18  0.00",
        "head          512 x 512    1.00",
        "total                      1.00",
        "left alone",
        "embedding  Embedding is no kind that dbp.nn has decorrelated",
        "outside    not among include",
        "excluded   among exclude",
        "pruned     its weight is not a plain parameter",
        "replaced   its forward has been replaced on the instance, and may not use the weight",
        "lazy       LazyLinear is no kind that dbp.nn has decorrelated",
        "complex    its weight is torch.complex64",
        "before     decorrelated already",
    ]
    dbp.decorrelate_model(nn.Linear(3, 3), report=True)
    assert "the model     3 x 3" in capsys.readouterr().out
    dbp.decorrelate_model(ResNet())
    assert capsys.readouterr().out == ""
