"""Opens a split of a dataset, whatever its files are."""

from __future__ import annotations

from data_pipelines.records import prepared
from data_pipelines.records.record_files import RecordFiles
from data_pipelines.records.source import Source
from data_pipelines.records.tars import Tars


def open_split(data_dir: str, name: str, split: str) -> Source:
    """Opens a split of the dataset `name` in `data_dir`.

    Raises:
      UserError: there is no such dataset.
    """
    path = prepared.find(data_dir, name)
    if path.name == prepared.TARS:
        return Tars(path, split)
    path_of, lengths = prepared.split_files(path, split)
    return RecordFiles(path_of, lengths)
