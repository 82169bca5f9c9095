"""Find the modules to adapt: by names, endings, a regex, or all linear layers."""

from __future__ import annotations

import difflib
import warnings
from collections.abc import Collection, Iterable, Mapping, Sequence

from torch import nn

from doran_core.errors import TargetError
from doran_core.layers.supported import is_adaptable, is_linear
from doran_core.layers.uncalled import read_not_called
from doran_core.method.config import ALL_LINEAR, DoranConfig
from doran_core.support.names import plain_modules, plain_name
from doran_core.support.patterns import name_pattern, pattern_matches_ending

__all__ = [
    "find_targets",
    "matches",
    "nearest_names",
    "refuse_read",
    "shortened",
    "warn_left_out",
    "warn_unused_patterns",
]


def matches(name: str, patterns: str | Iterable[str] | None) -> bool:
    """Whether a module's name matches: a string is a regex for the full name; a list has names and name endings."""
    if patterns is None:
        return False
    if isinstance(patterns, str):
        return name_pattern(patterns).fullmatch(name)
    return any(name == entry or name.endswith(f".{entry}") for entry in patterns)


def find_targets(model: nn.Module, config: DoranConfig, known: Collection[str] = ()) -> list[str]:
    """Names of the modules to adapt, in the model's order.

    Args:
        model: the model.
        config: the options.
        known: names to adapt even if the model may not call them, such as those of an existing adapter.

    Raises:
        TargetError: if no ``target_modules`` are given, one of them matches nothing (with the nearest names), or one
            matches a module that DoRAN cannot adapt, or that the model does not call.
    """
    modules = plain_modules(model)
    read = {name: reason for name, reason in read_not_called(model).items() if name not in known}
    candidates = {name: m for name, m in modules.items() if name and (is_adaptable(m) or name in read)}
    targets = config.target_modules
    if not targets:
        raise TargetError(
            f"DoranConfig.target_modules is {targets!r}; expected name endings, a regex or {ALL_LINEAR!r}. "
            f"This model has {_summary(candidates)}"
        )
    if targets == ALL_LINEAR:
        linear = [name for name, module in candidates.items() if is_linear(module) or isinstance(module, nn.Linear)]
        found = [name for name in linear if name not in read]
        warn_left_out(model, (name for name in linear if name in read), read)
    else:
        found = _named_targets(modules, candidates, targets)
    for name in config.exclude_modules if isinstance(config.exclude_modules, list) else []:
        if not any(matches(module, [name]) for module in found):
            raise TargetError(
                f"exclude_modules: {name!r} matches none of the target modules; {nearest_names(name, found)}"
            )
    kept = [
        name
        for name in found
        if not matches(name, config.exclude_modules) and not _is_inside(name, config.modules_to_save)
    ]
    if not kept:
        raise TargetError(
            f"target_modules={targets!r} without exclude_modules={config.exclude_modules!r} and "
            f"modules_to_save={config.modules_to_save!r} leaves no module"
        )
    for name in kept:
        refuse_read(name, read)
    warn_unused_patterns(config, kept)
    return kept


def refuse_read(name: str, read: Mapping[str, str]) -> None:
    """Refuse to adapt a layer that is not called.

    Args:
        name: of the layer.
        read: the result of :func:`~doran_core.layers.uncalled.read_not_called` for the model.

    Raises:
        TargetError: naming the layer and the reason.
    """
    if name in read:
        raise TargetError(
            f"{name}: this layer is never called ({read[name]}), so an adapter around it would do nothing; leave it "
            "out of target_modules, or exclude it with exclude_modules"
        )


def warn_left_out(
    model: nn.Module, names: Iterable[str], read: Mapping[str, str], adapted: Collection[str] = ()
) -> None:
    """Warn in one line about layers that "all-linear" leaves out: layers that are never called, and weights outside of
    layers.

    Args:
        model: the model.
        names: of the layers that are left out because they are not called.
        read: the reason for each, as above.
        adapted: names of expert weights that are adapted as parameters.
    """
    parts = []
    if uncalled := list(names):
        parts.append(f"{shortened(uncalled)}, never called ({read[uncalled[0]]})")
    if experts := [name for name in expert_weights(model) if name not in adapted]:
        parts.append(f"{shortened(experts)}, weights of experts that are in no linear layer")
    if parts:
        warnings.warn(f"target_modules={ALL_LINEAR!r} leaves out {'; '.join(parts)}", stacklevel=4)


def expert_weights(model: nn.Module) -> list[str]:
    """Names of parameters that hold the matrices of several experts, ``[experts, rows, columns]``."""
    named = ((plain_name(name), parameter) for name, parameter in model.named_parameters())
    return [name for name, parameter in named if "expert" in name and parameter.dim() == 3]


def shortened(names: Sequence[str]) -> str:
    """A few names of many."""
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def warn_unused_patterns(config: DoranConfig, names: Collection[str]) -> None:
    """Warn in one line about entries of ``rank_pattern`` and ``alpha_pattern`` that match no adapted module."""
    for field in ("rank_pattern", "alpha_pattern"):
        entries = sorted(getattr(config, field))
        unused = [entry for entry in entries if not any(pattern_matches_ending(entry, name) for name in names)]
        if unused:
            warnings.warn(f"{field}: {unused} match no adapted module", RuntimeWarning, stacklevel=4)


def _named_targets(
    modules: Mapping[str, nn.Module], candidates: Mapping[str, nn.Module], targets: str | list[str]
) -> list[str]:
    entries: list[str | list[str]] = [targets] if isinstance(targets, str) else [[entry] for entry in targets]
    found: set[str] = set()
    for entry in entries:
        named = [name for name in modules if name and matches(name, entry)]
        fitting = [name for name in named if name in candidates]
        shown = entry if isinstance(entry, str) else entry[0]
        if not named:
            advice = nearest_names(shown, candidates)
            if isinstance(entry, str) and any(name.endswith(f".{entry}") for name in candidates):
                advice = f"a string is a regex for the whole name; for the ending, write [{entry!r}]"
            raise TargetError(f"target_modules: {shown!r} matches no module; {advice}")
        if not fitting:
            kinds = sorted({type(modules[name]).__name__ for name in named})
            raise TargetError(
                f"target_modules: {shown!r} matches only modules that DoRAN cannot adapt ({', '.join(kinds)}); "
                "it adapts linear layers, Conv1D, Embedding and nn.Conv1d, 2d and 3d"
            )
        found.update(fitting)
    return [name for name in candidates if name in found]


def _is_inside(name: str, modules: list[str] | None) -> bool:
    """Whether the module is one of these or inside one."""
    parts = name.split(".")
    return any(matches(".".join(parts[:end]), modules) for end in range(1, len(parts) + 1))


def nearest_names(unknown: str, modules: Iterable[str]) -> str:
    """The advice after "X matches no module": the nearest name endings, or all endings if none is near.

    Args:
        unknown: the requested name.
        modules: full names of the modules that could be adapted.
    """
    names = list(modules)
    endings = sorted({name.rsplit(".", 1)[-1] for name in names})
    near = difflib.get_close_matches(unknown.rsplit(".", 1)[-1], endings, n=3, cutoff=0.5)
    return f"did you mean {' or '.join(map(repr, near))}?" if near else f"this model has {_summary(names)}"


def _summary(candidates: Iterable[str]) -> str:
    endings = sorted({name.rsplit(".", 1)[-1] for name in candidates})
    shown = ", ".join(endings[:12]) + (", ..." if len(endings) > 12 else "")
    return f"adaptable modules ending in: {shown}" if endings else "no adaptable modules"
