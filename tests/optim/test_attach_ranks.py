"""Several ranks under ``dbp.attach``: DistributedDataParallel, and a rank that forgets ``step()``."""

import datetime
import time

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from small_training import attached, batches, everything, make_model, train
from torch import nn

import dbp_kernels as dbp


def forgetful_main(rank, folder):
    torch.set_num_threads(1)
    timeout = datetime.timedelta(seconds=4)
    dist.init_process_group("gloo", f"file://{folder}/store", timeout, rank=rank, world_size=2)
    model, optimizer, decor = attached("adamw", update_every=1)
    train(model, optimizer, 0, 2)
    if rank == 1:  # neither steps nor leaves
        while not (folder / "seen").exists():
            time.sleep(0.1)
        return
    R = decor.R("0").clone()
    with pytest.raises(RuntimeError, match=r"every rank must call step\(\) equally often"):
        train(model, optimizer, 2, 3)
    (folder / "seen").touch()
    assert torch.equal(decor.R("0"), R)
    state = everything(model, decor)
    A = (state["W 0"].flatten(1) @ R).view_as(state["A 0.weight"])
    torch.testing.assert_close(state["A 0.weight"], A)


@pytest.mark.distributed
def test_a_rank_that_forgets_a_step_is_named_once_the_others_time_out(tmp_path):
    mp.spawn(forgetful_main, (tmp_path,), nprocs=2)


def parallel_main(rank, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=2)
    model = make_model().double()
    parallel = nn.parallel.DistributedDataParallel(model, gradient_as_bucket_view=True)
    optimizer = torch.optim.AdamW(parallel.parameters(), lr=1e-2)
    decor = dbp.attach(parallel, optimizer, lr=1e-2, sample=1.0)
    for x, y in batches(0, 3):
        half = slice(2 * rank, 2 * rank + 2)
        F.cross_entropy(parallel(x[half].double()), y[half]).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert "plan gram" in decor.decorrelated()["0"]
    torch.save(everything(model, decor), folder / f"{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.distributed
def test_data_parallel_training_equals_one_process_with_all_images(tmp_path):
    mp.spawn(parallel_main, (tmp_path,), nprocs=2)
    model = make_model().double()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    decor = dbp.attach(model, optimizer, lr=1e-2, sample=1.0)
    for x, y in batches(0, 3):
        F.cross_entropy(model(x.double()), y).backward()
        optimizer.step()
        optimizer.zero_grad()
    ranks = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    torch.testing.assert_close(*ranks, rtol=0, atol=0)
    torch.testing.assert_close(ranks[0], everything(model, decor), rtol=1e-9, atol=1e-10)
