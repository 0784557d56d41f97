"""Training from a rounded model: what a client changed of it is put onto the server's own."""

from torch import Tensor

from zerofl.exchange.update import Sparse, State, Update, entries_at


def rounding(model: State, sent: State) -> State:
    """What rounding took off each floating-point tensor of the server's model to make the one that was sent: w - Q(w).

    Nothing where that is the model itself.
    """
    if sent is model:
        return {}
    return {name: (tensor - sent[name]).contiguous() for name, tensor in model.items() if tensor.is_floating_point()}


def put_back(update: Update, rounding: State) -> Update:
    """The update of a model that was sent rounded, as one of the server's own: weights w become w + rounding.

    Only of the entries that it has; changes and counters are what they are. So what rounding takes off is lost in no
    round: the server's model is "preserved" in the words of Philippenko and Dieuleveut (2021), whose clients train from
    a compressed one too.
    """
    if update.adds or not rounding:
        return update
    tensors = dict(update.tensors)
    for name, taken_off in rounding.items():
        tensors[name] = _plus(tensors[name], taken_off)
    return Update(False, tensors)


def _plus(tensor: Tensor | Sparse, taken_off: Tensor) -> Tensor | Sparse:
    if isinstance(tensor, Sparse):
        return tensor._replace(values=tensor.values + entries_at(taken_off, tensor.bits))
    return tensor + taken_off
