"""A setting that would do nothing is an error that names it and what turns it on."""

import pytest

from vembed.config import TrainConfig, find_conflicts

LORA = {"use_lora": True}
CACHE = {"use_gradient_cache": True}
TEACHER = {"teacher_model_name": "owner/teacher"}
TRACKED = {"report_to": "wandb"}
PICTURES = {"retrieval_mode": "t2i"}
STREAM = {"streaming": True, "max_steps": 5, "holdout_ratio": 0}

# key: (a value, settings that leave it without effect, settings that let it have one).
NEEDS = {
    "lora_r": (4, {}, LORA),
    "lora_alpha": (4, {}, LORA),
    "lora_dropout": (0.5, {}, LORA),
    "lora_target_modules": (["query"], {}, LORA),
    "use_dora": (True, {}, LORA),
    "use_rslora": (True, {}, LORA),
    "lora_quantization": ("4bit", {}, LORA),
    "adapter_path": ("a", {}, LORA),
    "save_adapter": (False, {}, LORA),
    "gradient_cache_chunk_size": (4, {}, CACHE),
    "gradient_cache_chunk_tokens": (4, {}, CACHE),
    "gradient_cache_keep": ("auto", {}, CACHE),
    "torch_compile_backend": ("eager", {}, {"torch_compile": True}),
    "mrl_dims": ([8], {}, {"use_mrl": True}),
    "mrl_weights": ([1], {"mrl_dims": None}, {"use_mrl": True, "mrl_dims": [8]}),
    "mrl_layers": ([2], {}, {"use_mrl": True}),
    "teacher_revision": ("abc", {}, TEACHER),
    "teacher_dtype": ("float32", {}, TEACHER),
    "teacher_cache": ("a", {}, TEACHER),
    "teacher_chunk_size": (4, TEACHER, {**TEACHER, "teacher_cache": "a"}),
    "distillation_alpha": (0.1, {}, TEACHER),
    "distillation_temperature": (0.1, {}, {"distillation_loss": "score"}),
    "distillation_kwargs": ({"embedding": {"distance": "mse"}}, {}, TEACHER),
    "eval_steps": (4, {}, {"val_data_path": "v"}),
    "metric_for_best": ("loss", {}, {"val_data_path": "v"}),
    "holdout_ratio": (0.5, {"test_data_path": "t"}, {}),
    "max_bad_records": (4, {}, {"on_bad_record": "quarantine"}),
    "shuffle_buffer_size": (4, {}, STREAM),
    "batch_sampler_kwargs": ({"a": 1}, STREAM, {}),
    "save_total_limit": (None, {}, {"save_steps": 5}),
    "save_top_k": (1, {"save_steps": 5}, {"save_steps": 5, "val_data_path": "v"}),
    "allow_inexact_resume": (True, {}, {"resume": "auto"}),
    "max_nonfinite_steps": (4, {}, {"on_nonfinite": "skip"}),
    "project_name": ("p", {}, TRACKED),
    "run_name": ("r", {}, TRACKED),
    "tags": (["t"], {}, TRACKED),
    "ddp_static_graph": (True, {"num_processes": 1}, {"num_processes": 2}),
    "revision": ("abc", {"model_name": "package:numpy"}, {"model_name": "owner/name"}),
    "image_root": (".", {}, PICTURES),
    "image_hosts": (["example.org"], {}, PICTURES),
    "max_image_pixels": (4, {}, PICTURES),
    "image_check": ("decode", {}, PICTURES),
    "image_cache": ("c", {}, PICTURES),
    "max_seq_length": (4, {"retrieval_mode": "i2i"}, PICTURES),
    "query_prompt": ("q ", {"retrieval_mode": "i2t"}, PICTURES),
    "document_prompt": ("d ", PICTURES, {"retrieval_mode": "i2t"}),
    "optimizer_betas": ((0.5, 0.5), {"optimizer": "sgd"}, {"optimizer": "a.b:Own"}),
    "optimizer_eps": (0.1, {"optimizer": "adafactor"}, {"optimizer": "rmsprop"}),
    "warmup_ratio": (0.5, {"scheduler_type": "constant"}, {}),
    "warmup_steps": (5, {"scheduler_type": "constant"}, {}),
    "scheduler_kwargs": (
        {"num_cycles": 2},
        {"scheduler_type": "constant"},
        {"scheduler_type": "cosine"},
    ),
}

# Each of these changes every run, or is refused later by the part that it is meant for, which alone
# knows: the model (towers, layers, pooling), the loss and its arguments, the optimizer, the data.
ALWAYS = {
    "attn_implementation", "batch_sampler", "batch_size", "chunk_tokens", "column_mapping",
    "data_path", "ddp_find_unused_parameters", "device", "distillation_loss",
    "distributed_strategy", "drop_last", "dropout", "encoder_mode", "epochs", "freeze",
    "freeze_towers", "grace_period_s", "gradient_accumulation_steps", "gradient_checkpointing",
    "guide_model_name", "image_model_name", "keep_layers", "layerwise_lr_decay",
    "learn_temperature", "logging_steps", "loss_bidirectional", "loss_kwargs", "loss_tile_size",
    "loss_type", "lr", "lr_groups", "max_grad_norm", "max_restarts", "max_steps",
    "max_train_samples", "mixed_precision", "model_name", "normalize_embeddings",
    "num_processes", "num_workers", "on_bad_record", "on_nonfinite", "optimizer",
    "optimizer_kwargs", "output_dir", "overwrite_output_dir", "pooling_method",
    "process_timeout_s", "progress", "projection_dim", "report_to", "resume", "retrieval_mode",
    "save_steps", "scheduler_type", "seed", "streaming", "teacher_model_name", "temperature",
    "test_data_path", "text_model_name", "token_cache", "torch_compile", "torch_dtype",
    "trust_remote_code", "unfreeze_at_step", "use_gradient_cache", "use_lora", "use_mrl",
    "val_data_path", "weight_decay",
}  # fmt: skip


def complaints(key: str, settings: dict) -> list[str]:
    problems = find_conflicts(TrainConfig(**settings))
    return [p.rule for p in problems if p.keys[0] == key and p.rule.startswith("has no use")]


@pytest.mark.parametrize("key", NEEDS)
def test_a_setting_without_use_is_an_error(key):
    value, without, with_use = NEEDS[key]
    (rule,) = complaints(key, {"model_name": "m", "data_path": "d", **without, key: value})
    # It says what to do.
    assert ". " in rule
    assert complaints(key, {"model_name": "m", "data_path": "d", **with_use, key: value}) == []


@pytest.mark.parametrize("key", NEEDS)
def test_the_default_written_down_is_no_error(key):
    default = TrainConfig.model_fields[key].get_default(call_default_factory=True)
    assert complaints(key, {**NEEDS[key][1], key: default}) == []


def test_every_key_is_one_or_the_other():
    assert set(NEEDS) | ALWAYS == set(TrainConfig.model_fields)
    assert set(NEEDS) & ALWAYS == set()


def test_revisions_of_a_local_teacher():
    settings = {"teacher_model_name": "package:numpy", "teacher_revision": "abc"}
    (rule,) = complaints("teacher_revision", settings)
    assert "hub" in rule


def test_what_says_that_it_wins_is_no_error():
    both = {"epochs": 2, "max_steps": 5, "warmup_ratio": 0.2, "warmup_steps": 1}
    assert find_conflicts(TrainConfig(model_name="m", data_path="d", **both)) == []
