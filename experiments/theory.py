"""The paper's regression setting, simulated: are shared factors estimated from fewer samples than separate ones?

The paper reads an adapted attention head as a mixture of experts. Here, with x ~ N(0, I) in R^d, r = 1 and frozen M,

    f_G(x) = sum_j softmax_j( x' (M_Q + B_Qj A_Qj) x / d + c_j )  (M_V + B_Vj A_Vj) x,    y = f_G*(x) + noise,

where expert 0 is the pretrained one: no update, c_0 = 0. Without it only differences between the experts' scores would
count, and the updates could not be told from the data at all. The score sees the symmetric part of B_Qj A_Qj alone.

``separate``: A_Qj, B_Qj, A_Vj, B_Vj are free. ``shared``: each expert has hidden features ``leaky_relu(h)`` that query
and value share, and ``A_Qj = W2_QA leaky_relu(h_Aj)`` and so on, with W2 common to the experts: the paper's networks
with their first layers folded into h. The truth is of the shared form, so both families contain it. Least squares by
Levenberg and Marquardt from a start near the truth, so that what is measured is statistics and not search. The paper's
theorems speak of more experts fitted than there are; both cases are run. How the paper's proofs parametrise the
networks was not at hand: this construction is ours.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
import yaml
from torch import Tensor
from torch.func import jacfwd

from experiments.errors import ExperimentError

__all__ = ["Fit", "Setting", "fit", "load_setting", "run_theory"]

Family = Literal["shared", "separate"]
Experts = tuple[Tensor, Tensor, Tensor]
"""Symmetric parts of the query updates ``[L, d, d]``, value updates ``[L, d, d]`` and gating biases ``[L]``."""

STRENGTH = 1.5
"""Size of the true hidden features: large enough for updates that the gates and outputs show."""
START_NOISE = 0.05
"""Standard deviation of what is added to the truth for the fit's start."""
ITERATIONS, TOLERANCE = 1000, 1e-10
TEST_SAMPLES = 20_000


@dataclass(frozen=True)
class Setting:
    """One simulation's sizes; the fields of the YAML.

    Attributes:
        dimension: d.
        hidden: width of the shared features.
        true_experts, fitted_experts: how many.
        family: of the fit.
        samples: n.
        noise: standard deviation of the noise in each coordinate of y.
        seed: of truth, data and start.
    """

    dimension: int
    hidden: int
    true_experts: int
    fitted_experts: int
    family: Family
    samples: int
    noise: float
    seed: int


@dataclass(frozen=True)
class Fit:
    """What a fit came to.

    Attributes:
        function_error: root mean square of ``f_fit - f_true`` on new inputs.
        factor_error: the Voronoi loss of :func:`_voronoi`.
        parameters: fitted numbers.
        converged: whether the fit met the tolerance.
    """

    function_error: float
    factor_error: float
    parameters: int
    converged: bool


def load_setting(path: Path, *, short: bool = False) -> list[Setting]:
    """All simulations of a YAML.

    Raises:
        ExperimentError: a missing or unknown key.
    """
    content: dict[str, Any] = yaml.safe_load(path.read_text(encoding="utf-8"))
    values = {**content, **(content.get("short", {}) if short else {})}
    known = {
        "question", "short", "dimension", "hidden", "true_experts", "fitted_experts", "families", "samples", "noise",
        "seeds",
    }  # fmt: skip
    if set(values) - known or known - {"short"} - set(values):
        raise ExperimentError(f"{path}: expected the keys {sorted(known)}, got {sorted(values)}")
    if not values["hidden"] < values["true_experts"] < 2 ** values["hidden"]:
        raise ExperimentError(
            f"{path}: true_experts={values['true_experts']} must be above hidden={values['hidden']}, else sharing says "
            "nothing, and below 2^hidden, so that each has features of its own"
        )
    return [
        Setting(
            values["dimension"],
            values["hidden"],
            values["true_experts"],
            fitted,
            family,
            samples,
            values["noise"],
            seed,
        )
        for seed in range(values["seeds"])
        for samples in values["samples"]
        for fitted in values["fitted_experts"]
        for family in values["families"]
    ]


