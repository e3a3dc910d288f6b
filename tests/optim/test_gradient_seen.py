"""Samples and steps are told apart by their gradients, also by those that come to lie in the same place."""

import gc

import torch
import torch.nn.functional as F
from small_training import attached, batches

from dbp_kernels.optim.site import GradientSeen


def pending(decor):
    return sum(len(recorder.samples) for _, _, recorder in decor._engine._places())


def test_a_gradient_is_itself_until_it_is_written_to_or_gone():
    weight = torch.ones(3, requires_grad=True)
    weight.sum().backward()
    seen = GradientSeen(weight.grad)
    gc.collect()  # nobody in Python holds the gradient: the weight does
    assert seen == GradientSeen(weight.grad)
    weight.sum().backward()
    assert seen != GradientSeen(weight.grad)
    seen = GradientSeen(weight.grad)
    weight.grad = None
    others = [torch.ones(3) for _ in range(100)]
    assert all(seen != GradientSeen(other) for other in others)


def test_samples_of_a_skipped_step_go_though_zero_grad_came_after_the_forward_pass():
    """The new gradient may lie where the one lay that was there when the samples were taken."""
    for _ in range(40):
        model, optimizer, decor = attached(update_every=1)
        for step in (True, False):
            ((x, y),) = batches(0, 1)
            loss = F.cross_entropy(model(x), y)
            optimizer.zero_grad()
            loss.backward()
            if step:
                optimizer.step()
        optimizer.zero_grad()
        assert pending(decor) == 0
