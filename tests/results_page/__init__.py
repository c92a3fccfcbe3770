"""Of docs/make_results.py and its parts, which lie beside the page."""

import sys

from tests.runs import ROOT

sys.path.insert(0, str(ROOT / "docs"))  # where the page's script finds its own parts
