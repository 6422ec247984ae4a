"""JSON that every reader takes."""

import json

import numpy as np
import pytest

from mmssl.files import to_json, write_json
from tasks.metrics import Score


def strict(text):
    def refuse(word):
        raise AssertionError(word)

    return json.loads(text, parse_constant=refuse)


def test_what_is_no_number_is_null_however_deep_it_lies(tmp_path):
    nan, inf = float("nan"), float("inf")
    data = {
        "a": nan,
        "b": [1.5, (inf, {"c": -inf})],
        "d": Score(0.5, nan, 1.0),
        "e": np.float64(nan),
        "f": [None, True],
    }
    expected = {"a": None, "b": [1.5, [None, {"c": None}]], "d": [0.5, None, 1.0], "e": None, "f": [None, True]}
    assert strict(to_json(data)) == expected
    write_json(tmp_path / "x.json", data)
    assert strict((tmp_path / "x.json").read_text()) == expected
    assert to_json({"a": 0.1}) == json.dumps({"a": 0.1})


def test_what_is_no_json_is_still_an_error():
    with pytest.raises(TypeError):
        to_json({"a": object()})
