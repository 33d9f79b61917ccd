"""Files of a workdir that grow: metrics, TensorBoard events, traces, lists of bad records.

A bucket cannot append to an object. If the workdir is in one, these files grow in a local folder
and are uploaded whole, at most once a minute and before each checkpoint. A killed run loses at most
the lines after its last checkpoint, which the resumed run would drop anyway.

The results of a command, such as samples, are written in the same way, and uploaded at its end.
"""

from __future__ import annotations

import contextlib
import shutil
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from imagen_jax.common import buckets
from imagen_jax.common.errors import UserError
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
                    copy = self.folder / name
                    copy.parent.mkdir(parents=True, exist_ok=True)
                    copy.write_bytes(path.read_bytes())
                    self._uploaded[copy] = _state(copy)

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
            state = _state(path)
            if self._uploaded.get(path) != state:
                with replacing(self._workdir / path.relative_to(self.folder)) as temporary:
                    shutil.copyfile(path, temporary)
                self._uploaded[path] = state

    def close(self) -> None:
        """Uploads what has changed and deletes the local folder."""
        if self._remote:
            self.upload()
            shutil.rmtree(self.folder)


@contextlib.contextmanager
def results(folder: Path, flag: str) -> Iterator[Path]:
    """Yields where to write the results that belong in `folder`: there, or locally for a bucket.

    The local folder begins as a copy of the one in the bucket, so that a command goes on where it
    was interrupted. What has changed is uploaded at the end, also after an error.

    Args:
      flag: the flag that names the folder.

    Raises:
      UserError: the bucket cannot be read or written.
    """
    if not buckets.is_remote(folder):
        yield folder
        return
    try:
        with buckets.as_os_errors(folder):
            found = [str(p.relative_to(folder)) for p in buckets.files_below(folder)]
        local = Mirror(folder, found)
    except OSError as e:
        raise UserError(f"--{flag}={folder} cannot be read: {e.strerror or e}") from e
    try:
        yield local.folder
    finally:
        try:
            local.close()
        except OSError as e:
            raise UserError(
                f"--{flag}={folder} cannot be written: {e.strerror or e}; the results are in "
                f"{local.folder}"
            ) from e


def _state(path: Path) -> tuple[int, int]:
    found = path.stat()
    return found.st_size, found.st_mtime_ns
