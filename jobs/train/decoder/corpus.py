"""Text files as documents: find them, hash them, and split them into rows to fit on and held-out rows.

A file's content decides its part, so two copies of a file are always in the same part. Only the names, sizes and hashes
of the files are in memory. Each token is read when it is needed.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from cluster.errors import TrainingSetError
from cluster.storage import file_system, resolve

_BLOCK = 1 << 20
"""Bytes that are hashed at a time."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Document:
    """One text file."""

    path: str
    """Path in its file system."""
    size: int
    """Bytes; at least one."""
    sha256: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Corpus:
    """Documents as one sequence of tokens: for each document, the token `DOCUMENT` and then its bytes."""

    uri: str
    """Folder, file or pattern that the documents come from."""
    documents: tuple[Document, ...]
    starts: npt.NDArray[np.int64] = field(init=False, repr=False, compare=False)
    """First token of each document, and the number of all tokens, int64 [documents + 1]."""

    def __post_init__(self) -> None:
        lengths = [1 + document.size for document in self.documents]
        object.__setattr__(self, "starts", np.concatenate(([0], np.cumsum(lengths, dtype=np.int64))))

    @property
    def num_tokens(self) -> int:
        return int(self.starts[-1])

    @property
    def num_bytes(self) -> int:
        return self.num_tokens - len(self.documents)

    @property
    def hash(self) -> str:
        """SHA-256 of the files' contents, in order. The files' names do not matter."""
        return hashlib.sha256("".join(document.sha256 for document in self.documents).encode()).hexdigest()


@dataclass(frozen=True, kw_only=True, slots=True)
class Parts:
    """The parts of a split."""

    fit: Corpus
    """Documents to fit the model on."""
    validation: Corpus
    """Documents to choose the best state of the model on."""
    held_out: Corpus
    """Documents that fitting never uses; the model is evaluated on them."""


def read_corpus(text: str, *, excluded: Sequence[str] = ()) -> Corpus:
    """Find and hash text files. Empty files are left out.

    Hidden files and folders are left out, too, unless `text` names them. Many of them are not texts (`.git`), or have
    secrets (`.env`), and a model can repeat what it was trained on.

    Args:
        text: A folder (all files below it), a file, or a pattern such as `docs/**/*.md`; a path, or a URI of fsspec.
        excluded: Folders whose files are left out, for example the storage root.

    Raises:
        TrainingSetError: There is no file with text, or a file cannot be read.
    """
    uri = resolve(text)
    fs, path = file_system(uri)
    try:
        found = fs.find(path) if fs.isdir(path) else [name for name in fs.glob(path) if fs.isfile(name)]
        outside = tuple(f"{file_system(resolve(folder))[1].rstrip('/')}/" for folder in excluded)
        found = [name for name in found if not (_is_hidden(name, path) or name.startswith(outside))]
        documents = tuple(_document(fs, name) for name in sorted(found))
    except OSError as error:
        raise TrainingSetError(f"text={text} cannot be read: {error}") from error
    documents = tuple(document for document in documents if document.size)
    if not documents:
        raise TrainingSetError(
            f"text={text} has no files with text. Give a folder, a file, or a pattern such as 'docs/**/*.md'."
        )
    return Corpus(uri=uri, documents=documents)


def split_corpus(corpus: Corpus, *, modulo: int, remainder: int, validation_share: float) -> Parts:
    """Split documents by the hash of their content.

    Args:
        corpus: All documents.
        modulo, remainder: A document is held out if its hash modulo `modulo` is `remainder`.
        validation_share: Share of the other documents that are for validation.

    Raises:
        TrainingSetError: A part has no documents.
    """
    fit, validation, held_out = [], [], []
    for document in corpus.documents:
        if int(document.sha256[:16], 16) % modulo == remainder:
            held_out.append(document)
        elif int(document.sha256[16:32], 16) < validation_share * 2**64:
            validation.append(document)
        else:
            fit.append(document)
    for name, part in (("training", fit), ("validation", validation), ("held-out", held_out)):
        if not part:
            raise TrainingSetError(
                f"The split leaves no {name} files of {len(corpus.documents)}. Add files, or set another "
                "`split.modulo`, `split.remainder` or `validation_share`."
            )
    return Parts(
        fit=_part(corpus, fit), validation=_part(corpus, validation), held_out=_part(corpus, held_out)
    )


def _part(corpus: Corpus, documents: Iterable[Document]) -> Corpus:
    return Corpus(uri=corpus.uri, documents=tuple(documents))


def _is_hidden(name: str, text: str) -> bool:
    """Return whether a path has a hidden file or folder that the caller's folder or pattern does not name."""
    named = text.split("/")
    return any(part.startswith(".") and part not in named for part in name.split("/"))


def _document(fs: Any, path: str) -> Document:
    digest, size = hashlib.sha256(), 0
    with fs.open(path, "rb") as file:
        while block := file.read(_BLOCK):
            digest.update(block)
            size += len(block)
    return Document(path=path, size=size, sha256=digest.hexdigest())
