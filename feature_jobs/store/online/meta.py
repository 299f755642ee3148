"""What lies beside a view's online rows: how its keys and values are stored, and the wrapped data keys."""

from __future__ import annotations

import secrets
import struct
from collections.abc import Mapping
from dataclasses import dataclass, replace

import msgpack

from feature_jobs.store.catalog.specifications import ViewSpec
from feature_jobs.store.online.layout import Layout

FORMAT = 2
"""How rows and their addresses are made; in 1, which metas do not name, every address was a hash."""
GENERATION_BYTES = 8
STAMP_BYTES = GENERATION_BYTES + 8


@dataclass(frozen=True, kw_only=True, slots=True)
class Meta:
    """Of one generation of rows, which is one materialisation and what was put since."""

    generation: bytes
    edition: int
    """Grows with every change within the generation."""
    key_types: Mapping[str, str]
    """Join key to `int64` or `string`."""
    layouts: tuple[Layout, ...]
    """A row names its layout by the place here."""
    data_keys: Mapping[str, str]
    """Class to wrapped data key."""
    whole: bool = True
    """Whether it began with a materialisation, so that of an entity without a row there was none."""
    format: int = FORMAT

    @property
    def stamp(self) -> bytes:
        """Tells one meta from every other; the beginning of its bytes."""
        return self.generation + struct.pack(">Q", self.edition)

    @classmethod
    def new(
        cls, view: ViewSpec, key_types: Mapping[str, str], data_keys: Mapping[str, str], *, whole: bool
    ) -> Meta:
        """Of a new generation, written by one version of the view."""
        return cls(
            generation=secrets.token_bytes(GENERATION_BYTES),
            edition=0,
            key_types=dict(key_types),
            layouts=(layout_of(view),),
            data_keys=data_keys,
            whole=whole,
        )

    @classmethod
    def unpack(cls, packed: bytes) -> Meta:
        """The meta that `pack` gave."""
        stored = msgpack.unpackb(packed[STAMP_BYTES:])
        return cls(
            generation=packed[:GENERATION_BYTES],
            edition=struct.unpack_from(">Q", packed, GENERATION_BYTES)[0],
            key_types=stored["key_types"],
            layouts=tuple(Layout(version, fields) for version, fields in stored["layouts"]),
            data_keys=stored["data_keys"],
            whole=stored.get("whole", True),
            format=stored.get("format", 1),
        )

    def pack(self) -> bytes:
        """As it is stored: the stamp, then everything else."""
        content = {
            "key_types": self.key_types,
            "layouts": [[layout.version, layout.fields] for layout in self.layouts],
            "data_keys": self.data_keys,
            "whole": self.whole,
            "format": self.format,
        }
        return self.stamp + bytes(msgpack.packb(content))

    def layout_number(self, view: ViewSpec) -> int | None:
        """Which layout a version of the view writes in; none before its first row."""
        wanted = layout_of(view)
        for number, layout in enumerate(self.layouts):
            if (layout.version, layout.fields) == (wanted.version, wanted.fields):
                return number
        return None

    def with_key_types(self, key_types: Mapping[str, str]) -> Meta:
        """The next edition, for keys of other types; rows under keys of the old types are not found any more."""
        return replace(self, edition=self.edition + 1, key_types=dict(key_types))

    def with_layout(self, view: ViewSpec, data_keys: Mapping[str, str]) -> Meta:
        """The next edition, in which this version of the view writes too, with further data keys if it needs any."""
        return replace(
            self,
            edition=self.edition + 1,
            layouts=(*self.layouts, layout_of(view)),
            data_keys={**self.data_keys, **data_keys},
        )


def layout_of(view: ViewSpec) -> Layout:
    """How a version of a view packs its rows."""
    return Layout(view.version, [(field.name, field.dtype, field.sensitivity) for field in view.fields])
