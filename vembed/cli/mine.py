"""`vembed mine`: the rows of a file with hard negatives beside them."""

from __future__ import annotations

import argparse
import math
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vembed.cli.image_options import add_image_options, image_rules
from vembed.cli.parsing import Parser
from vembed.cli.row_options import add_row_options, read_column_mapping, resolve_retrieval_mode
from vembed.cli.terminal import progress_bar
from vembed.errors import ConfigError, shorten
from vembed.mining.rules import MiningRules, check_faiss, check_output

if TYPE_CHECKING:
    from vembed.mining import MiningResult
    from vembed.mining.results import Example, Scored
    from vembed.modes import Item

_RULES = MiningRules()


def main(argv: list[str]) -> int:
    """Mine; prints what was found.

    Raises:
        ConfigError: if a model or an option does not fit.
        DataError: if a row cannot be used.
    """
    arguments = _parser().parse_args(argv)
    rules = MiningRules(**{name: getattr(arguments, name) for name in vars(_RULES)})
    mapping = read_column_mapping(arguments.column_mapping)
    check_output(Path(arguments.output), arguments.data, overwrite=arguments.overwrite)
    if arguments.show < 0:
        raise ConfigError(f"--show: must be at least 0. Received: {arguments.show}")
    if arguments.batch_size is not None and arguments.batch_size < 1:
        raise ConfigError(f"--batch_size: must be at least 1. Received: {arguments.batch_size}")
    check_faiss()
    images = image_rules(arguments)
    mode = resolve_retrieval_mode(arguments.retrieval_mode, arguments.model)
    # After the arguments are checked, because it imports torch.
    from vembed.mining.mine import Corpus, mine_hard_negatives

    corpus = None
    if arguments.corpus is not None:
        corpus = Corpus(arguments.corpus, arguments.corpus_column, arguments.corpus_image_column)
    result = mine_hard_negatives(
        arguments.data,
        output=arguments.output,
        model=_model(arguments),
        corpus=corpus,
        retrieval_mode=mode,
        column_mapping=mapping,
        split=arguments.split,
        images=images,
        rules=rules,
        cross_encoder=arguments.cross_encoder,
        scores=arguments.scores,
        short_rows=arguments.short_rows,
        query_vectors=arguments.query_vectors,
        corpus_vectors=arguments.corpus_vectors,
        cache=arguments.cache,
        overwrite=arguments.overwrite,
        examples=arguments.show,
        progress=progress_bar,
    )
    sys.stdout.write(
        _summary(
            result, rules, "vectors" if arguments.cross_encoder is None else "vectors and scores"
        )
    )
    sys.stdout.writelines(map(_shown, result.examples))
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="vembed mine",
        allow_abbrev=False,
        description="Find hard negatives: documents near a query that are no answer to it. The "
        "output has the rows as they came, with the negatives in a column that `vembed train` "
        "reads. A run that was killed goes on where it was.",
    )
    add = parser.add_argument
    add("--model", help="folder, package:NAME[/subdir] or hub id; not with vectors of both sides")
    add("--data", required=True, help="rows of queries and positives, as for training")
    add("--output", required=True, help="file to write, .jsonl")
    add("--overwrite", action="store_true", help="replace the output if it is there")
    add(
        "--corpus", help="file of candidates, or a BEIR folder (default: the positives of all rows)"
    )
    add("--corpus_column", default="text", help="its column of texts (default: text)")
    add("--corpus_image_column", default="image", help="its column of images (default: image)")
    add("--split", default="train", help="of a data set with splits (default: train)")
    add_row_options(parser)
    add_image_options(parser)
    _add_rules(parser)
    _add_model_options(parser)
    return parser


