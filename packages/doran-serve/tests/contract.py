"""What this package relies on in vLLM, as text that has to be found in a definition's source.

`test_contract` holds it against the installed vLLM, and, given its path in DORAN_TEST_VLLM_SOURCE, against the unpacked
source of any other release, which is read and never imported.
"""

from __future__ import annotations

import ast
from pathlib import Path

REQUIRED: dict[str, list[str]] = {
    "vllm.lora.layers.base_linear:BaseLinearLayerWithLoRA": [
        *("base_layer", "device", "tp_size", "tp_rank", "n_slices", "_enable_aux_cuda_stream"),
        *("def _apply_lora_to_output", "self._apply_lora_to_output(x, output)", "self.lora_a_stacked ="),
    ],
    "vllm.lora.layers.column_parallel_linear:ColumnParallelLinearWithLoRA": ["self.output_size =", "slice_lora_b"],
    "vllm.lora.layers.row_parallel_linear:RowParallelLinearWithLoRA": ["self.output_size =", "slice_lora_b"],
    "vllm.lora.layers.replicated_linear:ReplicatedLinearWithLoRA": ["self.output_size =", "_apply_base_forward"],
    "vllm.lora.layers.base:BaseLayerWithLoRA": ["self.punica_wrapper"],
    "vllm.lora.layers.column_parallel_linear:MergedColumnParallelLinearWithLoRA.set_lora": ["self.reset_lora(index)"],
    "vllm.lora.punica_wrapper.punica_base:PunicaWrapperBase": ["self._token_lora_indices"],
    "vllm.lora.punica_wrapper.punica_gpu:PunicaWrapperGPU": ["self.token_mapping_meta = LoRAKernelMeta"],
    "vllm.lora.ops.triton_ops.lora_kernel_metadata:LoRAKernelMeta": [
        *("token_indices_sorted_by_lora_ids", "active_lora_ids", "num_tokens_per_lora", "lora_token_start_loc"),
        *("no_lora_flag_cpu", "active_lora_ids.fill_(-1)", "num_tokens_per_lora.fill_(0)"),
    ],
    "vllm.lora.model_manager:LoRAModelManager": [
        *("self.modules", "self.packed_modules", "self.lora_index_to_id", "self.model", "module.reset_lora(index)"),
        *("self._registered_adapters", "def _add_adapter", "def list_adapters", "def remove_adapter"),
    ],
    "vllm.lora.worker_manager:LRUCacheWorkerLoRAManager": [
        "def _apply_adapters",
        "self.add_adapter(lora)",
        "load_inplace",
    ],
    "vllm.lora.model_manager:LRUCacheLoRAModelManager": ["def remove_oldest_adapter", "def activate_adapter"],
    "vllm.v1.worker.lora_model_runner_mixin:LoRAModelRunnerMixin": [
        "self.lora_manager",
        "def add_lora",
        "def remove_lora",
    ],
    "vllm.v1.core.kv_cache_manager:KVCacheManager": ["def get_block_ids", "def evict_blocks"],
    "vllm.v1.engine.output_processor:OutputProcessor": ["def propagate_error"],
    "vllm.v1.engine.async_llm:AsyncLLM.shutdown": ["output_handler"],
    "vllm.entrypoints.openai.models.serving:OpenAIServingModels": [
        *("static_lora_modules", "self.lora_requests", "raise ValueError(load_result.error.message)"),
    ],
    "vllm.lora.worker_manager:WorkerLoRAManager": ["_manager_cls", "self._adapter_manager", "self.lora_config"],
    "vllm.v1.engine.input_processor:InputProcessor": ["self.vllm_config", "self._validate_lora(lora_request)"],
    "vllm.v1.engine.llm_engine:LLMEngine": ["self.vllm_config", "lora_request=lora_request,"],
    "vllm.v1.engine.async_llm:AsyncLLM": ["self.vllm_config", "lora_request=lora_request,"],
    "vllm.v1.engine.core:EngineCore": [
        *("get_scheduler_cls()", "vllm_config=vllm_config,", "self.model_executor", "self.scheduler.add_request("),
    ],
    "vllm.v1.worker.gpu_worker:Worker": [
        *("def reload_weights(", "def start_weight_update(", "def update_weights(", "def finish_weight_update("),
        *("def save_sharded_state(", "def save_tensorized_model(", "def get_model("),
    ],
    "vllm.v1.core.sched.scheduler:Scheduler": [
        *("self.requests", "def add_request(self, request", "def finish_requests(", "def get_num_unfinished_requests("),
        *("self.kv_cache_manager", "num_scheduled_tokens", "if request is None or request.is_finished():"),
        *("def pause_state(", "def reset_prefix_cache(", "def update_from_output(", "def get_request_counts("),
    ],
    "vllm.v1.core.sched.interface:PauseState": ["UNPAUSED"],
    "vllm.v1.engine:EngineCoreOutput": ["request_id", "new_token_ids", "finish_reason"],
    "vllm.v1.engine:EngineCoreOutputs": ["outputs"],
    "vllm.v1.request:Request": ["self.client_index", "self.lora_request", "def get_finished_reason"],
    "vllm.v1.request:RequestStatus": ["FINISHED_ERROR"],
    "vllm.config.vllm:VllmConfig": ["additional_config", "lora_config"],
    "vllm.config.lora:LoRAConfig": ["target_modules", "max_cpu_loras", "fully_sharded_loras"],
    "vllm.lora.request:LoRARequest": ["lora_name", "lora_int_id", "lora_path", "load_inplace"],
    "vllm.model_executor.layers.linear:UnquantizedLinearMethod": ["dispatch_cpu_unquantized_gemm(layer, remove_weight"],
    "vllm.model_executor.layers.linear:ColumnParallelLinear": ["skip_bias_add", "self.tp_rank", "output_sizes"],
    "vllm.model_executor.layers.linear:RowParallelLinear": ["self.input_is_parallel", "self.input_size_per_partition"],
    "vllm.model_executor.layers.linear:QKVParallelLinear": [
        *("self.total_num_heads", "self.total_num_kv_heads", "self.head_size", "self.num_kv_head_replicas"),
    ],
    "vllm.model_executor.models.utils:WeightsMapper": [],
}
"""``module:Class`` or ``module:Class.method`` to what its source has to hold."""


