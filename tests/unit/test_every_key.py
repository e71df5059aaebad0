"""Every setting changes something: a run with another value leaves or says something else.

A setting that does nothing is worse than none. For each key, two tiny runs that differ in it alone
are observed: weights, settings of the saved model, metrics, files, log lines, the error if there is
one. The few that change only how a run computes have a proof of their own.
"""

import hashlib
import json
import logging
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState

from tests.pictures import flipped_png, mode_rows, picture, write_pictures
from tests.tiny import tiny_clip, tiny_sentence_transformer, write_rows
from vembed.config import TrainConfig
from vembed.data import Collator
from vembed.errors import ConfigError, DistributedError, VembedError
from vembed.losses import tiling
from vembed.models import load_encoder, pixel_cache
from vembed.training.launch_check import check_process_count
from vembed.training.model_builder import build_model, build_teacher_model
from vembed.training.optimizer_builder import resolve_tracker
from vembed.training.run import run_training
from vembed.training.teaching.teach import teach
from vembed.training.trainer import Trainer
from vembed.training.watchdog import Watchdog

# A run on captions and pictures, with the tests' own encoder, which cannot be loaded again.
PICTURES = {
    "model_name": "<pictures>",
    "encoder_mode": "tests.own_encoder:load_pictures_encoder",
    "retrieval_mode": "t2i",
    "data_path": "<captions>",
    "image_root": "<pictures>",
    "holdout_ratio": 0,
}
# key: (another value, settings of both runs that let it matter). Paths stand in angle brackets.
CHANGES = {
    "model_name": ("<other model>", {}),
    "encoder_mode": ("vembed.models:NoSuchEncoder", {}),
    "text_model_name": ("<other model>", {"image_model_name": "<model>", "model_name": None}),
    "image_model_name": ("<model>", {"text_model_name": "<model>", "model_name": None}),
    "trust_remote_code": (True, {"model_name": "owner/name"}),
    "pooling_method": ("cls", {}),
    "normalize_embeddings": (False, {}),
    "projection_dim": (8, {}),
    "keep_layers": (1, {}),
    "freeze_towers": (["text"], {}),
    "max_seq_length": (5, {}),
    "query_prompt": ("old ", {}),
    "document_prompt": ("old ", {}),
    "torch_dtype": ("bfloat16", {}),
    "attn_implementation": ("eager", {}),
    "dropout": (0.5, {}),
    "use_lora": (True, {}),
    "lora_r": (2, {"use_lora": True}),
    "lora_alpha": (64, {"use_lora": True}),
    "lora_dropout": (0.5, {"use_lora": True}),
    "lora_target_modules": (["query"], {"use_lora": True}),
    "use_dora": (True, {"use_lora": True}),
    "use_rslora": (True, {"use_lora": True}),
    "lora_quantization": ("4bit", {"use_lora": True, "device": "auto"}),
    "data_path": ("<swapped pairs>", {}),
    "val_data_path": ("<pairs>", {}),
    "test_data_path": ("<beir>", {}),
    "holdout_ratio": (0.5, {}),
    "retrieval_mode": ("t2i", {}),
    "column_mapping": ({"query": "positive", "positive": "query"}, {}),
    "image_root": ("<other pictures>", PICTURES),
    "image_hosts": (["example.org"], {**PICTURES, "data_path": "<urls>"}),
    "max_image_pixels": (10, PICTURES),
    "image_check": ("decode", {**PICTURES, "data_path": "<damaged>", "max_steps": 1}),
    "on_bad_record": ("quarantine", {"data_path": "<bad row>"}),
    "max_bad_records": (0.5, {"data_path": "<bad row>", "on_bad_record": "quarantine"}),
    "streaming": (True, {"holdout_ratio": 0}),
    "shuffle_buffer_size": (1, {"streaming": True, "holdout_ratio": 0}),
    "max_train_samples": (6, {}),
    "drop_last": (True, {"max_steps": None, "epochs": 1, "batch_size": 15}),
    "batch_sampler": ("no_duplicates", {"data_path": "<repeated pairs>"}),
    "batch_sampler_kwargs": (
        {"samples_per_class": 2},
        {"data_path": "<labelled>", "loss_type": "supcon", "holdout_ratio": 0, "batch_size": 8},
    ),
    "loss_type": ("supcon", {}),
    "loss_kwargs": ({"nonsense": 1}, {}),
    "temperature": (1.0, {}),
    "learn_temperature": (True, {}),
    "loss_bidirectional": (True, {}),
    "guide_model_name": ("<other model>", {}),
    "use_mrl": (True, {}),
    "mrl_dims": ([8], {"use_mrl": True}),
    "mrl_weights": ([0.1, 1], {"use_mrl": True, "mrl_dims": [32, 8]}),
    "mrl_layers": ([1], {"use_mrl": True}),
    "teacher_model_name": ("<other model>", {}),
    "teacher_dtype": ("bfloat16", {"teacher_model_name": "<other model>"}),
    "teacher_cache": ("nothing there", {"teacher_model_name": "<other model>"}),
    "distillation_loss": ("embedding", {"teacher_model_name": "<other model>"}),
    "distillation_kwargs": (
        {"embedding": {"distance": "mse"}},
        {"teacher_model_name": "<other model>", "distillation_loss": "embedding"},
    ),
    "distillation_alpha": (0.1, {"teacher_model_name": "<other model>"}),
    "distillation_temperature": (1.0, {"teacher_model_name": "<other model>"}),
    "epochs": (1, {"max_steps": None}),
    "max_steps": (1, {}),
    "batch_size": (5, {}),
    "gradient_accumulation_steps": (2, {}),
    "lr": (0.1, {}),
    "optimizer": ("sgd", {}),
    "optimizer_betas": ((0.1, 0.2), {}),
    "optimizer_eps": (0.1, {}),
    "optimizer_kwargs": ({"maximize": True}, {}),
    "weight_decay": (0.9, {}),
    "lr_groups": ({"backbone.embeddings.*": 0.1}, {}),
    "layerwise_lr_decay": (0.5, {}),
    "freeze": (["backbone.embeddings.*"], {}),
    "unfreeze_at_step": ({"backbone.embeddings.*": 1}, {}),
    "scheduler_type": ("constant", {}),
    "scheduler_kwargs": ({"num_cycles": 3}, {"scheduler_type": "cosine"}),
    "warmup_ratio": (1.0, {}),
    "warmup_steps": (2, {}),
    "max_grad_norm": (1e-3, {"optimizer": "sgd"}),
    "on_nonfinite": ("skip", {"temperature": 1e-38}),
    "max_nonfinite_steps": (1, {"temperature": 1e-38, "on_nonfinite": "skip"}),
    "grace_period_s": (1e-9, {"save_steps": 1}),
    "max_restarts": (1, {}),
    "seed": (1, {}),
    "mixed_precision": ("bf16", {}),
    "device": ("auto", {"mixed_precision": "fp16"}),
    "ddp_static_graph": (True, {"use_gradient_cache": True}),
    "output_dir": ("elsewhere", {}),
    "logging_steps": (2, {}),
    "eval_steps": (1, {"val_data_path": "<pairs>"}),
    "save_steps": (1, {}),
    "save_total_limit": (None, {"save_steps": 1, "max_steps": 3}),
    "save_top_k": (
        1,
        {
            "save_steps": 1,
            "max_steps": 3,
            "val_data_path": "<pairs>",
            "eval_steps": 1,
            "metric_for_best": "loss",
            "optimizer_kwargs": {"maximize": True},
        },
    ),
    "save_adapter": (False, {"use_lora": True}),
    "metric_for_best": ("nonsense", {"val_data_path": "<pairs>"}),
    "report_to": (["tensorboard"], {}),
}
BASE = {
    "model_name": "<model>",
    "data_path": "<pairs>",
    "max_steps": 2,
    "batch_size": 4,
    "lr": 0.01,
    "logging_steps": 1,
    "device": "cpu",
    "output_dir": "run",
    "progress": False,
}

