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
    "gram": lambda z, r, rule: rules.gram_update(second_moment(z), r, rule),
    "direct": rules.direct_update,
    "samples": rules.low_rank_update,
}


def finite(update: rules.Update, count: int = 1) -> torch.Tensor:
    return update.bounds(torch._foreach_norm(update.parts(count)), count).isfinite()


def rule_of(kappa: float = 0.3, guarded: bool = False) -> rules.UpdateRule:
    return rules.UpdateRule.make("standard", kappa, 7, guarded)


def make(changes):
    for change in changes:
        change()


every_update = pytest.mark.parametrize("name", UPDATES)


@every_update
@pytest.mark.parametrize("groups", [1, 2])
def test_an_update_in_place(name, groups):
    z, r = random((groups, 3, 7)), random((groups, 7, 7), seed=1)
    expected, _ = PLANS[name](z, r, 0.1, 0.3)
    before = r.clone()
    for ok in (False, True):
        update = UPDATES[name](z, r, rule_of())
        assert finite(update, groups).all()
        update.cancel_unless_(torch.tensor(ok).expand(groups, 1, 1))
        make(update.changes(r, 0.1))
        assert torch.equal(r, expected if ok else before)
    assert not torch.equal(r, before)


@every_update
@pytest.mark.parametrize("guarded", [False, True])
def test_a_factor_of_each_group(name, guarded):
    """A step size in memory is the same one as a number; 1 changes no bit, 0 leaves R as it is."""
    z, r = random((3, 5, 7)), random((3, 7, 7), seed=1)
    results = {}
    for rate, factors in ((0.1, None), (0.1, (1.0, 0.0, 0.5)), (1.0, (0.1, 0.0, 0.05))):
        results[rate, factors] = after = r.clone()
        factor = None if factors is None else torch.tensor(factors, dtype=F64).view(3, 1, 1)
        make(UPDATES[name](z, r, rule_of(guarded=guarded)).changes(after, rate, factor))
    plain, factored, in_memory = results.values()
    assert torch.equal(factored[0], plain[0])
    assert torch.equal(factored[1], r[1])
    assert error(factored[2] - r[2], (plain[2] - r[2]) / 2) < 1e-12
    assert error(in_memory, factored) < 1e-12


@every_update
@pytest.mark.parametrize("kappa", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("rule", rules.RULES)
def test_the_norm_of_the_matrix_of_a_step(name, kappa, rule):
    z, r = random((2, 5, 7)), random((2, 7, 7), seed=1)
    M = second_moment(z @ r.mT)
    own = rules.UpdateRule.make(rule, kappa, 7, guarded=True)
    v = M.diagonal(dim1=-2, dim2=-1) - 1
    stepped = own.c_weight * (M - torch.diag_embed(v + 1)) + torch.diag_embed(own.v_weight * v)
    assert error(UPDATES[name](z, r, own).square, stepped.square().sum((1, 2))) < 1e-12


@every_update
def test_a_row_without_variance_does_not_grow_where_guarded(name):
    z, r = random((1, 5, 7)), torch.eye(7, dtype=F64)[None]
    z[..., 2] = 0
    plain, guarded = (UPDATES[name](z, r, rule_of(guarded=g)) for g in (False, True))
    results = [update.new(r, 0.1)[0] for update in (plain, guarded)]
    assert results[0][2, 2] > 1.02
    assert torch.equal(results[1][2], r[0, 2])
    others = [i for i in range(7) if i != 2]
    assert torch.equal(results[0][others], results[1][others])
    assert torch.equal(plain.loss, guarded.loss)  # the paper's


@every_update
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 1e160])
@pytest.mark.parametrize("where", ["z", "r"])
def test_an_update_that_is_not_finite(name, where, bad):
    z, r = random((1, 3, 7)), random((1, 7, 7), seed=1)
    (z if where == "z" else r)[0, 2, 4] = bad
    before = r.clone()
    update = UPDATES[name](z, r, rule_of())
    assert not finite(update)
    update.cancel_unless_(finite(update).view(1, 1, 1))
    make(update.changes(r, 0.1))
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
