"""Two processes over gloo: all ranks' samples count, and every R is the same everywhere."""

import copy
import os
import time
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn

import dbp_kernels as dbp
from dbp_kernels import backends, distributed
from dbp_kernels import nn as dnn

D64 = torch.float64


@pytest.mark.parametrize("first", [False, True])
@pytest.mark.parametrize(("groups", "size"), [(1, 1), (3, 5), (2, 64), (1, 65), (2, 200)])
def test_pack_and_unpack(groups, size, first):
    S = torch.randn(groups, size, size)
    S = S + S.mT
    mean = torch.randn(groups, size) if first else None
    moments = distributed.Moments(S, mean, torch.tensor(7.0))
    flat = torch.full((distributed.packed_size(groups, size, first),), torch.nan)
    distributed.pack(moments, flat)
    back = distributed.unpack(flat, groups, size, first)
    assert torch.equal(back.second, S)
    assert back.count == 7
    assert torch.equal(back.first, mean) if first else back.first is None
    if size == 200:
        assert flat.numel() < 0.7 * S.numel()


def test_buckets(monkeypatch):
    monkeypatch.setattr(distributed, "BUCKET_BYTES", 100)
    cpu, f4, f8 = torch.device("cpu"), torch.float32, torch.float64
    sizes = [(cpu, f4, 10), (cpu, f4, 15), (cpu, f4, 1), (cpu, f8, 1), (cpu, f8, 99), (cpu, f4, 1)]
    assert distributed.buckets(sizes) == [[0, 1], [2], [3], [4], [5]]
    assert distributed.buckets([]) == []


def make_model() -> nn.Sequential:
    torch.manual_seed(3)
    model = nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1, groups=2),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Conv2d(4, 3, 2),
        nn.Flatten(),
        nn.Linear(27, 4),
        nn.Linear(4, 3),
    )
    return dbp.decorrelate_model(model.to(D64))


def inputs(rank: int) -> list[torch.Tensor]:
    """Batches of unequal size on the two ranks."""
    generator = torch.Generator().manual_seed(rank)
    return [torch.randn(6 if rank else 2, 2, 4, 4, dtype=D64, generator=generator) for _ in "123"]


def run_layers(model: nn.Module, x: torch.Tensor) -> None:
    """Layer by layer, so that every layer's input is known."""
    model[0](x)
    model[3](torch.cat([x, x], 1))
    model[5](x.flatten(1)[:, :27])


def rank_main(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=2)
    distributed.BUCKET_BYTES = 2000  # several buckets
    results = {}

    # All ranks' samples, of unequal number; the last layer sees none on any rank.
    for demean in (False, True):
        model = make_model()
        decor = dbp.DecorUpdate(model, lr=1e-2, sample=1.0, demean=demean)
        for x in inputs(rank):
            run_layers(model, x)
            decor.step()
        results["demean" if demean else "plain"] = {
            "R": {k: v for k, v in model.state_dict().items() if k.endswith("R")},
            "losses": decor.losses(),
            "skipped": decor.skipped(),
        }

    # A layer that only one rank uses; an R that only rank 0 has loaded; a poisoned rank.
    model = make_model()
    if rank == 0:
        model[3].R.mul_(2)
    decor = dbp.DecorUpdate(model, lr=1e-2, sample=1.0)
    if rank == 1:
        model[0](inputs(1)[0])
    decor.step()
    results["one rank"] = model[0].R.clone()
    results["broadcast"] = model[3].R.clone()
    before = model[0].R.clone()
    model[0](inputs(rank)[0] * (float("nan") if rank == 1 else 1))
    decor.step()
    results["poisoned"] = torch.equal(before, model[0].R), int(decor.skipped()["0"])

    # DDP with its defaults, before and after: it broadcasts batch norm's buffers and no R.
    ddp = nn.parallel.DistributedDataParallel(make_model())
    synced = set(ddp.named_module_buffers)
    decor = dbp.DecorUpdate(ddp, lr=1e-2, sample=0.5)
    by_hand = nn.Sequential(nn.BatchNorm1d(3), dnn.DecorLinear(3, 2))
    late = nn.parallel.DistributedDataParallel(by_hand)
    dbp.DecorUpdate(late)
    late(torch.randn(2, 3))
    optimiser = torch.optim.SGD(ddp.parameters(), 1e-2)
    for x in inputs(rank):
        optimiser.zero_grad()
        ddp(x).square().sum().backward()
        optimiser.step()
        decor.step()
    results["ddp"] = synced, set(late.named_module_buffers), ddp.module.state_dict()

    # The same training with updates beside the backward pass.
    beside = nn.parallel.DistributedDataParallel(make_model())
    decor = dbp.DecorUpdate(beside, lr=1e-2, sample=0.5)
    optimiser = torch.optim.SGD(beside.parameters(), 1e-2)
    for x in inputs(rank):
        optimiser.zero_grad()
        loss = beside(x).square().sum()
        with decor.overlap():
            loss.backward()
            optimiser.step()
    results["overlap"] = beside.module.state_dict()

    # A group of one rank has nobody to reduce with.
    alone = [dist.new_group([r]) for r in range(2)][rank]
    model = make_model()
    decor = dbp.DecorUpdate(model, lr=1e-2, sample=1.0, process_group=alone)
    run_layers(model, inputs(rank)[0])
    decor.step()
    results["alone"] = model[0].R.clone()
    torch.save(results, os.path.join(folder, f"{rank}.pt"))
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    folder = str(tmp_path_factory.mktemp("ranks"))
    mp.spawn(rank_main, (folder,), nprocs=2)
    return [torch.load(f"{folder}/{rank}.pt", weights_only=False) for rank in range(2)]


