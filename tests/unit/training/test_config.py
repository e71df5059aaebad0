"""Settings from a YAML file and the command line: precedence, types, and every complaint."""

import pytest

from vembed import config as config_module
from vembed.config import ALIASES, RUN_REQUIRES, DatasetSpec, TrainConfig
from vembed.errors import ConfigError
from vembed.training.config import (
    DistributedConfig,
    get_distributed_config,
    load_and_parse_config,
    render_config,
    save_config,
)


@pytest.fixture(autouse=True)
def bitsandbytes(monkeypatch):
    """As if it were installed: whether it is decides about lora_quantization."""
    find = config_module.find_spec
    monkeypatch.setattr(
        config_module,
        "find_spec",
        lambda name: object() if name == "bitsandbytes" else find(name),
    )


# A value other than the default for every setting: as typed, and as it must arrive.
OTHER = {
    "model_name": ("m", "m"),
    "encoder_mode": ("text", "text"),
    "text_model_name": ("t", "t"),
    "image_model_name": ("i", "i"),
    "revision": ("1e5", "1e5"),
    "trust_remote_code": ("true", True),
    "pooling_method": ("cls", "cls"),
    "normalize_embeddings": ("false", False),
    "projection_dim": ("16", 16),
    "keep_layers": ("[0, 2]", [0, 2]),
    "freeze_towers": ("[image]", ["image"]),
    "max_seq_length": ("64", 64),
    "query_prompt": ("query: ", "query: "),
    "document_prompt": ("", ""),
    "torch_dtype": ("bfloat16", "bfloat16"),
    "attn_implementation": ("eager", "eager"),
    "dropout": ("0.2", 0.2),
    "use_lora": ("true", True),
    "lora_r": ("8", 8),
    "lora_alpha": ("16", 16.0),
    "lora_dropout": ("0.1", 0.1),
    "lora_target_modules": ("[query, value]", ["query", "value"]),
    "use_dora": ("true", True),
    "use_rslora": ("true", True),
    "lora_quantization": ("4bit", "4bit"),
    "adapter_path": ("runs/a/final/adapter", "runs/a/final/adapter"),
    "data_path": ("a.jsonl", "a.jsonl"),
    "val_data_path": ("v", "v"),
    "test_data_path": ("t", "t"),
    "holdout_ratio": ("0.2", 0.2),
    "retrieval_mode": ("t2i", "t2i"),
    "column_mapping": ("{query: q}", {"query": "q"}),
    "image_root": ("i", "i"),
    "image_hosts": ("[a.org, 'b.org:8080']", ["a.org", "b.org:8080"]),
    "max_image_pixels": ("99", 99),
    "image_check": ("decode", "decode"),
    "on_bad_record": ("quarantine", "quarantine"),
    "max_bad_records": ("5", 5.0),
    "streaming": ("true", True),
    "shuffle_buffer_size": ("5", 5),
    "num_workers": ("2", 2),
    "token_cache": ("false", False),
    "max_train_samples": ("7", 7),
    "drop_last": ("true", True),
    "batch_sampler": ("class_balanced", "class_balanced"),
    "batch_sampler_kwargs": ("{samples_per_class: 2}", {"samples_per_class": 2}),
    "loss_type": ("cosent", "cosent"),
    "loss_kwargs": ("{margin: 1e-3, name: x}", {"margin": 1e-3, "name": "x"}),
    "temperature": ("2e-2", 0.02),
    "learn_temperature": ("true", True),
    "loss_bidirectional": ("true", True),
    "loss_tile_size": ("512", 512),
    "guide_model_name": ("g", "g"),
    "use_mrl": ("true", True),
    "mrl_dims": ("[16, 8]", [16, 8]),
    "mrl_weights": ("[1, 0.5]", [1.0, 0.5]),
    "teacher_model_name": ("t", "t"),
    "teacher_revision": ("1e5", "1e5"),
    "teacher_dtype": ("bfloat16", "bfloat16"),
    "teacher_cache": ("c", "c"),
    "teacher_chunk_size": ("8", 8),
    "distillation_loss": ("{embedding: 1, relational: 5e-1}", {"embedding": 1, "relational": 0.5}),
    "distillation_kwargs": ("{embedding: {distance: mse}}", {"embedding": {"distance": "mse"}}),
    "distillation_alpha": ("0.25", 0.25),
    "distillation_temperature": ("1", 1.0),
    "epochs": ("1", 1),
    "max_steps": ("9", 9),
    "batch_size": ("8", 8),
    "gradient_accumulation_steps": ("4", 4),
    "lr": ("2e-5", 2e-5),
    "optimizer": ("sgd", "sgd"),
    "optimizer_betas": ("[0.8, 0.9]", (0.8, 0.9)),
    "optimizer_eps": ("1e-6", 1e-6),
    "optimizer_kwargs": ("{momentum: 0.9}", {"momentum": 0.9}),
    "weight_decay": ("0", 0.0),
    "lr_groups": (
        "{projections.*: 10, loss.*: {lr: 1e-3}}",
        {"projections.*": 10.0, "loss.*": {"lr": 1e-3}},
    ),
    "layerwise_lr_decay": ("0.9", 0.9),
    "freeze": ("[backbone.embeddings.*, x]", ["backbone.embeddings.*", "x"]),
    "unfreeze_at_step": ("{backbone.*: 2}", {"backbone.*": 2}),
    "scheduler_type": ("cosine", "cosine"),
    "scheduler_kwargs": ("{num_cycles: 2}", {"num_cycles": 2}),
    "warmup_ratio": ("0.5", 0.5),
    "warmup_steps": ("3", 3),
    "max_grad_norm": ("0", 0.0),
    "seed": ("010", 10),
    "mixed_precision": ("bf16", "bf16"),
    "chunk_tokens": ("100", 100),
    "gradient_checkpointing": ("true", True),
    "use_gradient_cache": ("true", True),
    "gradient_cache_chunk_size": ("2", 2),
    "gradient_cache_chunk_tokens": ("64", 64),
    "gradient_cache_keep": ("auto", "auto"),
    "device": ("cpu", "cpu"),
    "num_processes": ("2", 2),
    "ddp_find_unused_parameters": ("true", True),
    "ddp_static_graph": ("true", True),
    "distributed_strategy": ("fsdp2", "fsdp2"),
    "output_dir": ("o", "o"),
    "overwrite_output_dir": ("true", True),
    "logging_steps": ("1", 1),
    "eval_steps": ("5", 5),
    "save_steps": ("5", 5),
    "save_total_limit": ("null", None),
    "save_adapter": ("false", False),
    "metric_for_best": ("loss", "loss"),
    "report_to": ("wandb,swanlab", ["wandb", "swanlab"]),
    "project_name": ("p", "p"),
    "run_name": ("12", "12"),
    "tags": ("[a, 1]", ["a", "1"]),
    "progress": ("false", False),
}
# What another setting has to be for a value to make sense.
NEEDS = {
    "text_model_name": {"image_model_name": "i"},
    "image_model_name": {"text_model_name": "t"},
    "trust_remote_code": {"revision": "abc"},
    **dict.fromkeys(
        ["use_dora", "use_rslora", "lora_quantization", "adapter_path"], {"use_lora": "true"}
    ),
    "image_root": {"retrieval_mode": "t2i"},
    "image_hosts": {"retrieval_mode": "t2i"},
    "max_image_pixels": {"retrieval_mode": "i2i"},
    "image_check": {"retrieval_mode": "m2t"},
    "max_bad_records": {"on_bad_record": "quarantine"},
    "streaming": {"max_steps": "3", "holdout_ratio": "0"},
    "teacher_revision": {"teacher_model_name": "t"},
    "teacher_dtype": {"teacher_model_name": "t"},
    "teacher_cache": {"teacher_model_name": "t"},
    "distillation_loss": {"teacher_model_name": "t"},
    "distillation_kwargs": {"teacher_model_name": "t"},
    "mrl_dims": {"use_mrl": "true"},
    "mrl_weights": {"use_mrl": "true", "mrl_dims": "[2, 1]"},
    "eval_steps": {"val_data_path": "v"},
    "metric_for_best": {"val_data_path": "v"},
}


