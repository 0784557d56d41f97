"""Training from a rounded model: what a client changed of it is put onto the server's own."""

from torch import Tensor

from zerofl.exchange.update import Sparse, State, Update


def moved(update: Update, sent: State, model: State) -> Update:
    """The update of the model that was `sent`, as one of the server's `model`: weights w become model + (w - sent).

    Only of the entries that it has; changes and counters are what they are, as is all of an update where the model was
    sent as it is. So what rounding takes off is lost to no round: the server's model is "preserved" in the words of
    Philippenko and Dieuleveut (2021), whose clients train from a compressed one too.
    """
    if update.adds or sent is model:
        return update
    tensors = {name: _moved(tensor, sent[name], model[name]) for name, tensor in update.tensors.items()}
    return Update(False, tensors)


def _moved(tensor: Tensor | Sparse, sent: Tensor, own: Tensor) -> Tensor | Sparse:
    if not own.is_floating_point():
        return tensor
    if not isinstance(tensor, Sparse):
        return tensor + (own - sent)
    positions = tensor.positions()
    return tensor._replace(values=tensor.values + (own - sent).flatten()[positions])
