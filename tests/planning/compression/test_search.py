"""A search on disk."""

import json

import numpy as np
import pytest
import torch
from torch import nn

from lightning_accel.errors import InvalidArgumentError
from lightning_accel.planning.compression.ladder import FAILED, Result
from lightning_accel.planning.compression.recipe import Recipe
from lightning_accel.planning.compression.search import SearchFile, identity_of
from tests.planning.compression.test_candidates import candidate


def test_results_come_back(tmp_path):
    one = Result(Recipe("ptq", ("openvino",), "openvino", "low"), seconds=2.5, candidates=[candidate()])
    two = Result(Recipe("float", ("onnxruntime", "openvino")), FAILED, "why", 1.0)
    kept = SearchFile(tmp_path, {"network": "a"})
    kept.keep(two)
    kept.keep(one)
    again = SearchFile(tmp_path, {"network": "a"})
    assert again.results == [two, one]
    assert again.measured(one.recipe.key) == one
    assert again.measured(two.recipe.key) is None  # is tried again
    assert again.seconds() == 3.5
    assert [file.name for file in tmp_path.iterdir()] == ["search.json"]


def test_another_search_and_a_damaged_one_are_refused(tmp_path):
    SearchFile(tmp_path, {"network": "a", "data": "b"}).keep(Result(Recipe("float", ("onnxruntime",))))
    with pytest.raises(InvalidArgumentError, match="which differs in: network"):
        SearchFile(tmp_path, {"network": "c", "data": "b"})
    content = json.loads((tmp_path / "search.json").read_text())
    (tmp_path / "search.json").write_text(json.dumps({**content, "results": [{}]}))
    with pytest.raises(InvalidArgumentError, match="is damaged"):
        SearchFile(tmp_path, {"network": "a", "data": "b"})


def test_the_identity_follows_weights_data_and_settings():
    torch.manual_seed(0)
    net, x = nn.Linear(2, 2), {"x": np.ones(3)}
    first = identity_of(net, x, batch=1)
    assert identity_of(net, x, batch=1) == first
    assert identity_of(net, {"x": np.zeros(3)}, batch=1)["data"] != first["data"]
    assert identity_of(net, x, batch=2)["batch"] != first["batch"]
    with torch.no_grad():
        net.weight[0, 0] += 1e-3
    assert identity_of(net, x, batch=1)["network"] != first["network"]