def alone(batches: list[torch.Tensor], **options) -> tuple[nn.Module, dbp.DecorUpdate]:
    """The same training in one process, on all ranks' images together."""
    model = make_model()
    decor = dbp.DecorUpdate(model, lr=1e-2, sample=1.0, **options)
    for x in batches:
        run_layers(model, x)
        decor.step()
    return model, decor


@pytest.mark.distributed
@pytest.mark.parametrize("demean", [False, True])
def test_two_ranks_equal_one_process_with_all_images(results, demean):
    model, decor = alone([torch.cat(pair) for pair in zip(inputs(0), inputs(1))], demean=demean)
    for rank in range(2):
        found = results[rank]["demean" if demean else "plain"]
        for name, R in found["R"].items():
            torch.testing.assert_close(R, model.state_dict()[name], rtol=1e-10, atol=1e-12)
        for name, loss in decor.losses().items():
            torch.testing.assert_close(found["losses"][name], loss, rtol=1e-9, atol=1e-12)
        # Nobody sampled the last layer: untouched, no loss, not counted as skipped.
        assert torch.equal(found["R"]["6.R"], torch.eye(4, dtype=D64))
        assert found["losses"]["6"].isnan()
        assert int(found["skipped"]["6"]) == 0


@pytest.mark.distributed
def test_every_R_is_bitwise_the_same_on_all_ranks(results):
    for key in ("plain", "demean"):
        for name, R in results[0][key]["R"].items():
            assert torch.equal(R, results[1][key]["R"][name])
    assert torch.equal(results[0]["one rank"], results[1]["one rank"])
    for name, value in results[0]["ddp"][2].items():
        if name.endswith(("R", "weight", "bias")):
            assert torch.equal(value, results[1]["ddp"][2][name]), name


@pytest.mark.distributed
def test_updates_beside_the_backward_pass_equal_those_after_it(results):
    for rank in range(2):
        found, expected = results[rank]["overlap"], results[rank]["ddp"][2]
        torch.testing.assert_close(dict(found), dict(expected), rtol=0, atol=0)


@pytest.mark.distributed
def test_a_layer_that_one_rank_uses_learns_from_that_rank(results):
    model = make_model()
    decor = dbp.DecorUpdate(model, lr=1e-2, sample=1.0)
    model[0](inputs(1)[0])
    decor.step()
    torch.testing.assert_close(results[0]["one rank"], model[0].R)


@pytest.mark.distributed
def test_first_step_takes_R_from_the_first_rank(results):
    for rank in range(2):
        assert torch.equal(results[rank]["broadcast"], 2 * torch.eye(16, dtype=D64))


@pytest.mark.distributed
def test_a_non_finite_rank_is_skipped_by_all(results):
    assert [results[rank]["poisoned"] for rank in range(2)] == [(True, 1)] * 2


@pytest.mark.distributed
def test_ddp_leaves_R_alone(results):
    for synced, late, _ in (results[rank]["ddp"] for rank in range(2)):
        assert synced == {f"1.{b}" for b in ("running_mean", "running_var", "num_batches_tracked")}
        assert late == {f"0.{b}" for b in ("running_mean", "running_var", "num_batches_tracked")}
    R = results[0]["ddp"][2]["3.R"]
    assert not torch.equal(R, torch.eye(16, dtype=D64))


@pytest.mark.distributed
def test_a_group_of_one_uses_its_own_samples(results):
    for rank in range(2):
        model, _ = alone(inputs(rank)[:1])
        torch.testing.assert_close(results[rank]["alone"], model[0].R)


def test_names_ddp_ignores_survive_copies():
    model = make_model()
    assert copy.deepcopy(model)._ddp_params_and_buffers_to_ignore == ["0.R", "3.R", "5.R", "6.R"]


def backends_main(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=2)
    told = []
    backends.give_up = lambda device, reason: told.append((device, reason))
    for names in (("triton", "triton"), ("triton", "eager"), ("eager", "triton")):
        backends.selected = lambda device, names=names: names[rank]
        told.clear()
        distributed.agree_on_backends({torch.device("cpu")}, None)
        assert len(told) == (names[0] != names[1]), (rank, names)
    dist.destroy_process_group()


@pytest.mark.distributed
def test_ranks_run_on_the_same_backend(tmp_path):
    mp.spawn(backends_main, (str(tmp_path),), nprocs=2)


def forgetful_main(rank: int, folder: str) -> None:
    """Rank 1 leaves out the very first step, which begins with a broadcast of R."""
    torch.set_num_threads(1)
    timeout = timedelta(seconds=4)
    dist.init_process_group("gloo", f"file://{folder}/store", timeout, rank=rank, world_size=2)
    told = Path(folder, "told")
    if rank == 1:  # neither steps nor leaves
        while not told.exists():
            time.sleep(0.1)
        return
    model = make_model()
    run_layers(model, inputs(rank)[0])
    with pytest.raises(RuntimeError, match=r"every rank must call step\(\) equally often"):
        dbp.DecorUpdate(model, lr=1e-2, sample=1.0).step()
    assert torch.equal(model[6].R, torch.eye(4, dtype=D64))
    told.touch()
    os._exit(0)  # gloo's threads, of a collective that failed, may abort an orderly exit


@pytest.mark.distributed
def test_a_rank_that_forgets_the_first_step_is_named_once_the_others_time_out(tmp_path):
    mp.spawn(forgetful_main, (str(tmp_path),), nprocs=2)
