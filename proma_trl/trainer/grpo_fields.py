"""
What becomes of each field of TRL's `GRPOConfig` under PROMA. `PROMAConfig` refuses by these lists, and the table in
`docs/migration.md` is made from them.

They hold the fields of all supported versions of TRL and transformers, so an installed version may lack some. Each
field is in one list.
"""

from dataclasses import MISSING, Field
from typing import Any

_NO_REFERENCE = "there is no reference policy: what keeps updates close to the policy is the method itself"
_NO_CLIPPING = "importance ratios are not clipped, so the value would be ignored"
_OTHER_LOSS = "it belongs to a loss type that is not available"
_NO_BONUS = "an entropy bonus is not a multiple of the sequences' log-probability gradients, so it can't be projected"
_NOT_COMPILED = "compiled layers bypass the hooks that collect sequence gradients"

# Must keep GRPO's default, and why. The reason continues an error message.
REFUSED = {
    "beta": _NO_REFERENCE,
    "sync_ref_model": _NO_REFERENCE,
    "ref_model_mixup_alpha": _NO_REFERENCE,
    "ref_model_sync_steps": _NO_REFERENCE,
    "use_bias_correction_kl": _NO_REFERENCE,
    "epsilon": _NO_CLIPPING,
    "epsilon_high": _NO_CLIPPING,
    "delta": _NO_CLIPPING,
    "sapo_temperature_neg": _OTHER_LOSS,
    "sapo_temperature_pos": _OTHER_LOSS,
    "vespo_k_pos": _OTHER_LOSS,
    "vespo_lambda_pos": _OTHER_LOSS,
    "vespo_k_neg": _OTHER_LOSS,
    "vespo_lambda_neg": _OTHER_LOSS,
    "entropy_coef": _NO_BONUS,
    "use_adaptive_entropy": _NO_BONUS,
    "entropy_coef_min": _NO_BONUS,
    "entropy_coef_max": _NO_BONUS,
    "entropy_coef_delta": _NO_BONUS,
    "entropy_target": _NO_BONUS,
    "torch_compile": _NOT_COMPILED,
    "torch_compile_backend": _NOT_COMPILED,
    "torch_compile_mode": _NOT_COMPILED,
}

LOSS_TYPES = ("grpo", "bnpo", "dr_grpo", "dapo")

# Means over a microbatch's sequences. "dapo" is a sum over those of a generation batch, and "bnpo" a mean
# over a microbatch's tokens, in which it matters which sequences share a microbatch
MEANS_OF_SEQUENCES = ("grpo", "dr_grpo")

# Accepted with some values, or in some setups, only. The text, in Markdown, says which.
PARTLY_REFUSED = {
    "loss_type": "Only " + ", ".join(f"`{name!r}`" for name in LOSS_TYPES) + ": the loss is REINFORCE, and this "
    "says how it is normalized.",
    "router_aux_loss_coef": "Only 0, and `None` where the model's configuration declares no load-balancing loss: it "
    "is not a multiple of the sequences' log-probability gradients, so it can't be projected.",
    "optim": "Not `lomo`, `adalomo` and the `*_layerwise` ones: they consume gradients within the backward pass, "
    "where PROMA accumulates them.",
    "auto_find_batch_size": "Not `True`, which `GRPOConfig` refuses, too.",
    "importance_sampling_level": "Not `'sequence'` with `divergence`, which weighs tokens.",
    "vllm_importance_sampling_mode": "Not with `divergence`, whose ratios are those to the sampler already.",
    "vllm_importance_sampling_clip_min": "Not with `divergence`, where `ratio_cap` bounds the ratios.",
    "vllm_importance_sampling_clip_max": "Not with `divergence`, where `ratio_cap` bounds the ratios.",
    "vllm_importance_sampling_cap": "Not with `divergence`, where `ratio_cap` bounds the ratios.",
    "generation_kwargs": "With vLLM and `divergence`, not `logprobs`: `divergence_top_k` sets it.",
    "use_transformers_continuous_batching": "Not with the top-K divergences: it gives the log-probabilities of "
    "sampled tokens alone.",
    "use_transformers_paged": "As `use_transformers_continuous_batching`.",
    "parallelism_config": "No tensor, context or sequence parallelism, which spread a sequence's gradient over ranks.",
    "accelerator_config": "No `sync_each_batch`, which averages over ranks what they have yet to project.",
    "deepspeed": "ZeRO-1, 2 and 3. No pipeline or tensor parallelism, quantized gradients, ZenFlow or DeepCompile.",
    "fsdp": "FSDP2 only: FSDP version 1 flattens parameters.",
    "fsdp_config": "FSDP2 only: FSDP version 1 flattens parameters.",
}

