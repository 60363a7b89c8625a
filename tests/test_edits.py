"""What an edit makes anew: of the code of a clone, of its profile, or of what it points at. Slow.

Nothing more than what depends on it, and nothing less.
"""

import re
import shutil
import struct

import asks
import pytest
import runs
import toys
import yaml

pytestmark = pytest.mark.slow
COSTLY = {"finetuned", "trained_sae", "fetched_sae", "dictionary_of", "hear", "gradient_moments", "score_layers", "energy_or_direction", "text_loss", "answer_some", "repetition", "records", "verdicts", "answers", "losses", "general_losses"}  # fmt: skip
OF_EDITED = {"answers", "text_loss", "records"}  # of a variant, whose vector or layers are others
OF_SCORES = {"score_layers", "plain_scores"}
OF_MODEL = {"losses_skipping", "document_means", "couplings", "geometry", "hear_again"}  # what rivals of the stethoscope read
OF_DIRECTIONS = {"measure", "mechanism", "rounding_of_edits", "energy_or_direction"}


@pytest.fixture(scope="module")
def asking():
    with asks.asking() as one:
        yield one


@pytest.fixture(scope="module")
def asked(undisturbed, asking, tmp_path_factory):
    """A copy of an undisturbed run in which a study has everything that is asked here."""
    folder = shutil.copytree(undisturbed, tmp_path_factory.mktemp("asked") / "clone")
    assert asking.new(folder, "smoke", "smoke") == set()  # what notebooks asked is all that is asked
    return folder


@pytest.fixture(scope="module")
def own(asking, tmp_path_factory):
    """A world with a fine-tune, SAEs and a task of one's own, of which a study has everything."""
    folder = runs.clone(toys.world(tmp_path_factory.mktemp("own")))
    (folder / "mine.yaml").write_text(yaml.safe_dump(toys.profile()))
    assert COSTLY - {"finetuned", "trained_sae"} <= asks.kinds(asking.new(folder, "mine.yaml", "mine"))
    return folder


def text(file, old, new):
    """Replace a passage of a file, which must stand there once."""

    def act(folder):
        content = (folder / file).read_text()
        assert content.count(old) == 1, f"{file}: {old!r} stands there {content.count(old)} times"
        (folder / file).write_text(content.replace(old, new))

    return act


def code(file, old, new):
    return text(f"stetholib/{file}", old, new)


def prose(folder):
    """Another sentence in every docstring, a comment at the end of every file."""
    for path in sorted((folder / "stetholib").rglob("*.py")):
        changed = re.sub(r'^(\s*""")(?=[A-Z])', r"\1In other words. ", path.read_text(), flags=re.M)
        path.write_text(changed + "\n# a remark\n")


def bit(file, tensor):
    """The lowest bit of one number of a tensor in a safetensors file."""

    def act(folder):
        import json

        content = bytearray((folder / file).read_bytes())
        (size,) = struct.unpack("<Q", content[:8])
        start, _ = json.loads(content[8 : 8 + size])[tensor]["data_offsets"]
        content[8 + size + start] ^= 1
        (folder / file).write_bytes(content)

    return act


