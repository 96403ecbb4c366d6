"""Model cards: metadata that the Hub reads, code that runs, sizes and figures that are true, and nothing escapes."""

import json
import re
import shutil
from pathlib import Path

import pytest
import yaml
from helpers import images, random_core, recorded
from huggingface_hub import ModelCard, metadata_load
from huggingface_hub.repocard_data import model_index_to_eval_results
from tiny_pipelines import tiny_pipeline

import hieratok_hf
from hieratok_hf import AutoencoderHieraTok, HieraTokModel
from hieratok_hf.hub.card import card_for, model_card
from hieratok_hf.hub.remote_code import add_remote_code

CARD = Path(__file__).resolve().parents[2] / "model_card.md"
SHIPPED = {name: Path(hieratok_hf.pretrained(name)) for name in hieratok_hf.SHIPPED}
HOSTILE = "a|b\n---\nlicense: mit\n# {{ 7 * 7 }} {% x %} <script>`*_[x](http://evil.example) \\ \x00\u202e![y]"
SCALES = "scales: cells of the latent on a side, coarse to fine"
CODE = re.compile(r"```python\n(.*?)```", re.DOTALL)


def cells(card):
    """Rows of the tables, by their first cell."""
    rows = [line for line in card.text.splitlines() if line.startswith("|")]
    return {row[0]: row[1:] for row in ([x.strip() for x in re.split(r"(?<!\\)\|", line)[1:-1]] for line in rows)}


def section(card, name):
    return re.search(rf"^## {name}\n\n(.*?)(?=^## |\Z)", card.text, re.DOTALL | re.MULTILINE)[1]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    AutoencoderHieraTok.from_core(random_core()).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory):
    return Path(tiny_pipeline(tmp_path_factory.mktemp("pipeline")))


@pytest.fixture
def shipped(tmp_path):
    """A folder of the shipped tokenizer, for a README.md of its own."""
    return shutil.copytree(SHIPPED["hieratok-tiny"], tmp_path / "model")


def edited(folder, target, name, **values):
    """A copy whose JSON file `name` has these values."""
    shutil.copytree(folder, target)
    (target / name).write_text(json.dumps({**json.loads((target / name).read_text()), **values}))
    return target


@pytest.mark.parametrize(
    ("name", "reports", "task", "count"),
    [
        ("hieratok-tiny", ["trade_off", "fine_tune"], "image-to-image", 6),
        ("hieratok-tiny", ["text", "perturbed"], "image-to-image", 16),
        ("hieratok-dit-tiny", ["hieratok-dit-tiny"], "unconditional-image-generation", 3),
    ],
)
def test_the_metadata_is_what_huggingface_hub_reads(name, reports, task, count, tmp_path):
    given = {"base_model": "some/base", "datasets": ["frgfm/imagenette"], "license": "mit"}
    card = model_card(SHIPPED[name], repo_id=f"me/{name}", results=[recorded(x) for x in reports], **given)
    card.save(tmp_path / "README.md")
    head = metadata_load(tmp_path / "README.md")
    assert {key: head[key] for key in given} == given
    assert (head["library_name"], head["pipeline_tag"]) == ("diffusers", task)
    assert "hieratok" in head["tags"] and all(isinstance(tag, str) for tag in head["tags"])
    found, figures = model_index_to_eval_results(head["model-index"])
    # Nothing is lost where huggingface_hub groups figures by data set.
    assert found == name and len(figures) == count and figures == card.data.eval_results
    told = section(card, "Figures")
    assert len(re.findall(r"^hieratok evaluate.*", told, re.MULTILINE)) == len(reports)
    for figure in figures:
        assert figure.task_type == task
        assert str(figure.metric_value) in told and figure.metric_args["command"] in told
        if "trade_off" in reports:
            assert ("trade_off" in figure.metric_args["command"]) == (figure.dataset_name == "kodak")
    assert ("FD is no FID" in told) == ("fine_tune" in reports)
    assert str(ModelCard.load(tmp_path / "README.md")) == (tmp_path / "README.md").read_text() == str(card)
    # Whose it is, and what is whose.
    assert "neither the authors' code nor their model" in card.text and "official" not in str(card).lower()
    assert "eprint = {2509.23736}" in section(card, "Citation")
    for part in ("Sizes", "Use", "Intended use", "Limits", "Training", "Environment"):
        assert section(card, part).strip()


