import sys
from pathlib import Path
from typing import Any

import pytest

from glocal.data.plan import PreprocessOptions
from glocal.data.preprocess import preprocess
from glocal.data.store import Store

# The tests of the methods inherit from `method_checks`, which lies beside them.
sys.path.append(str(Path(__file__).parent))
pytest.register_assert_rewrite("method_checks")


@pytest.fixture(scope="session")
def odd(tmp_path_factory: pytest.TempPathFactory, write_dataset: Any, preprocessing: PreprocessOptions) -> Store:
    """Volumes with fewer slices than partitions, one of them a single slice; nothing is labelled."""
    root = tmp_path_factory.mktemp("odd")
    raw = write_dataset(root / "raw", {"odd1": 1, "odd2": 2, "odd3": 3, "odd7": 7}, [])
    return preprocess(raw, root / "store", preprocessing, workers=1)
