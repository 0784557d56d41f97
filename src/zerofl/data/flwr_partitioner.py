"""The LDA partition for users of flwr-datasets: `FederatedDataset(partitioners={"train": LdaPartitioner(...)})`."""

import torch
from datasets import Dataset
from flwr_datasets.partitioner import Partitioner
from torch import Tensor

from zerofl.data.partition import lda_partition


class LdaPartitioner(Partitioner):  # type: ignore[misc]
    """Deals the samples as `lda_partition` does, to partitions of equal size, up to one (Hsu et al., 2019).

    `partition_by` is the column of labels, whole numbers from 0 or a ClassLabel.

    Raises:
        ValueError: when partitions are first asked for: no such column, labels that are not whole numbers from 0, more
            partitions than samples, or an `alpha` that is not positive; or a partition that does not exist.
    """

    def __init__(self, num_partitions: int, partition_by: str, alpha: float, seed: int) -> None:
        super().__init__()
        self._num_partitions, self._partition_by, self._alpha, self._seed = num_partitions, partition_by, alpha, seed
        self._parts: list[Tensor] | None = None

    @property
    def num_partitions(self) -> int:
        """The number of partitions."""
        return self._num_partitions

    def load_partition(self, partition_id: int) -> Dataset:
        """The samples of one partition, in the data set's order."""
        if self._parts is None:
            self._parts = lda_partition(self._labels(), self._num_partitions, self._alpha, self._seed)
        if not 0 <= partition_id < self._num_partitions:
            raise ValueError(f"partition_id = {partition_id}: expected 0 to {self._num_partitions - 1}")
        return self.dataset.select(self._parts[partition_id].tolist())

    def _labels(self) -> Tensor:
        if self._partition_by not in self.dataset.column_names:
            columns = ", ".join(self.dataset.column_names)
            raise ValueError(f"partition_by = {self._partition_by!r}: no such column; the columns are {columns}")
        labels = self.dataset.with_format(None)[self._partition_by][:]
        if not all(isinstance(label, int) and label >= 0 for label in labels):
            wrong = next(label for label in labels if not (isinstance(label, int) and label >= 0))
            raise ValueError(
                f"partition_by = {self._partition_by!r}: expected whole numbers from 0, found {wrong!r}; make them "
                f"with dataset.class_encode_column({self._partition_by!r})"
            )
        return torch.tensor(labels, dtype=torch.int64)
