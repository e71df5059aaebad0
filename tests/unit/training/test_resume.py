"""A run that goes on from a checkpoint is, bit by bit, the run that was never interrupted."""

from __future__ import annotations

import json
import logging
import random
import shutil

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState, GradientState

from tests.tiny import PAIRS, tiny_bert, write_rows
from tests.unit.training.resuming import (
    VARIANTS,
    digests,
    later,
    make_places,
    run_rest,
    run_whole,
    settings_of,
)
from tests.unit.training.test_trainer import make_batches, make_trainer
from vembed.config import TrainConfig
from vembed.errors import CheckpointError, ConfigError
from vembed.training.gradient_cache import GradientCache
from vembed.training.manifest import read_manifest
from vembed.training.optimizer_state import (
    OptimizerState,
    load_optimizer_state,
    optimizer_state,
    require_json,
)
from vembed.training.random_states import RandomStates, undisturbed
from vembed.training.resume import FREE_KEYS, changed_settings
from vembed.training.rotation import newest_checkpoint
from vembed.training.run import run_training
from vembed.training.verification.resume import verify_resume


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    return make_places(tmp_path_factory.mktemp("resume"))


@pytest.fixture(autouse=True)
def _fresh():
    reset()


def reset() -> None:
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


@pytest.mark.parametrize("name", VARIANTS)
def test_the_rest_of_a_run_is_bit_identical(places, tmp_path, name):
    cut, settings = VARIANTS[name]
    settings = settings_of(places, tmp_path / "whole", **settings, save_steps=cut)
    whole = run_whole({**settings, "num_workers": 0})
    reset()
    rest = run_rest(settings, tmp_path / "rest", cut)
    assert rest == later(whole, cut)
    assert "metrics.jsonl" in rest
    assert any(name.startswith("final/") for name in rest)


def test_every_optimizer_state_is_compared_because_checkpoints_hold_it(places, tmp_path):
    settings = settings_of(places, tmp_path / "run", save_steps=4)
    found = run_whole(settings)
    folder = "checkpoints/step-000008/state/"
    assert {f"{folder}{name}.safetensors" for name in ("weights", "optimizer", "process-0")} <= {
        *found
    }


@pytest.fixture(scope="module")
def finished(places, tmp_path_factory):
    folder = tmp_path_factory.mktemp("auto") / "run"
    reset()
    settings = settings_of(
        places, folder, save_steps=3, save_total_limit=2, resume="auto",
        val_data_path="<pairs>", eval_steps=4,
    )  # fmt: skip
    return settings, run_whole(settings)


