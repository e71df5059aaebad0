"""TrainConfig: declared once, refused in our words, a mapping where the interface needs one."""

import copy
import pickle
import re
from pathlib import Path

import pytest
import yaml

from vembed import config as config_module
from vembed.config import ALIASES, SECTIONS, SettingsError, TrainConfig, check
from vembed.errors import ConfigError

SHIPPED = Path(__file__).parents[2] / "configs" / "train.yaml"


@pytest.fixture(autouse=True)
def bitsandbytes(monkeypatch):
    """As if it were installed: whether it is decides about lora_quantization."""
    find = config_module.find_spec
    monkeypatch.setattr(
        config_module,
        "find_spec",
        lambda name: object() if name == "bitsandbytes" else find(name),
    )


def problems_of(**settings) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        TrainConfig(**settings)
    return [line.strip() for line in str(caught.value).splitlines()[1:]]


@pytest.mark.parametrize(
    ("settings", "line"),
    [
        ({"lr": "fast"}, "lr: expected a number. Received: 'fast'"),
        ({"lr": True}, "lr: a number is expected, not true or false. Received: true"),
        (
            {"batch_size": True},
            "batch_size: a number is expected, not true or false. Received: true",
        ),
        ({"lr": float("inf")}, "lr: expected a finite number. Received: inf"),
        ({"lr": -1}, "lr: must be at least 0. Received: -1"),
        ({"temperature": 0}, "temperature: must be above 0. Received: 0"),
        ({"holdout_ratio": 1}, "holdout_ratio: must be below 1. Received: 1"),
        ({"warmup_ratio": 1.5}, "warmup_ratio: must be at most 1. Received: 1.5"),
        ({"batch_size": 1.5}, "batch_size: expected a whole number. Received: 1.5"),
        ({"batch_size": "x"}, "batch_size: expected a whole number. Received: 'x'"),
        ({"use_lora": "maybe"}, "use_lora: expected true or false. Received: 'maybe'"),
        ({"encoder_mode": None}, "encoder_mode: expected text. Received: null"),
        ({"output_dir": ""}, "output_dir: expected text that is not empty. Received: ''"),
        ({"tags": 3}, "tags: expected a list, as in [a, b]. Received: 3"),
        ({"tags": [1]}, "tags[0]: expected text. Received: 1"),
        ({"loss_kwargs": 3}, "loss_kwargs: expected keys with values, as in {a: b}. Received: 3"),
        ({"column_mapping": {"query": 3}}, "column_mapping.query: expected text. Received: 3"),
        ({"optimizer_betas": [0.9]}, "optimizer_betas[1]: required, but not set"),
        ({"optimizer_betas": [0.9, 1]}, "optimizer_betas[1]: must be below 1. Received: 1"),
        (
            {"retrieval_mode": "t2x"},
            "retrieval_mode: expected two of t (text), i (image), m (both) around a 2, such as "
            "t2i. Received: 't2x'",
        ),
        (
            {"torch_dtype": "flaot32"},
            "torch_dtype: expected one of auto, float32, bfloat16, float16 "
            "(did you mean 'float32'?). Received: 'flaot32'",
        ),
        (
            {"report_to": "wandb,tensorbord"},
            "report_to[1]: expected one of wandb, tensorboard, swanlab "
            "(did you mean 'tensorboard'?). Received: 'tensorbord'",
        ),
        (
            {"batchsize": 3},
            "batchsize: unknown setting (did you mean 'batch_size' or 'batch_sampler'?)",
        ),
        ({"zzz": 3}, "zzz: unknown setting"),
        ({"data_path": 3}, "data_path: expected text or a list, as in [a, b]. Received: 3"),
        (
            {"data_path": ["a", 3]},
            "data_path[1]: expected text or keys with values, as in {path: file}. Received: 3",
        ),
        (
            {"data_path": [{"path": "a", "splt": "x"}]},
            "data_path[0].splt: unknown setting (did you mean 'split'?)",
        ),
        ({"data_path": [{"split": "x"}]}, "data_path[0].path: required, but not set"),
    ],
)
def test_a_value_that_does_not_fit_is_refused_in_our_words(settings, line):
    assert problems_of(**settings) == [line]


def test_all_problems_are_listed_at_once():
    with pytest.raises(ConfigError, match="^3 problems in the configuration:\n"):
        TrainConfig(lr="fast", epochs=0, nothing=1)


def test_an_unknown_key_does_not_show_its_value():
    assert "hunter2" not in problems_of(wandb_password="hunter2")[0]


