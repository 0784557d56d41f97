from hypothesis import given
from hypothesis import strategies as st

from zerofl.rng import cohort, rng

numbers = st.integers(0, 2**20)


@given(numbers, numbers, numbers, st.text(max_size=8))
def test_the_same_place_gives_the_same_numbers(seed: int, round: int, client: int, purpose: str) -> None:
    assert rng(seed, round, client, purpose).random() == rng(seed, round, client, purpose).random()


def test_another_seed_round_client_or_purpose_gives_others() -> None:
    places = [(1, 2, 3, "a"), (2, 2, 3, "a"), (1, 3, 3, "a"), (1, 2, 4, "a"), (1, 2, 3, "b"), (2, 1, 3, "a")]
    assert len({rng(*place).random() for place in places}) == len(places)


@given(numbers, numbers, st.data())
def test_a_cohort_is_distinct_sorted_clients(seed: int, round: int, data: st.DataObject) -> None:
    clients = data.draw(st.integers(1, 200))
    size = data.draw(st.integers(1, clients))
    chosen = cohort(seed, round, clients, size)
    assert len(set(chosen)) == size
    assert chosen == sorted(chosen)
    assert set(chosen) <= set(range(clients))


def test_every_client_is_drawn_sooner_or_later() -> None:
    assert {client for round in range(1, 60) for client in cohort(1, round, 20, 3)} == set(range(20))