class TestASecondStart:
    """`resume: auto`: one command line for the first start and every other."""

    @pytest.fixture
    def run(self, finished, tmp_path):
        """A copy of the finished run, to be harmed."""
        settings, found = finished
        shutil.copytree(settings["output_dir"], tmp_path / "run")
        return {**settings, "output_dir": str(tmp_path / "run")}, found, tmp_path / "run"

    def test_of_a_finished_run_changes_nothing(self, run):
        settings, found, folder = run
        run_training(settings)
        assert digests(folder) == found

    def test_falls_back_to_the_checkpoint_before_a_damaged_one(self, run, caplog):
        settings, found, folder = run
        (folder / "checkpoints" / "step-000006" / "state" / "run.json").unlink()
        (folder / "metrics.jsonl").write_text('{"torn')
        with caplog.at_level(logging.WARNING, logger="vembed"):
            run_training(settings)
        warned = [text for text in caplog.messages if "damaged" in text]
        assert len(warned) == 1
        assert "step-000006/state/run.json: is missing" in warned[0]
        left = digests(folder)
        assert {n: d for n, d in left.items() if ".damaged/" not in n} == found

    def test_every_damage_to_every_file_is_found(self, run, caplog):
        _, _, folder = run
        newest = folder / "checkpoints" / "step-000006"
        files = [path for path in newest.rglob("*") if path.is_file()]
        assert len(files) > 12
        for file in files:
            whole = file.read_bytes()
            middle = len(whole) // 2
            flip = whole[:middle] + bytes([whole[middle] ^ 4]) + whole[middle + 1 :]
            for damage in (None, b"", whole[: len(whole) * 6 // 10], flip):
                caplog.clear()
                file.unlink()
                if damage is not None:
                    file.write_bytes(damage)
                assert newest_checkpoint(folder).step == 3
                assert [str(file) in text for text in caplog.messages] == [True]
                file.write_bytes(whole)
        assert newest_checkpoint(folder).step == 6

    def test_without_a_whole_checkpoint_says_which_files(self, run):
        settings, _, folder = run
        for weights in folder.glob("checkpoints/*/state/weights.safetensors"):
            weights.write_bytes(weights.read_bytes()[:-1])
        with pytest.raises(CheckpointError, match="no checkpoint is whole") as caught:
            run_training(settings)
        assert str(caught.value).count("state/weights.safetensors: has") == 2

    def test_a_lost_best_model_is_told_and_replaced(self, run, caplog):
        settings, found, folder = run
        shutil.rmtree(folder / "best")
        with caplog.at_level(logging.WARNING, logger="vembed"):
            run_training(settings)
        assert "is lost; the next validation starts anew" in caplog.text
        assert (folder / "best" / "model.safetensors").is_file()
        assert digests(folder)["final/model.safetensors"] == found["final/model.safetensors"]

    def test_leftovers_are_removed(self, run):
        settings, found, folder = run
        for name in ("checkpoints/.tmp-step-000009", ".trash-final", ".tmp-best"):
            (folder / name).mkdir()
            (folder / name / "model.safetensors").write_bytes(b"half")
        run_training(settings)
        assert digests(folder) == found

    def test_another_setting_stops_and_says_which(self, run):
        settings, _, _ = run
        with pytest.raises(ConfigError) as caught:
            run_training({**settings, "lr": 0.5, "batch_size": 5})
        assert "  batch_size: 5, was 4\n  lr: 0.5, was 0.01\n" in str(caught.value)
        assert "allow_inexact_resume: true" in str(caught.value)

    def test_other_rows_stop(self, run, tmp_path):
        settings, _, _ = run
        other = write_rows(tmp_path / "other.jsonl", PAIRS[:21])
        with pytest.raises(ConfigError, match="data_path: the training rows are other ones"):
            run_training({**settings, "data_path": str(other)})

    def test_the_same_rows_elsewhere_do_not_matter(self, run, tmp_path):
        settings, found, folder = run
        moved = shutil.copy(settings["data_path"], tmp_path / "moved.jsonl")
        run_training({**settings, "data_path": str(moved), "process_timeout_s": 900})
        assert digests(folder) == found

    def test_another_base_model_stops_where_its_weights_are_frozen(self, places, tmp_path):
        model = shutil.copytree(places["<bert>"], tmp_path / "model")
        settings = settings_of(
            places, tmp_path / "run", use_lora=True, model_name=str(model), save_steps=4,
            resume="auto",
        )  # fmt: skip
        run_training(settings)
        shutil.rmtree(model)
        tiny_bert(model, seed=5)
        reset()
        with pytest.raises(CheckpointError, match="the frozen weights are not those"):
            run_training(settings)

    def test_more_steps_need_a_schedule_without_an_end(self, places, run, tmp_path):
        settings, _, _ = run
        with pytest.raises(ConfigError, match=r"steps .*: 12, were 8; scheduler_type linear"):
            run_training({**settings, "max_steps": 12})
        with pytest.raises(ConfigError, match="is at step 6, but this run has 5 steps"):
            run_training({**settings, "max_steps": 5})
        endless = settings_of(
            places, tmp_path / "endless", scheduler_type="constant", save_steps=4, resume="auto"
        )
        reset()
        run_training(endless)
        reset()
        longer = run_whole({**endless, "max_steps": 10})
        reset()
        shutil.rmtree(tmp_path / "endless")
        whole = run_whole({**endless, "max_steps": 10})
        assert longer["final/model.safetensors"] == whole["final/model.safetensors"]

    def test_inexact_goes_on_and_says_what_it_did(self, run, caplog):
        settings, found, folder = run
        changed = {**settings, "allow_inexact_resume": True, "batch_size": 8, "lr": 0.002}
        with caplog.at_level(logging.WARNING, logger="vembed"):
            result = run_training(changed)
        assert "batch_size: 8, was 4; lr: 0.002, was 0.01" in caplog.text
        # 22 rows are 6 steps of 4 and 3 of 8: the end of the pass is the end of the pass.
        assert "goes on after step 3 of epoch 1" in caplog.text
        assert result.state.step == 8
        # A quarter of the linear schedule is left, of the new rate.
        rates = [line["lr"] for line in result.state.history if "lr" in line]
        assert rates[-1] == 0.0
        assert digests(folder)["final/model.safetensors"] != found["final/model.safetensors"]


class TestWhereARunMayGo:
    def test_a_folder_with_a_run_is_left_alone_by_default(self, places, tmp_path):
        settings = settings_of(places, tmp_path / "run", save_steps=4)
        run_training(settings)
        with pytest.raises(ConfigError, match="from its step 8, set resume: auto"):
            run_training(settings)

    def test_a_finished_run_without_checkpoints_is_not_started_again(self, places, tmp_path):
        settings = settings_of(places, tmp_path / "run", save_steps=0, max_steps=1, resume="auto")
        run_training(settings)
        with pytest.raises(ConfigError, match="came to its end and has no checkpoint"):
            run_training(settings)

    def test_a_run_killed_before_its_first_checkpoint_starts_over(self, places, tmp_path):
        settings = settings_of(places, tmp_path / "run", save_steps=0, max_steps=1, resume="auto")
        run_training(settings)
        shutil.move(tmp_path / "run" / "final", tmp_path / "run" / "best")
        shutil.rmtree(tmp_path / "run" / "report", ignore_errors=True)
        run_training(settings)
        assert (tmp_path / "run" / "final").is_dir()
        # The same settings would find it again; until then it is all there is.
        assert (tmp_path / "run" / "best").is_dir()

    def test_another_run_in_the_folder_is_not_mixed_with(self, places, tmp_path):
        settings = settings_of(places, tmp_path / "one", save_steps=4)
        run_training(settings)
        reset()
        run_training({**settings, "output_dir": str(tmp_path / "two")})
        start = str(tmp_path / "one" / "checkpoints" / "step-000004")
        with pytest.raises(ConfigError, match="holds another run than the one to go on with"):
            run_training({**settings, "output_dir": str(tmp_path / "two"), "resume": start})

    def test_killed_before_its_first_checkpoint_starts_there_again(self, places, tmp_path):
        settings = settings_of(places, tmp_path / "one", save_steps=4)
        run_training(settings)
        whole = digests(tmp_path / "one")
        start = str(tmp_path / "one" / "checkpoints" / "step-000004")
        elsewhere = {**settings, "output_dir": str(tmp_path / "two"), "resume": start}
        reset()
        run_training(elsewhere)
        with pytest.raises(ConfigError, match="Set resume: auto to go on with it"):
            run_training(elsewhere)
        for name in ("checkpoints", "final", "report"):
            shutil.rmtree(tmp_path / "two" / name, ignore_errors=True)
        reset()
        run_training(elsewhere)
        found = digests(tmp_path / "two")
        assert found["final/model.safetensors"] == whole["final/model.safetensors"]

    def test_the_best_model_comes_along(self, places, tmp_path):
        settings = settings_of(
            places, tmp_path / "one", save_steps=8, val_data_path="<pairs>", eval_steps=4
        )
        whole = run_whole(settings)
        reset()
        # Nothing is left to be done, so nothing else could write it.
        rest = run_rest(settings, tmp_path / "two", 8)
        assert rest["best/model.safetensors"] == whole["best/model.safetensors"]

    def test_a_whole_run_may_be_named(self, places, tmp_path):
        settings = settings_of(places, tmp_path / "one", save_steps=3)
        whole = run_whole(settings)
        reset()
        again = {**settings, "output_dir": str(tmp_path / "two"), "resume": str(tmp_path / "one")}
        assert run_whole(again) == later(whole, 6)

    def test_the_folder_of_checkpoints_is_none_of_them(self, places, tmp_path):
        settings = settings_of(places, tmp_path / "one", save_steps=3, max_steps=3)
        run_training(settings)
        settings |= {"resume": str(tmp_path / "one" / "checkpoints")}
        settings |= {"output_dir": str(tmp_path / "two")}
        with pytest.raises(ConfigError, match="Name one of them, or .*one, which starts"):
            run_training(settings)

    def test_an_older_checkpoint_is_not_gone_on_from_inexactly_beside_newer_ones(
        self, places, tmp_path
    ):
        settings = settings_of(places, tmp_path / "one", save_steps=3)
        run_training(settings)
        start = tmp_path / "one" / "checkpoints" / "step-000003"
        settings |= {"resume": str(start), "allow_inexact_resume": True, "lr": 0.5}
        with pytest.raises(ConfigError, match="holds checkpoints after step 3"):
            run_training(settings)

    @pytest.mark.parametrize(
        ("name", "message"),
        [("nowhere", "is no folder"), ("empty", "manifest.json: is missing")],
    )
    def test_what_is_no_checkpoint(self, places, tmp_path, name, message):
        (tmp_path / "empty").mkdir()
        settings = settings_of(places, tmp_path / "run", resume=str(tmp_path / name))
        with pytest.raises((ConfigError, CheckpointError), match=message):
            run_training(settings)

    def test_a_model_folder_is_no_checkpoint(self, places, tmp_path):
        settings = settings_of(places, tmp_path / "run", save_steps=0, max_steps=1)
        run_training(settings)
        settings |= {"output_dir": str(tmp_path / "b"), "resume": str(tmp_path / "run" / "final")}
        with pytest.raises(CheckpointError, match=r"is no checkpoint of a run"):
            run_training(settings)


def test_checkpoints_of_the_best_values_stay(places, tmp_path):
    settings = settings_of(
        places, tmp_path / "run", save_total_limit=2, save_top_k=2, val_data_path="<pairs>",
        eval_steps=1, metric_for_best="loss", optimizer="sgd",
        optimizer_kwargs={"maximize": True},
    )  # fmt: skip
    run_training(settings)
    folders = sorted((tmp_path / "run" / "checkpoints").iterdir())
    # The loss rises: the first two are the best.
    assert [path.name[-1] for path in folders] == ["1", "2", "7", "8"]
    values = [read_manifest(path).facts["value"] for path in folders]
    assert values == sorted(values)


class TestTheTrainerAlone:
    """Without `run_training`: a list of batches, a model of the user's own."""

    def test_goes_on(self, tmp_path):
        whole = make_trainer(tmp_path / "a", epochs=2, save_steps=3)
        whole.train()
        rest = make_trainer(tmp_path / "b", epochs=2)
        state = rest.train(resume_from=tmp_path / "a" / "checkpoints" / "step-000003")
        assert state.step == 8
        assert state.history == whole.state.history
        assert torch.equal(rest.model.words.weight, whole.model.words.weight)
        assert torch.equal(rest.criterion.logit_scale, whole.criterion.logit_scale)

    def test_a_loader_that_cannot_start_in_the_middle_is_refused(self, tmp_path):
        make_trainer(tmp_path / "a", save_steps=3).train()
        start = tmp_path / "a" / "checkpoints" / "step-000003"

        class Batches:
            def __len__(self):
                return 4

            def __iter__(self):
                return iter(make_batches())

        refused = make_trainer(tmp_path / "b", batches=Batches())
        with pytest.raises(ConfigError, match=r"set_epoch\(epoch, start_batch=N\).*Batches"):
            refused.train(resume_from=start)
        allowed = make_trainer(
            tmp_path / "c", batches=Batches(), allow_inexact_resume=True, resume="auto"
        )
        assert allowed.train(resume_from=start).step == 4

    def test_another_model_does_not_fit(self, tmp_path):
        make_trainer(tmp_path / "a", save_steps=3).train()
        other = make_trainer(tmp_path / "b")
        other.model.words = torch.nn.EmbeddingBag(31, 4)
        other.optimizer.param_groups[0]["params"][0] = other.model.words.weight
        with pytest.raises(CheckpointError, match=r"does not fit the model.*model\.words\.weight"):
            other.train(resume_from=tmp_path / "a" / "checkpoints" / "step-000003")

    def test_a_parameter_that_nobody_would_keep_is_told(self, tmp_path):
        trainer = make_trainer(tmp_path, save_steps=1)
        trainer.optimizer.add_param_group({"params": [torch.nn.Parameter(torch.zeros(1))]})
        with pytest.raises(CheckpointError, match="trains 1 parameters that are part of neither"):
            trainer.train()
        assert not list((tmp_path / "checkpoints").iterdir())


class TestOptimizerState:
    def test_is_not_cast_to_the_type_of_the_weights(self):
        parameter = torch.nn.Parameter(torch.zeros(3, dtype=torch.bfloat16))
        optimizer = torch.optim.SGD([parameter], lr=0.1)
        exact = torch.tensor([1 + 2**-20, 2.0, 3.0])
        optimizer.state[parameter] = {"mean": exact, "count": 7, "none": None}
        kept = optimizer_state(optimizer)
        kept = OptimizerState(kept.tensors, json.loads(json.dumps(kept.facts)))
        fresh = torch.optim.SGD([parameter], lr=0.5)
        load_optimizer_state(fresh, kept)
        assert torch.equal(fresh.state[parameter]["mean"], exact)
        assert fresh.state[parameter]["mean"].dtype == torch.float32
        assert (fresh.state[parameter]["count"], fresh.state[parameter]["none"]) == (7, None)
        assert fresh.param_groups[0]["lr"] == 0.1
        # What torch itself does, or this would show nothing.
        torch_own = torch.optim.SGD([parameter], lr=0.5)
        torch_own.load_state_dict(optimizer.state_dict())
        assert not torch.equal(torch_own.state[parameter]["mean"].float(), exact)

    def test_of_other_groups_is_refused(self):
        one = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.1)
        two = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1)) for _ in range(2)], lr=0.1)
        with pytest.raises(CheckpointError, match=r"groups of \[2\], not of \[1\]"):
            load_optimizer_state(two, optimizer_state(one))

    def test_what_json_cannot_hold_is_named(self):
        with pytest.raises(CheckpointError, match="it remembers a set"):
            require_json({"a": {1}}, "it")


