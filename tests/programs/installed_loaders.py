"""What the loaders alone read of a file: `installed_loaders.py BETON` prints its samples and the version."""

import sys

from fastpmae_loaders import Beton, __version__

if __name__ == "__main__":
    print(len(Beton(sys.argv[1])), __version__)
