"""Files that are not what they should be are named and refused before anything is written."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hf_cases import convert, published, save, tensors
from safetensors.torch import save_file

from megarlx.checkpoint import CheckpointError
from megarlx.hf.errors import ConversionError
from megarlx.hf.trunk import find_checkpoint

SINGLE = "model.safetensors"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return save(published("llama"), tmp_path / "hf")


def rewrite(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    held = tensors(folder)
    change(held)
    save_file(held, folder / SINGLE)


def refused(folder: Path, said: str) -> None:
    with pytest.raises(ConversionError, match=said):
        convert(folder, folder.parent / "run")
    assert not (folder.parent / "run").exists()


NORM = "model.layers.1.input_layernorm.weight"
UP = "model.layers.1.mlp.up_proj.weight"


def test_a_missing_tensor(folder: Path) -> None:
    rewrite(folder, lambda held: held.pop(UP))
    refused(folder, f"no LlamaForCausalLM: it lacks {UP}")


def test_an_extra_tensor(folder: Path) -> None:
    rewrite(folder, lambda held: held.update({"model.layers.3.mlp.up_proj.weight": held[UP] + 1}))
    refused(folder, "it holds model.layers.3.mlp.up_proj.weight, for which there is no place")


def test_a_bias_that_our_family_has_not(folder: Path) -> None:
    rewrite(
        folder, lambda held: held.update({"model.layers.0.self_attn.o_proj.bias": torch.ones(52)})
    )
    refused(folder, "o_proj.bias, for which there is no place")


def test_rotary_frequencies_of_old_files_are_no_weights(folder: Path) -> None:
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    rewrite(folder, lambda held: held.update({name: torch.ones(5)}))
    assert convert(folder, folder.parent / "run") == 0


def test_a_transposed_tensor(folder: Path) -> None:
    rewrite(folder, lambda held: held.update({UP: held[UP].T.contiguous()}))
    refused(folder, rf"{UP} has the shape \[52, 68\]; config.json makes it \[68, 52\]")


def test_a_type_that_holds_no_weights(folder: Path) -> None:
    rewrite(folder, lambda held: held.update({NORM: torch.ones(52, dtype=torch.int64)}))
    refused(folder, f"{NORM}' is of type 'I64'; allowed are F64, F32, BF16, F16")


def test_numbers_wider_than_our_masters(folder: Path) -> None:
    rewrite(folder, lambda held: held.update({NORM: torch.ones(52).double()}))
    refused(folder, "is float64; masters are float32")


@pytest.mark.parametrize("kept", [0, 5, 100, -1])
def test_a_truncated_file(folder: Path, kept: int) -> None:
    whole = (folder / SINGLE).read_bytes()
    (folder / SINGLE).write_bytes(whole[:kept])
    refused(folder, f"{SINGLE}.*truncated")


def test_a_file_that_is_too_long(folder: Path) -> None:
    with open(folder / SINGLE, "ab") as file:
        file.write(b"more")
    refused(folder, "is too long")


def test_a_header_that_uses_bytes_twice(folder: Path) -> None:
    data = (folder / SINGLE).read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    names = [n for n in header if n.endswith("layernorm.weight")]
    header[names[0]]["data_offsets"] = header[names[1]]["data_offsets"]
    text = json.dumps(header).encode()
    (folder / SINGLE).write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])
    refused(folder, "leaves out or uses twice the bytes")


class Trap:
    """Unpickling this would make the folder `sprung`."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return Path.mkdir, (self.path,)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt"])
def test_a_pickle_is_never_opened(folder: Path, name: str) -> None:
    sprung = folder.parent / "sprung"
    (folder / SINGLE).unlink()
    torch.save(Trap(sprung), folder / name)
    refused(folder, rf"{name} is a pickle, and reading one runs whatever code is in it")
    assert not sprung.exists()


def test_a_pickle_named_by_the_index_is_never_opened(folder: Path) -> None:
    (folder / SINGLE).rename(folder / "pytorch_model.bin")
    index = {"weight_map": dict.fromkeys(tensors(folder) or ["a"], "pytorch_model.bin")}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    refused(folder, "pytorch_model.bin is a pickle")


def test_an_index_that_names_what_is_not_there(tmp_path: Path) -> None:
    folder = save(published("llama"), tmp_path / "hf", max_shard_size="60KB")
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    files = sorted(set(index["weight_map"].values()))
    assert len(files) > 1
    moved = {**index["weight_map"], UP: next(f for f in files if f != index["weight_map"][UP])}
    path.write_text(json.dumps({**index, "weight_map": moved}))
    refused(folder, f"names tensors that are not there: {UP}")
    path.write_text(json.dumps({**index, "weight_map": {**moved, UP: "../elsewhere.safetensors"}}))
    refused(folder, "outside its folder")
    path.write_text(json.dumps(index))
    (folder / files[0]).unlink()
    refused(folder, f"{files[0]} cannot be read")


def test_a_folder_without_a_model(tmp_path: Path, folder: Path) -> None:
    refused(tmp_path / "nowhere", "is no folder")
    (folder / SINGLE).unlink()
    refused(folder, "holds neither model.safetensors nor")
    (folder / "config.json").write_text("{")
    refused(folder, "cannot be read as JSON")
    (folder / "config.json").unlink()
    refused(folder, "config.json is missing")


def test_a_damaged_checkpoint_is_not_exported(folder: Path) -> None:
    run = folder.parent / "run"
    convert(folder, run)
    file = next(find_checkpoint(str(run)).glob("model-*"))
    data = bytearray(file.read_bytes())
    data[-7] ^= 1
    file.write_bytes(data)
    with pytest.raises(CheckpointError, match="is damaged: its SHA-256 is"):
        convert(run, folder.parent / "back", "megarlx>hf")
    assert not (folder.parent / "back").exists()


def test_a_checkpoint_of_another_model_than_the_run_says(folder: Path) -> None:
    run = folder.parent / "run"
    convert(folder, run)
    resolved = json.loads((run / "resolved.json").read_text())
    resolved["model"]["layers"] = 2
    (run / "resolved.json").write_text(json.dumps(resolved))
    with pytest.raises(ConversionError, match=r"is not of the model in resolved\.json: layers\.2"):
        convert(run, folder.parent / "back", "megarlx>hf")


def test_what_is_there_is_not_overwritten_unless_asked(folder: Path) -> None:
    run, back = folder.parent / "run", folder.parent / "back"
    convert(folder, run)
    back.mkdir()
    (back / "mine.txt").write_text("keep")
    with pytest.raises(ConversionError, match="is there already; --fresh replaces it"):
        convert(run, back, "megarlx>hf")
    assert (back / "mine.txt").read_text() == "keep"
    convert(run, back, "megarlx>hf", fresh=True)
    assert not (back / "mine.txt").exists()
    assert (back / SINGLE).exists()