def load(*argv: str, required=()) -> TrainConfig:
    return load_and_parse_config(list(argv), required=required)


def problems_of(*argv: str, required=()) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        load(*argv, required=required)
    return [line.strip() for line in str(caught.value).splitlines()[1:]]


@pytest.fixture
def yaml_file(tmp_path):
    path = tmp_path / "train.yaml"

    def write(text: str | bytes) -> str:
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return str(path)

    return write


def test_the_table_has_every_key():
    assert set(OTHER) == set(TrainConfig.model_fields)
    assert not [k for k, (_, value) in OTHER.items() if value == TrainConfig()[k]]


@pytest.mark.parametrize("key", OTHER)
class TestEveryKey:
    def test_as_a_flag(self, key):
        text, value = OTHER[key]
        extra = [word for k, v in NEEDS.get(key, {}).items() for word in (f"--{k}", v)]
        config = load(f"--{key}", text, *extra)
        assert config[key] == value
        assert config.origins[key] == f"--{key}"

    def test_as_an_override(self, key):
        text, value = OTHER[key]
        extra = [f"{k}={v}" for k, v in NEEDS.get(key, {}).items()]
        config = load("--config_override", f"{key}={text}", *extra)
        assert config[key] == value
        assert config.origins[key] == "--config_override"

    def test_in_the_file(self, key, yaml_file):
        text, value = OTHER[key]
        text = f'"{text}"' if text.endswith(" ") or not text else text
        others = [f"{k}: {v}" for k, v in NEEDS.get(key, {}).items()]
        config = load("--config", yaml_file("\n".join([f"{key}: {text}", *others])))
        assert config[key] == value
        assert config.origins[key] == "train.yaml:1"