PROMPT = code("data/prompts.py", 'f"Problem:\\n{problem}\\n\\nSolution:"', 'f"Problem:\\n{problem}\\n\\nThe solution:"')
# what is edited -> (the edit, the kinds of stages and ledgers that are made anew)
IN_SMOKE = {
    "a further column of step 05's table": (code("minerva_math.py", "                n=n,\n                correct=correct,", "                n=n,\n                wrong=n - correct,\n                correct=correct,"), set()),
    "another format of figures": (code("study/__init__.py", 'for kind in ("png", "svg"):', 'for kind in ("png", "svg", "pdf"):'), set()),
    "how a figure is saved": (code("plots/style.py", 'bbox_inches="tight")', 'bbox_inches="tight", dpi=90)'), set()),
    "a further column of step 01's table": (code("task_vectors.py", "side=SIDE[matrix], base_norm", "side=SIDE[matrix], width=delta.shape[1], base_norm"), {"measure"}),
    "a read-out of step 01": (code("task_vectors.py", "def algebra(", "def algebra_of_it():\n    return 1\n\n\ndef algebra("), set()),
    "a side table of step 02": (code("sae_features.py", '.query("size >= 20")', '.query("size >= 10")'), {"top_tokens"}),
    "a side table of step 04": (code("layer_selection.py", "rows.append(dict(contrast=contrast, definition=kind,", "rows.append(dict(contrast=contrast, m=count, definition=kind,"), set()),
    "a side table of step 06": (code("significance.py", "index=index).astype(float)", "index=index).astype(float).round(9)"), {"pairs_table"}),
    "docstrings and comments everywhere": (prose, set()),
    "the scorer": (code("adapters/harness.py", 'exact_match=int(sample["exact_match"])', 'exact_match=int(bool(sample["exact_match"]))'), {"records", "verdicts"}),
    "the prompt": (PROMPT, {"toy", "finetuned", "trained_sae", "dictionary_of", "hear", "gradient_moments", "rounding", "losses", "general_losses", "top_tokens", "token_limits", "repetition", "pairs_table"} | OF_SCORES | OF_DIRECTIONS | OF_EDITED | OF_MODEL - {"losses_skipping", "document_means"}),
}  # fmt: skip
OWN_PROMPT = {"gradient_moments", "couplings"} | OF_DIRECTIONS | OF_EDITED  # losses are those under the task's own prompt
IN_OWN = {
    "the prompt, with a fine-tune and SAEs of one's own": (PROMPT, OWN_PROMPT),
    "the task's prompt": (text("mine/task.yaml", 'doc_to_text: "Q:', 'doc_to_text: "Question:'), {"asked", "losses", "losses_skipping", "planned", "scored_tokens", "answer_some", "verdicts", "repetition", "token_limits", "energy_or_direction", "measure", "pairs_table"} | OF_EDITED - {"text_loss"}),
    "a stop string": (text("mine/task.yaml", '"Q:"]', '"Q:", "A:"]'), {"asked", "answers", "records", "answer_some", "verdicts", "repetition"}),
    "the task's filter": (text("mine/task.yaml", "(-?[0-9]+)", "(-?[0-9]+) *"), {"asked", "records", "verdicts"}),
    "a bit of an SAE": (bit("mine/saes/block_1/sae_weights.safetensors", "W_dec"), {"fetched_sae", "dictionary_of", "hear", "hear_again", "top_tokens"} | OF_SCORES | OF_DIRECTIONS | OF_EDITED),
    "a bit of the base model": (bit("mine/base/model.safetensors", "model.layers.1.mlp.gate_proj.weight"), {"hear", "gradient_moments", "rounding", "losses", "general_losses", "scored_tokens", "top_tokens", "repetition", "planned", "answer_some", "token_limits"} | OF_SCORES | OF_DIRECTIONS | OF_EDITED | OF_MODEL),
}  # fmt: skip


@pytest.mark.parametrize("edit", IN_SMOKE)
def test_an_edit_of_the_code_makes_anew_what_depends_on_it(asked, asking, tmp_path, edit):
    act, expected = IN_SMOKE[edit]
    folder = shutil.copytree(asked, tmp_path / "clone")
    act(folder)
    new = asking.new(folder, "smoke", "smoke")
    assert asks.kinds(new) == expected, new


@pytest.mark.parametrize("edit", IN_OWN)
def test_an_edit_of_what_is_ones_own_makes_anew_what_depends_on_it(own, asking, tmp_path, edit):
    act, expected = IN_OWN[edit]
    folder = shutil.copytree(own, tmp_path / "clone")
    act(folder)
    new = asking.new(folder, "mine.yaml", "mine")
    assert asks.kinds(new) == expected, new