def source_in(root: Path, target: str) -> str | None:
    """Source of ``module:a.b`` below `root`, the folder that holds `vllm`; None if it is not there."""
    module, _, path = target.partition(":")
    file = root.joinpath(*module.split("."))
    file = file / "__init__.py" if file.is_dir() else file.with_suffix(".py")
    if not file.exists():
        return None
    text = file.read_text(encoding="utf-8")
    body: list[ast.stmt] = ast.parse(text).body
    found: ast.stmt | None = None
    for name in path.split("."):
        found = next((node for node in _flat(body) if name in _names(node)), None)
        if found is None:
            return None
        body = getattr(found, "body", [])
    return ast.get_source_segment(text, found) if found is not None else None


def _flat(body: list[ast.stmt]) -> list[ast.stmt]:
    """Statements, those under a module's `if` and `try` included."""
    flat: list[ast.stmt] = []
    for node in body:
        flat.append(node)
        if isinstance(node, ast.If | ast.Try):
            flat += _flat([*node.body, *node.orelse])
    return flat


def _names(node: ast.stmt) -> set[str]:
    if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
        return {node.name}
    if isinstance(node, ast.Assign):
        return {target.id for target in node.targets if isinstance(target, ast.Name)}
    if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
        return {node.target.id}
    if isinstance(node, ast.ImportFrom | ast.Import):
        return {alias.asname or alias.name for alias in node.names}
    return set()
