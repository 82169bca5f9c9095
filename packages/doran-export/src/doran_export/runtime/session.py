"""One onnxruntime session: runs a graph with its cache kept on the device, and switches between adapters."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from doran_core.errors import ConfigError
from doran_export.errors import ExportError
from doran_export.runtime.providers import PROVIDERS, onnxruntime, open_session

__all__ = ["Array", "GraphSession", "as_dtype"]

Array: TypeAlias = NDArray[Any]

_PAST, _PRESENT = "past_key_values.", "present."
# Element types by onnxruntime's names: numpy's, and ONNX's numbers, which also name what numpy lacks.
_NUMPY = {"tensor(float)": np.float32, "tensor(float16)": np.float16}
_ELEMENT = {"tensor(float)": 1, "tensor(float16)": 10, "tensor(bfloat16)": 16}


def as_dtype(name: str, array: Array, dtype: Any) -> Array:
    """An input in the graph's dtype: integers stay integers and floats floats, whatever their width.

    Raises:
        ConfigError: integers for a floating-point input or the reverse, or values that are no numbers.
    """
    fits = "iub" if np.issubdtype(dtype, np.integer) else "f"
    if array.dtype.kind not in fits:
        raise ConfigError(f"input {name} has dtype {array.dtype}, expected {np.dtype(dtype)}")
    return array.astype(dtype, copy=False)


class GraphSession:
    """A graph in onnxruntime.

    Args:
        path: the ONNX file.
        providers: execution providers, best first; None takes the best available one.
        threads: threads within one operator; None leaves it to onnxruntime.
        head_size: head size of the cache, if the graph leaves it open (onnxruntime-genai's do).

    Attributes:
        path: the ONNX file.
        session: the onnxruntime.InferenceSession.
        input_names: the caller's inputs, without the cache and the adapter's.
        output_names: the caller's outputs, without the cache.
        past_names: the inputs of the cache.
        adaptable: the adapter's inputs.
    """

    def __init__(self, path: Path, providers: Sequence[str] | None, threads: int | None, head_size: int | None) -> None:
        self.path = path
        self.session = open_session(path, providers, threads=threads)
        inputs = self.session.get_inputs()
        self._types = {value.name: value.type for value in inputs}
        self._shapes = {value.name: value.shape for value in inputs}
        self.past_names = [name for name in self._types if name.startswith(_PAST)]
        self.input_names = [name for name in self._types if not name.startswith(_PAST)]
        outputs = [value.name for value in self.session.get_outputs()]
        self.output_names = [name for name in outputs if not name.startswith(_PRESENT)]
        self._all_outputs = self.output_names + [name for name in outputs if name.startswith(_PRESENT)]
        self.adaptable = {value.name for value in self.session.get_overridable_initializers()}
        self._head_size = head_size
        self._device = "cuda" if PROVIDERS["cuda"] in self.session.get_providers() else "cpu"
        self._options: Any = None
        self._bound: dict[str, Any] = {}
        self._adapter: Any = None

    def numpy_type(self, name: str) -> Any:
        """numpy's dtype of an input."""
        return _NUMPY.get(self._types[name], np.int64)

    def activate(self, path: Path | None) -> None:
        """Select an ``.onnx_adapter`` file, or no adapter, for the following runs.

        Raises:
            ExportError: the file cannot be read, or gives inputs that the graph does not have.
        """
        if path is None:
            self._options, self._bound, self._adapter = None, {}, None
            return
        runtime = onnxruntime()
        try:
            parameters = runtime.AdapterFormat.read_adapter(str(path)).get_parameters()
            adapter = runtime.LoraAdapter()
            adapter.Load(str(path))
        except Exception as error:
            raise ExportError(f"onnxruntime cannot read the adapter {path}: {str(error).strip()}") from error
        unknown = sorted(set(parameters) - self.adaptable)
        if unknown:
            raise ExportError(f"{path} was made for another graph: this one has no input {unknown[0]}")
        options = runtime.RunOptions()
        options.add_active_adapter(adapter)
        # onnxruntime's runs with bound inputs ignore RunOptions' adapters (1.32), so there they are bound as inputs.
        bound = {} if self._device == "cpu" else {name: self._to_device(value) for name, value in parameters.items()}
        self._options, self._bound, self._adapter = options, bound, adapter

    def empty_past(self, batch: int) -> list[Any]:
        """A cache of length 0, as OrtValues on the session's device."""
        make = onnxruntime().OrtValue.ortvalue_from_shape_and_type
        empty = []
        for name in self.past_names:
            _, heads, _, size = self._shapes[name]
            size = size if isinstance(size, int) else self._head_size
            empty.append(make([batch, heads, 0, size], _ELEMENT[self._types[name]], self._device, 0))
        return empty

    def step(self, feed: Mapping[str, Array], past: Sequence[Any]) -> tuple[dict[str, Array], list[Any]]:
        """One run.

        Args:
            feed: arrays by input name.
            past: the cache, from `empty_past` or the step before.

        Returns:
            Outputs by name, and the cache, which never leaves the device.

        Raises:
            ExportError: onnxruntime refuses the inputs, or fails.
        """
        run = self._run_on_cpu if self._device == "cpu" else self._run_bound
        try:
            values = run(feed, dict(zip(self.past_names, past, strict=True)))
        except Exception as error:
            raise ExportError(f"onnxruntime failed on {self.path}: {str(error).strip().splitlines()[0]}") from error
        plain = len(self.output_names)
        outputs = {name: value.numpy() for name, value in zip(self.output_names, values[:plain], strict=True)}
        return outputs, values[plain:]

    def _run_on_cpu(self, feed: Mapping[str, Array], past: Mapping[str, Any]) -> list[Any]:
        make = onnxruntime().OrtValue.ortvalue_from_numpy
        given = {name: make(np.ascontiguousarray(array)) for name, array in feed.items()}
        return list(self.session.run_with_ort_values(self._all_outputs, given | dict(past), self._options))

    def _run_bound(self, feed: Mapping[str, Array], past: Mapping[str, Any]) -> list[Any]:
        binding = self.session.io_binding()
        for name, array in feed.items():
            binding.bind_cpu_input(name, np.ascontiguousarray(array))
        for name, value in (dict(past) | self._bound).items():
            binding.bind_ortvalue_input(name, value)
        for name in self._all_outputs:
            binding.bind_output(name, "cpu" if name in self.output_names else self._device)
        self.session.run_with_iobinding(binding)
        return list(binding.get_outputs())

    def _to_device(self, value: Any) -> Any:
        if value.data_type() not in _NUMPY:
            return value  # bfloat16, which numpy lacks, is copied in each run
        return onnxruntime().OrtValue.ortvalue_from_numpy(value.numpy(), self._device, 0)
