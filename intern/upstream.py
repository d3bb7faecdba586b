"""What this project uses of other libraries without a promise from them, and the state they leave in the process.

The table is longer than a module here usually is: one row per private or undocumented name. tests/test_upstream.py compares every row
with the installed libraries, and fails for a private name in the source that has no row.
"""

import logging
import sys
import warnings
from dataclasses import dataclass


@dataclass(frozen=True)
class Upstream:
    """A name of another library that it may change without notice.

    Attributes:
        name: "module:attribute"; the module alone if the import path itself is undocumented.
        used_in: our places, "module:function" or "module:Class.method".
        relies_on: what must hold.
        if_changed: what would happen, and whether anybody would notice ("silent" or "loud").
        signature: its parameters, as in "(self, inputs, *args)"; "..." at the end allows more of them.
        source: texts that its source code must contain in this order, as `ast.unparse` writes it.
        value: what a constant must be.
    """

    name: str
    used_in: tuple[str, ...]
    relies_on: str
    if_changed: str
    signature: str | None = None
    source: tuple[str, ...] = ()
    value: str | None = None


_TRAINER = "transformers.trainer:Trainer"
_SFT = "trl.trainer.sft_trainer:SFTTrainer"
_LOGPROB = "trl.kernels.chunked_logprob"
_OURS = "intern.training.trainer:InternTrainer"
_LORA = "peft.tuners.lora"

