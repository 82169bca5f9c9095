"""The trainable part of one adapted layer: magnitude, tau, factors and experts, and their join with a base view."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from doran_core import functional
from doran_core.checkpoint.fingerprint import exact_digest
from doran_core.errors import ConfigError, NonFiniteError, TargetError
from doran_core.kernels import dispatch
from doran_core.kernels.adapted_linear import without_autocast
from doran_core.kernels.prepare import Runtime
from doran_core.layers import traced
from doran_core.layers.base import BaseView
from doran_core.layers.swap import WeightSwap
from doran_core.method.config import DoranConfig
from doran_core.method.experts import RankOneExperts
from doran_core.method.factors import LayerSpec, factor_penalty
from doran_core.method.tau import Tau
from doran_core.support.sharding import is_dtensor, read, refuse_zero_init
from doran_core.support.torch_internals import (
    backward_pass,
    distributed_data_parallel,
    has_saved_tensor_hooks,
    needs_single_operations,
    uses_fully_shard,
)

__all__ = ["DoranAdapter", "note_loading"]


class DoranAdapter(nn.Module):
    """One layer's DoRAN: ``y = c * (W0 x + g B A x) + bias`` with ``c = m / (||W0 + g B A|| + tau)``.

    The adapter does not contain the base layer: each call gets a :class:`~doran_core.layers.base.BaseView` of it. So
    the same class serves plain modules, PEFT layers and files. Its parameters stay float32 when the model is cast to
    half precision: a rounded magnitude would move the model away from the pretrained one.

    Args:
        config: the method's options.
        spec: the layer's name, sizes, rank and scaling.
        factors: the module whose call gives ``(A, B)``.

    Attributes:
        called: whether a forward pass has used this adapter.
        base_was_loaded: whether FSDP2 has loaded base weights since their norms and digest were taken.
    """

    base_squared_norm: Tensor | None

    def __init__(self, config: DoranConfig, spec: LayerSpec, factors: nn.Module) -> None:
        super().__init__()
        self.config = config
        self.spec = spec
        self.scaling = spec.scaling
        self.factors = factors
        self.experts = RankOneExperts(spec.rank, config) if config.experts else None
        self.tau = Tau(config, spec.d_out, spec.name, experts=spec.experts)
        self.magnitude = nn.Parameter(torch.ones(*spec.stacked, spec.d_out, dtype=torch.float32))
        self.register_buffer("base_squared_norm", None, persistent=False)
        self._base_version: tuple[object, ...] | None = None
        self.base_was_loaded = False
        self.base_digest: bytes | None = None
        self.called = False
        self._is_reused = config.factor_penalty > 0.0 or (config.sharing == "model" and config.factors == "generated")
        self._ddp_fails = False
        # PyTorch's fused encoder layers bypass modules, unless a module in them has a hook. A seldom called module gets
        # the hook, because a hook doubles the cost of a call.
        self.tau.register_forward_pre_hook(_no_operation)
        self.runtime = Runtime()
        self.traced_side: traced.WeightSide | None = None

    @torch.no_grad()
    def initialise(self, view: BaseView) -> None:
        """Set tau and then ``m = n + tau``: the adapted layer then computes what its base computes, to the last bit.

        The adapter moves to the base layer's device, and to float64 for a float64 base.
        """
        if view.device.type == "meta":
            raise TargetError(
                f"{self.spec.name}: its weight is on the meta device; load the base model's weights first"
            )
        self._refuse_sharded(view)
        self.to(device=view.device, dtype=torch.float64 if view.compute_dtype() == torch.float64 else None)
        self.reset_base(view)
        A, B = self.factor_pair()
        self._check_start(A, B)
        direct = self.config.norm_method == "direct"  # the direct norm sums in another order
        norm = self.norm(view, A, B) if direct else functional.start_norm(self.squared_norm_of_base(view))
        if not bool(norm.isfinite().all()):
            raise NonFiniteError(f"{self.spec.name}: the base weight has NaN or infinite values")
        self.tau.initialise(norm)
        self.magnitude.copy_(norm + self.tau.value())

    def _refuse_sharded(self, view: BaseView) -> None:
        """Refuse a model that FSDP2 or a tensor parallel plan has sharded, and refuse to run inside zero.Init."""
        if any(is_dtensor(parameter) for parameter in view.layer.parameters(recurse=False)):
            raise TargetError(
                f"{self.spec.name}: its weight is a DTensor. Adapt the model before fully_shard; DoRAN does not adapt "
                "models under a tensor parallel plan (tp_plan): load the model without one"
            )
        refuse_zero_init(self, self.spec.name)

    @torch.no_grad()
    def reset_base(self, view: BaseView) -> None:
        """Recompute ``||W0||^2`` and the weight's digest. Runs automatically after a visible change of the weight.

        Changes of a hidden weight (quantized, sharded, offloaded) are not visible. A sharded or offloaded weight is
        gathered here, by all processes.
        """
        with torch.inference_mode(False), view.whole_weight() as weight:  # training uses the norm, too
            squared_norm = view.squared_norm() if weight is None else self._squared_norm(weight)
            self.base_squared_norm = squared_norm.to(self.magnitude.device)
            self.base_digest = None if weight is None else exact_digest(self.spec.name, weight)
        self._base_version = view.weight_version()
        self.base_was_loaded = False

    def _squared_norm(self, weight: Tensor) -> Tensor:
        return functional.base_squared_norm(weight)

    def _check_start(self, A: Tensor, B: Tensor) -> None:
        spec, generator = self.spec, type(self.factors).__name__
        expected = [*spec.stacked, spec.rank, spec.d_in], [*spec.stacked, spec.d_out, spec.rank]
        if (list(A.shape), list(B.shape)) != expected:
            raise ConfigError(
                f"{spec.name}: {generator} gives A {list(A.shape)} and B {list(B.shape)}, expected "
                f"A {expected[0]} and B {expected[1]}"
            )
        if bool(B.any()):
            raise ConfigError(f"{spec.name}: B of {generator} is not 0 at the start, so it would change the base model")

    def factor_pair(self) -> tuple[Tensor, Tensor]:
        """``(A [r, d_in], B [d_out, r])`` of this pass, with experts and their mask, without the scaling g."""
        A, B = self.factors()
        return (A if self.experts is None else self.experts(A)), B

    def norm(self, view: BaseView, A: Tensor, B: Tensor) -> Tensor:
        """``n = ||W0 + g B A||`` per row, ``[d_out]``, by the configured method, with the gradient it asks for."""
        if self.config.norm_grad == "detached":
            with torch.no_grad():
                return self._norm(view, A, B)
        return self._norm(view, A, B)

    def _norm(self, view: BaseView, A: Tensor, B: Tensor) -> Tensor:
        weight = view.weight()
        if self.config.norm_method == "direct":
            if weight is None:
                raise TargetError(
                    f"{self.spec.name}: norm_method='direct' needs the weight of {type(view.layer).__name__}, "
                    "which gives no access to it; use 'factored'"
                )
            return functional.row_norm(weight, A, B, self.scaling)
        squared_norm = self.squared_norm_of_base(view)
        norm = functional.factored_row_norm(squared_norm, view.product(A), A, B, self.scaling)
        if self.config.norm_method == "auto" and weight is not None and not torch.compiler.is_compiling():
            norm = self._repair_cancelled(norm, squared_norm, weight, A, B)
        return norm

    def squared_norm_of_base(self, view: BaseView) -> Tensor:
        """``||W0||^2``, ``[d_out]``: cached, or recomputed if the weight has changed."""
        self.refresh(view)
        squared_norm = self.base_squared_norm
        assert squared_norm is not None
        return squared_norm

    def refresh(self, view: BaseView) -> None:
        """Recompute ``||W0||^2`` if it is missing or belongs to another weight. A compiled graph uses the cached
        value."""
        is_old = self.base_squared_norm is None or self.base_squared_norm.is_meta
        if not is_old and not torch.compiler.is_compiling():
            version = view.weight_version()
            is_trained = version is not None and view.weight_trains and not needs_single_operations()
            is_old = self.base_was_loaded or is_trained or version not in (None, self._base_version)
        if is_old:
            self.reset_base(view)

    def digest_of_base(self, swap: WeightSwap, view: BaseView) -> bytes | None:
        """Digest of W0, also while W' is in. None if W0 is quantized or float16.

        The digest of a sharded W0 was taken with its norm. If base weights were loaded since, W0 is gathered here, and
        all processes must call this.
        """
        if swap.original(view) is None and not self.base_was_loaded:
            return self.base_digest
        with swap.whole_original(view) as weight:
            return None if weight is None else exact_digest(self.spec.name, weight)

    def _repair_cancelled(self, norm: Tensor, squared_norm: Tensor, weight: Tensor, A: Tensor, B: Tensor) -> Tensor:
        """The direct norm for the rows in which the update nearly cancels W0."""
        rows = functional.cancelled_rows(norm, squared_norm)
        if rows.numel() == 0:
            return norm
        return norm.index_put((rows,), functional.row_norm(weight[rows], A, B[rows], self.scaling).to(norm.dtype))

    def output_scale(self, norm: Tensor) -> Tensor:
        """``c = m / (n + tau)``, ``[d_out]``."""
        return functional.output_scale(read(self.magnitude), norm, self.tau())

    def scale_and_factors(self, view: BaseView) -> tuple[Tensor, Tensor, Tensor]:
        """``(c [d_out], A [r, d_in], B' [d_out, r])`` of this pass: ``y = c * W0 x + B' A x + bias``.

        Autocast is off here, because it would compute the norm's products in half precision.
        """
        with without_autocast(self.magnitude):
            A, B = self.factor_pair()
            scale = self.output_scale(self.norm(view, A, B))
            return scale, A, functional.scaled_factor(B, scale, self.scaling)

    def forward(self, view: BaseView, x: Tensor, base_output: Tensor | None = None) -> Tensor:
        """The adapted output.

        Args:
            view: of the base layer.
            x: the base layer's input.
            base_output: the base layer's output for x, bias included. With None the adapter calls the base layer, and
                often saves a copy of the output.

        Returns:
            Shape and dtype of the base layer's output.

        Raises:
            BackendError: the implementation selected by name (doran_core.kernels) cannot run here.
        """
        vars(self)["called"] = True  # ten times as fast as nn.Module's setattr
        if self._is_reused and not torch.compiler.is_compiling():
            self._refuse_second_backward()
        if torch.compiler.is_compiling():
            return traced.forward(self, view, x, base_output)
        y = dispatch.run(self, view, x, base_output)
        if y is None:
            y = self._reference_forward(view, x, view.layer(x) if base_output is None else base_output)
        return y

    def _refuse_second_backward(self) -> None:
        """Refuse a second use of parameters by reentrant checkpointing, which DistributedDataParallel cannot handle."""
        ddp = distributed_data_parallel()
        if ddp is not None:
            vars(self)["_ddp_fails"] = ddp.require_backward_grad_sync and not ddp.static_graph
        elif self._ddp_fails and backward_pass() >= 0 and torch.is_grad_enabled() and not has_saved_tensor_hooks():
            raise TargetError(
                f"{self.spec.name}: under DistributedDataParallel reentrant checkpointing allows a parameter one use, "
                "and sharing='model' or a factor penalty uses the adapter's more than once; checkpoint with "
                "use_reentrant=False, or make DistributedDataParallel with static_graph=True"
            )

    def _reference_forward(self, view: BaseView, x: Tensor, base_output: Tensor) -> Tensor:
        """The formulas under autograd, for every kind of layer."""
        scale, A, scaled_B = self.scale_and_factors(view)
        dtype = base_output.dtype
        if x.is_floating_point():
            x = F.dropout(x.to(dtype), self.config.dropout, self.training)
        delta = view.low_rank(x, A.to(dtype), scaled_B.to(dtype))
        return functional.adapted_output(base_output, delta, scale, view.bias, channel_dim=view.channel_dim)

    @torch.no_grad()
    def merged_weight(self, weight: Tensor) -> Tensor:
        """W' ``[d_out, d_in]`` in float64, from W0 of the same shape; masks and noise as at inference."""
        with self.inference_mode_of_method():
            A, B = self.factor_pair()
        return functional.merged_weight(weight, A, B, self.scaling, read(self.magnitude), self.tau.value())

    def penalty(self) -> Tensor:
        """``factor_penalty`` times the mean squares of A and B, a scalar for the loss."""
        A, B = self.factor_pair()
        return self.config.factor_penalty * factor_penalty(A, B)

    def inference_mode_of_method(self) -> _Evaluating:
        """A context without masks and noise, in train and eval mode."""
        return _Evaluating(self)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> DoranAdapter:
        super()._apply(_KeepPrecision(fn), recurse)  # type: ignore[no-untyped-call]
        return self

    def extra_repr(self) -> str:
        spec = self.spec
        return f"d_in={spec.d_in}, d_out={spec.d_out}, rank={spec.rank}, scaling={spec.scaling:g}"


def note_loading(layer: nn.Module, state: Mapping[str, object], prefix: str) -> None:
    """Let the adapters of a layer take the norms of its base anew if the state that is loaded has base weights.

    PyTorch counts what is loaded; FSDP2 does not.
    """
    if uses_fully_shard() and any(name.startswith(f"{prefix}base_layer.") for name in state):
        for module in layer.modules():
            if isinstance(module, DoranAdapter):
                module.base_was_loaded = True


def _no_operation(module: nn.Module, args: object) -> None:
    """A hook that does nothing. Its presence turns off PyTorch's fused path."""


class _KeepPrecision:
    """Lets ``module.to(...)`` move tensors without rounding them to half precision."""

    def __init__(self, fn: Callable[[Tensor], Tensor]) -> None:
        self.fn = fn

    def __call__(self, tensor: Tensor) -> Tensor:
        moved = self.fn(tensor)
        if moved.dtype in (torch.bfloat16, torch.float16) and tensor.dtype in (torch.float32, torch.float64):
            return tensor.to(moved.device)
        return moved


class _Evaluating:
    """Puts a module in eval mode, and restores each submodule's mode afterwards."""

    def __init__(self, module: nn.Module) -> None:
        self._module = module

    def __enter__(self) -> None:
        self._modes = [(part, part.training) for part in self._module.modules()]
        self._module.eval()

    def __exit__(self, *exc_info: object) -> None:
        for part, training in self._modes:
            part.training = training
