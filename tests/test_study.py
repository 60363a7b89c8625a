import pytest

from stetholib.study import Study


@pytest.mark.slow
def test_blocks_heard_one_by_one_score_as_all_at_once(tmp_path):
    whole = Study.open("smoke", root=tmp_path)
    alone = Study.open("smoke", {"features.memory_gib": 0.001}, root=tmp_path)
    assert len(whole.sae_features._groups) == 1 and len(alone.sae_features._groups) == alone.world.layers
    for contrast in ("corpus", "matched"):
        assert whole.layer_selection.plain_scores(contrast) == alone.layer_selection.plain_scores(contrast)
    assert whole.sae_features.self_tests().equals(alone.sae_features.self_tests())
