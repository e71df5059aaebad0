"""The three-line Python API: name a model, train it on a file, look at the result."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from vembed.config import TrainConfig
from vembed.errors import ConfigError

if TYPE_CHECKING:
    from vembed.training.outcome import RunResult


class VEmbedFactoryTrainer:
    """Fine-tunes an embedding model in this process; also `vembed.Trainer`.

    Example:
        >>> trainer = VEmbedFactoryTrainer("sentence-transformers/all-MiniLM-L6-v2")
        >>> trainer.train(data_path="pairs.jsonl", epochs=1, output_dir="runs/mine")
        >>> trainer.evaluate("test_set")["ndcg@10"]
    """

    def __init__(self, model_name: str, **settings: Any) -> None:
        """Name the model.

        Args:
            model_name: Hub id, local folder, or `package:NAME[/subdir]`.
            **settings: Any setting of the configuration; `train` may change them.

        Raises:
            ConfigError: if a setting is unknown or its value unfit.
        """
        self.config = TrainConfig.coerce({"model_name": model_name, **settings})
        self.result: RunResult | None = None

    def train(self, **settings: Any) -> RunResult:
        """Train, measure before and after, and write model and report to `output_dir`.

        Args:
            **settings: Any setting of the configuration, such as `data_path`, `epochs`,
                `output_dir`; they win over those of the constructor.

        Returns:
            Where model and report are, and every metric before and after.

        Raises:
            ConfigError: if settings cannot work.
            DataError: if a row cannot be used; the message says file and line.
        """
        from vembed.training.run import run_training

        chosen = {name: self.config[name] for name in self.config.model_fields_set}
        self.config = TrainConfig.coerce({**chosen, **settings})
        self.result = run_training(self.config)
        return self.result

    def evaluate(self, data: str | None = None) -> dict[str, float]:
        """Metrics of the trained model; before `train`, of the model as it was named.

        Args:
            data: A BEIR folder or a file of rows; None takes what the training was measured on.

        Returns:
            Values by metric, such as `ndcg@10`.

        Raises:
            ConfigError: if there is no data to measure on.
        """
        from vembed.inference import Predictor
        from vembed.training.run_data import load_task

        proof = self.result.proof if self.result is not None else None
        if data is None and proof is not None:
            return dict(proof.after.metrics)
        source = data or self.config.test_data_path
        if source is None:
            raise ConfigError("evaluate: expected data to measure on. Received: none")
        task = load_task(self.config, source)
        model = self.config.model_name if self.result is None else self.result.model_path
        predictor = Predictor(
            str(model),
            encoder_mode=self.config.encoder_mode,
            trust_remote_code=self.config.trust_remote_code,
        )
        return dict(task.evaluate(predictor.encode_items).metrics)
