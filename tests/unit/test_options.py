"""The options, frozen: a new one is a decision, and a changed name breaks commands."""

import dataclasses

from transformers import TrainingArguments

from simcse_trainer.arguments import DataArguments, ModelArguments, SimCSETrainingArguments

OPTIONS = {
    ModelArguments: """
        model_name_or_path base_model model_revision pooling_mode projection_head mlp_only_train
        normalize_embeddings max_seq_length padding_free prompt append_eos_token
        bidirectional_attention attention_dropout attn_implementation dtype load_in_4bit
        load_in_8bit use_lora lora_r lora_alpha lora_dropout lora_target_modules use_dora
        use_rslora trust_remote_code
    """,
    DataArguments: """
        train_file dataset_name dataset_config_name dataset_split columns encoding
        delimiter column_names nli_triplets drop_invalid_rows streaming shuffle_buffer_size
        preprocessing_num_workers eval_tasks eval_split sts_data_dir eval_corpus neighbor_queries
    """,
    SimCSETrainingArguments: """
        overwrite_output_dir temperature hard_negative_weight mask_duplicate_negatives
        contrastive_directions contrastive_partition hardness_strength hardness_mode
        false_negative_margin false_negative_margin_type num_hard_negatives augmentation
        augmentation_rate gather_across_devices mini_batch_size use_cpu_kernels contrastive_weight
        alignment_weight uniformity_weight orthogonality_weights matryoshka_dims
        matryoshka_weights mlm_weight mlm_probability lora_save hub_push_training_state
        hub_timeout_s hub_final_timeout_s resume_from_hub allow_resume_mismatch language license
        model_card_template
    """,
}


def test_the_options_are_these():
    inherited = {field.name for field in dataclasses.fields(TrainingArguments)}
    for arguments, names in OPTIONS.items():
        found = [field.name for field in dataclasses.fields(arguments)]
        assert [name for name in found if name not in inherited] == names.split()