def test_text_of_a_number_is_a_number():
    assert TrainConfig(lr="5e-5").lr == 5e-5


@pytest.mark.parametrize(
    ("value", "trackers"),
    [
        (None, []),
        ("none", []),
        ("wandb", ["wandb"]),
        ("wandb, swanlab", ["wandb", "swanlab"]),
        ("all", ["wandb", "tensorboard", "swanlab"]),
        (["swanlab", "swanlab"], ["swanlab"]),
        ([], []),
    ],
)
def test_report_to_takes_text_or_a_list(value, trackers):
    assert TrainConfig(report_to=value).report_to == trackers


def test_one_pattern_needs_no_list():
    assert TrainConfig(freeze="*.LayerNorm.*").freeze == ["*.LayerNorm.*"]


@pytest.mark.parametrize(
    ("value", "choice"),
    [(10, 10.0), ("0.5", 0.5), ({"lr": 1e-3}, {"lr": 1e-3}), ({"lr": "1e-3"}, {"lr": 1e-3})],
)
def test_lr_groups_take_a_factor_or_a_learning_rate(value, choice):
    assert TrainConfig(lr_groups={"a.*": value}).lr_groups == {"a.*": choice}


@pytest.mark.parametrize(
    "value", [0, -1, True, "fast", None, {"lr": 0}, {"rate": 1}, {}, [1], "inf"]
)
def test_other_values_of_lr_groups_are_refused(value):
    (problem,) = problems_of(lr_groups={"a.*": value})
    assert problem.startswith("lr_groups.a.*: expected a factor of lr above 0, as in 0.1, or a lea")


def test_unfreezing_after_no_step_is_no_unfreezing():
    assert problems_of(unfreeze_at_step={"a.*": 0}) == [
        "unfreeze_at_step.a.*: must be at least 1. Received: 0"
    ]


class TestAliases:
    @pytest.mark.parametrize(("alias", "name"), ALIASES.items())
    def test_alias_sets_the_key(self, alias, name):
        value = "0.5" if name == "lr" else "model"
        config = TrainConfig(**{alias: value})
        assert config[alias] == config[name] == type(config[name])(value)
        assert alias in config

    def test_different_values_are_an_error_that_names_both(self):
        assert problems_of(lr=1e-3, learning_rate=1e-4) == [
            "learning_rate: is another spelling of 'lr', which has another value: "
            "0.0001 and 0.001. Keep one of them"
        ]

    def test_equal_values_are_fine(self):
        assert TrainConfig(lr=1e-3, learning_rate=1e-3).lr == 1e-3


class TestMapping:
    def test_reads_writes_and_lists(self):
        config = TrainConfig()
        config["use_lora"] = True
        assert config.use_lora
        assert config.get("use_lora") is True
        assert config.get("nothing", 7) == 7
        assert "nothing" not in config
        assert dict(**config) == {key: config[key] for key in config}
        with pytest.raises(KeyError):
            config["nothing"]
        with pytest.raises(KeyError):
            config["nothing"] = 1

    def test_a_bad_assignment_does_not_stick(self):
        config = TrainConfig()
        with pytest.raises(ConfigError, match="lr: expected a number. Received: 'fast'"):
            config["lr"] = "fast"
        assert config.lr == TrainConfig().lr
        config["epochs"] = 5  # a later, good assignment is not refused for the earlier one
        assert config.epochs == 5

    def test_an_unknown_attribute_is_refused(self):
        with pytest.raises(ConfigError, match=r"batchsize: unknown setting \(did you mean"):
            TrainConfig().batchsize = 3

    def test_coerce(self):
        config = TrainConfig(lr=0.5)
        assert TrainConfig.coerce(config) is config
        assert TrainConfig.coerce({"learning_rate": 0.5}) == config
        with pytest.raises(ConfigError):
            TrainConfig.coerce({"lrr": 0.5})

    def test_origins_do_not_make_configs_differ_and_go_with_the_value(self):
        config = TrainConfig(lr=0.5)
        config._origins["lr"] = "--lr"
        assert config == TrainConfig(lr=0.5)
        config.lr = 0.25
        assert config.origins == {}

    def test_copies(self):
        config = TrainConfig(lr=0.5)
        assert copy.deepcopy(config) == config == pickle.loads(pickle.dumps(config))

    def test_errors_pickle(self):
        with pytest.raises(SettingsError) as caught:
            TrainConfig(lr="x")
        assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)


