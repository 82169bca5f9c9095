"""torch.compile of adapted layers: the reference's function and gradients, in one graph of PyTorch's own operations."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.testing import CompileCounterWithBackend
from torch._inductor import config as inductor_config

from doran_core import DoranConfig, adapt
from doran_core.kernels import use_backend
from doran_core.layers import AdaptedLayer, wrap


class Conv1D(nn.Module):
    """GPT-2's linear layer: weight ``[d_in, d_out]``."""

    def __init__(self, nf: int, nx: int) -> None:
        super().__init__()
        self.nf = nf
        self.weight = nn.Parameter(torch.randn(nx, nf))
        self.bias = nn.Parameter(torch.randn(nf))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight + self.bias


D_IN, D_OUT, RANK = 24, 40, 3


class Packed(nn.Module):
    """A linear layer that hides its weight, as quantized ones do."""

    def __init__(self) -> None:
        super().__init__()
        self.in_features, self.out_features, self.compute_dtype = D_IN, D_OUT, torch.float64
        self.register_buffer("packed", torch.randn(D_OUT * D_IN).to(torch.float64))
        self.bias = None

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.packed.view(D_OUT, D_IN))


LAYERS: dict[str, Callable[[], nn.Module]] = {
    "linear": lambda: nn.Linear(D_IN, D_OUT),
    "no bias": lambda: nn.Linear(D_IN, D_OUT, bias=False),
    "transposed": lambda: Conv1D(D_OUT, D_IN),
    "packed": Packed,
    "conv2d": lambda: nn.Conv2d(D_IN, D_OUT, 3),
    "embedding": lambda: nn.Embedding(D_IN, D_OUT),
}
OPTIONS: dict[str, dict[str, Any]] = {
    "generated": {},
    "static": {"factors": "static"},
    "tau per row": {"tau_granularity": "row"},
    "fixed tau": {"tau_kind": "fixed"},
    "DoRA": {"factors": "static", "tau_kind": "zero", "norm_grad": "detached"},
    "gaussian tau": {"tau_kind": "gaussian"},
    "experts": {"experts": True},
    "direct norm": {"norm_method": "direct"},
}


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def make(kind: str, **options: Any) -> AdaptedLayer:
    """A layer in float64, away from its start, with rows at the ends of c: 0, and 1e-9."""
    layer = wrap(LAYERS[kind]().double(), DoranConfig(rank=RANK, **options)).eval()
    with torch.no_grad():
        for parameter in layer.doran_adapter.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
        layer.doran_adapter.magnitude[:2] = torch.tensor([0.0, 1e-9])
    return layer


def make_input(kind: str, batch: int = 5) -> Tensor:
    if kind == "embedding":
        return torch.randint(D_IN, (batch, 7))
    shape = (batch, D_IN, 4, 5) if kind == "conv2d" else (batch, 7, D_IN)
    return torch.randn(shape, dtype=torch.float64).requires_grad_()


def run(layer: nn.Module, call: Callable[[Tensor], Tensor], x: Tensor) -> dict[str, Tensor]:
    """The output, and the gradients of a loss whose slope differs from element to element."""
    layer.zero_grad()
    x.grad = None
    y = call(x)
    (y * torch.linspace(-1, 2, y.numel(), dtype=y.dtype, device=y.device).view_as(y)).sum().backward()
    found = {name: p.grad for name, p in layer.named_parameters() if p.grad is not None}
    return {"output": y.detach(), **found, **({} if x.grad is None else {"x": x.grad})}


def check(layer: nn.Module, x: Tensor, *, rtol: float = 1e-9) -> None:
    with use_backend("reference"):
        expected = run(layer, layer, x)
    found = run(layer, torch.compile(layer, fullgraph=True, backend="aot_eager"), x)
    assert found.keys() == expected.keys()
    for name, exact in expected.items():
        torch.testing.assert_close(found[name], exact, atol=rtol / 100, rtol=rtol, msg=f"{name} differs")


@pytest.mark.parametrize("options", OPTIONS)
def test_options(options: str) -> None:
    check(make("linear", **OPTIONS[options]), make_input("linear"))


@pytest.mark.parametrize("kind", LAYERS)
def test_kinds_of_layers(kind: str) -> None:
    check(make(kind), make_input(kind), rtol=1e-4 if kind == "packed" else 1e-9)  # whose adapter is float32


def test_a_trained_bias() -> None:
    layer = make("linear")
    layer.base_layer.bias.requires_grad_(True)
    check(layer, make_input("linear"))


def test_a_trained_base_weight() -> None:
    layer = make("no bias")
    layer.base_layer.weight.requires_grad_(True)
    check(layer, make_input("no bias"))


