"""Parameters and FLOPs of every named size at one image size, by the formulas of `hieratok_hf.models.sizes`."""

import json
from pathlib import Path

from hieratok_hf import SIZES, HieraTokConfig
from hieratok_hf.cli.parsing import make_parser
from hieratok_hf.models.sizes import count_flops, count_parameters, scale_grids


def count(size: str, height: int, width: int) -> dict[str, int | str]:
    """Parameters, and FLOPs (two a multiply-add) to encode and to decode one image, of a named size."""
    config = HieraTokConfig.from_size(size)
    parameters, flops = count_parameters(config), count_flops(config, height, width)
    rows, columns = scale_grids(config, height, width)[-1]
    return {
        "size": size,
        "encoder_parameters": parameters["encoder"],
        "decoder_parameters": parameters["decoder"],
        "latent": f"{config.latent_channels}x{rows}x{columns}",
        "encode_flops": flops["encode"],
        **{f"decode_flops_{k}": decode for k, decode in enumerate(flops["decode"], 1)},
    }


def main(argv: list[str] | None = None) -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--height", type=int, default=256, help="height of the image")
    parser.add_argument("--width", type=int, default=256, help="width of the image")
    parser.add_argument("--json", type=Path, help="write the rows here as well")
    args = parser.parse_args(argv)
    rows = [count(size, args.height, args.width) for size in SIZES]

    print(f"{args.height}x{args.width} pixels, one image; decoding up to scale k of 4")
    print(
        f"{'size':20}{'parameters, M':>24}{'latent':>12}{'GFLOP: encode':>15}"
        f"{'decode k=1':>12}{'k=2':>8}{'k=3':>8}{'k=4':>8}"
    )
    for row in rows:
        encoder, decoder = int(row["encoder_parameters"]) / 1e6, int(row["decoder_parameters"]) / 1e6
        parameters = f"{encoder:.1f} + {decoder:.1f} = {encoder + decoder:.1f}"
        decode = [int(row[f"decode_flops_{k}"]) / 1e9 for k in range(1, 5)]
        flops = f"{int(row['encode_flops']) / 1e9:15.1f}{decode[0]:12.2f}" + "".join(f"{x:8.1f}" for x in decode[1:])
        print(f"{row['size']:20}{parameters:>24}{row['latent']:>12}{flops}")
    if args.json:
        args.json.write_text(json.dumps({"height": args.height, "width": args.width, "rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
