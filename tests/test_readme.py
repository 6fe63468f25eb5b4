"""The README's Python runs as it stands."""

import pathlib
import re

import numpy as np

README = pathlib.Path(__file__).parents[1] / "README.md"


def test_ten_lines_of_api_run():
    (code,) = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    names = {}
    exec(code, names)
    assert np.isfinite(names["loss"])
    assert int(names["optimizer"].step[...]) == 1
