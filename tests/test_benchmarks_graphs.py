"""The benchmark of CUDA graphs, on a CPU: its contenders compute the same, and its words are those of its numbers."""

import json

import pytest
import torch
from tape import Tape, record_on_the_cpu
from torch.utils._pytree import tree_map

from benchmarks import graphs
from lfm_fast.models import NETWORKS, DiT

CPU = torch.device("cpu")


@pytest.fixture
def small(monkeypatch):
    settings = {"hidden_size": 32, "depth": 1, "num_heads": 2, "patch_size": 8}
    monkeypatch.setitem(NETWORKS, "DiT-Little", (DiT, settings))
    record_on_the_cpu(monkeypatch)


def test_a_graphed_step_runs_beside_the_plain_one(small):
    record = graphs.training("DiT-Little", 3, "float32", "off", CPU, rounds=2)
    assert record["right"]
    assert record["difference"] == 0.0
    assert Tape.replayed == graphs.WARM_UP + 2
    assert list(record["contenders"]) == [graphs.PLAIN, graphs.AGAIN, graphs.GRAPH]
    assert record["contenders"][graphs.PLAIN]["ratio"] == [1.0, 1.0, 1.0]


def test_samplers_run_beside_sample_and_a_wrong_one_fails(small, monkeypatch, tmp_path, capsys):
    arguments = [
        "--networks",
        "DiT-Little",
        "--batches",
        "2",
        "--precision",
        "float32",
        "--rounds",
        "2",
        "--steps",
        "3",
    ]
    arguments += ["--device", "cpu", "--compile", "off", "--output", str(tmp_path / "graphs.json")]
    assert graphs.main(arguments) == 0
    said = capsys.readouterr().out
    records = json.loads((tmp_path / "graphs.json").read_text())["records"]
    assert [record["title"].split(",")[0] for record in records] == ["heun x 3", "training step"]
    for record in records:
        assert record["title"] in said
        for name, of in record["contenders"].items():
            assert f"{name:<14} {1e3 * of['seconds']:9.3f} ms" in said
    monkeypatch.setattr(Tape, "__call__", lambda tape: tree_map(torch.ones_like, tape._result))
    assert graphs.main(arguments) == 1
    assert "WRONG" in capsys.readouterr().out