# Accepted, with more to it than under GRPO. In Markdown.
OTHER_MEANING = {
    "gradient_accumulation_steps": "The projection acts between the microbatches of a step. With 1 there is nothing "
    "to project: the run is REINFORCE, and the trainer warns.",
    "per_device_train_batch_size": "Also how many sequences are projected off together. With `order_by_length`, the "
    "mean over microbatches.",
    "steps_per_generation": "Above `gradient_accumulation_steps`, minibatches are off-policy: the importance ratio is "
    "not clipped, and `divergence` masks tokens.",
    "generation_batch_size": "As `steps_per_generation`.",
    "num_iterations": "Above 1, minibatches are off-policy: the importance ratio is not clipped, and `divergence` "
    "masks tokens.",
    "vllm_importance_sampling_correction": "Its ratios are weights of tokens, in the projection too. With "
    "`divergence` it is switched off, as the ratios are those to the sampler already.",
    "off_policy_mask_threshold": "Masked sequences have no direction in the projection.",
    "mask_truncated_completions": "Masked sequences have no direction in the projection.",
    "top_entropy_quantile": "Masked tokens have no part in the projection.",
    "bf16": "Where it is left unset and training is on a CPU, as it is without a GPU, `False`.",
    "max_grad_norm": "The norm is that of the projected gradient.",
    "seed": "Also that of Intra-PROMA's random numbers, and of the order of microbatches with `order_by_length`.",
}

# As under GRPO
SAME = frozenset(
    """
    model_init_kwargs trust_remote_code disable_dropout cast_lm_head_to_fp32 num_generations num_generations_eval
    max_completion_length ds3_gather_for_generation shuffle_dataset pad_to_multiple_of temperature top_p top_k min_p
    chat_template_kwargs repetition_penalty cache_implementation use_vllm vllm_mode vllm_model_impl
    vllm_enable_sleep_mode vllm_structured_outputs_regex vllm_server_base_url vllm_server_host vllm_server_port
    vllm_server_timeout vllm_group_port vllm_gpu_memory_utilization vllm_max_model_length vllm_tensor_parallel_size
    reward_weights multi_objective_aggregation scale_rewards max_tool_calling_iterations log_completions
    log_multimodal num_completions_to_print log_unique_prompts log_completions_hub_repo
    transformers_continuous_batching_config

    output_dir num_train_epochs max_steps learning_rate lr_scheduler_type lr_scheduler_kwargs warmup_steps optim_args
    weight_decay adam_beta1 adam_beta2 adam_epsilon optim_target_modules average_tokens_across_devices
    label_smoothing_factor fp16 bf16_full_eval fp16_full_eval tf32 activation_checkpointing
    activation_checkpointing_kwargs gradient_checkpointing gradient_checkpointing_kwargs use_liger_kernel
    liger_kernel_config use_cache neftune_noise_alpha torch_empty_cache_steps logging_strategy logging_steps
    logging_first_step log_on_each_node logging_nan_inf_filter include_num_input_tokens_seen log_level
    log_level_replica disable_tqdm report_to run_name project trackio_space_id trackio_bucket_id
    trackio_static_space_id eval_strategy eval_steps eval_delay per_device_eval_batch_size prediction_loss_only
    eval_on_start eval_do_concat_batches eval_use_gather_object eval_accumulation_steps include_for_metrics
    batch_eval_metrics save_only_model save_strategy save_steps save_on_each_node save_total_limit
    enable_jit_checkpoint push_to_hub hub_token hub_private_repo hub_model_id hub_strategy hub_always_push
    hub_revision load_best_model_at_end metric_for_best_model greater_is_better ignore_data_skip
    restore_callback_states_from_checkpoint full_determinism data_seed use_cpu dataloader_drop_last
    dataloader_num_workers dataloader_pin_memory dataloader_persistent_workers dataloader_prefetch_factor
    dataloader_multiprocessing_context dataloader_in_order remove_unused_columns label_names train_sampling_strategy
    length_column_name ddp_find_unused_parameters ddp_bucket_cap_mb ddp_broadcast_buffers ddp_static_graph
    ddp_backend ddp_timeout debug skip_memory_metrics do_train do_eval do_predict resume_from_checkpoint local_rank
    warmup_ratio logging_dir group_by_length
    """.split()
)

KNOWN = SAME | REFUSED.keys() | PARTLY_REFUSED.keys() | OTHER_MEANING.keys()


def default_of(field: Field) -> Any:
    """The default of a configuration's field, made where it is made for each instance."""
    return field.default if field.default_factory is MISSING else field.default_factory()