_READ = (
    "weights.json",
    "config.json",
    "modules.json",
    "config_sentence_transformers.json",
    "metrics.jsonl",
)


@pytest.fixture(scope="module")
def places(tmp_path_factory, tiny_st_path, pairs_path, beir_path):
    """What the names in angle brackets stand for."""
    folder = tmp_path_factory.mktemp("every-key")
    rows = [json.loads(line) for line in pairs_path.read_text().splitlines()]
    swapped = folder / "pairs.jsonl"
    lines = [json.dumps({"query": r["positive"], "positive": r["query"]}) for r in rows]
    swapped.write_text("\n".join(lines))
    other = tiny_sentence_transformer(folder / "model", pooling="cls")
    pictures = write_pictures(folder / "pictures")
    (pictures / "flipped.png").write_bytes(flipped_png())
    (write_pictures(folder / "others") / "red.png").write_bytes(picture("blue"))
    captions = mode_rows("t2i")
    write_rows(folder / "captions.jsonl", captions)
    # Not among the rows of the first step, unless somebody looks ahead.
    damaged = [*captions, {"query": "a", "positive": "flipped.png"}]
    write_rows(folder / "damaged.jsonl", damaged)
    write_rows(folder / "urls.jsonl", [{"query": "a", "positive": "http://other.org/a.png"}])
    write_rows(folder / "bad.jsonl", [*rows, {"query": ""}])
    write_rows(folder / "repeated.jsonl", [*rows, *({**r, "query": r["positive"]} for r in rows)])
    labelled = [{"text": row["query"], "label": n % 4} for n, row in enumerate(rows)]
    write_rows(folder / "labelled.jsonl", labelled)
    return {
        "<model>": str(tiny_st_path),
        "<other model>": str(other),
        "<pairs>": str(pairs_path),
        "<swapped pairs>": str(swapped),
        "<beir>": str(beir_path),
        "<pictures>": str(pictures),
        "<other pictures>": str(folder / "others"),
        "<captions>": str(folder / "captions.jsonl"),
        "<damaged>": str(folder / "damaged.jsonl"),
        "<urls>": str(folder / "urls.jsonl"),
        "<bad row>": str(folder / "bad.jsonl"),
        "<repeated pairs>": str(folder / "repeated.jsonl"),
        "<labelled>": str(folder / "labelled.jsonl"),
    }


