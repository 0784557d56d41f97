"""A tour of ZeroFL as a notebook: data and a model of your own, from one machine to a SuperLink."""

# %% [markdown]
# # A tour: data and a model of your own, from one machine to a SuperLink
#
# This file is a notebook in jupytext's form: editors, and Jupyter with jupytext, open it as cells, and
# `python examples/tour/tour.py` runs it from top to bottom, in less than a minute on 2 cores. It needs the package
# with the extra `report`, and downloads nothing.
#
# It is also a Flower app, that of the `pyproject.toml` beside it: the nodes of the last part import this file. So cells
# that define something are plain, and those that compute begin with `if __name__ == "__main__":`, which holds in a
# notebook and not in a node.

# %%
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg
from torch import Tensor, nn

import zerofl
from zerofl.flower import SparseUplink, uplink_mod
from zerofl.flower.engines import InProcessGrid

torch.set_num_threads(1)  # the nodes of the last part share this machine

# %% [markdown]
# ## 1. Your data
#
# Here spectra of a machine's vibration in three axes, made up: each of eight states is a mixture of two tones in noise.
# Put arrays of your own in their place: samples, labels, and who has which.

# %%
STATES, SAMPLES, CLIENTS = 8, 64, 10


def make_spectra(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Amplitudes [count, 3, 33] of the frequencies in a window of 64 samples, and the state, 0 to 7, of each."""
    tones = torch.rand(STATES, 3, 2, generator=torch.Generator().manual_seed(0)) * 2.5 + 0.3
    draw = torch.Generator().manual_seed(seed)
    labels = torch.randint(STATES, (count,), generator=draw)
    phases = torch.rand(count, 3, 2, 1, generator=draw) * 2 * torch.pi
    waves = torch.sin(tones[labels].unsqueeze(-1) * torch.arange(SAMPLES) + phases).sum(2)
    waves += 2 * torch.randn(waves.shape, generator=draw)
    return torch.fft.rfft(waves).abs() / SAMPLES**0.5 - 3, labels


spectra, states = make_spectra(4000, seed=1)
test_spectra, test_states = make_spectra(1000, seed=2)


def samples_of(client: int) -> tuple[Tensor, Tensor]:
    """A client's samples, most of them of two states: machines do not all do the same."""
    draw = torch.Generator().manual_seed(client)
    own = (states == client % STATES) | (states == (client + 1) % STATES)
    mine = torch.multinomial(own.float() * 9 + 1, len(states) // CLIENTS, generator=draw)
    return spectra[mine], states[mine]


# %% [markdown]
# ## 2. Your model and your loop, made sparse by one line
#
# A network this small takes longer sparse than dense: its step is calls, not arithmetic. docs/kernels.md has the models
# that get faster. What it saves here is bytes.

# %%
SPARSITY = 0.9


def make_model(sparsity: float) -> nn.Module:
    """A small network; with a sparsity it trains with the largest of its weights only."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Flatten(), nn.Linear(99, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, STATES)
    )
    for layer in model[1::2]:
        nn.init.kaiming_normal_(layer.weight)  # what is left of a layer has to carry its signal
    if sparsity:
        zerofl.sparsify_(model, sparsity)  # this one; the last layer stays dense
    return model


def train(model: nn.Module, spectra: Tensor, states: Tensor, epochs: int) -> None:
    """Plain SGD."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    order = torch.Generator().manual_seed(0)
    for _ in range(epochs):
        for batch in torch.randperm(len(states), generator=order).split(16):
            optimizer.zero_grad()
            F.cross_entropy(model(spectra[batch]), states[batch]).backward()
            optimizer.step()


@torch.no_grad()
def accuracy(model: nn.Module) -> float:
    """On the samples that nobody trains on."""
    return (model.eval()(test_spectra).argmax(1) == test_states).float().mean().item()


# %%
if __name__ == "__main__":
    for sparsity in (0.0, SPARSITY):
        model = make_model(sparsity)
        started = time.perf_counter()
        train(model, spectra, states, epochs=2)
        print(f"one machine, sparsity {sparsity}: {accuracy(model):.1%} in {time.perf_counter() - started:.1f} s")

# %% [markdown]
# ## 3. A Flower app of it
#
# The client trains as above; `uplink_mod` sends of its change what matters. The server is Flower's FedAvg within
# `SparseUplink`.


# %%
def make_client_app(uplink: str, mask_ratio: float) -> ClientApp:
    """The client with an uplink strategy."""
    app = ClientApp(mods=[uplink_mod(uplink, sparsity=SPARSITY, mask_ratio=mask_ratio)])

    @app.train()
    def _(message: Message, context: Context) -> Message:
        model = make_model(SPARSITY)
        model.load_state_dict(message.content["arrays"].to_torch_state_dict())
        mine = samples_of(context.node_config["partition-id"])
        train(model, *mine, epochs=1)
        content = {"arrays": ArrayRecord(model.state_dict()), "metrics": MetricRecord({"num-examples": len(mine[1])})}
        return Message(RecordDict(content), reply_to=message)

    return app


def federate(grid: Grid, rounds: int, nodes: int) -> tuple[float, float]:
    """The model's accuracy after so many rounds with all nodes, and the MB that came up."""
    strategy = SparseUplink(FedAvg(fraction_evaluate=0.0, min_available_nodes=nodes))
    result = strategy.start(grid, ArrayRecord(make_model(SPARSITY).state_dict()), num_rounds=rounds)
    model = make_model(SPARSITY)
    model.load_state_dict(result.arrays.to_torch_state_dict())
    return accuracy(model), sum(strategy.uplink_bytes.values()) / 1e6


# %% [markdown]
# ## 4. Simulated: accuracy against bytes
#
# Ten clients in this process, once for each way to send. `full` is whole models.

# %%
ROWS = {
    "full": ("full", 0.0),
    "diff, 0.0": ("top_k_weights_diff", 0.0),
    "diff, 0.1": ("top_k_weights_diff", 0.1),
    "weights, 0.1": ("top_k_weights", 0.1),
}

if __name__ == "__main__":
    import matplotlib.pyplot as plt

    folder = Path(tempfile.mkdtemp(prefix="zerofl-tour-"))
    simulated = {}
    for name, row in ROWS.items():
        simulated[name] = federate(InProcessGrid(make_client_app(*row), CLIENTS), rounds=4, nodes=CLIENTS)
        print(f"simulated, {name}: {simulated[name][0]:.1%} for {simulated[name][1]:.2f} MB up")

    figure, axes = plt.subplots(figsize=(5, 3), layout="constrained")
    for name, (score, megabytes) in simulated.items():
        axes.scatter(megabytes, 100 * score)
        axes.annotate(name, (megabytes, 100 * score), xytext=(6, 3), textcoords="offset points")
    axes.set(xscale="log", xlabel="MB sent up", ylabel="test accuracy, %")
    figure.savefig(folder / "accuracy-against-bytes.svg")
    print(f"drawn: {folder / 'accuracy-against-bytes.svg'}")

# %% [markdown]
# ## 5. For real: a SuperLink and two SuperNodes
#
# The same two apps, in processes that talk over a network: here the loopback and without TLS, which docs/deployment.md
# adds. Flower finds them by these names. Two of the ten clients and fewer rounds than above: it ends lower.

# %%
client_app = make_client_app(*ROWS["diff, 0.1"])
server_app = ServerApp()


@server_app.main()
def main(grid: Grid, context: Context) -> None:
    """As simulated, with the nodes that are there."""
    score, megabytes = federate(grid, context.run_config["rounds"], nodes=2)
    print(f"deployed: {score:.1%} for {megabytes:.2f} MB up", flush=True)


# %%
if __name__ == "__main__":
    here = Path(__file__).parent if "__file__" in globals() else Path.cwd()
    sys.path.append(str(here.parent / "deployment"))
    import play  # which starts and stops servers for docs/deployment.md

    def free_port() -> int:
        """A port that nobody listens on."""
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            return probe.getsockname()[1]

    port = free_port()
    link = f"127.0.0.1:{port}"
    (folder / "config.toml").write_text(
        f'[superlink]\ndefault = "tour"\n[superlink.tour]\naddress = "{link}"\ninsecure = true\n'
    )
    environment = play.environment({
        "FLWR_HOME": str(folder), "FLWR_TELEMETRY_ENABLED": "0", "FLWR_DISABLE_UPDATE_CHECK": "1",
        "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",  # the package is here
    })  # fmt: skip
    servers = []
    try:
        for name, command in {
            "superlink": f"flower-superlink --insecure --host 127.0.0.1 --port {port}",
            **{
                f"node-{node}": f"flower-supernode --insecure --superlink {link} --port {free_port()} "
                f"--node-config partition-id={node}"
                for node in range(2)
            },
        }.items():
            servers.append(play.start("", command, folder, environment, folder / f"{name}.log"))
        run = subprocess.run(
            ["flwr", "run", str(here), "--stream"],
            env=environment,
            check=True,
            capture_output=True,
            text=True,
            timeout=120,
        )
        print(next(line for line in run.stdout.splitlines() if line.startswith("deployed: ")))
    finally:
        for server in reversed(servers):
            play.stop(server)
