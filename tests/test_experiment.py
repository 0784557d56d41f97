import dataclasses
from pathlib import Path

import pytest

from zerofl.experiment import SERVER_OPTIMIZERS, Experiment, ExperimentError, make_experiment, parse_setting
from zerofl.run.sweep import find_sweep, read_sweep

PRESETS = sorted(path.stem for path in (Path(__file__).parent.parent / "experiments").glob("*.toml"))

FILE = """
[base]
clients = 20
clients_per_round = 5
lr_start = 1

[[run]]
name = "a"

[[run]]
name = "b"
uplink = "full"
clients = 30
"""


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "file.toml"
    path.write_text(text)
    return path


def test_base_run_and_settings_override_each_other_in_turn(tmp_path: Path) -> None:
    experiments = read_sweep(write(tmp_path, FILE), {"rounds": 3}).experiments()
    assert list(experiments) == ["a", "b"]
    assert (experiments["a"].clients, experiments["b"].clients) == (20, 30)
    assert (experiments["a"].uplink, experiments["b"].uplink) == ("top_k_weights", "full")
    assert experiments["a"].rounds == 3
    assert experiments["a"].lr_start == 1.0
    assert isinstance(experiments["a"].lr_start, float)


def test_defaults_that_depend_on_others_are_settled() -> None:
    assert Experiment(sparsity=0.9).activation_sparsity == 0.9
    assert Experiment(model="leaf_cnn").initialization == "sparse_he"
    assert Experiment(model="resnet18").initialization == "pytorch"
    assert Experiment(model="leaf_cnn", initialization="he").initialization == "he"


@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_is_valid_and_opens_with_its_command(preset: str) -> None:
    assert read_sweep(find_sweep(preset)).rows
    text = (Path(__file__).parent.parent / "experiments" / f"{preset}.toml").read_text()
    assert f"zerofl run {preset}" in text[: text.index("[base]")]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[base]\nrounds = 3", r"has no run; add \[\[run\]\]"),
        ("[[run]]\nrounds = 3", r"\[\[run\]\] number 1: has no name"),
        ('[[run]]\nname = "a"\n[[run]]\nname = "a"', r"\[\[run\]\] a: the name stands twice"),
        (
            '[[run]]\nname = "a"\nround = 3',
            r"\[\[run\]\] a: unknown key 'round'; did you mean rounds\? The valid keys are n",
        ),
        ('[[run]]\nname = "a"\nxyz = 3', r"unknown key 'xyz'\. The valid keys are name, seed, dataset"),
        ('[[run]]\nname = "a"\nrounds = "3"', r"rounds = '3': expected int, got str"),
        ('[[run]]\nname = "a"\nrounds = true', r"rounds = True: expected int, got bool"),
        ('[[run]]\nname = "a"\nsparsity = "high"', r"sparsity = 'high': expected float, got str"),
        ('[other]\n[[run]]\nname = "a"', r"expected \[base\], \[\[run\]\], seeds and metric only, found other"),
        ("run = [1, 2]", r"expected tables \[\[run\]\], found run = \[1, 2\]"),
        ("[base", r"not valid TOML"),
        ("[base]\naugment = True", r"\(at line 2, column 11\); TOML writes true and false, and texts in quotes$"),
        ('[run]\nname = "a"', r"\[run\] is one table, expected a list of them: write \[\[run\]\], also for one run"),
        ('[[base]]\n[[run]]\nname = "a"', r"\[\[base\]\] is a list of tables, expected one: write \[base\]"),
    ],
)
def test_a_bad_file_is_named(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ExperimentError, match=message):
        read_sweep(write(tmp_path, text))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            {"dataset": "svhn"},
            "dataset = 'svhn': expected one of cifar10, femnist, mnist5k",
        ),
        ({"model": "vgg"}, "model = 'vgg': expected one of leaf_cnn, resnet18"),
        ({"uplink": "topk"}, "uplink = 'topk': expected one of diff_on_top_k_weights, full, top_k_weights, top_k_"),
        (
            {"server_optimizer": "sgd"},
            "server_optimizer = 'sgd': expected one of fedadam, fedadam_sparse, fedavg",
        ),
        ({"initialization": "zero"}, "initialization = 'zero': expected one of he, pytorch, sparse_he"),
        ({"name": "../a"}, r"name = '\.\./a': expected letters"),
        ({"name": 256 * "a"}, r"name = 'a{256}': expected letters, .* up to 255"),
        (
            {"uplink_values": "int8", "uplink_positions": "csr"},
            "uplink_values = 'int8': expected float32 with uplink_positions = 'csr'",
        ),
        ({"rounds": 0}, "rounds = 0: expected 1 or more"),
        ({"seed": -1}, "seed = -1: expected 0 or more"),
        ({"sparsity": 1.0}, r"sparsity = 1.0: expected a fraction in \[0, 1\)"),
        ({"mask_ratio": 1.5}, r"mask_ratio = 1.5"),
        ({"lr_end": 0.0}, "lr_end = 0.0: expected a positive number"),
        ({"lr_start": float("nan")}, "lr_start = nan: expected a positive number"),
        ({"alpha": 10**400}, "alpha = 10+: expected float, got int"),
        ({"alpha": float("inf")}, "alpha = inf: expected a number from 1e-06 to 1,000,000"),
        ({"alpha": 1e-7}, "alpha = 1e-07: expected a number from 1e-06 to 1,000,000"),
        ({"alpha": 1e308}, r"alpha = 1e\+308: expected a number from 1e-06 to 1,000,000"),
        ({"threads": -1}, "threads = -1: expected 0 to 1024"),
        ({"threads": 1025}, "threads = 1025: expected 0 to 1024"),
        ({"clients": 5}, "clients_per_round = 10: expected 1 to clients = 5"),
        ({"min_replies": 11}, "min_replies = 11: expected 1 to clients_per_round = 10"),
        ({"clip_median": -1.0}, "clip_median = -1.0: expected 0 or a positive number"),
        ({"trim_clients": 1, "min_replies": 9}, "uplink = 'top_k_weights': expected full with trim_clients"),
        (
            {"trim_clients": 2, "uplink": "full", "min_replies": 4},
            "min_replies = 4: expected more than 2 . trim_clients = 4",
        ),
    ],
)
def test_a_bad_value_is_named(values: dict[str, object], message: str) -> None:
    with pytest.raises(ExperimentError, match=message):
        make_experiment(values)


