"""DoRAN in float64, written from the formulas with explicit loops over rows; shares no code with doran_core."""

import math

import torch


def direction(weight, A, B, scaling):
    """V = W0 + g B A."""
    return weight.double() + scaling * (B.double() @ A.double())


def norm(weight, A, B, scaling):
    """||V|| per row."""
    return torch.stack([row.pow(2).sum().sqrt() for row in direction(weight, A, B, scaling)])


def merged(weight, A, B, scaling, magnitude, tau):
    """W' = m / (||V|| + tau) V."""
    V = direction(weight, A, B, scaling)
    tau = torch.as_tensor(tau, dtype=torch.float64).expand(V.shape[0])
    rows = [magnitude[i].double() / (V[i].pow(2).sum().sqrt() + tau[i]) * V[i] for i in range(V.shape[0])]
    return torch.stack(rows)


def linear(x, weight, A, B, scaling, magnitude, tau, bias=None):
    """y = W' x + bias."""
    y = x.double() @ merged(weight, A, B, scaling, magnitude, tau).T
    return y if bias is None else y + bias.double()


def direction_gradient(grad, weight, A, B, scaling, magnitude, tau):
    """dL/dV = c (G_orthogonal + tau / (n + tau) G_parallel), from G = dL/dW' (DESIGN: the full norm gradient)."""
    V, n = direction(weight, A, B, scaling), norm(weight, A, B, scaling)
    rows = []
    for i in range(V.shape[0]):
        v = V[i] / n[i]
        parallel = (grad[i] @ v) * v
        c = magnitude[i] / (n[i] + tau)
        rows.append(c * (grad[i] - parallel + tau / (n[i] + tau) * parallel))
    return torch.stack(rows)


def leaky_relu(x):
    return torch.where(x > 0, x, 0.01 * x)


def generated(embedding, w1, w2):
    """leaky_relu(E W1^T / sqrt(e)) / h W2^T, with e and h the widths of the embedding and of the hidden layer."""
    hidden = leaky_relu(embedding.double() @ w1.double().T / math.sqrt(w1.shape[1]))
    return hidden / w1.shape[0] @ w2.double().T


def softplus(x):
    return math.log1p(math.exp(x))