TABLE = (
    # --- transformers: the trainer
    Upstream(
        f"{_TRAINER}._inner_training_loop",
        (f"{_OURS}._inner_training_loop",),
        "train() calls it once, after it has put Liger's layers into the model",
        "silent: norms are not fused, bitsandbytes' process-wide lists are not emptied",
        "(self, batch_size, args, resume_from_checkpoint, trial, ignore_keys_for_eval)",
    ),
    Upstream(
        f"{_TRAINER}.train",
        (f"{_OURS}._inner_training_loop",),
        "Liger's layers are applied before the inner loop starts",
        "silent: Liger's norms replace the fused ones",
        source=("apply_liger_kernel(self.model, self.args.liger_kernel_config)", "self._inner_training_loop"),
    ),
    Upstream(
        f"{_TRAINER}.set_initial_training_values",
        (f"{_OURS}.set_initial_training_values",),
        "returns seven values: the number of epochs first, max_steps last",
        "silent: min_steps is ignored, or a run trains for the wrong number of steps",
        "(self, args, dataloader)",
        (
            "return (num_train_epochs, num_update_steps_per_epoch, num_examples, num_train_samples, total_train_batch_size, "
            "steps_in_epoch, max_steps)",
        ),
    ),
    Upstream(
        f"{_TRAINER}._init_training_state",
        (f"{_OURS}._init_training_state",),
        "returns (epochs trained, batches trained in this epoch) after it has loaded the state of the checkpoint",
        "silent: a run resumed from the checkpoint of its last step takes one step more",
        "(self, max_steps, num_update_steps_per_epoch, num_train_epochs, resume_from_checkpoint, trial)",
        ("TrainerState.load_from_json(", "return (epochs_trained, steps_trained_in_current_epoch)"),
    ),
    Upstream(
        f"{_TRAINER}._track_num_input_tokens",
        (f"{_OURS}._track_num_input_tokens",),
        "is called with each batch and only counts its tokens",
        "silent: every step waits for the GPU",
        "(self, inputs)",
    ),
    Upstream(
        f"{_TRAINER}._save",
        (f"{_OURS}._save",),
        "writes the files of a checkpoint that are about the model, and the pickled arguments",
        "silent: checkpoints hold values from the environment in training_args.bin",
        "(self, output_dir, state_dict)",
        ("torch.save(self.args, os.path.join(output_dir, TRAINING_ARGS_NAME))",),
    ),
    Upstream(
        f"{_TRAINER}._maybe_log_save_evaluate",
        (f"{_OURS}._maybe_log_save_evaluate",),
        "is called after every optimizer step, before anything is logged or saved; save_strategy=best lets an evaluation cancel a save",
        "silent: token counts stay at 0 and tensors accumulate; with save_strategy=best an interruption writes no checkpoint",
        "(self, tr_loss, grad_norm, model, trial, epoch, ignore_keys_for_eval, start_time, learning_rate)",
        ("self._globalstep_last_logged = self.state.global_step", "self.control.should_save = is_new_best_metric"),
    ),
    Upstream(
        f"{_TRAINER}.get_batch_samples",
        (f"{_OURS}.get_batch_samples",),
        "returns the batches of one optimizer step and their number of labelled tokens",
        "loud: the first step fails",
        "(self, epoch_iterator, num_batches, device)",
        ("return (batch_samples, num_items_in_batch)",),
    ),
    Upstream(
        f"{_TRAINER}.floating_point_ops",
        (f"{_OURS}.floating_point_ops",),
        "is called for every batch and serves only a figure that this project does not use",
        "silent: every batch counts all parameters again",
        "(self, inputs)",
    ),
    Upstream(
        f"{_TRAINER}._run_epoch",
        (f"{_OURS}.training_step",),
        "calls the methods that are overridden here, in this order",
        "silent: an override that nothing calls has no effect",
        source=(
            "self.get_batch_samples(",
            "self.training_step(model, inputs, num_items_in_batch)",
            "self.floating_point_ops(inputs)",
            "self._track_num_input_tokens(inputs)",
            "self._maybe_log_save_evaluate(",
        ),
    ),
    Upstream(
        f"{_TRAINER}._tr_loss",
        (
            "intern.training.checkpoint_state:LoggingWindow.loss_sum",
            "intern.training.checkpoint_state:LoggingWindow.on_train_begin",
        ),
        "holds the sum of the losses since the last log line, as a tensor, from before on_train_begin on",
        "silent: the sum is not stored, so the first log line after a resume is wrong",
        source=("self._tr_loss = torch.tensor(0.0, device=args.device)",),
    ),
    Upstream(
        f"{_TRAINER}._globalstep_last_logged",
        (
            "intern.training.checkpoint_state:LoggingWindow.last_logged",
            "intern.training.checkpoint_state:LoggingWindow.on_train_begin",
        ),
        "is the step of the last log line",
        "silent: the first loss after a resume is divided by the wrong number of steps",
        source=("self._globalstep_last_logged = self.state.global_step",),
    ),
    Upstream(
        "transformers.training_args:TrainingArguments._n_gpu",
        ("intern.training.arguments:build_training_args",),
        "is what n_gpu returns",
        "silent: on a machine with several GPUs nn.DataParallel wraps the model",
        source=("return self._n_gpu",),
    ),
    Upstream(
        f"{_TRAINER}.create_accelerator_and_postprocess",
        (f"{_OURS}.__init__",),
        "reads accelerator_config.non_blocking when the trainer is built",
        "silent: batches are copied to the GPU while it waits",
        source=("non_blocking = accelerator_config.pop('non_blocking')",),
    ),
    Upstream(
        f"{_TRAINER}._save_checkpoint",
        (f"{_OURS}._save_checkpoint", "intern.inspection.resume_check:diff_runs"),
        "has written all files when it returns, in checkpoint-STEP of its output folder, and removes no others without save_total_limit",
        "silent: a manifest lacks files, or older checkpoints are removed before a new one has its manifest",
        "(self, model, trial)",
        (
            "f'{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}'",
            "self.save_model(",
            "self._save_optimizer_and_scheduler(",
            "self._save_rng_state(",
            "self.state.save_to_json(",
            "rotate_checkpoints(output_dir=run_dir, save_total_limit=self.args.save_total_limit",
        ),
    ),
    Upstream(
        "transformers.trainer_utils:rotate_checkpoints",
        (f"{_OURS}._save_checkpoint",),
        "removes all but the newest checkpoints and the best one",
        "loud",
        "(output_dir, save_total_limit, best_model_checkpoint, use_mtime, ...)",
    ),
    Upstream(
        f"{_TRAINER}._load_best_model",
        (f"{_OURS}._load_best_model",),
        "loads the adapter of state.best_model_checkpoint at the end of training",
        "silent: a best checkpoint that was damaged meanwhile is loaded",
        "(self)",
        ("self.state.best_model_checkpoint",),
    ),
    Upstream(
        f"{_TRAINER}._finalize_training",
        (f"{_OURS}.__init__", "intern.training.summary:summarize"),
        "removes the last checkpoint only if save_total_limit is 1, and leaves the sum of the losses since the last log line as it was",
        "silent: an interrupted run loses the checkpoint that it has just written, or the mean loss of a run without log lines is wrong",
        source=("self._total_loss_scalar += self._tr_loss.item()", "self.args.save_total_limit == 1"),
    ),
    Upstream(
        f"{_TRAINER}.log",
        ("intern.training.history:History.on_log", "intern.training.summary:summarize"),
        "appends the entry to state.log_history before it calls on_log",
        "loud at the first entry; silent if the order changed: a resumed run has another history",
        "(self, logs, start_time)",
        ("self.state.log_history.append(output)", "self.callback_handler.on_log("),
    ),
    *(
        Upstream(
            f"transformers.trainer:{constant}",
            ("intern.inspection.resume_check:diff_runs",),
            f"is {file!r}",
            "silent: intern.verify compares fewer parts of a checkpoint",
            value=file,
        )
        for constant, file in (
            ("OPTIMIZER_NAME", "optimizer.pt"),
            ("SCHEDULER_NAME", "scheduler.pt"),
            ("SCALER_NAME", "scaler.pt"),
            ("TRAINER_STATE_NAME", "trainer_state.json"),
        )
    ),
    Upstream(
        f"{_TRAINER}._save_rng_state",
        ("intern.inspection.resume_check:diff_runs",),
        "writes rng_state.pth",
        "silent: intern.verify does not compare the random states",
        source=("'rng_state.pth'",),
    ),
    Upstream(
        "transformers.trainer_callback:DefaultFlowCallback.on_step_end",
        (
            "intern.training.steps:OptimizerSteps.on_step_end",
            "intern.training.steps:OptimizerSteps.on_train_begin",
        ),
        "ends training when global_step reaches max_steps, which callbacks may change",
        "silent: skipped fp16 steps are not made up for",
        source=("state.global_step >= state.max_steps",),
    ),
    Upstream(
        "transformers.trainer_callback:CallbackHandler.call_event",
        (
            "intern.training.steps:OptimizerSteps.on_step_end",
            "intern.memory.callback:FitMemory.on_train_begin",
        ),
        "passes the optimizer and the data loader to every callback, in the order in which callbacks were added",
        "loud; silent if the order changed: fp16 runs stop early",
        source=(
            "for callback in self.callbacks:",
            "optimizer=self.optimizer",
            "train_dataloader=self.train_dataloader",
        ),
    ),
    Upstream(
        "transformers.trainer_callback:ExportableState.state",
        (
            "intern.training.checkpoint_state:CheckpointedCallback.state",
            "intern.training.checkpoint_state:CheckpointedCallback.state",
        ),
        "a checkpoint stores {'args', 'attributes'} of each callback under its class name in state.stateful_callbacks",
        "silent: a resumed run forgets its skipped steps",
        "(self)",
    ),
    Upstream(
        "transformers.trainer_callback:EarlyStoppingCallback.on_evaluate",
        ("intern.training.steps:ResumableEarlyStopping.on_evaluate",),
        "counts evaluations without improvement in early_stopping_patience_counter",
        "loud",
        "(self, args, state, control, metrics, **kwargs)",
        ("self.early_stopping_patience_counter >= self.early_stopping_patience",),
    ),
    Upstream(
        "transformers.trainer_pt_utils:safe_globals",
        ("intern.inspection.resume_check:diff_runs",),
        "allows the types that a checkpoint's random states have",
        "loud",
        "()",
    ),
    # --- transformers: models, attention, tokenizers
    Upstream(
        "transformers.modeling_layers:GradientCheckpointingLayer",
        (
            "intern.kernels.recompute:_checkpoint_with",
            "intern.kernels.cuda_graphs:_run_layers",
            "intern.kernels.decoder_layers:decoder_layers",
        ),
        "is the base class of every decoder layer; a checkpointed one calls its attribute _gradient_checkpointing_func",
        "silent: no layer is found or no input is offloaded, and memory runs out",
        source=("if self.gradient_checkpointing and self.training", "return self._gradient_checkpointing_func("),
    ),
    Upstream(
        "transformers.models.llama.modeling_llama:LlamaDecoderLayer",
        (
            "intern.kernels.decoder_layers:_PARTS",
            "intern.kernels.lora_linear:_SAME_INPUT",
            "intern.kernels.rms_norm:_NORMS",
        ),
        "names its parts self_attn, mlp, input_layernorm and post_attention_layernorm, as most families do",
        "silent: the layers take the slower path",
        source=tuple(f"self.{part} = " for part in ("self_attn", "mlp", "input_layernorm", "post_attention_layernorm")),
    ),
    Upstream(
        "transformers.models.llama.modeling_llama:LlamaAttention",
        ("intern.kernels.lora_linear:_SAME_INPUT",),
        "calls q_proj, k_proj and v_proj on the same tensor, in this order",
        "silent: the projections are not fused",
        source=tuple(f"self.{name} = " for name in ("q_proj", "k_proj", "v_proj", "o_proj")),
    ),
    Upstream(
        "transformers.models.llama.modeling_llama:LlamaRMSNorm",
        ("intern.kernels.rms_norm:_is_frozen_rms_norm",),
        "has weight and variance_epsilon",
        "silent: norms are not fused",
        source=("self.variance_epsilon = eps",),
    ),
    Upstream(
        "transformers.integrations.sdpa_attention:sdpa_attention_forward",
        ("intern.kernels.isolated_attention:isolated_attention",),
        "takes these parameters and returns (output, None)",
        "loud",
        "(module, query, key, value, attention_mask, dropout, scaling, ...)",
    ),
    Upstream(
        "transformers.integrations.sdpa_attention:repeat_kv",
        ("intern.kernels.isolated_attention:isolated_attention",),
        "repeats key and value heads: (batch, heads, tokens, size), n -> (batch, heads * n, tokens, size)",
        "loud",
        "(hidden_states, n_rep)",
    ),
    Upstream(
        "transformers.masking_utils:sdpa_mask",
        ("intern.kernels.isolated_attention:isolated_mask",),
        "takes these keywords",
        "loud",
        "(batch_size, q_length, kv_length, q_offset, kv_offset, mask_function, attention_mask, local_size, allow_is_causal_skip, ...)",
    ),
    Upstream(
        "transformers.masking_utils:create_causal_mask",
        ("intern.kernels.isolated_attention:isolated_mask", "intern.kernels.isolated_attention:no_mask"),
        "forbids the causal shortcut for packed rows, and makes no mask for an attention that has no mask function",
        "silent: packed rows attend to each other, or every batch makes a mask",
        source=(
            "mask_interface = ALL_MASK_ATTENTION_FUNCTIONS[config._attn_implementation]",
            "allow_is_causal_skip = False",
        ),
    ),
    Upstream(
        "transformers.masking_utils:find_packed_sequence_indices",
        ("intern.model.attention:_probing",),
        "is looked up in its module by everything that makes a mask for packed rows",
        "silent: no attention is found to make masks, so packing is refused for models that need them",
        "(position_ids)",
    ),
    *(
        Upstream(
            f"transformers:{interface}._global_mapping",
            ("intern.model.attention:_probing",),
            "holds the registered functions by their names",
            "loud",
        )
        for interface in ("AttentionInterface", "AttentionMaskInterface")
    ),
    Upstream(
        "transformers.configuration_utils:PreTrainedConfig._attn_implementation",
        ("intern.kernels.isolated_attention:no_mask", "intern.training.golden_loss:_stored_file"),
        "decides for each forward pass which attention and which mask are used",
        "silent: every packed batch waits for the GPU to find that it needs no mask",
    ),
    Upstream(
        "transformers.configuration_utils:PreTrainedConfig",
        ("intern.model.quantized_cache:_read", "intern.model.quantized_cache:identity"),
        "_name_or_path names the base in an adapter's configuration; _commit_hash is the revision on the hub",
        "silent: an adapter names the cache's folder as its base; bases of the hub are not cached",
        source=("_commit_hash", "_name_or_path"),
    ),
    Upstream(
        "transformers.quantizers:HfQuantizer.preprocess_model",
        ("intern.model.quant:Quantization.converted",),
        "replaces the layers of a model without weights, as loading does; AutoHfQuantizer.from_config makes the quantizer",
        "loud; silent if loading replaced other layers: wrong estimates of memory",
        source=("_process_model_before_weight_loading",),
    ),
    Upstream(
        "transformers.pytorch_utils:Conv1D",
        ("intern.training.model_rules:target_modules_are_in_the_model",),
        "is the linear layer of GPT-2's family",
        "loud",
    ),
    Upstream(
        "transformers.models.auto.tokenization_auto:tokenizer_class_from_name",
        ("intern.runs.adapter:_check_tokenizer",),
        "returns a class that is installed, or None; imports nothing that a run directory names",
        "loud",
        "(class_name)",
    ),
    # --- TRL
    Upstream(
        f"{_SFT}.compute_loss",
        (f"{_OURS}.compute_loss", f"{_OURS}._plain_loss"),
        "the branch for loss_type='nll' is what _plain_loss computes: the same loss, the same two metrics",
        "silent: a new term of the loss is missing from training (a test compares the two)",
        "(self, model, inputs, return_outputs, num_items_in_batch)",
        (
            "outputs = model(**inputs, fused_lm_head=True)",
            "loss = per_token_loss.sum() / torch.as_tensor(num_tokens).clamp(min=1)",
            "self._metrics[mode]['entropy'].append(",
            "self._metrics[mode]['mean_token_accuracy'].append(",
        ),
    ),
    Upstream(
        f"{_SFT}._metrics",
        (f"{_OURS}._read_metrics", f"{_OURS}.forget_metrics", "intern.training.checkpoint_state:LoggingWindow.figures"),
        "collects the values that the next log line averages: {'train': {name: [values]}}",
        "loud",
        source=("self._metrics = {'train': defaultdict(list), 'eval': defaultdict(list)}",),
    ),
    Upstream(
        f"{_SFT}.__init__",
        (f"{_OURS}.__init__", "intern.data.packing:keeps_rows_apart", "intern.data.packing:pack"),
        "refuses max_length with padding_free rows, casts adapters to bfloat16, and decides packing as intern.data.packing repeats it",
        "silent: the preview shows other packs than training uses (a test compares them)",
        source=(
            "param.data = param.data.to(torch.bfloat16)",
            "self.padding_free = args.padding_free or (args.packing and args.packing_strategy in {'bfd', 'bfd_split'})",
            "if self.padding_free and (not args.packing) and (args.max_length is not None)",
            "self.aux_loss_enabled = ",
        ),
    ),
    Upstream(
        "trl.trainer.sft_trainer:DataCollatorForLanguageModeling",
        ("intern.data.packing:build_collator",),
        "a packed batch has cu_seq_lens_q and max_length_q",
        "silent: packed rows attend to each other",
        "(pad_token_id, padding_free, return_position_ids, pad_to_multiple_of, return_tensors)",
        ("output['max_length_q'] = ",),
    ),
    Upstream(
        "trl:pack_dataset",
        ("intern.data.packing:pack",),
        "takes (rows, length, strategy, arguments of datasets' map)",
        "loud",
        "(dataset, seq_length, strategy, map_kwargs)",
    ),
    Upstream(
        f"{_LOGPROB}:_BLOCK_SIZE",
        ("intern.kernels.lm_head:LogProbs.forward",),
        "is the number of logits that a program of the kernels reads",
        "loud",
    ),
    Upstream(
        f"{_LOGPROB}:_use_triton",
        ("intern.kernels.lm_head:_kernel",),
        "says whether the kernels are Triton's on this device",
        "loud",
        "(device)",
    ),
    Upstream(
        f"{_LOGPROB}:_addmm_fp32",
        ("intern.kernels.lm_head:LogProbs.forward",),
        "acc += a @ b in float32",
        "loud",
        "(acc, a, b)",
    ),
    *(
        Upstream(
            f"{_LOGPROB}:_forward_{form}",
            ("intern.kernels.lm_head:LogProbs.forward", "intern.kernels.lm_head:_kernel"),
            "folds the logits of some positions into running sums; the first 12 arguments are passed by position",
            "loud if an argument is added, silent if two are swapped",
            f"({logits}_stride, {targets}, {sums}, vocab_start, n_cols, logit_scale, softcap, inv_t, HAS_SOFTCAP, "
            "HAS_ENTROPY, HAS_LOG_SUM_SQ_PROBS, HAS_MEAN_LOGITS, HAS_IS_TOP1, BLOCK_SIZE)",
        )
        for form, logits, targets, sums in (
            (
                "tile",
                "tile, tile",
                "targets",
                "running_max, sum_exp, x_sum_exp, sq_sum_exp, z_sum, max_before_target, target_logit",
            ),
            (
                "kernel",
                "mm_ptr, mm",
                "targets_ptr",
                "max_ptr, sum_exp_ptr, x_sum_exp_ptr, sq_sum_exp_ptr, z_sum_ptr, max_before_target_ptr, target_logit_ptr",
            ),
        )
    ),
    *(
        Upstream(
            f"{_LOGPROB}:_backward_{form}",
            ("intern.kernels.lm_head:LogProbs.forward", "intern.kernels.lm_head:_kernel"),
            "turns the logits of some positions into their gradients in place; the first 9 arguments are passed by position",
            "loud if an argument is added, silent if two are swapped",
            f"({logits}_stride, {others}, vocab_start, n_cols, logit_scale, softcap, inv_t, HAS_SOFTCAP, "
            "HAS_LOGPROB_GRAD, HAS_ENTROPY_GRAD, BLOCK_SIZE)",
        )
        for form, logits, others in (
            ("tile", "tile, tile", "targets, log_z, entropy, grad_logprobs, grad_entropy"),
            ("kernel", "mm_ptr, mm", "targets_ptr, log_z_ptr, entropy_ptr, grad_logprobs_ptr, grad_entropy_ptr"),
        )
    ),
    Upstream(
        "trl.trainer.utils:FusedCausalLMOutput",
        ("intern.kernels.lm_head:score_positions",),
        "has these fields, of which compute_loss reads the last four",
        "loud",
        source=tuple(
            f"{field}: torch.Tensor | None" for field in ("loss", "log_probs", "entropy", "is_top1", "label_mask")
        ),
    ),
    Upstream(
        "trl.trainer.utils:add_fused_lm_head",
        ("intern.kernels.lm_head:score_positions", "intern.kernels.lm_head:_SCALING_KEYS"),
        "scales logits by these keys of a model's configuration and by no other",
        "silent: a model with another scaling key gets wrong logits",
        "(model, temperature, cast_lm_head_to_fp32, outputs)",
        tuple(f"'{key}'" for key in ("logit_scale", "output_multiplier", "lm_head_multiplier", "logits_scaling")),
    ),
    # --- PEFT
    Upstream(
        f"{_LORA}.bnb:Linear4bit.forward",
        ("intern.kernels.lora_linear:_weight", "intern.kernels.lora_linear:_is_plain"),
        "result + lora_B(lora_A(dropout(x))) * scaling, unless the adapter is merged, disabled or a variant",
        "silent: the fused product computes something else (a test compares the two)",
        "(self, x, *args, **kwargs)",
        (
            "if self.disable_adapters:",
            "elif self.merged:",
            "dropout = self.lora_dropout[active_adapter]",
            "scaling = self.scaling[active_adapter]",
            "if active_adapter not in self.lora_variant:",
        ),
    ),
    Upstream(
        f"{_LORA}:LoraLayer",
        (
            "intern.kernels.lora_linear:_weight",
            "intern.kernels.lora_linear:_is_plain",
            "intern.inspection.doctor_pieces:DoctorPieces.peak",
        ),
        "keeps lora_A, lora_B, r, scaling, lora_dropout and lora_variant by the adapter's name",
        "loud",
        source=tuple(
            f"self.{name}"
            for name in ("r = ", "scaling = ", "lora_dropout = ", "lora_A = ", "lora_B = ", "lora_variant")
        ),
    ),
    Upstream(
        "peft.tuners.tuners_utils:check_target_module_exists",
        ("intern.training.model_rules:something_is_left_to_train",),
        "says whether a configuration adapts the module of this name",
        "loud",
        "(config, key)",
    ),
    Upstream(
        "peft.utils.constants:TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING",
        ("intern.training.model_rules:target_modules_are_in_the_model",),
        "has the model types that need no lora.target_modules",
        "loud",
    ),
    Upstream(
        f"{_LORA}.layer:Linear.merge",
        ("intern.exporting.merge:_merged",),
        "adds an adapter of any variant to base_layer's weight and bias, and needs of the layer only what quantized layers have too",
        "loud, or silent: merged models differ from the evaluated ones (every export is compared with its run)",
        "(self, safe_merge, adapter_names)",
        (
            "base_layer = self.get_base_layer()",
            "self.lora_variant[active_adapter].merge_safe",
            "self.merged_adapters.append",
        ),
    ),
    Upstream(
        "peft.tuners.trainable_tokens:TrainableTokensLayer.merge",
        ("intern.exporting.merge:_merged",),
        "puts the trained rows into base_layer's weight",
        "loud",
        "(self, safe_merge, adapter_names)",
        ("self.base_layer.weight.data = merged",),
    ),
    Upstream(
        "peft.utils.integrations:dequantize_module_weight",
        ("intern.exporting.merge:_plain_layer", "intern.exporting.merge:_plain"),
        "returns the weights of bitsandbytes' layers dequantized, and all others as they are",
        "loud",
        "(module)",
    ),
    Upstream(
        "peft.utils.other:AuxiliaryTrainingWrapper",
        ("intern.exporting.merge:_merged",),
        "wraps modules that are saved whole (ModulesToSaveWrapper) and embeddings with trained rows (TrainableTokensWrapper)",
        "silent: their weights are exported under other names, which the consumer reports as missing",
    ),
    Upstream(
        "transformers.core_model_loading:revert_weight_conversion",
        ("intern.exporting.merge:write_merged",),
        "gives weights the names and the form of the model's published files, one weight at a time",
        "loud",
        "(model, state_dict)",
    ),
    # --- bitsandbytes
    Upstream(
        "bitsandbytes.backends.cuda.ops:_dequantize_4bit_impl",
        ("intern.kernels.quantized_weight:_dequantized",),
        "writes the dequantized weight to `out`",
        "loud, on a GPU only",
        "(A, absmax, blocksize, quant_type, dtype, out)",
    ),
    Upstream(
        "bitsandbytes.backends.cuda.ops:_dequantize_blockwise_impl",
        ("intern.kernels.quantized_weight:_dequantized",),
        "writes the dequantized scales to `out`",
        "loud, on a GPU only",
        "(A, absmax, code, blocksize, dtype, out)",
    ),
    Upstream(
        "bitsandbytes.functional:QuantState",
        ("intern.kernels.quantized_weight:_dequantized", "intern.model.quant:FourBit.finish"),
        "has these fields; `nested` says that absmax is quantized too, with `state2` and `offset`",
        "loud, on a GPU only; silent for dtype: weights are dequantized to another dtype",
        "(absmax, shape, code, blocksize, quant_type, dtype, offset, state2)",
        ("self.nested = state2 is not None",),
    ),
    Upstream(
        "bitsandbytes.nn.modules:Linear4bit",
        ("intern.model.quant:FourBit.finish",),
        "compute_type_is_set keeps compute_dtype; support_avx512bf16_for_cpu repacks the weight at the first evaluation",
        "silent: another compute dtype, or wrong gradients on CPUs with AVX512-BF16",
        source=("self.compute_dtype", "and self.support_avx512bf16_for_cpu", "if not self.compute_type_is_set:"),
    ),
    Upstream(
        "bitsandbytes.functional:GlobalPageManager.get_instance",
        ("intern.upstream:forget_optimizers",),
        "is the process-wide list of paged optimizer states, in paged_tensors",
        "loud",
        "()",
    ),
    Upstream(
        "bitsandbytes.optim:GlobalOptimManager.initialize",
        ("intern.upstream:forget_optimizers",),
        "empties the process-wide list of embeddings",
        "loud",
        "(self)",
    ),
    # --- accelerate
    Upstream(
        "accelerate.data_loader:SeedableRandomSampler",
        ("intern.memory.batches:coming_batches",),
        "draws the order of an epoch from its seed and its attribute epoch",
        "silent: the memory plan takes the longest rows instead of the batches that come",
        source=("seed = self.epoch + self.initial_seed", "self.epoch = epoch"),
    ),
    Upstream(
        "accelerate.data_loader:BatchSamplerShard",
        ("intern.memory.batches:coming_batches",),
        "keeps the sampler of all processes in batch_sampler",
        "silent: the memory plan takes the longest rows instead of the batches that come",
        source=("self.batch_sampler = batch_sampler",),
    ),
    Upstream(
        "accelerate.optimizer:AcceleratedOptimizer",
        (
            "intern.training.steps:OptimizerSteps.on_step_end",
            "intern.training.history:History.on_log",
            "intern.memory.probe:Probe.__init__",
        ),
        "has optimizer, scaler (None without fp16) and step_was_skipped",
        "silent: skipped fp16 steps count as steps, no loss scale is logged",
        source=("self.optimizer = optimizer", "self.scaler = scaler", "def step_was_skipped(self)"),
    ),
    Upstream(
        "accelerate.data_loader:BatchSamplerShard._iter_with_no_split",
        ("intern.training.shared_batches:share_batches",),
        "passes on every batch of a whole round of all processes, of any size if batch_size is None",
        "silent: with several processes rows are lost or trained twice (a test compares with one process)",
        "(self)",
        ("self.batch_size is None or len(batch) == self.batch_size", "yield batch_to_yield"),
    ),
    Upstream(
        f"{_TRAINER}.evaluation_loop",
        (f"{_OURS}.evaluation_loop",),
        "collects the losses of all processes with gather_function, each repeated for the rows of a full batch",
        "silent: with several processes the golden loss counts some rows twice (a test compares with one process)",
        "(self, dataloader, description, ...)",
        (
            "losses = self.gather_function(losses.repeat(batch_size))",
            "self.gather_function = self.accelerator.gather_for_metrics",
        ),
    ),
    # --- torch
    Upstream(
        "torch.distributed.launcher.api",
        ("intern.training.launch:start_processes",),
        "elastic_launch(LaunchConfig(...), program)(*arguments) is what torchrun does; raises ChildFailedError or SignalException",
        "loud: num_processes above 1 fails at once (torchrun itself still works)",
    ),
    Upstream(
        "torch:ops.aten._efficient_attention_forward",
        ("intern.kernels.isolated_attention:_memory_efficient",),
        "takes packed rows by their boundaries; custom_mask_type 1 is causal from the top left; 11 arguments go by position",
        "loud if an argument is added, silent if two are swapped",
        "(query, key, value, bias, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p, custom_mask_type, "
        "compute_log_sumexp, scale, ...)",
    ),
    Upstream(
        "torch.nn.attention.varlen:varlen_attn",
        ("intern.kernels.isolated_attention:_flash", "intern.kernels.isolated_attention:_gqa"),
        "takes (query, key, value, boundaries, boundaries, longest, longest), all of shape (tokens, heads, size)",
        "loud, on a GPU only",
        "(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, ...)",
    ),
    Upstream(
        "torch.utils.checkpoint:checkpoint",
        ("intern.kernels.recompute:_checkpoint",),
        "with use_reentrant=True it saves the tensors among its arguments through autograd, where hooks see them",
        "silent: inputs stay in GPU memory",
        "(function, *args, use_reentrant, ...)",
    ),
    *(
        Upstream(
            f"torch:{name}",
            (place,),
            "applies one operation to a list of tensors",
            "loud",
        )
        for name, place in (
            ("_foreach_norm", "intern.training.health:_weight_norms"),
            ("_foreach_add_", "intern.kernels.cuda_graphs:_GradientSums.add"),
            ("_foreach_zero_", "intern.kernels.cuda_graphs:_GradientSums.attach"),
        )
    ),
    Upstream(
        "torch:Tensor.grad_fn",
        ("intern.kernels.recompute:_free_unread_sum", "intern.kernels.rms_norm:_forward"),
        "the node of a sum is called AddBackward0 and saves neither its output nor its inputs",
        "silent: if autograd saved a sum's output, gradients would be wrong (tests compare them)",
    ),
    # --- datasets, huggingface_hub
    Upstream(
        "datasets:Dataset._fingerprint",
        ("intern.data.tokenize:tokenize",),
        "names the content of a dataset",
        "loud",
        source=("self._fingerprint: str = ",),
    ),
    Upstream(
        "datasets.data_files:get_data_patterns",
        ("intern.data.sources:_tables",),
        "tells the splits of a folder by the names of its files",
        "loud",
        "(base_path, download_config)",
    ),
    Upstream(
        "datasets.data_files:resolve_pattern",
        ("intern.data.sources:_tables",),
        "the files of a split",
        "loud",
        "(pattern, base_path, allowed_extensions, download_config)",
    ),
    Upstream(
        "huggingface_hub.constants:HF_HUB_OFFLINE",
        (
            "intern.inspection.doctor_pieces:DoctorPieces.online",
            "intern.inspection.doctor_pieces:DoctorPieces.restore_network",
        ),
        "is read at every request",
        "silent: the doctor waits for a hub that does not answer",
    ),
    # --- Hydra
    Upstream(
        "hydra._internal.utils:run_and_report",
        ("intern.cli.command:command", "intern.cli.command:_full_errors"),
        "raises its own errors instead of printing them if HYDRA_FULL_ERROR is 1",
        "loud: mistakes in a command line show a traceback",
        "(func)",
        ("_is_env_set('HYDRA_FULL_ERROR')",),
    ),
    Upstream(
        "hydra.core.hydra_config:HydraConfig",
        ("hydra_plugins.intern_launcher:CommandLauncher.launch",),
        "keeps the configuration in the attribute cfg of its only instance",
        "loud",
        source=("self.cfg",),
    ),
    Upstream(
        "hydra._internal.config_loader_impl:ConfigLoaderImpl.load_sweep_config",
        ("hydra_plugins.intern_launcher:CommandLauncher._job", "hydra_plugins.intern_launcher:_check"),
        "composes the configuration of one job of a sweep",
        "loud",
        "(self, master_config, sweep_overrides)",
    ),
    Upstream(
        "hydra._internal.core_plugins.basic_launcher:BasicLauncher.launch",
        ("hydra_plugins.intern_launcher:CheckedLauncher",),
        "runs all jobs of a grid in one call, one after another in this process",
        "loud",
        "(self, job_overrides, initial_job_idx)",
    ),
    Upstream(
        "hydra._internal.core_plugins.basic_sweeper:BasicSweeper.sweep",
        ("hydra_plugins.intern_launcher:_check",),
        "is the sweeper that knows all jobs before the first one",
        "silent: a sweep's jobs are checked one by one, when each starts",
        "(self, arguments)",
    ),
    Upstream(
        "hydra.core.utils:filter_overrides",
        ("hydra_plugins.intern_launcher:ProcessLauncher._run",),
        "leaves out Hydra's own overrides",
        "loud",
        "(overrides)",
    ),
    Upstream(
        "hydra.core.utils:configure_log",
        ("hydra_plugins.intern_launcher:CommandLauncher.launch",),
        "sets up logging from the configuration",
        "loud",
        "(log_config, verbose_config)",
    ),
    Upstream(
        "hydra.core.utils:JobReturn",
        ("hydra_plugins.intern_launcher:CommandLauncher._result",),
        "has these fields; return_value fails for a job whose status is FAILED",
        "loud",
        "(overrides, cfg, hydra_cfg, working_dir, task_name, status, _return_value)",
    ),
    Upstream(
        "hydra.core.override_parser.overrides_parser:OverridesParser.create",
        ("hydra_plugins.intern_optuna:OptunaSweeper.sweep",),
        "parses overrides and their sweeps",
        "loud",
        "(config_loader)",
    ),
    Upstream(
        "hydra.core.override_parser.types:QuotedString",
        ("intern.cli.arguments:quoted",),
        "quotes a text so that Hydra's grammar reads exactly that text",
        "loud",
        "(text, quote)",
    ),
)


