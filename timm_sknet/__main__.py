"""`python -m timm_sknet` is `timm-sknet`."""

import sys

from timm_sknet.cli import main

if __name__ == '__main__':
    sys.exit(main())