@pytest.mark.parametrize(
    ("setting", "expected"),
    [
        ("rounds=5", ("rounds", 5)),
        ("sparsity=0", ("sparsity", 0.0)),
        ("root=/some/where=else", ("root", "/some/where=else")),
        ("root=5", ("root", "5")),
        ("augment=true", ("augment", True)),
        ('uplink="full"', ("uplink", "full")),  # as in a file
        ("uplink='full'", ("uplink", "full")),
        ('root="', ("root", '"')),
        ('root="a" and "b"', ("root", '"a" and "b"')),
    ],
)
def test_settings_from_the_command_line(setting: str, expected: tuple[str, object]) -> None:
    assert parse_setting(setting) == expected


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("rounds", "expected key=value"),
        ("rounds=x", "rounds = 'x': expected int, got str"),
        ("rounds=5\nx=1", r"rounds = '5\\nx=1': expected int, got str"),
        ("rounds=5.5", "rounds = 5.5: expected int, got float"),
        ("round=5", r"unknown key 'round'; did you mean rounds\?"),
        ("overlap_normalization=1", r"the key 'overlap_normalization' is gone, since it did not help; leave it out"),
        ("augment=True", r"augment = 'True': expected true or false, got str"),
        ("augment=0", r"augment = 0: expected true or false, got int"),
        ('augment="true"', r"augment = 'true': expected true or false, got str"),
        ("activation_sparsity=None", r"'None': expected float, got str; leave the key out for its default"),
    ],
)
def test_a_bad_setting_is_named(setting: str, message: str) -> None:
    with pytest.raises(ExperimentError, match=message):
        parse_setting(setting)


def test_an_unknown_preset_names_the_known_ones() -> None:
    with pytest.raises(ExperimentError, match="demoo: neither a file nor a preset; the presets are .*demo"):
        find_sweep("demoo")


def test_the_servers_learning_rate_is_its_optimisers_unless_given() -> None:
    rates = [Experiment(server_optimizer=name, uplink="top_k_weights").server_lr for name in SERVER_OPTIMIZERS]
    assert rates == [0.01, 1.0, 0.01, 0.01]
    assert Experiment(server_optimizer="fedavgm", server_lr=0.5).server_lr == 0.5
    assert Experiment(server_optimizer="fedavgm", server_lr=0.0).server_lr == 1.0  # in a run config, which has no None


def test_a_key_that_is_gone_is_read_where_it_did_nothing() -> None:
    assert make_experiment({"overlap_normalization": 0.0, "rounds": 3}) == Experiment(rounds=3)
    with pytest.raises(ExperimentError, match=r"overlap_normalization' is gone.* use zerofl 0\.2\.0"):
        make_experiment({"overlap_normalization": 1.0})


def test_an_experiment_survives_plain_values() -> None:
    experiment = Experiment(name="x", sparsity=0.9, model="leaf_cnn")
    assert make_experiment(dataclasses.asdict(experiment)) == experiment
