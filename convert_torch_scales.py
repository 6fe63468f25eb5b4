"""Convert scales and weights between PyTorch files and ours.

Examples:
  python convert_torch_scales.py RepOpt-VGG-B1-scales.pth b1.safetensors
  python convert_torch_scales.py --weights RepOpt-VGG-B1.pth b1-weights.safetensors
  python convert_torch_scales.py --to-torch b1.safetensors b1.pth
  python convert_torch_scales.py --weights --to-torch b1-weights.safetensors b1.pth

An output that ends in .pth or .pt needs torch; .safetensors holds the same names without it.
"""

import argparse
import os
import pathlib
import sys

from repopt_jax.torch_files import conversion


def main() -> int:
    """Convert one file; the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("source", type=pathlib.Path, help="file to read")
    parser.add_argument("target", type=pathlib.Path, help="file to write")
    parser.add_argument("--weights", action="store_true", help="convert weights, not scales")
    parser.add_argument("--to-torch", action="store_true", help="from ours to torch's names")
    parser.add_argument("--force", action="store_true", help="replace an existing target")
    arguments = parser.parse_args()
    try:
        conversion.check_target(arguments.source, arguments.target, force=arguments.force)
        convert = {
            (False, False): conversion.scales_from_torch,
            (False, True): conversion.scales_to_torch,
            (True, False): conversion.weights_from_torch,
            (True, True): conversion.weights_to_torch,
        }[arguments.weights, arguments.to_torch]
        print(convert(arguments.source, arguments.target))
    except (ValueError, OSError, ImportError) as error:
        print(f"{os.path.basename(sys.argv[0])}: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
