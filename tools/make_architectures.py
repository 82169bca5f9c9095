"""Make doran_core's table of architectures from the installed transformers: ties, and names of tensors in checkpoints.

    python tools/make_architectures.py                     # all that the auto classes name; some minutes
    python tools/make_architectures.py BertForMaskedLM     # print what the table would say of some

Every architecture is built from its default configuration, on the meta device and with few layers.
"""

from __future__ import annotations

import json
import logging
import signal
import sys
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import CONFIG_MAPPING, PretrainedConfig
from transformers.core_model_loading import revert_weight_conversion
from transformers.models.auto import modeling_auto

from doran_core.checkpoint.architectures import renamed_start, template

OUT = Path(__file__).parents[1] / "packages/doran-core/src/doran_core/checkpoint/architectures.json"
_DEPTHS = ("num_hidden_layers", "num_layers", "n_layer", "n_layers", "encoder_layers", "decoder_layers")
_SECONDS = 30


def architectures() -> dict[str, str]:
    """Class name to model type, of all that the auto classes make."""
    found: dict[str, str] = {}
    for name in vars(modeling_auto):
        if name.startswith("MODEL_") and name.endswith("_MAPPING_NAMES"):
            for model_type, classes in getattr(modeling_auto, name).items():
                for one in [classes] if isinstance(classes, str) else classes:
                    found.setdefault(one, model_type)
    return dict(sorted(found.items()))


def describe(class_name: str, model_type: str) -> dict[str, Any]:
    """What the table says of one architecture, its maps in full."""
    try:
        model, default = _build(class_name, model_type, few_layers=True)
    except (ValueError, TypeError, IndexError, KeyError, RuntimeError, AttributeError, AssertionError):
        model, default = _build(class_name, model_type, few_layers=False)
    names = [name for name, _ in model.named_parameters(remove_duplicate=False)]
    return {
        "tied_by_default": default,
        "ties": dict(getattr(model, "all_tied_weights_keys", None) or {}),
        "names": _renamed(model, names),
    }


def _build(class_name: str, model_type: str, *, few_layers: bool) -> tuple[Any, bool]:
    config = CONFIG_MAPPING[model_type]()
    default = bool(getattr(config, "tie_word_embeddings", False))
    for part in _parts(config):
        part.tie_word_embeddings = True
        for name in _DEPTHS if few_layers else ():
            if isinstance(getattr(part, name, None), int) and getattr(part, name) > 2:
                setattr(part, name, 2)
    with torch.device("meta"):
        return getattr(transformers, class_name)(config), default


def _parts(config: PretrainedConfig) -> Iterable[Any]:
    yield config
    for value in list(vars(config).values()):
        if isinstance(value, PretrainedConfig):
            yield from _parts(value)


def _renamed(model: Any, names: Iterable[str]) -> dict[str, str]:
    """Starts of names that a checkpoint has otherwise, and its own; numbers as ``{}``, the longest start counts."""
    stored = {}
    for name in names:
        value = torch.empty(2, 2, device="meta")
        try:
            reverted = revert_weight_conversion(model, {name: value})
        except Exception:
            continue
        (other, tensor), *more = reverted.items()
        (pattern, numbers), (stored_pattern, stored_numbers) = template(name), template(other)
        if tensor is value and not more and numbers == stored_numbers:
            stored[pattern] = stored_pattern
    rules = dict(_starts(pattern, other) for pattern, other in stored.items() if pattern != other)
    wrong = {pattern: other for pattern, other in stored.items() if renamed_start(rules, pattern) != other}
    return rules | wrong


def _starts(pattern: str, stored: str) -> tuple[str, str]:
    """Two names without the parts at the end that they have in common."""
    ours, theirs = pattern.split("."), stored.split(".")
    while len(ours) > 1 and len(theirs) > 1 and ours[-1] == theirs[-1]:
        ours.pop(), theirs.pop()
    return ".".join(ours), ".".join(theirs)


def table(descriptions: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """The file's content: maps that occur more than once are stored once."""
    maps: dict[str, list[dict[str, str]]] = {"ties": [], "names": []}
    entries = {}
    for name, one in descriptions.items():
        entries[name] = {"tied_by_default": one["tied_by_default"]}
        for kind, known in maps.items():
            if one[kind] not in known:
                known.append(one[kind])
            entries[name][kind] = known.index(one[kind])
    return {"transformers": transformers.__version__, "architectures": entries, **maps}


def main(wanted: list[str]) -> None:
    """Write the table, or print a part of it."""
    transformers.logging.set_verbosity_error()
    logging.disable(logging.ERROR)
    warnings.simplefilter("ignore")
    signal.signal(signal.SIGALRM, _too_slow)
    known = architectures()
    descriptions, failed = {}, {}
    for name in wanted or known:
        signal.alarm(_SECONDS)
        try:
            descriptions[name] = describe(name, known[name])
        except Exception as error:
            failed[name] = f"{type(error).__name__}: {str(error)[:80]}"
        finally:
            signal.alarm(0)
    if wanted:
        print(json.dumps(descriptions, indent=1))
    else:
        OUT.write_text(json.dumps(table(descriptions), separators=(",", ":"), sort_keys=True) + "\n")
    print(f"{len(descriptions)} architectures, {len(failed)} not built: {failed}", file=sys.stderr)


def _too_slow(*_: object) -> None:
    raise TimeoutError(f"more than {_SECONDS} s")


if __name__ == "__main__":
    main(sys.argv[1:])
