"""The size of an update: as measured on the wire, as the paper's tables print it, and as the paper counts it.

The paper's figure is of its own models. Of a run with a narrower one it says nothing, so its way of counting is applied
to the run's own model too.
"""

from functools import cache

import torch

from zerofl.data import DATASETS
from zerofl.exchange.wire import schema_of
from zerofl.experiment import Experiment
from zerofl.fl.records import MB, Summary
from zerofl.fl.records import savings as times_smaller
from zerofl.models import build_model
from zerofl.report.cells import Beside
from zerofl.report.collect import ReportRow
from zerofl.report.paper_bytes import PAPER_MB, paper_csr_bytes, paper_full_bytes

PAPER_WIDTH = 64  # stem channels of the paper's ResNet-18

NOTE = (
    "Measured MB are 10^6 bytes on the wire, up in an update and down to the clients for each of them, in brackets the "
    "paper's figure. The paper's MB are 1,024,000 bytes of an "
    "estimate, which the column beside makes for the model of the run: 8 bytes for every number of a sparse update, 4 "
    "for every one of the whole model. Savings are against sending the model's numbers as they are."
)


@cache
def counted_bytes(experiment: Experiment) -> float:
    """What the paper would count for one update of this experiment's model."""
    source = DATASETS[experiment.dataset]
    with torch.device("meta"):
        model = build_model(experiment.model, source.classes, source.channels, experiment.width)
    schema = schema_of(model.state_dict())
    if experiment.uplink == "full":
        return paper_full_bytes(schema)
    sparse = [f"{name}.weight" for name in model.sparse_layers] if experiment.sparsity else []
    mask_ratio = min(experiment.mask_ratio, experiment.sparsity)  # no more than all of them are sent
    return paper_csr_bytes(schema, sparse, experiment.sparsity, mask_ratio)


def has_other_model(experiment: Experiment) -> bool:
    """Whether it is not a model whose sizes the paper prints: a ResNet-18 of another width."""
    return experiment.model == "resnet18" and experiment.width != PAPER_WIDTH


def measured_size(rows: list[ReportRow]) -> Beside:
    """MB an update in the finished runs, from the row that sends least to the one that sends most; the paper's."""
    measured = [sum(s.uplink_bytes for s in of) / sum(s.updates for s in of) / MB for of in _summaries(rows)]
    paper = _one_of(rows, "size")
    if paper and any(has_other_model(row.experiment) for row in rows):
        paper += f" at width {PAPER_WIDTH}"
    return Beside(_range(measured, 2), paper)


def downlink_size(rows: list[ReportRow]) -> str:
    """MB that went down to the clients for each update that was used: the model, and again where they validated."""
    return _range([sum(s.downlink_bytes for s in of) / sum(s.updates for s in of) / MB for of in _summaries(rows)], 2)


def counted_size(rows: list[ReportRow]) -> str:
    """The paper's MB of an update of the runs' own model."""
    return _range([counted_bytes(row.experiment) / PAPER_MB for row in rows], 1)


def savings(rows: list[ReportRow]) -> Beside:
    """How many times the measured bytes the whole model would have taken; the paper's."""
    measured = [
        times_smaller(of[0].full_model_bytes, sum(s.updates for s in of), sum(s.uplink_bytes for s in of))
        for of in _summaries(rows)  # the seeds of a row have one model
    ]
    paper = _one_of(rows, "savings")
    return Beside(_range(measured, 1, "x"), f"{paper}x" if paper else "")


def sizes_note(rows: list[ReportRow]) -> str:
    """What is to be known of the three columns, and whether the paper's model is another."""
    widths = sorted({row.experiment.width for row in rows if has_other_model(row.experiment)})
    if not widths:
        return NOTE
    return (
        f"{NOTE} The model here is ResNet-18 at width {', '.join(map(str, widths))}, the paper's at width "
        f"{PAPER_WIDTH}: measured and printed MB are of different models, and only the savings compare."
    )


def _summaries(rows: list[ReportRow]) -> list[list[Summary]]:
    """The summaries of each row that has a finished run."""
    return [row.summaries for row in rows if row.summaries]


def _range(values: list[float], digits: int, unit: str = "") -> str:
    texts = list(dict.fromkeys(f"{value:.{digits}f}{unit}" for value in sorted(values)))
    return " to ".join([texts[0], texts[-1]] if len(texts) > 1 else texts)


def _one_of(rows: list[ReportRow], key: str) -> str:
    values = {f"{row.paper[key]:.1f}" for row in rows if key in row.paper}
    return values.pop() if len(values) == 1 else ""