def test_the_sizes_of_a_tokenizer_are_its_own(tokenizer, tmp_path):
    model = AutoencoderHieraTok.from_pretrained(tokenizer)
    rows, config = cells(model_card(tokenizer, repo_id="me/tok")), model.config
    assert rows["parameters"] == [f"{sum(x.numel() for x in model.parameters()):,} in float32"]
    side = config.sample_size
    shape = model.encode(images(1, 3, side, side)).latent_dist.mode().shape[1:]
    assert rows["latent"] == [f"{'x'.join(map(str, shape))} for {side}x{side} pixels"]
    assert rows["encoder"] == [f"{config.encoder_num_layers} blocks of width 32 with 2 heads"]
    assert rows[SCALES][0].startswith("8, 4, 2, 1; `decode(")
    AutoencoderHieraTok.from_core(random_core(scale_factors=(1,))).save_pretrained(tmp_path)
    assert cells(model_card(tmp_path, repo_id="me/tok"))[SCALES] == ["1"]


def test_shards_variants_and_second_names_are_counted_once(tokenizer, tmp_path):
    expected = cells(model_card(tokenizer, repo_id="me/tok"))["parameters"]
    model = HieraTokModel.from_pretrained(tokenizer)
    model.save_pretrained(tmp_path / "shards", max_shard_size="20KB")
    assert len(list((tmp_path / "shards").glob("diffusion_pytorch_model-*"))) > 1
    assert cells(model_card(tmp_path / "shards", repo_id="me/tok"))["parameters"] == expected
    model.save_pretrained(tmp_path / "both")
    assert (tmp_path / "both" / "model.safetensors").is_file()
    model.half().save_pretrained(tmp_path / "both", variant="fp16")
    (told,) = cells(model_card(tmp_path / "both", repo_id="me/tok"))["parameters"]
    assert told.split(" in ")[0] == expected[0].split(" in ")[0]
    assert sorted(told.split(" in ")[1].split(" and ")) == ["float16", "float32"]


def test_the_sizes_of_a_pipeline_are_its_own(pipeline, tmp_path):
    pipe = hieratok_hf.HieraTokDiTPipeline.from_pretrained(pipeline)
    rows = cells(model_card(pipeline, repo_id="me/dit"))
    for name in ("transformer", "vae"):
        part = getattr(pipe, name)
        count = sum(x.numel() for x in part.parameters())
        assert rows[name] == [f"{type(part).__name__}, {count:,} parameters in float32"]
    image = pipe(0, num_inference_steps=1).images[0]
    assert rows["images"] == [f"{image.width}x{image.height} pixels"]
    assert rows["latent"] == ["4x2x2"]
    assert rows["classes"] == [r"3: 0 tench; 1 English\_springer; 2 church, church building"]
    assert rows["scheduler"] == ["FlowMatchEulerDiscreteScheduler"]
    other = edited(pipeline, tmp_path / "other", "model_index.json", vae=["diffusers", "AutoencoderKL"])
    assert "images" not in cells(model_card(other, repo_id="me/dit"))


@pytest.mark.parametrize(("kind", "names"), [("tokenizer", {"model", "vae"}), ("pipeline", {"pipe", "image"})])
def test_the_code_for_use_runs(kind, names, request):
    folder = request.getfixturevalue(kind)
    (code,) = CODE.findall(model_card(folder, repo_id="me/mine").text)
    assert '"me/mine"' in code
    made = {}
    exec(code.replace("me/mine", str(folder)), made)
    assert names <= made.keys()
    if kind == "tokenizer":
        assert isinstance(made["model"], HieraTokModel) and isinstance(made["vae"], AutoencoderHieraTok)


def test_loading_without_the_package_is_shown_where_the_code_is(tokenizer, pipeline, tmp_path):
    with_code = shutil.copytree(tokenizer, tmp_path / "tokenizer")
    pipe = shutil.copytree(pipeline, tmp_path / "pipeline")
    for folder in (with_code, pipe):
        add_remote_code(folder)
    loaders = ((with_code, "transformers.AutoModel"), (with_code, "diffusers.AutoModel"), (pipe, "DiffusionPipeline"))
    for folder, loader in loaders:
        _, code = CODE.findall(model_card(folder, repo_id="me/mine").text)
        compile(code, "card", "exec")
        assert f'{loader}.from_pretrained("me/mine", trust_remote_code=True)' in code
    for folder in (tokenizer, pipeline):
        assert "trust_remote_code" not in model_card(folder, repo_id="me/mine").text


