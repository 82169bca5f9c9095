"""A generator of a user's own."""

import torch
from torch import nn


class Cosines(nn.Module):
    """A from learned frequencies, B free."""

    def __init__(self, spec):
        super().__init__()
        self.d_in = spec.d_in
        self.frequencies = nn.Parameter(torch.linspace(0.5, 3.0, spec.rank))
        self.B = nn.Parameter(torch.zeros(spec.d_out, spec.rank))

    def forward(self):
        grid = torch.linspace(0, 6.28, self.d_in)
        return torch.cos(self.frequencies[:, None] * grid) / self.d_in**0.5, self.B