@pytest.mark.parametrize("backend", ["auto", "torch", "reference"])
def test_the_graph_has_pytorchs_operations_alone(backend: Any) -> None:
    found: set[str] = set()

    def collect(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
        found.update(node.target.namespace for node in graph.graph.nodes if hasattr(node.target, "namespace"))
        return graph.forward

    layer = make("linear")
    with use_backend(backend):
        run(
            layer, torch.compile(layer, fullgraph=True, backend=aot_autograd(fw_compiler=collect)), make_input("linear")
        )
    assert found <= {"aten", "prims"}
    assert found


def test_new_lengths_do_not_compile_again() -> None:
    layer = make("linear")
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    for batch in (5, 6):  # the second length makes the graph dynamic
        run(layer, compiled, make_input("linear", batch))
    with torch.compiler.set_stance("fail_on_recompile"), use_backend("reference"):
        for batch in (2, 9, 31):
            x = make_input("linear", batch)
            torch.testing.assert_close(run(layer, compiled, x), run(layer, layer, x), atol=1e-11, rtol=1e-9)


class Stack(nn.Module):
    """Blocks of a residual model; each block is a module of its own that can be compiled alone."""

    class Block(nn.Module):
        def __init__(self, bias: bool) -> None:
            super().__init__()
            self.query, self.key = nn.Linear(8, 8, bias=bias), nn.Linear(8, 8, bias=bias)
            self.up, self.down = nn.Linear(8, 16), nn.Linear(16, 8)

        def forward(self, x: Tensor) -> Tensor:
            x = x + self.query(x) * torch.sigmoid(self.key(x))
            return x + self.down(torch.tanh(self.up(x)))

    def __init__(self, count: int = 4, bias: bool = False) -> None:
        super().__init__()
        self.layers = nn.ModuleList(self.Block(bias) for _ in range(count))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


BLOCK_OPTIONS: dict[str, dict[str, Any]] = {
    **{name: options for name, options in OPTIONS.items() if name != "direct norm"},
    "sharing: model": {"sharing": "model"},
    "sharing: none": {"sharing": "none"},
    "shared output": {"share_output": True},
    "ranks": {"rank_pattern": {"up": 2}},
    "some layers": {"target_modules": ["query", "down"]},
    "some layers, detached": {"target_modules": ["query", "down"], "norm_grad": "detached"},
}


ACROSS_BLOCKS = {"generated", "sharing: model", "sharing: none", "shared output"}
"""What one block has to do with another is theirs; the others take one block, which compiles in half the time."""


def moved_stack(blocks: int = 2, **options: Any) -> tuple[Stack, Any]:
    model = Stack(blocks).double()
    handle = adapt(model, DoranConfig(**{"rank": 3, "target_modules": "all-linear", **options}))
    with torch.no_grad():
        for parameter in handle.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval(), handle


@pytest.mark.parametrize("options", BLOCK_OPTIONS)
def test_the_layers_of_a_block_together(options: str) -> None:
    model, handle = moved_stack(2 if options in ACROSS_BLOCKS else 1, **BLOCK_OPTIONS[options])
    next(iter(handle.layers.values())).enabled = options == "generated"  # and with a layer that is left out
    x = torch.randn(3, 8, dtype=torch.float64).requires_grad_()
    check(model, x)
    with torch.no_grad(), use_backend("reference"):
        torch.testing.assert_close(torch.compile(model, fullgraph=True, backend="aot_eager")(x), model(x))


def test_the_products_of_a_blocks_networks_are_one() -> None:
    """Six products with W2 for A and B, forward and backward, whatever the number of layers."""
    wide = 61  # of no other tensor here
    counts = []

    def count(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
        products = [node for node in graph.graph.nodes if node.target is torch.ops.aten.mm.default]
        counts.append(sum(any(wide in arg.meta["val"].shape for arg in node.args) for node in products))
        return graph.forward

    model, _ = moved_stack(hidden_dim=wide)
    run(
        model, torch.compile(model, fullgraph=True, backend=aot_autograd(fw_compiler=count)), torch.randn(3, 8).double()
    )
    features = 2 * 3  # of A and B: the first layer, and its two gradients
    assert sum(counts) == 2 * (6 + features)


def test_hooks_go_with_the_adapters() -> None:
    model, handle = moved_stack()
    blocks = [module for module in model.modules() if module._forward_pre_hooks]
    assert set(model.layers) <= set(blocks)
    handle.remove()
    assert not [module for module in model.modules() if module._forward_pre_hooks or module._forward_hooks]


def test_blocks_compiled_one_by_one_share_their_graphs() -> None:
    """The first block of a sharing group owns its trunk; all blocks are alike, and so is every step."""
    model = Stack()
    handle = adapt(model, DoranConfig(rank=2, target_modules="all-linear"))
    optimizer = torch.optim.AdamW(handle.parameters(), lr=0.05)
    reference = copy.deepcopy(model)
    compiler = CompileCounterWithBackend("aot_eager")
    for block in model.layers:
        block.compile(fullgraph=True, backend=compiler)
    x = torch.randn(6, 8).requires_grad_()  # as the later blocks' inputs

    def step() -> Tensor:
        optimizer.zero_grad()
        loss = model(x).square().mean()
        loss.backward()
        optimizer.step()
        return loss.detach()

    first = step()
    torch.testing.assert_close(first, reference(x).square().mean().detach())
    assert compiler.frame_count == 2  # the hook and the forward, for all four blocks
    with torch.compiler.set_stance("fail_on_recompile"):
        last = [step() for _ in range(3)][-1]
    assert last < first
    reference.load_state_dict(model.state_dict())
    torch.testing.assert_close(model(x), reference(x))  # the parameters are read anew by each call


def test_without_gradients() -> None:
    layer = make("linear")
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    x = make_input("linear")
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), layer(x))
        layer.doran_adapter.magnitude.mul_(1.5)
        torch.testing.assert_close(compiled(x), layer(x))


