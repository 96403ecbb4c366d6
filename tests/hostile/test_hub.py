"""Folders to push, cards, reports, checkpoints and names made to do harm: one line that names them, no more."""

import json
import os
import shutil
import tempfile
from functools import partial

import pytest
import torch
from helpers import TINY, Bomb, random_core, recorded, tree
from safetensors.torch import save_file
from tiny_pipelines import tiny_pipeline

from hieratok_hf import AutoencoderHieraTok, HieraTokImageProcessorPil
from hieratok_hf.hub.push import push_folder

WEIGHTS = "diffusion_pytorch_model.safetensors"
DEEP = "[" * 100_000
DIGITS = 10**400


@pytest.fixture(autouse=True)
def scratch(tmp_path, monkeypatch):
    """A folder for temporary files, of which none may be left."""
    folder = tmp_path / "scratch"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    yield folder
    assert not list(folder.iterdir())


@pytest.fixture(scope="module")
def saved_folders(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    AutoencoderHieraTok.from_core(random_core()).save_pretrained(folder / "tokenizer")
    HieraTokImageProcessorPil(size_divisor=4).save_pretrained(folder / "tokenizer")
    tiny_pipeline(folder / "pipeline")
    return folder


@pytest.fixture
def folder(request, saved_folders, tmp_path):
    """A folder to push; what lies outside of it has a secret and a model that must stay as it is."""
    shutil.copytree(saved_folders / "tokenizer", tmp_path / "outside")
    (tmp_path / "outside" / "secret").write_text("secret")
    kind = getattr(request, "param", "tokenizer")
    return shutil.copytree(saved_folders / kind, tmp_path / "mine")


def files_in(folder):
    """All below a folder, but for the scripts' own temporary files."""
    return {name: content for name, content in tree(folder).items() if not name.startswith("scratch")}


def assert_refused(run, capsys, named, below, status=2):
    """A script ends with one line of error that names the culprit, and has changed nothing below a folder."""
    capsys.readouterr()
    before = files_in(below)
    assert run() == status
    told = capsys.readouterr()
    assert not told.out and told.err.startswith("error: ") and "Traceback" not in told.err
    assert named in told.err and len(told.err) < 2000
    assert files_in(below) == before
    return told.err


def write(name, content):
    """What makes a file of these words or bytes, or of JSON of anything else."""

    def spoil(folder):
        data = content if isinstance(content, str | bytes) else json.dumps(content)
        (folder / name).write_bytes(data.encode() if isinstance(data, str) else data)

    return spoil


def change(name, **values):
    """What gives a JSON file of a folder other values; `...` takes one away."""

    def spoil(folder):
        changed = {**json.loads((folder / name).read_text()), **values}
        write(name, {key: value for key, value in changed.items() if value is not ...})(folder)

    return spoil


def link(name, target="secret", **more):
    """What puts a link to a file outside into a folder, with files that ask for it."""

    def spoil(folder):
        for other, text in more.items():
            (folder / f"{other}.md").write_text(text)
        path = folder / name
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
        path.symlink_to(folder.parent / "outside" / target)

    return spoil


TOKENIZERS = {
    "a card that is a link": (link("README.md"), "README.md"),
    "a licence that is a link": (link("LICENSE"), "LICENSE"),
    "a configuration that is a link": (link("config.json", "config.json"), "config.json"),
    "weights that are a link": (link(WEIGHTS, WEIGHTS), WEIGHTS),
    "a shown picture that is a link": (link("a.png", README="![](a.png)"), "a.png"),
    "no JSON": (write("config.json", "{"), "config.json"),
    "a list": (write("config.json", []), "config.json"),
    "no text": (write("config.json", b"\xff\xfe{"), "config.json"),
    "nesting": (write("config.json", DEEP), "config.json"),
    "nesting of a processor": (write("preprocessor_config.json", DEEP), "preprocessor_config.json"),
    "nesting of an index": (write(f"{WEIGHTS}.index.json", DEEP), f"{WEIGHTS}.index.json"),
    "no class": (change("config.json", _class_name=...), "folder"),
    "a class in a list": (change("config.json", _class_name=[]), "folder"),
    "text for a number": (change("config.json", patch_size="4"), "patch_size"),
    "layers without end": (change("config.json", encoder_num_layers=2**40), "encoder_num_layers"),
    "many digits": (change("config.json", sample_size=-DIGITS), "sample_size"),
    "no number": (change("config.json", rotary_scale=float("nan")), "rotary_scale"),
    "weights of nothing": (write(WEIGHTS, b""), "folder"),
    "an endless header": (write(WEIGHTS, b"\xff" * 9), "folder"),
    "a pickle for weights": (write(WEIGHTS, b"\x80\x04cos\nmkdir\n."), "folder"),
    "metadata that is code": (write("README.md", "---\nx: !!python/object/apply:os.getcwd []\n---\n"), "README.md"),
    "nesting of metadata": (write("README.md", f"---\nx: {'[' * 5000}\n---\n"), "README.md"),
    "digits of metadata": (write("README.md", f"---\nx: {'9' * 5000}\n---\n"), "README.md"),
    "metadata of a number": (write("README.md", "---\n3\n---\n"), "README.md"),
    "keys of metadata": (write("README.md", "---\n? [a]\n: b\n---\n"), "README.md"),
    "figures of metadata": (write("README.md", "---\nmodel-index:\n- results: 3\n---\n"), "README.md"),
    "a card of bytes": (write("README.md", b"\xff\xfe"), "README.md"),
}
PIPELINES = {
    "a part elsewhere": (change("model_index.json", **{"../outside": ["diffusers", "X"]}), "'../outside'"),
    "a part at the root": (change("model_index.json", **{"/etc": ["diffusers", "X"]}), "'/etc'"),
    "a part without a class": (change("model_index.json", vae=[]), "'vae'"),
    "a part of three": (change("model_index.json", vae=["a", "b", "c"]), "'vae'"),
    "a part of numbers": (change("model_index.json", scheduler=[1, 2]), "'scheduler'"),
    "a part that is a link": (link("vae", "."), "'vae'"),
    "a part's card that is a link": (link("transformer/config.json", "config.json"), "transformer/config.json"),
    "names of classes in text": (change("model_index.json", id2label="cat"), "folder"),
    "names by words": (change("model_index.json", id2label={"cat": "cat"}), "cat"),
    "an index that is a list": (write("model_index.json", []), "model_index.json"),
    "nesting of the index": (write("model_index.json", DEEP), "model_index.json"),
    "a class of many digits": (change("model_index.json", _class_name=DIGITS), "folder"),
    "a transformer without channels": (change("transformer/config.json", in_channels=...), "in_channels"),
    "an activation of no name": (change("transformer/config.json", activation_fn=3), "folder"),
    "a scheduler that is a list": (write("scheduler/scheduler_config.json", []), "folder"),
}


@pytest.mark.parametrize(
    ("folder", "spoil", "named"),
    [("tokenizer", *row) for row in TOKENIZERS.values()] + [("pipeline", *row) for row in PIPELINES.values()],
    ids=[*TOKENIZERS, *PIPELINES],
    indirect=["folder"],
)
def test_a_folder_that_does_harm_does_not_go(spoil, named, folder, hub_here, load_conversion, tmp_path, capsys):
    spoil(folder)
    push = load_conversion("push").main
    told = assert_refused(lambda: push([str(folder), "org/name", "--license", "mit"]), capsys, named, tmp_path)
    assert not hub_here.requests and tempfile.gettempdir() not in told


def report(**values):
    return json.dumps({**recorded("trade_off"), **values})


REPORTS = {
    "no JSON": "{",
    "nesting": DEEP,
    "no text": b"\xff",
    "a figure of many digits": report(models=[{**m, "psnr": DIGITS} for m in recorded("trade_off")["models"]]),
    "models in text": report(models="hieratok-tiny"),
    "notes in text": report(notes="note"),
}


@pytest.mark.parametrize("content", REPORTS.values(), ids=REPORTS)
def test_a_report_that_is_none_is_named(content, hub_here, load_conversion, tmp_path, capsys):
    write("report.json", content)(tmp_path)
    push = load_conversion("push").main
    options = ["hieratok-tiny", "org/hieratok-tiny", "--license", "mit", "--results", str(tmp_path / "report.json")]
    assert_refused(lambda: push(options), capsys, "results", tmp_path)
    assert not hub_here.requests


COMMIT = "0123456789abcdef0123456789abcdef01234567"
NAMES = [
    *({"repo_id": name} for name in ("", "a/b/c", "a b", "../x", "org/..", "org/x.git", "org/-x", "a--b", "x" * 97)),
    *({"repo_id": name} for name in ("org/name\n", "org/na\0me", "https://huggingface.co/org/name")),
    *({"revision": name} for name in ("", COMMIT)),
    *({"subfolder": name} for name in ("..", "a/../../b", "/etc")),
    *({"license": name} for name in ("", "MIT", "mit\nx: y")),
    *({"base_model": name} for name in ("/home/me/model", "a b")),
    *({"datasets": [name]} for name in ("", "../../etc")),
]


@pytest.mark.parametrize("given", NAMES, ids=str)
def test_a_name_that_is_none_is_told_before_anything_is_asked(given, folder, hub_here):
    ((argument, _),) = given.items()
    of_card = {} if argument in ("repo_id", "revision", "subfolder") else given
    before = tree(folder)
    named = {"repo_id": "(?i)repo.id", "base_model": "(?i)repo.id", "datasets": "(?i)repo.id"}
    with pytest.raises(ValueError, match=named.get(argument, argument)):
        push_folder(folder, **{"repo_id": "org/name", "card": of_card, **({} if of_card else given)})
    assert not hub_here.requests and tree(folder) == before


def code(path):
    torch.save({"model": random_core().state_dict(), "more": Bomb(path.with_name("made"))}, path)


def holding(value):
    return partial(torch.save, value)


def bytes_of(data):
    return lambda path: path.write_bytes(data)


def index_of(value):
    return lambda path: path.write_text(value if isinstance(value, str) else json.dumps(value))


def with_weight(value):
    def make(path):
        torch.save({**random_core().state_dict(), "encoder.head.bias": value}, path)

    return make


CHECKPOINTS = {
    "code.pt": code,
    "code.bin": code,
    "nothing.pt": bytes_of(b""),
    "opcodes.pt": bytes_of(b"\x80\x02cos\nsystem\nq\x00X\x04\x00\x00\x00trueq\x01\x85Rq\x02."),
    "endless.pt": bytes_of(b"\x80\x04\x8e" + b"\xff" * 8),
    "folder.pt": lambda path: path.mkdir(),
    "pipe.pt": os.mkfifo,
    "loop.pt": lambda path: path.symlink_to(path.name),
    "text_inside.pt": holding({"model": "text"}),
    "numbers.pt": with_weight(3),
    "whole_numbers.pt": with_weight(torch.zeros(8, dtype=torch.int64)),
    "eighths.pt": with_weight(torch.zeros(8).to(torch.float8_e4m3fn)),
    "sparse.pt": with_weight(torch.zeros(8).to_sparse()),
    "meta.pt": with_weight(torch.zeros(8, device="meta")),
    "vast.pt": with_weight(torch.zeros(1).expand(2**40)),
    "infinite.pt": with_weight(torch.full((8,), float("inf"))),
    "empty.pt": with_weight(torch.zeros(0)),
    "header.safetensors": bytes_of((100_000).to_bytes(8, "little") + DEEP.encode()),
    "list.index.json": index_of([]),
    "deep.index.json": index_of(DEEP),
    "null.index.json": index_of({"weight_map": {"a": None}}),
    "root.index.json": index_of({"weight_map": {"a": "/etc/passwd.safetensors"}}),
    "itself.index.json": index_of({"weight_map": {"a": "itself.index.json"}}),
    "odd\nname.pt": lambda path: None,
}


@pytest.mark.parametrize(("name", "make"), CHECKPOINTS.items(), ids=map(repr, CHECKPOINTS))
def test_a_checkpoint_that_does_harm_is_not_converted(name, make, load_conversion, tmp_path, capsys):
    path, config = tmp_path / "given" / name, tmp_path / "config.json"
    path.parent.mkdir()
    make(path)
    save_file({"a": torch.zeros(1)}, tmp_path / "outside.safetensors")
    config.write_text(json.dumps(TINY))
    out = tmp_path / "out"
    for script, given in (("checkpoint", [path, out, "--config", config]), ("detok", [out, "--weights", path])):
        convert = load_conversion(f"convert_{script}").main
        assert_refused(partial(convert, list(map(str, given))), capsys, repr(name)[1:-1], tmp_path)


CONFIGS = {
    "no JSON": "{",
    "nesting": DEEP,
    "no text": b"\xff\xfe",
    "an object for a number": {**TINY, "patch_size": {}},
    "digits of a width": {**TINY, "encoder_hidden_size": DIGITS},
    "digits of a number": {**TINY, "shift_factor": DIGITS},
    "layers without end": {**TINY, "decoder_num_layers": 2**40},
}


@pytest.mark.parametrize("content", CONFIGS.values(), ids=CONFIGS)
@pytest.mark.parametrize("way", ["there", "back"])
def test_a_configuration_that_is_none_is_named(content, way, saved_folders, load_conversion, tmp_path, capsys):
    source = shutil.copytree(saved_folders / "tokenizer", tmp_path / "source")
    write("config.json", content)(source)
    options = ["--to_raw"] if way == "back" else ["--config", str(source / "config.json")]
    out = tmp_path / ("out.safetensors" if way == "back" else "out")
    path = source if way == "back" else source / WEIGHTS
    convert = load_conversion("convert_checkpoint").main
    assert_refused(lambda: convert([str(path), str(out), *options]), capsys, "config", tmp_path)
