"""Text encoders: a transformers backbone, pooling, optional projections, unit length.

# Shapes: B texts, T tokens, H hidden size of the backbone, D embedding size
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoModel, AutoTokenizer

from vembed.errors import CheckpointError, ConfigError
from vembed.models.checkpoint_format import CheckpointSettings, read_settings, write_settings
from vembed.models.merging import merged
from vembed.models.model_types import attends_causally
from vembed.models.pooling import check_pooling_method, pool
from vembed.models.processor import (
    TextProcessor,
    append_end_token,
    ends_with_special_token,
    lower_case,
)
from vembed.models.projection import Projection
from vembed.models.protocol import Encoder
from vembed.models.quantization import quantization_options

_UNLIMITED = 10**9  # transformers writes 1e30 for "no limit"


class TextEncoder(Encoder):
    """Text to one vector."""

    modalities = frozenset("t")

    def __init__(
        self,
        backbone: Any,
        processor: TextProcessor,
        *,
        settings: CheckpointSettings,
        projections: Sequence[Projection] = (),
        origins: Mapping[str, str] | None = None,
    ) -> None:
        """Assemble an encoder; `load_text_encoder` does it from a folder.

        Args:
            backbone: A model that returns `last_hidden_state` `[B, T, H]`; its pooler is taken off.
            processor: Makes the backbone's inputs.
            settings: As resolved: pooling_method and normalize are set.
            projections: Linear layers after pooling.
            origins: Where each setting came from, for `describe`.
        """
        super().__init__()
        # No embedding uses the pooler: left in place, its parameters would get no gradient, which
        # data parallelism takes for a bug. Its weights are saved as they came, because a folder
        # without them would load elsewhere with random ones.
        self._pooler = _take_off_pooler(backbone)
        self.backbone = backbone
        self.projections = nn.ModuleList(projections)
        self.processor = processor
        self.model_type = backbone.config.model_type
        self.hidden_size: int = backbone.config.hidden_size
        self.embedding_dim = projections[-1].out_features if projections else self.hidden_size
        self.pooling_method = str(settings.pooling_method)
        self.normalize = bool(settings.normalize)
        self._settings = settings
        self._origins = dict(origins or {})

    def forward(self, *, normalize: bool | None = None, **inputs: Tensor) -> Tensor:
        """Embeddings `[B, D]`, float32 or wider.

        Args:
            normalize: Unit length or not; None takes the encoder's own.
            inputs: What the processor makes; `attention_mask` `[B, T]` is needed.
        """
        hidden_BTH = self.backbone(**inputs).last_hidden_state
        embedding_BD = pool(self.pooling_method, hidden_BTH, inputs["attention_mask"])
        for projection in self.projections:
            embedding_BD = projection(embedding_BD)
        embedding_BD = embedding_BD.to(torch.promote_types(embedding_BD.dtype, torch.float32))
        unit = self.normalize if normalize is None else normalize
        return F.normalize(embedding_BD, dim=-1) if unit else embedding_BD

    def describe(self) -> dict[str, str | int]:
        """What it is and where each setting came from, for the log."""
        shown = {
            "pooling_method": self.pooling_method,
            "normalize": "yes" if self.normalize else "no",
            "max_seq_length": str(self.processor.max_seq_length),
            "query_prompt": repr(self.processor.query_prompt),
            "document_prompt": repr(self.processor.document_prompt),
        }
        weight = next(self.backbone.parameters())
        return {
            "model_type": self.model_type,
            "parameters": sum(p.numel() for p in self.parameters()),
            "embedding_dim": self.embedding_dim,
            "dtype": str(weight.dtype).removeprefix("torch."),
            "attention": str(self.backbone.config._attn_implementation),
            **{
                name: f"{text} ({self._origins[name]})" if name in self._origins else text
                for name, text in shown.items()
            },
        }

    def save_pretrained(self, path: str | Path) -> None:
        """Write a folder that sentence-transformers, transformers and vembed read alike.

        LoRA adapters are merged into a copy on the CPU; this encoder's own weights stay as they
        are.
        """
        folder = Path(path)
        folder.mkdir(parents=True, exist_ok=True)
        model = merged(self.backbone)
        pooler = {name: tensor.to(model.dtype) for name, tensor in self._pooler.items()}
        model.save_pretrained(folder, state_dict={**model.state_dict(), **pooler})
        self.processor.save_pretrained(folder)
        dense = tuple(folder / f"{i}_Dense" for i, _ in enumerate(self.projections, start=2))
        for projection, target in zip(self.projections, dense, strict=True):
            projection.save(target)  # type: ignore[operator]
        settings = replace(
            self._settings,
            backbone_folder=folder,
            pooling_method=self.pooling_method,
            normalize=self.normalize,
            dense_folders=dense,
            max_seq_length=self.processor.max_seq_length,
            do_lower_case=False,  # the saved tokenizer does it
            prompts=self._prompts(),
        )
        write_settings(folder, settings, hidden_size=self.hidden_size)

    def _prompts(self) -> dict[str, str]:
        """The checkpoint's named prompts, with those of the two roles as they are now."""
        document = self.processor.document_prompt
        other_names = {"passage", "corpus"} & set(self._settings.prompts)
        return {
            **self._settings.prompts,
            "query": self.processor.query_prompt,
            "document": document,
            **dict.fromkeys(sorted(other_names), document),
        }