def route_messages() -> None:
    """Send the warnings of transformers and TRL through logging, and so into train.log; silence those for their developers."""
    import datasets
    import transformers

    transformers.utils.logging.disable_default_handler()
    transformers.utils.logging.enable_propagation()
    for module in ("transformers", "trl", "peft"):  # deprecations between these libraries
        warnings.filterwarnings("ignore", category=FutureWarning, module=module)
    warnings.filterwarnings("ignore", message=".*use_liger_kernel.*", category=FutureWarning)
    logging.getLogger("liger_kernel").setLevel(logging.ERROR)  # lists its backends for hardware that is not there
    # Reported for every batch of the last step of a resumed run, although no gathered batch had a remainder to drop.
    logging.getLogger("accelerate.accelerator").setLevel(logging.ERROR)
    # Reported for each layer and step of an int8 base on a CPU, where inputs are float32.
    logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)
    if not sys.stderr.isatty():
        transformers.utils.logging.disable_progress_bar()
        datasets.disable_progress_bars()


def forget_optimizers() -> None:
    """Empty bitsandbytes' process-wide lists after training; otherwise nothing in them is ever freed.

    They hold the states of paged optimizers, which every later one would move to the GPU again, and the embeddings of every model that
    transformers has trained with an 8-bit optimizer: 1 GiB for Llama-3-8B.
    """
    import bitsandbytes as bnb

    bnb.functional.GlobalPageManager.get_instance().paged_tensors.clear()
    bnb.optim.GlobalOptimManager.get_instance().initialize()