def test_what_is_not_known_is_said_and_what_is_given_stands(tokenizer):
    card = model_card(tokenizer, repo_id="me/tok")
    assert "none" in section(card, "Figures").lower()
    assert "not recorded" in section(card, "Training") and "not recorded" in section(card, "Environment")
    assert not {"datasets", "base_model", "model-index"} & card.data.to_dict().keys()
    given = {"training": "*Ten* steps.\n\n---\n\nOn CC0 images.", "hardware": "One core, an hour."}
    card = model_card(tokenizer, repo_id="me/tok", datasets=["a/b", "c"], base_model="d/e", **given)
    assert section(card, "Environment") == "One core, an hour.\n\n"
    told = section(card, "Training")
    assert told.endswith(f"{given['training']}\n\n") and "not recorded" not in told
    for link in ("datasets/a/b", "datasets/c", "d/e"):
        assert f"(https://huggingface.co/{link})" in told


RECORD = {
    "command": "hieratok train",
    "arguments": {},
    "data": {"names": ["clothes/train-0.tar", "b"], "images": 3068, "fingerprint": "0"},
    "machine": {"cpu": "A processor"},
    "hours": 1.25,
    "steps": 2000,
    "seed": 3,
    "parents": {"model": "org/base", "teacher": "sd"},
}


@pytest.mark.parametrize("kind", ["tokenizer", "pipeline"])
def test_what_a_training_wrote_beside_its_model_is_told(kind, request, tmp_path):
    folder = shutil.copytree(request.getfixturevalue(kind), tmp_path / "model")
    (folder / "training.json").write_text(json.dumps(RECORD))
    card = model_card(folder, repo_id="me/mine")
    for text in ("2,000 steps of hieratok train with seed 3", "3,068 images: clothes/train-0.tar, b", "teacher sd"):
        assert text in section(card, "Training")
    assert card.data.base_model == "org/base" and "1.25 hours on A processor" in section(card, "Environment")
    given = model_card(folder, repo_id="me/mine", training="Mine.", hardware="A lamp.", base_model="my/own")
    assert section(given, "Environment") == "A lamp.\n\n" and "2,000" not in given.text
    assert given.data.base_model == "my/own"


def test_a_hostile_training_stays_text(tokenizer, tmp_path):
    folder = shutil.copytree(tokenizer, tmp_path / "model")
    hostile = {"command": HOSTILE, "data": {"names": [HOSTILE]}, "parents": {HOSTILE: HOSTILE}}
    hostile["machine"] = dict.fromkeys(("cpu", "torch", "device"), HOSTILE)
    (folder / "training.json").write_text(json.dumps({**RECORD, **hostile}))
    card = model_card(folder, repo_id="me/tok", license="apache-2.0")
    assert yaml.safe_load(card.data.to_yaml())["license"] == "apache-2.0" and "base_model" not in card.data.to_dict()
    markdown = pytest.importorskip("markdown_it", reason="it renders Markdown as the Hub does")
    tokens = markdown.MarkdownIt("gfm-like", {"linkify": False}).parse(card.text)
    inline = [child for token in tokens for child in token.children or ()]
    assert not {"html_inline", "image", "em", "strong"} & {child.type for child in inline}
    assert not {"html_block", "hr"} & {token.type for token in tokens}
    for name, value in (("steps", "many"), ("hours", None), ("data", {"names": 3}), ("machine", [])):
        (folder / "training.json").write_text(json.dumps({**RECORD, name: value}))
        with pytest.raises(ValueError, match=r"training\.json"):
            model_card(folder, repo_id="me/tok")