CONFLICTS = [
    ({"model_name": None}, "model_name: required, but not set"),
    ({"data_path": None}, "data_path: required, but not set"),
    ({"data_path": []}, "data_path: required, but not set"),
    ({"trust_remote_code": True}, "trust_remote_code: runs code from the hub"),
    (
        {"trust_remote_code": True, "model_name": "owner/name", "revision": "main"},
        "trust_remote_code: runs code from the hub, so it needs a revision that fixes which code",
    ),
    (
        {"trust_remote_code": True, "model_name": ".", "teacher_model_name": "owner/name"},
        "trust_remote_code: runs code from the hub, so it needs a revision",
    ),
    (
        {
            "trust_remote_code": True,
            "text_model_name": ".",
            "image_model_name": "owner/name",
            "model_name": None,
        },
        "trust_remote_code: runs code from the hub, but no setting says which revision of image_m",
    ),
    ({"attn_implementation": "flash_attention_2"}, "attn_implementation: flash_attention_2 comp"),
    ({"image_root": "x"}, "image_root: has no use where retrieval_mode has no image"),
    ({"image_hosts": ["x"]}, "image_hosts: has no use where retrieval_mode has no image"),
    ({"streaming": True, "holdout_ratio": 0}, "streaming: a stream has no known length"),
    ({"streaming": True, "max_steps": 5}, "streaming: nothing can be held out of a stream"),
    ({"eval_steps": 5}, "eval_steps: has no use without validation"),
    ({"save_top_k": 1, "save_steps": 5}, "save_top_k: has no use without checkpoints"),
    ({"save_top_k": 1, "val_data_path": "x"}, "save_top_k: has no use without checkpoints"),
    ({"allow_inexact_resume": True}, "allow_inexact_resume: has no use where nothing is resumed"),
    (
        {"resume": "auto", "overwrite_output_dir": True},
        "overwrite_output_dir: replaces an earlier run, but resume: auto goes on with one",
    ),
    ({"metric_for_best": "loss"}, "metric_for_best: has no use without validation"),
    ({"max_steps": 5, "warmup_steps": 6}, "warmup_steps: the learning rate would never be reach"),
    ({"mixed_precision": "fp16", "device": "cpu"}, "mixed_precision: fp16 needs an accelerator"),
    ({"mixed_precision": "fp16", "torch_dtype": "float16"}, "mixed_precision: fp16 scales the lo"),
    ({"loss_kwargs": {"temperature": 1}}, "loss_kwargs: temperature is a setting of its own"),
    (
        {"streaming": True, "max_steps": 1, "holdout_ratio": 0, "max_train_samples": 5},
        "max_train_samples: a stream has no first rows",
    ),
    ({"pooling_method": "none"}, "loss_type: infonce compares one vector for each item"),
    ({"pooling_method": "none", "loss_type": "cosent"}, "loss_type: cosent compares one vector"),
    ({"pooling_method": "none", "loss_type": "arcface"}, "loss_type: arcface compares one vector"),
    ({"pooling_method": "cls", "loss_type": "colbert"}, "loss_type: colbert compares a vector for"),
    ({"loss_type": "maxsim", "normalize_embeddings": False}, "normalize_embeddings: MaxSim adds"),
    ({"loss_type": "maxsim", "teacher_model_name": "x"}, "teacher_model_name: distillation comp"),
    ({"loss_type": "maxsim", "distillation_loss": "score"}, "distillation_loss: distillation comp"),
    ({"loss_type": "maxsim", "encoder_mode": "dual"}, "encoder_mode: the towers of a dual encod"),
    (
        {"ddp_static_graph": True, "use_gradient_cache": True},
        "ddp_static_graph: does not work with use_gradient_cache: true",
    ),
    (
        {"ddp_static_graph": True, "gradient_accumulation_steps": 2},
        "ddp_static_graph: does not work with gradient_accumulation_steps: 2",
    ),
    (
        {"ddp_static_graph": True, "unfreeze_at_step": {"a": 1}},
        "ddp_static_graph: does not work with unfreeze_at_step: {'a': 1}",
    ),
    ({"use_dora": True}, "use_dora: has no use without adapters. Set use_lora: true"),
    ({"use_rslora": True}, "use_rslora: has no use without adapters"),
    ({"adapter_path": "a"}, "adapter_path: has no use without adapters"),
    ({"lora_quantization": "8bit"}, "lora_quantization: has no use without adapters"),
    (
        {"lora_quantization": "4bit", "use_lora": True, "device": "cpu"},
        "lora_quantization: quantized weights need a GPU",
    ),
    (
        {"lora_quantization": "4bit", "use_lora": True, "distributed_strategy": "fsdp2"},
        "lora_quantization: quantized weights cannot be shared out",
    ),
    (
        {"max_steps": 5, "unfreeze_at_step": {"a": 4, "b": 5}},
        "unfreeze_at_step: b would never be trained: it is frozen for 5 steps, but max_steps is 5",
    ),
    (
        {"ddp_static_graph": True, "distributed_strategy": "fsdp2"},
        "ddp_static_graph: is a setting of DDP",
    ),
    (
        {"mixed_precision": "fp16", "distributed_strategy": "fsdp2"},
        "mixed_precision: fp16 scales the loss",
    ),
    (
        {"num_processes": 1, "distributed_strategy": "fsdp2"},
        "distributed_strategy: fsdp2 shares weights out",
    ),
]
SOUND = [
    {},
    {"trust_remote_code": True, "revision": "0a" * 20},
    {"trust_remote_code": True, "model_name": "."},
    {"attn_implementation": "flash_attention_2", "mixed_precision": "bf16"},
    {"image_root": "x", "retrieval_mode": "t2i"},
    {"streaming": True, "max_steps": 5, "holdout_ratio": 0},
    {"streaming": True, "max_steps": 5, "test_data_path": "x"},
    {"eval_steps": 5, "metric_for_best": "loss", "val_data_path": "x"},
    {"max_steps": 5, "warmup_steps": 5},
    {"mixed_precision": "fp16"},
    {"mixed_precision": "bf16", "device": "cpu"},
    {"ddp_static_graph": True, "freeze": ["a"]},
    {"use_lora": True, "use_dora": True, "use_rslora": True, "lora_quantization": "4bit"},
    {"max_steps": 5, "unfreeze_at_step": {"a": 4}},
    {"pooling_method": "none", "loss_type": "maxsim", "normalize_embeddings": True},
    {"pooling_method": "none", "loss_type": "package.module:Name"},
    {"loss_type": "colbert"},
    {"num_processes": 2, "distributed_strategy": "fsdp2", "mixed_precision": "bf16"},
]
REQUIRED = {"model_name": "m", "data_path": "d"}


