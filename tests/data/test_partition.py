import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from zerofl.data.partition import LEAST_ALPHA, MOST_ALPHA, lda_partition, validation_split


@settings(max_examples=50, deadline=None)
@given(
    st.lists(st.integers(0, 6), min_size=1, max_size=300),
    st.sampled_from([LEAST_ALPHA, 0.01, 0.1, 1.0, 1000.0, MOST_ALPHA]),
    st.integers(0, 5),
    st.data(),
)
def test_every_sample_has_one_client_and_sizes_differ_by_one_at_most(
    labels: list[int], alpha: float, seed: int, data: st.DataObject
) -> None:
    clients = data.draw(st.integers(1, len(labels)))
    parts = lda_partition(torch.tensor(labels), clients, alpha, seed)
    assert torch.cat(parts).sort().values.tolist() == list(range(len(labels)))
    sizes = [len(part) for part in parts]
    assert len(sizes) == clients
    assert max(sizes) - min(sizes) <= 1


LABELS = torch.arange(10).repeat_interleave(500)


def largest_class_share(alpha: float) -> float:
    """The share of its largest class in a client's samples, averaged over the first half of the clients."""
    parts = lda_partition(LABELS, 50, alpha, seed=1)[:25]
    return float(sum(LABELS[part].bincount().max() / len(part) for part in parts) / 25)


def test_alpha_sets_how_uneven_the_classes_are() -> None:
    """E[max of Dirichlet]: 1/10 as alpha grows, H(10)/10 = 0.293 for alpha 1, nearly 1 for alpha 0.01."""
    assert largest_class_share(1000) < 0.17  # 100 draws of 10 classes: the largest count is about 15
    assert 0.24 < largest_class_share(1.0) < 0.36
    assert largest_class_share(0.01) > 0.85


def test_it_is_a_function_of_the_seed() -> None:
    one, same, other = (lda_partition(LABELS, 20, 1.0, seed) for seed in (1, 1, 2))
    assert all(torch.equal(a, b) for a, b in zip(one, same, strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def test_a_tiny_alpha_gives_few_classes_also_when_a_clients_first_are_exhausted() -> None:
    """Each client has one class, or as many more as it takes to fill up where they run out."""
    labels = torch.arange(10).repeat_interleave(100)
    parts = lda_partition(labels, 10, 1e-6, seed=3)
    classes = [int((labels[part].bincount() > 0).sum()) for part in parts]
    assert sum(classes) <= 20
    assert classes.count(1) >= 5


@pytest.mark.parametrize(
    ("clients", "alpha", "message"),
    [
        (0, 1.0, "clients = 0"),
        (5001, 1.0, "clients = 5001: expected 1 to 5000"),
        (5, 0.0, "alpha = 0.0"),
        (5, 1e308, "alpha = 1e"),
    ],
)
def test_bad_arguments_are_named(clients: int, alpha: float, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        lda_partition(LABELS, clients, alpha, 1)


@pytest.mark.parametrize(("samples", "fraction", "held_out"), [(80, 0.1, 8), (500, 0.1, 50), (1, 0.9, 0), (9, 0.0, 0)])
def test_validation_holds_out_its_fraction(samples: int, fraction: float, held_out: int) -> None:
    indices = torch.arange(100, 100 + samples)
    training, validation = validation_split(indices, fraction, seed=1, client=4)
    assert len(validation) == held_out
    assert torch.cat([training, validation]).sort().values.tolist() == indices.tolist()
    again = validation_split(indices, fraction, seed=1, client=4)
    assert torch.equal(again[0], training)
    if held_out > 1:
        assert not torch.equal(validation_split(indices, fraction, seed=1, client=5)[1], validation)
