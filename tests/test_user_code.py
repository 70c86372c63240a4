# SPDX-License-Identifier: Apache-2.0
"""Functions named ``module:function``: one sentence for each way in which one cannot be found."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from fedfusion_flwr.errors import FedFusionError
from fedfusion_flwr.user_code import load_function

MODULES = {
    "good": "NOT_A_FUNCTION = 3\ndef function(): return 7\n",
    "lacks_another": "import package_that_nobody_has\n",
    "no_syntax": "def broken(:\n",
    "fails_on_import": "1 / 0\n",
}


@pytest.fixture(autouse=True)
def _modules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, source in MODULES.items():
        (tmp_path / f"{name}.py").write_text(source, encoding="utf-8")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(sys, "modules", dict(sys.modules))


def test_the_function_is_found() -> None:
    assert load_function("model", "good:function", FedFusionError)() == 7


@pytest.mark.parametrize(
    ("reference", "sentence"),
    [
        ("good:missing", r"`model` is 'good:missing', but .*good\.py has no 'missing'\."),
        ("good:NOT_A_FUNCTION", "has no callable 'NOT_A_FUNCTION'"),
        ("nowhere:load", r"there is no module 'nowhere': put nowhere\.py beside client_app\.py"),
        ("no_such_package.nets:small", r"no module 'no_such_package': put no_such_package\.py"),
        ("good.deeper:small", r"no module 'good\.deeper'"),
        ("fedfusion_flwr.nowhere:load", r"no module 'fedfusion_flwr\.nowhere'"),
        (
            "lacks_another:f",
            "importing lacks_another failed: ModuleNotFoundError: No module named 'package_that",
        ),
        ("no_syntax:f", "importing no_syntax failed: SyntaxError"),
        ("fails_on_import:f", "importing fails_on_import failed: ZeroDivisionError: division by"),
    ],
)
def test_what_is_wrong_is_one_sentence(reference: str, sentence: str) -> None:
    with pytest.raises(FedFusionError, match=sentence) as refusal:
        load_function("model", reference, FedFusionError)
    assert "\n" not in str(refusal.value)


def test_a_missing_module_says_where_python_looked() -> None:
    with pytest.raises(FedFusionError) as refusal:
        load_function("dataset", "nowhere:load", FedFusionError)
    assert sys.path[-1] in str(refusal.value)
