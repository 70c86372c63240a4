# SPDX-License-Identifier: Apache-2.0
"""``dataset = "module:function"``: the user's own function in a real module file."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from fedfusion_flwr.data import DataError, FederatedData, load_data

MODULE = '''
import torch
from fedfusion_flwr.data import DataError, FederatedData


def stripes(options):
    """Two classes: upright stripes as wide as text_length says, or none."""
    x = torch.zeros(8, 1, 6, 6)
    x[::2, :, :, : options.text_length] = 1
    y = torch.arange(8) % 2
    return FederatedData(f"stripes in {options.root}", x, y, x[:2], y[:2], num_classes=2)


def plain():
    x, y = torch.zeros(4, 1, 6, 6), torch.arange(4)
    return FederatedData("plain", x, y, x, y, num_classes=4)


def wrong_type():
    return [1, 2]


def refuses():
    raise DataError("the disc is not in the drive")


def fails():
    return {}["no such key"]


number = 7
'''
NAMES = (f"own_data_{number}" for number in itertools.count())


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], str]:
    """Writes a module under a name that was never imported, and returns the name."""
    monkeypatch.syspath_prepend(str(tmp_path))

    def write(source: str) -> str:
        name = next(NAMES)
        (tmp_path / f"{name}.py").write_text(source, encoding="utf-8")
        return name

    return write


def test_function_is_told_the_options(module: Callable[[str], str]) -> None:
    data = load_data(f"{module(MODULE)}:stripes", "/some/where", text_length=3)
    assert isinstance(data, FederatedData)
    assert data.name == "stripes in /some/where"
    assert data.x_train[0, 0, 0].tolist() == [1, 1, 1, 0, 0, 0]


def test_function_without_arguments(module: Callable[[str], str]) -> None:
    assert load_data(f"{module(MODULE)}:plain").num_classes == 4


@pytest.mark.parametrize(
    ("function", "message"),
    [
        ("wrong_type", "must return a FederatedData, not list"),
        ("refuses", "the disc is not in the drive"),
        ("fails", "failed: KeyError: 'no such key'"),
        ("missing", r"own_data_\d+\.py has no 'missing'"),
        ("number", r"own_data_\d+\.py has no callable 'number'"),
    ],
)
def test_what_goes_wrong_in_the_function(
    module: Callable[[str], str], function: str, message: str
) -> None:
    with pytest.raises(DataError, match=message) as caught:
        load_data(f"{module(MODULE)}:{function}")
    assert "\n" not in str(caught.value)


def test_module_that_is_not_there_says_where_python_looked() -> None:
    with pytest.raises(DataError, match="no module 'nowhere_data': put nowhere_data") as caught:
        load_data("nowhere_data:load")
    assert sys.path[-1] in str(caught.value)
    with pytest.raises(DataError, match=r"no module 'fedfusion_flwr\.nowhere'"):
        load_data("fedfusion_flwr.nowhere:load")


def test_module_that_fails_while_it_is_imported(module: Callable[[str], str]) -> None:
    for source, message in (
        ("import package_that_nobody_has", "ModuleNotFoundError: No module named 'package_that"),
        ("def broken(:", "SyntaxError"),
        ("1 / 0", "ZeroDivisionError: division by zero"),
    ):
        name = module(source)
        with pytest.raises(DataError, match=f"importing {name} failed: {message}"):
            load_data(f"{name}:load")
