"""Adapt a small MLP to handwritten digits with doran-core alone: pretrained on 0-4, adapted to all ten."""

import copy

import torch
from sklearn.datasets import load_digits
from torch import nn

from doran_core import DoranConfig, adapt


def fit(model, parameters, x, y, steps=300):
    optimizer = torch.optim.Adam(parameters, lr=1e-2)
    for _ in range(steps):
        batch = torch.randint(len(x), (128,))
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x[batch]), y[batch]).backward()
        optimizer.step()


def accuracy(model):
    return (model(x[test]).argmax(1) == y[test]).float().mean().item()


torch.manual_seed(0)
x, y = (torch.tensor(array) for array in load_digits(return_X_y=True))
x, order = x.float() / 16, torch.randperm(len(y))
train, test = order[:1300], order[1300:]
known = train[y[train] < 5]

base = nn.Sequential(nn.Linear(64, 32), nn.GELU(), nn.Linear(32, 32), nn.GELU(), nn.Linear(32, 10))
fit(base, list(base.parameters()), x[known], y[known])
frozen = copy.deepcopy(base).requires_grad_(False)
fit(frozen, list(frozen[4].requires_grad_().parameters()), x[train], y[train])

handle = adapt(base, DoranConfig(rank=4, target_modules=["0", "2"], modules_to_save=["4"]))
fit(base, list(handle.parameters()), x[train], y[train])
print(f"unseen digits: frozen base with a new head {accuracy(frozen):.3f}, DoRAN {accuracy(base):.3f}")