@pytest.fixture
def resolve(places):
    """Settings with the paths in place of their names."""

    def replace(settings: dict) -> dict:
        return {k: places.get(v, v) if isinstance(v, str) else v for k, v in settings.items()}

    return replace


def observe(settings: dict, folder: Path, monkeypatch, caplog) -> dict:
    """What a run with these settings leaves and says."""
    folder.mkdir()
    monkeypatch.chdir(folder)
    caplog.clear()
    AcceleratorState._reset_state(reset_partial_state=True)
    error = None
    with caplog.at_level(logging.INFO, logger="vembed"):
        try:
            run_training(settings)
        except VembedError as raised:
            error = str(raised)
    files = sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
    seen = {"error": error, "files": files, "log": caplog.messages}
    for path in map(Path, files):
        if path.name == "model.safetensors":
            seen[str(path)] = hashlib.sha256((folder / path).read_bytes()).hexdigest()
        elif path.name in _READ:
            seen[str(path)] = (folder / path).read_text()
    return seen


@pytest.fixture
def observed(tmp_path, monkeypatch, caplog, resolve):
    """Observes runs of `BASE` with some settings, each in a folder of its own."""
    numbers = iter(range(10))

    def run(**settings) -> dict:
        folder = tmp_path / str(next(numbers))
        return observe(resolve({**BASE, **settings}), folder, monkeypatch, caplog)

    return run


@pytest.fixture(scope="module")
def baselines() -> dict:
    """Observations that several tests compare with, by their settings."""
    return {}


@pytest.mark.parametrize("key", CHANGES)
def test_another_value_changes_the_run(key, observed, baselines):
    value, settings = CHANGES[key]
    name = json.dumps(settings)
    if name not in baselines:
        baselines[name] = observed(**settings)
    assert observed(**{**settings, key: value}) != baselines[name]


def test_the_same_settings_change_nothing(observed):
    assert observed() == observed()


@pytest.fixture
def forwards(observed, monkeypatch):
    """Counts how often a run with some settings calls the encoder to train on it."""
    embed = Trainer._embed

    def count(**settings) -> int:
        calls = []
        monkeypatch.setattr(
            Trainer, "_embed", lambda self, inputs: calls.append(1) or embed(self, inputs)
        )
        assert observed(**settings)["error"] is None
        return len(calls)

    return count


