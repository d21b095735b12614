"""Token sequences out of local files, for `tedcompile train`.

Files are tokenised once, by rank 0, into one flat array of ids beside the run; all ranks map it into memory and touch
only their own sequences. Documents follow one another, each with the tokenizer's end-of-text id; a sequence is a slice
of that (packing). A run's batches are one list of equal micro-batches, by the seed alone: which rank takes which is for
the caller, so the list is the same on every mesh.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

TEXT, IDS = "text", ("input_ids", "tokens")  # names of columns
FILES = ("tokenizer", "vocab", "merges", "special_tokens", "chat_template")  # what names of a tokenizer's start with
DTYPES = {"u1": torch.uint8, "i4": torch.int32}


# ---- tokenizers


@dataclass(frozen=True)
class Tokenizer:
    """`encode` text to ids; `end` is put after each document; `name` and `mark` say which one it is."""

    name: str
    mark: str
    encode: Callable[[str], list[int]]
    end: int | None


def tokenizer(spec: str) -> Tokenizer:
    """`bytes`: the bytes of UTF-8, 0 at the end of a document; else a folder with a Hugging Face tokenizer, or its
    tokenizer.json. Raises ValueError for what cannot be read."""
    if spec == "bytes":
        return Tokenizer("bytes", "bytes", lambda text: list(text.encode("utf-8", "surrogatepass")), 0)
    path = Path(spec)
    folder = path.parent if path.name == "tokenizer.json" else path
    if not (folder / "tokenizer.json").exists() and not (folder / "tokenizer_config.json").exists():
        raise ValueError(f"{spec} holds no tokenizer.json: name a folder with one, or bytes, by --tokenizer")
    try:
        from transformers import AutoTokenizer, PreTrainedTokenizerFast
    except ImportError:
        raise ValueError("a tokenizer needs the package transformers: pip install 'tedcompile[hf]'") from None
    try:
        if (folder / "tokenizer_config.json").exists():
            found = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        else:
            found = PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"))
    except Exception as error:
        raise ValueError(f"the tokenizer in {folder} cannot be read: {str(error).splitlines()[0]}") from None
    files = sorted(p for p in folder.iterdir() if p.is_file() and p.name.startswith(FILES))
    mark = hashlib.sha256(b"".join(p.read_bytes() for p in files)).hexdigest()
    encode = functools.partial(found.encode, add_special_tokens=False, verbose=False)
    return Tokenizer(str(folder), mark, encode, found.eos_token_id)


def copy_tokenizer(source: str, target: str) -> None:
    """The files of a folder's tokenizer, where there are some."""
    for path in Path(source).iterdir() if Path(source).is_dir() else ():
        if path.is_file() and path.name.startswith(FILES):
            shutil.copy(path, target)


# ---- documents of files


Document = str | list[int] | Any  # text, or ids


def documents(path: Path) -> Iterator[Document]:
    """The documents of a file: texts, or ids of what is tokenised already.

    Raises ValueError that names the file, the line or row, and what is wrong.
    """
    reader = READERS.get(path.suffix, _text)
    if path.is_dir():
        reader = _dataset
    try:
        yield from reader(path)
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror or error}") from None


def _text(path: Path) -> Iterator[Document]:
    try:
        yield path.read_bytes().decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text: byte {error.start} ({error.reason})") from None


def _document(row: Any, where: str) -> Document:
    names = (TEXT, *IDS)
    found = [n for n in names if isinstance(row, dict) and row.get(n) is not None]
    if not found:
        has = ", ".join(map(str, row)) if isinstance(row, dict) else type(row).__name__
        raise ValueError(f"{where} has none of {', '.join(names)}; it has {has}")
    value = row[found[0]]
    if found[0] == TEXT and isinstance(value, str):
        return value
    if found[0] != TEXT and isinstance(value, list) and all(type(i) is int and i >= 0 for i in value):
        return value
    raise ValueError(f"{where}: {found[0]} must be {'a text' if found[0] == TEXT else 'a list of token ids'}")


def _jsonl(path: Path) -> Iterator[Document]:
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                try:
                    row = json.loads(line)
                except ValueError as error:
                    raise ValueError(f"{path}, line {number} is not JSON: {error}") from None
                yield _document(row, f"{path}, line {number}")


def _parquet(path: Path) -> Iterator[Document]:
    try:
        import pyarrow.parquet
    except ImportError:
        raise ValueError(f"{path} needs the package pyarrow: pip install 'tedcompile[data]'") from None
    row = 0
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            names = [n for n in (TEXT, *IDS) if n in file.schema_arrow.names]
            for batch in file.iter_batches(1024, columns=names[:1] or None):
                for value in batch.to_pylist():
                    row += 1
                    yield _document(value, f"{path}, row {row}")
    except pyarrow.ArrowException as error:
        raise ValueError(f"{path} is not a Parquet file: {error}") from None


def _numpy(path: Path) -> Iterator[Document]:
    import numpy

    try:
        ids = numpy.load(path, mmap_mode="r", allow_pickle=False)
    except ValueError as error:
        raise ValueError(f"{path} is not an array of token ids: {error}") from None
    if ids.dtype.kind not in "iu" or ids.ndim not in (1, 2):
        raise ValueError(
            f"{path} holds {ids.dtype} of shape {ids.shape}: token ids are integers (n,) or (documents, n)"
        )
    for row in ids if ids.ndim == 2 else (ids,):
        for start in range(0, len(row), 1 << 20):
            yield torch.from_numpy(row[start : start + (1 << 20)].astype("int64"))


