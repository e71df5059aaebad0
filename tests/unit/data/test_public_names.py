import subprocess
import sys

import pytest

import vembed.data


def test_every_public_name_is_there():
    for name in vembed.data.__all__:
        assert getattr(vembed.data, name) is not None
    with pytest.raises(AttributeError, match="has no attribute 'Recrod'"):
        vembed.data.Recrod  # noqa: B018


def test_importing_the_package_does_not_pay_for_torch():
    code = (
        "import sys, vembed.data; from vembed.data import Record, FIELDS;"
        "print({'torch', 'datasets', 'transformers'} & set(sys.modules))"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "set()"