class TestPrecedence:
    def test_file_then_overrides_from_left_to_right_then_flags(self, yaml_file):
        file = yaml_file("lr: 1\nepochs: 1\nbatch_size: 1\nseed: 1\n")
        overrides = ["--config_override", "lr=2", "epochs=2", "--config_override", "epochs=3"]
        config = load("--lr", "4", "--config", file, *overrides, "batch_size=2")
        assert (config.lr, config.epochs, config.batch_size, config.seed) == (4, 3, 2, 1)
        assert config.max_grad_norm == TrainConfig().max_grad_norm
        assert config.origins == {
            "lr": "--lr",
            "epochs": "--config_override",
            "batch_size": "--config_override",
            "seed": "train.yaml:4",
        }

    def test_the_other_spelling_overrides_too(self, yaml_file):
        assert load("--config", yaml_file("lr: 1"), "--learning_rate", "2").lr == 2

    def test_a_mistake_is_reported_although_a_flag_overrides_it(self, yaml_file):
        assert problems_of("--config", yaml_file("lr: x"), "--lr", "1") == [
            "train.yaml:1: lr: expected a number. Received: 'x'"
        ]


class TestTypesDecideNotYaml:
    """What PyYAML alone would make of these: text, False, 100000.0, 8, 45000, True."""

    @pytest.mark.parametrize(
        ("line", "key", "value"),
        [
            ("lr: 5e-5", "lr", 5e-5),
            ("mixed_precision: no", "mixed_precision", "no"),
            ("revision: 1e5", "revision", "1e5"),
            ("revision: 12:30:00", "revision", "12:30:00"),
            ("seed: 010", "seed", 10),
            ("run_name: yes", "run_name", "yes"),
            ("run_name: 'null'", "run_name", "null"),
            ("run_name: ~", "run_name", None),
            ("val_data_path:", "val_data_path", None),
            ("use_lora: yes", "use_lora", True),
            ("tags: [no, 2026-01-01]", "tags", ["no", "2026-01-01"]),
            ("report_to: null", "report_to", []),
            ("loss_kwargs: {a: 1e-3, b: no, c: {d: 1}}", "loss_kwargs",
             {"a": 1e-3, "b": False, "c": {"d": 1}}),
        ],
    )  # fmt: skip
    def test_read(self, yaml_file, line, key, value):
        assert load("--config", yaml_file(line))[key] == value

    def test_true_is_no_number(self, yaml_file):
        assert problems_of("--config", yaml_file("lr: true")) == [
            "train.yaml:1: lr: expected a number. Received: 'true'"
        ]

    def test_several_training_sets(self, yaml_file):
        text = "data_path:\n  - a.jsonl\n  - {path: b.jsonl, query_prompt: no, split: 1}\n"
        assert load("--config", yaml_file(text)).data_path == [
            "a.jsonl",
            DatasetSpec(path="b.jsonl", query_prompt="no", split="1"),
        ]

    def test_an_empty_file_sets_nothing(self, yaml_file):
        assert load("--config", yaml_file("# nothing\n")) == TrainConfig()


