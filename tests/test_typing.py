"""What a type checker tells users of the package: wrong calls are errors, right ones are none."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SCRIPT = """\
import torch
import hieratok_hf as ht

model = ht.HieraTokModel.from_pretrained("hieratok-tiny")
vae = ht.AutoencoderHieraTok.from_pretrained("hieratok-tiny")
pipe = ht.HieraTokDiTPipeline.from_pretrained("hieratok-dit-tiny")
tokens, layout = torch.zeros(1, 2, 5, 8), ht.PyramidLayout.from_grid(2, 2, (2, 1))
latents = vae.encode(torch.zeros(1, 3, 64, 64)).latent_dist.mode()
image = vae.decode(latents, num_scales=2).sample
ht.scale_causal_attention(tokens, tokens, tokens, layout)
images = pipe("church", generator=torch.Generator().manual_seed(0)).images
previewer = ht.HieraTokPreviewer(vae, every=5)

ht.HieraTokModel.from_pretrained(3)  # wrong
ht.HieraTokModel.from_size(3)  # wrong
model.decode(latents, num_scales="2")  # wrong
vae.decode(latents, scales=2)  # wrong
vae.encode("a.png")  # wrong
ht.HieraTokPreviewer(vae, every="5")  # wrong
ht.scale_causal_attention(tokens, tokens, tokens)  # wrong
ht.register_attention_backend("mine", 3)  # wrong
pipe("church", num_steps=5)  # wrong
pipe("church", generator=0)  # wrong
"""


def test_mypy_finds_every_wrong_call(tmp_path, pytestconfig):
    pytest.importorskip("mypy")
    (tmp_path / "script.py").write_text(SCRIPT)
    kept = pytestconfig.cache.mkdir("mypy")  # or every run of the tests would read all of torch again
    options = ["--strict", "--config-file", ROOT / "pyproject.toml", "--cache-dir", kept]
    command = [sys.executable, "-m", "mypy", *options, "script.py"]
    environment = {**os.environ, "MYPYPATH": str(ROOT / "src")}
    result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    found = {int(line) for line in re.findall(r"^script\.py:(\d+): error", result.stdout, re.MULTILINE)}
    wrong = {number for number, line in enumerate(SCRIPT.splitlines(), 1) if line.endswith("# wrong")}
    assert len(wrong) == 10 and found == wrong, result.stdout + result.stderr
