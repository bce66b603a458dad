"""What an option of training is called elsewhere, so that its refusal names the right one.

By the original SimCSE, sentence-transformers, LLM2Vec, FlagEmbedding, older transformers, and by
habit. Nothing here is accepted: one name for an option keeps configurations comparable.
"""

from __future__ import annotations

import difflib
from collections.abc import Collection

# Our option -> its other names.
_ELSEWHERE = {
    "model_name_or_path": "model model_name model_path model_id model_name_or_dir backbone "
    "pretrained_model pretrained_model_name_or_path model_dir",
    "model_revision": "revision",
    "pooling_mode": "pooler_type pooler pooling pooling_type pooling_method pooling_strategy "
    "sentence_pooling_method pool",
    "projection_head": "mlp head mlp_head use_mlp",
    "normalize_embeddings": "normalize normalized normlized l2_normalize normalize_to_unit",
    "max_seq_length": "max_length max_len max_seq_len seq_length seq_len sequence_length "
    "model_max_length max_sequence_length max_tokens query_max_len query_max_length "
    "passage_max_len passage_max_length cutoff_len",
    "prompt": "prompt_template instruction query_instruction query_instruction_for_retrieval "
    "prompts template",
    "append_eos_token": "append_eos add_eos add_eos_token",
    "bidirectional_attention": "bidirectional enable_bidirectional use_bidirectional is_causal",
    "attention_dropout": "dropout dropout_rate dropout_prob simcse_dropout hidden_dropout "
    "hidden_dropout_prob attention_probs_dropout_prob attn_dropout",
    "attn_implementation": "attn attention_implementation flash_attention flash_attn "
    "use_flash_attention use_flash_attn use_flash_attention_2",
    "dtype": "torch_dtype model_dtype precision",
    "load_in_4bit": "load_4bit use_4bit",
    "load_in_8bit": "load_8bit use_8bit",
    "use_lora": "lora peft use_peft",
    "lora_r": "lora_rank rank",
    "lora_alpha": "alpha",
    "lora_target_modules": "target_modules lora_targets lora_target lora_modules",
    "use_dora": "dora",
    "use_rslora": "rslora",
    "train_file": "train_data train_files train_path train_data_path train_data_file data_path "
    "data data_file data_files input input_file training_file train_dataset dataset_path "
    "dataset_file_path custom_train_dataset",
    "dataset_name": "dataset dataset_id hub_dataset",
    "dataset_config_name": "dataset_config subset dataset_subset",
    "columns": "column text_column text_columns text_column_name",
    "preprocessing_num_workers": "num_proc dataset_num_proc",
    "eval_tasks": "tasks task eval_task task_set eval_file eval_files eval_data eval_dataset "
    "eval_path dev_file dev_data validation_file valid_file test_file",
    "sts_data_dir": "data_dir eval_data_dir sts_dir path_to_data",
    "output_dir": "output out output_path output_folder save_path save_dir out_dir "
    "model_save_path logging_dir",
    "overwrite_output_dir": "overwrite force",
    "per_device_train_batch_size": "batch_size train_batch_size per_gpu_train_batch_size bs bsz "
    "batch per_device_batch_size train_bs global_batch_size",
    "per_device_eval_batch_size": "eval_batch_size per_gpu_eval_batch_size test_batch_size eval_bs",
    "learning_rate": "lr learningrate base_lr init_lr max_lr",
    "num_train_epochs": "epochs epoch num_epochs n_epochs num_epoch max_epochs train_epochs "
    "num_train_epoch",
    "max_steps": "steps num_steps num_train_steps train_steps training_steps total_steps "
    "max_train_steps stop_after_n_steps steps_per_epoch",
    "warmup_steps": "warmup warmup_ratio num_warmup_steps warmup_proportion",
    "weight_decay": "wd",
    "lr_scheduler_type": "scheduler lr_scheduler lr_schedule scheduler_type",
    "optim": "optimizer optimizer_type",
    "max_grad_norm": "clip_grad grad_clip gradient_clip gradient_clipping grad_norm clip_grad_norm",
    "gradient_accumulation_steps": "grad_accum grad_accum_steps accumulation_steps "
    "gradient_accumulation grad_acc_steps accumulate_grad_batches",
    "temperature": "temp tau t scale similarity_scale temperature_tau",
    "hard_negative_weight": "hard_negative_alpha hard_neg_weight",
    "mask_duplicate_negatives": "no_duplicates batch_sampler",
    "gather_across_devices": "negatives_cross_device cross_device negatives_x_device "
    "gather_embeddings",
    "mini_batch_size": "chunk_size gc_chunk_size sub_batch_size micro_batch_size minibatch_size "
    "grad_cache grad_cache_chunk_size gc_q_chunk_size gc_p_chunk_size",
    "mlm_weight": "do_mlm mlm mlm_loss_weight",
    "mlm_probability": "mask_probability mask_prob mlm_prob",
    "eval_strategy": "evaluation_strategy evaluate_during_training do_evaluate",
    "eval_steps": "evaluation_steps eval_interval eval_every eval_freq eval_step",
    "save_steps": "save_interval save_every save_freq checkpoint_save_steps save_step",
    "save_total_limit": "checkpoint_save_total_limit max_checkpoints keep_checkpoints",
    "load_best_model_at_end": "save_best save_best_model load_best_model load_best",
    "metric_for_best_model": "metric best_metric eval_metric main_metric monitor "
    "metric_for_best metric_name best_model_metric",
    "logging_steps": "log_steps log_interval log_every logging_interval log_freq logging_step",
    "seed": "random_seed",
    "dataloader_num_workers": "num_workers workers n_workers",
    "resume_from_checkpoint": "resume resume_from checkpoint checkpoint_path ckpt",
    "report_to": "wandb use_wandb tensorboard logger",
    "run_name": "wandb_run_name experiment_name",
    "use_cpu": "cpu no_cuda device gpu gpus device_id num_gpus n_gpu",
    "bf16": "use_bf16 use_amp amp mixed_precision",
    "fp16": "use_fp16",
    "activation_checkpointing": "grad_checkpointing use_gradient_checkpointing",
    "torch_compile": "compile use_compile",
    "hub_model_id": "hub_id hub_repo repo_id hub_name hub_repo_id",
    "hub_token": "token hf_token use_auth_token auth_token",
    "hub_private_repo": "private hub_private",
    "trust_remote_code": "remote_code",
    "config": "config_file config_path yaml yaml_file",
}

