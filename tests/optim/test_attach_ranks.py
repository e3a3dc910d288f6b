"""Several ranks under ``dbp.attach``: one that forgets ``step()``."""

import datetime
import time

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from small_training import attached, everything, train


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