def load_text_encoder(
    path: str,
    *,
    pooling_method: str | None = None,
    normalize: bool | None = None,
    max_seq_length: int | None = None,
    query_prompt: str | None = None,
    document_prompt: str | None = None,
    torch_dtype: str = "float32",
    attn_implementation: str | None = None,
    trust_remote_code: bool = False,
    quantization: str | None = None,
) -> TextEncoder:
    """Load a text encoder from a local folder; the arguments are those of `load_encoder`.

    Raises:
        ConfigError: if an option does not fit the model.
        CheckpointError: if the folder is incomplete or has parts that vembed does not read.
    """
    stored = read_settings(path)
    backbone = _load_backbone(
        stored.backbone_folder, torch_dtype, attn_implementation, trust_remote_code, quantization
    )
    tokenizer = _load_tokenizer(stored, trust_remote_code)
    pooling = _choose_pooling(pooling_method, stored.pooling_method, backbone.config)
    lacks_end = pooling.value == "last_token" and not ends_with_special_token(tokenizer)
    # A checkpoint that declares last-token pooling was trained with its tokenizer as it is.
    if lacks_end and pooling.origin != _CHECKPOINT:
        append_end_token(tokenizer)
    if _position_limit(backbone) is not None:
        # Learned positions are counted from column 0: left padding would shift them.
        tokenizer.padding_side = "right"
    chosen = {
        "pooling_method": pooling,
        "normalize": _choose(normalize, stored.normalize, True),
        "max_seq_length": _choose_length(
            max_seq_length, stored.max_seq_length, tokenizer.model_max_length, backbone
        ),
        "query_prompt": _choose(query_prompt, stored.prompt_for("query"), ""),
        "document_prompt": _choose(document_prompt, stored.prompt_for("document"), ""),
    }
    processor = TextProcessor(
        tokenizer,
        max_seq_length=chosen["max_seq_length"].value,
        query_prompt=chosen["query_prompt"].value,
        document_prompt=chosen["document_prompt"].value,
        default_prompt=stored.prompts.get(stored.default_prompt_name or "", ""),
        input_names=_input_names(tokenizer, backbone),
    )
    encoder = TextEncoder(
        backbone,
        processor,
        settings=replace(stored, pooling_method=pooling.value, normalize=chosen["normalize"].value),
        projections=[Projection.load(f).to(backbone.dtype) for f in stored.dense_folders],
        origins={name: choice.origin for name, choice in chosen.items()},
    )
    return encoder.eval()


_GIVEN, _CHECKPOINT, _DEFAULT = "given", "from the checkpoint", "default"


@dataclass(frozen=True)
class _Choice:
    value: Any
    origin: str


def _choose(given: Any, stored: Any, default: Any) -> _Choice:
    if given is not None:
        return _Choice(given, _GIVEN)
    return _Choice(default, _DEFAULT) if stored is None else _Choice(stored, _CHECKPOINT)


def _choose_pooling(given: str | None, stored: str | None, config: Any) -> _Choice:
    # to_dict leaves out what is not a setting of the class, which is_causal is for most.
    causal = attends_causally(config.to_dict() | {"is_causal": getattr(config, "is_causal", None)})
    choice = _choose(given, stored, "last_token" if causal else "mean")
    check_pooling_method(choice.value)
    if causal and choice.value == "cls":
        raise ConfigError(
            f"pooling_method: cls reads the first token, which in a causal model "
            f"({config.model_type}) has seen nothing of the text: every text that starts alike "
            f"would get the same vector. Use last_token or mean"
        )
    return choice


