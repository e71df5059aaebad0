"""Text encoders: a transformers backbone, pooling, optional projections, unit length.

# Shapes: B texts, T tokens, H hidden size of the backbone, D embedding size
"""

from __future__ import annotations

import copy
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
        pooler: Mapping[str, Tensor] | None = None,
        origins: Mapping[str, str] | None = None,
    ) -> None:
        """Assemble an encoder; `load_text_encoder` does it from a folder.

        Args:
            backbone: A model that returns `last_hidden_state` `[B, T, H]`.
            processor: Makes the backbone's inputs.
            settings: As resolved: pooling_method and normalize are set.
            projections: Linear layers after pooling.
            pooler: Weights of the checkpoint's pooler by state-dict name, which no embedding uses;
                saved as they came.
            origins: Where each setting came from, for `describe`.
        """
        super().__init__()
        self.backbone = backbone
        self.projections = nn.ModuleList(projections)
        self.processor = processor
        self.model_type: str = backbone.config.model_type
        self.hidden_size: int = backbone.config.hidden_size
        self.embedding_dim: int = (
            projections[-1].linear.out_features if projections else self.hidden_size
        )
        self.pooling_method: str = str(settings.pooling_method)
        self.normalize: bool = bool(settings.normalize)
        self._settings = settings
        self._pooler = dict(pooler or {})
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
            **{name: f"{text}{self._origin(name)}" for name, text in shown.items()},
        }

    def _origin(self, name: str) -> str:
        return f" ({self._origins[name]})" if name in self._origins else ""

    def save_pretrained(self, path: str | Path) -> None:
        """Write a folder that sentence-transformers, transformers and vembed read to the same vectors.

        LoRA adapters are merged into a copy on the CPU; this encoder's own weights stay as they
        are.
        """
        folder = Path(path)
        folder.mkdir(parents=True, exist_ok=True)
        model = _merged(self.backbone)
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
            prompts=self._prompts(),
        )
        write_settings(folder, settings, hidden_size=self.hidden_size)

    def _prompts(self) -> dict[str, str]:
        """The checkpoint's named prompts, those of the two roles as they are now."""
        prompts = dict(self._settings.prompts)
        prompts |= {
            "query": self.processor.query_prompt,
            "document": self.processor.document_prompt,
        }
        return prompts | {
            name: self.processor.document_prompt
            for name in ("passage", "corpus")
            if name in prompts
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
) -> TextEncoder:
    """Load a text encoder from a local folder; the arguments are those of `vembed.models.load_encoder`.

    Raises:
        ConfigError: if an option does not fit the model.
        CheckpointError: if the folder is incomplete or has parts that vembed does not read.
    """
    stored = read_settings(path)
    backbone = _load_backbone(
        stored.backbone_folder, torch_dtype, attn_implementation, trust_remote_code
    )
    config = backbone.config.to_dict() | {"is_causal": getattr(backbone.config, "is_causal", None)}
    causal = attends_causally(config)
    tokenizer = _load_tokenizer(stored, trust_remote_code)
    pooling = _choose(pooling_method, stored.pooling_method, "last_token" if causal else "mean")
    _check_pooling(pooling.value, causal, backbone.config.model_type)
    # A checkpoint that declares last-token pooling itself was trained with its tokenizer as it is.
    lacks_end = pooling.origin != _CHECKPOINT and not ends_with_special_token(tokenizer)
    if pooling.value == "last_token" and lacks_end:
        append_end_token(tokenizer)
    chosen = {
        "pooling_method": pooling,
        "normalize": _choose(normalize, stored.normalize, True),
        "max_seq_length": _choose_length(
            max_seq_length, stored.max_seq_length, tokenizer, backbone
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
    if _position_limit(backbone) is not None:
        # Learned positions are counted from column 0: left padding would shift them.
        tokenizer.padding_side = "right"
    pooler = _take_off_pooler(backbone)
    encoder = TextEncoder(
        backbone,
        processor,
        settings=replace(stored, pooling_method=pooling.value, normalize=chosen["normalize"].value),
        projections=[Projection.load(f).to(backbone.dtype) for f in stored.dense_folders],
        pooler=pooler,
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


def _choose_length(given: int | None, stored: int | None, tokenizer: Any, backbone: Any) -> _Choice:
    limit = _position_limit(backbone)
    if given is not None and limit is not None and given > limit:
        raise ConfigError(
            f"max_seq_length: this model has positions for {limit} tokens. Received: {given}"
        )
    trained = getattr(backbone.config, "max_position_embeddings", None) or _UNLIMITED
    own = int(min(tokenizer.model_max_length, trained, limit or _UNLIMITED))
    if given is None and stored is None and own >= _UNLIMITED:
        raise ConfigError("max_seq_length: the checkpoint names no limit; set one, such as 512")
    choice = _choose(given, stored, own)
    # A published max_seq_length that the position table cannot serve would fail on the first long
    # text.
    return choice if limit is None else replace(choice, value=min(choice.value, limit))


def _position_limit(backbone: Any) -> int | None:
    """Tokens that a learned table of absolute positions has rows for; None when there is no such table."""
    for module in backbone.modules():
        for name in ("position_embeddings", "wpe"):
            table = getattr(module, name, None)
            if isinstance(table, nn.Embedding):
                # RoBERTa and its kin count positions from padding_idx + 1.
                first = table.padding_idx + 1 if table.padding_idx is not None else 0
                return table.num_embeddings - first
    return None


def _check_pooling(method: str, causal: bool, model_type: str) -> None:
    check_pooling_method(method)
    if causal and method == "cls":
        raise ConfigError(
            f"pooling_method: cls reads the first token, which in a causal model ({model_type}) has seen nothing of "
            f"the text: every text that starts alike would get the same vector. Use last_token or mean"
        )


def _load_backbone(folder: Path, dtype: str, attention: str | None, trust: bool) -> Any:
    options: dict[str, Any] = {"attn_implementation": attention} if attention else {}
    try:
        backbone, info = AutoModel.from_pretrained(
            folder,
            dtype=dtype,
            trust_remote_code=trust,
            output_loading_info=True,
            local_files_only=True,
            **options,
        )
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{folder}: the weights cannot be read ({error})") from error
    except (ImportError, ValueError) as error:
        raise ConfigError(f"{folder}: transformers cannot load this model ({error})") from error
    lost = sorted(name for name in info["missing_keys"] if not name.startswith("pooler."))
    lost += sorted(str(entry) for entry in info["mismatched_keys"])
    if lost:
        raise CheckpointError(
            f"{folder}: {len(lost)} weights are missing or of another shape and would start random, "
            f"such as {', '.join(lost[:3])}"
        )
    if any(name.startswith("pooler.") for name in info["missing_keys"]):
        backbone.pooler = None
    backbone.config.use_cache = False  # keys and values for generation, which no embedding needs
    return backbone


def _load_tokenizer(stored: CheckpointSettings, trust: bool) -> Any:
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            stored.backbone_folder, trust_remote_code=trust, local_files_only=True
        )
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{stored.backbone_folder}: the tokenizer cannot be read ({error})"
        ) from error
    # Without its files, transformers makes an empty tokenizer of the model's class: all text would
    # be unknown.
    names = tokenizer.vocab_files_names.values()
    if names and not any((stored.backbone_folder / name).is_file() for name in names):
        raise CheckpointError(
            f"{stored.backbone_folder}: no tokenizer (none of {', '.join(names)})"
        )
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
    """Remove the head that BERT-like models put on the first token, and return its weights.

    No embedding uses it: left in place, its parameters would get no gradient, which data
    parallelism takes for a bug.
    """
    pooler = getattr(backbone, "pooler", None)
    if not isinstance(pooler, nn.Module):
        return {}
    backbone.pooler = None
    return {f"pooler.{name}": tensor.detach() for name, tensor in pooler.state_dict().items()}


def _merged(backbone: Any) -> Any:
    """The backbone with adapters merged in: itself when it has none, else a copy on the CPU."""
    from peft import PeftModel

    if not isinstance(backbone, PeftModel):
        return backbone
    # Unmerging rounds, so it would not give the live weights back exactly; and a copy on the device
    # may not fit.
    on_cpu: dict[int, Any] = {
        id(p): nn.Parameter(torch.empty_like(p, device="cpu").copy_(p.detach()), p.requires_grad)
        for p in backbone.parameters()
    }
    on_cpu |= {
        id(b): torch.empty_like(b, device="cpu").copy_(b.detach()) for b in backbone.buffers()
    }
    return copy.deepcopy(backbone, on_cpu).merge_and_unload(safe_merge=True)