def _gates_and_outputs(x: Tensor, experts: Experts, frozen: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """``[n, L + 1]`` and ``[n, L + 1, d]``, the pretrained expert first."""
    query, value, bias = experts
    query, value = (torch.cat([torch.zeros_like(update[:1]), update]) for update in (query, value))
    bias = torch.cat([torch.zeros_like(bias[:1]), bias])
    scores = torch.einsum("ni,lij,nj->nl", x, frozen[0] + query, x) / x.shape[1] + bias
    return scores.softmax(1), torch.einsum("lij,nj->nli", frozen[1] + value, x)


def mixture(x: Tensor, experts: Experts, frozen: tuple[Tensor, Tensor]) -> Tensor:
    """f_G ``[n, d]`` of inputs ``[n, d]``."""
    gates, outputs = _gates_and_outputs(x, experts, frozen)
    return torch.einsum("nl,nli->ni", gates, outputs)


def mixture_jacobian(x: Tensor, experts: Experts, frozen: tuple[Tensor, Tensor]) -> Tensor:
    """Derivatives of f_G by query updates, value updates and biases, ``[n d, L d d + L d d + L]``."""
    gates, outputs = _gates_and_outputs(x, experts, frozen)
    result = torch.einsum("nl,nli->ni", gates, outputs)
    gates, by_score = gates[:, 1:], gates[:, 1:, None] * (outputs[:, 1:] - result[:, None])
    by_query = torch.einsum("nli,na,nb->nilab", by_score, x, x) / x.shape[1]
    by_value = torch.einsum("nl,ij,nk->niljk", gates, torch.eye(x.shape[1], dtype=x.dtype), x)
    return torch.cat([by_query.flatten(2), by_value.flatten(2), by_score.mT], dim=2).flatten(0, 1)


def _shapes(setting: Setting, family: Family, experts: int) -> dict[str, tuple[int, ...]]:
    d, h = setting.dimension, setting.hidden
    bias: dict[str, tuple[int, ...]] = {"bias": (experts,)}
    if family == "separate":
        return dict.fromkeys(("A_Q", "B_Q", "A_V", "B_V"), (experts, d)) | bias
    features: dict[str, tuple[int, ...]] = {"h_A": (experts, h), "h_B": (experts, h)}
    last: dict[str, tuple[int, ...]] = {f"W_{name}": (d, h) for name in ("A_Q", "B_Q", "A_V", "B_V")}
    return features | last | bias


def _factors(parts: Mapping[str, Tensor], family: Family) -> dict[str, Tensor]:
    """A and B of query and value, ``[L, d]`` each."""
    if family == "separate":
        return {name: parts[name] for name in ("A_Q", "B_Q", "A_V", "B_V")}
    return {name: F.leaky_relu(parts[f"h_{name[0]}"]) @ parts[f"W_{name}"].T for name in ("A_Q", "B_Q", "A_V", "B_V")}


def _experts(vector: Tensor, shapes: Mapping[str, tuple[int, ...]], family: Family) -> Experts:
    sizes = [math.prod(shape) for shape in shapes.values()]
    pieces = torch.split(vector, sizes)
    parts = {name: piece.reshape(shape) for (name, shape), piece in zip(shapes.items(), pieces, strict=True)}
    factors = _factors(parts, family)
    query = torch.einsum("li,lj->lij", factors["B_Q"], factors["A_Q"])
    value = torch.einsum("li,lj->lij", factors["B_V"], factors["A_V"])
    return (query + query.mT) / 2, value, parts["bias"]


def _voronoi(fitted: Experts, truth: Experts) -> float:
    """How far the fitted experts are from the true ones.

    Each fitted expert belongs to the nearest true one. A cell of one adds its distance, a cell of several adds the
    squares of theirs, weighted by ``exp(c)``, and every cell the difference of the sum of these from the true one:
    the usual loss of over-specified mixtures.
    """
    distance = sum((a[:, None] - b[None]).flatten(2).norm(dim=2) for a, b in zip(fitted[:2], truth[:2], strict=True))
    assert isinstance(distance, Tensor)
    weight, true_weight = fitted[2].exp(), truth[2].exp()
    cells = distance.argmin(1)
    loss = 0.0
    for cell in range(len(true_weight)):
        members = (cells == cell).nonzero()[:, 0]
        power = 1 if len(members) == 1 else 2
        loss += float((weight[members] * distance[members, cell] ** power).sum())
        loss += float((weight[members].sum() - true_weight[cell]).abs())
    return loss


def _levenberg_marquardt(
    residuals: Callable[[Tensor], Tensor], jacobian: Callable[[Tensor], Tensor], start: Tensor
) -> tuple[Tensor, bool]:
    """Least squares; the point, and whether the last accepted step gained less than the tolerance."""
    point, damping = start, 1e-2
    value = residuals(point)
    cost = float(value.square().sum())
    for _ in range(ITERATIONS):
        J = jacobian(point)
        gram, slope = J.T @ J, J.T @ value
        while True:
            step = torch.linalg.solve(gram + damping * torch.diag(gram.diagonal().clamp_min(1e-8)), slope)
            trial = residuals(point - step)
            new_cost = float(trial.square().sum())
            if new_cost <= cost:
                break
            damping *= 4
            if damping > 1e12:
                return point, True
        gain = (cost - new_cost) / max(cost, 1e-300)
        point, value, cost, damping = point - step, trial, new_cost, max(damping / 3, 1e-12)
        if gain < TOLERANCE:
            return point, True
    return point, False


def _patterns(setting: Setting) -> Tensor:
    """Signs of the true hidden features ``[L, h]``: every expert has its own set of features that are on."""
    numbers = torch.arange(1, setting.true_experts + 1)[:, None]
    bits = (numbers >> torch.arange(setting.hidden)) & 1
    return 2.0 * bits.double() - 1.0


def fit(setting: Setting) -> Fit:
    """Draw a truth and data, fit, and measure."""
    random = torch.Generator().manual_seed(setting.seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=random, dtype=torch.float64)

    d = setting.dimension
    frozen = normal(d, d) / math.sqrt(d), normal(d, d) / math.sqrt(d)
    shared = _shapes(setting, "shared", setting.true_experts)
    true_parts = {name: normal(*shape) for name, shape in shared.items()}
    for name in ("h_A", "h_B"):
        true_parts[name] = STRENGTH * (_patterns(setting) + 0.1 * true_parts[name])
    true_parts["bias"] = torch.zeros(setting.true_experts, dtype=torch.float64)
    truth = _experts(torch.cat([p.flatten() for p in true_parts.values()]), shared, "shared")
    inputs = normal(setting.samples, d)
    targets = mixture(inputs, truth, frozen) + setting.noise * normal(setting.samples, d)

    shapes = _shapes(setting, setting.family, setting.fitted_experts)
    start_parts = _start(true_parts, shapes, setting)
    start = torch.cat([part.flatten() for part in start_parts])
    start = start + START_NOISE * normal(start.numel())
    parts_of = jacfwd(lambda v: torch.cat([part.flatten() for part in _experts(v, shapes, setting.family)]))
    point, converged = _levenberg_marquardt(
        lambda v: (mixture(inputs, _experts(v, shapes, setting.family), frozen) - targets).flatten(),
        lambda v: mixture_jacobian(inputs, _experts(v, shapes, setting.family), frozen) @ parts_of(v),
        start,
    )
    found = _experts(point, shapes, setting.family)
    fresh = normal(TEST_SAMPLES, d)
    difference = mixture(fresh, found, frozen) - mixture(fresh, truth, frozen)
    error = float(difference.square().sum(1).mean().sqrt())
    return Fit(error, _voronoi(found, truth), point.numel(), converged)


def _start(
    true_parts: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, ...]], setting: Setting
) -> Iterator[Tensor]:
    """The truth in the fit's own parameters; experts beyond the true ones repeat them."""
    values = dict(true_parts)
    if setting.family == "separate":
        values |= _factors(true_parts, "shared")
    repeat = [i % setting.true_experts for i in range(setting.fitted_experts)]
    for name, shape in shapes.items():
        value = values[name]
        yield value if value.shape == torch.Size(shape) else value[repeat]


def run_theory(settings: list[Setting], out: Path) -> tuple[int, int]:
    """Run what ``out``, a file of JSON lines, does not have yet.

    Returns:
        How many fits were made, and how many were there.
    """
    known = set()
    if out.is_file():
        lines = [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]
        known = {json.dumps({key: line[key] for key in asdict(settings[0])}, sort_keys=True) for line in lines}
    out.parent.mkdir(parents=True, exist_ok=True)
    made = 0
    for setting in settings:
        if json.dumps(asdict(setting), sort_keys=True) in known:
            continue
        row = {**asdict(setting), **asdict(fit(setting))}
        with out.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        made += 1
    return made, len(settings) - made