def test_hostile_names_stay_names(pipeline, tmp_path):
    names = {"0": HOSTILE, "1": "---", "2": "b"}
    folder = edited(pipeline, tmp_path / "hostile", "model_index.json", id2label=names, prediction_type=HOSTILE)
    report = recorded("hieratok-dit-tiny")
    report |= {"classes": names, "notes": [HOSTILE], "machine": dict.fromkeys(("cpu", "torch", "device"), HOSTILE)}
    report["settings"] |= {"classifier": HOSTILE, "reference": [HOSTILE, "---"], HOSTILE: HOSTILE, "fid_size": HOSTILE}
    report |= {f"{x}_per_class": [1, 1, 1] for x in ("images", "class_accuracy", "top1_accuracy")}
    report[f"FD-{HOSTILE}"] = 1.5
    card = model_card(folder, repo_id="me/dit", results=[report], license="apache-2.0")
    card.save(tmp_path / "README.md")
    head = metadata_load(tmp_path / "README.md")
    assert head["license"] == "apache-2.0" and head == yaml.safe_load(card.data.to_yaml())
    assert model_index_to_eval_results(head["model-index"])[1] == card.data.eval_results
    assert any("{{ 7 * 7 }}" in figure.metric_name for figure in card.data.eval_results)
    assert ModelCard(str(card)).text == card.text and "\x00" not in str(card)
    assert all(len(block.splitlines()) == 1 for block in re.findall(r"```bash\n(.*?)\n```", card.text, re.DOTALL))
    tables = re.findall(r"(?:^\|.*\n)+", card.text, re.MULTILINE)
    for table in tables:
        assert len({len(re.split(r"(?<!\\)(?:\\\\)*\|", row)) for row in table.splitlines()}) == 1
    markdown = pytest.importorskip("markdown_it", reason="it renders Markdown as the Hub does")
    tokens = markdown.MarkdownIt("gfm-like", {"linkify": False}).parse(card.text)
    inline = [child for token in tokens for child in token.children or ()]
    assert not {"html_inline", "image", "em", "strong"} & {child.type for child in inline}
    assert not {"html_block", "hr"} & {token.type for token in tokens}
    assert sum(token.type == "table_open" for token in tokens) == len(tables)
    links = {child.attrGet("href") for child in inline if child.type == "link_open"}
    assert links == {"https://arxiv.org/abs/2509.23736"}
    seen = " ".join(HOSTILE.split()).replace("\x00", "").replace("\u202e", "")
    texts = ["".join(child.content for child in token.children or ()) for token in tokens if token.type == "inline"]
    assert texts.count(seen) >= 2  # a row of the classes, and a note


@pytest.mark.parametrize("mark", ["", "\ufeff"])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_a_card_that_is_there_is_kept(tokenizer, tmp_path, end, mark):
    path = shutil.copytree(tokenizer, tmp_path / "model") / "README.md"
    head = ["---", "license: other", "license_name: mine", "tags:", "- mine", "pipeline_tag: null", "---"]
    body = end.join(["", "# My own", "", "Words | of mine, {{ untouched }}.", "", "---", "", "The end."])
    path.write_bytes((mark + end.join(head) + end + body).encode())
    card = card_for(path.parent, repo_id="me/tok", datasets=["a/b"], license="mit")
    assert card.text == body
    data = card.data.to_dict()
    assert (data["license"], data["license_name"], data["tags"]) == ("other", "mine", ["mine"])
    assert (data["library_name"], data["pipeline_tag"], data["datasets"]) == ("diffusers", "image-to-image", ["a/b"])
    card.save(path)
    assert list(metadata_load(path))[:4] == ["license", "license_name", "tags", "pipeline_tag"]
    assert path.read_bytes().count(b"\n") == path.read_bytes().count(end.encode()) > 0
    assert (b"\r" in path.read_bytes()) == (end == "\r\n")
    assert str(card_for(path.parent, repo_id="me/tok", license="mit")) == str(card)


def test_a_card_that_is_there_gets_figures_only_if_it_has_none(shipped):
    report = recorded("trade_off")
    (shipped / "README.md").write_text("# No head\n")
    card = card_for(shipped, repo_id="me/tok", results=[report])
    assert card.text == "# No head\n" and card.data.to_dict()["model-index"][0]["name"] == "tok"
    assert [figure.metric_value for figure in card.data.eval_results] == [30.8471, 0.8843, 0.3714]
    card.data.eval_results = card.data.eval_results[:1]
    card.data.eval_results[0].metric_value = 1.0
    card.data.model_name = "another"
    card.save(shipped / "README.md")
    kept = card_for(shipped, repo_id="me/tok", results=[report])
    assert kept.data.model_name == "another"
    assert [figure.metric_value for figure in kept.data.eval_results] == [1.0]


