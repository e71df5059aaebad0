"""Every check of `vembed doctor` finds what it is for, and is content where nothing is wrong."""

import os
import socket
import stat
import sys

import pytest

from vembed.config import TrainConfig
from vembed.training.environment import examine
from vembed.training.environment.launching import check_launcher, check_leftovers
from vembed.training.environment.machine import (
    check_files,
    check_locale,
    check_output_dir,
    check_shared_memory,
    check_threads,
    check_tokenizers,
    cpu_quota,
)
from vembed.training.environment.network import check_hub
from vembed.training.environment.packages import (
    TorchBuild,
    check_extras,
    check_gpu,
    check_python,
    check_torchvision,
    check_versions,
    torch_build,
)

CONFIG, WORKERS = TrainConfig(), TrainConfig(num_workers=4)
CUDA = TorchBuild("2.13.0+cu130", "13.0", None)
CPU = TorchBuild("2.13.0+cpu", None, None)


def judged(finding, level: str, *words: str) -> None:
    shown = f"{finding.found} / {finding.remedy}"
    assert finding.level == level, shown
    assert all(word in shown for word in words), shown
    assert bool(finding.remedy) == (level != "ok")


def versions(**installed: str):
    return installed.get


def test_python():
    judged(check_python(), "ok")
    judged(check_python((3, 10, 4)), "problem", "Python 3.10.4", "3.11")
    judged(check_python((3, 12, 0), bits=32), "problem", "32 bits")


def test_versions():
    judged(check_versions(), "ok")
    wanted = [
        "torch>=2.12",
        "numpy>=2.0,<3",
        'wandb>=1; extra == "trackers"',
        'a; python_version<"3"',
    ]
    judged(check_versions(versions(torch="2.13.0+cpu", numpy="2.1"), wanted), "ok", "2 of 2")
    judged(
        check_versions(versions(torch="2.11", numpy="2.1"), wanted), "problem", "2.11 is installed"
    )
    judged(check_versions(versions(torch="2.13"), wanted), "problem", "numpy", "pip install 'numpy")


def test_extras():
    everything = versions(wandb="1", swanlab="1", tensorboard="1")
    judged(check_extras(CONFIG, everything), "ok")
    judged(check_extras(CONFIG, versions(wandb="1")), "warning", "swanlab", "vembed[trackers]")
    asked = TrainConfig(report_to="swanlab")
    judged(check_extras(asked, versions(wandb="1")), "problem", "report_to: swanlab", "pip install")
    quantized = TrainConfig(use_lora=True, lora_quantization="4bit")
    judged(check_extras(quantized, everything), "problem", "pip install bitsandbytes")
    flash = TrainConfig(attn_implementation="flash_attention_2")
    judged(check_extras(flash, everything), "problem", "flash-attn")


def test_torchvision():
    fits, broken = (
        versions(torch="2.13+cpu", torchvision="0.28+cpu"),
        "raise RuntimeError('no nms')",
    )
    judged(check_torchvision(versions(torch="2.13")), "ok", "not installed")
    judged(check_torchvision(fits, [sys.executable, "-c", ""]), "ok", "can be imported")
    judged(
        check_torchvision(fits, [sys.executable, "-c", broken]), "problem", "no nms", "uninstall"
    )
    other = versions(torch="2.13+cpu", torchvision="0.28+cu130")
    judged(check_torchvision(other, ["/no/such/program"]), "problem", "built for another")
    crash = [sys.executable, "-c", "import os; os.abort()"]
    judged(check_torchvision(fits, crash), "problem", "it says nothing")


def smi(driver: str = "580.1", cuda: str = "13.0") -> list[str]:
    return [sys.executable, "-c", f"print('| Driver Version: {driver}   CUDA Version: {cuda} |')"]


def test_gpu():
    judged(check_gpu(CONFIG, CUDA, smi=smi(), environment={}), "ok", "driver 580.1")
    judged(check_gpu(CONFIG, CPU, smi=smi(), environment={}), "problem", "built without CUDA")
    judged(check_gpu(CONFIG, CUDA, smi=smi("550.5", "12.4"), environment={}), "problem", "12.4")
    fails = [
        sys.executable,
        "-c",
        "print('cannot communicate with the driver'); raise SystemExit(9)",
    ]
    judged(check_gpu(CONFIG, CUDA, smi=fails), "problem", "cannot communicate", "driver")
    hidden = {"CUDA_VISIBLE_DEVICES": ""}
    judged(check_gpu(CONFIG, CUDA, smi=smi(), environment=hidden), "warning", "hides it")
    judged(check_gpu(TrainConfig(device="cpu"), CPU, smi=smi(), environment={}), "ok", "leaves it")


def test_the_build_of_torch_is_read_without_importing_it():
    import torch

    build = torch_build()
    assert build == TorchBuild(torch.__version__, torch.version.cuda, torch.version.hip)


@pytest.mark.parametrize(
    ("text", "level", "words"),
    [
        ("", "ok", []),
        ("num_processes: 2\ndistributed_type: MULTI_GPU", "ok", ["2 processes"]),
        ("num_processes: 1\ndistributed_type: 'NO'", "ok", []),
        ("num_processes: 2\ndistributed_type: MULTI_CPU\nuse_cpu: true", "problem", ["starts one"]),
        ("num_processes: 4\ndistributed_type: NO", "problem", ["starts one", "vembed train --num"]),
        ("num_processes: 4\ndistributed_type: FSDP", "problem", ["distributed_strategy: fsdp2"]),
        ("num_processes: [", "problem", ["cannot be read"]),
    ],
)
def test_what_accelerate_was_told(tmp_path, text, level, words):
    file = tmp_path / "default_config.yaml"
    file.write_text(text)
    judged(check_launcher(file), level, *words)
    judged(check_launcher(tmp_path / "none.yaml"), "ok")