def _add_rules(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--num_negatives", type=int, default=_RULES.num_negatives, metavar="N",
        help=f"negatives of a row (default: {_RULES.num_negatives})")  # fmt: skip
    add("--range_min", type=int, default=_RULES.range_min, metavar="N",
        help="pass over the N nearest candidates (default: 0)")  # fmt: skip
    add("--range_max", type=int, metavar="N", help="look no further than the N-th nearest "
        "(default: no end; with random or a cross-encoder 10 for each negative)")  # fmt: skip
    add("--max_score", type=float, metavar="S", help="leave out what is more similar")
    add("--min_score", type=float, metavar="S", help="leave out what is less similar")
    add("--absolute_margin", type=float, metavar="M",
        help="leave out what is more similar than the positive less M")  # fmt: skip
    add("--relative_margin", type=float, metavar="M", help="leave out what is more similar than "
        "the positive less this share of it (NV-Retriever: 0.05)")  # fmt: skip
    add("--sampling", choices=["top", "random"], default=_RULES.sampling,
        help="the nearest that are allowed, or any of them (default: top)")  # fmt: skip
    add("--seed", type=int, default=_RULES.seed, help=f"of random (default: {_RULES.seed})")
    add("--short_rows", choices=["keep", "drop", "error"], default="keep",
        help="rows with fewer than N negatives (default: keep, with those there are)")  # fmt: skip
    add("--cross_encoder", metavar="MODEL", help="scores the candidates within the ranks anew; "
        "order, margins and scores are then by the sigmoid of what it says")  # fmt: skip
    add("--scores", action="store_true", help="write teacher_scores for all positives and "
        "negatives: cosines, or what the cross-encoder says, without a sigmoid")  # fmt: skip
    add("--show", type=int, default=0, metavar="N", help="print what N of the queries got")


def _add_model_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--query_vectors", metavar="FILE", help=".npy that `vembed encode --role query` made of "
        "the queries of all rows")  # fmt: skip
    add("--corpus_vectors", metavar="FILE", help="likewise, with --role document, of the corpus; "
        "without one, of the positives, one for each row")  # fmt: skip
    add("--cache", metavar="FOLDER", help="keep vectors here, for other rules or a larger corpus "
        "(default: OUTPUT.cache, removed at the end)")  # fmt: skip
    add("--encoder_mode", default="auto", help="what loads the model: auto (from its files), a "
        "name as in configs/train.yaml, or package.module:Name for your own")  # fmt: skip
    add("--query_prompt", help="text put before every query, instead of the model's; '' for none")
    add("--document_prompt", help="likewise, before every document")
    add("--max_seq_length", type=int, metavar="N", help="tokens kept of a text")
    add("--batch_size", type=int, help="most items in a forward pass; their length decides else")
    add("--device", help="such as cpu or cuda:1; an accelerator is taken when there is one")


def _model(arguments: argparse.Namespace) -> Any:
    from vembed.mining.vectors import ModelChoice

    if arguments.model is None:
        return None
    return ModelChoice(
        arguments.model,
        encoder_mode=arguments.encoder_mode,
        query_prompt=arguments.query_prompt,
        document_prompt=arguments.document_prompt,
        max_seq_length=arguments.max_seq_length,
        batch_size=arguments.batch_size,
        device=arguments.device,
    )


def _summary(result: MiningResult, rules: MiningRules, computed: str) -> str:
    mean = result.negatives / result.written if result.written else 0.0
    pairs = result.queries * result.candidates
    left_out = ", ".join(
        f"{count:,} by {_RULE_NAMES[name]}"
        for name, count in vars(result.excluded).items()
        if count
    )
    short = f"{result.short_rows:,} rows with fewer than {rules.num_negatives}"
    if result.written < result.rows:
        short += f", of {result.rows:,}, were left out"
    lines = [
        f"{result.output}: {result.written:,} rows, {result.negatives:,} negatives, "
        f"{mean:.2f} a row; {short}",
        f"{result.queries:,} queries x {result.candidates:,} candidates: of {pairs:,} pairs left "
        f"out {left_out or 'none'}",
        f"mean score: positives {_score(result.positive_score)}, "
        f"negatives {_score(result.negative_score)}",
        f"{result.computed:,} {computed} computed in {result.seconds:.1f} s"
        + (f"; kept in {result.cache}" if result.cache is not None else ""),
    ]
    return "\n".join(lines) + "\n"


_RULE_NAMES = {
    "known": "what is known",
    "rank": "rank",
    "min_score": "min_score (of queries with too few)",
    "margin": "margin",
    "max_score": "max_score",
}


def _score(value: float) -> str:
    return "-" if math.isnan(value) else f"{value:.4f}"


def _shown(example: Example) -> str:
    def line(sign: str, found: Scored) -> str:
        return f"  {sign} {found.score:.4f}  {_one_line(found.item)}\n"

    return (
        f"\n{_one_line(example.query)}\n"
        + "".join(line("+", found) for found in example.positives)
        + "".join(line("-", found) for found in example.negatives)
    )


def _one_line(item: Item) -> str:
    return shorten(" ".join(str(item).split()), most=100)