def test_figures_that_huggingface_hub_would_merge_are_kept(shipped):
    result = {"task": {"type": "t"}, "metrics": [{"type": "psnr", "value": 1, "unknown": "kept"}]}
    results = [{**result, "dataset": {"type": "d", "name": name}} for name in ("first", "second")]
    index = [{"name": name, "results": results} for name in "ab"]
    (shipped / "README.md").write_text(f"---\n{yaml.safe_dump({'model-index': index})}---\n# Mine\n")
    card = card_for(shipped, repo_id="me/tok", results=[recorded("trade_off")], license="apache-2.0")
    card.save(shipped / "README.md")
    head = metadata_load(shipped / "README.md")
    assert head["model-index"] == index and head["license"] == "apache-2.0"
    assert not {"eval_results", "model_name"} & head.keys()


@pytest.mark.parametrize(
    "head", [b"---\nlicense: [\n---\n", b"---\n- a list\n---\n", b"---\nmodel-index: 3\n---\n", b"\xff\xfe"]
)
def test_metadata_that_cannot_be_kept_is_an_error(shipped, head):
    (shipped / "README.md").write_bytes(head)
    with pytest.raises(ValueError, match=r"README.md"):
        card_for(shipped, repo_id="me/tok")


NO_IDS = [("repo_id", "a/b/c"), ("repo_id", 'me/x")\nimport os'), ("datasets", ["two words"])]


@pytest.mark.parametrize(("name", "value"), [*NO_IDS, ("base_model", "/home/me/model"), ("license", "apache 2\n")])
def test_arguments_that_are_no_ids_are_refused(tokenizer, name, value):
    with pytest.raises(ValueError, match="license" if name == "license" else "Repo id"):
        model_card(tokenizer, **{"repo_id": "me/tok", name: value})


@pytest.mark.parametrize(("kind", "name"), [("tokenizer", "config.json"), ("pipeline", "model_index.json")])
def test_folders_of_other_classes_are_refused(kind, name, request, tmp_path):
    folder = edited(request.getfixturevalue(kind), tmp_path / "other", name, _class_name="Other")
    with pytest.raises(ValueError, match="'Other'"):
        model_card(folder, repo_id="me/tok")


def test_the_repository_s_own_card_has_the_figures_that_are_recorded():
    card = ModelCard.load(CARD)
    given = {"results": [recorded("trade_off")], "license": "apache-2.0"}
    same = model_card(SHIPPED["hieratok-tiny"], repo_id="hieratok-tiny", **given)
    assert card.data.eval_results == same.data.eval_results and card.data.model_name == "hieratok-tiny"
    for key in ("license", "library_name", "pipeline_tag", "tags"):
        assert card.data.get(key) == same.data.get(key)
    psnr, ssim, perceptual = (figure.metric_value for figure in card.data.eval_results)
    assert f"| {psnr:.2f} | {ssim:.4f} | {perceptual:.4f} |" in card.text
    assert card.data.base_model is None and metadata_load(CARD) == card.data.to_dict()
    for name in card.data.datasets:
        assert f"`{name}`" in card.text
    count = int(cells(same)["parameters"][0].split()[0].replace(",", ""))
    assert f"{count / 1e6:.1f} M parameters in float32" in card.text


@pytest.mark.parametrize("name", ["README.md", "training.json"])
def test_a_licence_is_lowered_and_one_that_is_none_is_refused_with_its_file(shipped, name):
    def write(license):
        text = json.dumps({**RECORD, "license": license})
        (shipped / name).write_text(f"---\n{text}\n---\n# Mine\n" if name == "README.md" else text)

    write("Apache-2.0")
    assert card_for(shipped, repo_id="me/tok").data.license == "apache-2.0"
    for value in (["mit", "apache-2.0"], 5, "no licence"):
        write(value)
        with pytest.raises(ValueError, match=rf"`license` of .*{name}.*got {re.escape(repr(value))}\.$"):
            card_for(shipped, repo_id="me/tok")


def test_a_licence_is_not_assumed(tokenizer, tmp_path):
    folder = shutil.copytree(tokenizer, tmp_path / "model")
    card = model_card(folder, repo_id="me/tok")
    assert "license" not in yaml.safe_load(card.data.to_yaml()) and "licence of the weights | not stated" in card.text
    (folder / "training.json").write_text(json.dumps({**RECORD, "license": "mit"}))
    assert model_card(folder, repo_id="me/tok").data.license == "mit"