class TestWhatOnlyChangesHowARunComputes:
    """Named `test_KEY`, one for each key that is not in `CHANGES`."""

    def test_revision(self, resolve):
        messages = []
        for revision in (None, "abc123"):
            with pytest.raises(VembedError) as caught:
                build_model({"model_name": "owner/name", "revision": revision})
            messages.append(str(caught.value))
        assert "abc123" in messages[1]
        assert messages[0] != messages[1]

    def test_teacher_revision(self):
        messages = []
        for revision in (None, "abc123"):
            with pytest.raises(VembedError) as caught:
                build_teacher_model(
                    {"teacher_model_name": "owner/name", "teacher_revision": revision}
                )
            messages.append(str(caught.value))
        assert "abc123" in messages[1]
        assert messages[0] != messages[1]

    def test_teacher_chunk_size(self, resolve, tmp_path):
        settings = resolve({"teacher_model_name": "<model>", "data_path": "<pairs>"})
        for size, parts in ((1000, 1), (10, 5)):
            folder = tmp_path / str(size)
            teach({**settings, "teacher_cache": str(folder), "teacher_chunk_size": size})
            assert len(list(folder.glob("*.keys.npy"))) == parts

    def test_num_workers(self, observed, monkeypatch):
        counts = []
        build = torch.utils.data.DataLoader.__init__

        def spy(loader, *args, num_workers=0, **kwargs):
            counts.append(num_workers)
            build(loader, *args, num_workers=num_workers, **kwargs)

        monkeypatch.setattr(torch.utils.data.DataLoader, "__init__", spy)
        assert observed(num_workers=1)["error"] is None
        assert 1 in counts

    def test_token_cache(self, observed, monkeypatch):
        calls = []
        collate = Collator.__call__
        monkeypatch.setattr(
            Collator, "__call__", lambda self, records: calls.append(1) or collate(self, records)
        )
        runs = [observed(token_cache=value) for value in (True, False)]
        assert runs[0] == runs[1]
        assert runs[0]["error"] is None
        assert calls == [1, 1], "two steps, of the second run"

    def test_image_cache(self, observed, monkeypatch, tmp_path):
        decoded = []
        decode = pixel_cache.load_image
        monkeypatch.setattr(
            pixel_cache, "load_image", lambda source: decoded.append(source) or decode(source)
        )
        settings = {
            **PICTURES,
            "encoder_mode": "auto",
            "model_name": str(tiny_clip(tmp_path / "m")),
        }
        runs = [observed(**settings, image_cache=c) for c in (None, *[str(tmp_path / "c")] * 2)]
        for run in runs:
            assert run["error"] is None
            del run["log"]
        assert runs[0] == runs[1] == runs[2]
        assert len(decoded) == len(set(decoded)) > 0, "each once, in the second run"

    def test_chunk_tokens(self, forwards):
        # Two roles in each of two steps; then every text by itself.
        assert forwards(chunk_tokens=10_000) == 2 * 2
        assert forwards(chunk_tokens=1) == 2 * 2 * BASE["batch_size"]

    def test_gradient_cache_chunk_size_gradient_cache_chunk_tokens(self, forwards):
        # The cache encodes every chunk twice.
        cached = {"use_gradient_cache": True}
        assert forwards(**cached, gradient_cache_chunk_size=4) == 2 * 2 * 2
        assert forwards(**cached, gradient_cache_chunk_size=2) == 2 * 2 * 2 * 2
        each = 2 * 2 * 2 * BASE["batch_size"]
        assert forwards(**cached, gradient_cache_chunk_tokens=1) == each

    def test_use_gradient_cache_and_gradient_cache_keep(self, forwards):
        cached = {"use_gradient_cache": True, "gradient_cache_chunk_size": 4}
        assert forwards() == 2 * 2
        assert forwards(**cached) == 2 * 2 * 2
        # One of the two chunks of a step is not encoded again.
        assert forwards(**cached, gradient_cache_keep=1) == 2 * (2 * 2 - 1)

    def test_loss_tile_size(self, observed, monkeypatch):
        shapes = []
        tile_shape = tiling.tile_shape

        def spy(*args):
            shapes.append((args[3], tile_shape(*args)))
            return shapes[-1][1]

        monkeypatch.setattr(tiling, "tile_shape", spy)
        for size, shape in (("auto", (4, 4)), (3, (3, 3))):
            shapes.clear()
            assert observed(loss_tile_size=size)["error"] is None
            # The report of the first step has tiles of its own, which are always auto.
            assert {found for asked, found in shapes if asked == size} == {shape}
        refused = observed(loss_tile_size=3, loss_type="triplet")["error"]
        assert "'triplet' has no loss_tile_size" in refused

    def test_adapter_path(self, observed, tmp_path):
        first = observed(use_lora=True)
        kept = tmp_path / "0" / "run" / "final" / "adapter"
        second = observed(use_lora=True, adapter_path=str(kept))
        assert first["error"] is second["error"] is None
        saved = "run/final/model.safetensors"
        assert first[saved] != second[saved]
        # Steps from the same start lead to the first model again, not to the second.
        assert observed(use_lora=True)[saved] == first[saved]

    def test_gradient_checkpointing(self, resolve):
        settings = resolve({"model_name": "<model>"})
        assert not build_model(settings).backbone.is_gradient_checkpointing
        assert build_model(
            {**settings, "gradient_checkpointing": True}
        ).backbone.is_gradient_checkpointing

    def test_torch_compile_and_torch_compile_backend(self, observed, monkeypatch):
        backends = []
        monkeypatch.setattr(
            torch.nn.Module,
            "compile",
            lambda layer, *, backend, **_: backends.append(backend),
        )
        assert observed()["error"] is None
        assert backends == []
        compiled = {"torch_compile": True, "torch_compile_backend": "eager"}
        assert observed(**compiled)["error"] is None
        assert set(backends) == {"eager"}

    def test_process_timeout_s(self, observed, monkeypatch):
        timeouts = []
        assign = Watchdog.__init__

        def spy(watchdog, timeout_s):
            timeouts.append(timeout_s)
            assign(watchdog, timeout_s)

        monkeypatch.setattr(Watchdog, "__init__", spy)
        assert observed(process_timeout_s=77)["error"] is None
        assert timeouts == [77]

    def test_num_processes(self):
        check_process_count({"num_processes": 1}, 1)
        with pytest.raises(DistributedError):
            check_process_count({"num_processes": 2}, 1)

    def test_ddp_find_unused_parameters(self, observed, monkeypatch, places):
        encoder = load_encoder(places["<model>"])
        encoder.backbone.unused = torch.nn.Parameter(torch.zeros(1))
        monkeypatch.setattr("vembed.training.run.build_model", lambda config: encoder.train())
        assert "1 trainable parameters got no gradient" in observed()["error"]
        assert observed(ddp_find_unused_parameters=True)["error"] is None

    def test_distributed_strategy(self, observed):
        # What it changes: tests/distributed/test_sharding.py.
        assert "one process" in observed(distributed_strategy="fsdp2")["error"]

    def test_overwrite_output_dir(self, resolve, tmp_path):
        settings = resolve({**BASE, "output_dir": str(tmp_path / "run")})
        run_training(settings)
        with pytest.raises(ConfigError, match="holds an earlier run"):
            run_training(settings)
        run_training({**settings, "overwrite_output_dir": True})

    def test_resume_and_allow_inexact_resume(self, resolve, tmp_path):
        settings = resolve({**BASE, "output_dir": str(tmp_path / "run"), "save_steps": 1})
        first = run_training(settings).state.history
        with pytest.raises(ConfigError, match=r"set resume: auto"):
            run_training(settings)
        assert run_training({**settings, "resume": "auto"}).state.history == first
        with pytest.raises(ConfigError, match=r"lr: 0\.5, was 0\.01"):
            run_training({**settings, "resume": "auto", "lr": 0.5})
        allowed = {"resume": "auto", "allow_inexact_resume": True}
        run_training({**settings, **allowed, "lr": 0.5})

    def test_run_name_and_tags(self):
        arguments = resolve_tracker("wandb", run_name="name", tags=["tag"]).init_kwargs["wandb"]
        assert (arguments["name"], arguments["tags"]) == ("name", ["tag"])

    def test_run_name_tags_and_project_name_arrive(self, observed, monkeypatch):
        calls = []

        def init_trackers(accelerator, project_name, config=None, init_kwargs=None):
            calls.append((project_name, init_kwargs["wandb"]["name"], init_kwargs["wandb"]["tags"]))

        monkeypatch.setattr(Accelerator, "init_trackers", init_trackers)
        observed(report_to=["wandb"], project_name="project", run_name="name", tags=["tag"])
        assert calls == [("project", "name", ["tag"])]

    def test_progress(self, observed):
        shown = [" ".join(observed(progress=wanted)["log"]) for wanted in (True, False)]
        assert ["step 2/2" in lines for lines in shown] == [True, False]


def test_no_key_is_forgotten():
    own = " ".join(name for name in dir(TestWhatOnlyChangesHowARunComputes) if "test_" in name)
    proven = {key for key in TrainConfig.model_fields if key in CHANGES or key in own}
    assert set(TrainConfig.model_fields) - proven == set()
    assert set(CHANGES) <= set(TrainConfig.model_fields)
