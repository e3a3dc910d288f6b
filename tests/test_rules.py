"""The three plans are one update, and the update is the paper's."""

import pytest
import torch
from helpers import error, random
from hypothesis import given, settings
from hypothesis import strategies as st
from test_reference import BY_HAND, LR, R, Z
from torch._subclasses import FakeTensorMode

from dbp_kernels import reference, rules

F64 = torch.float64


def second_moment(z):
    return z.mT @ z / z.shape[1]


PLANS = {
    "gram": lambda z, *rest: rules.update_from_gram(second_moment(z), *rest),
    "direct": rules.update_direct,
    "samples": rules.update_from_samples,
}
every_plan = pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS.keys())


@every_plan
@pytest.mark.parametrize(("setting", "expected"), BY_HAND.items())
def test_by_hand(plan, setting, expected):
    """Rows of R are scaled by V, not columns: see the numbers in test_reference."""
    rule, kappa, demean = setting
    z = Z - Z.mean(0) if demean else Z
    R_new, loss = plan(z[None], R[None], LR, kappa, rule)
    torch.testing.assert_close(R_new[0], torch.tensor(expected[0], dtype=F64), rtol=0, atol=1e-14)
    torch.testing.assert_close(loss[0], torch.tensor(expected[1], dtype=F64), rtol=1e-14, atol=0)


@settings(max_examples=150)
@given(
    groups=st.integers(1, 3),
    n=st.integers(1, 12),
    dim=st.integers(1, 9),
    kappa=st.sampled_from([0.0, 0.1, 0.5, 1.0]),
    rule=st.sampled_from(rules.RULES),
    demean=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_all_plans_agree(groups, n, dim, kappa, rule, demean, seed):
    z = random((groups, n, dim), seed=seed)
    r = torch.eye(dim, dtype=F64) + 0.5 * random((groups, dim, dim), seed=seed + 1)
    x = z.transpose(0, 1).reshape(n, groups * dim)
    lr = 0.5  # large, so that an error is not hidden behind R itself
    expected, loss = reference.decor_update(x, r, [], [], [], [], groups, lr, kappa, rule, demean)
    if demean:
        z = z - z.mean(1, keepdim=True)
    # C and v cancel when x is nearly white; errors count against what they are made of
    scale = 1 + (z @ r.mT).square().mean(1).max().item() ** 2
    for name, plan in PLANS.items():
        before = z.clone(), r.clone()
        R_new, losses = plan(z, r, lr, kappa, rule)
        assert losses.shape == (groups,)
        assert error(R_new, expected) < 1e-10, name
        assert abs(losses.mean().item() - loss.item()) < 1e-10 * scale, name
        assert torch.equal(z, before[0]), name
        assert torch.equal(r, before[1]), name


# Every plan up to its change of R, from Z.
UPDATES = {
    "gram": lambda z, *rest: rules.gram_update(second_moment(z), *rest),
    "direct": rules.direct_update,
    "samples": rules.low_rank_update,
}


def finite(update: rules.Update) -> torch.Tensor:
    return update.bound(*torch._foreach_norm(update.parts)).isfinite()


every_update = pytest.mark.parametrize("name", UPDATES)


@every_update
@pytest.mark.parametrize("groups", [1, 2])
def test_an_update_in_place(name, groups):
    z, r = random((groups, 3, 7)), random((groups, 7, 7), seed=1)
    update, _ = UPDATES[name](z, r, 0.1, 0.3)
    expected, _ = PLANS[name](z, r, 0.1, 0.3)
    assert finite(update)
    before = r.clone()
    update.cancel_unless_(torch.tensor(True))
    update.apply_(r)
    assert torch.equal(r, expected)
    update.cancel_unless_(torch.tensor(False))
    update.apply_(r)
    assert torch.equal(r, expected)
    assert not torch.equal(r, before)


@every_update
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 1e160])
@pytest.mark.parametrize("where", ["z", "r"])
def test_an_update_that_is_not_finite(name, where, bad):
    z, r = random((1, 3, 7)), random((1, 7, 7), seed=1)
    (z if where == "z" else r)[0, 2, 4] = bad
    before = r.clone()
    update, _ = UPDATES[name](z, r, 0.1, 0.3)
    assert not finite(update)
    update.cancel_unless_(finite(update))
    update.apply_(r)
    assert torch.equal(r.nan_to_num(7.0), before.nan_to_num(7.0))


@every_plan
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_step_of_size_0_changes_nothing(plan, bad):
    z, r = random((2, 3, 7)), random((2, 7, 7), seed=1)
    z[0, 2, 4] = bad
    assert torch.equal(plan(z, r, 0.0, 0.3)[0], r)


@every_plan
def test_white_samples_are_a_fixed_point(plan):
    z = 2 * torch.eye(4, dtype=F64)[None]  # n = 4: <z z^T> = I
    eye = torch.eye(4, dtype=F64)[None]
    R_new, loss = plan(z, eye, 0.5, 0.5)
    assert error(R_new, eye) < 1e-15
    assert loss.item() < 1e-15


@every_plan
def test_an_update_decorrelates(plan):
    z = random((1, 200, 6)) @ random((6, 6), seed=3)
    r = torch.eye(6, dtype=F64)[None]
    losses = []
    for _ in range(300):
        r, loss = plan(z, r, 2e-2, 0.5, "standard")
        losses.append(loss.item())
    assert losses[-1] < 1e-3 * losses[0]


@every_plan
def test_no_synchronisation_with_the_host(plan):
    """A fake tensor has no values to read."""
    with FakeTensorMode():
        R_new, loss = plan(torch.randn(2, 5, 4), torch.randn(2, 4, 4), 0.1, 0.5, "normalized")
        assert R_new.shape == (2, 4, 4)
        assert loss.shape == (2,)


@every_plan
@pytest.mark.parametrize("kappa", [-0.01, 1.01, float("nan")])
def test_bad_kappa(plan, kappa):
    with pytest.raises(ValueError, match="kappa="):
        plan(Z[None], R[None], LR, kappa)


@every_plan
def test_bad_rule(plan):
    with pytest.raises(ValueError, match=r"rule='columns'.*'standard', 'normalized'"):
        plan(Z[None], R[None], LR, 0.5, "columns")
