"""What a client changed of a rounded model, put onto the server's own: by hand."""

import pytest
import torch

from zerofl.exchange.aggregate import average
from zerofl.exchange.rounded import put_back, rounding
from zerofl.exchange.update import Sparse, State, Update, sparsified

OWN = {"w": torch.tensor([0.75, -0.5, 0.0, 2.0]), "b": torch.tensor([0.25]), "n": torch.tensor(4)}
SENT = {"w": torch.tensor([1.0, -0.5, 0.0, 1.5]), "b": torch.tensor([0.25]), "n": torch.tensor(4)}
TRAINED = {"w": torch.tensor([1.25, 0.0, 0.5, 1.0]), "b": torch.tensor([0.5]), "n": torch.tensor(7)}


def test_the_change_of_each_entry_that_was_sent_is_put_onto_the_servers_own() -> None:
    """0.75 + (1.25 - 1);  -0.5 was not sent;  0 + (0.5 - 0);  2 + (1 - 1.5)."""
    update = put_back(Update(False, TRAINED | {"w": sparsified(TRAINED["w"])}), rounding(OWN, SENT))
    w = update.tensors["w"]
    assert isinstance(w, Sparse)
    assert w.to_dense().tolist() == [1.0, 0.0, 0.5, 1.5]
    whole = put_back(Update(False, dict(TRAINED)), rounding(OWN, SENT))
    for name, value in (("w", torch.tensor([1.0, 0.0, 0.5, 1.5])), ("b", torch.tensor([0.5])), ("n", torch.tensor(7))):
        sent = whole.tensors[name]
        assert isinstance(sent, torch.Tensor)
        assert torch.equal(sent, value)


@pytest.mark.parametrize(("adds", "sent"), [(True, SENT), (False, OWN)])
def test_changes_and_updates_of_the_servers_own_model_are_what_they_are(adds: bool, sent: State) -> None:
    update = Update(adds, dict(TRAINED))
    assert put_back(update, rounding(OWN, sent)) is update


def test_the_average_of_clients_that_change_nothing_is_the_servers_model_where_they_send() -> None:
    """Were their weights averaged as they are, the server would have the rounded ones from then on."""
    updates = [(put_back(Update(False, dict(SENT)), rounding(OWN, SENT)), examples) for examples in (3, 5)]
    averaged = average(OWN, updates)
    for name in OWN:
        torch.testing.assert_close(averaged[name], OWN[name])
