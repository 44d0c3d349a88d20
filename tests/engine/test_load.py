"""Models from directories and GGUF files: the same weights, converted once, and one clear line for
what is broken."""

from __future__ import annotations

import json
import multiprocessing
import shutil
from collections.abc import Callable
from pathlib import Path

import gguf as gguf_files
import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from engine import tiny, tiny_files
from engine.bytes_tokenizer import END_ID, byte_tokenizer
from ropool.engine import Engine, SamplingParams
from ropool.errors import RopoolError
from ropool.integrations.transformers import FAMILIES, gguf, load

PROMPT = list(b"What is this?")


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_files.write_directory(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def gguf_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_files.write_gguf(tmp_path_factory.mktemp("gguf") / "tiny.gguf")


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "ropool" / "models"


def answer(name: Path) -> list[int]:
    model, tokenizer = load(str(name))
    return (
        Engine(model, tokenizer, pool_tokens=64)
        .generate([PROMPT], SamplingParams(max_new_tokens=12))[0]
        .output
    )


def test_a_directory(directory: Path) -> None:
    assert answer(directory) == tiny.greedy(tiny_files.tiny_model(), PROMPT, 12)[0]


def test_the_documentation_names_the_families() -> None:
    text = (Path(__file__).parents[2] / "docs" / "engine.md").read_text()
    rows = text.partition("## Model families")[2].partition("\n\n#")[0].splitlines()[4:]
    named = [name for row in rows if row[0:1] == "|" for name in row.split("|")[1].split(", ")]
    assert sorted(name.strip(" `") for name in named) == sorted(FAMILIES)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_directory_of_each_family(family: str, tmp_path: Path) -> None:
    names = [name for name, changes in tiny.MODELS.items() if changes["model_type"] == family]
    model = tiny.build(names[0])
    model.save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    pooled, _ = load(str(tmp_path))
    prompt = [5, 4, 3, 2, 1]
    request = Engine(pooled, pool_tokens=64).generate([prompt], SamplingParams(8))[0]
    assert request.output == tiny.greedy(model, prompt, 8)[0]


def test_a_gguf_file_is_converted_once(gguf_file: Path, cache: Path) -> None:
    told: list[str] = []
    load(str(gguf_file), report=told.append)
    assert len(told) == 1 and told[0].startswith("converting tiny.gguf to safetensors in")
    made = [path for path in cache.iterdir() if path.is_dir()]
    assert len(made) == 1
    weights = load_file(made[0] / "model.safetensors")
    expected = tiny_files.tiny_model().state_dict()
    assert weights.keys() == expected.keys()
    for name, weight in weights.items():
        assert torch.equal(weight, expected[name]), name

    model, tokenizer = load(str(gguf_file), report=told.append)
    assert len(told) == 1
    assert tokenizer.chat_template == tiny_files.CHAT_TEMPLATE
    assert model.spec.eos_ids == {END_ID} and model.spec.max_position == 256
    assert answer(gguf_file) == tiny.greedy(tiny_files.tiny_model(), PROMPT, 12)[0]


def test_a_gguf_file_is_parsed_once(
    gguf_file: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Parsing takes most of the time of a conversion, and the library wants it three times."""
    parsed = []

    class Reader(gguf_files.GGUFReader):  # type: ignore[misc]
        def __init__(self, path: str, *mode: str) -> None:
            parsed.append(path)
            super().__init__(path, *mode)

    monkeypatch.setattr(gguf_files, "GGUFReader", Reader)
    gguf.converted(gguf_file, lambda message: None)
    assert parsed == [str(gguf_file)]
    assert gguf_files.GGUFReader is Reader


def test_another_file_of_the_same_name_is_another_model(gguf_file: Path, tmp_path: Path) -> None:
    path = tmp_path / gguf_file.name
    shutil.copy(gguf_file, path)
    told: list[str] = []
    gguf.converted(gguf_file, told.append)
    first = gguf.converted(path, told.append)
    path.touch()
    assert gguf.converted(path, told.append) != first
    assert len(told) == 3


def test_what_a_killed_conversion_left_is_not_read(gguf_file: Path, cache: Path) -> None:
    made = gguf.converted(gguf_file, lambda message: None)
    partial = made.with_name(made.name + ".partial")
    made.rename(partial)
    (partial / "model.safetensors").write_bytes(b"half")
    told: list[str] = []
    assert gguf.converted(gguf_file, told.append) == made
    assert len(told) == 1 and not partial.exists()
    assert len(load_file(made / "model.safetensors")) > 10


def _convert(path: Path, told: multiprocessing.Queue[str]) -> None:
    gguf.converted(path, told.put)
    told.put("done")


def test_two_processes_convert_once(gguf_file: Path, cache: Path) -> None:
    context = multiprocessing.get_context("spawn")
    told = context.Queue()
    processes = [context.Process(target=_convert, args=(gguf_file, told)) for _ in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
        assert process.exitcode == 0
    messages = [told.get(timeout=10) for _ in range(3)]
    assert sorted(message.split()[0] for message in messages) == ["converting", "done", "done"]
    assert len([path for path in cache.iterdir() if path.is_dir()]) == 1


@pytest.mark.parametrize("part", [0.0, 0.001, 0.02, 0.5, 0.99])
def test_a_truncated_gguf(gguf_file: Path, tmp_path: Path, cache: Path, part: float) -> None:
    data = gguf_file.read_bytes()
    path = tmp_path / "cut.gguf"
    path.write_bytes(data[: int(len(data) * part)])
    with pytest.raises(RopoolError, match=r"cut\.gguf") as caught:
        load(str(path))
    assert "\n" not in str(caught.value)
    assert "truncated" in str(caught.value) or "no GGUF file" in str(caught.value)
    left = [entry.suffix for entry in cache.iterdir()] if cache.exists() else []
    assert left in ([], [".lock"])  # no conversion, whole or partial


def test_a_damaged_conversion_says_what_to_delete(gguf_file: Path, cache: Path) -> None:
    load(str(gguf_file))
    [weights] = cache.glob("*/model.safetensors")
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(RopoolError, match=f"delete {weights.parent} to convert it again"):
        load(str(gguf_file))


def test_a_gguf_of_another_family(tmp_path: Path) -> None:
    path = tiny_files.write_gguf(tmp_path / "other.gguf", architecture="gemma2")
    with pytest.raises(RopoolError, match="family 'gemma2' is not covered"):
        load(str(path))


@pytest.mark.parametrize(
    "change, lost",
    [
        (
            lambda writer: writer.add_tensor("rope_freqs.weight", np.ones(8, dtype=np.float32)),
            "rope_freqs.weight",
        ),
        (
            lambda writer: writer.add_rope_scaling_type(gguf_files.RopeScalingType.YARN),
            "llama.rope.scaling.type = yarn",
        ),
        (lambda writer: writer.add_rope_scaling_factor(4.0), "llama.rope.scaling.factor = 4.0"),
    ],
    ids=["frequencies", "type", "factor"],
)
def test_a_gguf_whose_rotation_would_be_lost(
    tmp_path: Path, cache: Path, change: Callable[[gguf_files.GGUFWriter], None], lost: str
) -> None:
    # The library reads the base and nothing else: the model would run with plain frequencies.
    path = tiny_files.write_gguf(tmp_path / "scaled.gguf", change=change)
    with pytest.raises(RopoolError, match=rf"rotation \({lost}\) is lost"):
        load(str(path))
    assert [entry.suffix for entry in cache.iterdir()] == [".lock"]


@pytest.mark.parametrize(
    "name, message",
    [
        ("no-such-model", "unknown model 'no-such-model'"),
        ("/no/such/model.gguf", "unknown model '/no/such/model.gguf'"),
        (__file__, "is no GGUF file"),
        (str(Path(__file__).parent), "has no config.json"),
    ],
)
def test_what_is_no_model(name: str, message: str) -> None:
    with pytest.raises(RopoolError, match=message):
        load(name)


def test_a_hub_id_without_a_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(RopoolError, match="cannot load model 'some/model': ") as caught:
        load("some/model")
    assert "\n" not in str(caught.value)


def test_broken_directories(directory: Path, tmp_path: Path) -> None:
    def copy(name: str) -> Path:
        return Path(shutil.copytree(directory, tmp_path / name))

    cut = copy("cut") / "model.safetensors"
    cut.write_bytes(cut.read_bytes()[:1000])
    lacking = copy("lacking") / "config.json"
    config = json.loads(lacking.read_text())
    lacking.write_text(json.dumps({**config, "num_hidden_layers": 3}))
    foreign = copy("foreign") / "config.json"
    foreign.write_text(json.dumps({**config, "model_type": "gemma2"}))
    for path, message in [
        (cut, "cannot load model"),
        (lacking, "weights are missing, one is model.layers.2."),
        (foreign, "family 'gemma2' is not covered"),
    ]:
        with pytest.raises(RopoolError, match=message) as caught:
            load(str(path.parent))
        assert "\n" not in str(caught.value)