class TestRandomStates:
    def test_all_generators_go_on(self):
        device = torch.device("cpu")
        states = RandomStates.take(device)
        states = RandomStates(states.tensors, json.loads(json.dumps(states.others)))

        def draw():
            of_numpy = np.random.rand(3).tolist()  # noqa: NPY002 - the global generator
            return torch.rand(3).tolist(), of_numpy, random.random()

        first = draw()
        draw()
        states.restore(device)
        assert draw() == first

    def test_undisturbed(self):
        before = torch.get_rng_state()
        with undisturbed(torch.device("cpu")):
            torch.rand(5)
        assert torch.equal(torch.get_rng_state(), before)


def test_what_a_cache_has_measured_decides_how_it_cuts():
    one = GradientCache(chunk_size="auto", keep="auto")
    one.chunk_tokens, one._budget, one._bytes_per_token = 12, 1000, {"query": 1.5}
    other = GradientCache(chunk_size="auto", keep="auto")
    other.take_measured(json.loads(json.dumps(one.measured())))
    assert other.measured() == one.measured()
    fixed = GradientCache(chunk_tokens=5)
    fixed.take_measured(one.measured())
    assert fixed.chunk_tokens == 5


class TestChangedSettings:
    def test_free_keys_are_settings(self):
        assert set(TrainConfig.model_fields) >= FREE_KEYS

    def test_what_an_older_version_did_not_know_had_its_default(self):
        before = TrainConfig().model_dump(mode="json")
        del before["lr_groups"]
        assert changed_settings(before, TrainConfig()) == []
        changed = changed_settings(before, TrainConfig(lr_groups={"a": 2}))
        assert changed == ["lr_groups: {'a': 2.0}, was {}"]

    def test_a_secret_that_was_not_written_down_has_not_changed(self):
        config = TrainConfig(loss_kwargs={"api_key": "hf_" + "a1B2" * 9})
        assert config.redacted() != config.model_dump(mode="json")
        assert changed_settings(config.redacted(), config) == []

    def test_a_stream_is_known_by_its_path(self):
        before = TrainConfig(data_path="a").model_dump(mode="json")
        assert changed_settings(before, TrainConfig(data_path="b")) == []
        streamed = {"streaming": True}
        assert changed_settings({**before, **streamed}, TrainConfig(data_path="b", **streamed))


class TestVerifyResume:
    def test_passes(self, places, tmp_path):
        settings = settings_of(places, tmp_path / "unused", use_lora=True)
        found = verify_resume(settings, steps=1)
        assert found.passed
        assert [part.name for part in found.parts] == [
            "weights", "optimizer", "random states", "lines of metrics.jsonl"
        ]  # fmt: skip
        assert all(part.total for part in found.parts)
        assert not (tmp_path / "unused").exists()

    def test_finds_other_random_numbers(self, places, tmp_path, monkeypatch):
        monkeypatch.setattr(RandomStates, "restore", lambda *_: None)
        found = verify_resume(settings_of(places, tmp_path / "unused"), steps=1)
        assert not found.passed
        assert found.repeats
        assert "step 2" in found.parts[3].different

    def test_bad_numbers(self, places, tmp_path):
        with pytest.raises(ConfigError, match="steps: must be at least 1"):
            verify_resume(settings_of(places, tmp_path / "unused"), steps=0)
