"""Files of a workdir that grow: metrics, TensorBoard events, traces, lists of bad records.

A bucket cannot append to an object. If the workdir is in one, these files grow in a local folder
and are uploaded whole, at most once a minute and before each checkpoint. A killed run loses at most
the lines after its last checkpoint, which the resumed run would drop anyway.
"""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from imagen_jax.common import buckets
from imagen_jax.common.files import replacing

UPLOAD_S = 60.0


class Mirror:
    """The local folder of a workdir's growing files.

    Args:
      resumed: names of files that an earlier process may have begun.

    Attributes:
      folder: where to write them; the workdir itself if it is not in a bucket.
    """

    def __init__(self, workdir: Path, resumed: Sequence[str] = ()):
        self._workdir, self._remote = workdir, buckets.is_remote(workdir)
        self._uploaded: dict[Path, tuple[int, int]] = {}
        self._time = time.monotonic()
        if not self._remote:
            self.folder = Path(workdir)
            return
        self.folder = Path(tempfile.mkdtemp(prefix="imagen_jax_run_"))
        for name in resumed:
            path = workdir / name
            with buckets.as_os_errors(path):
                if path.exists():
                    (self.folder / name).write_bytes(path.read_bytes())

    def due(self) -> bool:
        """Returns whether the last upload is so old that it is time for the next."""
        return self._remote and time.monotonic() > self._time + UPLOAD_S

    def upload(self) -> None:
        """Uploads the files that have changed.

        Raises:
          OSError: the bucket cannot be written.
        """
        if not self._remote:
            return
        self._time = time.monotonic()
        for path in buckets.files_below(self.folder):
            found = path.stat()
            state = found.st_size, found.st_mtime_ns
            if self._uploaded.get(path) != state:
                with replacing(self._workdir / path.relative_to(self.folder)) as temporary:
                    shutil.copyfile(path, temporary)
                self._uploaded[path] = state

    def close(self) -> None:
        """Uploads what has changed and deletes the local folder."""
        if self._remote:
            self.upload()
            shutil.rmtree(self.folder)
