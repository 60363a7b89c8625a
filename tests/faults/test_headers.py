"""Headers of safetensors files, bent at random: whatever they say, a checkpoint is read whole or refused in one line."""

import json
import os
import struct

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from safetensors.torch import save

from stetholib.errors import UserError
from stetholib.models.architectures import check_folder
from stetholib.models.loading import check_stored
from stetholib.models.weights import MATRICES, Checkpoint

bent = settings(
    max_examples=int(os.environ.get("STETHOLIB_FUZZ", "200")),
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
NAMES = [f"model.layers.0.{'mlp' if m in ('gate', 'up', 'down') else 'self_attn'}.{m}_proj.weight" for m in MATRICES]
SOUND = save({name: torch.full((2, 3), float(at)) for at, name in enumerate(NAMES)}, {"format": "pt"})
SIZE = struct.unpack("<Q", SOUND[:8])[0]
HEADER, DATA = json.loads(SOUND[8 : 8 + SIZE]), SOUND[8 + SIZE :]
DTYPES = ["F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2", "F8_E8M0", "F4", "C64", "I64", "I32", "I16", "I8", "U8", "U64", "BOOL", "f32", ""]  # fmt: skip
WILD = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**65), 2**65) | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)
WHERE = st.sampled_from([*NAMES, "__metadata__"])
BYTES = st.tuples(st.integers(0, 8 + SIZE - 1), st.binary(min_size=1, max_size=8))
FIELDS = st.one_of(
    st.tuples(st.just("dtype"), st.sampled_from(DTYPES) | WILD),
    st.tuples(st.just("shape"), st.lists(st.integers(-1, 2**40), max_size=4) | WILD),
    st.tuples(st.just("data_offsets"), st.lists(st.integers(-1, len(DATA) + 30), min_size=2, max_size=2) | WILD),
)
CHANGES = st.one_of(
    st.tuples(st.just("field"), WHERE, FIELDS),
    st.tuples(st.just("whole"), WHERE, WILD),
    st.tuples(st.just("away"), WHERE, st.none()),
    st.tuples(st.just("name"), st.sampled_from(NAMES), st.text(max_size=12) | st.just("a\nname")),
    st.tuples(st.just("same"), st.sampled_from(NAMES), st.sampled_from(NAMES)),
)


def outcome(folder, content):
    """Whether a checkpoint of these bytes is read, every tensor of it, or what its refusal says."""
    (folder / "config.json").write_text('{"model_type": "llama"}')
    (folder / "model.safetensors").write_bytes(content)
    try:
        found = Checkpoint(folder)
        check_stored(found)
        for name in found:
            tensor = found[name]
            assert tuple(tensor.shape) == found.shape(name)
            assert not tensor.ndim or torch.equal(found.rows(name, 0, 1).view(torch.uint8), tensor[:1].view(torch.uint8))
    except UserError as error:
        assert "\n" not in str(error) and 20 < len(str(error)) < 900
        return str(error)
    return None


def test_the_sound_file_is_read_and_its_bent_dtype_is_not(tmp_path):
    assert outcome(tmp_path, SOUND) is None
    assert "is float16, which overflows" in outcome(
        tmp_path, whole(HEADER | {NAMES[0]: HEADER[NAMES[0]] | {"dtype": "F16", "shape": [2, 6]}})
    )
    assert "not a whole safetensors" in outcome(tmp_path, b"")


def whole(header, size=None):
    text = json.dumps(header).encode("utf-8", "surrogatepass")
    return struct.pack("<Q", len(text) if size is None else size) + text + DATA


@bent
@given(st.lists(BYTES, min_size=1, max_size=4))
def test_any_bytes_over_a_header_are_read_or_refused_in_one_line(tmp_path, junk):
    content = bytearray(SOUND)
    for at, over in junk:
        content[at : at + len(over)] = over
    outcome(tmp_path, bytes(content))


@bent
@given(st.lists(CHANGES, min_size=1, max_size=3), st.none() | st.integers(0, 2**64 - 1))
def test_any_header_that_is_json_is_read_or_refused_in_one_line(tmp_path, changes, size):
    header = json.loads(json.dumps(HEADER))
    for kind, name, value in changes:
        entry = header.get(name)
        if kind == "field" and isinstance(entry, dict):
            entry[value[0]] = value[1]
        elif kind == "whole":
            header[name] = value
        elif kind == "name" and entry is not None:
            header[value] = header.pop(name)
        elif kind == "same" and entry is not None:
            header[name] = header.get(value)
        elif kind == "away":
            header.pop(name, None)
    outcome(tmp_path, whole(header, size))


@bent
@example("a\nname")
@given(WILD)
def test_any_json_as_an_index_or_a_configuration_is_taken_or_refused_in_one_line(tmp_path, said):
    index = tmp_path / "model.safetensors.index.json"
    for content in (said, {"weight_map": said}, {"metadata": {}, "weight_map": {NAMES[0]: said}}):
        index.write_bytes(json.dumps(content).encode("utf-8", "surrogatepass"))
        assert outcome(tmp_path, SOUND), content
    index.unlink()
    (tmp_path / "config.json").write_bytes(json.dumps(said).encode("utf-8", "surrogatepass"))
    with pytest.raises(UserError) as refused:
        check_folder(tmp_path)
    assert "\n" not in str(refused.value)
