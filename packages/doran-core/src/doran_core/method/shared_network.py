"""A network shared by several layers: one module under many names, stored once in a state dict.

Every layer of a sharing group registers the group's networks. So ``parameters()`` yields each once, a copied layer has
its networks, and removing a layer leaves the networks with the others.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from typing import Any

from torch import Tensor, nn

from doran_core.support.sharding import is_dtensor
from doran_core.support.torch_internals import own_modules

__all__ = ["NetworkHolder", "SharedNetwork", "shared_networks", "tensors_by_layer"]


class SharedNetwork(nn.Module):
    """Base of the networks that layers share.

    A model's state dict names the tensors after the first layer that holds them only. Loading accepts the tensors under
    any of the layers' names. If the state dict has none of these names, all of them are reported as missing.
    """

    def __init__(self) -> None:
        super().__init__()
        self._written_to: weakref.ref[Any] | None = None
        self._prefix = ""
        self._missing: list[str] | None = None
        """The list of missing keys of the current load; another list means another load."""
        self._pending: list[str] = []
        self._is_loaded = False
        self.register_load_state_dict_post_hook(_accept_other_names)  # type: ignore[no-untyped-call]

    def state_dict(self, *args: Any, destination: Any = None, prefix: str = "", keep_vars: bool = False) -> Any:
        """The state dict of nn.Module; adds nothing to a `destination` that already has these tensors."""
        written = None if self._written_to is None else self._written_to()
        if destination is not None and destination is written:
            return destination
        with suppress(TypeError):  # a plain dict has no weak references; the tensors are then there under every name
            self._written_to = weakref.ref(destination)
        return super().state_dict(*args, destination=destination, prefix=prefix, keep_vars=keep_vars)

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        self._prefix = prefix
        super()._load_from_state_dict(state_dict, prefix, *args)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_written_to": None, "_missing": None, "_pending": []}


class NetworkHolder(nn.Module):
    """Base of the modules that hold shared networks.

    FSDP2 shards the modules that it finds below a unit through ``children()``, and fails at parameters that an earlier
    unit has sharded. So a network that is already sharded is not among the children here: it stays with the first unit
    that has it, and the layers of other units gather it for each use (:func:`doran_core.support.sharding.read`).
    ``named_children()`` has it: through that, torch.distributed.checkpoint finds what it loads.
    """

    def children(self) -> Iterator[nn.Module]:
        """The children of nn.Module, without the networks that FSDP2 has sharded."""
        return (child for child in super().children() if not _is_sharded_network(child))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> NetworkHolder:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for child in own_modules(self).values() if recurse else ():
            if child is not None and _is_sharded_network(child):
                child._apply(fn)
        return self


def _is_sharded_network(module: nn.Module) -> bool:
    return isinstance(module, SharedNetwork) and any(map(is_dtensor, module.parameters()))


def _accept_other_names(network: SharedNetwork, incompatible: Any) -> None:
    """Remove a network's other names from the missing keys: one name of it in a state dict is enough."""
    missing: list[str] = incompatible.missing_keys
    if network._missing is not missing:
        network._missing, network._pending, network._is_loaded = missing, [], False
    here = {f"{network._prefix}{name}" for name, _ in network.named_parameters()}
    lacking = [key for key in missing if key in here]
    if len(lacking) < len(here):
        network._is_loaded = True
        forgiven = network._pending
    else:
        network._pending += lacking
        forgiven = network._pending if network._is_loaded else []
    if forgiven:
        missing[:] = [key for key in missing if key not in set(forgiven)]
        network._pending = []


def tensors_by_layer(layers: Mapping[str, nn.Module]) -> dict[str, dict[str, Tensor]]:
    """Each layer's tensors by their names in the layer; shared networks count for the first layer that has them.

    Args:
        layers: the adapters' modules by the layers' names.
    """
    first: dict[int, str] = {}
    return {
        name: {
            key: value.detach()
            for key, value in layer.state_dict(keep_vars=True).items()
            if first.setdefault(id(value), name) == name
        }
        for name, layer in layers.items()
    }


def shared_networks(model: nn.Module) -> dict[SharedNetwork, list[str]]:
    """Each shared network of a model with the names of the modules that hold it, in the model's order.

    Before ``fully_shard`` each can be made a unit of its own, which gathers it once for all its uses:
    ``fully_shard(network, reshard_after_forward=False)``.
    """
    found: dict[SharedNetwork, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        for child in dict.fromkeys(own_modules(module).values()):
            if isinstance(child, SharedNetwork):
                found.setdefault(child, []).append(name)
    return found
