"""Tables as they are shown speak in words."""

import numpy as np
import pandas as pd

from stetholib.plots import readable


def test_names_are_words_numbers_are_short_and_the_first_column_leads():
    table = pd.DataFrame(
        dict(
            variant=["raw_shrunk", "full"], loss_change=[-0.02449, np.nan], energy=[0.0547, 1.0], p_max=[8.6e-12, 0.04], n=[3, 4]
        )
    )
    shown = readable(table, 2, shares=["energy"])
    assert list(shown.index) == ["raw shrunk", "whole vector"] and shown.index.name == "variant"
    assert list(shown.columns) == ["loss change", "energy", "p, largest of all layers", "n"]
    assert shown.iloc[0].tolist() == ["-0.02", "5.5%", "8.6e-12", 3] and shown.iloc[1].tolist() == ["", "100.0%", "0.04", 4]
    assert table["variant"][0] == "raw_shrunk"


def test_an_index_of_its_own_stays_texts_are_read_too_and_columns_may_have_two_levels():
    index = pd.MultiIndex.from_tuples([("raw_shrunk - scalpel", "math_verify")], names=["pair", "metric"])
    shown = readable(pd.DataFrame({"ci_low": [0.5]}, index=index), shares=True)
    assert shown.index[0] == ("raw shrunk - scalpel", "Math-Verify") and shown.iloc[0, 0] == "50.0%"
    wide = readable(pd.concat({"corpus": pd.DataFrame({"p_value": [0.123]}, index=pd.Index([3], name="layer"))}, axis=1))
    assert wide.columns[0] == ("all tokens", "p") and wide.iloc[0, 0] == "0.12" and wide.index.name == "layer"
    assert not any("_" in str(name) for name in (*shown.columns, *wide.columns))
