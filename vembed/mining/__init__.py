"""Hard negatives: documents near a query that are no answer to it, found and written beside it.

Example:
    >>> from vembed.mining import MiningRules, mine_hard_negatives
    >>> mine_hard_negatives(  # doctest: +SKIP
    ...     "pairs.jsonl",
    ...     output="mined.jsonl",
    ...     model="BAAI/bge-small-en-v1.5",
    ...     rules=MiningRules(num_negatives=5, relative_margin=0.05),
    ... )
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from vembed.mining.rules import MiningRules

if TYPE_CHECKING:
    from vembed.mining.mine import Corpus, mine_hard_negatives
    from vembed.mining.results import MiningResult
    from vembed.mining.vectors import ModelChoice

# Resolved on first use: a mistake in the rules is told before torch is imported.
_LAZY = {
    "Corpus": "mine",
    "MiningResult": "results",
    "ModelChoice": "vectors",
    "mine_hard_negatives": "mine",
}

__all__ = ["Corpus", "MiningResult", "MiningRules", "ModelChoice", "mine_hard_negatives"]


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_LAZY[name]}"), name)
