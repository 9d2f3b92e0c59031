import sys
import textwrap

import torch
from torch import nn

from lightning_accel.calls.user_code import defined_at, node_line, user_line


def installed(folder, name, source):
    """A package in a ``site-packages`` of a layered environment; returns its file and module."""
    file = folder / "layer" / "site-packages" / name / "__init__.py"
    file.parent.mkdir(parents=True)
    file.write_text(textwrap.dedent(source))
    sys.path.insert(0, str(file.parents[1]))
    try:
        return file, __import__(name)
    finally:
        sys.path.pop(0)
        sys.modules.pop(name)


LAYER = """
from torch import nn

class Layer(nn.Module):
    def forward(self, x):
        return nn.functional.linear(x, x.new_zeros(3, 5))
"""


def error_of(module, x):
    try:
        module(x)
    except RuntimeError as error:
        error.__traceback__ = error.__traceback__.tb_next  # without the frame of this function
        return error
    raise AssertionError


def test_a_package_of_the_user_in_site_packages_is_named(tmp_path):
    file, package = installed(tmp_path, "users_layers_a", LAYER)
    layer = package.Layer()
    assert user_line(error_of(layer, torch.zeros(2, 4)), layer) == f"{file}:6"


def test_the_project_goes_before_installed_packages(tmp_path):
    _, package = installed(tmp_path, "users_layers_b", LAYER)

    class Network(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = package.Layer()

        def forward(self, x):
            return self.layer(x)

    line = Network.forward.__code__.co_firstlineno + 1
    network = Network()
    assert user_line(error_of(network, torch.zeros(2, 4)), network) == f"{__file__}:{line}"


def test_an_error_of_frameworks_alone_names_the_class():
    class Own(nn.Linear):
        pass

    own = Own(3, 3)
    error = error_of(own, torch.zeros(2, 4))
    assert user_line(error, own) == defined_at(own)
    assert defined_at(own).startswith(f"{__file__}:")
    assert defined_at(type("Made", (nn.Module,), {})()) == ""


def test_a_node_of_a_captured_graph(tmp_path):
    file, package = installed(
        tmp_path,
        "users_layers_c",
        """
        from torch import nn

        class Layer(nn.Module):
            def forward(self, x):
                x = nn.functional.relu(x)
                return x.sigmoid()
        """,
    )
    program = torch.export.export(package.Layer(), (torch.zeros(2, 4),))
    lines = [node_line(node) for node in program.graph.nodes if node.op == "call_function"]
    assert lines == [f"{file}:6", f"{file}:7"]