def _dataset(path: Path) -> Iterator[Document]:
    """A folder of `datasets.Dataset.save_to_disk`."""
    try:
        import datasets
    except ImportError:
        raise ValueError(f"{path} needs the package datasets: pip install 'tedcompile[data]'") from None
    try:
        found = datasets.load_from_disk(str(path))
    except Exception as error:
        raise ValueError(f"{path} is not a dataset that was saved to disk: {error}") from None
    if isinstance(found, dict):
        raise ValueError(f"{path} holds the splits {', '.join(found)}: name the folder of one")
    for number, row in enumerate(found, 1):
        yield _document(row, f"{path}, row {number}")


READERS: dict[str, Callable[[Path], Iterator[Document]]] = {
    ".jsonl": _jsonl,
    ".parquet": _parquet,
    ".npy": _numpy,
}


def files(paths: Sequence[str]) -> list[Path]:
    """Files in order of name; a folder stands for its files, one that `datasets` saved for itself."""
    found: list[Path] = []
    for path in map(Path, paths):
        if path.is_dir() and not any((path / n).exists() for n in ("dataset_info.json", "dataset_dict.json")):
            inside = sorted(p for p in path.iterdir() if p.is_file() and not p.name.startswith("."))
            if not inside:
                raise ValueError(f"there is no file in {path}")
            found += inside
        elif path.exists():
            found.append(path)
        else:
            raise ValueError(f"there is no file {path}")
    return found


# ---- one flat array


def digest(paths: Sequence[Path], tokenizer: Tokenizer) -> str:
    """Of what the array is made: names, sizes and times of the files, and the tokenizer."""
    facts = []
    for path in paths:
        inside = sorted(path.iterdir()) if path.is_dir() else [path]
        facts += [(str(p.resolve()), p.stat().st_size, p.stat().st_mtime_ns) for p in inside]
    return hashlib.sha256(repr((facts, tokenizer.mark)).encode()).hexdigest()[:16]


def tokenise(paths: Sequence[Path], tokenizer: Tokenizer, folder: Path, vocabulary: int | None) -> Path:
    """Writes the ids of all documents into a file of `folder`, unless it is there; returns it.

    Its name says what it was made of and, last, what it holds (`contents`). Raises ValueError for an id that the
    model's vocabulary does not have, and when the disk is full.
    """
    kind = "u1" if (vocabulary or 1 << 30) <= 256 else "i4"
    name = f"tokens-{digest(paths, tokenizer)}-{vocabulary or 0}"
    for known in folder.glob(f"{name}-*.{kind}"):
        return known
    stage, total = folder / f".{name}.{os.getpid()}", hashlib.sha256()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with stage.open("wb") as out:
            for path in paths:
                for document in documents(path):
                    given = isinstance(document, str)
                    found = tokenizer.encode(document) if isinstance(document, str) else document
                    ids = torch.as_tensor(found, dtype=torch.int64)
                    if given and tokenizer.end is not None:
                        ids = torch.cat([ids, torch.tensor([tokenizer.end])])
                    low, high = (int(ids.min()), int(ids.max())) if len(ids) else (0, 0)
                    if low < 0 or high >= (vocabulary or 1 << 31):
                        maker = f"the tokenizer {tokenizer.name} makes" if given else "the file holds"
                        raise ValueError(
                            f"{path}: {maker} token id {high if low >= 0 else low}, the model's vocabulary has "
                            f"{vocabulary or 1 << 31:,}"
                        )
                    block = memoryview(ids.to(DTYPES[kind]).numpy())
                    total.update(block)
                    out.write(block)
            out.flush()
            os.fsync(out.fileno())
        target = folder / f"{name}-{total.hexdigest()[:16]}.{kind}"
        stage.rename(target)
    except OSError as error:
        raise ValueError(f"the tokens cannot be written to {folder}: {error}") from None
    finally:
        stage.unlink(missing_ok=True)
    return target


def contents(file: Path) -> str:
    """A hash of the ids in a file of `tokenise`."""
    return file.stem.rpartition("-")[2]


@dataclass
class Sequences:
    """Sequences of `seq` ids (and `extra` more, which are the next one's first) of a file of `tokenise`."""

    file: Path
    seq: int
    extra: int = 0

    def __post_init__(self):
        dtype = DTYPES[self.file.suffix[1:]]
        size = self.file.stat().st_size // dtype.itemsize
        self.flat = torch.from_file(str(self.file), shared=False, size=size, dtype=dtype) if size else torch.empty(0)
        self.count = max(size - self.extra, 0) // self.seq

    def read(self, indices: Sequence[int]) -> Tensor:
        """(len(indices), seq + extra) int64."""
        rows = [self.flat[i * self.seq : (i + 1) * self.seq + self.extra] for i in indices]
        return torch.stack(rows).to(torch.int64)


@dataclass
class MicroBatches:
    """A list without end of micro-batches of `batch` sequences: every epoch all sequences in another order, those left
    over (fewer than `batch`) not used. `held_out` sequences at the end are never in it."""

    sequences: Sequences
    batch: int
    seed: int
    held_out: int = 0

    def __post_init__(self):
        self.count = self.sequences.count - self.held_out
        self.epoch_size = self.count // self.batch
        self._order: tuple[int, Tensor] = (-1, torch.empty(0))
        if not self.epoch_size:
            raise ValueError(
                f"the data hold {self.sequences.count:,} sequences of {self.sequences.seq} tokens, {self.held_out} of "
                f"them held out: less than one micro-batch of {self.batch}"
            )

    def read(self, number: int) -> Tensor:
        """Micro-batch `number` (from 0), (batch, seq + extra) int64."""
        epoch, place = divmod(number, self.epoch_size)
        if self._order[0] != epoch:
            generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
            self._order = (epoch, torch.randperm(self.count, generator=generator))
        return self.sequences.read(self._order[1][place * self.batch : (place + 1) * self.batch].tolist())
