"""Fixtures that several test files share."""

import importlib.util
import os
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import ModuleType

import pytest
import torch

if not torch.cuda.is_available():
    # Without a GPU only the interpreter runs Triton's kernels, and Triton asks for it once, when it is imported.
    os.environ.setdefault("TRITON_INTERPRET", "1")

# Without it, each name that is not there costs 25 seconds of attempts on a machine without a network.
os.environ.setdefault("HF_HUB_OFFLINE", "1")

from helpers import random_core
from hub_server import hub_here as hub_here
from scripts import forget_processes, load_script

from hieratok_hf import AutoencoderHieraTok, HieraTokImageProcessorPil
from hieratok_hf.models.attention_dispatch import ATTENTION_IMPLEMENTATIONS
from hieratok_hf.ops.attention import REGISTERED_BACKENDS

# Files whose fixtures take half a minute to make.
ON_ONE_WORKER = {"test_app_browser.py", "test_docs.py", "test_export.py", "test_gpu_launches.py", "test_page.py"}


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """Keeps a file of `ON_ONE_WORKER` together; markers of groups have no effect with pytest 9.2 and xdist 3.8."""
    from xdist.scheduler import LoadScopeScheduling

    class Scheduling(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = nodeid.split("::")[0]
            return file if Path(file).name in ON_ONE_WORKER else nodeid

    return Scheduling(config, log) if config.getvalue("dist") == "load" else None


@pytest.fixture(autouse=True)
def registered_backends():
    """Forgets the attention backends that a test has registered for its process."""
    yield
    for name in REGISTERED_BACKENDS:
        del ATTENTION_IMPLEMENTATIONS[name]
    REGISTERED_BACKENDS.clear()


@pytest.fixture
def script_surroundings(request, tmp_path_factory, monkeypatch):
    """For a script: a cache of data sets of its own, and no state left in accelerate's singletons."""
    datasets = pytest.importorskip("datasets")
    folder = tmp_path_factory.getbasetemp() / "datasets"
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", folder)
    monkeypatch.setenv("HF_DATASETS_CACHE", str(folder))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    if "gpu" not in request.keywords:
        monkeypatch.setenv("ACCELERATE_USE_CPU", "true")  # where every sum has its order
    yield
    forget_processes()


@pytest.fixture
def saved(tmp_path) -> Path:
    """A saved tiny tokenizer with its image processor."""
    folder = tmp_path / "my.model-1"
    AutoencoderHieraTok.from_core(random_core()).save_pretrained(folder)
    HieraTokImageProcessorPil(size_divisor=4).save_pretrained(folder)
    return folder


@pytest.fixture
def load_benchmark(monkeypatch, tmp_path) -> Callable[[str], ModuleType]:
    """A script of `benchmarks/` as a module, whose results go to a folder of the test."""

    def load(name: str) -> ModuleType:
        module = load_script("benchmarks", name)
        monkeypatch.setattr(module, "RESULTS", tmp_path / "results", raising=False)
        return module

    return load


@pytest.fixture
def bench(request, load_benchmark) -> ModuleType:
    """The script of `benchmarks/` that a file `test_NAME.py` tests."""
    return load_benchmark(request.module.__name__.removeprefix("test_"))


@pytest.fixture
def load_conversion() -> Callable[[str], ModuleType]:
    """A command that converts as a module."""
    return partial(load_script, "cli")


@pytest.fixture
def device_of(monkeypatch) -> Callable[[str], str]:
    """Where an attention backend is tested: Triton's on a GPU if there is one, every other on the CPU."""

    def device(backend: str) -> str:
        if backend != "triton" or not torch.cuda.is_available():
            return "cpu"
        from hieratok_hf.ops import attention_triton

        # Timing every tile at every size would take minutes; the last fits every chip.
        for name in ("_attend", "_query_gradient", "_key_gradient"):
            kernel = getattr(attention_triton, name)
            monkeypatch.setattr(kernel, "configs", kernel.configs[-1:])
        return "cuda"

    return device


@pytest.fixture
def reached(monkeypatch) -> list[str]:
    """The attention backends that computed something, in order."""
    from hieratok_hf.ops import attention, attention_flex

    backends = []

    def watch(owner, name, backend_of):
        plain = getattr(owner, name)

        def watched(*args, **kwargs):
            backends.append(backend_of(kwargs))
            return plain(*args, **kwargs)

        monkeypatch.setattr(owner, name, watched)

    def sdpa(kwargs):
        return "sdpa" if kwargs.get("attn_mask") is None else "sdpa_mask"

    watch(attention.F, "scaled_dot_product_attention", sdpa)
    watch(attention, "reference_attention", lambda kwargs: "reference")
    watch(attention_flex, "flex_scale_causal_attention", lambda kwargs: "flex")
    if importlib.util.find_spec("triton") is not None:
        from hieratok_hf.ops import attention_triton

        watch(attention_triton, "prefix_attention", lambda kwargs: "triton")
    return backends


@pytest.fixture(scope="session")
def browser():
    """Chromium, without a window."""
    driver = pytest.importorskip("playwright.sync_api", reason="it drives the browser")
    path = shutil.which("chromium") or shutil.which("google-chrome")
    if path is None:
        pytest.skip("needs chromium or google-chrome")
    with driver.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield browser
        browser.close()
