"""What a GPU says beside the processor, and again. Skipped where PyTorch sees none; CI has none, so run it by hand on one that has."""

import pandas as pd
import pytest
import torch
from test_steps import SMALL, STEPS

from stetholib.study import Study
from stetholib.study.world import World

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="PyTorch sees no CUDA GPU")


def tables(study: Study) -> dict[str, pd.DataFrame]:
    """Every step's table, its steps asked in turn."""
    return {name: getattr(study, name).table() for name in STEPS} | {"records": study.minerva_math.records()}


@pytest.fixture(scope="module")
def studies(tmp_path_factory):
    """The same world on the processor, on the GPU, and on the GPU from an empty store."""
    folder = tmp_path_factory.mktemp
    return [Study.open("smoke", SMALL, device, folder(device)) for device in ("cpu", "cuda", "cuda")]


def test_the_same_profile_on_the_same_gpu_gives_the_same_bytes(studies):
    _, once, again = studies
    first, second = tables(once), tables(again)
    for name, table in first.items():
        pd.testing.assert_frame_equal(table, second[name], check_exact=True, obj=name)


def test_a_gpu_finds_the_vector_that_the_processor_finds(studies):
    cpu, gpu, _ = (study.task_vectors.vector.deltas for study in studies)
    for where in cpu:
        ours, theirs = (vector[where].cpu().double().flatten() for vector in (cpu, gpu))
        assert torch.nn.functional.cosine_similarity(ours, theirs, dim=0) > 0.999, where


def test_weights_on_a_gpu_are_restored_byte_for_byte(studies):
    assert all(studies[1].task_vectors.restored().values())


def test_one_model_at_a_time_lies_on_the_gpu(tmp_path):
    world = World.open("smoke", None, "cuda", tmp_path)
    assert world.base.device.type == "cuda"
    with world.other("again", lambda: world.base_folder).opened() as other:
        assert (world.base.device.type, other.device.type) == ("cpu", "cuda")
    assert (world.base.device.type, other.device.type) == ("cuda", "meta")
