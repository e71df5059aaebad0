"""`vembed encode`: the rows of a file to vectors in one file, with their ids beside it."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from itertools import chain, islice
from pathlib import Path
from tempfile import TemporaryFile
from typing import TYPE_CHECKING, Any, NamedTuple

from vembed.cli.image_options import add_image_options, image_rules
from vembed.cli.terminal import progress_bar
from vembed.errors import (
    ConfigError,
    DataError,
    did_you_mean,
    find_control_character,
    shorten,
)
from vembed.modes import IMAGE, MODALITIES, MULTIMODAL, TEXT, Item

if TYPE_CHECKING:
    from vembed.data.cells import CellReader
    from vembed.data.sources import Source
    from vembed.inference import Predictor

ID_COLUMNS = ("_id", "id")
"""Columns that name a row unless `--id_column` does."""

ARRAY_FILE, TOKENS_FILE = ".npy", ".npz"
RANGES_FILE = ".ranges.npy"

_NAMES = {
    TEXT: ("text", "texts"),
    IMAGE: ("image", "images"),
    MULTIMODAL: ("text with its image", "texts with their images"),
}

# Rows read, encoded and written at a time: what is held in memory does not grow with the file.
_WINDOW_ROWS = 8192


class ItemRow(NamedTuple):
    """One item to encode and what names it."""

    identifier: str
    item: Item


def main(argv: list[str]) -> int:
    """Encode a file; prints where the vectors are.

    Raises:
        ConfigError: if the model or an option does not fit.
        DataError: if the file or a row cannot be used.
    """
    arguments = _parser().parse_args(argv)
    output = Path(arguments.output)
    if output.suffix not in (ARRAY_FILE, TOKENS_FILE):
        raise ConfigError(
            f"--output: expected a name that ends in {ARRAY_FILE}, or in {TOKENS_FILE} for a model "
            f"that gives a vector for each token. Received: {str(output)!r}"
        )
    if not output.parent.is_dir():
        raise ConfigError(f"--output: there is no folder {str(output.parent)!r}")
    # All rows once before the model is loaded: a broken row shows in seconds, not after hours.
    ids_path = output.with_suffix(".ids.txt")
    with _replacing(ids_path) as ids_part, _replacing(output) as vectors_part:
        count = _write_ids(_read_rows(arguments), ids_part, arguments.data)
        written = _write_vectors(_read_rows(arguments), vectors_part, count, arguments)
    what = _NAMES[arguments.modality][count != 1]
    sys.stdout.write(f"{output}: {count:,} {what}, {written}; ids: {ids_path}\n")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="vembed encode",
        allow_abbrev=False,
        description="Turn texts or images into vectors. Row k of the .npy belongs to line k of the "
        "ids. A model that gives a vector for each token needs a .npz: of item k, those are "
        "vectors[offsets[k]:offsets[k + 1]].",
    )
    add = parser.add_argument
    add("--model", required=True, help="folder, package:NAME[/subdir] or hub id")
    add("--data", required=True, help=".jsonl, .csv, .tsv, .parquet, shards-*.tar, or .txt with a "
        "text or the path of an image per line")  # fmt: skip
    add(
        "--output",
        required=True,
        help="file to write, .npy or .npz; the ids go to .ids.txt beside it",
    )
    add("--modality", choices=list(MODALITIES), default=TEXT,
        help="what a row is: t text (the default), i image, m both")  # fmt: skip
    add("--column", default="text", help="column that holds the text (default: text)")
    add("--image_column", default="image", help="column that holds the image (default: image)")
    add_image_options(parser)
    add("--id_column", help=f"column that names the row (default: {' or '.join(ID_COLUMNS)}, "
        "else the line number)")  # fmt: skip
    add("--role", choices=["query", "document"], help="use the model's prompt for this role")
    add("--prompt", help="text put before every text, instead of the role's; '' for none")
    add("--normalize", action=argparse.BooleanOptionalAction, default=None,
        help="unit length or not (default: as the model was made)")  # fmt: skip
    add("--truncate_dim", type=int, metavar="N", help="keep the first N numbers of each vector")
    add("--precision", choices=["float32", "int8", "binary", "ubinary"], default="float32",
        help="a byte (int8) or a bit for each number; ubinary packs eight bits in an unsigned "
        "byte, binary in a signed one")  # fmt: skip
    add("--ranges", metavar="FILE", help="int8: the .ranges.npy of an earlier call, so that both "
        f"compare; default: those of the first {_WINDOW_ROWS:,} rows, written beside the vectors",
    )  # fmt: skip
    add("--encoder_mode", default="auto", help="what loads the model: auto (from its files), a "
        "name as in configs/train.yaml, or package.module:Name for your own")  # fmt: skip
    add("--batch_size", type=int, help="most items in a forward pass; their length decides else")
    add("--device", help="such as cpu or cuda:1; an accelerator is taken when there is one")
    return parser


@contextmanager
def _replacing(path: Path) -> Iterator[Path]:
    """A name to write to, which becomes `path` at the end, or is removed after a failure."""
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        yield part
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def _read_rows(arguments: argparse.Namespace) -> Iterator[ItemRow]:
    if arguments.data.endswith(".txt"):
        return _read_lines(arguments)
    return _read_table(arguments)


def _read_lines(arguments: argparse.Namespace) -> Iterator[ItemRow]:
    from vembed.data.problems import RowProblem
    from vembed.data.reading import bounded_lines, decode_text

    path = Path(arguments.data)
    cells = _cells(arguments, str(path.parent))
    if arguments.modality == MULTIMODAL:
        raise ConfigError(f"--modality: {path}: a line is a text or an image, not both")
    try:
        with path.open("rb") as file:
            for number, line in bounded_lines(file):
                where = f"{path}:{number}"
                with _at(where):
                    text = line if isinstance(line, RowProblem) else decode_text(line)
                    if isinstance(text, RowProblem):
                        raise text
                    if text := text.strip():
                        item = cells.item(arguments.modality, text, field="line", place="line")
                        yield ItemRow(str(number), item.located(where))
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from error


def _read_table(arguments: argparse.Namespace) -> Iterator[ItemRow]:
    from vembed.data.problems import RowProblem

    source = _source(arguments)
    cells = _cells(arguments, source.image_root)
    place = "" if arguments.modality == TEXT else f": {arguments.image_column}"
    for row in source.read():
        where = f"{source.files[row.file]}:{row.line}"
        if isinstance(row.values, RowProblem):
            raise DataError(row.values.describe_at(where))
        item = _item(row.values, cells, arguments, where)
        name = arguments.id_column or next((c for c in ID_COLUMNS if c in row.values), None)
        identifier = str(
            row.line if name is None else _cell(row.values, name, where, "--id_column")
        )
        if len(identifier.splitlines()) != 1 or find_control_character(identifier) is not None:
            raise DataError(
                f"{where}: {name}: expected an id in one line. "
                f"Received: {shorten(identifier, quote=True)}"
            )
        yield ItemRow(identifier, item.located(where + place))


def _item(
    values: Mapping[str, Any], cells: CellReader, arguments: argparse.Namespace, where: str
) -> Item:
    """What a row is, read by the code that reads training rows."""
    text, image, modality = arguments.column, arguments.image_column, arguments.modality
    if modality == MULTIMODAL:
        parts = (_cell(values, text, where, "--column"),
                 _cell(values, image, where, "--image_column"))  # fmt: skip
        with _at(where):
            return cells.pair(*parts, field="item", places=(text, image))
    column, option = (text, "--column") if modality == TEXT else (image, "--image_column")
    cell = _cell(values, column, where, option)
    with _at(where):
        return cells.item(modality, cell, field="item", place=column)


def _source(arguments: argparse.Namespace) -> Source:
    from vembed.data.sources import find_source

    return find_source(arguments.data, split="train", own_split=False, streaming=False)


def _cells(arguments: argparse.Namespace, folder: str | None) -> CellReader:
    from vembed.data.cells import CellReader

    rules = image_rules(arguments)
    return CellReader(rules.folder(folder), rules.limits)


@contextmanager
def _at(where: str) -> Iterator[None]:
    """Gives a problem of a cell its `file:line`."""
    from vembed.data.problems import RowProblem

    try:
        yield
    except RowProblem as problem:
        raise DataError(problem.describe_at(where)) from None


def _cell(values: Any, column: str, where: str, option: str) -> Any:
    if column not in values:
        from vembed.data.problems import list_names

        raise DataError(
            f"{where}: no column {column!r}{did_you_mean(column, map(str, values))}. "
            f"Columns: {list_names(map(str, values))}. Name one with {option}"
        )
    return values[column]


def _write_ids(rows: Iterator[ItemRow], path: Path, data: str) -> int:
    from vembed.data.checking import require_images

    count = 0
    with path.open("w", encoding="utf-8") as file:
        while window := list(islice(rows, _WINDOW_ROWS)):
            require_images((row.item for row in window), decode=False)
            file.writelines(f"{row.identifier}\n" for row in window)
            count += len(window)
    if not count:
        raise DataError(f"{data}: no rows in it")
    return count


def _write_vectors(
    rows: Iterator[ItemRow], path: Path, count: int, arguments: argparse.Namespace
) -> str:
    """Encode `count` rows; returns what was written, in words."""
    # After all rows are read, because it imports torch.
    from vembed.inference import Predictor
    from vembed.models.checkpoint_format import NO_POOLING

    if arguments.batch_size is not None and arguments.batch_size < 1:
        raise ConfigError(f"--batch_size: must be at least 1. Received: {arguments.batch_size}")
    quantizer = _Quantizer(arguments)  # before the model is loaded, which may take minutes
    predictor = Predictor(
        arguments.model, device=arguments.device, encoder_mode=arguments.encoder_mode
    )
    _refuse_file_names(predictor, arguments)
    keeps_tokens = predictor.encoder.pooling_method == NO_POOLING
    fitting = TOKENS_FILE if keeps_tokens else ARRAY_FILE
    if Path(arguments.output).suffix != fitting:
        given = "a vector for each token" if keeps_tokens else "one vector for each item"
        raise ConfigError(
            f"--output: {arguments.model!r} gives {given}, which goes into a {fitting} file. "
            f"Received: {arguments.output!r}"
        )
    if keeps_tokens and arguments.precision != "float32":
        raise ConfigError(
            f"--precision: a vector for each token is float32 here. Received: {arguments.precision}"
        )
    write = _write_tokens if keeps_tokens else _write_array
    with progress_bar("encoding", count) as advance:
        windows = _encode_windows(rows, predictor, arguments, advance)
        written = write(windows if keeps_tokens else map(quantizer, windows), path, count)
    return written + quantizer.write_ranges(Path(arguments.output).with_suffix(RANGES_FILE))


class _Quantizer:
    """Windows of vectors in the precision that was asked for."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        """Read the ranges, if a file is named.

        Raises:
            ConfigError: if ranges are given that have no use.
            DataError: if they cannot be read.
        """
        from vembed.quantized_vectors import Ranges

        self._precision = arguments.precision
        self._given = arguments.ranges is not None
        if self._given and self._precision != "int8":
            raise ConfigError(
                f"--ranges: has no use with --precision {self._precision}. Set --precision int8"
            )
        self._ranges = Ranges.load(arguments.ranges) if self._given else None

    def __call__(self, vectors: Any) -> Any:
        """The next window; ranges are those of the first."""
        from vembed.quantized_vectors import Ranges, quantize

        if self._precision == "int8" and self._ranges is None:
            self._ranges = Ranges.of(vectors)
        return quantize(vectors, self._precision, self._ranges)

    def write_ranges(self, path: Path) -> str:
        """Keep the ranges that were found, for what is compared with these vectors; says where."""
        if self._ranges is None or self._given:
            return ""
        with _replacing(path) as part:
            self._ranges.save(part)
        return f"; ranges: {path}"


def _refuse_file_names(predictor: Predictor, arguments: argparse.Namespace) -> None:
    """Raise DataError if most texts name image files, and the model embeds images."""
    from vembed.data.file_names import image_file_among

    if arguments.modality != TEXT or IMAGE not in predictor.encoder.modalities:
        return
    is_list = arguments.data.endswith(".txt")
    own = str(Path(arguments.data).parent) if is_list else _source(arguments).image_root
    folder = image_rules(arguments).folder(own)
    texts = (row.item.text for row in _read_rows(arguments))
    name = image_file_among(texts, "" if folder is None else folder.root)
    if name is None:
        return
    column = "" if is_list else f" --image_column {arguments.column}"
    place = "lines" if is_list else f"cells of the column {arguments.column!r}"
    raise DataError(
        f"{arguments.data}: most {place} name image files, such as {name!r}, and would be embedded "
        f"as texts. To embed the images, say --modality i{column}"
    )


def _encode_windows(
    rows: Iterator[ItemRow], predictor: Predictor, arguments: argparse.Namespace, advance: Any
) -> Iterator[Any]:
    """The vectors of some rows at a time."""
    from vembed.inference import encode_items

    while window := list(islice(rows, _WINDOW_ROWS)):
        yield encode_items(
            predictor.encoder,
            [row.item for row in window],
            role=arguments.role,
            prompt=arguments.prompt,
            normalize=arguments.normalize,
            truncate_dim=arguments.truncate_dim,
            max_items=arguments.batch_size,
            progress=advance,
        )


def _write_array(windows: Iterator[Any], path: Path, count: int) -> str:
    import numpy as np

    first = next(windows)
    shape = (count, first.shape[1])
    vectors = np.lib.format.open_memmap(path, mode="w+", dtype=first.dtype, shape=shape)
    done = 0
    for window in chain([first], windows):
        vectors[done : done + len(window)] = window
        done += len(window)
    vectors.flush()
    return f"{shape[0]:,} x {shape[1]} {first.dtype}"


def _write_tokens(windows: Iterator[Any], path: Path, count: int) -> str:
    """Write `vectors` `[S, D]` and `offsets` `[count + 1]`, uncompressed."""
    import numpy as np

    # The number of vectors, which an array's header says, is known at the end only.
    lengths = []
    with TemporaryFile(dir=path.parent) as raw:
        for window in windows:
            window.flat_SD.tofile(raw)
            lengths.append(window.lengths)
            size = window.flat_SD.shape[1]
        offsets = np.concatenate([[0], np.concatenate(lengths).cumsum()]).astype(np.int64)
        shape = (int(offsets[-1]), size)
        vectors = np.memmap(raw, dtype=np.float32, mode="r", shape=shape)
        with path.open("wb") as file:
            np.savez(file, vectors=vectors, offsets=offsets)
    return f"{shape[0]:,} x {size} float32"