def test_dropout_is_drawn_anew() -> None:
    layer = make("linear", dropout=0.5).train()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    x = make_input("linear")
    assert not torch.equal(compiled(x), compiled(x))


@pytest.mark.parametrize("bias", [True, False])
def test_step_zero_is_the_base_layer_to_the_bit(bias: bool) -> None:
    base = nn.Linear(D_IN, D_OUT, bias=bias).bfloat16()
    layer = wrap(base, DoranConfig(rank=RANK))
    x = torch.randn(9, D_IN).bfloat16()
    assert torch.equal(torch.compile(layer, fullgraph=True, backend="aot_eager")(x), base(x))


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_half_precision_with_the_default_compiler(device: str) -> None:
    """No wide copy of W0 is kept, and the gradients are those of float64 within bfloat16's precision."""
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a CUDA GPU: not tested on this machine")
    exact = make("linear")
    with torch.no_grad():
        exact.doran_adapter.magnitude[:2] = 0.5
        exact.base_layer.bfloat16()
    layer = copy.deepcopy(exact).float()
    layer.base_layer.bfloat16()
    layer.to(device)
    exact.base_layer.double()
    exact.doran_adapter.double()
    exact.doran_adapter.reset_base(exact.view)
    x = make_input("linear")
    kept: list[Tensor] = []
    with use_backend("reference"):
        expected = run(exact, exact, x)
    low = x.detach().to(device, torch.bfloat16).requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        found = run(layer, torch.compile(layer, fullgraph=True), low)
    for name, value in expected.items():
        assert (found[name].double().cpu() - value).norm() < 0.03 * value.norm(), name
    assert not [t for t in kept if t.shape in {(D_OUT, D_IN), (D_IN, D_OUT)} and t.dtype == torch.float32]


def test_layers_of_other_scalings_compile_one_after_the_other() -> None:
    for alpha in (3.0, 5.0, 7.0):
        layer = wrap(nn.Linear(D_IN, D_OUT), DoranConfig(rank=4, alpha=alpha))
        with torch.no_grad():
            for parameter in layer.doran_adapter.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
        x = torch.randn(3, D_IN)
        expected = torch.autograd.grad(layer(x).square().sum(), list(layer.doran_adapter.parameters()))
        compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
        found = torch.autograd.grad(compiled(x).square().sum(), list(layer.doran_adapter.parameters()))
        for one, other in zip(found, expected, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("rank", [1, 3])
def test_the_default_compilers_backward_overwrites_nothing_that_it_still_reads(rank: int) -> None:
    """Inductor of torch 2.13 reuses the memory of a saved tensor though other saved tensors are views of it."""
    torch.manual_seed(0)
    model = Stack(1)
    handle = adapt(model, DoranConfig(rank=rank, target_modules="all-linear"))
    with torch.no_grad():
        for parameter in handle.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    x = torch.randn(300, 8).requires_grad_()
    with use_backend("reference"):
        expected = run(model, model, x)
    with inductor_config.patch(force_disable_caches=True):  # what another version of this code has left there
        found = run(model, torch.compile(model, fullgraph=True), x)
    for name, value in expected.items():
        assert (found[name] - value).norm() <= 1e-4 * value.norm(), name
