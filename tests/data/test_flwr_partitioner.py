import pytest
import torch
from datasets import ClassLabel, Dataset, Features, Value
from hypothesis import given, settings
from hypothesis import strategies as st

from zerofl.data.flwr_partitioner import LdaPartitioner
from zerofl.data.partition import lda_partition


def partitioned(labels: list[int], partitions: int, alpha: float, seed: int) -> LdaPartitioner:
    """Rows that know their own place."""
    partitioner = LdaPartitioner(partitions, partition_by="label", alpha=alpha, seed=seed)
    partitioner.dataset = Dataset.from_dict({"place": list(range(len(labels))), "label": labels})
    return partitioner


@settings(max_examples=30, deadline=None)
@given(
    st.lists(st.integers(0, 6), min_size=1, max_size=100), st.sampled_from([0.01, 1.0, 1000.0]), st.integers(0, 3),
    st.data(),
)  # fmt: skip
def test_partitions_are_those_of_lda_partition(labels: list[int], alpha: float, seed: int, data: st.DataObject) -> None:
    count = data.draw(st.integers(1, min(len(labels), 10)))
    partitioner = partitioned(labels, count, alpha, seed)
    assert partitioner.num_partitions == count
    parts = lda_partition(torch.tensor(labels), count, alpha, seed)
    for number in (*reversed(range(count)), 0):  # in any order, and again
        assert partitioner.load_partition(number)["place"][:] == parts[number].tolist()


def test_class_labels_and_other_formats_are_read_as_numbers() -> None:
    labels = [0, 1, 1, 0, 2, 2, 1, 0]
    features = Features({"label": ClassLabel(names=["a", "b", "c"]), "place": Value("int64")})
    dataset = Dataset.from_dict({"label": labels, "place": list(range(8))}, features).with_format("torch")
    partitioner = LdaPartitioner(3, "label", 1.0, 5)
    partitioner.dataset = dataset
    for number, part in enumerate(lda_partition(torch.tensor(labels), 3, 1.0, 5)):
        assert torch.equal(partitioner.load_partition(number)["place"][:], part)


def test_bad_arguments_are_named() -> None:
    with pytest.raises(ValueError, match="partition_id = 2: expected 0 to 1"):
        partitioned([0, 1, 1], 2, 1.0, 1).load_partition(2)
    with pytest.raises(ValueError, match="partition_id = -1: expected 0 to 1"):
        partitioned([0, 1, 1], 2, 1.0, 1).load_partition(-1)
    with pytest.raises(ValueError, match="clients = 4: expected 1 to 3"):
        partitioned([0, 1, 1], 4, 1.0, 1).load_partition(0)
    with pytest.raises(ValueError, match="alpha = 0: expected a number from"):
        partitioned([0, 1, 1], 2, 0, 1).load_partition(0)
    for column, message in (
        ("name", "expected whole numbers from 0, found 'b'; make them with"),
        ("x", "no such column"),
    ):
        partitioner = LdaPartitioner(2, column, 1.0, 1)
        partitioner.dataset = Dataset.from_dict({"name": ["b", "a"]})
        with pytest.raises(ValueError, match=f"partition_by = '{column}': {message}"):
            partitioner.load_partition(0)
