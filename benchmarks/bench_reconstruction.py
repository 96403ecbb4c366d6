"""PSNR and SSIM of a tokenizer on the 24 Kodak pictures, beside principal components of patches."""

import argparse
import io
import json
import platform
import sys
import tarfile
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from hieratok_hf import AutoencoderHieraTok, open_picture
from hieratok_hf.metrics import psnr, ssim
from hieratok_hf.pyramid import picture_pyramid
from hieratok_hf.shipped import shipped_or_given


def as_tensor(picture: Image.Image) -> Tensor:
    """A picture as `(1, 3, H, W)` in [-1, 1]."""
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1)[None].float() / 127.5 - 1


def centre(picture: Image.Image, size: int) -> Image.Image:
    """The square of `size` pixels in the middle of a picture."""
    left, top = (picture.width - size) // 2, (picture.height - size) // 2
    return picture.crop((left, top, left + size, top + size))


class PrincipalComponents:
    """Patches projected to their first principal components and back, the best linear code of single patches."""

    def __init__(self, shards: list[Path], patch_size: int, channels: int):
        self.patch_size, count = patch_size, 0
        numbers = 3 * patch_size**2
        total, products = torch.zeros(numbers).double(), torch.zeros(numbers, numbers).double()
        for shard in shards:
            with tarfile.open(shard) as archive:
                members = [member for member in archive if member.name.endswith(".webp")]
                for member in tqdm(members, desc=f"{patch_size}x{patch_size} patches of {shard.name}"):
                    file = archive.extractfile(member)
                    assert file is not None
                    picture = as_tensor(Image.open(io.BytesIO(file.read())).convert("RGB"))
                    patches = F.unfold(picture, patch_size, stride=patch_size)[0].T.double()  # (n, 3 * p * p)
                    total, products = total + patches.sum(0), products + patches.T @ patches
                    count += len(patches)
        self.mean = (total / count).float()
        covariance = products / count - torch.outer(total, total) / count**2
        self.directions = torch.linalg.eigh(covariance).eigenvectors[:, -channels:].float()  # (3 * p * p, C)

    def __call__(self, pixel_values: Tensor) -> Tensor:
        patches = F.unfold(pixel_values, self.patch_size, stride=self.patch_size).transpose(1, 2) - self.mean
        decoded = patches @ self.directions @ self.directions.T + self.mean
        return F.fold(decoded.transpose(1, 2), pixel_values.shape[-2:], self.patch_size, stride=self.patch_size)


@torch.inference_mode()
def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, default=Path(__file__).parents[2] / "shared" / "data")
    parser.add_argument("--model", default="hieratok-tiny", help="a folder, a name that ships, or a Hub repository")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--size", type=int, default=512, help="side of the square cut from the middle")
    parser.add_argument("--json", type=Path, default=None, help="write the figures here as well")
    args = parser.parse_args(argv)
    paths = sorted((args.data / "kodak").glob("*.png"))
    shards = sorted((args.data / "imagenette_128").glob("train-*.tar"))
    if not paths or not shards:
        print(f"error: --data {str(args.data)!r} lacks kodak/*.png or imagenette_128/train-*.tar", file=sys.stderr)
        return 2
    vae = AutoencoderHieraTok.from_pretrained(shipped_or_given(args.model)).to(args.device)
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
    baselines = {
        "principal components, 8x8 to 16": PrincipalComponents(shards, 8, 16),
        "principal components, 16x16 to 16": PrincipalComponents(shards, 16, 16),
    }

    figures: dict[str, list[tuple[float, float]]] = {name: [] for name in (args.model, *baselines)}
    scales: list[list[float]] = [[] for _ in vae.config.scale_factors]
    for path in tqdm(paths, desc="Kodak"):
        pixel_values = as_tensor(centre(open_picture(path), args.size))
        latents = vae.encode(pixel_values.to(args.device)).latent_dist.mode()
        pictures = [picture.cpu() for picture in vae.core.decode_scales(latents)]
        reconstructions = {args.model: pictures[-1], **{name: code(pixel_values) for name, code in baselines.items()}}
        for name, decoded in reconstructions.items():
            figures[name].append((psnr(decoded, pixel_values).item(), ssim(decoded, pixel_values).item()))
        for values, picture, target in zip(scales, pictures, picture_pyramid(pixel_values, vae.core.config)):
            values.append(psnr(picture, target).item())

    means = {
        name: dict(zip(("psnr_db", "ssim"), np.mean(rows, 0).round(4).tolist())) for name, rows in figures.items()
    }
    of_scales = [round(float(np.mean(values)), 4) for values in scales]
    on_gpu = args.device.startswith("cuda")
    device = torch.cuda.get_device_name() if on_gpu else f"{torch.get_num_threads()} CPU threads"
    report = {
        "machine": f"{platform.machine()}, {device}, torch {torch.__version__}",
        "pictures": f"{len(paths)} of Kodak, centre {args.size}x{args.size}, posterior mode, float32",
        "mean": means,
        "psnr_db_of_each_scale": of_scales,
        "psnr_db_of_each_picture": {path.stem: round(row[0], 3) for path, row in zip(paths, figures[args.model])},
    }
    print(f"{report['pictures']} ({report['machine']})")
    for name, mean in means.items():
        print(f"{name:36}{mean['psnr_db']:8.2f} dB{mean['ssim']:9.4f} SSIM")
    print("each scale against the picture at its size: " + ", ".join(f"{x:.2f} dB" for x in of_scales))
    if args.json:
        args.json.write_text(json.dumps(report, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
