"""``python -m aefast``, which ``torchrun -m aefast`` needs: the ``aefast`` command."""

import sys

from aefast.cli import main

sys.exit(main())
