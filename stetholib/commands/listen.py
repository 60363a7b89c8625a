"""The stethoscope from a shell: `stetholib listen --model ... --saes ... --maths ... --general ...`."""

from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from stetholib.adapters import saes
from stetholib.data.source import Source
from stetholib.errors import UserError
from stetholib.listening import listen
from stetholib.models import loading
from stetholib.store.files import atomic

READERS = {
    ".txt": lambda path: [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()],
    ".jsonl": lambda path: pd.read_json(path, lines=True)["text"].tolist(),
    ".parquet": lambda path: pd.read_parquet(path)["text"].tolist(),
}


def run(
    model: str, revision: str | None, release: str, sae_id: str, files: tuple[str, str], device: str, into: str | None = None
) -> str:
    """The table of layers, as text; also as CSV in the file `into`. model: a folder or a Hub id; release: a SAELens release or a
    folder with one SAE a block; files: texts of the two kinds."""
    maths, general = map(texts_of, files)
    if into and not Path(into).resolve().parent.is_dir():
        raise UserError(f"listen: there is no folder for {into}; make it, or give another file")
    base = loading.load(Source.of(model, revision).folder(), device=device)
    layers = layers_of(release, sae_id, base.model.config.get_text_config().num_hidden_layers)
    found = {layer: saes.fetch(release, sae_id, layer) for layer in layers}
    table = listen(base.model, base.tokenizer, found, maths, general)
    if into:
        text = table.to_csv(index=False, float_format="%.6g", lineterminator="\n")
        atomic(Path(into), lambda path: path.write_text(text, encoding="utf-8"))
    return table.to_string(index=False, float_format="{:.3f}".format)


def texts_of(name: str) -> list[str]:
    """Texts of a file: `.txt` with one a line, `.jsonl` or `.parquet` with a column `text`."""
    path = Path(name)
    if path.suffix not in READERS or not path.is_file():
        raise UserError(f"listen: {name} is no file of texts; give .txt (one a line), .jsonl or .parquet (column text)")
    try:
        return READERS[path.suffix](path)
    except (OSError, ValueError, KeyError) as error:
        said = " ".join(str(error).split())[:120]
        raise UserError(f"listen: {name} cannot be read ({said}); it needs a column `text`, in UTF-8") from None


def layers_of(release: str, sae_id: str, blocks: int) -> Sequence[int]:
    """The blocks that a release or folder has an SAE of."""
    names = {layer: saes.id_of(sae_id, layer) for layer in range(blocks)}
    if Source.of(release, kind="sae").where == "folder":
        held = {name for name in names.values() if (Path(release) / name).is_dir()}
    else:
        held = set(saes.registered(release).saes_map)
    if not (layers := [layer for layer, name in names.items() if name in held]):
        raise UserError(f"listen: {release} has no {names[0]!r} and no other block's; mend --saes or --sae-id")
    return layers