class TestFlags:
    def test_a_bare_flag_is_true(self):
        assert load("--gradient_checkpointing", "--lr", "1").gradient_checkpointing
        assert not load("--gradient_checkpointing", "false").gradient_checkpointing

    def test_with_an_equals_sign(self):
        assert load("--lr=0.5", "--query_prompt=-x").query_prompt == "-x"

    @pytest.mark.parametrize("flag", ["--local_rank", "--local-rank"])
    def test_what_launchers_add_is_accepted_and_hidden(self, flag, capsys):
        assert load(f"{flag}=1") == TrainConfig()
        with pytest.raises(SystemExit):
            load("--help")
        assert "local" + "_rank" not in capsys.readouterr().out

    def test_help_lists_every_setting(self, capsys):
        with pytest.raises(SystemExit) as caught:
            load("--help")
        assert caught.value.code == 0
        shown = capsys.readouterr().out
        assert all(f"--{key} " in shown for key in [*TrainConfig.model_fields, *ALIASES])


class TestComplaints:
    def test_all_at_once_with_place_rule_value_and_nearest_name(self, yaml_file):
        file = yaml_file("model_name: m\nlr: fast\nbatchsize: 3\nlora_rank: 8\n")
        argv = ["--config", file, "--weight_decai", "--scheduler_typ", "cosin", "stray"]
        argv += ["--epochs", "0", "--lr", "--config_override", "oops", "temprature=0.02"]
        assert problems_of(*argv) == [
            "--weight_decai: unknown setting (did you mean 'weight_decay'?)",
            "--scheduler_typ: unknown setting (did you mean 'scheduler_type' or "
            "'scheduler_kwargs'?)",
            "'stray': not a flag; settings are written --KEY VALUE",
            "--config_override: expected KEY=VALUE. Received: 'oops'",
            "--lr: expected a value after it",
            "train.yaml:2: lr: expected a number. Received: 'fast'",
            "train.yaml:3: batchsize: unknown setting (did you mean 'batch_size' or "
            "'batch_sampler'?)",
            "train.yaml:4: lora_rank: unknown setting (did you mean 'lora_r' or 'lora_alpha'?)",
            "--config_override: temprature: unknown setting (did you mean 'temperature' or "
            "'learn_temperature'?)",
            "--epochs: must be above 0. Received: '0'",
        ]

    @pytest.mark.parametrize(
        ("text", "lines"),
        [
            ("lr: 1\nepochs: 2\nlr: 2", ["train.yaml:3: lr: already in line 1. Keep one of them"]),
            (
                "loss_kwargs:\n  a: 1\n  a: 2\nepochs: 0",
                [
                    "train.yaml:3: a: already in line 2. Keep one of them",
                    "train.yaml:4: epochs: must be above 0. Received: '0'",
                ],
            ),
            ("tags: &a [*a]", ["train.yaml:1: a value cannot contain itself"]),
            ("[a]: 1", ["train.yaml:1: a key must be a word"]),
            ("- lr", ["train.yaml:1: expected settings as KEY: VALUE"]),
            (
                "lr: 1\n  epochs: 2",
                ["train.yaml:2:9: not valid YAML: mapping values are not allowed here"],
            ),
            (
                "lr: 1\n\tepochs: 2",
                [
                    "train.yaml:2:1: not valid YAML: found character '\\t' that cannot start any "
                    "token"
                ],
            ),
            ("lr: !!python/name:os.system", ["train.yaml:1: lr: expected a number. Received: ''"]),
            (
                "loss_kwargs: {a: !!python/name:os.system }",
                [
                    "train.yaml:1:18: not valid YAML: could not determine a constructor for the "
                    "tag 'tag:yaml.org,2002:python/name:os.system'"
                ],
            ),
            (b"lr: \xff", ["train.yaml: not UTF-8 text (byte 4)"]),
            (
                "lr: 1\nlearning_rate: 2",
                [
                    "train.yaml:2: learning_rate: is another spelling of 'lr', which has another "
                    "value (train.yaml:1): '2' and '1'. Keep one of them"
                ],
            ),
        ],
    )
    def test_in_the_file(self, yaml_file, text, lines):
        assert problems_of("--config", yaml_file(text)) == lines

    @pytest.mark.parametrize(
        ("argv", "lines"),
        [
            (["--config"], ["--config: expected one file after it, once"]),
            (["--config", "a", "--config", "b"], ["--config: expected one file after it, once"]),
            (["--config_override"], ["--config_override: expected KEY=VALUE. Received: nothing"]),
            (["--lr", "1", "--lr", "2"], ["--lr: given more than once: '1', '2'"]),
            (["--tags", "[a"], ["--tags: expected a list, as in [a, b]. Received: '[a'"]),
            (
                ["--loss_kwargs", "{a: 1, a: 2}"],
                ["--loss_kwargs: expected keys with values, as in {a: b}. "
                 "Received: '{a: 1, a: 2}'"],
            ),
            (
                ["--lr", "1", "--learning_rate", "2"],
                ["--learning_rate: is another spelling of 'lr', which has another value (--lr): "
                 "'2' and '1'. Keep one of them"],
            ),
            (
                ["--teacher_m", "x"],
                ["--teacher_m: unknown setting (did you mean 'teacher_dtype' or 'teacher_cache'?)"],
            ),
        ],
    )  # fmt: skip
    def test_on_the_command_line(self, argv, lines):
        assert problems_of(*argv) == lines

    def test_a_file_that_is_not_there_is_the_only_complaint(self, tmp_path):
        file = str(tmp_path / "no.yaml")
        assert problems_of("--config", file, required=RUN_REQUIRES) == [
            f"--config: cannot read {file!r}: No such file or directory"
        ]

    def test_conflicts_say_where_the_value_came_from(self, yaml_file):
        file = yaml_file("ddp_static_graph: true\n")
        (problem,) = problems_of("--config", file, "--use_gradient_cache")
        assert problem.startswith("train.yaml:1: ddp_static_graph: does not work with")

    def test_what_follows_from_a_reported_value_is_not_reported(self):
        # warmup_steps alone would be a conflict with max_steps: 5.
        argv = ["--max_steps", "5", "--warmup_steps", "many"]
        assert problems_of(*argv) == ["--warmup_steps: expected a whole number. Received: 'many'"]

    def test_required_settings(self):
        assert problems_of(required=RUN_REQUIRES) == [
            "model_name: required, but not set",
            "data_path: required, but not set",
        ]
        assert load() == TrainConfig()