def test_variables_that_a_launcher_left():
    judged(check_leftovers({}), "ok", "none")
    judged(check_leftovers({"WORLD_SIZE": "2", "RANK": "0"}), "problem", "wait for 2", "unset RANK")


def test_threads():
    judged(check_threads(CONFIG, {}, cores=8, quota=8), "ok", "1 x 8")
    judged(check_threads(CONFIG, {}, cores=64, quota=4), "warning", "4", "OMP_NUM_THREADS=4")
    several, many = TrainConfig(num_processes=4), {"OMP_NUM_THREADS": "8"}
    judged(check_threads(several, many, cores=8, quota=8), "warning", "4 x 8", "OMP_NUM_THREADS=2")
    judged(check_threads(several, {}, cores=8, quota=8), "ok", "4 x 2")
    judged(
        check_threads(CONFIG, {"OMP_NUM_THREADS": "x"}, cores=2, quota=2), "problem", "no number"
    )
    judged(check_threads(CONFIG, {"OMP_NUM_THREADS": "1"}, cores=8, quota=8), "warning", "=8")


def test_the_share_of_a_container(tmp_path):
    (tmp_path / "cpu.max").write_text("250000 100000\n")
    assert cpu_quota(tmp_path / "cpu.max") == 2.5
    (tmp_path / "cpu.max").write_text("max 100000\n")
    assert cpu_quota(tmp_path / "cpu.max") == cpu_quota(tmp_path / "none") == float("inf")


def test_tokenizers():
    judged(check_tokenizers(CONFIG, {}), "ok")
    judged(check_tokenizers(CONFIG, {"TOKENIZERS_PARALLELISM": "false"}), "warning", "unset TOKEN")
    judged(check_tokenizers(CONFIG, {"RAYON_NUM_THREADS": "1"}), "warning", "RAYON_NUM_THREADS=1")
    judged(check_tokenizers(WORKERS, {"TOKENIZERS_PARALLELISM": "false"}), "ok", "4 workers")


@pytest.mark.skipif(sys.platform != "linux", reason="there is no /dev/shm")
def test_shared_memory(tmp_path, monkeypatch):
    judged(check_shared_memory(WORKERS), "ok")
    judged(check_shared_memory(WORKERS, tmp_path / "none"), "problem", "--shm-size")
    judged(check_shared_memory(CONFIG, tmp_path / "none"), "warning")
    small = os.statvfs_result((4096, 4096, 16384, 16384, 16384, 9, 9, 9, 0, 255))  # 64 MB
    monkeypatch.setattr(os, "statvfs", lambda path: small)
    judged(check_shared_memory(WORKERS), "problem", "64 MB free")
    judged(check_shared_memory(CONFIG), "warning", "64 MB free", "num_workers: 0")


def test_open_files():
    judged(check_files(CONFIG, 1024), "ok")
    judged(check_files(WORKERS, 1024), "warning", "ulimit -n 4096")
    judged(check_files(CONFIG, 128), "problem", "128")


def test_the_disk(tmp_path, monkeypatch):
    config = TrainConfig(output_dir=str(tmp_path / "a" / "b"))
    judged(check_output_dir(config, free=2**40), "ok", str(tmp_path), "MB/s")
    judged(check_output_dir(config, free=2**20), "problem", "Make room")
    judged(check_output_dir(config, free=2**32), "warning", "4.0 GB", "may not fit")
    assert not list(tmp_path.iterdir())
    monkeypatch.setattr("vembed.training.environment.machine._write_speed", lambda folder: 3.0)
    judged(check_output_dir(config, free=2**40), "warning", "3 MB/s", "local disk")

    def read_only(folder):
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr("vembed.training.environment.machine._write_speed", read_only)
    judged(check_output_dir(config, free=2**40), "problem", "Read-only file system")


def test_the_hub(tmp_path, monkeypatch):
    here = {"HF_HOME": str(tmp_path / "cache")}
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        found = check_hub(CONFIG, {**here, "HF_ENDPOINT": f"http://127.0.0.1:{port}"})
        judged(found, "ok", "answers")
    closed = {**here, "HF_ENDPOINT": f"http://127.0.0.1:{port}"}
    judged(check_hub(CONFIG, closed), "warning", "does not answer", "mirror")
    judged(check_hub(CONFIG, {**closed, "HTTPS_PROXY": "http://p"}), "ok", "proxy")
    judged(check_hub(TrainConfig(model_name=str(tmp_path)), closed), "ok", "is a folder")
    judged(check_hub(CONFIG, {**here, "HF_HUB_OFFLINE": "1"}), "warning", "unset HF_HUB_OFFLINE")
    (tmp_path / "file").touch(mode=stat.S_IRUSR)
    judged(check_hub(CONFIG, {"HF_HOME": str(tmp_path / "file")}), "problem", "HF_HOME")


def test_the_language():
    judged(check_locale({"files": "utf-8", "output": "UTF8"}), "ok")
    judged(check_locale({"files": "ANSI_X3.4-1968", "names": "utf-8"}), "warning", "ANSI", "LANG")


def test_all_of_them_have_names_of_their_own(tmp_path):
    findings = list(examine(TrainConfig(output_dir=str(tmp_path))))
    assert len({finding.name for finding in findings}) == len(findings) == 14
