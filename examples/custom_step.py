"""A step of your own: subclass the trainer and override `_step_standard`.

python examples/custom_step.py --config configs/train.yaml --epochs 1
"""

from typing import Any

from accelerate import Accelerator

from vembed.data import Collator, build_dataloader, load_dataset_records
from vembed.losses import build_criterion
from vembed.training import Trainer, load_and_parse_config
from vembed.training.model_builder import build_model
from vembed.training.optimizer_builder import build_optimizer


class CountingTrainer(Trainer):
    """Counts the real tokens that a run sees."""

    tokens = 0

    def _step_standard(self, batch: dict[str, Any]) -> Any:
        self.tokens += sum(batch["lengths_query"]) + sum(batch["lengths_positive"])
        return super()._step_standard(batch)


config = load_and_parse_config()
model = build_model(config)
criterion = build_criterion("infonce")
trainer = CountingTrainer(
    model=model,
    optimizer=build_optimizer(model, config, criterion),
    dataloader=build_dataloader(
        load_dataset_records(config.data_path),
        Collator(model.processor),
        batch_size=config.batch_size,
        seed=config.seed,
    ),
    criterion=criterion,
    accelerator=Accelerator(cpu=config.device == "cpu"),
    config=config,
)
trainer.train()
print(f"{trainer.tokens:,} tokens in {trainer.state.step} steps")