@pytest.mark.parametrize(("settings", "start"), CONFLICTS)
def test_settings_that_cannot_work_together(settings, start):
    (problem,) = check({**REQUIRED, **settings})
    assert problem.startswith(start)


def test_quantization_without_its_package(monkeypatch):
    monkeypatch.setattr(config_module, "find_spec", lambda name: None)
    (problem,) = check({**REQUIRED, "use_lora": True, "lora_quantization": "8bit"})
    assert problem.startswith("lora_quantization: 8bit needs the package bitsandbytes")


@pytest.mark.parametrize("settings", SOUND)
def test_settings_that_can_work_together(settings):
    assert check({**REQUIRED, **settings}) == []


def test_check_asks_only_for_what_is_required():
    assert check({}, required=()) == []


class TestShippedFile:
    def test_lists_every_key_in_order_with_its_default(self):
        shipped = yaml.safe_load(SHIPPED.read_text())
        assert list(shipped) == list(TrainConfig.model_fields)
        config, default = TrainConfig(**shipped), TrainConfig()
        assert {key for key in config if config[key] != default[key]} == {"model_name", "data_path"}
        assert check(config) == []

    def test_explains_every_key_in_the_words_of_the_declaration(self):
        explained = dict(re.findall(r"^(\w+): .*?  # (.*)$", SHIPPED.read_text(), re.MULTILINE))
        assert explained == {k: f.description for k, f in TrainConfig.model_fields.items()}

    def test_its_data_is_there(self):
        shipped = yaml.safe_load(SHIPPED.read_text())
        assert (SHIPPED.parents[1] / shipped["data_path"]).is_file()

    def test_sections_start_with_keys_in_order(self):
        keys = list(TrainConfig.model_fields)
        starts = [keys.index(first) for first in SECTIONS.values()]
        assert starts[0] == 0
        assert starts == sorted(starts)


@pytest.mark.parametrize(
    ("key", "word"),
    [
        ("freeze", "vision"),
        ("freeze_towers", "image"),
        ("lora_target_modules", "query"),
        ("tags", "a"),
        ("image_hosts", "example.org"),
    ],
)
def test_a_single_word_is_a_list_of_one(key, word):
    assert TrainConfig(**{key: word})[key] == [word]


def test_a_retrieval_mode_in_capitals():
    assert TrainConfig(retrieval_mode="T2I").retrieval_mode == "t2i"
