"""Weight sides under DistributedDataParallel (two processes over gloo) and in nn.DataParallel's replicas."""

import cases
import models
import torch
from models import assert_close, exact, gradients, make, make_x, trained
from torch import distributed, multiprocessing
from torch.nn.parallel import DistributedDataParallel

from doran_core.kernels import use_backend

MODES = {"plain": None, "checkpoint": False, "reentrant": True, "skipped": None}


def train(rank, store, queue):
    """One process: its half of the batch, and in each mode the gradients of the mean over both."""
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    found = {}
    for mode, reentrant in MODES.items():
        model = make()
        model.reentrant = reentrant
        model.blocks[1].skipped = mode == "skipped"
        parallel = DistributedDataParallel(model, find_unused_parameters=mode == "skipped")
        for _ in range(2):
            model.zero_grad()
            with use_backend("torch"):
                parallel(make_x()[rank : rank + 1].requires_grad_()).square().sum().backward()
        found[mode] = {name: parameter.grad.cpu().numpy() for name, parameter in trained(model).items()}
    if rank == 0:
        queue.put(found)
    distributed.barrier()
    distributed.destroy_process_group()


def test_the_gradients_are_the_mean_of_the_processes(tmp_path):
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    processes = [context.Process(target=train, args=(rank, tmp_path / "store", queue)) for rank in range(2)]
    for process in processes:
        process.start()
    found = queue.get(timeout=240)
    for process in processes:
        process.join(60)
        assert process.exitcode == 0
    for mode in MODES:
        model = make()
        model.blocks[1].skipped = mode == "skipped"
        right = exact(model, make_x())
        for name in trained(model):
            ours, grad = torch.from_numpy(found[mode][name]), right[name]
            if grad is None:  # with other processes, a layer that was not used gives zeros
                assert not ours.any(), name
            else:
                assert cases.error(ours, grad.cpu() / 2) <= 1e-4, (mode, name)


def test_a_replica_takes_the_reference(monkeypatch):
    model, x = make(), make_x()
    right = exact(model, x)
    for module in model.modules():
        vars(module)["_is_replica"] = True  # as nn.DataParallel marks its copies
    monkeypatch.setattr(type(model), "zero_grad", lambda self: None)  # which warns in a replica
    monkeypatch.setattr(models.prepare_module, "compute_alone", None)
    monkeypatch.setattr(models.prepare_module.LayerGroup, "compute", None)
    assert_close(gradients(model, x, "torch"), right)