# What has to be known besides, or in place of, the other name.
_BESIDES = {
    "pooler_type": "where avg is mean, and cls_before_pooler is cls with {projection_head} none",
    "scale": "which is 1 / scale",
    "similarity_scale": "which is 1 / similarity_scale",
    "warmup_ratio": "where a number below 1 is a share of all steps",
    "warmup_proportion": "where a number below 1 is a share of all steps",
    "dropout": "or {lora_dropout}; a backbone's other dropout is in its config.json",
    "hidden_dropout": "or the backbone's config.json",
    "hidden_dropout_prob": "or the backbone's config.json",
    "do_mlm": "with the paper's 0.1",
    "mlm": "with the paper's 0.1",
    "mlp": "with mlp, none or pooler",
    "head": "with mlp, none or pooler",
    "use_mlp": "with mlp, none or pooler",
    "is_causal": "which is its opposite",
    "device": "for the CPU; CUDA_VISIBLE_DEVICES=1 in front of the command chooses a GPU",
    "gpu": "for none; CUDA_VISIBLE_DEVICES=1 in front of the command chooses a GPU",
    "gpus": "for none; `accelerate launch --num_processes 2` takes several",
    "num_gpus": "for none; `accelerate launch --num_processes 2` takes several",
    "n_gpu": "for none; `accelerate launch --num_processes 2` takes several",
    "precision": "for the weights; {bf16} or {fp16} for mixed precision",
    "use_amp": "or {fp16}",
    "amp": "or {fp16}",
    "mixed_precision": "or {fp16}",
    "wandb": "with wandb",
    "use_wandb": "with wandb",
    "tensorboard": "with tensorboard",
    "use_auth_token": "or `hf auth login` once",
    "flash_attention": "with flash_attention_2",
    "flash_attn": "with flash_attention_2",
    "use_flash_attention": "with flash_attention_2",
    "use_flash_attn": "with flash_attention_2",
    "use_flash_attention_2": "with flash_attention_2",
    "batch_sampler": "which is on by default",
    "no_duplicates": "which is on by default",
    "global_batch_size": "a device's share of it",
    "evaluate_during_training": "with steps or epoch",
    "logging_dir": "or set TENSORBOARD_LOGGING_DIR",
}

# What has no option here.
_WITHOUT = {
    "split": "use {dataset_split} for the training data, {eval_split} for the evaluation",
    "qlora": "use {use_lora} true and {load_in_4bit} true",
    "pad_to_max_length": "leave it out, nothing is computed on padding",
    "eval_transfer": "run `simcse-trainer evaluate ... --tasks mr cr subj` afterwards",
    "cache_dir": "set HF_HOME in the environment",
    "use_fast_tokenizer": "leave it out, the fast tokenizer is used where there is one",
    "tokenizer_name": "put the tokenizer into the model's folder",
    "config_name": "put config.json into the model's folder",
    "train_group_size": "pass so many columns of hard negatives with {columns}",
    "loss": "leave it out, the loss is InfoNCE",
    "do_lower_case": "leave it out, the tokenizer knows",
}

_OURS = {name: option for option, names in _ELSEWHERE.items() for name in names.split()}


def refuse_option(word: str, known: Collection[str]) -> str:
    """Say that there is no such option, and which one is meant.

    Args:
        word: The option as it was written, `--lr` at the command line and `lr` in a file; the
            answer names options in the same way.
        known: Names of all options.
    """
    dashes = "--" if word.startswith("-") else ""
    name = word.lstrip("-")
    plain = name.replace("-", "_").lower()
    options = {option: dashes + option for option in known} | {"config": "--config"}
    if plain in known:
        return f"{word} is not an option: use {options[plain]}."
    if plain in _WITHOUT:
        return f"{word} is not an option: {_WITHOUT[plain].format(**options)}."
    if plain in _OURS:
        besides = _BESIDES.get(plain, "").format(**options)
        comma = ", " if besides else ""
        return f"{word} is not an option: use {options[_OURS[plain]]}{comma}{besides}."
    near = difflib.get_close_matches(plain, [*known, *_OURS], n=1)
    meant = _OURS.get(near[0], near[0]) if near else ""
    hint = f"Did you mean '{meant}'?" if near else "See train_simcse.py --help."
    return f"unknown option '{name}'. {hint}"