def _choose_length(
    given: int | None, stored: int | None, of_tokenizer: int, backbone: Any
) -> _Choice:
    limit = _position_limit(backbone) or _UNLIMITED
    if given is not None and given > limit:
        raise ConfigError(
            f"max_seq_length: this model has positions for {limit} tokens. Received: {given}"
        )
    trained = getattr(backbone.config, "max_position_embeddings", None) or _UNLIMITED
    choice = _choose(given, min(of_tokenizer, trained) if stored is None else stored, None)
    # A published length that the position table cannot serve would fail on the first long text.
    length = int(min(choice.value, limit))
    if length >= _UNLIMITED:
        raise ConfigError("max_seq_length: the checkpoint names no limit. Set one, such as 512")
    return replace(choice, value=length)


def _position_limit(backbone: Any) -> int | None:
    """Tokens that a learned table of absolute positions has rows for; None without such a table."""
    for module in backbone.modules():
        for name in ("position_embeddings", "wpe"):
            table = getattr(module, name, None)
            if isinstance(table, nn.Embedding):
                # RoBERTa and its kin count positions from padding_idx + 1.
                first = table.padding_idx + 1 if table.padding_idx is not None else 0
                return table.num_embeddings - first
    return None


def _load_backbone(
    folder: Path, dtype: str, attention: str | None, trust: bool, quantization: str | None
) -> Any:
    options: dict[str, Any] = {"attn_implementation": attention} if attention else {}
    if quantization is not None:
        options |= quantization_options(quantization, dtype)
    try:
        backbone, info = AutoModel.from_pretrained(
            folder,
            dtype=dtype,
            trust_remote_code=trust,
            output_loading_info=True,
            local_files_only=True,
            ignore_mismatched_sizes=True,  # reported below, together with what is missing
            **options,
        )
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{folder}: the weights cannot be read ({error})") from error
    except (ImportError, ValueError) as error:
        raise ConfigError(f"{folder}: transformers cannot load this model ({error})") from error
    lost = sorted(name for name in info["missing_keys"] if not name.startswith("pooler."))
    lost += sorted(str(entry[0]) for entry in info["mismatched_keys"])
    if lost:
        raise CheckpointError(
            f"{folder}: {len(lost)} weights are missing or of another shape than config.json says, "
            f"and would start random: {', '.join(lost[:3])}{' ...' if len(lost) > 3 else ''}"
        )
    if any(name.startswith("pooler.") for name in info["missing_keys"]):
        backbone.pooler = None
    backbone.config.use_cache = False  # keys and values for generation, which no embedding needs
    return backbone


def _load_tokenizer(stored: CheckpointSettings, trust: bool) -> Any:
    folder = stored.backbone_folder
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            folder, trust_remote_code=trust, local_files_only=True
        )
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{folder}: the tokenizer cannot be read ({error})") from error
    # Without its files, transformers makes an empty tokenizer of the model's class, to which every
    # word is unknown.
    names = tokenizer.vocab_files_names.values()
    if names and not any((folder / name).is_file() for name in names):
        raise CheckpointError(f"{folder}: no tokenizer (none of {', '.join(names)})")
    if stored.do_lower_case:
        lower_case(tokenizer)
    if tokenizer.pad_token is None:
        # Any token will do: the mask, not the id, says what is padding.
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token
    return tokenizer


def _input_names(tokenizer: Any, backbone: Any) -> list[str]:
    known = inspect.signature(backbone.forward).parameters
    uses_types = "token_type_ids" in tokenizer.model_input_names and "token_type_ids" in known
    return ["input_ids", "attention_mask", *(["token_type_ids"] if uses_types else [])]


def _take_off_pooler(backbone: Any) -> dict[str, Tensor]:
    """Remove the head that BERT-like models put on the first token, and return its weights."""
    pooler = getattr(backbone, "pooler", None)
    if not isinstance(pooler, nn.Module):
        return {}
    backbone.pooler = None
    return {f"pooler.{name}": tensor.detach() for name, tensor in pooler.state_dict().items()}
