"""Names that vulture takes for unused, by who uses them. Read by ``nox -s dead-code``; never imported."""

# Called or read by torch, by name.
_.backward
_.donated_buffer
_.extra_repr
_.setup_context
unused  # gradients of an operator's outputs that have none

# Called by Python: attributes of a module, the protocol of with.
__getattr__
exc_info

# Called by click, by name.
_.format_commands
_.format_epilog
_.get_params
_.parse_args
_.shell_complete

# Called by PEFT and transformers, by name.
_._create_and_replace
_._add_targets_to_tie
_._enable_peft_forward_hooks
_._prepare_model
_.from_json_file
_.adapter_layer_names
_.get_delta_weight
_.on_log
_.on_pre_optimizer_step
_.on_save
_.on_step_begin
_.on_step_end
_.on_train_begin
_.on_train_end
_.other_param_names
_.parameter_name
_.peft_type
_.supports_lora_conversion
_.target_module_mapping
_.tuner_layer_cls
_.unload_and_optionally_merge_module
tied_weight_keys

# Called by transformers while a decoder is traced: the interface of its cache.
_.get_seq_length
_.is_initialized

# Called by vLLM, by name.
_.cpu_linear
_.lora_b
_.persistent
_.resolve_lora

# Called or read by TRL, by name.
_._llm_weights_sleeping
_.init_communicator
_.sync_weights
tags

# Attributes that other libraries read: ONNX Runtime's sessions, transformers' tokenizers.
_.intra_op_num_threads
_.log_severity_level
_.padding_side

# Held so that what they own lives as long as the holder.
_._adapter
_._tensor

# Read through dataclasses.fields, asdict or vars: options, reports, tables, plots.
_.ensure_weight_tying
_.gradient_orthogonal
_.gradient_parallel
_.gradient_parallel_kept
_.opset
_.parallel_weight
_.rms_spread
_.same_argmax
_.trainable_token_indices

# For the reader: every change of vLLM has to say when it can go; tests read it.
_.remove_when

# For users: no other part of the repository needs them.
_.disabled
_.from_lora
_.generate_text
