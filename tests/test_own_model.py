"""The README's profile of a model of one's own, word for word, on a Llama-shaped toy. Slow."""

import pandas as pd
import pytest
import toys
import yaml
from rungs import environment, reproduce

from stetholib.store.tables import CONTRACTS

pytestmark = pytest.mark.slow


def test_the_readmes_profile_of_ones_own_model_runs_through_all_six_notebooks(tmp_path):
    toys.world(tmp_path)
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(toys.profile()))
    env = environment(tmp_path, "http://127.0.0.1:9", tmp_path / "cache", token=None)
    done = reproduce(tmp_path, "mine.yaml", env)
    assert done.returncode == 0, done.stderr
    made = tmp_path / "figures" / "mine"
    assert {path.stem for path in made.glob("*.csv")} == set(CONTRACTS)
    accuracy = pd.read_csv(made / "05_minerva_math.csv").set_index(["variant", "subject"])
    assert set(accuracy.loc["base"].index) == {"all", "sums", "products"} and accuracy.loc[("full", "sums"), "n"] == 8
    ledger = pd.read_csv(made / "06_claims.csv").set_index("claim")
    assert set(ledger.loc[["C4", "C5"], "verdict"]) == {"not testable"} and ledger.loc["C8", "verdict"] == "consistent"
    features = pd.read_csv(made / "02_sae_features.csv")
    assert set(features["d_sae"]) == {128} and len(features) == 8
