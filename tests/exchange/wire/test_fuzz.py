from tests.exchange.wire.fuzz import fuzz


def test_mutated_payloads_are_read_or_refused() -> None:
    """A sample; CONTRIBUTING.md has the command for a hundred thousand."""
    outcomes = fuzz(count=5000, seed=1)
    assert outcomes["refused"] > 2000
    assert outcomes["read"] > 100  # a changed value is still an update: the mutations do get past the checks
