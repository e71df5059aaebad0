"""Training throughput: vembed, sentence-transformers and the limit on the same batches.

    python benchmarks/training.py                          # every case
    python benchmarks/training.py mixed bf16 --rounds 5
    python benchmarks/training.py scifact --data ../shared/data

`vembed` and `peer` are whole training loops as their users run them: reading rows, tokenising,
forward, loss, backward, clipping, optimizer. `packed` and `sorted` are the limit (`bare.py`):
forward and backward of the same texts, nothing else. `compiled` is vembed with `torch_compile:
true`, measured if asked for, because it takes minutes to begin. Before it is timed, each shows its
gradient of one batch without dropout, which must be the same (up to rounding).
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from harness import Bench, Meter, Variant, build_parser, show_machine
from workloads import (
    TEMPERATURE,
    Rows,
    batches_of,
    build_peer,
    build_vembed,
    count_tokens,
    gradient_of,
    in_rounds,
    longest,
    model_folder,
    read_jsonl,
    read_pairs,
    repeat,
    training_settings,
    write_rows,
)

CHECKED_ROWS = 8
# Of bf16's 8 bits, over six layers; other sums in another order.
TOLERANCES = {"no": 1e-4, "bf16": 0.05}


@dataclass(frozen=True)
class Case:
    """What is trained on.

    Attributes:
        title: For the table.
        tokens: Longest text.
        batch: Pairs per step.
        precision: As `mixed_precision` says it.
        choose: Takes the rows of the case out of all, given the token counts of both sides.
        negatives: Hard negatives of each row.
    """

    title: str
    tokens: int = 256
    batch: int = 64
    precision: str = "no"
    choose: Callable[[Rows, list[tuple[int, int]]], Rows] = lambda rows, _: rows
    negatives: int = 0


def short_pairs(rows: Rows, lengths: list[tuple[int, int]]) -> Rows:
    return [row for row, pair in zip(rows, lengths, strict=True) if max(pair) <= 24]


def long_pairs(rows: Rows, lengths: list[tuple[int, int]]) -> Rows:
    return [row for row, pair in zip(rows, lengths, strict=True) if max(pair) >= 192]


def halves(rows: Rows, lengths: list[tuple[int, int]]) -> Rows:
    """Both halves of documents that have 64 tokens for each: all texts are cut to one length."""
    chosen = []
    for row, (_, length) in zip(rows, lengths, strict=True):
        words = row["positive"].split()
        if length >= 150 and len(words) >= 80:
            middle = len(words) // 2
            halves = " ".join(words[:middle]), " ".join(words[middle:])
            chosen.append(dict(zip(("query", "positive"), halves, strict=True)))
    return chosen


CASES = {
    "mixed": Case("mixed lengths"),
    "mixed-128": Case("mixed lengths, at most 128 tokens", tokens=128),
    "short": Case("short texts, at most 24 tokens", choose=short_pairs),
    "long": Case("long documents, at least 192 tokens", batch=32, choose=long_pairs),
    "uniform": Case("uniform: 64 tokens each", tokens=64, choose=halves),
    "negatives": Case("mixed lengths, one hard negative", tokens=128, batch=32, negatives=1),
    "bf16": Case("mixed lengths, bf16", precision="bf16"),
    "bf16-uniform": Case("uniform, bf16", tokens=64, precision="bf16", choose=halves),
    "scifact": Case("SciFact: claims and abstracts", batch=32),
}


def run_vembed(meter: Meter, *, rows: str, settings: dict[str, Any], steps: int) -> None:
    trainer = build_vembed(settings)
    model = trainer.accelerator.unwrap_model(trainer.model).backbone
    loader = trainer.dataloader
    batch = loader.collate_fn([loader.dataset[row] for row in range(CHECKED_ROWS)])
    trainer.model.eval()
    trainer.step(batch)
    meter.show("gradient", gradient_of(model))
    trainer.optimizer.zero_grad()
    trainer.model.train()
    meter.count_tokens(model)
    in_rounds(trainer, meter, steps)
    trainer.train()


def run_peer(
    meter: Meter,
    *,
    rows: str,
    settings: dict[str, Any],
    steps: int,
    make_loss: Callable[[Any], Any] | None = None,
    load: Callable[[Rows], list[dict[str, Any]]] = list,
    check: bool = True,
) -> None:
    from transformers import TrainerCallback

    trainer = build_peer(load(read_jsonl(Path(rows))), settings, make_loss)
    if check:
        show_peer_gradient(meter, trainer)
        meter.count_tokens(trainer.model[0].model)
    rounds = iter(meter)

    class Rounds(TrainerCallback):
        def on_train_begin(self, *_: Any, **__: Any) -> None:
            next(rounds)

        def on_step_end(self, _: Any, state: Any, *__: Any, **___: Any) -> None:
            if state.global_step % steps == 0:
                next(rounds)

    trainer.add_callback(Rounds())
    trainer.train()


def show_peer_gradient(meter: Meter, trainer: Any) -> None:
    batch = trainer.data_collator([trainer.train_dataset[i] for i in range(CHECKED_ROWS)])
    trainer.model.eval()
    with trainer.compute_loss_context_manager():
        trainer.compute_loss(trainer.model, trainer._prepare_inputs(batch)).backward()
    meter.show("gradient", gradient_of(trainer.model))
    trainer.model.zero_grad()
    trainer.model.train()


def run_limit(
    meter: Meter,
    *,
    rows: str,
    settings: dict[str, Any],
    steps: int,
    rounds: int,
    arrangement: str,
) -> None:
    import bare
    import torch

    device, precision = settings["device"], settings["mixed_precision"]
    arrange = bare.ARRANGEMENTS[arrangement]
    model, tokenizer = bare.load_bare(settings["model_name"], device)
    loaded = read_jsonl(Path(rows))

    def texts_of(batch: Rows) -> list[list[int]]:
        texts = [row[column] for column in batch[0] for row in batch]
        return bare.tokenize(tokenizer, texts, settings["max_seq_length"])

    passes = arrange(texts_of(loaded[:CHECKED_ROWS]), device)
    meter.show("gradient", contrastive_gradient(model, passes, precision))
    model.train()
    batches = islice(batches_of(loaded, settings["batch_size"]), steps * (rounds + 1))
    tokenized = [texts_of(batch) for batch in batches]
    real = [sum(map(len, ids)) for ids in tokenized[steps:]]
    meter.tell(real_tokens=sum(real) / rounds)
    passes = [arrange(ids, device) for ids in tokenized]
    size = model.config.hidden_size
    grads = [torch.randn(len(ids), size, device=device) for ids in tokenized]
    meter.count_tokens(model)
    work = iter(zip(passes, grads, strict=True))
    for _ in meter:
        for packed, grads_nD in islice(work, steps):
            bare.train_pass(model, packed, grads_nD, precision)
            model.zero_grad()


def limits(shared: dict[str, Any], rounds: int) -> list[Variant]:
    settings = shared | {"rounds": rounds}
    return [
        Variant(name, run_limit, settings | {"arrangement": name}) for name in ("packed", "sorted")
    ]


def contrastive_gradient(model: Any, passes: list[Any], precision: str) -> Any:
    """The gradient of the contrastive loss through the passes, the queries first."""
    import bare
    import torch

    model.eval()
    device = passes[0].ids_RW.device
    with bare.autocast(device.type, precision):
        vectors = torch.cat([bare.embed(model, part) for part in passes])
    order = torch.cat([part.texts for part in passes]).argsort()
    query_BD, candidates_PD = vectors[order].split([CHECKED_ROWS, len(order) - CHECKED_ROWS])
    scores_BP = query_BD @ candidates_PD.T / TEMPERATURE
    own = torch.arange(CHECKED_ROWS, device=device)
    torch.nn.functional.cross_entropy(scores_BP, own).backward()
    gradient = gradient_of(model)
    model.zero_grad()
    return gradient


def make_rows(arguments: argparse.Namespace, name: str, model: str) -> Rows:
    case = CASES[name]
    if name == "scifact":
        if arguments.data is None:
            raise SystemExit("scifact: needs --data, the folder that has scifact in it")
        return _scifact(arguments.data / "scifact")
    pairs = [{k: row[k] for k in ("query", "positive")} for row in read_pairs(arguments)]
    lengths = zip(
        count_tokens(model, [row["query"] for row in pairs]),
        count_tokens(model, [row["positive"] for row in pairs]),
        strict=True,
    )
    rows = case.choose(pairs, list(lengths))
    for n in range(case.negatives):
        # Any other document will do: what it costs is its length, not how hard it is.
        others = rows[len(rows) // 2 + n :] + rows[: len(rows) // 2 + n]
        negatives = [row["positive"] for row in others]
        rows = [row | {"negative": text} for row, text in zip(rows, negatives, strict=True)]
    return rows


def _scifact(folder: Path) -> Rows:
    from vembed.evaluation.beir import read_beir

    data = read_beir(folder, split="train")
    return [
        {"query": data.queries[q].text or "", "positive": data.corpus[d].text or ""}
        for q, judged in data.qrels.items()
        for d, grade in judged.items()
        if grade > 0
    ]


def main(argv: list[str] | None = None) -> None:
    parser = build_parser(__doc__)
    parser.add_argument("cases", nargs="*", metavar="CASE", help=", ".join(CASES))
    parser.add_argument("--data", type=Path, help="folder of further data sets, for scifact")
    parser.add_argument("--steps", type=int, default=1, help="optimizer steps of a round")
    parser.add_argument("--batch", type=int, help="pairs per step, instead of the case's")
    arguments = parser.parse_args(argv)
    bench = Bench.of(arguments)
    show_machine(bench)
    everything = [name for name in CASES if name != "scifact" or arguments.data]
    names = arguments.cases or (["negatives"] if arguments.quick else everything)
    model = model_folder(arguments)
    for name in names:
        case = CASES[name]
        batch = arguments.batch or (8 if arguments.quick else case.batch)
        with tempfile.TemporaryDirectory() as folder:
            rows = make_rows(arguments, name, model)
            if len(rows) < batch:
                raise SystemExit(f"{name}: only {len(rows)} rows for batches of {batch}")
            rows = repeat(rows, max(len(rows), CHECKED_ROWS))
            file = write_rows(Path(folder) / "rows.jsonl", rows)
            settings = training_settings(
                file,
                model=model,
                batch=batch,
                tokens=longest(arguments, case.tokens),
                precision=case.precision,
                steps=arguments.steps * (bench.rounds + 2),
                output=f"{folder}/run",
            ) | {"device": arguments.device}
            shared = {"rows": str(file), "settings": settings, "steps": arguments.steps}
            variants = [
                Variant("vembed", run_vembed, shared),
                Variant("peer", run_peer, shared),
                *limits(shared, bench.rounds),
            ]
            if "compiled" in bench.only:
                compiled = shared | {"settings": settings | {"torch_compile": True}}
                variants.append(Variant("compiled", run_vembed, compiled))
            bench.compare(
                f"{case.title}, batch {batch}",
                variants,
                units=batch * arguments.steps,
                unit="pairs",
                tolerance=TOLERANCES[case.precision],
            )


if __name__ == "__main__":
    main()
