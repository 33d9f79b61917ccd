"""Looks up the embedding of a caption in a store."""

from __future__ import annotations

import numpy as np

from data_pipelines.common import caption_key
from data_pipelines.embeddings.store import FORMS, open_store
from data_pipelines.records import tfrecord
from data_pipelines.records.files import Files
from data_pipelines.records.record_files import unframe
from data_pipelines.records.source import Bad
from imagen_jax.common.errors import first_line


class Lookup:
    """The embeddings of a store by caption; threads may share it.

    Raises:
      UserError: there is no complete store at `path`.
    """

    def __init__(self, path: str):
        self._store, self.files = open_store(path), Files()

    def __call__(self, caption: str) -> np.ndarray:
        """Returns bfloat16 [tokens, dim].

        Raises:
          Bad: the store lacks the caption, or the embedding is damaged.
          UserError: an index of the store is missing or damaged.
        """
        store = self._store
        found = store.find(caption_key(caption))
        if found is None:
            raise Bad("no embedding of the caption", f"{store.path} lacks {caption!r}")
        shard, start, tokens = found
        size = tokens * FORMS[store.dtype].token_bytes(store.dim) + tfrecord.FRAME
        path = str(store.file(shard, ".tfrecord"))
        try:
            data = unframe(self.files.read(path, start, size), size)
        except OSError as e:
            raise Bad("unreadable store", f"{path}: {first_line(e)}") from e
        except Bad as bad:
            raise Bad("damaged store", f"{path}: {bad}") from bad
        return FORMS[store.dtype].unpack(data, store.dim)
