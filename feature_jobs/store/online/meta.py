"""The meta of a view's online rows: how keys and values are stored, and the wrapped data keys."""

from __future__ import annotations

import secrets
import struct
from collections.abc import Mapping
from dataclasses import dataclass, replace

import msgpack

from feature_jobs.store.catalog.specifications import ViewSpec
from feature_jobs.store.online.layout import Layout

FORMAT = 2
"""Format of rows and addresses. A meta of format 1 does not contain this number, and all its addresses are hashes."""
GENERATION_BYTES = 8
STAMP_BYTES = GENERATION_BYTES + 8


@dataclass(frozen=True, kw_only=True, slots=True)
class Meta:
    """The meta of one generation: one materialisation and the rows that were put since."""

    generation: bytes
    edition: int
    """Grows with every change of the meta within the generation."""
    key_types: Mapping[str, str]
    """Type of each join key: `int64` or `string`."""
    layouts: tuple[Layout, ...]
    """A row refers to its layout by the index in this tuple."""
    data_keys: Mapping[str, str]
    """Wrapped data key by column class."""
    materialised: bool = True
    """Whether the generation began with a materialisation, so that an entity without a row has no values."""
    format: int = FORMAT

    @property
    def stamp(self) -> bytes:
        """The unique id of this meta: generation and edition, the first bytes of the packed meta."""
        return self.generation + struct.pack(">Q", self.edition)

    @classmethod
    def new(
        cls, view: ViewSpec, key_types: Mapping[str, str], data_keys: Mapping[str, str], *, materialised: bool
    ) -> Meta:
        """Return the meta of a new generation, written by one version of the view."""
        return cls(
            generation=secrets.token_bytes(GENERATION_BYTES),
            edition=0,
            key_types=dict(key_types),
            layouts=(layout_of(view),),
            data_keys=data_keys,
            materialised=materialised,
        )

    @classmethod
    def unpack(cls, packed: bytes) -> Meta:
        """Return the meta from the bytes that `pack` returned."""
        stored = msgpack.unpackb(packed[STAMP_BYTES:])
        return cls(
            generation=packed[:GENERATION_BYTES],
            edition=struct.unpack_from(">Q", packed, GENERATION_BYTES)[0],
            key_types=stored["key_types"],
            layouts=tuple(Layout(version, fields) for version, fields in stored["layouts"]),
            data_keys=stored["data_keys"],
            materialised=stored.get("whole", True),
            format=stored.get("format", 1),
        )

    def pack(self) -> bytes:
        """Return the meta as bytes: the stamp, then the content."""
        content = {
            "key_types": self.key_types,
            "layouts": [[layout.version, layout.fields] for layout in self.layouts],
            "data_keys": self.data_keys,
            "whole": self.materialised,
            "format": self.format,
        }
        return self.stamp + bytes(msgpack.packb(content))

    def layout_number(self, view: ViewSpec) -> int | None:
        """Return the index of the layout that a version of the view writes; None before its first row."""
        own = layout_of(view)
        for number, layout in enumerate(self.layouts):
            if (layout.version, layout.fields) == (own.version, own.fields):
                return number
        return None

    def with_key_types(self, key_types: Mapping[str, str]) -> Meta:
        """Return the next edition, with other key types. Rows under keys of the old types are not found any more."""
        return replace(self, edition=self.edition + 1, key_types=dict(key_types))

    def with_layout(self, view: ViewSpec, data_keys: Mapping[str, str]) -> Meta:
        """Return the next edition, with the layout of this version of the view and additional data keys."""
        return replace(
            self,
            edition=self.edition + 1,
            layouts=(*self.layouts, layout_of(view)),
            data_keys={**self.data_keys, **data_keys},
        )


def layout_of(view: ViewSpec) -> Layout:
    """Return the layout in which a version of a view packs its rows."""
    return Layout(view.version, [(field.name, field.dtype, field.sensitivity) for field in view.fields])
