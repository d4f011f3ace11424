r"""Converts a model between Hugging Face, T5X, Orbax and this project's own folders.

    python -m experiments.convert --from=flan-t5-small --to=target --format=native --verify
    python -m experiments.convert --from=runs/distill --to=draft --format=huggingface \
        --tokenizer=flan-t5-small

`--from` is whatever `zoo.load` takes: a folder or checkpoint of any of these kinds, a run's
workdir, a preset. With layers or sizes it also makes a draft out of a target:

    python -m experiments.convert --from=flan-t5-base --to=draft --encoder_layers=0,5,11 \
        --decoder_layers=0,11 --d_ff=1024

(a layer named again, as 0,1,1, is a copy that changes nothing yet and learns when trained on),
and with `--fresh=SEED` one of that shape and vocabulary whose weights are drawn anew.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

from distillspec_jax import zoo
from distillspec_jax.errors import UserError, unknown_name
from distillspec_jax.interop import huggingface, layout, native, orbax
from distillspec_jax.interop.folders import refuse_existing
from distillspec_jax.interop.slim import cut, slim
from distillspec_jax.models.config import ModelConfig
from distillspec_jax.models.transformer import Transformer, init_params, score
from experiments import door, tokenizers
from experiments.checks import check_seeds
from experiments.planning import GIB, judge

FORMATS = ("huggingface", "native", "orbax")
_OWN_KEYS = ("model", "path", "kind", "name", "versions", "format")  # not the model maker's words
_FROM = flags.DEFINE_string("from", None, "model to read: a path or a name of the zoo")
_TO = flags.DEFINE_string("to", None, "folder to write; it must not exist or be empty")
_FORMAT = flags.DEFINE_string("format", "huggingface", f"of the folder: {', '.join(FORMATS)}")
_DTYPE = flags.DEFINE_string("dtype", "float32", "of stored weights: float32, bfloat16, float16")
_VERIFY = flags.DEFINE_bool("verify", False, "run both sides and print the largest difference")
_TOKENIZER = flags.DEFINE_string(
    "tokenizer", None, "Hugging Face folder or SentencePiece file to put beside the weights"
)
_FRESH = flags.DEFINE_integer("fresh", None, "seed: draw the weights anew, keep only the shape")
_LAYERS = {
    f"{stack}_layers": flags.DEFINE_list(
        f"{stack}_layers", None, f"layers of the {stack} to keep, as 0,5,11; 0,1,1 copies"
    )
    for stack in ("encoder", "decoder")
}
_SIZES = {
    field: flags.DEFINE_integer(field, None, f"{what} to keep, the largest by weight")
    for field, what in (
        ("d_model", "width"),
        ("num_heads", "attention heads"),
        ("d_ff", "MLP units"),
    )
}


def main() -> None:
    source, folder = _checked_flags()
    found = zoo.describe(source)
    writes_tokenizer = _FORMAT.value == "huggingface"
    files = tokenizers.files_for(_TOKENIZER.value, found) if writes_tokenizer else {}
    config = ModelConfig(**found["model"])
    print(f"{source}: {found['kind']}, {layout.num_parameters(config):,} parameters")
    options = _cut_options()
    card = {key: value for key, value in found.items() if key not in _OWN_KEYS}
    if options or _FRESH.value is not None:  # then nothing else that its maker said still holds
        card = {key: value for key, value in card.items() if key.startswith("vocabulary_")}
    if _FRESH.value is not None:  # then the source's own are not read
        model = Transformer(cut(config, name=folder.name, **options) if options else config)
        params = init_params(model, jax.random.key(_FRESH.value))
    else:
        model, params = zoo.load(source)
        if options:
            model, params = slim(model, params, name=folder.name, **options)
    if options:
        print(f"cut to {layout.num_parameters(model.config):,} parameters")
    if _FRESH.value is not None:
        print(f"weights drawn anew, seed {_FRESH.value}")
    _write(model, params, folder, files, card | {"converted_from": source})
    print(f"{folder}: {_FORMAT.value}, {_DTYPE.value}")
    if _VERIFY.value:
        _verify(model, params, folder)


def plan(memory_gib: float | None) -> int | None:
    """Says how many weights are held and written; nothing is read, nothing is compiled."""
    source, folder = _checked_flags()
    config = ModelConfig(**zoo.describe(source)["model"])
    is_fresh = _FRESH.value is not None
    counts = {} if is_fresh else {"read": layout.num_parameters(config)}
    options = _cut_options()
    if options:
        config = cut(config, name=folder.name, **options)
    written = layout.num_parameters(config)
    if options or is_fresh:
        counts["drawn" if is_fresh else "cut to"] = written
    print("plan of convert, nothing is allocated")
    for name, count in counts.items():
        print(f"  {name}: {count:,} parameters, {4 * count / GIB:.3f} GiB as float32")
    size = written * jnp.dtype(str(_DTYPE.value)).itemsize
    print(f"  written: {size / GIB:.3f} GiB of {_FORMAT.value}, {_DTYPE.value}")
    held = 4 * (sum(counts.values()) + written * bool(_VERIFY.value))
    print(f"the device holds up to {held / GIB:.3f} GiB: all of them at once")
    return judge(held, memory_gib, lambda: "leave --verify out, or take a larger device")


def _cut_options() -> dict[str, Any]:
    """Layers and sizes that the flags ask for."""
    layers = {name: _numbers(flag) for name, flag in _LAYERS.items()}
    sizes = {field: flag.value for field, flag in _SIZES.items()}
    return {key: value for key, value in (layers | sizes).items() if value is not None}


def _checked_flags() -> tuple[str, Path]:
    """`--from` and `--to`; all that can be refused before anything is read."""
    if not _FROM.value or not _TO.value:
        raise UserError("--from=MODEL and --to=FOLDER are needed; see --help")
    if _FORMAT.value not in FORMATS:
        raise unknown_name("format", str(_FORMAT.value), FORMATS, "--format")
    if _DTYPE.value not in ("float32", "bfloat16", "float16"):
        raise UserError(f"--dtype={_DTYPE.value} must be float32, bfloat16 or float16")
    if _FORMAT.value == "orbax" and _DTYPE.value != "float32":
        raise UserError("an Orbax checkpoint of this project holds float32; leave --dtype out")
    if _TOKENIZER.value is not None and _FORMAT.value != "huggingface":
        raise UserError(
            f"--tokenizer={_TOKENIZER.value} goes with --format=huggingface alone; leave it out"
        )
    if _FRESH.value is not None:
        check_seeds("--fresh", _FRESH.value)
    refuse_existing(Path(_TO.value))
    return _FROM.value, Path(_TO.value)


def _numbers(flag: flags.FlagHolder) -> Sequence[int] | None:
    if flag.value is None:
        return None
    if not all(each.strip().isdecimal() for each in flag.value):
        raise UserError(f"--{flag.name}={','.join(flag.value)} must be numbers, as 0,5,11")
    return [int(each) for each in flag.value]


def _write(
    model: Transformer, params: Any, folder: Path, files: dict[str, bytes], card: dict[str, Any]
) -> None:
    if _FORMAT.value == "native":
        native.save(model, params, folder, card, dtype=str(_DTYPE.value))
    elif _FORMAT.value == "orbax":
        orbax.save(model, params, folder, card)
    else:
        if not files:
            print("no tokenizer is known for this model; --tokenizer=FOLDER puts one beside it")
        huggingface.save(model, params, folder, dtype=str(_DTYPE.value), extra_files=files)


def _verify(model: Transformer, params: Any, folder: Path) -> None:
    """Runs a forward pass of both sides on the same tokens."""
    written, written_params = zoo.load(folder.absolute())
    rng, pieces = np.random.default_rng(0), model.config.num_pieces
    inputs, targets = (rng.integers(2, pieces, (2, length), np.int32) for length in (23, 17))
    ours = np.asarray(jax.jit(score, static_argnums=0)(model, params, inputs, targets))
    theirs = np.asarray(jax.jit(score, static_argnums=0)(written, written_params, inputs, targets))
    kept = min(pieces, written.config.num_pieces)
    difference = np.abs(ours[..., :kept] - theirs[..., :kept]).max()
    relative = difference / np.abs(ours[..., :kept]).max()
    print(f"largest difference of logits: {difference:.3g} ({relative:.2g} of the largest logit)")


if __name__ == "__main__":
    door.run_flags(main, plan=plan)
