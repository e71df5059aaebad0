"""The same run from its parts, each of which you may replace by your own.

python examples/train_with_components.py --config configs/train.yaml --epochs 1
"""

from accelerate import Accelerator

from vembed.data import Collator, build_dataloader, load_dataset_records
from vembed.losses import build_criterion
from vembed.training import Trainer, load_and_parse_config
from vembed.training.model_builder import build_model
from vembed.training.optimizer_builder import build_optimizer, build_scheduler

config = load_and_parse_config()

model = build_model(config)
records = load_dataset_records(config.data_path)
train_loader = build_dataloader(
    records, Collator(model.processor), batch_size=config.batch_size, seed=config.seed
)
criterion = build_criterion(config.loss_type, temperature=config.temperature)
optimizer = build_optimizer(model, config, criterion)
scheduler, warmup_steps = build_scheduler(
    optimizer, config, num_epochs=config.epochs, steps_per_epoch=len(train_loader)
)

trainer = Trainer(
    model=model,
    optimizer=optimizer,
    dataloader=train_loader,
    criterion=criterion,
    accelerator=Accelerator(cpu=config.device == "cpu"),
    config=config,
    scheduler=scheduler,
)
state = trainer.train()
print(f"{state.step} steps, {warmup_steps} of them warm-up; the model is in {config.output_dir}")
