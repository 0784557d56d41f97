"""The server."""

from flwr.app import ArrayRecord, ConfigRecord, Context
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg

from quickstart.task import Net

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Federated averaging of some of the clients in each round."""
    config = context.run_config
    strategy = FedAvg(fraction_train=config["fraction-train"])
    rounds, train_config = config["num-server-rounds"], ConfigRecord({"lr": config["lr"]})
    result = strategy.start(grid, ArrayRecord(Net().state_dict()), rounds, train_config=train_config)
    context.state["final"] = result.evaluate_metrics_clientapp[rounds]
    print(context.state["final"])