class TestSaving:
    def test_a_saved_config_reads_back_the_same(self, tmp_path):
        extra = {key: value for needs in NEEDS.values() for key, value in needs.items()}
        settings = {key: value for key, (_, value) in OTHER.items()} | extra
        settings |= {
            "mrl_dims": [16, 8],
            "ddp_static_graph": False,
            "streaming": False,
            "text_model_name": None,
            "image_model_name": None,
            "lora_quantization": None,
            "query_prompt": "one:\ntwo # ' \" é \u2028",
            "data_path": ["a", {"path": "b", "query_prompt": "no"}],
        }
        config = TrainConfig(**settings)
        save_config(config, tmp_path / "config.yaml")
        assert load("--config", str(tmp_path / "config.yaml")) == config

    def test_the_default_reads_back_the_same(self, tmp_path):
        save_config(TrainConfig(), tmp_path / "config.yaml")
        assert load("--config", str(tmp_path / "config.yaml")) == TrainConfig()

    def test_origins_are_noted(self, tmp_path):
        save_config(load("--lr", "0.5"), tmp_path / "config.yaml")
        lines = (tmp_path / "config.yaml").read_text().splitlines()
        assert [line for line in lines if line.endswith("# --lr")] == [f"{'lr: 0.5':<36}  # --lr"]

    def test_every_key_is_written_once(self):
        lines = render_config(TrainConfig(), {}).splitlines()
        keys = [line.split(":")[0] for line in lines if line and not line.startswith("#")]
        assert keys == list(TrainConfig.model_fields)


def test_distributed_config_unpacks_as_documented():
    use_grad_ckpt, use_grad_cache, find_unused = get_distributed_config(
        {"use_gradient_cache": True}
    )
    assert (use_grad_ckpt, use_grad_cache, find_unused) == (False, True, False)
    settings = {"gradient_checkpointing": True, "ddp_find_unused_parameters": True}
    assert get_distributed_config(TrainConfig(**settings)) == DistributedConfig(True, False, True)
