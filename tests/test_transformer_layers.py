"""Transformer layers, which read weights behind their layers' backs."""

import copy

import pytest
import torch
from plain_models import (
    names,
    random_R,
    transformer,
)
from torch import nn

import dbp_kernels as dbp
from dbp_kernels import nn as dnn

pytestmark = pytest.mark.filterwarnings("ignore:.*nested tensor.*")


@pytest.mark.parametrize("norm_first", [False, True])
def test_transformer_encoder_honours_R_in_evaluation(norm_first):
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, norm_first=norm_first)
    model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=not norm_first)
    x = torch.randn(3, 5, 8)
    model.eval()
    with torch.no_grad():
        plain = model(x)
        dbp.decorrelate_model(model)
        assert names(model) == [f"layers.{i}.linear{j}" for i in range(2) for j in (1, 2)]
        torch.testing.assert_close(model(x), plain)
        random_R(model)
        fast = model(x)
        padding = torch.zeros(3, 5, dtype=torch.bool)
        padding[1, 3:] = True
        fast_padded = model(x, src_key_padding_mask=padding)
    slow = model(x.requires_grad_())  # with gradients there is no fast path
    torch.testing.assert_close(fast, slow)
    assert not torch.allclose(fast, plain)
    slow_padded = model(x, src_key_padding_mask=padding)
    torch.testing.assert_close(fast_padded[~padding], slow_padded[~padding])
    # The fast path is back after fusing, in a copy too.
    fused = dbp.fuse_model(copy.deepcopy(model))
    assert fused.layers[0].activation_relu_or_gelu == 1
    assert fused.use_nested_tensor == (not norm_first)
    with torch.no_grad():
        torch.testing.assert_close(fused(x), fast, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(
            fused(x, src_key_padding_mask=padding)[~padding],
            fast_padded[~padding],
            rtol=1e-4,
            atol=1e-5,
        )


def test_transformer_without_decorrelated_linears_keeps_its_fast_path():
    model = nn.Sequential(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), nn.Linear(8, 2))
    dbp.decorrelate_model(model, exclude="0")
    assert model[0].activation_relu_or_gelu == 1
    assert names(model) == ["1"]


def test_transformer_built_by_hand_honours_R_once_an_optimiser_is_made():
    model = nn.TransformerEncoderLayer(8, 2, 16, 0.0, batch_first=True)
    model.linear1 = dnn.DecorLinear(8, 16)
    dbp.DecorUpdate(model)
    random_R(model)
    x = torch.randn(3, 5, 8)
    expected = model(x)
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(x), expected)


def test_attention_projection_is_left_alone():
    model = dbp.decorrelate_model(transformer())
    assert not any("attn" in name for name in names(model))
