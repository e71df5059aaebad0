"""Symbol search, with a small CLIP that is trained from scratch: nothing is downloaded."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import yaml
from rich.console import Console

from vembed.quickstart.glyphs import IMAGE_SIZE
from vembed.quickstart.settings import refuse_settings
from vembed.quickstart.symbols import TEST_FONT, TRAIN_FONTS, SymbolSearch, build_symbol_search
from vembed.training.config import load_and_parse_config

if TYPE_CHECKING:
    from vembed.training.outcome import RunResult

GALLERY_FILE = "gallery.png"
RECIPE = Path(__file__).with_name("images.yaml")
OWN_SETTINGS = ("model_name", "data_path", "test_data_path", "image_root")


def main(argv: Sequence[str]) -> int:
    """Draw the data, make a model, train it, show what it finds.

    Args:
        argv: Flags of `vembed train`; they win over the settings of the recipe.

    Raises:
        ConfigError: if a setting is wrong, or a font is missing.
    """
    config = load_and_parse_config(
        ["--config", str(RECIPE), *argv], prog="vembed quickstart images"
    )
    refuse_settings(config, OWN_SETTINGS, recipe="vembed quickstart images")
    console = Console(highlight=False, soft_wrap=True)
    console.print("[bold]vembed quickstart images[/]: teach a model to find symbols by their names")
    console.print("\n[bold]1. Data[/]: symbols, drawn with the fonts that matplotlib carries")
    folder = Path(config.output_dir)
    task = build_symbol_search(folder / "data")
    sizes = {name: f"{count:,}" for name, count in task.sizes.items()}
    console.print(
        f"   {sizes['train']} names with {sizes['pictures']} pictures in {len(TRAIN_FONTS)} fonts "
        f"to train on; {sizes['test']} names to find in {TEST_FONT.name}, which is not among them"
    )
    console.print("\n[bold]2. Model[/]: an untrained CLIP of 1 million weights, and its tokenizer")
    # Only now, after the first words: importing torch takes seconds.
    from vembed.quickstart.small_clip import write_small_clip
    from vembed.training.console import configure_logging

    configure_logging(main_process=True)
    model = write_small_clip(
        folder / "untrained", texts=task.names, image_size=IMAGE_SIZE, seed=config.seed
    )
    console.print("\n[bold]3. Training[/]: measure it, train it, measure it again")
    own = (str(model), str(task.train), str(task.test), str(task.images))
    places = dict(zip(OWN_SETTINGS, own, strict=True))
    for key, value in places.items():
        config[key] = value
    settings = folder / "data" / "train.yaml"
    settings.write_text(f"{RECIPE.read_text()}\n{yaml.safe_dump(places)}", encoding="utf-8")
    from vembed.training.run import run_training

    result = run_training(config)
    console.print(_next_steps(result, settings, task))
    return 0


def _next_steps(result: RunResult, settings: Path, task: SymbolSearch) -> str:
    picture = "" if result.report_path is None else result.report_path.with_name(GALLERY_FILE)
    star = task.images / "images" / TEST_FONT.name / "2605.png"
    return f"""picture {picture}

[bold]What next[/]
  measure it      vembed evaluate --model {result.model_path} --data {task.test} \\
                    --retrieval_mode t2i --image_root {task.images}
  use it          from vembed import Predictor; model = Predictor("{result.model_path}")
                    model.encode_text("black star"); model.encode_image("{star}")
  your own rows   look at {task.train} and {settings}, then
                    vembed train --config YOURS.yaml"""
